"""The errors that a call raises for its input.

The stock blocks fail with a RuntimeError from the operation that did not fit, and their callers
catch that; ours are found before any work and are also what Python calls them.
"""

from __future__ import annotations


class InputValueError(ValueError, RuntimeError):
    """A tensor of another shape, on another device, or another number of tensors than the block
    takes.
    """


class InputTypeError(TypeError, RuntimeError):
    """Something that is no tensor, or a tensor of a dtype or layout that the block does not
    take.
    """
