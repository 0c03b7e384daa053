"""Walks through the PTX of a kernel and books what its warps do with mbarriers and shared memory.

Only what decides about that is executed: branches, addresses, counts and the integers they come from, by two
lanes of each warp that takes part. What is in floating point counts as zero; a copy has come at once. Warps
run in turn, each until it has to wait, and the counters that blocks wait for are high enough from the start.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ptx

WARPS = 9  # eight that compute and the one that loads
LANES = 4  # of each: a leader, and as many as tell other blocks of an empty stage
_SHARED = 0x410  # where dynamic shared memory begins: at no multiple of what is aligned there
_BLOCK = 1 << 24  # between the shared memories of the blocks of a cluster
_PARAMETERS = 1 << 56
_HIGH = 0x7F7F7F7F  # of every counter
_ENOUGH = 20  # faults
_MOST = 5_000_000  # units of one walk; kernels take a hundredth of it


class Launch(NamedTuple):
    parameters: bytes
    boxes: dict[int, int]  # bytes of a box, by the place of its map in the parameters
    blocks: int  # of the launch
    walked: int  # blocks of one cluster
    memory: dict[int, bytes]  # global memory, by address; all else is zero, and a counter
    threads: int = 384  # of a block
    made: Container[int] = ()  # of shared memory, where threads make operands
    rare: int = 0  # barriers of a block that one round is enough of


class Copy(NamedTuple):
    first: int  # byte of shared memory
    end: int
    barrier: int
    round: int


@dataclass
class Round:
    arrived: Counter[int] = field(default_factory=Counter)  # by warp
    waited: Counter[int] = field(default_factory=Counter)
    expected: int = 0
    copied: int = 0
    met: dict[int, int] = field(default_factory=dict)  # meetings of its block so far, by warp that came


@dataclass
class Barrier:
    count: int
    rounds: list[Round] = field(default_factory=lambda: [Round()])  # the last one is not complete

    @property
    def round(self) -> Round:
        return self.rounds[-1]

    @property
    def complete(self) -> int:
        return len(self.rounds) - 1

    def settle(self) -> None:
        now = self.round
        if now.arrived.total() >= self.count and now.expected == now.copied:
            self.rounds.append(Round())


@dataclass
class Meeting:
    name: str
    number: int  # of threads
    over: int = 0  # rounds
    here: set[tuple[int, int]] = field(default_factory=set)
    first: set[tuple[int, int]] = field(default_factory=set)  # those of the first round

    def come(self, thread: Thread) -> int:
        """Which round it is."""
        who = (thread.rank, thread.tid)
        if who in self.here or (self.first and who not in self.first):
            thread.walk.fault(f"other threads meet at {self.name} than before")
        self.here.add(who)
        now = self.over + 1
        if len(self.here) == self.number:
            self.first, self.here, self.over = self.here, set(), now
        return now


class Warp:
    """Products of a warp group that one of its warps has issued: where their operands lie."""

    def __init__(self) -> None:
        self.issued: list[int] = []
        self.groups: list[list[int]] = []


class Walk:
    def __init__(self, kernel: ptx.Kernel, launch: Launch) -> None:
        self.launch = launch
        self.barriers: dict[int, Barrier] = {}  # by address, of all blocks
        self.copies: list[Copy] = []  # the latest of each place
        self.pairs: dict[int, int] = {}  # of one that bytes are expected at, the one waited for before
        self.memory: dict[int, int] = {}  # words of shared memory
        self.faults: list[str] = []
        self.done: set[int] = set()  # places of instructions of barriers, copies and products
        self.warps: dict[int, Warp] = defaultdict(Warp)
        self.met: dict[tuple[Any, ...], Meeting] = {}
        self.steps = 0
        self.threads = [Thread(self, rank, tid) for rank in range(launch.walked) for tid in _threads()]
        statements = _decisive(kernel)
        self.units = _compiled(kernel, statements)
        self._run()
        if not self.faults:
            self._close()
        # A try that is repeated until it succeeds is one that waits.
        self.left_out = [
            f"{each.opcode} {', '.join(each.operands)}"
            for number, each in enumerate(statements)
            if _BOOKED.match(each.opcode) and number not in self.done and "wait" not in each.opcode
        ]

    def _run(self) -> None:
        going = self.threads
        while going and len(self.faults) < _ENOUGH:
            moved = False
            for thread in going:
                moved |= thread.run(self.units)
            going = [thread for thread in going if thread.unit >= 0]
            if not moved:
                for address, barrier in sorted(self.barriers.items()):
                    now = barrier.round
                    if now.arrived or now.expected != now.copied:
                        self.fault(f"all wait: {address:#x} has {_state(barrier)}")
                self.fault("all wait")
                return

    def _close(self) -> None:
        """What must hold when all is done."""
        for meeting in self.met.values():
            if meeting.here:
                self.fault(f"left at the end: {len(meeting.here)} threads at {meeting.name}")
        for place, barrier in self.barriers.items():
            if barrier.round.arrived or barrier.round.expected:
                self.fault(f"left at the end: {place:#x} has {_state(barrier)}")
            for now, following in zip(barrier.rounds, barrier.rounds[1:], strict=False):
                if now.arrived.total() != barrier.count:
                    self.fault(
                        f"{now.arrived.total()} arrivals at {place:#x}, which counts to {barrier.count}"
                    )
                if now.arrived != barrier.rounds[0].arrived:
                    self.fault(f"other warps arrive at {place:#x} than in the first round")
                if following is not barrier.round and not now.waited:
                    self.fault(f"nobody waits for a round of {place:#x}")
        for full, empty in self.pairs.items():
            if empty not in self.barriers:
                self.fault(f"bytes for {full:#x} are expected without a wait for those who read")
                continue
            rounds = zip(self.barriers[full].rounds[:-1], self.barriers[empty].rounds[:-1], strict=False)
            for filled, released in rounds:
                own = {warp for warp in released.arrived if warp // WARPS == empty // _BLOCK - 1}
                # Some may speak for others, when all of the block have met since these waited.
                told = own and own < set(filled.waited)
                told = told and min(released.met[warp] for warp in own) > max(filled.met.values())
                if set(filled.waited) != own and not told:
                    self.fault(f"who waits for {full:#x} is not who releases at {empty:#x}")
            if self.barriers[full].complete != self.barriers[empty].complete:
                self.fault(f"{full:#x} is filled more often than {empty:#x} is released")

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def barrier(self, address: int) -> Barrier:
        if address not in self.barriers:
            self.fault(f"barrier {address:#x} was never initialised")
            self.barriers[address] = Barrier(1)
        return self.barriers[address]

    def load(self, address: int, size: int, *, counter: bool = False) -> int:
        """From the launch's parameters or from global memory."""
        if address >= _PARAMETERS:
            place = address - _PARAMETERS
            return int.from_bytes(self.launch.parameters[place : place + size], "little")
        for first, words in self.launch.memory.items():
            if first <= address < first + len(words):
                return int.from_bytes(words[address - first : address - first + size], "little")
        return _HIGH if counter else 0


def _state(barrier: Barrier) -> str:
    now = barrier.round
    arrived = f"{now.arrived.total()} of {barrier.count} arrivals"
    return f"{arrived}, {now.expected} bytes expected, {now.copied} copied"


def _threads() -> list[int]:
    return [32 * warp + lane for warp in range(WARPS) for lane in range(LANES)]


class Thread:
    def __init__(self, walk: Walk, rank: int, tid: int) -> None:
        self.walk, self.rank, self.tid = walk, rank, tid
        self.leads = tid % 32 == 0
        self.warp = rank * WARPS + tid // 32
        self.registers: defaultdict[str, int] = defaultdict(int)
        self.unit = 0
        self.meetings: Counter[str] = Counter()
        self.waited = 0  # the barrier that it has last waited for

    def run(self, units: list[Callable[[Thread, Any], int | None]]) -> bool:
        """Until it has to wait; whether it came any further."""
        moved = False
        while self.unit >= 0:
            self.walk.steps += 1
            if self.walk.steps > _MOST:
                self.walk.fault("it does not end")
                self.unit = -1
                return True
            following = units[self.unit](self, self.registers)
            if following is None:
                return moved
            self.unit, moved = following, True
        return moved

    def here(self, address: int) -> int:
        """Of one's own block, unless it is mapped already."""
        return address if address >= _BLOCK else address + (self.rank + 1) * _BLOCK

    def special(self, name: str) -> int:
        values = {"%tid.x": self.tid, "%ctaid.x": self.rank, "%nctaid.x": self.walk.launch.blocks}
        values |= {
            "%ntid.x": self.walk.launch.threads,
            "%cluster_ctarank": self.rank,
            "%laneid": self.tid % 32,
        }
        return values.get(name, 0)

    def load(self, address: int, size: int, *, counter: bool = False) -> int:
        if address < 1 << 32 and not counter:
            return self.walk.memory.get(self.here(address), 0)
        return self.walk.load(address, size, counter=counter)

    def store(self, address: int, value: int) -> None:
        self.walk.memory[self.here(address)] = value

    # What the instructions with effects do. Those that may have to wait return None until they need not.

    def init(self, address: int, count: int) -> None:
        self.walk.barriers[self.here(address)] = Barrier(count)

    def arrive(self, address: int, expected: int = 0) -> None:
        place = self.here(address)
        barrier = self.walk.barrier(place)
        self._releases(place)
        barrier.round.arrived[self.warp] += 1
        barrier.round.met[self.warp] = self._meetings_over()
        barrier.round.expected += expected
        if expected and self.walk.pairs.setdefault(place, self.waited) != self.waited:
            self.walk.fault(f"bytes for {place:#x} after a wait for {self.waited:#x}")
        barrier.settle()

    def _meetings_over(self) -> int:
        """Of the threads of the block that compute."""
        meeting = self.walk.met.get(("block 1", self.rank))
        return meeting.over if meeting else 0

    def _releases(self, place: int) -> None:
        """A warp that lets a stage be filled again has waited for all products that read it."""
        full = next((full for full, empty in self.walk.pairs.items() if empty == place), None)
        reading = [address for group in self.walk.warps[self.warp].groups for address in group]
        reading += self.walk.warps[self.warp].issued
        for copy in self.walk.copies:
            if full is not None and copy.barrier == full and any(copy.first <= a < copy.end for a in reading):
                self.walk.fault(f"a stage is released at {place:#x} while products may read it")
                return

    def try_wait(self, address: int, parity: int) -> bool | None:
        place = self.here(address)
        barrier = self.walk.barrier(place)
        if barrier.complete & 1 == parity & 1:
            return None
        self.waited = place
        if self.leads and barrier.complete:
            barrier.rounds[-2].waited[self.warp] += 1
            barrier.rounds[-2].met[self.warp] = self._meetings_over()
        return True

    def copy(self, target: int, map_place: int, address: int, mask: int) -> None:
        size = self.walk.launch.boxes.get(map_place - _PARAMETERS)
        if size is None:
            return self.walk.fault(f"a map at {map_place - _PARAMETERS} of the parameters, where none is")
        for rank in range(self.walk.launch.walked):
            if mask >> rank & 1 or (mask == 0 and rank == self.rank):
                window = (rank + 1) * _BLOCK
                place, first = window + address % _BLOCK, window + target % _BLOCK
                barrier = self.walk.barrier(place)
                new = Copy(first, first + size, place, barrier.complete)
                if target % 128:
                    self.walk.fault(f"a box at {target:#x}, which is no multiple of 128")
                self._overwrites(new)
                barrier.round.copied += size
                barrier.settle()
        return None

    def _overwrites(self, new: Copy) -> None:
        kept = []
        for old in self.walk.copies:
            if old.end <= new.first or new.end <= old.first:
                kept.append(old)
                continue
            if (old.barrier, old.round) == (new.barrier, new.round):
                self.walk.fault(f"two boxes of a round at {new.first:#x}")
            for number, warp in self.walk.warps.items():
                if any(old.first <= a < old.end for group in [*warp.groups, warp.issued] for a in group):
                    self.walk.fault(f"a box overwrites what products of warp {number} may read")
        self.walk.copies = [*kept, new]

    def product(self, *descriptors: int) -> None:
        """Operands in shared memory have come, and the warp has waited for them."""
        if not self.leads:
            return
        for descriptor in descriptors:
            address = self.here((descriptor & 0x3FFF) << 4)
            if address % _BLOCK in self.walk.launch.made:
                continue
            source = [copy for copy in self.walk.copies if copy.first <= address < copy.end]
            if not source:
                self.walk.fault(f"a product reads {address:#x}, where no box has come")
                continue
            (copy,) = source
            rounds = self.walk.barriers[copy.barrier].rounds
            if not any(each.waited[self.warp] for each in rounds[copy.round :]):
                self.walk.fault(f"a product reads {address:#x} and has not waited for it")
            self.walk.warps[self.warp].issued.append(address)

    def commit(self) -> None:
        warp = self.walk.warps[self.warp]
        if self.leads:
            warp.groups, warp.issued = [*warp.groups, warp.issued], []

    def wait_group(self, number: int) -> None:
        warp = self.walk.warps[self.warp]
        if self.leads:
            warp.groups = warp.groups[len(warp.groups) - number :] if number else []

    def meet(self, name: str, threads: int) -> bool | None:
        """At a barrier of the block, or of the cluster; once all have come they may go."""
        meeting = self._meeting(name, threads)
        if self.meetings[name] == 0:
            self.meetings[name] = meeting.come(self)
        if self.meetings[name] > meeting.over:
            return None
        self.meetings[name] = 0
        return True

    def arrive_at(self, name: str, threads: int) -> None:
        """As `meet`, without waiting for the others."""
        self._meeting(name, threads).come(self)

    def _meeting(self, name: str, threads: int) -> Meeting:
        whole = "cluster" in name
        number = sum(tid < threads for tid in _threads()) * (self.walk.launch.walked if whole else 1)
        return self.walk.met.setdefault((name, None if whole else self.rank), Meeting(name, number))


# From here on: PTX to Python. A unit is what goes on without a choice; it returns the number of the next one,
# None if it has to wait, or -1 at the end.

_FLOAT = re.compile(r"\.(?:f16|f32|f64|bf16)(?:x2)?\b")
_WAITS = re.compile(r"mbarrier\.(?:try|test)_wait|bar\.sync|barrier\.(?:sync|cluster)")
_IGNORED = re.compile(
    r"fence|membar|bar\.warp|setmaxnreg|nanosleep|wgmma\.fence|red\.|st\.(?!shared)|prefetch|griddepcontrol"
)
_BOOKED = re.compile(r"mbarrier|cp\.async\.bulk|wgmma\.mma_async")
_CHOICES = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_CHOICES |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
Unit = Callable[[Thread, Any], "int | None"]


def _compiled(kernel: ptx.Kernel, statements: list[ptx.Statement]) -> list[Unit]:
    starts = {0}
    for number, each in enumerate(statements):
        if each.label or _WAITS.match(each.opcode):
            starts.add(number)
        if each.opcode.startswith(("bra", "brx")):
            starts.add(number + 1)
    units = {start: i for i, start in enumerate(sorted(starts))}
    labels = {each.label: units[number] for number, each in enumerate(statements) if each.label}
    targets = {name: [labels[label] for label in places] for name, places in kernel.targets.items()}
    lines: list[str] = []
    for number, each in enumerate(statements):
        if number in units:
            lines.append(f"def unit{units[number]}(t, r):")
        if _BOOKED.match(each.opcode):
            lines.append(f"    t.walk.done.add({number})")
        lines += [f"    {line}" for line in _lines(each, labels, targets)]
        if number + 1 in units:
            lines.append(f"    return {units[number + 1]}")
    if len(statements) in units:  # the last one branches
        lines.append(f"def unit{units[len(statements)]}(t, r):")
    lines.append("    return -1")
    names: dict[str, Any] = {"s": _signed, "quotient": _quotient}
    exec("\n".join(lines), names)
    return [names[f"unit{i}"] for i in range(len(units))]


def _decisive(kernel: ptx.Kernel) -> list[ptx.Statement]:
    """Without the arithmetic whose results no branch, address or count comes from."""
    writers: dict[str, list[ptx.Statement]] = defaultdict(list)
    needed: set[str] = set()
    left: list[str] = []
    for each in kernel.statements:
        if _pure(each):
            for register in ptx.written(each):
                writers[register].append(each)
        elif not _IGNORED.match(each.opcode):
            left += _sources(each)
    while left:
        register = left.pop()
        if register not in needed:
            needed.add(register)
            left += [source for each in writers[register] for source in _sources(each)]
    return [
        each
        for each in kernel.statements
        if (not _pure(each) or not needed.isdisjoint(ptx.written(each)))
        and not _IGNORED.match(each.opcode or "-")
    ]


def _pure(statement: ptx.Statement) -> bool:
    """Whether it only writes registers."""
    effects = ("mbarrier", "wgmma", "cp.async", "st.", "bra", "brx", "ret", "exit", "trap", "bar")
    return bool(statement.opcode) and not statement.opcode.startswith(effects)


def _sources(statement: ptx.Statement) -> list[str]:
    """Registers whose values are taken from it as they are."""
    opcode, operands = statement.opcode, statement.operands
    if _FLOAT.search(opcode) and not opcode.startswith("wgmma"):
        return ptx.registers(statement.predicate)
    if opcode.startswith("wgmma.mma_async"):
        return [name for operand in operands[1:3] if "{" not in operand for name in ptx.registers(operand)]
    return ptx.read(statement)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _quotient(a: int, b: int) -> int:
    """Towards zero; of a division by zero nothing comes of."""
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _value(operand: str) -> str:
    """An operand as Python."""
    if operand.startswith("!"):
        return f"(not {_value(operand[1:])})"
    if found := ptx.registers(operand):
        (register,) = found
        place = f"r[{register!r}]"
        return f"({place}{operand[len(register) :]})" if operand != register else place
    if operand.startswith("%"):
        return f"t.special({operand!r})"
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
        return operand.rstrip("U")
    if re.match(r"0[fdFD][0-9a-fA-F]+$|\d+\.\d+$", operand):
        return "0"
    place = re.fullmatch(r"([\w$]+)(?:\+(\d+))?", operand)
    if place is None:
        raise ValueError(f"no operand: {operand!r}")
    base = _PARAMETERS if re.search(r"_param_\d+$", place[1]) else _SHARED
    return str(base + int(place[2] or 0))


def _list(operand: str) -> list[str]:
    return ptx.split(operand[1:-1]) if operand.startswith("{") else [operand]


def _lines(statement: ptx.Statement, labels: dict[str, int], targets: dict[str, list[int]]) -> Iterator[str]:
    if statement.label:
        yield "pass"
        return
    if statement.predicate:
        yield f"if {_value(statement.predicate)}:"
    for line in _effects(statement, labels, targets):
        yield "    " * bool(statement.predicate) + line


def _effects(
    statement: ptx.Statement, labels: dict[str, int], targets: dict[str, list[int]]
) -> Iterator[str]:
    opcode, operands = statement.opcode, statement.operands
    at = [operand.strip("[]") for operand in operands]
    if opcode.startswith("bra"):
        yield f"return {labels[operands[0]]}"
    elif opcode.startswith("brx"):
        yield f"return {targets[operands[1]]}[{_value(operands[0])}]"
    elif opcode in ("ret", "exit"):
        yield "return -1"
    elif opcode == "trap":
        yield "t.walk.fault('a trap')"
        yield "return -1"
    elif opcode.startswith("mbarrier.init"):
        yield f"t.init({_value(at[0])}, {_value(at[1])})"
    elif opcode.startswith("mbarrier.arrive"):
        yield f"t.arrive({', '.join(_value(each) for each in at[1:])})"
    elif opcode.startswith(("mbarrier.try_wait", "mbarrier.test_wait")):
        result, place, parity, *_ = at
        yield f"done = t.try_wait({_value(place)}, {_value(parity)})"
        yield "if done is None: return None"
        yield f"{_value(result)} = 1"
    elif opcode.startswith("cp.async.bulk.tensor"):
        places = ptx.split(at[1])
        mask = _value(operands[3]) if "multicast" in opcode else "0"
        yield f"t.copy({_value(at[0])}, {_value(places[0])}, {_value(at[2])}, {mask})"
    elif opcode.startswith("wgmma.mma_async"):
        yield f"t.product({', '.join(_value(o) for o in operands[1:3] if '{' not in o)})"
    elif opcode.startswith("wgmma.commit_group"):
        yield "t.commit()"
    elif opcode.startswith("wgmma.wait_group"):
        yield f"t.wait_group({operands[0]})"
    elif opcode.startswith("barrier.cluster"):
        if "arrive" not in opcode:  # the two stand together
            yield "if t.meet('cluster', t.walk.launch.threads) is None: return None"
    elif opcode.startswith(("bar.sync", "barrier.sync")):
        threads = _value(operands[1]) if len(operands) > 1 else "t.walk.launch.threads"
        yield f"if t.meet('block %d' % {_value(operands[0])}, {threads}) is None: return None"
    elif opcode.startswith(("bar.arrive", "barrier.arrive")):
        yield f"t.arrive_at('block %d' % {_value(operands[0])}, {_value(operands[1])})"
    elif opcode.startswith("st.shared"):
        for i, value in enumerate(_list(operands[1])):
            yield f"t.store({_value(at[0])} + {4 * i}, {'0' if _FLOAT.search(opcode) else _value(value)})"
    else:
        yield from _arithmetic(opcode, operands)


def _arithmetic(opcode: str, operands: tuple[str, ...]) -> Iterator[str]:
    name, *modifiers = opcode.split(".")
    kind = modifiers[-1] if modifiers else ""
    bits = 32 if kind == "pred" else int(re.sub(r"\D", "", kind) or 32)
    mask = (1 << (2 * bits if "wide" in modifiers else bits)) - 1
    results = [_value(each) for each in re.split(r"\|", operands[0]) for each in _list(each) if each != "_"]
    values = [_value(each) for each in operands[1:] if not each.startswith(("{", "["))]
    if _FLOAT.search(opcode):
        yield from (f"{result} = 0" for result in results)
        return

    def signed(value: str, kind: str = kind) -> str:
        width = int(re.sub(r"\D", "", kind) or 32)
        masked = f"({value} & {(1 << width) - 1})"
        return f"s({masked}, {width})" if kind.startswith("s") else masked

    if name == "ld":
        (place,) = (operand.strip("[]") for operand in operands[1:] if operand.startswith("["))
        counter = "acquire" in modifiers or "relaxed" in modifiers
        for i, result in enumerate(results):
            yield f"{result} = t.load({_value(place)} + {bits // 8 * i}, {bits // 8}, counter={counter})"
    elif name == "setp":
        compared = f"{signed(values[0])} {_CHOICES[modifiers[0]]} {signed(values[1])}"
        if modifiers[1] in ("and", "or"):
            compared = f"({compared}) {modifiers[1]} {values[2]}"
        yield f"{results[0]} = int({compared})"
        yield from (f"{other} = 1 - {results[0]}" for other in results[1:])
    elif name == "mov" and operands[1].startswith("{"):
        parts = [_value(each) for each in _list(operands[1])]
        whole = " | ".join(f"{part} << {bits // len(parts) * i}" for i, part in enumerate(parts))
        yield f"{results[0]} = {whole}"
    elif name == "mov" and len(results) > 1:
        part = bits // len(results)
        yield from (f"{r} = {values[0]} >> {part * i} & {(1 << part) - 1}" for i, r in enumerate(results))
    elif name == "elect":
        yield f"{results[-1]} = int(t.leads)"
    elif name in ("shfl", "vote", "activemask"):
        yield f"{results[0]} = {values[0] if values else mask}"
        yield from (f"{other} = 1" for other in results[1:])
    elif name == "mapa":
        yield f"{results[0]} = {values[0]} % {_BLOCK} + ({values[1]} + 1) * {_BLOCK}"
    elif name == "cvt":
        yield f"{results[0]} = {signed(values[0], kind)} & {(1 << int(modifiers[-2][1:])) - 1}"
    elif name in ("createpolicy", "atom"):
        yield f"{results[0]} = 0"
    else:
        mask = 1 if kind == "pred" else mask
        yield f"{results[0]} = ({_expression(name, modifiers, kind, values, signed)}) & {mask}"


def _expression(
    name: str, modifiers: list[str], kind: str, values: list[str], signed: Callable[..., str]
) -> str:
    if name == "cvta" or name == "mov":
        return values[0]
    if name in ("add", "sub", "and", "or", "xor"):
        sign = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}[name]
        return f"{values[0]} {sign} {values[1]}"
    if name in ("mul", "mad"):
        product = f"{signed(values[0])} * {signed(values[1])}"
        if "hi" in modifiers:
            product = f"({product}) >> {re.sub(r'[^0-9]', '', kind)}"
        return product if name == "mul" else f"{product} + {values[2]}"
    if name in ("min", "max"):
        return f"{name}({signed(values[0])}, {signed(values[1])})"
    if name == "shl":
        return f"{values[0]} << min({values[1]}, 64)"
    if name == "shr":
        return f"{signed(values[0])} >> min({values[1]}, 64)"
    if name in ("div", "rem"):
        a, b = signed(values[0]), signed(values[1])
        return f"quotient({a}, {b})" if name == "div" else f"{a} - quotient({a}, {b}) * ({b})"
    if name in ("neg", "not"):
        return f"{'-' if name == 'neg' else 'not ' if kind == 'pred' else '~'}{values[0]}"
    if name == "abs":
        return f"abs({signed(values[0])})"
    if name == "bfi":
        inserted, whole, place, number = values
        mask = f"((1 << {number}) - 1 << {place})"
        return f"({whole} & ~{mask}) | (({inserted} << {place}) & {mask})"
    if name == "selp":
        return f"{values[0]} if {values[2]} else {values[1]}"
    raise ValueError(f"{name}.{'.'.join(modifiers)} decides about a barrier, and is not known here")
