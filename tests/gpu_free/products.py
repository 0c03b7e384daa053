"""Products of warp groups in PTX or SASS: what nobody may touch before they have been waited for."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import NamedTuple

import machine_code
import ptx

Registers = frozenset[Hashable]
_NONE: Registers = frozenset()
_MOST = 4  # groups under way at a time


class Step(NamedTuple):
    text: str
    writes: Registers = _NONE
    reads: Registers = _NONE
    sums: Registers = _NONE  # of a product
    left: Registers = _NONE  # its operand in registers
    begins: bool = False  # the fence before products
    commits: bool = False
    waits: int | None = None  # until so many groups are under way
    ends: bool = False


class Steps(NamedTuple):
    steps: list[Step]
    following: list[list[int]]


def in_ptx(kernel: ptx.Kernel) -> Steps:
    steps = []
    for each in kernel.statements:
        text = f"{each.opcode} {', '.join(each.operands)}"
        if each.opcode.startswith("wgmma.mma_async"):
            sums = frozenset(ptx.registers(each.operands[0]))
            left = ptx.registers(each.operands[1]) if each.operands[1].startswith("{") else ()
            steps.append(Step(text, sums=sums, left=frozenset(left)))
        elif each.opcode.startswith("wgmma.wait_group"):
            steps.append(Step(text, waits=int(each.operands[0])))
        else:
            steps.append(
                Step(
                    text,
                    frozenset(ptx.written(each)),
                    frozenset(ptx.read(each)),
                    begins=each.opcode.startswith("wgmma.fence"),
                    commits=each.opcode.startswith("wgmma.commit_group"),
                    ends=each.opcode in ("ret", "exit"),
                )
            )
    return Steps(steps, ptx.following(kernel))


def in_sass(program: machine_code.Program) -> Steps:
    """A commit is the last product's `gsb0`."""
    steps = []
    for each in program.instructions:
        text = f"{each.opcode} {each.text}"
        if each.opcode.startswith("HGMMA"):
            left = each.reads - each.writes
            steps.append(Step(text, sums=each.writes, left=left, commits="gsb0" in each.text))
        elif each.opcode.startswith("WARPGROUP.DEPBAR"):
            match = re.search(r"gsb0, 0x(\w+)", each.text)
            assert match, text
            steps.append(Step(text, waits=int(match[1], 16)))
        elif each.opcode.startswith("CALL"):  # marked with all that any function could write
            steps.append(Step(text))
        else:
            begins, ends = each.opcode == "WARPGROUP.ARRIVE", each.opcode == "EXIT" and not each.guarded
            steps.append(Step(text, each.writes, each.reads, begins=begins, ends=ends))
    return Steps(steps, program.following)


def faults(program: Steps) -> set[str]:
    """Instructions that touch what a product under way reads or writes, and products out of order."""
    return _under_way(program) | _not_begun(program)


# Sums and left operands of the group that is being issued, and of each that has been.
Group = tuple[Registers, Registers]
State = tuple[Group, tuple[Group, ...]]


def _under_way(program: Steps) -> set[str]:
    found: set[str] = set()
    left: list[tuple[int, State]] = [(0, ((_NONE, _NONE), ()))]
    seen: set[tuple[int, State]] = set()
    while left:
        number, state = left.pop()
        if (number, state) in seen:
            continue
        seen.add((number, state))
        step, ((sums, operands), groups) = program.steps[number], state
        every = [(sums, operands), *groups]
        if not step.sums and (step.writes or step.reads):
            if any(group[0] & (step.writes | step.reads) for group in every):
                found.add(f"sums of a product under way: {step.text}")
            if any(group[1] & step.writes for group in every):
                found.add(f"the operand of a product under way is written: {step.text}")
        if step.sums:
            sums, operands = sums | step.sums, operands | step.left
        if step.commits:
            groups, sums, operands = (*groups, (sums, operands)), _NONE, _NONE
        if step.waits is not None:
            if sums:
                found.add(f"a wait for products that no group has: {step.text}")
            groups = groups[len(groups) - step.waits :] if step.waits < len(groups) else groups
            groups = () if step.waits == 0 else groups
        if step.ends and (sums or groups):
            found.add(f"the end, with products under way: {step.text}")
        if len(groups) > _MOST:
            found.add(f"products that nobody waits for: {step.text}")
            continue
        left += [(after, ((sums, operands), groups)) for after in program.following[number]]
    return found


def _not_begun(program: Steps) -> set[str]:
    """Products that may run before what wrote their registers: there is no fence between."""
    used = frozenset().union(*(step.sums | step.left for step in program.steps))
    before: list[Registers] = [_NONE for _ in program.steps]  # written since the last fence, on some way
    left = [0]
    reached = {0}
    found: set[str] = set()
    while left:
        number = left.pop()
        step = program.steps[number]
        written = before[number]
        if step.begins:
            written = _NONE
        elif step.sums:
            if written & (step.sums | step.left):
                found.add(f"no fence between a product and what wrote its registers: {step.text}")
        else:
            written |= step.writes & used
        for after in program.following[number]:
            if after not in reached or not written <= before[after]:
                reached.add(after)
                before[after] |= written
                left.append(after)
    return found
