"""Which experts a router uses that replays an engine's choices."""

from types import SimpleNamespace

import torch

from megatron_r1.models import platform

platform.prepare_process()

from megatron_r1.models.routing_replay import LayerReplay, RecordedRouting  # noqa: E402

SCORES = torch.tensor([[0.1, 0.6, 0.2, 0.7], [0.9, 0.3, 0.8, 0.1], [0.4, 0.5, 0.1, 0.2]])
RECORDED = torch.tensor([[[0, 2]], [[1, 3]], [[2, 3]]], dtype=torch.uint8)
KNOWN = torch.tensor([True, False, True])


def top_k(scores, topk, num_groups, group_topk):
    return scores.topk(topk)


def chosen(replay):
    return replay.get_replay_topk(SCORES, 2, None, None, top_k)


def test_known_tokens_have_the_engines_experts_and_the_trainers_scores():
    replay = LayerReplay(SimpleNamespace(training=True), moe_index=0)
    assert chosen(replay)[1].tolist() == [[3, 1], [0, 2], [1, 0]]
    replay.current, replay.is_measured = RecordedRouting(RECORDED, KNOWN), True
    scores, experts = chosen(replay)
    assert experts.tolist() == [[0, 2], [0, 2], [2, 3]]
    assert torch.equal(scores, SCORES.gather(1, experts))
    assert (int(replay.num_agreed), int(replay.num_compared)) == (0, 4)


def test_a_recomputed_layer_uses_the_choices_of_its_first_pass():
    replay = LayerReplay(SimpleNamespace(training=True), moe_index=0)
    first, second = (RecordedRouting(RECORDED.roll(n, 0), KNOWN.roll(n)) for n in (0, 1))
    found = []
    for recorded in (first, second):
        replay.current = recorded
        with torch.no_grad():
            found.append(chosen(replay)[1])
    assert not torch.equal(*found)
    assert torch.equal(chosen(replay)[1], found[0])
    assert torch.equal(chosen(replay)[1], found[1])
    assert not replay.waiting
