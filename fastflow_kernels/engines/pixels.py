"""Channels-last tensors for an engine, which receives every pixel as a sample of its own."""

from __future__ import annotations

from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingGrads, OutputGrads
from fastflow_kernels.engines import Engine
from fastflow_kernels.layouts import as_rows, from_rows
from fastflow_kernels.torch_private import versions_counted


class ByPixels:
    """An :class:`~fastflow_kernels.engines.Engine` for channels-last x, y and a, (B, C, *S).

    It hands rows (B * P, C) to the engine that it wraps. Rows are views of a channels-last tensor.
    A tensor in another layout, or with gaps between its samples, is copied.

    Args:
        engine: The engine that computes the rows.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def forward(
        self, x: Tensor, a: Tensor, coupling: Coupling, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        operands = as_rows(x), as_rows(a), _coupling_of_rows(coupling, x)
        if y is None:
            rows, log_det = self._engine.forward(*operands)
            y = from_rows(rows, x)
        else:
            _, log_det = self._engine.forward(*operands, _writable_rows(y))
        return y, _sum_per_sample(log_det, x)

    def backward(
        self,
        x: Tensor,
        a: Tensor,
        grads: OutputGrads,
        coupling: Coupling,
        want_params: bool,
        dx: Tensor | None = None,
    ) -> CouplingGrads:
        row_grads = self._engine.backward(
            as_rows(x),
            as_rows(a),
            _grads_of_rows(grads),
            _coupling_of_rows(coupling, x),
            want_params,
            None if dx is None else _writable_rows(dx),
        )
        if dx is not None:
            return CouplingGrads(dx, from_rows(row_grads.a, x), None, None)
        return _grads_of_pixels(row_grads, x)

    def invert_passive(self, y: Tensor, coupling: Coupling) -> Tensor:
        x = self._engine.invert_passive(as_rows(y), _coupling_of_rows(coupling, y))
        with versions_counted():
            return from_rows(x, y)

    def invert_active(self, y: Tensor, x: Tensor, a: Tensor, coupling: Coupling) -> Tensor:
        log_det = self._engine.invert_active(
            as_rows(y), _writable_rows(x), as_rows(a), _coupling_of_rows(coupling, x)
        )
        return _sum_per_sample(log_det, x)

    def invert_and_backward(
        self,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        grads: OutputGrads,
        coupling: Coupling,
        want_params: bool,
    ) -> CouplingGrads:
        row_grads = self._engine.invert_and_backward(
            as_rows(y),
            _writable_rows(x),
            as_rows(a),
            _grads_of_rows(grads),
            _coupling_of_rows(coupling, x),
            want_params,
        )
        return _grads_of_pixels(row_grads, x)


def _writable_rows(x: Tensor) -> Tensor:
    """Return the rows of x, on the same memory, so that writing to them writes to x.

    :meth:`ByPixels.invert_passive` or the block has made x channels-last.
    """
    rows = as_rows(x)
    assert rows.data_ptr() == x.data_ptr()
    return rows


def _coupling_of_rows(coupling: Coupling, x: Tensor) -> Coupling:
    exp = None if coupling.exp is None else _writable_rows(coupling.exp)
    shift = None if coupling.shift is None else as_rows(coupling.shift)
    return coupling._replace(rows_per_sample=x.shape[2:].numel(), exp=exp, shift=shift)


def _sum_per_sample(log_det: Tensor, x: Tensor) -> Tensor:
    return log_det.view(x.shape[0], -1).sum(1)


def _grads_of_rows(grads: OutputGrads) -> OutputGrads:
    return OutputGrads(as_rows(grads.y), grads.log_det)


def _grads_of_pixels(grads: CouplingGrads, x: Tensor) -> CouplingGrads:
    dx, da, dg, doffset = grads
    return CouplingGrads(from_rows(dx, x), from_rows(da, x), dg, doffset)
