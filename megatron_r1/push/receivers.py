"""What engines receive in a push: the slot tables and addresses that their ranks have published,
which trainer rank 0 reads and broadcasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from megatron_r1.push.protocol import ReceiverInfo
from megatron_r1.push.rendezvous import ENGINE_SET_FAILURE_ERRORS, TrainerRendezvous
from megatron_r1.push.slots import SlotTable


class EngineSetReceivers(msgspec.Struct):
    """What the engines of all sets have published, which trainer rank 0 reads and broadcasts.

    Attributes:
        sent_bytes: per push, what each trainer rank sends to the sets already connected.
        tables: those of one engine, by engine rank; one list for all sets with the same tables.
        sets: set -> (index into `tables`, addresses by member and engine rank).
        problems: set -> why it cannot connect."""

    sent_bytes: list[float]
    tables: list[list[SlotTable]] = []
    sets: dict[str, tuple[int, list[list[str]]]] = {}
    problems: dict[str, str] = {}


def read_receivers(
    sets: Mapping[str, Sequence[TrainerRendezvous]],
    ranks_per_engine: int,
    tensor_names: Sequence[str],
    sent_bytes: list[float],
) -> EngineSetReceivers:
    """Return what the ranks of these sets' engines receive; problems are also reported to the set.

    Args:
        sets: the rendezvous of each engine of a set.
        ranks_per_engine: the ranks of each engine.
        tensor_names: HF names of the tensors of a push.
        sent_bytes: what each trainer rank sends (`EngineSetReceivers`)."""
    engine_set_receivers = EngineSetReceivers(sent_bytes)
    for name, engines in sets.items():
        try:
            receivers = [engine.read_receivers(ranks_per_engine) for engine in engines]
            tables = _common_tables(receivers)
            _check_engine_receives_all(tables, tensor_names)
        except ENGINE_SET_FAILURE_ERRORS as error:
            engine_set_receivers.problems[name] = f"{type(error).__name__}: {error}"
            engines[0].report_error(engine_set_receivers.problems[name])
            continue
        # Equal tables are one entry, so that ranks get them and plan for them only once.
        if tables not in engine_set_receivers.tables:
            engine_set_receivers.tables.append(tables)
        addresses = [[receiver.address for receiver in ranks] for ranks in receivers]
        engine_set_receivers.sets[name] = engine_set_receivers.tables.index(tables), addresses
    return engine_set_receivers


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


def _check_engine_receives_all(tables: Sequence[SlotTable], tensor_names: Sequence[str]) -> None:
    """Raise ValueError where no rank of an engine takes one of the pushed tensors: the engine would
    go on with the values it started with."""
    taken_names = {slot.name for table in tables for slot in table.slots}
    missing_names = [name for name in tensor_names if name not in taken_names]
    if missing_names:
        names = ", ".join(missing_names[:3]) + (", ..." if len(missing_names) > 3 else "")
        raise ValueError(f"the engine takes no pushes of {len(missing_names)} tensors: {names}")
