"""PTX instructions for moves, conversions, comparisons, shuffles and memory.

``decode`` returns a function of the machine and the threads that execute. Arithmetic is in
``arithmetic.py``. Source: PTX ISA, "Instruction Set".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from tests.support.executor.arithmetic import LOGIC, ROUND, arithmetic, comparison
from tests.support.executor.machine import Machine, Mask
from tests.support.executor.values import (
    UNSIGNED,
    Type,
    Unsupported,
    f4,
    flush,
    to_integer,
    u1,
    u2,
    u4,
)

if TYPE_CHECKING:
    from tests.support.executor.program import Operands, Operation, Program

_TYPES = re.compile(r"pred|[bsu](8|16|32|64)|b?f(16|32|64)(x2)?")
_CACHE_HINTS = {"L1::evict_first", "L1::evict_last"}


def decode(program: Program, op: str, args: Operands, where: str) -> Operation:
    """Return the operation of one instruction.

    Args:
        program: Maps names to registers and parameters.
        op: The instruction with its modifiers.
        args: The operands.
        where: The kernel's name and the instruction, for messages.

    Raises:
        Unsupported: If the executor does not know the instruction.
    """
    # Triton 3.8 spells out ::cta, which is the default.
    base, *modifiers = op.replace("shared::cta", "shared").split(".")
    kinds = [Type(m) for m in modifiers if _TYPES.fullmatch(m)]
    modifiers = [m for m in modifiers if not _TYPES.fullmatch(m)]
    if base in ("ld", "st") and modifiers != ["param"]:
        return (_load if base == "ld" else _store)(program, modifiers, args, kinds[0], where)
    if base in ("ldmatrix", "stmatrix"):
        return _matrix(program, base, modifiers, args, where)
    make = {
        "ld": _param,
        "mov": _mov,
        "cvt": _cvt,
        "setp": _setp,
        "selp": _selp,
        "shfl": _shuffle,
    }.get(base)
    if make is not None:
        return make(program, modifiers, args, kinds, where)
    return _arithmetic(program, base, modifiers, args, kinds[-1], where)


def _bits(size: int) -> Type:
    return Type(f"b{8 * size}")


def _arithmetic(
    program: Program, base: str, modifiers: list[str], args: Operands, kind: Type, where: str
) -> Operation:
    target, twice = (
        program.register(args[0]),
        Type(f"{kind.name[0]}{16 * kind.size}") if "wide" in modifiers else kind,
    )
    kinds = [kind] * (len(args) - 1)
    if base in ("shl", "shr"):
        kinds[1] = Type("u32")
    elif base == "bfe":
        kinds[1:] = [Type("u32")] * 2
    elif base == "mad":
        kinds[2] = twice
    f = arithmetic(base, modifiers, kind)
    sources = [program.source(arg, k) for arg, k in zip(args[1:], kinds, strict=True)]

    return lambda machine, mask: machine.write(
        target, twice.write(f(machine, *[source(machine) for source in sources])), mask
    )


def _param(
    program: Program, modifiers: list[str], args: Operands, kinds: list[Type], where: str
) -> Operation:
    target, number = program.register(args[0]), program.param(args[1])
    return lambda machine, mask: machine.write(target, kinds[0].read(machine.params[number]), mask)


def _mov(
    program: Program, modifiers: list[str], args: Operands, kinds: list[Type], where: str
) -> Operation:
    kind, (target, value) = kinds[0], args
    if isinstance(target, list):  # unpack one register into several
        source, part = program.source(value, _bits(kind.size)), kind.size // len(target)
        targets = [program.register(name) for name in target]

        def unpack(machine: Machine, mask: Mask) -> None:
            values = np.ascontiguousarray(source(machine)).reshape(-1, 1).view(UNSIGNED[part])
            for i, register in enumerate(targets):
                machine.write(register, values[:, i].copy(), mask)

        return unpack
    register = program.register(target)
    if isinstance(value, list):  # pack several registers into one
        sources = [program.source(name, _bits(kind.size // len(value))) for name in value]

        def pack(machine: Machine, mask: Mask) -> None:
            values = np.stack(np.broadcast_arrays(*[source(machine) for source in sources]), 1)
            machine.write(
                register, np.ascontiguousarray(values).view(UNSIGNED[kind.size])[:, 0], mask
            )

        return pack
    source = program.source(value, kind if kind.dtype is np.bool_ else _bits(kind.size))
    return lambda machine, mask: machine.write(register, source(machine), mask)


def _selp(
    program: Program, modifiers: list[str], args: Operands, kinds: list[Type], where: str
) -> Operation:
    target, bits = program.register(args[0]), _bits(kinds[-1].size)
    yes, no, which = (
        program.source(args[1], bits),
        program.source(args[2], bits),
        program.source(args[3], Type("pred")),
    )
    return lambda machine, mask: machine.write(
        target, np.where(which(machine), yes(machine), no(machine)), mask
    )


def _setp(
    program: Program, modifiers: list[str], args: Operands, kinds: list[Type], where: str
) -> Operation:
    kind, (name, *logic) = kinds[-1], [m for m in modifiers if m != "ftz"]
    targets = [program.register(target) for target in args[0].split("|")]
    if len(targets) > 1 and not kind.is_pair:
        raise Unsupported(where)
    f, is_flushed = comparison(name, kind.is_float), "ftz" in modifiers
    if is_flushed and kind.dtype is not f4:
        raise Unsupported(where)
    a, b = program.source(args[1], kind), program.source(args[2], kind)
    combine = LOGIC[logic[0]] if logic else None
    predicate = program.source(args[3], Type("pred")) if logic else None

    def run(machine: Machine, mask: Mask) -> None:
        result = f(*(flush(x(machine)) if is_flushed else x(machine) for x in (a, b)))
        for i, target in enumerate(targets):
            part = result[:, i].copy() if kind.is_pair else result
            machine.write(target, combine(part, predicate(machine)) if combine else part, mask)

    return run


def _cvt(
    program: Program, modifiers: list[str], args: Operands, kinds: list[Type], where: str
) -> Operation:
    to, of = kinds
    if set(modifiers) - set(ROUND) - {"rn", "ftz"}:
        raise Unsupported(where)
    target, sources = program.register(args[0]), [program.source(arg, of) for arg in args[1:]]
    rounding = [ROUND[m] for m in modifiers if m in ROUND]
    is_flushed = "ftz" in modifiers

    def convert(x: np.ndarray) -> np.ndarray:
        x = flush(x) if is_flushed and x.dtype == f4 else x
        if of.is_float and rounding:
            x = rounding[0](x)
        if not to.is_float:
            return to_integer(x, to.dtype) if of.is_float else x.astype(to.dtype)
        if to.is_bf16:
            return x if of.is_float else x.astype(f4)  # Type.write rounds it
        x = x.astype(to.dtype)
        return flush(x) if is_flushed and x.dtype == f4 else x

    def run(machine: Machine, mask: Mask) -> None:
        values = [convert(source(machine)) for source in sources]
        if to.is_pair:  # the first operand goes to the upper half
            values = [np.stack(np.broadcast_arrays(values[1], values[0]), 1)]
        machine.write(target, to.write(values[0]), mask)

    return run


def _shuffle(
    program: Program, modifiers: list[str], args: Operands, kinds: list[Type], where: str
) -> Operation:
    if modifiers not in (["sync", "bfly"], ["sync", "idx"]) or args[3:] != ["31", "-1"]:
        raise Unsupported(where)
    target, of = program.register(args[0]), program.source(args[1], Type("b32"))
    lanes, is_butterfly = program.source(args[2], Type("u32")), modifiers[1] == "bfly"

    def run(machine: Machine, mask: Mask) -> None:
        machine.expect_whole_warps(mask, where)
        everyone = np.arange(machine.size)
        lane = everyone % 32
        source = lane ^ lanes(machine) if is_butterfly else lanes(machine) & u4(31)
        machine.write(target, machine.full(of(machine))[everyone - lane + source], mask)

    return run


def _access(
    program: Program, modifiers: list[str], address: str, registers: str | list[str], where: str
):
    """Decode what loads and stores have in common.

    Returns:
        Whether the access is to shared memory, a function that reads the address, and the names
        of the registers.
    """
    space = modifiers[0]
    if space not in ("global", "shared") or set(modifiers[1:]) - _CACHE_HINTS - {"v2", "v4"}:
        raise Unsupported(where)
    registers = registers if isinstance(registers, list) else [registers]
    if len(registers) != {"v2": 2, "v4": 4}.get(modifiers[-1], 1):
        raise Unsupported(where)
    return (
        space == "shared",
        program.address(address, Type("u32" if space == "shared" else "u64")),
        registers,
    )


def _load(
    program: Program, modifiers: list[str], args: Operands, kind: Type, where: str
) -> Operation:
    is_shared, address, names = _access(program, modifiers, args[1], args[0], where)
    targets = [program.register(name) for name in names]

    def load(machine: Machine, mask: Mask) -> None:
        threads, width = machine.threads(mask), kind.size * len(targets)
        addresses = address(machine)[threads]
        if is_shared:
            values = machine.shared.load(addresses, width, threads, where)
        else:
            values = machine.memory.load(addresses, width, machine.who[threads], where)
        for i, target in enumerate(targets):
            machine.write(
                target, machine.spread(threads, values.view(kind.dtype)[:, i].copy()), mask
            )

    return load


def _store(
    program: Program, modifiers: list[str], args: Operands, kind: Type, where: str
) -> Operation:
    is_shared, address, names = _access(program, modifiers, args[0], args[1], where)
    sources = [program.source(name, _bits(kind.size)) for name in names]

    def store(machine: Machine, mask: Mask) -> None:
        threads = machine.threads(mask)
        addresses = address(machine)[threads]
        values = np.stack([machine.full(source(machine))[threads] for source in sources], 1)
        values = np.ascontiguousarray(values).view(u1)
        if is_shared:
            machine.shared.store(addresses, values, threads, where)
        else:
            machine.memory.store(addresses, values, machine.who[threads], where)

    return store


def _matrix(
    program: Program, base: str, modifiers: list[str], args: Operands, where: str
) -> Operation:
    """Decode ``ldmatrix`` and ``stmatrix``, which move 8 x 8 matrices of 16-bit values.

    Thread 8 * i + r names row r of matrix i. Thread t holds two values of row t // 4 of each.
    """
    if modifiers[:3] != ["sync", "aligned", "m8n8"] or set(modifiers[3:]) - {
        "x1",
        "x2",
        "x4",
        "trans",
        "shared",
    }:
        raise Unsupported(where)
    is_load, is_transposed = base == "ldmatrix", "trans" in modifiers
    names = args[0 if is_load else 1]
    registers = [program.register(name) for name in (names if isinstance(names, list) else [names])]
    if len(registers) != int(modifiers[3][1]):
        raise Unsupported(where)
    address = program.address(args[1 if is_load else 0], Type("u32"))

    def rows_of(
        machine: Machine, mask: Mask, matrix: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the warps, the threads that name the rows, and the rows' addresses."""
        warps = machine.threads(mask).reshape(-1, 32)[:, 0] // 32
        threads = (warps[:, None] * 32 + np.arange(8 * matrix, 8 * matrix + 8)).ravel()
        return warps, threads, address(machine)[threads]

    def turned(tile: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(tile.transpose(0, 2, 1) if is_transposed else tile)

    def load(machine: Machine, mask: Mask) -> None:
        machine.expect_whole_warps(mask, where)
        results = []
        for i in range(len(registers)):
            warps, threads, addresses = rows_of(machine, mask, i)
            tile = machine.shared.load(addresses, 16, threads, where).view(u2).reshape(-1, 8, 8)
            values = np.zeros((machine.size // 32, 32), u4)
            values[warps] = turned(tile).view(u4).reshape(-1, 32)
            results.append(values.ravel())
        # Write at the end, because a target register may hold the address.
        for register, values in zip(registers, results, strict=True):
            machine.write(register, values, mask)

    def store(machine: Machine, mask: Mask) -> None:
        machine.expect_whole_warps(mask, where)
        for i, register in enumerate(registers):
            warps, threads, addresses = rows_of(machine, mask, i)
            values = machine.full(machine.registers[register].view(u4)).reshape(-1, 32)[warps]
            tile = turned(np.ascontiguousarray(values).view(u2).reshape(-1, 8, 8))
            machine.shared.store(addresses, tile.reshape(-1, 8).view(u1), threads, where)

    return load if is_load else store
