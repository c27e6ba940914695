"""The teacher of on-policy distillation: what is refused before it starts, and its
log-probabilities on their way from a server (a peer on loopback) to the trainer's batch."""

import asyncio
import contextlib
import json
from array import array
from types import SimpleNamespace

import pytest
import torch
from aiohttp import web
from fakes.loopback import serving
from r1_grading import RewardPool
from refusals import refused
from transformers import PreTrainedTokenizerFast

from megatron_r1.base.errors import Cause
from megatron_r1.config import Config, RewardsConfig
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.group_records import decode, encode, from_record, to_record
from megatron_r1.controller.rollouts.rollout import RolloutSampling
from megatron_r1.controller.teacher_checks import check_teachers, differing_tokens
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.episodes import Branch, Episode, EpisodeResult
from megatron_r1.engines.fleet.external_fleet import ExternalFleet
from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.responses import Response
from megatron_r1.trainer.sequence_packing import pack_batch
from megatron_r1.trainer.token_split import TokenSplit
from megatron_r1.trainer.training_sample import Sample


def write_model(folder, words, *, positions=64, vocab_size=None, **changes):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    hf_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocab_size or len(vocabulary),
        "max_position_embeddings": positions,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    (folder / "config.json").write_text(json.dumps(hf_config | changes))
    return str(folder)


WORDS = ["one", "two", "three"]


def check(tmp_path, words=WORDS, rollout=None, teacher=None, schedule=(), **model):
    student = write_model(tmp_path / "student", WORDS, vocab_size=8)
    path = write_model(tmp_path / "teacher", words, **{"vocab_size": 8, **model})
    check_teachers(
        Config(
            model={"path": student},
            rollout={"max_response_tokens": 32} | (rollout or {}),
            rl={"algorithm": "on_policy_distillation", "schedule": list(schedule)},
            teacher={"path": path} | (teacher or {}),
        )
    )


def test_a_teacher_of_another_architecture_with_more_tokens_of_its_own_is_accepted(tmp_path):
    check(tmp_path, [*WORDS, "four"], vocab_size=9, architectures=["AnyForCausalLM"])


@pytest.mark.parametrize(
    ("wrong", "key", "cause", "shown"),
    [
        ({"words": ["one", "three", "two"]}, "teacher.path", Cause.CONFLICT, ("'two'", "'three'")),
        ({"words": ["one", "two"]}, "teacher.path", Cause.CONFLICT, ("4 is 'three'",)),
        ({"vocab_size": 7}, "teacher.path", Cause.CONFLICT, (6, 7)),
        ({"positions": 48}, "teacher.path", Cause.TOO_LARGE, ("48", "64", "rollout.max_model_len")),
        ({"rollout": {"temperature": 0.7}}, "rollout.temperature", Cause.CONFLICT, ("0.7",)),
        (
            *({"schedule": [{"from_step": 3, "rollout.temperature": 0.9}]}, "rollout.temperature"),
            *(Cause.CONFLICT, ("from_step 3", "0.9")),
        ),
        (
            {"teacher": {"tensor_parallel": 3}},
            "teacher.tensor_parallel",
            Cause.INDIVISIBLE,
            ("heads=4",),
        ),
        ({"teacher": {"path": "nowhere"}}, "teacher.path", Cause.NOT_FOUND, ("nowhere",)),
        (
            {"teacher": {"by_source": {"math": {"path": "nowhere"}}}},
            "teacher.by_source.math.path",
            Cause.NOT_FOUND,
            ("nowhere",),
        ),
    ],
)
def test_a_teacher_that_does_not_fit_the_student_is_refused(tmp_path, wrong, key, cause, shown):
    with refused(key, cause, *shown):
        check(tmp_path, **wrong)


def test_a_student_may_sample_with_a_cut(tmp_path):
    check(tmp_path, rollout={"top_p": 0.9, "top_k": 4})


def test_a_teacher_goes_with_the_algorithm_that_asks_it():
    with refused("teacher.path", Cause.MISSING):
        check_teachers(Config(rl={"algorithm": "on_policy_distillation"}))
    with refused("teacher.path", Cause.CONFLICT, "rl.algorithm: grpo"):
        check_teachers(Config(teacher={"path": "t"}))


def test_without_either_there_is_nothing_to_check():
    check_teachers(Config())


def test_only_the_first_differing_tokens_are_named():
    told = differing_tokens({f"a{n}": n for n in range(9)}, {f"b{n}": n for n in range(9)})
    assert [name in told for name in ("'a0'", "'b0'", "'b4'", "'b5'")] == [True, True, True, False]
    assert told.endswith(" 4 more")


def entries(token_ids):
    """vLLM's answer: the log-probability of token t at position i is -(i + t / 100)."""
    by_token = [{str(t): {"logprob": -(i + t / 100)}} for i, t in enumerate(token_ids)]
    return [None, *by_token[1:]]


class Peer:
    """A vLLM server that others run. say: its answer to the k-th request for log-probabilities,
    from 0: what it says of the tokens, or `None` for a dropped connection."""

    def __init__(self, say=lambda k, ids: entries(ids), max_model_len=64, has_generate_path=True):
        self.say, self.card = say, {"id": "m", "max_model_len": max_model_len}
        self.has_generate_path, self.num_asked, self.paths = has_generate_path, 0, []

    async def __aenter__(self):
        self._server = serving(self._answer)
        self.url = await self._server.__aenter__()
        return self

    async def __aexit__(self, *exception):
        await self._server.__aexit__(*exception)

    async def _answer(self, request):
        self.paths.append(request.path)
        if request.path == "/v1/models":
            return web.json_response({"data": [self.card]})
        if request.path != "/inference/v1/generate" or not self.has_generate_path:
            return web.Response(status=404)
        body = await request.json()
        if body["token_ids"] == [0, 0]:  # the look before the first use
            return web.json_response({"prompt_logprobs": entries([0, 0])})
        assert body["sampling_params"]["prompt_logprobs"] == 0
        said = self.say(self.num_asked, body["token_ids"])
        self.num_asked += 1
        if said is None:
            request.transport.close()
            return web.Response()
        return web.json_response({"prompt_logprobs": said})


def ask(peer, call):
    async def run():
        async with peer, EngineClient(peer.url) as client:
            return await call(client)

    return asyncio.run(run())


def test_logprobs_are_those_of_the_tokens_from_the_first_asked_for():
    logprobs = ask(Peer(), lambda client: client.compute_logprobs([3, 4, 5, 6], 2))
    assert logprobs.typecode == "f" and list(logprobs) == pytest.approx([-2.05, -3.06])


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (entries([3, 4]), "3 .*2"),
        (entries([3, 9, 5]), "token 4"),
        ([None, None, {"5": {"logprob": -1.0}}], "token 4"),
        ([None, {"4": {"logprob": -9999.0}}, {"5": {"logprob": -1.0}}], "token 4 .*-9999"),
        ([None, {"4": {"logprob": None}}, {"5": {"logprob": -1.0}}], "prompt_logprobs"),
    ],
)
def test_logprobs_that_do_not_add_up_are_an_error(said, says):
    with pytest.raises(EngineError, match=says):
        ask(Peer(lambda k, ids: said), lambda client: client.compute_logprobs([3, 4, 5], 1))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("megatron_r1.engines.fleet.engine.DEATH_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(
        "megatron_r1.engines.fleet.external_fleet.ExternalServer.poll_seconds", 0.01
    )


def with_fleet(tmp_path, peers, story, *, max_restarts=0, start_timeout_seconds=1e5):
    async def run():
        async with contextlib.AsyncExitStack() as servers:
            for peer in peers:
                await servers.enter_async_context(peer)
            fleet = ExternalFleet(
                [peer.url for peer in peers],
                tmp_path,
                max_model_len=64,
                max_restarts=max_restarts,
                start_timeout_seconds=start_timeout_seconds,
                role="teacher",
            )
            async with fleet:
                await fleet.start(tmp_path)
                return await story(fleet)

    return asyncio.run(run())


def test_servers_of_others_share_the_work_and_are_left_as_they_were(tmp_path):
    peers = [Peer(), Peer()]

    async def story(fleet):
        calls = [fleet.compute_logprobs([7, n, 9], 1) for n in range(40)]
        return [list(logprobs) for logprobs in await asyncio.gather(*calls)]

    logprobs = with_fleet(tmp_path, peers, story)
    expected = [[-(1 + n / 100), -2.09] for n in range(40)]
    assert [pytest.approx(pair) for pair in expected] == logprobs
    assert min(peer.num_asked for peer in peers) > 5
    # They may be sampling for somebody else: nothing but questions.
    assert set(peers[0].paths) == {"/v1/models", "/inference/v1/generate"}


def test_a_server_that_drops_calls_is_waited_for_and_the_calls_are_repeated(tmp_path):
    peer = Peer(lambda k, ids: None if k < 4 else entries(ids))

    async def story(fleet):
        return list(await fleet.compute_logprobs([7, 8], 1)), fleet.num_restarts

    logprobs, restarts = with_fleet(tmp_path, [peer], story, max_restarts=2)
    assert logprobs == pytest.approx([-1.08]) and restarts >= 1


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        (Peer(max_model_len=63), "63 .*64 .*--max-model-len"),
        (Peer(has_generate_path=False), "404.*--enable-scale-out"),
    ],
)
def test_a_server_that_cannot_compute_logprobs_is_refused_at_the_start(tmp_path, peer, says):
    with pytest.raises(EngineError, match=says):
        with_fleet(tmp_path, [peer], lambda fleet: None)


def test_a_server_that_is_not_there_is_an_error_after_the_timeout(tmp_path):
    async def start():
        fleet = ExternalFleet(
            ["http://127.0.0.1:1"], tmp_path, max_model_len=64, start_timeout_seconds=0.05
        )
        await fleet.start(tmp_path)

    with pytest.raises(EngineError, match="http://127.0.0.1:1"):
        asyncio.run(start())


class Text:
    """Tokens are digits."""

    opens_thought, closed_thought, stop_token_ids = False, "", [1]

    def encode(self, question, before=()):
        return [int(char) for char in question]

    def decode(self, token_ids):
        return "".join(map(str, token_ids))


class Student:
    """Answers each prompt with its own tokens doubled, one longer for every sample."""

    async def generate(self, prompt, *, n, **_):
        wholes = [list(prompt) * 2 + [5] * i for i in range(n)]
        return [
            Response(array("i", w), array("f", [-0.5] * len(w)), array("i", [0] * len(w)), "stop")
            for w in wholes
        ]


class SlowGrader:
    """Grades only when the teacher has computed six responses: it does not wait for grades."""

    def __init__(self, teacher):
        self.teacher = teacher

    async def grade(self, kind, text, truth, **_):
        from r1_grading import Grade

        while self.teacher.num_computed < 6:
            await asyncio.sleep(0.001)
        return Grade(1.0, "fine")

    def snapshot(self):
        return {}


class CountingTeacher:
    def __init__(self):
        self.num_computed = 0

    async def compute_logprobs(self, prompt, token_ids, first, step):
        self.num_computed += 1
        return array("f", [-(i + step / 8) for i in range(first, len(token_ids))])


def collected(with_teacher):
    async def run():
        teacher = CountingTeacher()
        pool = SlowGrader(teacher) if with_teacher else RewardPool(1)
        collector = RolloutCollector(Student(), pool, Text(), RewardsConfig(), teacher)
        prompts = [make_prompt("27", "math", "9", {}), make_prompt("3", "math", "9", {})]
        sampling = RolloutSampling(3, 1.0, 1.0, 32, step=2, with_teacher=with_teacher)
        rollout = await collector.collect(prompts, sampling)
        if not with_teacher:
            await pool.close()
        return rollout, teacher.num_computed, collector.in_flight

    return asyncio.run(run())


def test_every_response_is_computed_after_its_own_prompt_while_others_are_graded():
    rollout, num_computed, in_flight = collected(with_teacher=True)
    assert num_computed == in_flight.num_with_teacher_logprobs == 6
    logprobs = [[list(o.teacher_logprobs) for o in group.responses] for group in rollout.groups]
    # The prompts have 2 and 1 tokens, the responses 4, 5, 6 and 2, 3, 4.
    assert logprobs == [
        [[-(i + 0.25) for i in range(2, 2 + n)] for n in (4, 5, 6)],
        [[-(i + 0.25) for i in range(1, 1 + n)] for n in (2, 3, 4)],
    ]
    assert rollout.teacher_seconds > 0


def test_an_episode_is_computed_branch_by_branch_where_it_was_sampled():
    floats, versions = array("f", [-1.0] * 5), array("i", [0] * 5)
    masks = [bytes([0, 1, 0, 1, 1]), bytes([0, 0, 0, 0, 1])]
    branches = [Branch(array("i", range(5)), mask, floats, versions) for mask in masks]
    episode, teacher = Episode("done", [], branches), CountingTeacher()

    async def play(*_):
        return EpisodeResult(episode, "", 1.0)

    async def run():
        state = SimpleNamespace(require_usable=lambda: None)
        peers = SimpleNamespace(state=state), RewardPool(1), Text(), RewardsConfig()
        collector = RolloutCollector(*peers, teacher, SimpleNamespace(play=play))
        sampling = RolloutSampling(1, 1.0, 1.0, 32, step=2, with_teacher=True)
        prompts = [make_prompt("2", "environment", "9", {})]
        return (await collector.collect(prompts, sampling)).groups[0].responses[0]

    graded = asyncio.run(run())
    # Token i of a branch has the log-probability -(i + 0.25).
    assert list(graded.teacher_logprobs) == [-1.25, -3.25, -4.25, -4.25]
    assert len(graded.response.token_ids) == 4


def test_what_is_sampled_for_an_evaluation_has_no_teacher_logprobs():
    rollout, num_computed, _ = collected(with_teacher=False)
    assert num_computed == 0 and rollout.teacher_seconds == 0
    assert {o.teacher_logprobs for g in rollout.groups for o in g.responses} == {None}


@pytest.mark.parametrize("with_teacher", [True, False])
def test_logprobs_survive_the_sample_log_to_the_bit(with_teacher):
    rollout, *_ = collected(with_teacher)
    group = rollout.groups[0]
    again = from_record(decode(encode(to_record(3, group))), group.prompt)
    assert again == group


def test_logprobs_stand_where_their_tokens_are_predicted():
    first = Sample.pack([7, 8, 9], [10, 11], [-0.5, -0.25], 2.0, teacher_logprobs=[-3.0, -4.0])
    second = Sample.pack(
        [5], [6, 1, 2], [-1.0, -2.0, -3.0], -1.0, teacher_logprobs=[-5.0, -6.0, -7.0]
    )
    batch = pack_batch([first, second], TokenSplit(tensor_size=4), torch.device("cpu"))
    expected = [0, 0, -3.0, -4.0, 0, -5.0, -6.0, -7.0, 0, 0, 0, 0]
    assert batch.logprobs["teacher"].tolist() == expected
    assert batch.logprobs["teacher"].dtype == torch.float32


def test_context_ranks_hold_the_logprobs_of_their_own_tokens():
    """Together they hold each once: position and log-probability agree with the whole batch's."""
    sample = Sample.pack(
        [5], list(range(10, 17)), [-1.0] * 7, teacher_logprobs=[-float(i) for i in range(7)]
    )
    whole = pack_batch([sample], TokenSplit(), torch.device("cpu"))
    parts = [
        pack_batch([sample], TokenSplit(context_size=2, context_rank=rank), torch.device("cpu"))
        for rank in (0, 1)
    ]
    position = torch.cat([part.position_ids[0] for part in parts])
    logprobs = torch.cat([part.logprobs["teacher"] for part in parts])
    assert logprobs[position.argsort()].tolist() == whole.logprobs["teacher"].tolist()


def test_without_a_teacher_there_is_nothing_to_read_and_without_samples_nothing_to_count():
    cpu = torch.device("cpu")
    assert "teacher" not in pack_batch([Sample.pack([5], [6], [-1.0])], TokenSplit(), cpu).logprobs
    assert pack_batch([], TokenSplit(tensor_size=2), cpu).logprobs["teacher"].tolist() == [0, 0]


def test_logprobs_of_another_number_of_tokens_are_refused():
    with pytest.raises(ValueError, match="2 .*1 "):
        Sample.pack([1], [2, 3], [-1.0, -1.0], teacher_logprobs=[-1.0])
