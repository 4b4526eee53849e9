"""Test blocks and chains on the Triton kernels: routes, layouts and autograd.

In the inverse, the subnet runs between two kernels. Run the tests as tests/test_kernels.py says.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import fastflow_kernels
from fastflow_kernels.coupling import ACTIVATIONS
from tests.support.cases import HARD_CASES, LAYOUTS, Case, Shape, make_block
from tests.support.kernels import (  # noqa: F401  (fixtures)
    default_device,
    gin_is_slow_when_executed,
    kernels_run,
    on_this_machine,
    shapes,
)
from tests.support.modes import EXECUTED, INTERPRETED, sanitize, slow_when_executed
from tests.support.parity import check_float16_range, compare, compare_fresh, notices_write

# NumPy warns of overflows to inf, which are intended.
pytestmark = [
    *on_this_machine,
    pytest.mark.usefixtures("fused"),
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning"),
]

both_directions = pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])


class _Gathered(TorchDispatchMode):
    """A mode that collects the shapes that index operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if "index" in str(function) or "gather" in str(function):
            self.sizes.append(
                tuple(args[3].shape if "index_add" in str(function) else result.shape)
            )
        return result


@shapes((3, 7, 4, 5), (6, 10))
def test_reverse_permutation_takes_no_pass_of_its_own(shape: tuple[int, ...]) -> None:
    """Only the passive half is gathered for the subnet, and its gradient is added back.

    x, y and their gradients are never gathered.
    """
    net = torch.nn.Conv2d if len(shape) > 2 else torch.nn.Linear
    kernel_size = (1,) if len(shape) > 2 else ()
    block = fastflow_kernels.AllInOneBlock(
        [shape[1:]],
        subnet_constructor=lambda i, o: net(i, o, *kernel_size),
        reverse_permutation=True,
        backend="triton",
        dialect="freia",
    )
    x = torch.randn(shape, requires_grad=True)
    half = (shape[0], shape[1] - shape[1] // 2, *shape[2:])
    with _Gathered() as gathered:
        (y,), logdet = block([x])
        assert gathered.sizes == [half]
        (y.sum() + logdet.sum()).backward()
        assert gathered.sizes == [half, half]
        with torch.no_grad():
            block([y], rev=True)
    assert gathered.sizes == [half, half, half]


@pytest.mark.parametrize("options", [{}, {"reverse_permutation": True}], ids=["", "reverse"])
def test_second_gradients_on_the_triton_backend(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = fastflow_kernels.AllInOneBlock(
        [(5, 3)],
        subnet_constructor=lambda i, o: torch.nn.Conv1d(i, o, 1),
        dialect="freia",
        backend="triton",
        **options,
    ).double()
    results = []
    for backend in ("triton", "eager"):
        block.backend = backend
        torch.manual_seed(1)
        x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
        (y,), logdet = block([x])
        leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
        (dx,) = torch.autograd.grad(y.square().sum() + logdet.sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), leaves, allow_unused=True))
    assert results[0][0].abs().max() > 0
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected)


def test_float16_overflows_only_where_a_result_does_on_the_triton_backend() -> None:
    check_float16_range("triton")


BLOCK_CASES = HARD_CASES[::6]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=slow_when_executed if i % 2 else ())
        for i, case in enumerate(BLOCK_CASES)
    ],
)
@both_directions
def test_block_on_the_triton_backend(case: Case, rev: bool) -> None:
    """The kernels run through the module: dispatch, autograd, and the subnet in the inverse."""
    compare(case, torch.float32, rev, grad=not rev, backend="triton")


@pytest.mark.parametrize("shape", [Shape(3, 7, (3, 5)), Shape(4, 10)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "soft",
        "gin-soft",
        "hh1",
        *(
            pytest.param(name, marks=slow_when_executed)
            for name in ("soft-rev-exp", "hh3-rev-cond", "hh2-soft-sigmoid", "gin-hh2")
        ),
    ],
)
@both_directions
def test_products_after_the_kernels(shape: Shape, name: str, rev: bool) -> None:
    """Soft and Householder permutations run the kernels without an index, and then products."""
    compare(Case(shape, name), torch.float32, rev, grad=not rev, backend="triton")


@pytest.mark.parametrize(
    "case",
    [Case(Shape(2, 7, (3, 5)), name) for name in ("hard", "rev", "cond", "soft", "gin")],
    ids=str,
)
@both_directions
def test_channels_last_on_the_triton_backend(case: Case, rev: bool) -> None:
    """The kernels treat pixels as rows; GIN takes a contiguous copy."""
    compare(case, torch.float32, rev, grad=not rev, backend="triton", layout="channels_last")


@slow_when_executed
@pytest.mark.parametrize(
    "shape", [Shape(2, 8, (3, 5)), Shape(1, 2, (3, 5)), Shape(1, 5, (2, 3, 2))], ids=str
)
@pytest.mark.parametrize("name", ["hard", "gin", "gin-rev-cond"])
@pytest.mark.parametrize("condition", ["contiguous", "channels_last"])
def test_a_subnet_is_given_the_layout_of_the_input(shape: Shape, name: str, condition: str) -> None:
    """The layout is that of the eager engine, also for GIN, which copies its input for the kernels.

    In another layout, a convolution would round differently than the stock block's.
    """
    case = Case(shape, name)
    x = LAYOUTS["channels_last"](torch.randn(shape.full))
    c = [LAYOUTS[condition](torch.randn(shape.batch, *dims)) for dims in case.dims_c]
    strides = []

    def subnet(channels_in: int, channels_out: int) -> torch.nn.Module:
        net = (torch.nn.Conv2d, torch.nn.Conv3d)[case.rank - 2](
            channels_in, channels_out, 3, padding=1
        )
        net.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride()))
        return net

    is_channels_last = {}
    for backend in ("eager", "triton"):
        strides.clear()
        block = fastflow_kernels.AllInOneBlock(
            case.dims_in, case.dims_c, subnet, **case.options, backend=backend
        )
        block([x.requires_grad_()], c)[0][0].sum().backward()
        with torch.no_grad():
            block([x], c, rev=True)
        if not c:
            chain = fastflow_kernels.ReversibleSequence(*case.dims_in[0])
            chain.append(block)
            chain(x)[0].sum().backward()
        # In channels-last layout, the channels of a pixel are contiguous.
        is_channels_last[backend] = [stride[1] == 1 for stride in strides]
    assert is_channels_last["triton"] == is_channels_last["eager"]
    assert len(strides) == (2 if c else 4)
    assert c or all(is_channels_last["eager"])


@pytest.mark.parametrize("name", ["hard", "gin"])
@both_directions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_subnet_that_writes_to_its_input_is_noticed(name: str, rev: bool, layout: str) -> None:
    with torch.no_grad():
        assert notices_write(name, rev, layout, backend="triton")


# The inverse, reverse_permutation, and GIN in another layout give the subnet a copy.
@pytest.mark.parametrize(
    ("name", "rev", "layout"),
    [
        ("hard", False, "contiguous"),
        ("hard", True, "contiguous"),
        ("hard", True, "channels_last"),
        ("rev", False, "contiguous"),
        ("gin", False, "channels_last"),
        ("soft", True, "channels_last"),
    ],
)
def test_in_inference_mode_a_write_is_noticed_where_it_would_be_lost(
    name: str, rev: bool, layout: str
) -> None:
    with torch.inference_mode():
        is_copy = rev or name != "hard"
        assert notices_write(name, rev, layout, backend="triton") is is_copy


@pytest.mark.parametrize("layout", LAYOUTS)
@both_directions
def test_any_layout_on_the_triton_backend(layout: str, rev: bool) -> None:
    compare(
        Case(Shape(2, 7, (3, 5)), "rev"),
        torch.float32,
        rev,
        grad=not rev,
        backend="triton",
        layout=layout,
    )


@slow_when_executed
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(64, 8, 8), (33, 5, 3), (64,)], ids=str)
def test_log_det_of_a_fresh_block_on_the_triton_backend(
    activation: str, shape: tuple[int, ...]
) -> None:
    compare_fresh(activation, shape, "triton")


def test_triton_backend_raises_where_it_cannot_be_honoured() -> None:
    block = make_block(
        fastflow_kernels.AllInOneBlock,
        Case(Shape(2, 6, (4, 4)), "hard"),
        torch.float32,
        backend="triton",
    )
    x = torch.randn(2, 6, 4, 4)
    with pytest.raises(RuntimeError, match="traced, exported or transformed"):
        torch.func.vmap(lambda x: block([x])[0][0])(x[None])
    with pytest.raises(RuntimeError, match="no gradient of the inverse"):
        block([x], rev=True)
    # The subnet's layout is not a reason to raise.
    block.subnet.register_forward_hook(lambda _, __, a: a.to(memory_format=torch.channels_last))
    expected = copy.deepcopy(block)
    expected.backend = "eager"
    torch.testing.assert_close(block([x])[0][0], expected([x])[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permute_soft": True},
        {"learned_householder_permutation": 1},
        {"reverse_permutation": True},
    ],
    ids=str,
)
def test_one_channels_last_sample_and_a_subnet_that_is_not(options: dict) -> None:
    """A transposed view of one sample has the shape of rows, but not their layout."""
    torch.manual_seed(0)
    block = fastflow_kernels.AllInOneBlock(
        [(4, 3, 5)],
        subnet_constructor=lambda i, o: torch.nn.Conv2d(i, o, 1),
        backend="triton",
        **options,
    )
    block = block.double()
    block.subnet.register_forward_hook(lambda _, __, a: a.contiguous())
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (y,), logdet = block([x])
        (back,), minus = block([y], rev=True)
    # The rotation was drawn in float32.
    assert (back - x).abs().max() < 1e-5
    assert (logdet + minus).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"permute_soft": True}, {"learned_householder_permutation": 1}], ids=str
)
def test_channels_last_gin_with_reverse_permutation_on_the_triton_backend(options: dict) -> None:
    """The kernels' contiguous copy stays so when the permutation is inverted before them."""
    torch.manual_seed(0)
    block = fastflow_kernels.AllInOneBlock(
        [(4, 3, 5)],
        subnet_constructor=lambda i, o: torch.nn.Conv2d(i, o, 1),
        gin_block=True,
        reverse_permutation=True,
        backend="triton",
        **options,
    ).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    results = []
    for backend in ("triton", "eager"):
        block.backend = backend
        leaf = x.clone().requires_grad_()
        (y,), _ = block([leaf])
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.sin().sum().backward()
        with torch.no_grad():
            (back,), _ = block([y], rev=True)
        results.append((y, leaf.grad, back))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@gin_is_slow_when_executed
@shapes((2, 7, 4, 5), (5, 7))
def test_a_reversible_chain_runs_the_kernels(shape: tuple[int, ...], gin: bool) -> None:
    case = Case(Shape(shape[0], shape[1], shape[2:]), "gin" if gin else "hard")
    chain = fastflow_kernels.ReversibleSequence(*shape[1:])
    for seed in range(3):
        chain.append(
            make_block(fastflow_kernels.AllInOneBlock, case, torch.float32, seed, backend="triton")
        )
    x = torch.randn(shape, requires_grad=True)
    with sanitize() as launches:
        z, log_det = chain(x)
        (z**3).sum().sub(log_det.sum()).backward()
    if INTERPRETED or EXECUTED:
        # GIN writes x in a separate pass, because its means are needed first.
        backward = [run for run in launches if run.kernel == "_coupling_bwd_kernel"]
        is_inverted = ["x_ptr" in run.stored for run in backward]
        assert is_inverted == [not gin] * 3
    assert chain.drift[0] < 1e-5
    exact = copy.deepcopy(chain).double()
    for block in exact:
        block.backend = "eager"
    wide = x.detach().double().requires_grad_()
    z, log_det = wide, 0.0
    for block in exact:
        (z,), j = block([z])
        log_det = log_det + j
    (z**3).sum().sub(log_det.sum()).backward()
    pairs = [
        (x.grad, wide.grad),
        *((p.grad, q.grad) for p, q in zip(chain.parameters(), exact.parameters(), strict=True)),
    ]
    for actual, truth in pairs:
        if actual is not None and truth is not None:
            assert (actual - truth).norm() <= 1e-4 * truth.norm().clamp(min=1e-3)
