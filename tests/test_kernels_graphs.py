"""Test compiled graphs that call the Triton kernels. Run as tests/test_kernels.py says."""

from __future__ import annotations

import copy
import io
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from torch._inductor.utils import run_and_get_code

import reference
from fastflow_kernels import (
    AllInOneBlock,
    ReversibleSequence,
    accelerate,
    route,
    torch_private,
)
from fastflow_kernels.coupling import CouplingSpec
from tests.support.blocks import TakesTensor, evaluate, through_a_file, unwrapped
from tests.support.cases import (
    DTYPES,
    LAYOUTS,
    Case,
    Shape,
    both_directions,
    make_block,
    make_input,
)
from tests.support.compare import assert_close as compare_close
from tests.support.graphs import (
    NAMESPACE,
    Graphs,
    calls,
    count_graphs,
    defined,
    kept_for_backward,
    operators,
)
from tests.support.kernels import (  # noqa: F401  (fixtures)
    default_device,
    kernels_run,
    on_this_machine,
)
from tests.support.modes import slow_when_executed
from tests.support.parity import compare
from tests.support.peers import freia

pytestmark = [
    *on_this_machine,
    pytest.mark.usefixtures("fused", "fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning"),
]

ROWS, PLANES = Shape(3, 7), Shape(2, 6, (3, 5))


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile anew, and forget how many clamps were compiled for."""
    monkeypatch.setattr(route, "_clamps", set())
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let backend "auto" choose as for tensors on a GPU while Dynamo traces."""
    decide = route._why_no_kernels

    @torch_private.constant_in_graphs
    def decide_on_a_gpu(is_cuda: bool, dtype: torch.dtype, backend: str) -> str | None:
        return decide(True, dtype, backend)

    monkeypatch.setattr(route, "_why_no_kernels", decide_on_a_gpu)


class Flow(nn.Module):
    """A chain of three blocks that takes a tensor and conditions."""

    def __init__(
        self, case: Case, stock: bool = False, dtype: torch.dtype = torch.float32, **extra: Any
    ) -> None:
        super().__init__()
        cls = reference.AllInOneBlock if stock else AllInOneBlock
        extra = {} if stock else {"backend": "triton"} | extra
        self.blocks = nn.ModuleList(
            make_block(cls, case, dtype, seed, dialect=case.dialect, **extra) for seed in range(3)
        )

    def forward(self, x: Tensor, *c: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for block in self.blocks[::-1] if rev else self.blocks:
            (x,), log_det = block([x], c, rev=rev)
            total = total + log_det
        return x, total


def train(flow: Callable[..., Any], leaves: list[Tensor], *c: Tensor) -> list[Tensor | None]:
    """Return the results and the gradients of the leaves, of which the first is the input."""
    z, log_det = flow(leaves[0], *c)
    loss = z.sin().sum() + log_det.cos().sum()
    return [z, log_det, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def assert_close(actual: list[Any], expected: list[Any], tolerance: float = 1e-4) -> None:
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), k
        if a is not None:
            assert a.dtype == e.dtype, k
            assert (a - e).abs().max() <= tolerance * max(1.0, e.abs().max().item()), k


def leaves_of(flow: nn.Module, x: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_(), *(p for p in flow.parameters() if p.requires_grad)]


# --- parity ---------------------------------------------------------------------------------------

NAMES = ("hard", "sigmoid", "cond2-rev", "gin-rev-cond", "soft-rev-exp", "hh3-rev-cond", "gin-hh2")
PARITY = [
    (Case(shape, name, dialect), "fp32", layout)
    for shape, layout in ((ROWS, "contiguous"), (PLANES, "contiguous"), (PLANES, "channels_last"))
    for name, dialect in zip(NAMES, ("anomalib", "freia") * 4, strict=False)
]
PARITY += [
    (Case(PLANES, "cond"), "fp64", "contiguous"),
    (Case(ROWS, "rev", "freia"), "bf16", "contiguous"),
    (Case(PLANES, "hard"), "fp16", "channels_last"),
    (Case(PLANES, "gin"), "fp32", "strided"),
    (Case(Shape(2, 5, (7,)), "hard"), "fp32", "transposed"),
    (Case(Shape(2, 3, (2, 3, 3)), "rev"), "fp32", "channels_last"),
    (Case(Shape(3, 1), "hard"), "fp32", "contiguous"),
    (Case(Shape(2, 9, (1, 1)), "exp"), "fp32", "expanded"),
]
SHORT = [(Case(PLANES, "cond2-rev"), "contiguous"), (Case(ROWS, "sigmoid", "freia"), "contiguous")]


def _compiled(**options: Any) -> Callable[[nn.Module], Any]:
    def compiled(block: nn.Module) -> nn.Module:
        block.compile(fullgraph=True, **options)
        return block

    return compiled


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    [
        pytest.param(
            case,
            dtype,
            layout,
            id=f"{case}-{dtype}-{layout}",
            marks=() if (case, layout) in SHORT else slow_when_executed,
        )
        for case, dtype, layout in PARITY
    ],
)
@both_directions
def test_parity_of_compiled_blocks(case: Case, dtype: str, layout: str, rev: bool) -> None:
    graphs = Graphs()
    compare(case, DTYPES[dtype], rev, not rev, "triton", layout, _compiled(backend=graphs))
    for graph in graphs.forward:
        assert operators(graph) == (
            {"invert_passive": 1, "invert_active": 1} if rev else {"coupling_forward": 1}
        )
    for graph in graphs.backward:
        assert operators(graph) == {"coupling_backward": 1}
    assert len(graphs.backward) == (0 if rev else len(graphs.forward))


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (Case(PLANES, "hard"), "contiguous"),
        pytest.param(Case(ROWS, "cond2-rev", "freia"), "contiguous", marks=slow_when_executed),
        pytest.param(Case(PLANES, "soft"), "channels_last", marks=slow_when_executed),
        pytest.param(Case(PLANES, "gin-rev-cond"), "channels_last", marks=slow_when_executed),
    ],
    ids=str,
)
@both_directions
def test_parity_of_blocks_compiled_by_inductor(case: Case, layout: str, rev: bool) -> None:
    compare(case, torch.float32, rev, not rev, "triton", layout, _compiled())


# --- one graph ------------------------------------------------------------------------------------


@slow_when_executed
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (Case(PLANES, "hard"), "contiguous"),
        (Case(PLANES, "rev"), "channels_last"),
        (Case(ROWS, "cond2-rev", "freia"), "contiguous"),
    ],
    ids=str,
)
def test_every_batch_and_image_size_runs_one_graph(case: Case, layout: str) -> None:
    flow, graphs = Flow(case), Graphs()
    compiled = torch.compile(flow, fullgraph=True, dynamic=True, backend=graphs)
    # Those of the first input differ, because torch uses one symbol for equal sizes.
    for batch, *spatial in [(5, 9, 7), (2, 8, 8), (7, 3, 5), (3, 1, 2)]:
        spatial = spatial[: case.rank]
        x = torch.randn(batch, case.shape.channels, *spatial)
        c = [torch.randn(batch, n, *spatial) for n in case.conditions]
        leaves = [LAYOUTS[layout](x).requires_grad_(), *leaves_of(flow, x)[1:]]
        assert_close(train(compiled, leaves, *c), train(flow, leaves, *c))
    assert count_graphs() == 1 + (case.rank > 0)  # torch makes another graph for a size of 1
    for forward, backward in zip(graphs.forward, graphs.backward, strict=True):
        assert operators(forward) == {"coupling_forward": 3}
        assert operators(backward) == {"coupling_backward": 3}


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "accelerated": lambda: accelerate(Flow(Case(PLANES, "hard"), True), backend="triton"),
    "SequenceINN": lambda: _sequence(freia().framework.SequenceINN),
    "reversible": lambda: _sequence(ReversibleSequence),
    "accelerated reversible": lambda: accelerate(
        _sequence(freia().framework.SequenceINN), reversible=True
    ),
}


def _sequence(cls: type) -> nn.Module:
    chain = cls(6, 3, 5)
    for seed in range(3):
        block = make_block(AllInOneBlock, Case(PLANES, "hard"), torch.float32, seed)
        block.backend = "triton"
        chain.append(type(block), subnet_constructor=nn.Identity)
        chain.module_list[-1] = block
    return chain


@pytest.mark.parametrize("kind", CHAINS)
def test_chains_are_one_graph(kind: str) -> None:
    """A reversible chain runs as a plain one. Its inverse is that of any chain."""
    chain, graphs = CHAINS[kind](), Graphs()
    compiled = torch.compile(chain, fullgraph=True, backend=graphs)
    leaves = leaves_of(chain, torch.randn(PLANES.full))
    assert_close(train(compiled, leaves), train(chain, leaves))
    assert [operators(g) for g in graphs.forward] == [{"coupling_forward": 3}]
    assert [operators(g) for g in graphs.backward] == [{"coupling_backward": 3}]
    with torch.no_grad():
        assert_close(list(compiled(leaves[0], rev=True)), list(chain(leaves[0], rev=True)))
    assert operators(graphs.forward[1]) == {"invert_passive": 3, "invert_active": 3}
    assert count_graphs() == 2


# What the plain coupling, the gradient of a slice or of an index, or a copy of x would show.
OF_A_COUPLING = {
    f"aten.{name}"
    for name in ("tanh", "exp", "cat", "index_put", "index_add", "clone", "softplus", "log")
}


@slow_when_executed
@pytest.mark.parametrize(
    "case", [Case(PLANES, "hard"), Case(PLANES, "rev", "freia"), Case(ROWS, "gin")], ids=str
)
def test_nothing_of_the_coupling_stands_beside_the_operators(case: Case) -> None:
    flow, graphs = Flow(case), Graphs()
    for block in flow.blocks:  # the table's subnet has a tanh of its own
        block.subnet = _relu_net(case)
    compiled = torch.compile(flow, fullgraph=True, backend=graphs)
    train(compiled, leaves_of(flow, torch.randn(case.shape.full)))
    with torch.no_grad():
        compiled(torch.randn(case.shape.full), rev=True)
    forward, inverse, backward = *graphs.forward, *graphs.backward
    for graph in (forward, inverse, backward):
        assert not calls(graph).keys() & OF_A_COUPLING
    assert operators(forward) == {"coupling_forward": 3}
    assert operators(backward) == {"coupling_backward": 3}  # and no forward, computed again
    assert operators(inverse) == {"invert_passive": 3, "invert_active": 3}
    # The subnets stay visible: Inductor fuses their activations.
    product = "aten.convolution" if case.rank else "aten.addmm"
    assert calls(forward)[product] == calls(inverse)[product] == 6
    assert calls(forward)["aten.relu"] == 3


def _relu_net(case: Case) -> nn.Module:
    channels = case.shape.channels
    passive, out = channels - channels // 2, channels // 2 * 2
    if case.rank:
        return nn.Sequential(nn.Conv2d(passive, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, out, 1))
    return nn.Sequential(nn.Linear(passive, 8), nn.ReLU(), nn.Linear(8, out))


@slow_when_executed
@pytest.mark.parametrize("name", ["hard", "rev", "gin", "soft"])
@pytest.mark.parametrize("shape", [ROWS, PLANES], ids=str)
def test_a_block_keeps_its_input_and_coefficients(shape: Shape, name: str) -> None:
    """They are 2 N with N the bytes of x, beside the index and what the subnet keeps.

    The subnet here is one product, which keeps its input: half of x. A view of x keeps nothing.
    """
    case = Case(shape, name)
    flow, graphs = Flow(case), Graphs()
    for block in flow.blocks:
        channels = case.shape.channels
        sizes = channels - channels // 2, channels // 2 * 2
        block.subnet = nn.Conv2d(*sizes, 3, padding=1) if case.rank else nn.Linear(*sizes)
    x = torch.randn(shape.full)
    train(torch.compile(flow, fullgraph=True, backend=graphs), leaves_of(flow, x))
    kept = kept_for_backward(graphs.forward[0])
    index = [t for t in kept if t.dtype == torch.int64]
    large = [t.numel() for t in kept if t.dtype != torch.int64]
    a = x[:, : shape.channels // 2 * 2].numel()
    gathered = x[:, : shape.channels - shape.channels // 2].numel()
    # y of a block is x of the next; the first x is an argument.
    inputs = [x.numel()] * 2 + ([gathered] * 3 if name == "rev" else [])
    # The product of a soft permutation is a convolution on images, which keeps its input.
    inputs += [x.numel()] * 3 if name == "soft" and case.rank else []
    assert sorted(large) == sorted([a] * 3 + inputs)
    assert len(index) == (0 if name == "soft" else 6)
    assert all(t.shape == (shape.channels,) for t in index)


# --- the code that Inductor writes ----------------------------------------------------------------


def test_the_code_of_inductor_calls_the_operators_and_fuses_the_subnet() -> None:
    case = Case(PLANES, "hard")
    flow = Flow(case)
    for block in flow.blocks:
        block.subnet = _relu_net(case)
    compiled = torch.compile(flow, fullgraph=True)
    leaves = leaves_of(flow, torch.randn(PLANES.full))
    results, (forward, backward) = run_and_get_code(train, compiled, leaves)
    assert_close(results, train(flow, leaves))
    assert _operators_in(forward) == {"coupling_forward": 3}
    assert _operators_in(backward) == {"coupling_backward": 3}
    for code in (forward, backward):
        assert not re.search(r"tanh|std::exp|\.exp\(", code)
    assert "relu" in forward


@pytest.mark.parametrize("case", [Case(PLANES, "hard"), Case(ROWS, "rev", "freia")], ids=str)
def test_the_inverse_is_written_without_a_copy(case: Case) -> None:
    """``invert_active`` writes to what ``invert_passive`` returned."""
    flow = Flow(case)
    compiled = torch.compile(flow, fullgraph=True)
    x = torch.randn(case.shape.full)
    with torch.no_grad():
        results, (code,) = run_and_get_code(compiled, x, rev=True)
        assert_close(list(results), list(flow(x, rev=True)))
    assert _operators_in(code) == {"invert_passive": 3, "invert_active": 3}
    passive = re.findall(r"(\w+) = torch\.ops\.fastflow_kernels\.invert_passive", code)
    active = re.findall(r"fastflow_kernels\.invert_active\.default\(\w+, (\w+)", code)
    aliases = dict(re.findall(r"^\s*(buf\d+) = (buf\d+)$", code, re.MULTILINE))
    assert [aliases.get(name, name) for name in active] == passive


def _operators_in(code: str) -> Counter[str]:
    """Count the lines that call an operator. Comments mention it, too."""
    call = r"^\s*(?:\w+ = )?torch\.ops\.fastflow_kernels\.(\w+)\.default\("
    return Counter(re.findall(call, code, re.MULTILINE))


# --- the weights of the permutation ---------------------------------------------------------------

WEIGHTS = [Case(ROWS, "hard"), Case(PLANES, "rev"), Case(ROWS, "rev", "freia"), Case(PLANES, "hh1")]


@slow_when_executed
@pytest.mark.parametrize("case", WEIGHTS, ids=str)
@pytest.mark.parametrize("through", ["load_state_dict", "copy_", "data", "functional_call"])
@both_directions
def test_a_graph_permutes_by_the_weights_it_runs_with(case: Case, through: str, rev: bool) -> None:
    flow, source = (
        TakesTensor(
            make_block(
                AllInOneBlock, case, torch.float64, seed, dialect=case.dialect, backend="triton"
            ),
            rev,
        )
        for seed in (0, 1)
    )
    x, _ = make_input(case)
    compiled = torch.compile(
        lambda p, x: functional_call(flow, p, (x,)), fullgraph=True, backend=(graphs := Graphs())
    )
    parameters = dict(flow.named_parameters())
    with torch.no_grad():
        compiled(parameters, x)
        if through == "functional_call":
            parameters = dict(source.named_parameters())
        elif through == "load_state_dict":
            flow.load_state_dict(source.state_dict())
        for p, q in zip(parameters.values(), source.parameters(), strict=True):
            if through == "copy_":
                p.copy_(q)
            elif through == "data":  # as DDP's broadcast does
                p.data.copy_(q)
        assert_close(list(compiled(parameters, x)), list(source(x)), 1e-12)
    assert all(operators(graph) for graph in graphs.forward)


@slow_when_executed
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *itertools.product(["rotation", "row twice", "beside", "beyond"], ["hard", "rev"]),
        ("negative", "rev"),  # an index alone may count from the end
    ],
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@both_directions
def test_weights_that_are_no_permutation_raise(
    kind: str, name: str, backend: str, rev: bool
) -> None:
    """They do so before a kernel could write to memory that is not its own."""
    case = Case(ROWS, name, "freia" if kind in ("beyond", "negative") else "anomalib")
    block = make_block(AllInOneBlock, case, torch.float32, dialect=case.dialect, backend="triton")
    compiled = torch.compile(TakesTensor(block, rev), fullgraph=True, backend=backend)
    x, _ = make_input(case, torch.float32)
    with torch.no_grad():
        compiled(x)
        for w in (block.w_perm, block.w_perm_inv):
            if kind == "rotation":
                w.data.copy_(torch.linalg.qr(torch.randn(w.shape))[0])
            elif kind == "beside":
                w.data[0] += 0.25 * w.data[1]
            elif kind == "negative":
                w.data[w == len(w) - 1] = -1
            else:
                w.data[0] = w.data[1] if kind == "row twice" else len(w)
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            compiled(x)


@both_directions
def test_only_the_matrix_in_use_counts(rev: bool) -> None:
    """The other one may be outdated, as in a stock block."""
    case = Case(ROWS, "hard")
    block = make_block(AllInOneBlock, case, backend="triton")
    stock = make_block(reference.AllInOneBlock, case)
    compiled = torch.compile(TakesTensor(block, rev), fullgraph=True, backend=Graphs())
    x, _ = make_input(case)
    order = [1, 2, 3, 4, 5, 6, 0]
    with torch.no_grad():
        compiled(x)
        for b in (block, stock):
            w = b.w_perm_inv if rev else b.w_perm
            w.data.copy_(torch.eye(7, dtype=w.dtype)[order])
        assert_close(list(compiled(x)), list(unwrapped(stock([x], rev=rev))), 1e-12)


# --- what must stay plain -------------------------------------------------------------------------


def _exported(model: nn.Module, x: Tensor, strict: bool) -> str:
    return str(torch.export.export(model, (x,), strict=strict).graph)


def _onnx(model: nn.Module, x: Tensor) -> str:
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    return str(program.model)


def _traced(model: nn.Module, x: Tensor) -> str:
    return str(torch.jit.trace(model, (x,), check_trace=False).inlined_graph)


def _saved(model: nn.Module, x: Tensor) -> str:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    return str(torch.export.load(file).graph)


EXPORTS: dict[str, Callable[[nn.Module, Tensor], str]] = {
    "export": lambda model, x: _exported(model, x, False),
    "strict export": lambda model, x: _exported(model, x, True),
    "saved export": _saved,
    "trace": _traced,
    "onnx": _onnx,
}


@slow_when_executed
@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("name", ["hard", "rev"])
@both_directions
def test_exports_call_no_operator(kind: str, name: str, rev: bool) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    model = TakesTensor(make_block(AllInOneBlock, Case(ROWS, name), torch.float32), rev)
    x, _ = make_input(Case(ROWS, name), torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=(graphs := Graphs()))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(x)
        assert operators(graphs.forward[0])  # a graph for this process does
        text = EXPORTS[kind](model, x)
        assert not re.search(r"fastflow_kernels(::|\.)(coupling|gather|invert)", text)
        assert EXPORTS["export"](model, x)
        torch._dynamo.reset()
        compiled(x)
        assert operators(graphs.forward[1])


@slow_when_executed
@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_of_functions_run_plain_operations(transform: str) -> None:
    model = TakesTensor(make_block(AllInOneBlock, Case(ROWS, "hard")), False)
    x = torch.randn(4, *ROWS.full, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return sum(t.sin().sum() for t in model(x))

    graphs = Graphs()
    function = vmap(lambda x: model(x)) if transform == "vmap" else grad(loss)
    argument = x if transform == "vmap" else x[0]
    compiled = torch.compile(function, fullgraph=True, backend=graphs)
    torch.testing.assert_close(compiled(argument), function(argument))
    assert graphs.forward
    for graph in graphs.forward:
        assert not operators(graph)


@pytest.mark.parametrize("name", ["hard", "soft-rev-exp", "hh3-rev-cond", "gin-rev-cond"])
@pytest.mark.parametrize("shape", [ROWS, PLANES], ids=str)
def test_a_graph_of_a_cpu_calls_no_operator(name: str, shape: Shape) -> None:
    """Dynamo's graph holds none, not even one into which AOTAutograd would look."""
    case = Case(shape, name)
    flow = Flow(case, backend="auto").cpu()
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x, c = make_input(case, torch.float32)
    train(torch.compile(flow, fullgraph=True, backend=backend), leaves_of(flow, x), *c)
    assert seen
    assert not [target for target in seen if NAMESPACE in target]


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_annealed_clamp_of_a_cpu_takes_few_graphs(dynamic: bool | None) -> None:
    flow = Flow(Case(ROWS, "hard"), backend="auto").cpu()
    compiled = torch.compile(flow, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for k in range(10):
        for block in flow.blocks:
            block.clamp = 2.0 - k / 10
        compiled(torch.randn(ROWS.full, device="cpu"))
    assert count_graphs() <= 2


@pytest.mark.usefixtures("on_a_gpu")
def test_a_number_of_numpy_runs_plain_operations() -> None:
    """Dynamo holds it as a tensor."""
    numpy = pytest.importorskip("numpy")
    flow, graphs = Flow(Case(ROWS, "hard"), backend="auto"), Graphs()
    for block in flow.blocks:
        block.clamp = numpy.float64(1.9)
    x = torch.randn(ROWS.full)
    with torch.no_grad():
        assert_close(list(torch.compile(flow, backend=graphs)(x)), list(flow(x)))
    assert not any(map(operators, graphs.forward))


@pytest.mark.usefixtures("on_a_gpu")
def test_an_inverse_with_gradients_runs_plain_operations() -> None:
    flow, graphs = Flow(Case(ROWS, "hard"), backend="auto"), Graphs()
    compiled = torch.compile(flow, fullgraph=True, backend=graphs)
    x = torch.randn(ROWS.full, requires_grad=True)
    for actual, expected in zip(compiled(x, rev=True), flow(x, rev=True), strict=True):
        torch.testing.assert_close(actual, expected)
    assert not operators(graphs.forward[0])
    flow = Flow(Case(ROWS, "hard"))
    with pytest.raises(RuntimeError, match="no gradient of the inverse"):
        torch.compile(flow, backend=graphs)(x, rev=True)


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "backend", "reason"),
    [
        (True, torch.float32, "auto", None),
        (True, torch.float32, "triton", None),
        (True, torch.float32, "eager", "'eager' is requested"),
        (False, torch.float32, "auto", "not on a GPU"),
        (True, torch.complex64, "auto", "complex64 has no kernel"),
    ],
)
def test_a_graph_has_a_reason_for_plain_operations(
    is_cuda: bool, dtype: torch.dtype, backend: str, reason: str | None
) -> None:
    actual = route._why_no_kernels(is_cuda, dtype, backend)
    assert actual is None if reason is None else reason in str(actual)


def test_graphs_are_made_for_a_few_clamps_only() -> None:
    reasons = [route._why_too_many_clamps(2.0 + k, 0.1) for k in range(route.MOST_CLAMPS + 1)]
    assert reasons[:-1] == [None] * route.MOST_CLAMPS
    assert "16 other clamps" in str(reasons[-1])
    assert route._why_not_for_clamp(CouplingSpec(99.0, 0.1, "EXP", False), "triton") is None


def test_a_call_that_cannot_use_the_kernels_says_why() -> None:
    model = TakesTensor(make_block(AllInOneBlock, Case(ROWS, "hard"), backend="triton"), False)
    x, _ = make_input(Case(ROWS, "hard"))
    with pytest.raises(RuntimeError, match="being traced, exported or transformed"):
        torch.export.export(model, (x,), strict=False)


# --- clamps ---------------------------------------------------------------------------------------


@slow_when_executed
@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch 2.7 cannot tell a variable")
def test_an_annealed_clamp_takes_two_graphs() -> None:
    """The first is made for its clamp and calls operators. The second takes every clamp."""
    flow, graphs = Flow(Case(ROWS, "hard"), backend="auto"), Graphs()
    compiled = torch.compile(flow, fullgraph=True, backend=graphs)
    x = torch.randn(ROWS.full)
    with torch.no_grad():
        for k in range(12):
            for block in flow.blocks:
                block.clamp = 2.0 - k / 10
            assert_close(list(compiled(x)), list(flow(x)))
    assert [sum(operators(g).values()) for g in graphs.forward] == [3, 0]


@slow_when_executed
def test_a_clamp_of_a_graph_for_all_sizes_is_still_followed() -> None:
    """With ``dynamic=True`` numbers are variables. Operators make constants of them."""
    flow, graphs = Flow(Case(ROWS, "hard", "freia")), Graphs()
    compiled = torch.compile(flow, fullgraph=True, dynamic=True, backend=graphs)
    x = torch.randn(ROWS.full)
    with torch.no_grad():
        for clamp in (2.0, 1.5, 2.0, 3):
            for block in flow.blocks:
                block.clamp = clamp
            assert_close(list(compiled(x)), list(flow(x)))
    assert len(graphs.forward) == 3
    assert all(operators(g) for g in graphs.forward)


# --- together with other features of torch --------------------------------------------------------


@slow_when_executed
@pytest.mark.parametrize("shape", [ROWS, PLANES], ids=str)
def test_autocast(shape: Shape) -> None:
    """The subnet runs in half precision, the coupling in float32, as in eager mode."""
    flow, graphs = Flow(Case(shape, "hard")), Graphs()
    compiled = torch.compile(flow, fullgraph=True, backend=graphs)
    leaves = leaves_of(flow, torch.randn(shape.full))
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        actual, baseline = train(compiled, leaves), train(flow, leaves)
    wide = copy.deepcopy(flow).double()
    truth = train(wide, leaves_of(wide, leaves[0].double()))
    for k, (a, t, b) in enumerate(zip(actual, truth, baseline, strict=True)):
        compare_close(a.to(torch.bfloat16), t, b.to(torch.bfloat16), f"result {k}")
    assert actual[0].dtype == torch.float32
    assert operators(graphs.forward[0]) == {"coupling_forward": 3}


@slow_when_executed
def test_checkpointing_computes_a_block_once_more() -> None:
    flow, graphs = Flow(Case(PLANES, "hard")), Graphs()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(flow, x, use_reentrant=False)

    leaves = leaves_of(flow, torch.randn(PLANES.full))
    compiled = torch.compile(run, fullgraph=True, backend=graphs)
    assert_close(train(compiled, leaves), train(flow, leaves))
    assert operators(graphs.forward[0]) == {"coupling_forward": 3}
    recomputed = operators(graphs.backward[0])
    assert recomputed["coupling_backward"] == 3
    assert recomputed["coupling_forward"] in (2, 3)  # the last result is not needed


@slow_when_executed
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode: Callable[[], Any]) -> None:
    flow, graphs = Flow(Case(PLANES, "rev")), Graphs()
    compiled = torch.compile(flow, fullgraph=True, backend=graphs)
    x = torch.randn(PLANES.full)
    with mode():
        for rev in (False, True):
            assert_close(list(compiled(x, rev=rev)), list(flow(x, rev=rev)))
    assert [sum(operators(g).values()) for g in graphs.forward] == [3, 6]


@slow_when_executed
def test_a_graph_has_no_second_derivative() -> None:
    """Nobody looks into the node with backend "eager". Torch would only warn."""
    flow = Flow(Case(ROWS, "hard"))
    leaves = leaves_of(flow, torch.randn(ROWS.full))
    z, log_det = torch.compile(flow, fullgraph=True, backend="eager")(leaves[0])
    loss = z.sin().sum() + log_det.sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaves[0], create_graph=True)
    torch.autograd.grad(loss, leaves[0])


@slow_when_executed
def test_frozen_parameters_get_no_gradient() -> None:
    flow, graphs = Flow(Case(PLANES, "hard")), Graphs()
    for block in flow.blocks:
        block.global_scale.requires_grad_(False)
    flow.blocks[0].global_offset.requires_grad_(False)
    leaves = leaves_of(flow, torch.randn(PLANES.full))
    compiled = torch.compile(flow, fullgraph=True, backend=graphs)
    assert_close(train(compiled, leaves), train(flow, leaves))
    wanted = [
        node.args[4] for node in graphs.backward[0].nodes if "coupling_backward" in str(node.target)
    ]
    assert sorted(wanted) == [False, True, True]


def test_a_compiled_block_is_copied_and_stored() -> None:
    block = make_block(AllInOneBlock, Case(ROWS, "hard"), torch.float32, backend="triton")
    block.compile(fullgraph=True, backend=Graphs())
    x, c = make_input(Case(ROWS, "hard"), torch.float32)
    expected = evaluate(block, x, c)
    for again in (copy.deepcopy(block), through_a_file(block)):
        for name, value in evaluate(again, x, c).items():
            torch.testing.assert_close(value, expected[name])


def test_every_operator_is_known_to_these_tests() -> None:
    assert [name.partition("::")[2] for name in defined()] == [
        "coupling",
        "coupling_backward",
        "coupling_forward",
        "gather",
        "invert_active",
        "invert_and_backward",
        "invert_passive",
    ]


@slow_when_executed
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_layouts_of_a_chain(layout: str) -> None:
    """Channels-last stays so; another layout is copied once, ahead of the first block."""
    flow, graphs = Flow(Case(PLANES, "hard")), Graphs()
    compiled = torch.compile(flow, fullgraph=True, backend=graphs)
    x = LAYOUTS[layout](torch.randn(PLANES.full))
    leaves = [x.requires_grad_(), *leaves_of(flow, x)[1:]]
    actual = train(compiled, leaves)
    assert_close(actual, train(flow, leaves))
    is_channels_last = actual[0].is_contiguous(memory_format=torch.channels_last)
    assert is_channels_last == (layout == "channels_last")
    assert calls(graphs.forward[0])["aten.clone"] == (layout == "transposed")
