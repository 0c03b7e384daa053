"""The order in which blocks of threads go through a table, and any interleaving of them."""

from __future__ import annotations

import random
from collections.abc import Callable

from loopmdm_kernels.schedule.table import Instruction, Table

Instance = tuple[int, Instruction]  # of a loop


def positions(table: Table, loops: int) -> list[Instance]:
    """The sequence of positions, each instruction with its loop.

    ENTER counts as loop -1, so that what it adds to a counter is the generation that loop 0 waits for. LEAVE
    counts as the loop after the last: its sequence's own number of loops.
    """
    parts = (table.enter, [-1]), (table.loop, range(loops)), (table.leave, [loops])
    return [(loop, item) for items, runs in parts for loop in runs for item in items]


def interleave(
    table: Table,
    loops: int,
    num_blocks: int,
    seed: int,
    ready: Callable[[int, Instruction], bool],
    execute: Callable[[int, Instruction], None],
) -> None:
    """Runs all blocks, which take turns in an order drawn from `seed`.

    Raises:
        RuntimeError: no block can proceed.
    """
    generator = random.Random(seed)
    everything = positions(table, loops)
    shares = [iter(everything[block::num_blocks]) for block in range(num_blocks)]
    current = [next(items, None) for items in shares]
    running = list(range(num_blocks))
    while running:
        generator.shuffle(running)
        proceeded = False
        for block in list(running):
            at = current[block]
            if at is None:
                running.remove(block)
            elif ready(*at):
                execute(*at)
                current[block] = next(shares[block], None)
            else:
                continue
            proceeded = True
        if not proceeded:
            raise RuntimeError(f"deadlock: blocks {sorted(running)} wait for counters that nobody will raise")
