"""Draws items without replacement, epoch after epoch, in an order that survives a restart."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.data.prompt import Prompt

Item = TypeVar("Item")


class EpochSampler(Generic[Item]):
    """Draws from `items`; each epoch is a new shuffle that depends on (seed, epoch) only.

    Args:
        items: the items of an epoch.
        seed: the seed of all shuffles.
        shuffled: False keeps the items in their order in every epoch.
    """

    def __init__(self, items: Sequence[Item], seed: int, shuffled: bool = True) -> None:
        if not items:
            raise ValueError("there is nothing to sample from: the list is empty")
        self.items, self.seed, self.shuffled = items, seed, shuffled
        self.epoch = self.position = 0
        digest = hashlib.sha256()
        for item in items:
            digest.update(hashlib.sha256(self.key(item).encode("utf-8", "replace")).digest())
        self._fingerprint = digest.hexdigest()[:16]
        self._order = self._epoch_order()

    def key(self, item: Item) -> str:
        """Return the text that identifies an item; a state is refused after any has changed."""
        return repr(item)

    def next(self, n: int) -> list[Item]:
        """Return the next `n` items; may run over the end of an epoch into the next."""
        drawn_items: list[Item] = []
        while len(drawn_items) < n:
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._epoch_order()
            end = min(len(self._order), self.position + n - len(drawn_items))
            drawn_items += [self.items[index] for index in self._order[self.position : end]]
            self.position = end
        return drawn_items

    @property
    def epoch_size(self) -> int:
        """Number of items drawn in one epoch."""
        return len(self._order)

    def state_dict(self) -> dict[str, Any]:
        """Return, as JSON, where the next draw starts and a fingerprint of the items."""
        state = {name: getattr(self, name) for name in ("seed", "epoch", "position")}
        return {**state, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            UserError: the items or the seed differ.
        """
        for name, value in (("fingerprint", self._fingerprint), ("seed", self.seed)):
            if state[name] != value:
                noun = "items" if name == "fingerprint" else name
                raise UserError(
                    f"the checkpoint sampled other {noun} ({state[name]}) than this run ({value}); "
                    "restore the data and run.seed, or start a new run in another run.folder",
                    key="run.seed" if name == "seed" else "data",
                    cause=Cause.CHANGED,
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._epoch_order()

    def _epoch_order(self) -> list[int]:
        order = list(range(len(self.items)))
        if self.shuffled:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order


class PromptSampler(EpochSampler[Prompt]):
    """Draws prompts; a state is refused after a question, a truth or a kind has changed."""

    def key(self, item: Prompt) -> str:
        """Return what tells one prompt from others: id, kind and truth."""
        return f"{item.id}{item.kind}{item.truth}"

    def next_by_kind(self, n: int, weights: Mapping[str, float]) -> list[Prompt]:
        """Return the next `n` prompts by the weights of their kinds: a prompt is drawn with the
        probability weight / largest weight; kinds left out have weight 1. The order does not depend
        on the weights: the state is that of `next`, and the same prompts are drawn again from the
        same state.

        Args:
            n: prompts.
            weights: by kind.
        """
        fractions = drawn_fractions(self.items, weights)
        drawn_prompts: list[Prompt] = []
        while len(drawn_prompts) < n:
            [prompt] = self.next(1)
            number = random.Random(f"{self.seed}/{self.epoch}/{prompt.id}").random()
            if number < fractions[prompt.kind]:
                drawn_prompts.append(prompt)
        return drawn_prompts


def drawn_fractions(prompts: Sequence[Prompt], weights: Mapping[str, float]) -> dict[str, float]:
    """Return kind → the share of its prompts that an epoch draws (`rl.kind_weights`); the largest
    is 1.

    Args:
        prompts: the prompts of an epoch.
        weights: by kind.

    Raises:
        UserError: for a kind that no prompt has, and where nothing would be drawn.
    """
    kinds = sorted({prompt.kind for prompt in prompts})
    for name in weights:
        if name not in kinds:
            suggestion = did_you_mean(name, kinds, "{}")
            raise UserError(
                f"rl.kind_weights: no question is of kind {name}{suggestion} ({kinds})",
                key=f"rl.kind_weights.{name}",
                cause=Cause.UNKNOWN,
            )
    max_weight = max(weights.get(kind, 1.0) for kind in kinds)
    if not max_weight:
        raise UserError(
            f"rl.kind_weights: all kinds of questions have weight 0 ({kinds})",
            key="rl.kind_weights",
            cause=Cause.EMPTY,
        )
    return {kind: weights.get(kind, 1.0) / max_weight for kind in kinds}
