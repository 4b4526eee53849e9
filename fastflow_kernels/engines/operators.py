"""The Triton engine as operators of PyTorch, for graphs that torch.compile makes for a GPU.

A compiler cannot look into an operator. It calls it as it is, and needs to know three things of it,
which stand here: its arguments (the schemas), its results without their values (the fakes), and its
gradients.

``coupling`` and ``gather`` hold an autograd node each. Dynamo keeps them as they are, and
AOTAutograd looks inside. So a finished graph calls ``coupling_forward`` and ``coupling_backward``,
and no call pays for autograd. A gradient that is registered with the operator
(``torch.library.register_autograd``) would run in Python in every call, for 5 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastflow_kernels.coupling import Coupling, CouplingGrads, OutputGrads
from fastflow_kernels.dtypes import accumulator, promoted
from fastflow_kernels.engines import Engine
from fastflow_kernels.engines.available import triton_engine
from fastflow_kernels.engines.operator_constants import decoded, encoded
from fastflow_kernels.engines.pixels import ByPixels
from fastflow_kernels.layouts import channels_last_of, packed

# --- what the operators compute -------------------------------------------------------------------
#
# The arguments after the pass's own tensors are those of _make_coupling. Inductor may hand over
# other strides than those of the traced graph. Torch 2.7 does so for a saved x that a convolution
# has read in channels-last.


def _make_coupling(
    g: Tensor, offset: Tensor, perm: Tensor | None, inv: Tensor | None, constants: str
) -> tuple[Engine, Coupling]:
    """Return the engine of a call, and its operands beside x and the coefficients."""
    spec, unpermutes_input, by_pixels = decoded(constants)
    engine = _triton_by_pixels() if by_pixels else triton_engine()
    return engine, Coupling(g, offset, spec, perm, inv, unpermutes_input)


@cache
def _triton_by_pixels() -> Engine:
    return ByPixels(triton_engine())


def _readable(x: Tensor, engine: Engine) -> Tensor:
    """Return x in a layout that the engine reads. By pixels it reads every layout."""
    return x if isinstance(engine, ByPixels) else packed(x)


def _coupling_forward(x: Tensor, a: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    engine, coupling = _make_coupling(*operands)
    # asked here and in the backward pass, because a call of the function takes 0.2 us
    return engine.forward(x if x.is_contiguous() else _readable(x, engine), a, coupling)


def _fake_forward(x: Tensor, a: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    g, *_, constants = operands
    dtype = promoted(x, a, g)
    return decoded(constants).like(x, dtype), _fake_log_det(x, dtype)


def _fake_log_det(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulator(dtype))


def _coupling_backward(
    dy: Tensor, dlog_det: Tensor | None, x: Tensor, a: Tensor, want_params: bool, *operands: Any
) -> tuple[Tensor, ...]:
    engine, coupling = _make_coupling(*operands)
    if not x.is_contiguous():
        x = _readable(x, engine)
    grads = engine.backward(x, a, OutputGrads(dy, dlog_det), coupling, want_params)
    return _without_none(grads)


def _without_none(grads: CouplingGrads) -> tuple[Tensor, ...]:
    """Return the gradients, with an empty tensor for each that was not computed.

    An operator always returns tensors, and no two of them may be the same.
    """
    dx, da, dg, doffset = grads
    if dg is not None and doffset is not None:  # in training; a loop would take 0.4 us
        return dx, da, dg, doffset
    return tuple(dx.new_empty(0) if t is None else t for t in grads)


def _with_none(results: Sequence[Tensor], is_gin: bool, want_params: bool) -> CouplingGrads:
    """Undo :func:`_without_none`."""
    dx, da, dg, doffset = results
    return CouplingGrads(
        dx, da, dg if want_params and not is_gin else None, doffset if want_params else None
    )


def _fake_backward(
    dy: Tensor, dlog_det: Tensor | None, x: Tensor, a: Tensor, want_params: bool, *operands: Any
) -> tuple[Tensor, ...]:
    g, offset, *_, constants = operands
    known = decoded(constants)
    return _without_none(
        CouplingGrads(
            known.like(x, x.dtype),
            known.like(a, a.dtype),
            torch.empty_like(g) if want_params and not known.spec.gin else None,
            torch.empty_like(offset) if want_params else None,
        )
    )


def _invert_passive(y: Tensor, *operands: Any) -> Tensor:
    engine, coupling = _make_coupling(*operands)
    return engine.invert_passive(y, coupling)


def _fake_invert_passive(y: Tensor, *operands: Any) -> Tensor:
    g, *_, constants = operands
    return decoded(constants).like(y, promoted(y, g))


def _invert_active(y: Tensor, x: Tensor, a: Tensor, *operands: Any) -> Tensor:
    engine, coupling = _make_coupling(*operands)
    written = _in_layout_of_results(x, operands)
    log_det = engine.invert_active(y, written, a, coupling)
    if written is not x:
        x.copy_(written)
    return log_det


def _in_layout_of_results(x: Tensor, operands: Sequence[Any]) -> Tensor:
    """Return x, or a copy if the engine cannot write to x as it is."""
    by_pixels = decoded(operands[-1]).by_pixels
    return x.contiguous(memory_format=channels_last_of(x)) if by_pixels else x.contiguous()


def _fake_invert_active(y: Tensor, x: Tensor, a: Tensor, *operands: Any) -> Tensor:
    return _fake_log_det(x, promoted(y, x, a, operands[0]))


def _invert_and_backward(
    dy: Tensor, dlog_det: Tensor | None, y: Tensor, x: Tensor, a: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    want_params, *operands = rest
    engine, coupling = _make_coupling(*operands)
    grads = OutputGrads(dy, dlog_det)
    written = _in_layout_of_results(x, operands)
    results = engine.invert_and_backward(y, written, a, grads, coupling, want_params)
    if written is not x:
        x.copy_(written)
    return _without_none(results)


def _fake_invert_and_backward(
    dy: Tensor, dlog_det: Tensor | None, y: Tensor, x: Tensor, a: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_backward(dy, dlog_det, x, a, *rest)


class _Coupling(Function):
    """The autograd node that ``coupling`` holds."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        g: Tensor,
        offset: Tensor,
        perm: Tensor | None,
        inv: Tensor | None,
        constants: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, g, offset, perm, inv)
        ctx.constants = constants
        y, log_det = _OPERATORS.coupling_forward(x, a, g, offset, perm, inv, constants)
        return y, log_det

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlog_det: Tensor | None) -> tuple[Tensor | None, ...]:
        # Compilers that do not look inside keep this node, and autograd cannot follow an operator.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a compiled graph that calls the Triton kernels has no second derivative "
                "(create_graph=True): do not compile this call, or use backend='eager'"
            )
        x, a, *operands = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x, dtype=promoted(x, a, operands[0]))
        want_params = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        g, offset, perm, inv = operands
        spec, unpermutes_input, by_pixels = decoded(ctx.constants)
        coupling = Coupling(g, offset, spec, perm, inv, unpermutes_input)
        engine = PIXELS if by_pixels else WHOLE_SAMPLES
        grads = engine.backward(x, a, OutputGrads(dy, dlog_det), coupling, want_params)
        return *grads, None, None, None


class _Gather(Function):
    """The autograd node that ``gather`` holds: the gradient of a gather is a gather, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.left_out = x.shape[1] - count
        return x.index_select(1, index[:count])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        padded = torch.nn.functional.pad(dy, (0, 0) * (dy.dim() - 2) + (0, ctx.left_out))
        return padded.index_select(1, inverse), None, None, None


# --- the operators --------------------------------------------------------------------------------

_OPERATORS: Any = torch.ops.fastflow_kernels
# A process defines an operator once. If this file is imported again (importlib.reload, autoreload),
# the first definitions stay. They live as long as this object, so the namespace keeps it.
_LIBRARY = vars(_OPERATORS).setdefault(
    "_first_library", torch.library.Library("fastflow_kernels", "FRAGMENT")
)
_OPERANDS = "Tensor g, Tensor offset, Tensor? perm, Tensor? inv, str constants"
# A compiler chooses layouts for what it computes itself, but not for an operator's arguments. Torch
# before 2.8 only has the second tag, which asks for the order of the strides.
_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)


def _define(schema: str) -> str | None:
    """Define an operator and return its name, or None if it was defined before."""
    name = schema.partition("(")[0]
    if hasattr(_OPERATORS, name):
        return None
    _LIBRARY.define(schema, tags=_STRIDES)
    return name


def _define_opaque(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator that a compiler cannot look into, for a GPU and Triton's interpreter."""

    def run_unless_empty(*args: Any) -> Any:
        # A compiled graph does not know whether a batch is empty.
        return run(*args) if args[0].numel() else _zeros(fake(*args))

    name = _define(schema)
    if name is None:
        return
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run_unless_empty, device)
    torch.library.register_fake(f"fastflow_kernels::{name}", fake, lib=_LIBRARY)


def _zeros(results: Any) -> Any:
    """Fill what a fake has returned: without pixels or samples every sum is 0."""
    for t in (results,) if isinstance(results, Tensor) else results:
        t.zero_()
    return results


_define_opaque(
    f"coupling_forward(Tensor x, Tensor a, {_OPERANDS}) -> (Tensor, Tensor)",
    _coupling_forward,
    _fake_forward,
)
_define_opaque(
    "coupling_backward(Tensor dy, Tensor? dlog_det, Tensor x, Tensor a, bool want_params, "
    f"{_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _coupling_backward,
    _fake_backward,
)
_define_opaque(
    f"invert_passive(Tensor y, {_OPERANDS}) -> Tensor", _invert_passive, _fake_invert_passive
)
_define_opaque(
    f"invert_active(Tensor y, Tensor(a!) x, Tensor a, {_OPERANDS}) -> Tensor",
    _invert_active,
    _fake_invert_active,
)
_define_opaque(
    "invert_and_backward(Tensor dy, Tensor? dlog_det, Tensor y, Tensor(a!) x, Tensor a, "
    f"bool want_params, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _invert_and_backward,
    _fake_invert_and_backward,
)


def _define_differentiable(schema: str, function: type[Function]) -> None:
    """Define an operator that holds an autograd node, into which a compiler looks."""
    name = _define(schema)
    if name is not None:
        _LIBRARY.impl(name, function.apply, "CompositeImplicitAutograd")


_define_differentiable(f"coupling(Tensor x, Tensor a, {_OPERANDS}) -> (Tensor, Tensor)", _Coupling)
_define_differentiable(
    "gather(Tensor x, Tensor index, Tensor inverse, SymInt count) -> Tensor", _Gather
)


# --- the engine -----------------------------------------------------------------------------------


class OperatorEngine:
    """The Triton engine, called through operators. ``forward`` is differentiable.

    It is an :class:`~fastflow_kernels.engines.Engine`.

    Args:
        by_pixels: See :class:`~fastflow_kernels.engines.operator_constants.Constants`.
    """

    def __init__(self, by_pixels: bool) -> None:
        self._by_pixels = by_pixels

    def forward(
        self, x: Tensor, a: Tensor, coupling: Coupling, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert y is None  # a side runs plain operations in a graph
        y, log_det = _OPERATORS.coupling(x, a, *self._operands(coupling))
        return y, log_det

    def backward(
        self,
        x: Tensor,
        a: Tensor,
        grads: OutputGrads,
        coupling: Coupling,
        want_params: bool,
        dx: Tensor | None = None,
    ) -> CouplingGrads:
        assert dx is None
        results = _OPERATORS.coupling_backward(
            grads.y, grads.log_det, x, a, want_params, *self._operands(coupling)
        )
        return _with_none(results, coupling.spec.gin, want_params)

    def invert_passive(self, y: Tensor, coupling: Coupling) -> Tensor:
        x: Tensor = _OPERATORS.invert_passive(y, *self._operands(coupling))
        return x

    def invert_active(self, y: Tensor, x: Tensor, a: Tensor, coupling: Coupling) -> Tensor:
        log_det: Tensor = _OPERATORS.invert_active(y, x, a, *self._operands(coupling))
        return log_det

    def invert_and_backward(
        self,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        grads: OutputGrads,
        coupling: Coupling,
        want_params: bool,
    ) -> CouplingGrads:
        results = _OPERATORS.invert_and_backward(
            grads.y, grads.log_det, y, x, a, want_params, *self._operands(coupling)
        )
        return _with_none(results, coupling.spec.gin, want_params)

    def _operands(self, coupling: Coupling) -> tuple[Any, ...]:
        g, offset, perm, inv = (
            coupling.global_scale,
            coupling.global_offset,
            coupling.perm,
            coupling.inv,
        )
        return g, offset, perm, inv, encoded(coupling, self._by_pixels)


WHOLE_SAMPLES, PIXELS = OperatorEngine(by_pixels=False), OperatorEngine(by_pixels=True)


def gather(x: Tensor, index: Tensor, inverse: Tensor, count: int) -> Tensor:
    """Return the first ``count`` channels of x[:, index], with a gradient that is a gather, too."""
    y: Tensor = _OPERATORS.gather(x, index, inverse, count)
    return y
