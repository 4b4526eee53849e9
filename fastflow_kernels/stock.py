"""Stock classes, AllInOneBlock and SequenceINN, recognised by name and methods."""

from __future__ import annotations

from typing import Any

BLOCK = "AllInOneBlock"
SEQUENCE = "SequenceINN"
GRAPH = "GraphINN"
PERMUTATION = "PermuteRandom"


class Left(Exception):
    """Raised for a block that must be left alone. The message says why."""


def is_named(cls: type, name: str = BLOCK) -> bool:
    """Return whether a class, or one of its bases, is called ``name``.

    The name decides, because models also carry copies of the block.
    """
    return any(base.__name__ == name for base in cls.__mro__)


def shallow_copy(module: Any, cls: Any) -> Any:
    """Copy a module's attributes into a new object, without running its class's own copy code."""
    copied = object.__new__(cls)
    copied.__dict__.update(vars(module))
    return copied


def stock_class(cls: type) -> Any:
    """Return the AllInOneBlock that ``cls`` is or derives from.

    Raises:
        Left: It lacks methods of the blocks for which the fused one is a drop-in.
    """
    named = [base for base in cls.__mro__ if base.__name__ == BLOCK]
    for base in named:
        if {"forward", "_affine", "_permute"} <= vars(base).keys():
            return base
    if {"affine", "permute"} <= vars(named[0]).keys():
        raise Left(
            "is an old form of the block, with methods affine and permute, as FrEIA had before 0.2"
        )
    raise Left(
        "is called AllInOneBlock, but does not define forward, _affine and _permute as the known "
        "blocks do"
    )
