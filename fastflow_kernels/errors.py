"""The errors that a call raises for bad input.

In a stock block the operation that does not fit raises a RuntimeError, which callers catch. Ours
are raised before any work. Each is a RuntimeError and also a ValueError or TypeError.
"""

from __future__ import annotations


class InputValueError(ValueError, RuntimeError):
    """Error for a tensor of a wrong shape or device, or a wrong number of tensors."""


class InputTypeError(TypeError, RuntimeError):
    """Error for an object that is not a tensor, or a tensor of an unsupported dtype or layout."""
