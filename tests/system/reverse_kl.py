"""How far a student is from its teacher, by transformers; for a process of its own."""

from tiny_models import load_model


def reverse_kl(student, teacher, prompts, *, num_samples, max_tokens, end):
    """KL(student ‖ teacher) of the next token, in fp64 over the whole vocabulary.

    It is the mean over the tokens that the student samples after `prompts` (token ids, of one
    length), from a fixed seed."""
    import torch

    models = [load_model(folder) for folder in (student, teacher)]
    draw = torch.Generator().manual_seed(0)
    ids = torch.tensor(prompts).repeat_interleave(num_samples, 0)
    total, count = 0.0, 0
    running = torch.ones(len(ids), dtype=torch.bool)
    with torch.no_grad():
        for _ in range(max_tokens):
            own, theirs = (
                torch.log_softmax(model(ids).logits[:, -1].double(), -1) for model in models
            )
            gaps = (own.exp() * (own - theirs)).sum(-1)
            total, count = total + gaps[running].sum().item(), count + int(running.sum())
            following = torch.multinomial(own.exp(), 1, generator=draw)
            running &= following[:, 0] != end
            ids = torch.cat([ids, following], 1)
    return total / count
