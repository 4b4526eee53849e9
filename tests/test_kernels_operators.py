"""Test the operators that compiled graphs call, one by one. Run as tests/test_kernels.py says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastflow_kernels.coupling import ACTIVATIONS, Coupling, CouplingSpec, OutputGrads
from fastflow_kernels.engines import operator_constants, operators
from fastflow_kernels.engines.pixels import ByPixels
from fastflow_kernels.engines.triton import engine, plan
from tests.support.cases import LAYOUTS
from tests.support.coupling import check_everything, make, plain_forward, shape_id
from tests.support.kernels import (  # noqa: F401  (fixtures)
    PLANES,
    ROWS,
    default_device,
    kernels_run,
    on_this_machine,
    shapes,
    shapes_but_shortly,
)
from tests.support.modes import slow_when_executed

pytestmark = [*on_this_machine, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]

OPERATORS: Any = torch.ops.fastflow_kernels
PLANE, ROW, IMAGE = PLANES[0], ROWS[0], (2, 6, 3, 5)


@shapes_but_shortly(PLANES + ROWS, keep=(PLANE, PLANES[2], ROW, ROWS[1]))
@pytest.mark.parametrize("options", [{}, {"gin": True}, {"unpermutes_input": True}], ids=str)
def test_operators_compute_what_the_engine_does(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    check_everything(*make(shape, **options), engine=operators.WHOLE_SAMPLES)


# --- schemas, fakes and gradients -----------------------------------------------------------------

# Options of :func:`tests.support.coupling.make`, with the layout of x, of a and of the gradient.
KINDS: dict[str, dict[str, Any]] = {
    "softplus": {},
    "sigmoid": {"activation": "SIGMOID", "dialect": "freia"},
    "exp": {"activation": "EXP", "clamp": 5.0},
    "gin": {"gin": True},
    "rev": {"unpermutes_input": True},
    "gin-rev": {"gin": True, "unpermutes_input": True},
    "float64": {"x": torch.float64},
    "float16": {"x": torch.float16},
    "bfloat16": {"x": torch.bfloat16, "g": torch.float32},
    "autocast": {"a": torch.bfloat16},
    "identity": {"permute": False},
    "channels-last": {"layout": "channels_last"},
    "channels-last-gin": {"layout": "channels_last", "gin": True},
    "channels-last-rev": {"layout": "channels_last", "unpermutes_input": True},
    "transposed": {"layout": "transposed"},
    "strided": {"layout": "strided"},
    "expanded": {"layout": "expanded"},
}
# Schemas and fakes do not depend on how the kernels run.
SHORT = [
    ("softplus", ROW),
    ("gin-rev", IMAGE),
    ("channels-last", IMAGE),
    ("bfloat16", IMAGE),
]
each_kind = pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(
            kind,
            shape,
            id=f"{kind}-{shape_id(shape)}",
            marks=() if (kind, shape) in SHORT else slow_when_executed,
        )
        for kind, options in KINDS.items()
        for shape in (IMAGE, ROW)
        if shape is IMAGE or "layout" not in options or kind == "strided"
    ],
)


def _operands(kind: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple]:
    """Return x, a, the gradients of y and of the log-determinant, and the other arguments."""
    options = dict(KINDS[kind])
    layout = options.pop("layout", "contiguous")
    permute = options.pop("permute", True)
    x, a, coupling = make(shape, **options)
    if not permute:
        coupling = coupling._replace(perm=None, inv=None)
    x, a, dy = (LAYOUTS[layout](t) for t in (x, a, torch.randn_like(x)))
    by_pixels = layout == "channels_last" and not coupling.spec.gin
    return x, a, dy, torch.randn(len(x), dtype=torch.float32), _arguments(coupling, by_pixels)


def _arguments(coupling: Coupling, by_pixels: bool) -> tuple[Any, ...]:
    g, offset, _, perm, inv = coupling[:5]
    return g, offset, perm, inv, operator_constants.encoded(coupling, by_pixels)


@each_kind
@pytest.mark.parametrize("want_params", [True, False], ids=["params", "no_params"])
def test_backward_passes_opcheck(kind: str, shape: tuple[int, ...], want_params: bool) -> None:
    x, a, dy, dlog_det, rest = _operands(kind, shape)
    for gradient in (dlog_det, None):
        arguments = (dy, gradient, x, a, want_params, *rest)
        torch.library.opcheck(OPERATORS.coupling_backward.default, arguments)


@each_kind
def test_the_others_pass_opcheck(kind: str, shape: tuple[int, ...]) -> None:
    x, a, dy, dlog_det, rest = _operands(kind, shape)
    torch.library.opcheck(OPERATORS.coupling_forward.default, (x, a, *rest))
    # Its active channels are not written, so that two runs differ.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATORS.invert_passive.default, (x, *rest), test_utils=checks)
    inverse = OPERATORS.invert_passive(x, *rest)
    torch.library.opcheck(OPERATORS.invert_active.default, (x, inverse, a, *rest))
    torch.library.opcheck(
        OPERATORS.invert_and_backward.default, (dy, dlog_det, x, inverse, a, True, *rest)
    )


@each_kind
def test_the_differentiable_ones_pass_opcheck(kind: str, shape: tuple[int, ...]) -> None:
    x, a, _, _, (g, offset, perm, inv, constants) = _operands(kind, shape)
    x, a, g, offset = (t.detach().requires_grad_() for t in (x, a, g, offset))
    torch.library.opcheck(OPERATORS.coupling.default, (x, a, g, offset, perm, inv, constants))
    if perm is not None:
        torch.library.opcheck(OPERATORS.gather.default, (x, perm, inv, 3))


def test_gather_has_the_gradient_of_an_index() -> None:
    x, _, coupling = make(IMAGE, x=torch.float64)
    x.requires_grad_()
    for count in (1, 3, 6):
        operands = x, coupling.perm, coupling.inv, count
        assert torch.autograd.gradcheck(OPERATORS.gather, operands)
        assert torch.equal(OPERATORS.gather(*operands), x[:, coupling.perm[:count]])


@pytest.mark.parametrize("only", ["y", "log_det"])
@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
def test_a_loss_of_one_result_has_gradients(only: str, gin: bool) -> None:
    x, a, coupling = make(PLANE, x=torch.float64, gin=gin)
    leaves = [t.requires_grad_() for t in (x, a, *coupling[:2])]
    gradients = []
    for run in (
        lambda: OPERATORS.coupling(x, a, *_arguments(coupling, False)),
        lambda: plain_forward(x, a, coupling),
    ):
        y, log_det = run()
        loss = y.sin().sum() if only == "y" else log_det.sin().sum()
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for name, actual, expected in zip(("x", "a", "g", "offset"), *gradients, strict=True):
        actual, expected = (torch.zeros(()) if t is None else t for t in (actual, expected))
        assert (actual - expected).abs().max() <= 1e-12 * (1 + expected.abs().max()), name


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by_pixels", [False, True], ids=["whole samples", "pixels"])
def test_results_depend_on_no_strides(layout: str, by_pixels: bool) -> None:
    """Inductor may hand over other strides than those of the graph. See the operators' file."""
    x, a, coupling = make(IMAGE)
    dy, dlog_det, arguments = (
        torch.randn_like(x),
        torch.randn(len(x)),
        _arguments(coupling, by_pixels),
    )
    if layout == "expanded":
        x, a, dy = (LAYOUTS[layout](t).contiguous() for t in (x, a, dy))
    runner = ByPixels(engine) if by_pixels else engine
    own = (
        (lambda t: t.contiguous(memory_format=torch.channels_last)) if by_pixels else (lambda t: t)
    )
    expected = [
        *runner.forward(own(x), own(a), coupling),
        *runner.backward(own(x), own(a), OutputGrads(own(dy), dlog_det), coupling, True),
    ]
    back = runner.invert_passive(own(x), coupling)
    expected += [runner.invert_active(own(x), back, own(a), coupling), back]
    x, a, dy = (LAYOUTS[layout](t) for t in (x, a, dy))
    inverse = LAYOUTS["strided"](OPERATORS.invert_passive(x, *arguments))
    actual = [
        *OPERATORS.coupling_forward(x, a, *arguments),
        *OPERATORS.coupling_backward(dy, dlog_det, x, a, True, *arguments),
        OPERATORS.invert_active(x, inverse, a, *arguments),
        inverse,
    ]
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)
    for got in (actual[0], actual[2], actual[3]):
        layout_of_results = torch.channels_last if by_pixels else torch.contiguous_format
        assert got.is_contiguous(memory_format=layout_of_results)
    other = LAYOUTS["strided"](OPERATORS.invert_passive(x, *arguments))
    OPERATORS.invert_and_backward(dy, dlog_det, x, other, a, True, *arguments)
    torch.testing.assert_close(other, inverse)


class _Copies(TorchDispatchMode):
    """A mode that collects the sizes of copies."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(name in str(function) for name in ("clone", "copy_", "contiguous")):
            self.sizes.append(args[0].numel())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tensors_in_the_layout_of_the_graph_are_not_copied(layout: str) -> None:
    x, a, coupling = make(IMAGE)
    x, a, dy = (LAYOUTS[layout](t) for t in (x, a, torch.randn_like(x)))
    arguments = _arguments(coupling, layout == "channels_last")
    with _Copies() as copies:
        OPERATORS.coupling_forward(x, a, *arguments)
        OPERATORS.coupling_backward(dy, None, x, a, True, *arguments)
        inverse = OPERATORS.invert_passive(x, *arguments)
        OPERATORS.invert_active(x, inverse, a, *arguments)
    assert not [size for size in copies.sizes if size >= x.numel() // 2]


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@shapes((0, 6), (0, 6, 3, 5), (2, 6, 0, 5))
def test_an_input_without_elements(shape: tuple[int, ...], gin: bool) -> None:
    """Every sum is 0, as in plain operations."""
    x, a, coupling = make(shape, gin=gin)
    arguments = _arguments(coupling, False)
    y, log_det = OPERATORS.coupling_forward(x, a, *arguments)
    assert y.shape == x.shape
    assert torch.equal(log_det, torch.zeros(shape[0]))
    dlog_det = torch.ones(shape[0])
    dx, da, dg, doffset = OPERATORS.coupling_backward(x, dlog_det, x, a, True, *arguments)
    assert (dx.shape, da.shape) == (x.shape, a.shape)
    assert torch.equal(doffset, torch.zeros_like(coupling.global_offset))
    assert gin or torch.equal(dg, torch.zeros_like(coupling.global_scale))
    inverse = OPERATORS.invert_passive(y, *arguments)
    assert torch.equal(OPERATORS.invert_active(y, inverse, a, *arguments), torch.zeros(shape[0]))
    OPERATORS.invert_and_backward(x, dlog_det, y, inverse, a, True, *arguments)


@shapes((2, 6, 3, 7), (3, 8))
def test_a_sample_beyond_the_kernels_is_an_error(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph knows no sizes. The error comes before anything is launched."""
    monkeypatch.setattr(plan, "MAX_SAMPLE", 7)
    x, a, coupling = make(shape, clamp=1.875)  # a clamp of its own: nothing is prepared for it
    arguments = _arguments(coupling, False)
    for run in (
        lambda: OPERATORS.coupling_forward(x, a, *arguments),
        lambda: OPERATORS.coupling_backward(x, None, x, a, True, *arguments),
        lambda: OPERATORS.invert_passive(x, *arguments),
        lambda: OPERATORS.invert_active(x, torch.empty_like(x), a, *arguments),
    ):
        with pytest.raises(RuntimeError, match=r"cannot take .*: a sample of .*'eager'"):
            run()


# --- constants ------------------------------------------------------------------------------------


def test_a_graph_of_another_version_is_refused() -> None:
    """Torch stores graphs on disk, where an older version of the package may have left one."""
    _, _, coupling = make(ROW)
    version, *rest = operator_constants.encoded(coupling, False).split()
    assert version == operator_constants.FORMAT
    with pytest.raises(RuntimeError, match="compile it again"):
        operator_constants.decoded(" ".join(["0", *rest]))


@pytest.mark.parametrize("clamp", [2.0, 1.9, 1e-3, -3.0, 0.1 + 0.2, 50.0, 1e300, 5e-324])
@pytest.mark.parametrize("dialect", ["anomalib", "freia"])
def test_constants_survive_their_string(clamp: float, dialect: str) -> None:
    for activation in ACTIVATIONS:
        for gin, unpermutes, by_pixels in ((False, True, False), (True, False, True)):
            spec = CouplingSpec.of(clamp, dialect, activation, gin)
            coupling = Coupling(torch.ones(2), torch.ones(2), spec, unpermutes_input=unpermutes)
            assert operator_constants.decoded(operator_constants.encoded(coupling, by_pixels)) == (
                spec,
                unpermutes,
                by_pixels,
            )
