"""What a compiled program does, read from its text: kernels, bytes that move, collectives.

Bytes are those of operands and results of the instructions outside of fusions, each array counted
where it is read and where it is written, as far as it lies in the device's main memory: what a
TPU keeps in its vector memory, `S(1)` in the text, counts as nothing. Of an operand that is sliced
only the slice is counted, and of one that is updated in place only the update. A loop counts as
often as it is known to run, and once where that is not known; of a branch, the costliest.

A GPU has a cache, which a program's text does not name: with `cached`, arrays of so many bytes at
most count as nothing either where they are made and read in the same turn of a loop.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

COLLECTIVES = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"

_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+|f8\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%[\w.-]+")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=(%[\w.-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=(%[\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NOTHING = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id",
    "optimization-barrier", "opt-barrier",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "gather"}
_VIEWS = {"bitcast", "reshape"}


@dataclass(frozen=True)
class Instruction:
    """A line: `%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @cached_property
    def bytes(self) -> int:
        """Of its result in main memory."""
        return sum(_size(array) for array in _ARRAY.finditer(self.type))

    @cached_property
    def called(self) -> list[str]:
        found = _BRANCHES.search(self.attributes)
        return _NAME.findall(found[1]) if found else _CALLED.findall(self.attributes)


def _size(array: re.Match[str]) -> int:
    kind, shape, layout = array.groups()
    if layout and "S(" in layout:
        return 0
    bits = _BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _whole(kind: str) -> int:
    """Bytes of a type, in whatever memory."""
    return sum(_size(array) for array in _ARRAY.finditer(re.sub(r"S\(\d+\)", "", kind)))


@dataclass
class Cost:
    """Of an instruction, or of all of a computation's."""

    bytes: int = 0
    kernels: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    linked: int = 0  # bytes of collectives: of each the whole, gathered or to be scattered

    def __add__(self, other: "Cost") -> "Cost":
        names = self.collectives.keys() | other.collectives.keys()
        added = {n: self.collectives.get(n, 0) + other.collectives.get(n, 0) for n in names}
        linked = self.linked + other.linked
        return Cost(self.bytes + other.bytes, self.kernels + other.kernels, added, linked)

    def __mul__(self, times: int) -> "Cost":
        collectives = {name: times * count for name, count in self.collectives.items()}
        return Cost(times * self.bytes, times * self.kernels, collectives, times * self.linked)


class CompiledProgram:
    """The computations of a compiled program's text (`compiled.as_text()`)."""

    def __init__(self, text: str, cached: int = 0):
        self._cached = cached
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._costs: dict[str, Cost] = {}
        self.entry = ""
        for line in text.splitlines():
            if line.endswith("{") and (found := re.match(r"(ENTRY )?(%[\w.-]+) \(", line)):
                here = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif (found := re.match(r"\s+(ROOT )?(%[\w.-]+) = ", line)) and self.computations:
                here[found[2]] = _instruction(found[2], line[found.end() :], bool(found[1]))

    def cost(self, computation: str | None = None) -> Cost:
        """Of one run of a computation, by default of the whole program."""
        name = computation or self.entry
        if name not in self._costs:
            here = self.computations[name].values()
            alone = sum((self._of(x, name) for x in here), Cost())
            self._costs[name] = sum(self._fused_collectives(name), alone)
        return self._costs[name]

    def loops(self, of_unknown_length: bool = True) -> list[str]:
        """The bodies of the program's loops, by default of those whose length is not known."""
        return [
            x.called[0]
            for name in self.computations
            for x in self.computations[name].values()
            if x.opcode == "while" and (not of_unknown_length or self._trips(x) is None)
        ]

    def carries(self, body: str, array: str) -> bool:
        """Whether a loop carries an array of this type, such as "s32[8,56]"."""
        inside = self.computations[body].values()
        return any(x.opcode == "parameter" and array in x.type for x in inside)

    def _of(self, x: Instruction, computation: str) -> Cost:
        here = self.computations[computation]
        opcode = x.opcode.removesuffix("-start")
        if opcode in _NOTHING or opcode.endswith("-done") or "ConcatBitcast" in x.attributes:
            return Cost()
        if opcode in ("while", "call"):
            return self.cost(x.called[0]) * (self._trips(x) or 1)
        if opcode == "conditional":
            return max((self.cost(name) for name in x.called), key=lambda cost: cost.bytes)
        collectives = {opcode: 1} if opcode in COLLECTIVES else {}
        linked = self._linked(x, here) if collectives else 0
        if opcode == "async" and x.called:
            return self.cost(x.called[0])
        operands = [self._moved(here[name], here) for name in x.operands]
        result = self._moved(x, here)
        moved = result + sum(operands)
        if opcode == "fusion":
            moved = self._of_fusion(x, operands, result)
        elif opcode == "dynamic-update-slice":
            moved = 2 * operands[1]
        elif opcode == "scatter":
            moved = 3 * operands[-1]
        elif opcode in _SLICES:
            moved = self._of_slice(x, here)
        elif x.opcode.endswith("-start") and opcode != "all-reduce":  # its type names operands too
            moved = x.bytes if x.opcode == "copy-start" else self._of_slice(x, here)
        return Cost(moved, 1, collectives, linked)

    def _trips(self, loop: Instruction) -> int | None:
        """How often a loop is known to run.

        A TPU's text does not say it, but ends the condition of JAX's scans with `counter < count`.
        """
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        if not (found := _CONDITION.search(loop.attributes)):
            return None
        inside = self.computations[found[1]]
        last = next(x for x in inside.values() if x.is_root)
        if last.opcode != "compare" or "direction=LT" not in last.attributes:
            return None
        count = inside[last.operands[1]]
        return int(count.attributes.strip("()")) if count.opcode == "constant" else None

    def _fused_collectives(self, computation: str) -> Iterator[Cost]:
        """Those that a TPU sends bit by bit while it computes: one a channel, in many fusions."""
        found = {}
        for x in self.computations[computation].values():
            inside = self.computations[x.called[0]] if x.opcode == "fusion" else {}
            for y in inside.values():
                if y.opcode in COLLECTIVES and (channel := _CHANNEL.search(y.attributes)):
                    found[channel[1]] = Cost(0, 0, {y.opcode: 1}, self._linked(y, inside))
        yield from found.values()

    def _linked(self, x: Instruction, here: dict[str, Instruction]) -> int:
        """The larger of what goes in and what comes out, wherever it lies."""
        given = sum(_whole(here[name].type) for name in x.operands)
        result = _whole(x.type)
        if x.opcode.endswith("-start"):  # its type names the operands too
            result -= given
        return max(given, result)

    def _of_slice(self, x: Instruction, here: dict[str, Instruction]) -> int:
        result = list(_ARRAY.finditer(x.type))[-2 if x.opcode.endswith("-start") else 0]
        whole = re.sub(r"S\(\d+\)", "", result[0])
        read = _size(_ARRAY.match(whole)) if here[x.operands[0]].bytes else 0  # type: ignore[arg-type]
        return read + _size(result)

    def _moved(self, x: Instruction, here: dict[str, Instruction]) -> int:
        """Bytes of a result, as far as they leave the cache."""
        made = x
        while made.opcode in _VIEWS or made.opcode == "get-tuple-element":
            made = here[made.operands[0]]
        if made.opcode in ("parameter", "constant") or self._is_in_place(made):
            return x.bytes
        sizes = map(_size, _ARRAY.finditer(x.type))
        return sum(size for size in sizes if size > self._cached)

    def _is_in_place(self, x: Instruction) -> bool:
        """Whether it writes into a part of an array that was there."""
        if x.opcode == "fusion":
            inside = self.computations[x.called[0]]
            root = next(y for y in inside.values() if y.is_root)
            return self._written(root, inside, x.bytes) < x.bytes
        return x.opcode == "dynamic-update-slice"

    def _of_fusion(self, x: Instruction, operands: list[int], result: int) -> int:
        inside = self.computations[x.called[0]]
        read = 0
        for number, size in enumerate(operands):
            read += min(size, self._read_of_parameter(x.called[0], number, size))
        root = next(y for y in inside.values() if y.is_root)
        return read + min(result, self._written(root, inside, x.bytes))

    def _written(self, root: Instruction, inside: dict[str, Instruction], size: int) -> int:
        if root.opcode == "tuple":
            parts = [inside[name] for name in root.operands]
            return min(size, sum(self._written(y, inside, y.bytes) for y in parts))
        while root.opcode in _VIEWS | {"fusion"}:
            if root.opcode == "fusion":
                inside = self.computations[root.called[0]]
                root = next(y for y in inside.values() if y.is_root)
                if root.opcode == "tuple":
                    return size
            else:
                root = inside[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return min(size, inside[root.operands[1]].bytes)
        return size

    def _read_of_parameter(self, computation: str, number: int, size: int) -> int:
        inside = self.computations[computation]
        parameter = next(
            x.name
            for x in inside.values()
            if x.opcode == "parameter" and x.attributes.startswith(f"({number})")
        )
        return self._read_by_users(inside, parameter, size)

    def _is_view(self, x: Instruction) -> bool:
        """Whether it is a fusion that computes nothing."""
        inside = self.computations[x.called[0]] if x.opcode == "fusion" else {}
        return bool(inside) and all(y.opcode in _VIEWS | {"parameter"} for y in inside.values())

    def _read_by_users(self, inside: dict[str, Instruction], name: str, size: int) -> int:
        read = 0
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.opcode in _VIEWS or self._is_view(user):
                read += size if user.is_root else self._read_by_users(inside, user.name, size)
            elif user.opcode in _SLICES and user.operands[0] == name:
                read += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.opcode == "fusion":
                place = user.operands.index(name)
                read += self._read_of_parameter(user.called[0], place, size)
            else:
                return size
        return min(read, size)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _matching(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _matching(rest, len(opcode))
    inside = rest[len(opcode) : close + 1]
    attributes = rest[close + 1 :]
    if opcode in ("parameter", "constant"):
        attributes = inside
    return Instruction(name, kind, opcode, tuple(_NAME.findall(inside)), attributes, is_root)


def _matching(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no end of {text[start : start + 80]}")
