"""Runs the PTX of a kernel on a CPU: the 128 threads of a block in lock step, one block after
another, in numpy.

It is no model of time. It knows the instructions that the attention kernels for GPUs older than
Hopper compile to, and is strict where a GPU is silent: what `cp.async` brings is NaN until it is
waited for, and between two barriers of all threads shared memory is either read or written.
Meanings are those of the PTX ISA, in particular the fragments of `mma.m16n8k16` and `ldmatrix`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

THREADS = 128
THREAD = np.arange(THREADS)
WARP, LANE = THREAD // 32, THREAD % 32
ROW, COLUMN = LANE // 4, 2 * (LANE % 4)  # of a fragment
TYPES = {"f32": np.float32, "pred": np.bool_}
TYPES |= {
    f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}").type
    for kind in "bsu"
    for bits in (16, 32, 64)
}
WIDER = {np.uint32: np.uint64, np.int32: np.int64}


class Fault(Exception):
    """An error that a GPU would make, or an instruction unknown here."""


class Instruction(NamedTuple):
    predicate: str | None
    negated: bool
    name: list[str]  # "ld.global.b32" in its parts
    operands: list[str]
    text: str


def parsed(text: str) -> tuple[str, list[Instruction], dict[str, int]]:
    """The name of the kernel, its instructions, and where its labels stand."""
    text = re.sub(r"//[^\n]*", "", text)
    kernel = re.search(r"\.entry (\w+)", text)[1]
    body = text[text.index("\n{") + 2 :]
    instructions, labels = [], {}
    for line in body[: body.index("\n}")].split(";"):
        line = line.strip()
        while found := re.match(r"(?:(\$\w+):|\.loc[^\n]*)\s*", line):
            if found[1]:
                labels[found[1]] = len(instructions)
            line = line[found.end() :]
        if line and not line.startswith((".reg", ".shared", ".pragma")):
            predicate, name, operands = re.fullmatch(
                r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", " ".join(line.split())
            ).groups()
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
            negated = predicate is not None and predicate.startswith("!")
            instructions.append(
                Instruction(
                    predicate and predicate.lstrip("!"), negated, name.split("."), operands, line
                )
            )
    return kernel, instructions, labels


def rounded(numbers: np.ndarray) -> np.ndarray:
    """f32 to the bits of bf16."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return np.where(np.isnan(numbers), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(
        np.uint16
    )


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def registers_of(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


class Memory(NamedTuple):
    """Arrays behind one another, as bytes, with NaN before, between and behind."""

    data: np.ndarray
    places: dict[str, int]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Memory:
        places, end = {}, 256
        for name, array in arrays.items():
            places[name], end = end, end + -(-array.nbytes // 256) * 256 + 256
        data = np.full(end, 0xFF, np.uint8)
        for name, array in arrays.items():
            data[places[name] :][: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        return cls(data, places)

    def read(self, name: str, like: np.ndarray) -> np.ndarray:
        return np.frombuffer(
            self.data[self.places[name] :][: like.nbytes].tobytes(), like.dtype
        ).reshape(like.shape)


def run(
    text: str,
    shared: int,
    order: list[str],
    grid: tuple[int, int],
    arrays: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The arrays as the kernel leaves them.

    Args:
      shared: bytes of shared memory; order: names of the arrays as the kernel has them for
        parameters; grid: blocks along x and y.
    """
    kernel, instructions, labels = parsed(text)
    memory = Memory.of(arrays)
    parameters = {f"[{kernel}_param_{i}]": memory.places[name] for i, name in enumerate(order)}
    with np.errstate(all="ignore"):  # what a query does not see may overflow
        for y in range(grid[1]):
            for x in range(grid[0]):
                _Block(memory.data, shared, parameters, {"%ctaid.x": x, "%ctaid.y": y}).run(
                    instructions, labels
                )
    return {name: memory.read(name, array) for name, array in arrays.items()}


class _Block:
    """A thread block: registers by name, each the bits of all threads, and shared memory."""

    def __init__(
        self, memory: np.ndarray, shared: int, parameters: dict[str, int], numbers: dict[str, int]
    ):
        self.spaces = {"global": memory, "shared": np.full(shared, 0xFF, np.uint8)}
        self.parameters = parameters
        self.registers: dict[str, Any] = {
            name: np.full(THREADS, value, np.uint32) for name, value in numbers.items()
        }
        self.registers["%tid.x"] = THREAD.astype(np.uint32)
        self.copies: list[tuple] = []
        self.was_read = self.was_written = self.has_arrived = False  # since the last barrier

    def run(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        place = 0
        while place < len(instructions):
            here = instructions[place]
            active = (
                np.ones(THREADS, bool)
                if here.predicate is None
                else self.registers[here.predicate] ^ here.negated
            )
            if active.any() and not active.all():
                raise Fault(f"threads part: {here.text}")
            place += 1
            if not active.all():
                continue
            if here.name[0] == "ret":
                return
            if here.name[0] == "bra":
                place = labels[here.operands[0]]
                continue
            known = getattr(self, f"_{here.name[0]}", None)
            if known is None:
                raise Fault(f"not known here: {here.text}")
            known(here.name, *here.operands)

    def get(self, operand: str, kind: str) -> np.ndarray:
        dtype = TYPES[kind]
        bits = np.dtype(dtype).itemsize * 8
        if operand.startswith("%"):
            value = self.registers[operand]
            return value if kind == "pred" else value.astype(f"u{bits // 8}").view(dtype)
        if operand.startswith("0f"):
            return np.full(THREADS, struct.unpack(">f", bytes.fromhex(operand[2:])), dtype)
        number = 0 if operand.startswith("__dynamic_shmem") else int(operand, 0)
        return np.full(THREADS, number % 2**bits, f"u{bits // 8}").view(dtype)

    def put(self, register: str, value: np.ndarray) -> None:
        value = np.ascontiguousarray(value)
        self.registers[register] = (
            value if value.dtype == bool else value.view(f"u{value.itemsize}")
        )

    # ---- memory -------------------------------------------------------------------------------

    def touch(self, *, write: bool) -> None:
        if self.has_arrived or (self.was_read if write else self.was_written):
            raise Fault("threads use shared memory without a barrier in between")
        self.was_written, self.was_read = self.was_written or write, self.was_read or not write

    def bytes_at(self, operand: str, size: int, space: str) -> np.ndarray:
        """[threads, size]: the numbers of the bytes."""
        register, offset = re.fullmatch(r"\[(%\w+)(?:\+(-?\d+))?\]", operand).groups()
        first = self.get(register, "s64") + int(offset or 0)
        if (
            (first % size).any()
            or (first < 0).any()
            or (first + size > self.spaces[space].size).any()
        ):
            raise Fault(f"no {size} bytes of {space} memory: {operand}")
        return first[:, None] + np.arange(size)

    def _ld(self, name, target, source):
        if name[1].startswith("param"):
            return self.put(target, np.full(THREADS, self.parameters[source], np.uint64))
        targets, space, dtype = (
            registers_of(target),
            "shared" if "shared" in name else "global",
            TYPES[name[-1]],
        )
        if space == "shared":
            self.touch(write=False)
        found = self.spaces[space][
            self.bytes_at(source, np.dtype(dtype).itemsize * len(targets), space)
        ].view(dtype)
        for i, register in enumerate(targets):
            self.put(register, found[:, i])

    def _st(self, name, target, source):
        space = "shared" if "shared" in name else "global"
        if space == "shared":
            self.touch(write=True)
        values = np.stack(
            [self.get(register, name[-1]) for register in registers_of(source)], axis=1
        ).view(np.uint8)
        self.spaces[space][self.bytes_at(target, values.shape[1], space)] = values

    def _cp(self, name, *operands):
        if name[2] == "commit_group":
            return
        if name[2] == "wait_group":
            if operands != ("0",):
                raise Fault("only all copies are waited for")
            for there, here in self.copies:
                self.spaces["shared"][there] = self.spaces["global"][here]
            self.has_arrived, self.copies = bool(self.copies), []
            return
        if self.was_read or self.was_written or self.has_arrived:
            raise Fault(
                "a copy overwrites what other threads may use, without a barrier in between"
            )
        there, here = (
            self.bytes_at(operand, int(operands[2]), space)
            for operand, space in zip(operands, ("shared", "global"), strict=False)
        )
        self.spaces["shared"][there] = 0xFF
        self.copies.append((there, here))

    def _bar(self, name, *operands):
        self.was_read = self.was_written = self.has_arrived = False

    def _ldmatrix(self, name, target, source):
        self.touch(write=False)
        rows = self.bytes_at(source, 16, "shared").reshape(4, 4, 8, 16)  # warp matrix row byte
        matrices = self.spaces["shared"][rows].view(np.uint16)
        matrices = matrices.swapaxes(2, 3) if "trans" in name else matrices
        for i, register in enumerate(registers_of(target)):
            self.put(
                register,
                np.ascontiguousarray(matrices[:, i]).reshape(4, 64).view(np.uint32).reshape(-1),
            )

    # ---- arithmetic ---------------------------------------------------------------------------

    def _mma(self, name, target, left, right, sums):
        if name[3:] != ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]:
            raise Fault(f"not known here: {name}")
        a, b, c = (
            np.zeros((4, 16, 16), np.float32),
            np.zeros((4, 16, 8), np.float32),
            np.zeros((4, 16, 8), np.float32),
        )
        for i, register in enumerate(registers_of(left)):
            pair = from_bf16(self.get(register, "b32").view(np.uint16)).reshape(-1, 2)
            for j in (0, 1):
                a[WARP, ROW + 8 * (i % 2), COLUMN + j + 8 * (i // 2)] = pair[:, j]
        for i, register in enumerate(registers_of(right)):
            pair = from_bf16(self.get(register, "b32").view(np.uint16)).reshape(-1, 2)
            for j in (0, 1):
                b[WARP, COLUMN + j + 8 * i, ROW] = pair[:, j]
        place = [(WARP, ROW + 8 * (i // 2), COLUMN + i % 2) for i in range(4)]
        for i, register in enumerate(registers_of(sums)):
            c[place[i]] = self.get(register, "f32")
        result = c + a @ b
        for i, register in enumerate(registers_of(target)):
            self.put(register, result[place[i]])

    def _shfl(self, name, target, source, mask, *_):
        if name[2] != "bfly":
            raise Fault(f"not known here: {name}")
        self.put(target.split("|")[0], self.get(source, "b32")[THREAD ^ self.get(mask, "u32")])

    def _mov(self, name, target, source):
        parts = registers_of(source)
        if target.startswith("{"):
            targets = registers_of(target)
            halves = self.get(source, name[-1]).view(np.uint8).reshape(THREADS, len(targets), -1)
            for i, register in enumerate(targets):
                self.put(
                    register, np.ascontiguousarray(halves[:, i]).view(f"u{halves.shape[2]}")[:, 0]
                )
        elif source.startswith("{"):
            kind = f"b{np.dtype(TYPES[name[-1]]).itemsize * 8 // len(parts)}"
            self.put(
                target,
                np.stack([self.get(part, kind) for part in parts], axis=1).view(TYPES[name[-1]])[
                    :, 0
                ],
            )
        else:
            self.put(target, self.get(source, name[-1]))

    def _cvta(self, name, target, source):
        self.put(target, self.get(source, "u64"))

    def _cvt(self, name, target, *sources):
        to, of = name[-2:]
        if to == "bf16x2":  # the first is the upper half
            upper, lower = (
                rounded(self.get(source, "f32")).astype(np.uint32) for source in sources
            )
            self.put(target, upper << 16 | lower)
        elif to == "bf16":
            self.put(target, rounded(self.get(sources[0], "f32")))
        elif of == "bf16":
            self.put(target, from_bf16(self.get(sources[0], "b16")))
        elif "f32" in (to, of):
            raise Fault(f"not known here: {name}")
        else:
            self.put(target, self.get(sources[0], of).astype(TYPES[to]))

    def _setp(self, name, target, one, other):
        compare = {
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
            "eq": np.equal,
            "ne": np.not_equal,
        }
        self.put(target, compare[name[1]](self.get(one, name[-1]), self.get(other, name[-1])))

    def _selp(self, name, target, one, other, predicate):
        self.put(
            target,
            np.where(self.registers[predicate], self.get(one, name[-1]), self.get(other, name[-1])),
        )

    def _bfe(self, name, target, source, first, count):
        value = self.get(source, name[-1])
        self.put(target, value >> type(value[0])(int(first)) & type(value[0])(2 ** int(count) - 1))

    def _mad(self, name, target, one, other, addend):
        self._mul(name, target, one, other)
        kind = name[-1] if name[1] == "lo" else f"{name[-1][0]}64"
        self.put(target, self.get(target, kind) + self.get(addend, kind))

    def _mul(self, name, target, one, other):
        one, other = self.get(one, name[-1]), self.get(other, name[-1])
        if name[1] in ("wide", "hi"):
            wide = WIDER[type(one[0])]
            product = one.astype(wide) * other.astype(wide)
            self.put(
                target, product if name[1] == "wide" else (product >> wide(32)).astype(type(one[0]))
            )
        else:
            self.put(target, one * other)

    def _fma(self, name, target, one, other, addend):
        one, other, addend = (
            self.get(operand, "f32").astype(np.float64) for operand in (one, other, addend)
        )
        self.put(target, (one * other + addend).astype(np.float32))

    def __getattr__(self, name):
        """Operations that numpy applies to each number."""
        if name.lstrip("_") not in _SIMPLE:
            raise AttributeError(name)

        def apply(parts, target, *sources):
            shift = name in ("_shl", "_shr")
            values = [self.get(source, parts[-1]) for source in sources[: 1 if shift else None]]
            values += [
                self.get(source, "u32").astype(values[0].dtype) for source in sources[1:] if shift
            ]
            self.put(target, _SIMPLE[name[1:]](*values))

        return apply


_SIMPLE = {
    "add": np.add,
    "sub": np.subtract,
    "div": np.divide,
    "neg": np.negative,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "ex2": np.exp2,
}
