"""Channels-last tensors for an engine: it is given every pixel as a sample of its own."""

from __future__ import annotations

from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingGrads, OutputGrads
from fastflow_kernels.engines import Engine
from fastflow_kernels.layouts import as_rows, from_rows
from fastflow_kernels.torch_private import versions_counted


class ByPixels:
    """See :class:`~fastflow_kernels.engines.Engine`; x, y and a are channels-last (B, C, *S).

    The engine behind it works on rows (B * P, C): views, and copies of what is not channels-last or
    has gaps between its samples.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def forward(self, x: Tensor, a: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
        y, log_det = self._engine.forward(as_rows(x), as_rows(a), _of_rows(coupling, x))
        return from_rows(y, x), _per_sample(log_det, x)

    def backward(
        self, x: Tensor, a: Tensor, grads: OutputGrads, coupling: Coupling, want_params: bool
    ) -> CouplingGrads:
        of_rows = self._engine.backward(
            as_rows(x), as_rows(a), _grads_of_rows(grads), _of_rows(coupling, x), want_params
        )
        return _grads_of_pixels(of_rows, x)

    def invert_passive(self, y: Tensor, coupling: Coupling) -> Tensor:
        x = self._engine.invert_passive(as_rows(y), _of_rows(coupling, y))
        with versions_counted():
            return from_rows(x, y)

    def invert_active(self, y: Tensor, x: Tensor, a: Tensor, coupling: Coupling) -> Tensor:
        log_det = self._engine.invert_active(
            as_rows(y), _rows_to_write(x), as_rows(a), _of_rows(coupling, x)
        )
        return _per_sample(log_det, x)

    def invert_and_backward(
        self,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        grads: OutputGrads,
        coupling: Coupling,
        want_params: bool,
    ) -> CouplingGrads:
        of_rows = self._engine.invert_and_backward(
            as_rows(y),
            _rows_to_write(x),
            as_rows(a),
            _grads_of_rows(grads),
            _of_rows(coupling, x),
            want_params,
        )
        return _grads_of_pixels(of_rows, x)


def _rows_to_write(x: Tensor) -> Tensor:
    """The rows of an x that :meth:`ByPixels.invert_passive` or the block has made channels-last:
    what is written to them is written to x.
    """
    rows = as_rows(x)
    assert rows.data_ptr() == x.data_ptr()
    return rows


def _of_rows(coupling: Coupling, x: Tensor) -> Coupling:
    return coupling._replace(rows_per_sample=x.shape[2:].numel())


def _per_sample(log_det: Tensor, x: Tensor) -> Tensor:
    return log_det.view(x.shape[0], -1).sum(1)


def _grads_of_rows(grads: OutputGrads) -> OutputGrads:
    return OutputGrads(as_rows(grads.y), grads.log_det)


def _grads_of_pixels(grads: CouplingGrads, x: Tensor) -> CouplingGrads:
    dx, da, dg, doffset = grads
    return CouplingGrads(from_rows(dx, x), from_rows(da, x), dg, doffset)
