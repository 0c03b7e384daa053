"""Proves that a table computes one result, whatever the interleaving, and always comes to an end.

**Guaranteed order.** A waiting instruction w passes when a counter has reached its target t. Let E be the
signals to that counter which come before w in the sequence of positions. A signal s of E is certain to have
happened when w passes, if the signals that can happen while neither w nor s has sum to less than t. Those
that can are the ones that depend on neither; which these are is known from the order being proved, so the
order is found as a largest fixed point: start from all of E, drop what is not certain, repeat. That reasoning
is sound by induction over time: consider the first wait w that passes without one of its certain signals s.
Every wait before it passed with all of its own, so nothing that depends on w or s had happened, and by the
test above the counter was below t.

**No deadlock.** Each target is reached by signals of earlier positions (checked), so every instruction
depends only on earlier ones. A block executes its positions in increasing order. Of all instructions not
complete, take the one with the lowest position: its block is at it, since the block's earlier ones are
complete, and all it waits for is complete. So some block always proceeds, for any number G of co-resident
blocks, 1 included; a cooperative launch makes all blocks of the grid co-resident. That the loads of a block
run ahead of its arithmetic changes nothing, for they too are issued in order of position.

**Pairs.** Two blocks that share a tile execute the same instructions, and a counter has reached its target
when both have signalled. What one of them loads for both goes to a stage that both have released. Of the
instruction with the lowest position not complete both have released all that came before, and the halves of
its weights wait for nothing but its own counters: the two proceed as one block would.

**No race, no reuse of a buffer still being read.** Every two accesses to the same place, one of them a write,
are in the guaranteed order (checked for neighbours in the sequence of positions, the rest follows by
transitivity). No use is made of one block executing several instructions, so this holds for any G too. Every
execution therefore reads what the execution in order of position reads, which is the one `interpret` compares
with the reference.

**Any number of loops.** Loop k + 2 is loop k with its targets and double buffers shifted by two, and no wait
or reuse reaches over more than two loops, so four loops contain every case. Where loops meet, loop k + 1 is
loop k, and no wait reaches over more than one: three contain every case, and a loop that a sequence does not
take part in has the same waits and signals. **Early exit.** A sequence that
stops after k loops executes what it would have executed with k loops in all, and sequences share no counter
and no place (checked).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from loopmdm_kernels.schedule.forward import Forward
from loopmdm_kernels.schedule.table import Instruction, Table
from loopmdm_kernels.testing.schedule.accesses import Access, accesses
from loopmdm_kernels.testing.schedule.order import Instance, positions


class ScheduleError(Exception):
    """An interleaving of the table's instructions exists that races or never ends."""


class Wait(NamedTuple):
    counter: int
    target: int


class Rules(NamedTuple):
    """What an instruction of a table means: functions of its loop and itself."""

    waits: Callable[[int, Instruction], Iterable[Wait]]
    signals: Callable[[int, Instruction], Iterable[tuple[int, int]]]  # counter, amount
    accesses: Callable[[int, Instruction], Iterable[Access]]
    names: dict[int, str]

    def name(self, instance: Instance) -> str:
        loop, item = instance
        place = f"layer {item.layer}, sequence {item.sequence}, row {item.row}, column {item.column}"
        return f"{self.names[item.phase]} (loop {loop}, {place})"


def check(table: Table, loops: int | None = None) -> None:
    """Raises ScheduleError, naming the instructions, if the table can race or deadlock."""
    instances = positions(table, loops or (3 if table.meets else 4))
    rules = _rules(table)
    if not table.meets:
        _check_sequences_apart(instances, rules)
    _check_buffers(instances, rules, _guaranteed_order(instances, rules))


def _rules(table: Table) -> Rules:
    initial = table.initial_counters()

    def progress(item: Instruction) -> int:
        return table.num_counters + item.sequence

    def waits(loop: int, item: Instruction) -> Iterator[Wait]:
        for counter in range(item.wait, item.wait + item.wait_number):
            yield Wait(counter, item.wait_count * (loop + 1) - initial[counter])
        if table.adaptive and item.phase != Forward.ENTER:
            # EXIT waits for the one before it. LEAVE's loop is the number of loops: the last EXIT settles it.
            settled = item.phase in (Forward.EXIT, Forward.LEAVE)
            yield Wait(progress(item), loop if settled else loop + 1)

    def signals(_: int, item: Instruction) -> Iterator[tuple[int, int]]:
        if item.signal >= 0:
            yield item.signal, item.signal_count
        if table.adaptive and item.phase == Forward.EXIT:
            yield progress(item), 1

    names = {int(phase.name): phase.name.name for phase in table.phases}
    return Rules(waits, signals, accesses(table), names)


def _guaranteed_order(instances: list[Instance], rules: Rules) -> list[int]:
    """For each instance the set of those certain to precede it, as the bits of an integer."""
    signals: dict[int, list[tuple[int, int]]] = defaultdict(list)  # counter -> (position, amount)
    for position, instance in enumerate(instances):
        for counter, amount in rules.signals(*instance):
            signals[counter].append((position, amount))
    edges: list[dict[Wait, list[int]]] = []
    for position, instance in enumerate(instances):
        waits = {}
        for wait in rules.waits(*instance):
            earlier = [(p, amount) for p, amount in signals[wait.counter] if p < position]
            reached = sum(amount for _, amount in earlier)
            if reached < wait.target:
                raise ScheduleError(
                    f"deadlock: {rules.name(instance)} waits for counter {wait.counter} to reach "
                    f"{wait.target}, and the instructions before it raise it to {reached}"
                )
            waits[wait] = [p for p, _ in earlier]
        edges.append(waits)

    def after(source: int, position: int, raised: dict[int, int], before: list[int]) -> int:
        """What the instructions that depend on `source`, and not on `position`, add to a counter."""
        return sum(
            n
            for p, n in raised.items()
            if p != position and before[p] >> source & 1 and not before[p] >> position & 1
        )

    amounts = {counter: dict(sources) for counter, sources in signals.items()}
    while True:
        before = _closure(edges)
        dropped = False
        for position, waits in enumerate(edges):
            for wait, expected in waits.items():
                raised = amounts[wait.counter]
                possible = sum(
                    n for p, n in raised.items() if p != position and not before[p] >> position & 1
                )
                certain = [
                    source
                    for source in expected
                    if possible - raised[source] < wait.target
                    or possible - raised[source] - after(source, position, raised, before) < wait.target
                ]
                if len(certain) < len(expected):
                    waits[wait], dropped = certain, True
        if not dropped:
            return before


def _closure(edges: list[dict[Wait, list[int]]]) -> list[int]:
    before: list[int] = []
    shared: dict[tuple[int, ...], int] = {}  # the tiles of a phase wait for the same
    for waits in edges:
        reached = 0
        for sources in waits.values():
            key = tuple(sources)
            if key not in shared:
                shared[key] = 0
                for source in sources:
                    shared[key] |= before[source] | 1 << source
            reached |= shared[key]
        before.append(reached)
    return before


def _check_sequences_apart(instances: list[Instance], rules: Rules) -> None:
    owner: dict[int, int] = {}
    for instance in instances:
        used = [wait.counter for wait in rules.waits(*instance)]
        used += [counter for counter, _ in rules.signals(*instance)]
        for counter in used:
            if owner.setdefault(counter, instance[1].sequence) != instance[1].sequence:
                raise ScheduleError(
                    f"{rules.name(instance)} uses counter {counter} of sequence {owner[counter]}"
                )
        for access in rules.accesses(*instance):
            if access.sequence != instance[1].sequence:
                raise ScheduleError(f"{rules.name(instance)} touches sequence {access.sequence}")


class _Column:
    """The last writer of one place and those who have read it since."""

    __slots__ = ("readers", "writer")

    def __init__(self) -> None:
        self.writer: int | None = None
        self.readers: list[int] = []


def _check_buffers(instances: list[Instance], rules: Rules, before: list[int]) -> None:
    grain = _boundaries(instances, rules)
    state: dict[tuple[str, int, int, int, int], _Column] = defaultdict(_Column)

    def ordered(earlier: int, position: int, access: Access, kind: str) -> None:
        if earlier != position and not before[position] >> earlier & 1:
            raise ScheduleError(
                f"{kind}: {rules.name(instances[position])} and {rules.name(instances[earlier])} are not "
                f"ordered; both use {access.buffer} (half {access.half}) of sequence {access.sequence}, "
                f"row {access.row}"
            )

    for position, instance in enumerate(instances):
        # What an instruction reads it has read before it writes.
        touched = sorted(rules.accesses(*instance), key=lambda access: access.writes)
        for access in touched:
            starts = grain[access.buffer]
            for start in starts[bisect_left(starts, access.first) : bisect_left(starts, access.last)]:
                column = state[access.buffer, access.half, access.sequence, access.row, start]
                if not access.writes:
                    if column.writer is None:
                        raise ScheduleError(
                            f"unwritten: {rules.name(instance)} reads {access.buffer} (half {access.half}) "
                            f"of row {access.row}, which nothing before it has written"
                        )
                    ordered(column.writer, position, access, "read of unfinished data")
                    column.readers.append(position)
                    continue
                for reader in column.readers:
                    ordered(reader, position, access, "write to a buffer still being read")
                if column.writer is not None:
                    ordered(column.writer, position, access, "two writes")
                column.writer, column.readers = position, []


def _boundaries(instances: list[Instance], rules: Rules) -> dict[str, list[int]]:
    """Starts of the elementary intervals of columns of each buffer."""
    starts: dict[str, set[int]] = defaultdict(set)
    for instance in instances:
        for access in rules.accesses(*instance):
            starts[access.buffer].update((access.first, access.last))
    return {buffer: sorted(values)[:-1] for buffer, values in starts.items()}
