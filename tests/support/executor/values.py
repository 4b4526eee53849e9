"""The types of PTX, how registers hold their values, and how numbers are rounded.

A register is a numpy array with one entry per thread, or with a single entry if all threads agree.
"""

from __future__ import annotations

import numpy as np
import torch

f2, f4, f8 = np.float16, np.float32, np.float64
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i4, i8 = np.int32, np.int64

UNSIGNED = {1: u1, 2: u2, 4: u4, 8: u8}  # by size in bytes
_PLAIN = {"pred": np.bool_, "f16": f2, "f32": f4, "f64": f8}
_PLAIN |= {
    f"{kind}{8 * n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n}").type
    for kind in "bsu"
    for n in (1, 2, 4, 8)
}

# Fresh memory is filled with these NaNs, which no computation makes.
POISON = {
    torch.float32: 0x7FA5A5A5,
    torch.float64: 0x7FF5A5A5A5A5A5A5,
    torch.bfloat16: 0x7FA5,
    torch.float16: 0x7DA5,
}


class Unsupported(NotImplementedError):
    """The executor does not know an instruction."""


class Fault(AssertionError):
    """A GPU would stop here, or silently compute something wrong."""


class Type:
    """A PTX type: reads its values from a register's bits and writes them there.

    bfloat16 is computed in float32. A pair (``f16x2``, ``bf16x2``) is an array of two columns.
    """

    def __init__(self, name: str) -> None:
        self.name, self.is_pair = name, name.endswith("x2")
        base = name[:-2] if self.is_pair else name
        if base != "bf16" and base not in _PLAIN:
            raise Unsupported(f"type {name}")
        self.is_bf16, self.dtype = base == "bf16", u2 if base == "bf16" else _PLAIN[base]
        self.size = np.dtype(self.dtype).itemsize * (2 if self.is_pair else 1)
        self.is_float = "f" in base
        self.is_signed = np.dtype(self.dtype).kind == "i"

    def read(self, bits: np.ndarray) -> np.ndarray:
        """Return the values that a register holds."""
        if bits.dtype.itemsize != self.size:  # take the low part of a wider register
            bits = bits.view(UNSIGNED[bits.dtype.itemsize]).astype(UNSIGNED[self.size])
        values = (
            bits.view(u4).reshape(-1, 1).view(self.dtype) if self.is_pair else bits.view(self.dtype)
        )
        return widen_bf16(values) if self.is_bf16 else values

    def write(self, values: np.ndarray) -> np.ndarray:
        """Return a register that holds these values."""
        if self.is_bf16:
            values = round_bf16(values)
        elif values.dtype != self.dtype:
            values = values.astype(self.dtype)
        return np.ascontiguousarray(values).view(u4)[:, 0] if self.is_pair else values


def constant(text: str, size: int) -> np.ndarray:
    """Return an immediate operand's bits, as an array of one value."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return np.array([int(text[2:], 16)], u4 if text[1] in "fF" else u8)
    return np.array([int(text.rstrip("U"), 0) & (1 << 8 * size) - 1], UNSIGNED[size])


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16 bits to float32."""
    return (bits.astype(u4) << 16).view(f4)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Convert float32 or float64 to bfloat16 bits, rounded once to nearest, ties to even."""
    if x.dtype == f8:
        # Otherwise the second rounding could meet a tie that the first has made.
        x = round_to_odd(x)
    bits = np.ascontiguousarray(x, f4).view(u4)
    near = ((bits + (((bits >> 16) & 1) + u4(0x7FFF))) >> 16).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), near)


def round_to_odd(x: np.ndarray) -> np.ndarray:
    """Convert float64 to float32, rounded towards zero, with the last bit set if inexact."""
    near = x.astype(f4)
    too_far = np.abs(near.astype(f8)) > np.abs(x)
    bits = near.view(u4) - too_far.astype(u4)
    inexact = bits.view(f4).astype(f8) != x
    return np.where(np.isnan(x), near, (bits | inexact.astype(u4)).view(f4))


def flush(x: np.ndarray) -> np.ndarray:
    """Replace subnormal float32 values by zero (``.ftz``)."""
    return np.where(np.abs(x) < np.finfo(f4).tiny, np.copysign(f4(0), x), x)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Compute a * b + c of float32 or float16 with one rounding.

    The product is exact in float64, and the sum is rounded to odd there.
    """
    product, addend = a.astype(f8) * b.astype(f8), c.astype(f8)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    is_even = (total.view(i8) & 1) == 0
    odd = np.where((error != 0) & is_even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return np.where(np.isfinite(total), odd, total).astype(a.dtype)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Compute a * b + c in float64 with (almost) one rounding: Dekker's product, Knuth's sum."""
    product = a * b
    split_a, split_b = a * 134217729.0, b * 134217729.0
    high_a, high_b = split_a - (split_a - a), split_b - (split_b - b)
    low_a, low_b = a - high_a, b - high_b
    product_error = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total = product + c
    part = total - product
    result = total + (((product - (total - part)) + (c - part)) + product_error)
    return np.where(np.isfinite(result), result, a * b + c)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide integers and truncate, as C and PTX do."""
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) ^ (b < 0))).astype(a.dtype)


def to_integer(x: np.ndarray, dtype: type) -> np.ndarray:
    """Convert floats to integers, saturated.

    NaN gives 0. From float64, or to 64 bits, it gives the highest bit alone.
    """
    info = np.iinfo(dtype)
    inside = (x >= float(info.min)) & (x < float(info.max))
    has_zero = x.dtype != f8 and dtype(0).itemsize < 8
    of_nan = 0 if has_zero else info.min if info.min else 1 << info.bits - 1
    limit = np.where(np.isnan(x), of_nan, np.where(x > 0, info.max, info.min)).astype(dtype)
    return np.where(inside, np.where(inside, x, 0).astype(dtype), limit)
