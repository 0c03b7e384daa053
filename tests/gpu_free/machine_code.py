"""SASS as nvdisasm prints it: instructions, where each may go on, and which registers it touches."""

from __future__ import annotations

import heapq
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from hopper import tool


class Instruction(NamedTuple):
    opcode: str
    text: str  # of the operands
    guarded: bool
    writes: frozenset[int]
    reads: frozenset[int]


class Program(NamedTuple):
    instructions: list[Instruction]
    following: list[list[int]]  # by the number of an instruction

    def reachable(self, start: int) -> set[int]:
        """What may be executed from an instruction on, itself included."""
        found, left = set(), [start]
        while left:
            number = left.pop()
            if number not in found:
                found.add(number)
                left += self.following[number]
        return found

    def numbers(self, opcode: str) -> list[int]:
        """Where instructions stand whose name begins so."""
        return [i for i, each in enumerate(self.instructions) if each.opcode.startswith(opcode)]


def disassembled(cubin: Path) -> Program:
    """The only kernel of a cubin, with life ranges of registers."""
    command = [str(tool("nvdisasm")), "-c", "-plr", str(cubin)]
    return parsed(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"(\.L\w+|\$[\w$]+):")
_BEGIN = "// |"  # of the life ranges: their number, then a column for each register


def parsed(listing: str) -> Program:
    columns: dict[int, int] = {}  # registers, by the place of their mark
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        text, _, ranges = line.partition(_BEGIN)
        if match := _INSTRUCTION.match(text):
            marks = ranges[: ranges.index("|")]
            touched = [(mark[0], columns[mark.start()]) for mark in re.finditer(r"[\^vx]", marks)]
            writes = frozenset(register for mark, register in touched if mark != "v")
            reads = frozenset(register for mark, register in touched if mark != "^")
            instructions.append(
                Instruction(match[2], match[3].replace(";", "").strip(), bool(match[1]), writes, reads)
            )
        elif match := _LABEL.match(text):
            labels[match[1]] = len(instructions)
        elif re.match(r"\s+# +0 +1\b", ranges):
            for number in re.finditer(r"\d+", ranges[: ranges.index("|")]):
                columns |= dict.fromkeys(range(number.start(), number.end()), int(number[0]))
    return Program(instructions, _following(instructions, labels))


_NOWHERE: frozenset[int] = frozenset()


def _following(instructions: list[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Warps that have parted meet again at the place that BSSY named for the barrier of their BSYNC."""
    named = [[labels[name] for name in re.findall(r"\.L_x_\w+|\$[\w$]+", each.text)] for each in instructions]
    following: list[list[int]] = []
    for i, (each, targets) in enumerate(zip(instructions, named, strict=True)):
        name = each.opcode.partition(".")[0]
        ends = name in ("EXIT", "RET", "BRX", "BRXU") or (each.opcode == "BRA" and each.text.startswith("`"))
        onward = [] if ends and not each.guarded else [i + 1]
        if name in ("BRA", "BRX", "BRXU", "CALL", "WARPSYNC"):
            onward += targets
        following.append([number for number in onward if number < len(instructions)])
    meetings: list[dict[str, frozenset[int]] | None] = [None] * len(instructions)  # the same one is shared
    meetings[0] = {}
    left = [0]
    while left:
        i = heapq.heappop(left)
        each, after = instructions[i], meetings[i] or {}
        if each.opcode == "BSSY":
            after = {**after, each.text.partition(",")[0]: frozenset(named[i])}
        elif each.opcode == "BSYNC":
            following[i] = sorted(after.get(each.text, ())) or [i + 1]
        for number in following[i]:
            before = meetings[number]
            if before is after:
                continue
            merged = after
            if before is not None:
                merged = {key: before.get(key, _NOWHERE) | after.get(key, _NOWHERE) for key in before | after}
            if merged != before:
                meetings[number] = merged
                heapq.heappush(left, number)
    return following


def shares(program: Program) -> dict[str, tuple[int, int]]:
    """Of warp groups whose registers decrease or increase: how many they have then, and how many they use."""
    found = {}
    for number in program.numbers("USETMAXREG"):
        each = program.instructions[number]
        share = int(each.text.split()[-1], 16)
        used = (program.instructions[i] for i in program.reachable(number))
        # A call is marked with all that any function could write; what is called is looked at itself.
        highest = max(max(i.writes | i.reads, default=-1) for i in used if not i.opcode.startswith("CALL"))
        found["dec" if "DEALLOC" in each.opcode else "inc"] = (share, highest + 1)
    return found
