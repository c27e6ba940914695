from types import SimpleNamespace

import pytest
import torch

from megatron_r1.trainer.checkpoints import contents
from megatron_r1.trainer.reference_policy import ReferencePolicy


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_model_computes_with_the_reference_while_it_is_in_place_and_not_after(on_cpu):
    chunks = [torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)]
    chunks[1].register_buffer("passing", torch.ones(1), persistent=False)
    first = [t.detach().clone() for chunk in chunks for t in chunk.state_dict().values()]
    reference = ReferencePolicy(chunks, on_cpu)
    with torch.no_grad():
        for chunk in chunks:
            for tensor in [*chunk.parameters(), *chunk.buffers()]:
                tensor.add_(1)
    held = [t.data_ptr() for chunk in chunks for t in chunk.state_dict().values()]
    with reference.swapped_in():
        now = [t for chunk in chunks for t in chunk.state_dict().values()]
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
        assert chunks[1].passing.item() == 2, "what no checkpoint holds is the model's own"
    after = [t.data_ptr() for chunk in chunks for t in chunk.state_dict().values()]
    assert after == held, "the policy's weights stayed where they were"
    reference.refresh()
    with reference.swapped_in():
        now = [t for chunk in chunks for t in chunk.state_dict().values()]
        assert all(torch.equal(a, b + 1) for a, b in zip(now, first, strict=True))


def test_a_checkpoint_reads_the_kept_weights_and_those_that_are_not_trained_as_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    first = model[0].weight.detach().clone()
    reference = ReferencePolicy([model])
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(reference.stored_value(model[0].weight), first)
    assert reference.stored_value(model[0].bias) is model[0].bias
    assert reference.stored_value(model[1].running_var) is not model[1].running_var
    with pytest.raises(KeyError):  # a view would be the policy's
        reference.stored_value(model[0].weight.detach())


def test_a_checkpoint_of_a_continued_run_has_the_references_weights_beside_the_policys(monkeypatch):
    class Chunk(torch.nn.Linear):
        def sharded_state_dict(self, prefix, metadata):
            named = self.named_parameters()
            return {prefix + name: SimpleNamespace(data=tensor) for name, tensor in named}

    monkeypatch.setattr(contents, "has_adapters", lambda chunks: False)
    monkeypatch.setattr(contents, "process_groups", lambda chunks: SimpleNamespace(dp_cp=None))
    monkeypatch.setattr(contents, "_optimizer_state", lambda *args: ([], None))
    policy = Chunk(3, 2)
    first = policy.weight.detach().clone()
    reference = ReferencePolicy([policy])
    with torch.no_grad():
        policy.weight.add_(1)
    tree = contents.sharded_tree(contents.Networks(contents.Network([policy], None), reference))
    assert tree["model"][0]["weight"].data is policy.weight
    [entries] = tree["reference"]
    assert torch.equal(entries[f"{contents.REFERENCE_PREFIX}weight"].data, first)
