"""How launches are prepared, once for all calls of one kind, and how they are launched.

On small inputs the overhead of Python in the launches decides how long a step takes. Triton's own
dispatcher binds, specializes and looks up some twenty arguments per launch. That takes 15.6 us on
an AMD EPYC, a prepared launch 2.0 us.
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

from fastflow_kernels.coupling import Coupling, CouplingSpec, Halves
from fastflow_kernels.dtypes import accumulator
from fastflow_kernels.engines.triton.plan import (
    Plan,
    RowTiles,
    alignment,
    columns_are_samples,
    make_plan,
    why_unsupported,
)
from fastflow_kernels.layouts import packed

ACC_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
Launcher = TypeVar("Launcher", bound=Callable[..., Any])


class Operands(NamedTuple):
    """What a pass is prepared for: everything that its binaries, grids and sizes depend on.

    Only the alignment of the pointers is checked in every call (:func:`aligned`).

    Attributes:
        shape: The shape of x or y, (B, C, *S).
        dtypes: The dtypes of x, of y, or of both. The last one is that of a, if the pass takes a.
            None stands for a tensor that is not passed.
        strides: The strides between samples, of the tensors that may have gaps there. None stands
            for one without gaps.
        grad_dtypes: The dtypes of the gradients that the pass takes. None stands for a gradient
            that is not passed.
        parameter_dtypes: The dtypes of global_scale and global_offset; None for a side.
        spec, unpermutes_input, rows_per_sample: See
            :class:`~fastflow_kernels.coupling.Coupling`.
        has_index: Whether there is a permutation.
        want_params: Whether the gradients of global_scale and global_offset are wanted.
        device: The index of the GPU.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype | None, ...]
    strides: tuple[Any, ...]
    grad_dtypes: tuple[torch.dtype | None, ...]
    parameter_dtypes: tuple[torch.dtype, torch.dtype] | None
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
    def active_channels(self) -> int:
        """Number of active channels: half of them, rounded down, or all channels of a side."""
        return self.channels if self.parameter_dtypes is None else self.channels // 2

    @property
    def channel_pairs(self) -> int:
        """Number of channel pairs. An odd C leaves half a pair, a side has halves alone."""
        return max(self.active_channels, self.channels - self.active_channels)

    @property
    def pixels(self) -> int:
        return math.prod(self.shape[2:])

    @property
    def a_dtype(self) -> torch.dtype:
        assert self.dtypes[-1] is not None  # a pass that asks for it takes a
        return self.dtypes[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result: the promoted dtype of the operands."""
        operands = (*self.dtypes, *(self.parameter_dtypes or ())[:1])
        dtypes = [dtype for dtype in operands if dtype is not None]
        return functools.reduce(torch.promote_types, dtypes)

    @property
    def acc_dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return accumulator(self.dtype)

    @property
    def activation(self) -> str | None:
        """The activation of the global scale; None for GIN and for a side, whose scale is 1."""
        return None if self.spec.gin or self.parameter_dtypes is None else self.spec.activation

    @property
    def is_rows(self) -> bool:
        """Whether a kernel's columns are samples."""
        return columns_are_samples(self.channels, self.pixels, self.acc_dtype.itemsize)

    def plan(self, channels: int, itemsize: int, rows: RowTiles, columns: int) -> Plan:
        """Plan a launch: see :func:`~fastflow_kernels.engines.triton.plan.make_plan`.

        Args:
            channels: Channels, or channel pairs, that the kernel walks.
            itemsize: Bytes of the widest element.
            rows: How rows are tiled, if a column is a sample.
            columns: Columns that one program should see.
        """
        kind = rows if self.is_rows else None
        return make_plan(channels, self.batch, self.pixels, itemsize, kind, columns)


def key_of(
    x: Tensor,
    coupling: Coupling,
    dtypes: tuple[torch.dtype | None, ...],
    strides: tuple[int | None, ...],
    grad_dtypes: tuple[torch.dtype | None, ...] = (),
    want_params: bool = False,
) -> tuple[Any, ...]:
    """Return the attributes of a call's :class:`Operands`, the key of the cache of launches.

    It is a plain tuple, because every call makes one. The class takes 0.3 us more (AMD EPYC).

    Args:
        x: The pass's x or y, (B, C, *S).
        coupling: The coupling to compute.
        dtypes, strides, grad_dtypes, want_params: See :class:`Operands`.
    """
    g, offset = coupling.global_scale, coupling.global_offset
    return (
        x.shape,
        dtypes,
        strides,
        grad_dtypes,
        None if g is None or offset is None else (g.dtype, offset.dtype),
        coupling.spec,
        coupling.unpermutes_input,
        coupling.rows_per_sample,
        coupling.perm is not None,
        want_params,
        x.get_device(),
    )


def key_in_chain(x: Tensor | Halves, coupling: Coupling, *others: Any) -> tuple[Any, ...]:
    """Return the key of a call whose x may be in halves.

    Args:
        x, coupling: The pass's x, and the coupling to compute.
        others: The other arguments of :func:`key_of`. Their tuples have an entry for each half.
    """
    if not isinstance(x, Halves):
        return key_of(x, coupling, *others)
    batch, passive, *spatial = x.passive.shape
    shape = (batch, passive + x.active.shape[1], *spatial)
    return (shape, *key_of(x.passive, coupling, *others)[1:])


def pointers_of(x: Tensor | Halves) -> tuple[Tensor, Tensor | None, int | None, int | None]:
    """Return the two pointers of a tensor for a kernel, and their strides (see :func:`gaps_of`).

    The second pointer is None for a tensor that is whole.
    """
    if isinstance(x, Halves):
        return *x, gaps_of(x.passive), gaps_of(x.active)
    return x, None, gaps_of(x), None


def gaps_of(t: Tensor) -> int | None:
    """Return the stride between samples, or None if there are no gaps between them."""
    return None if t.is_contiguous() else t.stride(0)


def dtype_of(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def values_of(operands: Operands, plan: Plan, **strides: int | None) -> dict[str, Any]:
    """Return the sizes and constants of a kernel that walks tiles, by parameter name.

    Lengths and strides are divided by ``ALIGN``: see
    :func:`~fastflow_kernels.engines.triton.plan.alignment`.

    Args:
        operands: What the launch is prepared for.
        plan: How its work is divided into tiles.
        strides: The strides by parameter name; None for one that the kernel does not use.

    Raises:
        RuntimeError: The tensors are too large. A compiled graph, which knows no sizes, finds out
            here. It happens once for all calls of one kind.
    """
    reason = why_unsupported(operands.shape, operands.dtype)
    if reason is not None:
        raise RuntimeError(
            f"the Triton kernels cannot take this input: {reason}. Use backend='eager' for it."
        )
    pixels = operands.pixels
    align = alignment(0 if plan.is_rows else pixels, *(stride or 0 for stride in strides.values()))
    return {
        "B": operands.batch,
        "P": pixels if plan.is_rows else pixels // align,
        **{name: None if stride is None else stride // align for name, stride in strides.items()},
        "C": operands.channels,
        "ACTIVE": operands.active_channels,
        "FUNCTION": "atan" if operands.spec.function == "atan" else "tanh",
        "CLAMP": operands.spec.clamp,
        "INPUT_SCALE": operands.spec.input_scale,
        "SHIFT_SCALE": operands.spec.shift_scale,
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

    The first call goes through Triton's dispatcher, which compiles the kernel or finds its binary.
    Later calls hand the pointers straight to that binary, unless they are not aligned.

    A cache of launches must use as its key what the dispatcher looks at: device, dtypes, which
    pointers are None, and all ``values``. Alignment is passed in each call.

    Args:
        kernel: The kernel. Its first parameters are the pointers, named ``..._ptr``.
        programs: Number of programs, the length of the grid.
        warps: Warps of a program.
        values: The other parameters by name, and None for the last pointers if no call passes them.
            Names that the kernel does not have are ignored.
    """

    def __init__(self, kernel: Any, programs: int, warps: int, values: dict[str, Any]) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        names = [name for name in parameters if name[-4:] != "_ptr" or name in values]
        self.kernel, self.grid = kernel, (programs, 1, 1)
        self.values = {name: values[name] for name in names}
        self.options = {"num_warps": warps, "enable_fp_fusion": True}
        self._run: Callable[..., None] | None = None
        self._tail = tuple(self.values.values())

    def __call__(self, is_aligned: bool, *pointers: Tensor | None) -> None:
        """Launch on the current device's current stream.

        Args:
            is_aligned: Whether :func:`aligned` holds for the pointers that the caller passed in.
            pointers: The kernel's pointers, in the order of its parameters.
        """
        if self._run is not None and is_aligned:
            self._run(*pointers, *self._tail)
            return
        compiled = self.kernel[self.grid](*pointers, **self.values, **self.options)
        if self._run is None and isinstance(compiled, CompiledKernel):  # False in the interpreter
            self._run = (compiled if is_aligned else self._compile_aligned(pointers))[self.grid]

    def _compile_aligned(self, pointers: tuple[Tensor | None, ...]) -> Any:
        """Compile the kernel for aligned pointers, without a launch.

        So a warm-up with other pointers is one for CUDA graphs, too. While a graph is captured, its
        inputs are aligned copies, and no binary can be loaded.
        """
        aligned_pointers = [
            t if t is None else t.new_empty(0).set_(t.untyped_storage(), 0, (1,), (1,))
            for t in pointers
        ]
        return self.kernel.warmup(*aligned_pointers, grid=self.grid, **self.values, **self.options)


class Sums(NamedTuple):
    """A launch that writes sums to a new tensor, its last pointer.

    Attributes:
        launch: The launch.
        shape: The shape of the tensor.
        dtype: The dtype of the tensor.
    """

    launch: Launch
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self, is_aligned: bool, first: Tensor, *pointers: Tensor | None) -> Tensor:
        """Launch with the pointers but the last, and return the sums."""
        sums = torch.empty(self.shape, dtype=self.dtype, device=first.device)
        self.launch(is_aligned, first, *pointers, sums)
        return sums


class Prepared(NamedTuple):
    """What a launcher needs for operands of one kind.

    Attributes:
        dtype: The dtype of the result.
        acc_dtype: The dtype of sums.
        launch: The pass over the tensors.
        gin_sums: GIN's sums, per sample or per pixel, which run ahead of the pass, or None.
        partials: The shape of the partial sums that the pass leaves, or None.
        finish: The launch that adds the partial sums. None if nothing is left to add.
    """

    dtype: torch.dtype
    acc_dtype: torch.dtype
    launch: Launch
    gin_sums: Sums | None = None
    partials: tuple[int, ...] | None = None
    finish: Launch | None = None


def on_its_device(launcher: Launcher, position: int = 0) -> Launcher:
    """Make a launcher run on the device of its first argument, or of that at another position.

    Triton launches on the current device.
    """

    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        x = args[position]
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.get_device()):
                return launcher(*args, **kwargs)
        return launcher(*args, **kwargs)

    return cast(Launcher, launch)


def aligned(*tensors: Tensor | None) -> bool:
    """Return whether all tensors start at a multiple of 16 bytes.

    The binary that a :class:`Launch` calls directly was compiled for such pointers.
    """
    merged = 0
    for t in tensors:
        if t is not None:
            merged |= t.data_ptr()
    return not merged & 15


def joint(a: Tensor, coupling: Coupling) -> Tensor:
    """Return the coefficients (a_s, a_t) in one tensor whose samples are contiguous."""
    return packed(a) if coupling.shift is None else torch.cat((a, coupling.shift), 1)


def empty_of(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a new contiguous tensor of the shape and device of ``like``.

    It uses ``empty_like`` where it can, which is three times cheaper to call than ``empty``.
    """
    if like.dtype is dtype and like.is_contiguous():
        return torch.empty_like(like)
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def empty_partials(prepared: Prepared, device: torch.device) -> Tensor | None:
    """Return a new tensor for the partial sums of a pass, or None if it leaves none."""
    if prepared.partials is None:
        return None
    return torch.empty(prepared.partials, dtype=prepared.acc_dtype, device=device)
