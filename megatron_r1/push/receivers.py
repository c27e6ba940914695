"""What the engines of each set offer to receive, which trainer rank 0 reads for all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from megatron_r1.push.published_plan import ReceiverInfo
from megatron_r1.push.rendezvous import EXPECTED_ERRORS, TrainerRendezvous
from megatron_r1.push.table import SlotTable


class SetReceivers(msgspec.Struct):
    """What rank 0 has read, in the form in which it is passed on to the other trainer ranks."""

    sent: list[float]
    """Bytes per push that each trainer rank sends to the sets already connected."""
    tables: list[list[SlotTable]] = []
    """Tables of one engine, by engine rank; one list for all sets with the same tables."""
    sets: dict[str, tuple[int, list[list[str]]]] = {}
    """Set -> (index into `tables`, addresses by engine and rank)."""
    problems: dict[str, str] = {}
    """Set -> why it cannot connect."""


def read_receivers(
    sets: Mapping[str, Sequence[TrainerRendezvous]],
    ranks_per_engine: int,
    pushed: Sequence[str],
    sent: list[float],
) -> SetReceivers:
    """Return what the ranks of these sets' engines receive; problems are also reported to the set.

    Args:
        sets: the rendezvous of each engine of a set.
        ranks_per_engine: the ranks of each engine.
        pushed: names of the tensors of a push.
        sent: the bytes that each trainer rank sends (`SetReceivers`)."""
    found = SetReceivers(sent)
    for name, engines in sets.items():
        try:
            receivers = [engine.read_receivers(ranks_per_engine) for engine in engines]
            tables = _common_tables(receivers)
            _check_all_taken(tables, pushed)
        except EXPECTED_ERRORS as error:
            found.problems[name] = f"{type(error).__name__}: {error}"
            engines[0].report_error(found.problems[name])
            continue
        # Equal tables are one entry, so that ranks get them and plan for them only once.
        if tables not in found.tables:
            found.tables.append(tables)
        addresses = [[receiver.address for receiver in ranks] for ranks in receivers]
        found.sets[name] = found.tables.index(tables), addresses
    return found


def _common_tables(engines: Sequence[Sequence[ReceiverInfo]]) -> list[SlotTable]:
    """Return the slot tables of an engine, by rank, which all engines of the set have in common.

    Raises:
        ValueError: the same rank of two engines has different tables.
    """
    tables = [receiver.table for receiver in engines[0]]
    for engine, receivers in enumerate(engines):
        for rank, receiver in enumerate(receivers):
            if receiver.table != tables[rank]:
                raise ValueError(
                    f"rank {rank} of engine {engine} needs other tensors than the same rank of "
                    "engine 0"
                )
    return tables


def _check_all_taken(tables: Sequence[SlotTable], pushed: Sequence[str]) -> None:
    """Raise ValueError where no rank of an engine takes one of the pushed tensors: the engine would
    go on with the values it started with."""
    taken = {slot.name for table in tables for slot in table.slots}
    left = [name for name in pushed if name not in taken]
    if left:
        names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        raise ValueError(f"the engine takes no pushes of {len(left)} tensors: {names}")
