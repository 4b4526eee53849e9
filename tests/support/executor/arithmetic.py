"""The arithmetic instructions of PTX as functions of the machine and their operands.

The approximate instructions (``ex2.approx``, ``div.full``, ...) are exact by default. The machine
can make them as wrong as their documentation allows (``EXECUTOR.perturb``). Source: PTX ISA,
"Floating Point Instructions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.executor.values import (
    Type,
    Unsupported,
    divide,
    f4,
    f8,
    flush,
    fma32,
    fma64,
    i4,
    i8,
    u4,
    u8,
)

Function = Callable[..., np.ndarray]

ROUND = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ORDERED = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_INTEGER = {**_ORDERED, **_UNSIGNED, "ne": np.not_equal}


def comparison(name: str, is_float: bool) -> Function:
    """Return the function that computes a comparison of ``setp``."""
    if not is_float:
        return _INTEGER[name]
    if name == "num":
        return lambda a, b: ~_unordered(a, b)
    if name == "nan":
        return _unordered
    if name == "ne":
        return lambda a, b: (a != b) & ~_unordered(a, b)
    if name in _ORDERED:
        return _ORDERED[name]
    # The names that end in u are true for NaN.
    f = np.not_equal if name == "neu" else _ORDERED[name[:-1]]
    return lambda a, b: f(a, b) | _unordered(a, b)


def _unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def arithmetic(base: str, modifiers: list[str], kind: Type) -> Function:
    """Return the function that computes an instruction from the machine and the operands.

    Args:
        base: The instruction's name up to its first dot.
        modifiers: The parts after the first dot, without the types.
        kind: The type of the operands.

    Raises:
        Unsupported: If the executor does not know the instruction or a modifier.
    """
    known = _TABLE.get(base)
    if known is None:
        raise Unsupported(base)
    allowed, make = known
    if extra := set(modifiers) - set(allowed.split()) - {"ftz"}:
        raise Unsupported(f"{base} with {extra}")
    f = make(kind, modifiers)
    if "ftz" in modifiers and kind.dtype is not f8:
        if kind.dtype is not f4:
            raise Unsupported(f"{base}.ftz of {kind.name}")
        return lambda machine, *operands: flush(f(machine, *map(flush, operands)))
    return f


def _simple(f: Function) -> Callable[[Type, list[str]], Function]:
    """Make an instruction of a function that needs neither type, modifiers nor machine."""
    return lambda kind, modifiers: lambda machine, *operands: f(*operands)


def _product(kind: Type, modifiers: list[str]) -> Function:
    if "wide" in modifiers:
        twice = {2: (u4, i4), 4: (u8, i8)}[kind.size][kind.is_signed]
        return lambda a, b: a.astype(twice) * b.astype(twice)
    if "hi" in modifiers:
        if kind.size != 4 or kind.is_float:
            raise Unsupported(f"mul.hi of {kind.name}")
        wide = i8 if kind.is_signed else u8
        return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(32)).astype(kind.dtype)
    return lambda a, b: a * b


def _mul(kind: Type, modifiers: list[str]) -> Function:
    product = _product(kind, modifiers)
    return lambda machine, a, b: product(a, b)


def _mad(kind: Type, modifiers: list[str]) -> Function:
    product = _product(kind, modifiers)
    return lambda machine, a, b, c: product(a, b) + c


def _fma(kind: Type, modifiers: list[str]) -> Function:
    if kind.dtype is f8:
        return lambda machine, a, b, c: fma64(a, b, c)
    return lambda machine, a, b, c: fma32(a, b, c)


def _div(kind: Type, modifiers: list[str]) -> Function:
    if not kind.is_float:  # division by 0 is unspecified
        return lambda machine, a, b: np.where(b == 0, kind.dtype(1), divide(a, b))
    if kind.dtype is f8 or "rn" in modifiers:
        return lambda machine, a, b: a / b

    def floats(machine: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        quotient = machine.approximate(a.astype(f8) / b.astype(f8), 2, a, b)
        if "approx" in modifiers:  # the result is 0 for divisors beyond 2^126
            beyond = (np.abs(b) > 2.0**126) & np.isfinite(b)
            zero = np.where(np.isinf(a), f4(np.nan), np.copysign(f4(0), quotient))
            quotient = np.where(beyond, zero, quotient)
        return quotient

    return floats


def _rcp(kind: Type, modifiers: list[str]) -> Function:
    if kind.dtype is f8:
        keep = u8(0xFFFFFFFF00000000 if "approx" in modifiers else 0xFFFFFFFFFFFFFFFF)
        return lambda machine, a: ((1.0 / a).view(u8) & keep).view(f8)
    if "rn" in modifiers:
        return lambda machine, a: f4(1) / a
    return lambda machine, a: machine.approximate(1.0 / a.astype(f8), 1, a)


def _ex2(kind: Type, modifiers: list[str]) -> Function:
    if kind.dtype is not f4:
        raise Unsupported(f"ex2 of {kind.name}")
    return lambda machine, a: np.where(
        a == 0, f4(1), machine.approximate(np.exp2(a.astype(f8)), 2, a)
    )


def _sqrt(kind: Type, modifiers: list[str]) -> Function:
    if kind.dtype is f8 or "rn" in modifiers:
        return lambda machine, a: np.sqrt(a)
    return lambda machine, a: machine.approximate(np.sqrt(a.astype(f8)), 1, a)


def _rsqrt(kind: Type, modifiers: list[str]) -> Function:
    if kind.dtype is f8:
        raise Unsupported("rsqrt of float64")
    return lambda machine, a: machine.approximate(1.0 / np.sqrt(a.astype(f8)), 2, a)


def _shift(left: bool) -> Callable[[Type, list[str]], Function]:
    def make(kind: Type, modifiers: list[str]) -> Function:
        bits, t = 8 * kind.size, kind.dtype

        def shift(machine: Any, a: np.ndarray, n: np.ndarray) -> np.ndarray:
            n = n.astype(i8)
            beyond = n >= bits
            n = np.where(beyond, bits - 1, n).astype(t)
            if left:
                return np.where(beyond, t(0), a << n)
            return np.where(beyond, (a >> n) >> t(0 if kind.is_signed else 1), a >> n)

        return shift

    return make


def _bfe(kind: Type, modifiers: list[str]) -> Function:
    wide = i8 if kind.is_signed else u8

    def extract(machine: Any, a: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
        first, count = first & u4(255), (count & u4(255)).astype(i8)
        field = (a.astype(wide) >> first.astype(wide)).astype(i8) & ((i8(1) << count) - 1)
        if kind.is_signed:
            is_negative = (count > 0) & (field >> np.maximum(count - 1, 0) & 1 == 1)
            field = np.where(is_negative, field - (i8(1) << count), field)
        return field.astype(kind.dtype)

    return extract


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Compute any function of three bits from its truth table."""
    result, table = a * u4(0), int(table[0])
    for i in range(8):
        if table >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Pick four of the eight bytes of a and b.

    Where a selector's high bit is set, the byte's sign is picked instead.
    """
    source = (a.astype(u8) | b.astype(u8) << u8(32))[..., None]
    pick = (selector.astype(u8)[..., None] >> (np.arange(4, dtype=u8) * u8(4))) & u8(15)
    byte = source >> (pick & u8(7)) * u8(8) & u8(255)
    byte = np.where(pick & u8(8), np.where(byte & u8(128), u8(255), u8(0)), byte)
    return (byte << (np.arange(4, dtype=u8) * u8(8))).sum(-1).astype(u4)


def _extreme(of_integers: Function, of_floats: Function) -> Callable[[Type, list[str]], Function]:
    """Make min or max: ``.NaN`` passes a NaN on; otherwise the operand that is not NaN passes."""

    def make(kind: Type, modifiers: list[str]) -> Function:
        if not kind.is_float:
            return lambda machine, a, b: of_integers(a, b)
        f = of_integers if "NaN" in modifiers else of_floats

        def extreme(machine: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            sign = of_integers(np.copysign(f4(1), a), np.copysign(f4(1), b))  # -0 is less than 0
            return np.where(a == b, np.copysign(a, sign), f(a, b)).astype(a.dtype)

        return extreme

    return make


def _rem(kind: Type, modifiers: list[str]) -> Function:
    quotient = _div(kind, modifiers)
    return lambda machine, a, b: a - quotient(machine, a, b) * b


# Per instruction: the modifiers it may have, and a maker of its function (of type and modifiers).
_TABLE: dict[str, tuple[str, Callable[[Type, list[str]], Function]]] = {
    "add": ("rn", _simple(np.add)),
    "sub": ("rn", _simple(np.subtract)),
    "mul": ("rn lo hi wide", _mul),
    "mad": ("lo hi wide", _mad),
    "fma": ("rn", _fma),
    "div": ("rn full approx", _div),
    "rem": ("", _rem),
    "rcp": ("rn approx", _rcp),
    "sqrt": ("rn approx", _sqrt),
    "rsqrt": ("approx", _rsqrt),
    "ex2": ("approx", _ex2),
    "neg": ("", _simple(np.negative)),
    "abs": ("", _simple(np.abs)),
    "min": ("NaN", _extreme(np.minimum, np.fmin)),
    "max": ("NaN", _extreme(np.maximum, np.fmax)),
    "not": ("", _simple(np.invert)),
    "and": ("", _simple(np.bitwise_and)),
    "or": ("", _simple(np.bitwise_or)),
    "xor": ("", _simple(np.bitwise_xor)),
    "shl": ("", _shift(left=True)),
    "shr": ("", _shift(left=False)),
    "bfe": ("", _bfe),
    "lop3": ("", _simple(_lop3)),
    "prmt": ("", _simple(_prmt)),
}
