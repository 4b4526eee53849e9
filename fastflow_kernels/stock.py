"""Which classes are a stock AllInOneBlock, or a stock SequenceINN."""

from __future__ import annotations

from typing import Any

BLOCK = "AllInOneBlock"
SEQUENCE = "SequenceINN"


class Left(Exception):
    """A block must be left alone; the message says why."""


def is_named(cls: type, name: str = BLOCK) -> bool:
    """Whether a class, or one that it derives from, is called AllInOneBlock: models also carry
    copies of the block.
    """
    return any(base.__name__ == name for base in cls.__mro__)


def shallow_copy(module: Any, cls: Any) -> Any:
    """Another module with the same attributes, without what the class does when it is copied."""
    copied = object.__new__(cls)
    copied.__dict__.update(vars(module))
    return copied


def stock_class(cls: type) -> Any:
    """The AllInOneBlock that ``cls`` is or derives from.

    Raises:
        Left: It has not the methods of the block that the fused one is a drop-in for.
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
