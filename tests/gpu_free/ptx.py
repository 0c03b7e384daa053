"""PTX as text: the statements of a kernel, and what a short one does to its arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Statement(NamedTuple):
    label: str  # of this place; then the rest is empty
    predicate: str  # "%p1" or "!%p1"; "" where there is none
    opcode: str
    operands: tuple[str, ...]  # one each, a list in braces being one


class Kernel(NamedTuple):
    name: str
    statements: list[Statement]
    targets: dict[str, list[str]]  # of an indirect branch: labels, by the name of their list


def kernels(text: str) -> dict[str, Kernel]:
    """The entries of a PTX text, by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    found = {}
    for start in re.finditer(r"\.entry\s+(\w+)", text):
        body = _braces(text, text.index("{", text.index(")", start.end())))
        statements, targets = _statements(body)
        found[start[1]] = Kernel(start[1], statements, targets)
    return found


def _braces(text: str, start: int) -> str:
    """From an opening brace, what lies before the one that closes it."""
    depth = 0
    for place in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if place[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : place.start()]
    raise ValueError("braces do not match")


def _statements(body: str) -> tuple[list[Statement], dict[str, list[str]]]:
    statements: list[Statement] = []
    targets: dict[str, list[str]] = {}
    scopes: list[dict[str, str]] = []  # names that a block of inline assembly declares for itself
    number = 0
    for part in _parts(body):
        if part == "{":
            number += 1
            scopes.append({})
        elif part == "}":
            scopes.pop()
        elif part.startswith(".reg"):
            if scopes:
                for name in re.findall(r"[\w$%]+", part.split(None, 2)[2]):
                    scopes[-1][name] = f"%{name.lstrip('%')}_in{number}"
        elif part.endswith(":"):
            statements.append(Statement(_inside(part[:-1].strip(), scopes, number), "", "", ()))
        elif match := re.match(r"(\S+):\s*\.branchtargets\s+(.*)", part, re.S):
            targets[match[1]] = [label.strip() for label in match[2].split(",")]
        elif not part.startswith("."):
            statement = _statement(_renamed(part, scopes))
            if statement.opcode.startswith("bra"):
                statement = statement._replace(operands=(_inside(statement.operands[0], scopes, number),))
            statements.append(statement)
    return statements, targets


def _parts(body: str) -> Iterator[str]:
    """Declarations, labels, statements and the braces of scopes, one after another."""
    for line in re.split(r"(;)", body):
        rest = line.strip()
        while rest and rest != ";":
            if rest[0] in "{}":
                yield rest[0]
                rest = rest[1:].lstrip()
            elif label := re.match(r"[\w$]+:(?!:)(?!\s*\.branchtargets)", rest):
                yield label[0]
                rest = rest[label.end() :].lstrip()
            else:
                yield rest
                break


def _renamed(text: str, scopes: list[dict[str, str]]) -> str:
    for names in scopes:
        for name, unique in names.items():
            text = re.sub(rf"(?<![\w$%.:]){re.escape(name)}(?![\w$:.])", unique, text)
    return text


def _inside(label: str, scopes: list[dict[str, str]], number: int) -> str:
    """A label of inline assembly is known in its braces only; those of the compiler begin with a dollar."""
    return f"{label}_in{number}" if scopes and not label.startswith("$") else label


def _statement(text: str) -> Statement:
    match = re.match(r"(?:@(!?\S+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    if match is None:
        raise ValueError(f"no instruction: {text!r}")
    return Statement("", match[1] or "", match[2], tuple(split(match[3])))


def split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return [*found, rest] if rest else found


def registers(text: str) -> list[str]:
    """Those named in an operand, the special ones left out."""
    return [name for name in re.findall(r"%[\w$]+(?:\.[xyz])?", text) if not _SPECIAL.fullmatch(name)]


def following(kernel: Kernel) -> list[list[int]]:
    """For each statement the numbers of those that may come next."""
    labels = {each.label: number for number, each in enumerate(kernel.statements) if each.label}
    found = []
    for number, each in enumerate(kernel.statements):
        name = each.opcode.partition(".")[0]
        onward = [] if name in ("bra", "brx", "ret", "exit") and not each.predicate else [number + 1]
        if name == "bra":
            onward.append(labels[each.operands[0]])
        elif name == "brx":
            onward += [labels[label] for label in kernel.targets[each.operands[1]]]
        found.append([number for number in onward if number < len(kernel.statements)])
    return found


_SPECIAL = re.compile(
    r"%(?:(?:n?tid|n?ctaid|clusterid|nclusterid|cluster_n?ctaid)(?:\.[xyz])?"
    r"|cluster_n?ctarank|laneid|warpid|smid|globaltimer(?:_lo)?|clock(?:64)?|dynamic_smem_size)"
)
_CLOCK = re.compile(r"%(?:globaltimer|clock)")  # what is read there depends on when

# Instructions without a result.
NO_RESULT = re.compile(
    r"st\.|red\.|bra|brx|ret|exit|trap|bar\.|barrier\.|fence|membar|cp\.|setmaxnreg|nanosleep|wgmma\.(?:fence|"
    r"commit|wait)|mbarrier\.(?:init|inval)|griddepcontrol|createpolicy_|prefetch|discard|pmevent|brkpt|stmatrix"
)


def written(statement: Statement) -> list[str]:
    """Registers that it writes; products of warp groups add to what they write."""
    if not statement.opcode or NO_RESULT.match(statement.opcode):
        return []
    return registers(statement.operands[0]) if statement.operands else []


def read(statement: Statement) -> list[str]:
    """Registers that it reads."""
    operands = statement.operands
    if written(statement) and not statement.opcode.startswith("wgmma.mma_async"):
        # An address is read whatever place it stands at.
        operands = operands[1:] if not operands[0].startswith("[") else operands
    elif statement.operands and statement.operands[0] == "_":
        operands = operands[1:]
    found = [name for operand in operands for name in registers(operand)]
    return found + registers(statement.predicate)


def effects(kernel: Kernel, names: tuple[str, ...] = ()) -> list[str]:
    """What a kernel without loops does, in order: its text, each register replaced by where it comes from.

    Two texts that differ in names of registers, in the order of arithmetic or in how a default is spelled
    have the same effects.

    Args:
        names: of the parameters, by their number; else it is the number.
    """
    values: dict[str, str] = {}
    done: list[str] = []
    names_of_labels = [s.label for s in kernel.statements if s.label]
    labels = {label: f"L{i}" for i, label in enumerate(names_of_labels)}
    unused = _never_read(kernel)

    def of(operand: str) -> str:
        operand = operand.replace(f"{kernel.name}_param_", "parameter ")
        for i, name in reversed(list(enumerate(names))):
            operand = operand.replace(f"parameter {i}", name)
        for register in registers(operand):
            operand = re.sub(
                rf"{re.escape(register)}(?![\w$.])", values.get(register, register), operand, count=1
            )
        return labels.get(operand, re.sub(r"\+0(?!\w)", "", re.sub(r"\s+", " ", operand)))

    for statement in kernel.statements:
        if statement.label:
            done.append(f"{labels[statement.label]}:")
            continue
        opcode, operands = spelled_out(statement.opcode), statement.operands
        results = written(statement)
        guard = f"@{of(statement.predicate)} " if statement.predicate else ""
        if _TRANSPARENT.match(opcode) and not guard and not _CLOCK.match(operands[1]):
            values[results[0]] = of(operands[1]).strip("[]")
        elif _PURE.match(opcode) and not guard:
            inputs = [of(operand) for operand in operands[1:]]
            for i, result in enumerate(results):
                part = f".{i}" if len(results) > 1 else ""
                value = f"{opcode}({', '.join(inputs)}){part}"
                values[result] = re.sub(r"(selp\.b32)\((\w+), (\w+), setp\.eq", r"\1(\3, \2, setp.ne", value)
        else:
            inputs = [of(operand) for operand in operands]
            for i, result in enumerate(results):
                values[result] = f"#{len(done)}.{i}"
            if results and not opcode.startswith("wgmma"):
                inputs[0] = "_" if unused.issuperset(results) else "result"
            done.append(f"{guard}{opcode} {', '.join(inputs)}".strip())
    return [line for line in done if line != "ret"]


_TRANSPARENT = re.compile(r"(mov|cvta|ld\.param|cvt\.u32\.u64|cvt\.s64\.s32|cvt\.u64\.u32)\b")
_PURE = re.compile(
    r"(ld\.global|add|sub|mul|mad|and|or|xor|not|shl|shr|setp|selp|ex2|lg2|max|min|cvt|mapa|mma|createpolicy)\b"
)


def _never_read(kernel: Kernel) -> set[str]:
    used = {name for statement in kernel.statements for name in read(statement)}
    return {name for statement in kernel.statements for name in written(statement)} - used


def spelled_out(opcode: str) -> str:
    """With what the PTX manual says is meant where nothing is said, and one name for what has two."""
    opcode = re.sub(r"\.shared(?!::)", ".shared::cta", opcode)
    opcode = re.sub(r"^bar\.(sync|arrive)", r"barrier.\1.aligned", opcode)
    opcode = re.sub(r"^(mbarrier\.arrive(?:\.expect_tx)?)(?=\.shared)", r"\1.release.cta", opcode)
    opcode = re.sub(r"^(mbarrier\.try_wait(?:\.parity)?)(?=\.shared)", r"\1.acquire.cta", opcode)
    opcode = re.sub(r"^(barrier\.cluster\.arrive)(?!\.re)", r"\1.release", opcode)
    opcode = re.sub(r"^(barrier\.cluster\.wait)(?!\.acq)", r"\1.acquire", opcode)
    # Registers have a width; what they hold the instruction knows.
    return re.sub(r"^(mov|selp|st\S*|ld\S*|setp\.(?:eq|ne))\.[usf](32|64)$", r"\1.b\2", opcode)
