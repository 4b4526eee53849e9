"""What the launchers share: what a launch is prepared for, once for all calls of one kind, and how
it is launched.

On small inputs the launches' Python is what a step takes: Triton's own dispatcher binds,
specializes and looks up some twenty arguments per launch (15.6 us on an AMD EPYC, of which 2.0 are
left here).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from fastflow_kernels.coupling import Coupling, CouplingSpec
from fastflow_kernels.dtypes import accumulator
from fastflow_kernels.engines.triton.plan import (
    Plan,
    RowTiles,
    alignment,
    is_cut_by_rows,
    make_plan,
)

ACC_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
Launcher = TypeVar("Launcher", bound=Callable[..., Any])


class Operands(NamedTuple):
    """What a pass is prepared for: all that its binaries, grids and sizes depend on.

    One thing is left to every call: whether pointers are aligned (:func:`aligned`).

    Attributes:
        shape: Of x or y, (B, C, *S).
        dtypes: Of x, of y, or of both, and last of a, if the pass takes it; None for one that is
            not given.
        strides: Between samples, of the tensors whose samples may lie apart.
        grad_dtypes: Of the gradients that the pass takes; None for one that is not given.
        parameter_dtypes: Of global_scale and global_offset.
        spec, unpermutes_input, rows_per_sample: The coupling's.
        has_index: Whether there is a permutation.
        want_params: Whether the gradients of global_scale and global_offset are wanted.
        device: The number of the GPU.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype | None, ...]
    strides: tuple[int, ...]
    grad_dtypes: tuple[torch.dtype | None, ...]
    parameter_dtypes: tuple[torch.dtype, torch.dtype]
    spec: CouplingSpec
    unpermutes_input: bool
    rows_per_sample: int
    has_index: bool
    want_params: bool
    device: int

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def passive_channels(self) -> int:
        """As many as there are channel pairs, the last one half where they are odd."""
        return self.channels - self.channels // 2

    @property
    def pixels(self) -> int:
        return math.prod(self.shape[2:])

    @property
    def a_dtype(self) -> torch.dtype:
        assert self.dtypes[-1] is not None  # every pass with coefficients is given them
        return self.dtypes[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: what the operands' are promoted to."""
        dtypes = [dtype for dtype in self.dtypes if dtype is not None]
        return functools.reduce(torch.promote_types, dtypes, self.parameter_dtypes[0])

    @property
    def acc_dtype(self) -> torch.dtype:
        """In which is computed."""
        return accumulator(self.dtype)

    @property
    def activation(self) -> str | None:
        """None for GIN, whose scale is 1."""
        return None if self.spec.gin else self.spec.activation

    @property
    def is_rows(self) -> bool:
        """Whether a kernel's columns are samples."""
        return is_cut_by_rows(self.channels, self.pixels, self.acc_dtype.itemsize)

    def plan(self, channels: int, itemsize: int, rows: RowTiles, columns: int) -> Plan:
        """See :func:`~fastflow_kernels.engines.triton.plan.make_plan`."""
        kind = rows if self.is_rows else None
        return make_plan(channels, self.batch, self.pixels, itemsize, kind, columns)


def key_of(
    x: Tensor,
    coupling: Coupling,
    dtypes: tuple[torch.dtype | None, ...],
    strides: tuple[int, ...],
    grad_dtypes: tuple[torch.dtype | None, ...] = (),
    want_params: bool = False,
) -> tuple[Any, ...]:
    """The attributes of a call's :class:`Operands`, by which it finds what was prepared for them.

    A plain tuple, because every call makes one: the class takes 0.3 us more (AMD EPYC).

    Args:
        x: The pass's x or y, (B, C, *S).
        coupling, dtypes, strides, grad_dtypes, want_params: See the class.
    """
    return (
        x.shape,
        dtypes,
        strides,
        grad_dtypes,
        (coupling.global_scale.dtype, coupling.global_offset.dtype),
        coupling.spec,
        coupling.unpermutes_input,
        coupling.rows_per_sample,
        coupling.perm is not None,
        want_params,
        x.get_device(),
    )


def values_of(operands: Operands, plan: Plan, **strides: int | None) -> dict[str, Any]:
    """The sizes and constants of the kernels that walk tiles, by the names of their parameters.

    Lengths and strides come divided by ``ALIGN``: see
    :func:`~fastflow_kernels.engines.triton.plan.alignment`.

    Args:
        operands, plan: What the launch is for, and how it is cut.
        strides: By parameter; None for one that the kernel does not use.
    """
    pixels = operands.pixels
    align = alignment(0 if plan.is_rows else pixels, *(stride or 0 for stride in strides.values()))
    return {
        "B": operands.batch,
        "P": pixels if plan.is_rows else pixels // align,
        **{n: None if stride is None else stride // align for n, stride in strides.items()},
        "C": operands.channels,
        "CLAMP": operands.spec.clamp,
        "TANH_SCALE": operands.spec.tanh_scale,
        "ACTIVATION": operands.activation,
        "UNPERMUTES_INPUT": operands.unpermutes_input,
        "ALIGN": align,
        "ROWS": plan.is_rows,
        "BLOCK_CHANNELS": plan.block_channels,
        "BLOCK_COLUMNS": plan.block_columns,
        "TILES_PER_PROGRAM": plan.tiles_per_program,
        "ACC_DTYPE": ACC_DTYPES[operands.acc_dtype],
    }


class Launch:
    """A kernel with everything that stays the same between calls of one kind.

    The first call goes through Triton's dispatcher, which compiles the kernel or finds its binary;
    later ones hand the pointers straight to that binary. Whoever keeps a launch must key it by what
    the dispatcher looks at: device, dtypes, which pointers are None, and all ``values``. Alignment
    is asked for per call.

    Args:
        kernel: The kernel; its first parameters are the pointers, named ``..._ptr``.
        programs: Length of the grid.
        warps: Warps of a program.
        values: What its other parameters are, by name; more than these are left out.
    """

    def __init__(self, kernel: Any, programs: int, warps: int, values: dict[str, Any]) -> None:
        names = [name for name in inspect.signature(kernel.fn).parameters if name[-4:] != "_ptr"]
        self.kernel, self.grid = kernel, (programs, 1, 1)
        self.values = {name: values[name] for name in names}
        self.options = {"num_warps": warps, "enable_fp_fusion": True}
        self._run: Callable[..., None] | None = None
        self._tail = tuple(self.values.values())

    def __call__(self, is_aligned: bool, *pointers: Tensor | None) -> None:
        """Launch on the current device's current stream.

        Args:
            is_aligned: Whether :func:`aligned` holds for the pointers that come from outside.
            pointers: The kernel's pointers.
        """
        if self._run is not None and is_aligned:
            self._run(*pointers, *self._tail)
            return
        compiled = self.kernel[self.grid](*pointers, **self.values, **self.options)
        if is_aligned and isinstance(compiled, CompiledKernel):  # not in the interpreter
            self._run = compiled[self.grid]


class Sums(NamedTuple):
    """A launch that leaves sums in a new tensor, its last pointer.

    Attributes:
        launch: The launch.
        shape, dtype: Of the tensor.
    """

    launch: Launch
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self, is_aligned: bool, first: Tensor, *pointers: Tensor | None) -> Tensor:
        sums = torch.empty(self.shape, dtype=self.dtype, device=first.device)
        self.launch(is_aligned, first, *pointers, sums)
        return sums


class Prepared(NamedTuple):
    """What a launcher needs for operands of one kind.

    Attributes:
        dtype: Of the result.
        acc_dtype: Of sums.
        launch: The pass over the tensors.
        gin_sums: GIN's sums per sample, ahead of the pass; None without.
        partials: Shape of the sums that each program of the pass leaves; None without.
        finish: What adds them up; None where nothing is left to add.
    """

    dtype: torch.dtype
    acc_dtype: torch.dtype
    launch: Launch
    gin_sums: Sums | None = None
    partials: tuple[int, ...] | None = None
    finish: Launch | None = None


def on_its_device(launcher: Launcher) -> Launcher:
    """Run a launcher on the device of its first argument: Triton launches on the current one."""

    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        x = args[0]
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.get_device()):
                return launcher(*args, **kwargs)
        return launcher(*args, **kwargs)

    return cast(Launcher, launch)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all tensors start at a multiple of 16 bytes, which the compiled binary of a
    :class:`Launch` counts on.
    """
    merged = 0
    for t in tensors:
        if t is not None:
            merged |= t.data_ptr()
    return not merged & 15


def empty_of(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor of this shape; ``empty_like``, where it will do, is three times
    cheaper to call than ``empty``.
    """
    if like.dtype is dtype and like.is_contiguous():
        return torch.empty_like(like)
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def empty_partials(prepared: Prepared, device: torch.device) -> Tensor | None:
    """Where the pass leaves its programs' sums; None without."""
    if prepared.partials is None:
        return None
    return torch.empty(prepared.partials, dtype=prepared.acc_dtype, device=device)
