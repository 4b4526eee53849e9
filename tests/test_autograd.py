"""Test gradients: numerical checks, double backward, saved tensors, transforms, overrides."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from fastflow_kernels import AllInOneBlock, accelerate, report
from fastflow_kernels.steps import STEPS
from tests.support.blocks import Stored, permutation_of
from tests.support.cases import (
    CASES,
    OPTIONS,
    SHAPES,
    Case,
    Shape,
    both_directions,
    ids,
    make_block,
    make_input,
    make_subnet,
)

pytestmark = pytest.mark.usefixtures("fused")

some_cases = [case for case in CASES if case.shape in (SHAPES[0], SHAPES[6])]


def block_of(case: Case, **extra: Any) -> AllInOneBlock:
    return make_block(AllInOneBlock, case, dialect=case.dialect, **extra)


def as_function(block: nn.Module, conditions: int, rev: bool) -> tuple[Any, list[Tensor]]:
    """Return the block as a function of x, the conditions and its trainable parameters.

    The second value is a copy of these parameters.
    """
    names = [name for name, p in block.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in block.parameters() if p.requires_grad]

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        c, parameters = tensors[:conditions], tensors[conditions:]
        (y,), logdet = torch.func.functional_call(
            block, dict(zip(names, parameters, strict=True)), ([x], list(c)), {"rev": rev}
        )
        return y, logdet

    return run, values


@pytest.mark.parametrize("case", some_cases, ids=ids(some_cases))
@both_directions
def test_block_gradients_equal_numerical_ones(case: Case, rev: bool) -> None:
    block = block_of(case)
    x, c = make_input(case)
    run, values = as_function(block, len(c), rev)
    tensors = [t.requires_grad_() for t in (x, *c)]
    assert torch.autograd.gradcheck(run, (*tensors, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*tensors, *values), fast_mode=True)


def test_block_second_gradients_equal_the_references() -> None:
    case = Case(Shape(2, 7, (3, 5)), "hard")
    block, stock = block_of(case), make_block(reference.AllInOneBlock, case)
    stock.load_state_dict(block.state_dict())
    gradients = []
    for b in (block, stock):
        x = make_input(case)[0].requires_grad_()
        (y,), logdet = b([x])
        (dx,) = torch.autograd.grad(y.square().sum() + logdet.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        gradients.append([x.grad, b.global_scale.grad, *(p.grad for p in b.subnet.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        tolerance = 1e-11 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=tolerance)


KEPT = {
    "hard": {},
    "gin": {"gin_block": True},
    "soft": {"permute_soft": True},
    "reverse": {"reverse_permutation": True},
    "householder": {"learned_householder_permutation": 4},
    "householder-soft": {"learned_householder_permutation": 4, "permute_soft": True},
}


@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("shape", [(8, 32, 16, 16), (256, 64)], ids=["rank2", "rank0"])
def test_block_keeps_x_and_a_and_nothing_else_of_their_size(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    x, a = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    block = AllInOneBlock([shape[1:]], subnet_constructor=lambda *_: Stored(a), **options)
    known = {t.untyped_storage().data_ptr() for t in (a, *block.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = block([x])
    # The block keeps x, or its gathered copy if the permutation is inverted first. Per channel it
    # keeps an index, and a few numbers for each reflection.
    reflections = options.get("learned_householder_permutation", 0)
    assert sum(kept.values()) <= x.nbytes + (64 + 64 * reflections) * shape[1], kept
    assert outputs[0][0].grad_fn is not None


class Count(TorchDispatchMode):
    """A mode that counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("jac", [False, 0, torch.zeros(2)], ids=["False", "0", "tensor"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@both_directions
def test_the_log_determinant_is_returned_whatever_jac_is(rev: bool, grad: bool, jac: Any) -> None:
    """The stock blocks return it too.

    FrEIA.distributions and old chains pass values other than True and add the result.
    """
    block = block_of(Case(Shape(2, 7, (3, 5)), "hard"))
    x, _ = make_input(Case(Shape(2, 7, (3, 5)), "hard"))
    with torch.set_grad_enabled(grad):
        (y,), logdet = block([x], rev=rev)
        (same,), also = block([x], rev=rev, jac=jac)
    assert torch.equal(same, y)
    assert torch.equal(also, logdet)
    assert also.requires_grad == grad


def test_block_moves_no_dense_matrix() -> None:
    block = AllInOneBlock([(64, 8, 8)], subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1))
    with Count() as count:
        (y,), logdet = block([torch.randn(2, 64, 8, 8, requires_grad=True)])
        (y.sum() + logdet.sum()).backward()
    assert count.names["convolution"] == 1  # the subnet's
    assert not {"mm", "addmm", "bmm", "index"} & count.names.keys()


def test_gradient_of_one_output_alone() -> None:
    case = Case(Shape(2, 6, (4, 4)), "hard")
    block, stock = block_of(case), make_block(reference.AllInOneBlock, case)
    stock.load_state_dict(block.state_dict())
    for pick in (lambda y, logdet: y.sum(), lambda y, logdet: logdet.sum()):
        grads = []
        for b in (block, stock):
            x = make_input(case)[0].requires_grad_()
            (y,), logdet = b([x])
            inputs = [x, b.subnet.b2, b.global_scale]
            grads.append(torch.autograd.grad(pick(y, logdet), inputs))
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_frozen_parameters_and_inputs() -> None:
    block = block_of(Case(Shape(2, 6, (4, 4)), "hard"))
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    block.global_scale.requires_grad_(False)
    block.global_offset.requires_grad_(False)
    (y,), logdet = block([x])
    (y.sum() + logdet.sum()).backward()
    assert block.global_scale.grad is None
    assert block.subnet.w1.grad is not None
    for p in block.parameters():
        p.requires_grad_(False)
    (y,), _ = block([x])
    assert not y.requires_grad


def test_retain_graph_twice_gives_the_same() -> None:
    block = block_of(Case(Shape(2, 6, (4, 4)), "hard"))
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    (y,), logdet = block([x])
    loss = y.square().sum() + logdet.sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_batched_gradients() -> None:
    block = block_of(Case(Shape(2, 5), "hard"))
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    y = block([x])[0][0]
    eye = torch.eye(10, dtype=torch.float64).view(10, 2, 5)
    batched = torch.autograd.grad(y, x, eye, is_grads_batched=True, retain_graph=True)[0]
    single = torch.stack([torch.autograd.grad(y, x, e, retain_graph=True)[0] for e in eye])
    torch.testing.assert_close(batched, single, rtol=1e-12, atol=1e-13)


def test_func_transforms_and_forward_mode_agree() -> None:
    block = block_of(Case(Shape(3, 5), "hard"))
    x, v = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))

    def run(x: Tensor) -> Tensor:
        return block([x])[0][0]

    jacobian = torch.func.jacrev(run)(x)
    torch.testing.assert_close(
        torch.func.jvp(run, (x,), (v,))[1], torch.einsum("abcd,cd->ab", jacobian, v)
    )
    torch.testing.assert_close(torch.func.vmap(lambda r: run(r[None])[0])(x), run(x))
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(
            run(torch.autograd.forward_ad.make_dual(x, v))
        ).tangent
    torch.testing.assert_close(tangent, torch.einsum("abcd,cd->ab", jacobian, v))


@both_directions
def test_compile_and_export_hold_a_gather_and_no_product(rev: bool) -> None:
    block = AllInOneBlock([(8, 4, 4)], subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1)).eval()
    x = torch.randn(2, 8, 4, 4)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            (y,), logdet = self.block([x], rev=rev)
            return y, logdet

    with torch.no_grad():
        expected = Wrapped()(x)
        program = torch.export.export(Wrapped(), (x,))
        compiled = torch.compile(Wrapped(), fullgraph=True, backend="aot_eager")(x)
        # Tracing warns that it is deprecated, and that shapes are constants in it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(Wrapped(), (x,))(x)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("index_select" in name for name in names)
    assert sum("conv" in name for name in names) == 1
    for results in (program.module()(x), compiled, traced):
        for actual, value in zip(results, expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)


def test_autocast_keeps_the_log_determinant_in_float32() -> None:
    block = AllInOneBlock(
        [(8, 6, 6)], subnet_constructor=lambda i, o: nn.Conv2d(i, o, 3, padding=1)
    )
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (y,), logdet = block([x])
    assert (y.dtype, logdet.dtype) == (torch.float32, torch.float32)
    (y.sum() + logdet.sum()).backward()
    assert block.global_scale.grad.dtype == torch.float32
    exact = copy.deepcopy(block).double()([x.detach().double()])
    # Only the subnet is in bfloat16. Its relative error 2^-8 is multiplied by 0.1 * clamp * |a|,
    # and adds up at random over the log-factors.
    assert (logdet - exact[1]).abs().max() < 0.2 * 2**-8 * (4 * 36) ** 0.5 * 8
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (back,), minus = block([y], rev=True)
    assert minus.dtype == torch.float32
    torch.testing.assert_close(back, x.detach(), rtol=0, atol=0.05)


@pytest.mark.parametrize("step", STEPS)
@both_directions
def test_an_override_is_honoured(step: str, rev: bool) -> None:
    calls = []

    def override(self: AllInOneBlock, *args: Any, **kwargs: Any) -> Any:
        calls.append(step)
        return getattr(AllInOneBlock, step)(self, *args, **kwargs)

    subclass = type("Subclass", (AllInOneBlock,), {step: override})
    options = {"reverse_permutation": True, "learned_householder_permutation": 2}
    torch.manual_seed(0)
    plain = AllInOneBlock([(6, 4)], subnet_constructor=make_subnet(1), **options).double()
    changed = subclass([(6, 4)], subnet_constructor=make_subnet(1), **options).double()
    changed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    for actual, expected in zip(changed([x], rev=rev), plain([x], rev=rev), strict=True):
        actual, expected = (t[0] if isinstance(t, tuple) else t for t in (actual, expected))
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert calls


def test_an_override_that_changes_the_result_is_honoured() -> None:
    class Doubled(AllInOneBlock):
        def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
            return (0.5 * x if rev else 2.0 * x), x.new_zeros(x.shape[0])

    block = Doubled([(4,)], subnet_constructor=make_subnet(0)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    (y,), _ = block([x])
    expected = torch.cat((x[:, :2], 2.0 * x[:, 2:]), 1)[
        :, permutation_of(block)
    ] * block.global_scale_activation(block.global_scale)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(block([y], rev=True)[0][0], x)


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_operand_lies_on_another_device(name: str, layout: torch.memory_format) -> None:
    """Run forward, backward and inverse of the eager engine on the meta device.

    Mixing devices raises there as on a GPU.
    """
    case = Case(Shape(2, 6, (4, 4)), name)
    block = make_block(AllInOneBlock, case, torch.float32, dialect="freia").to("meta")
    x = (
        torch.empty(case.shape.full, device="meta")
        .contiguous(memory_format=layout)
        .requires_grad_()
    )
    c = [torch.empty(2, *dims, device="meta") for dims in case.dims_c]
    (y,), logdet = block([x], c)
    (y.sum() + logdet.sum()).backward()
    with torch.no_grad():
        block([x], c, rev=True)
    assert x.grad.shape == x.shape


def test_default_device_leaves_nothing_behind() -> None:
    block = AllInOneBlock(
        [(6,)], subnet_constructor=lambda i, o: nn.Linear(i, o), affine_clamping=1.234
    )
    x = torch.randn(3, 6)
    with torch.device("meta"):
        block([x])
    assert block([x])[0][0].device.type == "cpu"


@pytest.mark.parametrize("activation", ["SIGMOID", "SOFTPLUS", "EXP"])
def test_gradient_of_a_scale_that_underflowed(activation: str) -> None:
    grads = []
    for cls in (AllInOneBlock, reference.AllInOneBlock):
        torch.manual_seed(0)
        block = cls(
            [(4,)], subnet_constructor=lambda i, o: nn.Linear(i, o), global_affine_type=activation
        )
        with torch.no_grad():
            block.global_scale.fill_(-300.0)
        block([torch.ones(2, 4)])[0][0].sum().backward()
        grads.append(block.global_scale.grad)
    assert torch.equal(*grads)


def test_large_finite_values_stay_finite() -> None:
    block = AllInOneBlock(
        [(4,)], subnet_constructor=lambda i, o: Stored(torch.zeros(1, 4)), global_affine_type="EXP"
    )
    (y,), _ = block([torch.full((1, 4), 3e38)])
    assert torch.equal(y, torch.full((1, 4), 3e38))


def test_batched_gradients_of_the_log_determinant_alone() -> None:
    block = block_of(Case(Shape(3, 5), "hard"))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    logdet = block([x])[1]
    batched = torch.autograd.grad(
        logdet, x, torch.eye(3, dtype=torch.float64), is_grads_batched=True, retain_graph=True
    )[0]
    single = torch.stack(
        [
            torch.autograd.grad(logdet, x, e, retain_graph=True)[0]
            for e in torch.eye(3, dtype=torch.float64)
        ]
    )
    torch.testing.assert_close(batched, single, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999])
def test_moving_averages_keep_the_permutation(decay: float) -> None:
    block = AllInOneBlock([(512,)], subnet_constructor=lambda i, o: nn.Linear(i, o)).double()
    averaged = torch.optim.swa_utils.AveragedModel(
        block, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    for _ in range(30):
        averaged.update_parameters(block)
    x = torch.randn(2, 512, dtype=torch.float64)
    torch.testing.assert_close(averaged([x])[0][0], block([x])[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(averaged(averaged([x])[0], rev=True)[0][0], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stock", [True, False], ids=["accelerated", "ours"])
def test_compiled_block_sees_a_loaded_permutation(stock: bool) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return (reference.AllInOneBlock if stock else AllInOneBlock)(
            [(16,)], subnet_constructor=lambda i, o: nn.Linear(i, o)
        )

    block, source = make(0), make(1)
    if stock:
        assert report(accelerate(block)).changed
    x = torch.randn(3, 16)
    # Compile at once, without an ordinary pass before.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled([x])[0][0], block([x])[0][0])
        block.load_state_dict(source.state_dict())
        torch.testing.assert_close(compiled([x])[0][0], source([x])[0][0])


@pytest.mark.parametrize(
    "options",
    [{}, {"permute_soft": True}, {"learned_householder_permutation": 2}],
    ids=["hard", "soft", "hh"],
)
def test_second_gradients_where_only_the_offset_takes_any(options: dict[str, Any]) -> None:
    """The log-determinant then depends on nothing that takes a gradient."""
    block = AllInOneBlock([(6,)], subnet_constructor=make_subnet(0), backend="eager", **options)
    for name, p in block.named_parameters():
        p.requires_grad_(name == "global_offset")
    (y,), logdet = block([torch.randn(3, 6)])
    (d,) = torch.autograd.grad((y**2).sum() + logdet.sum(), block.global_offset, create_graph=True)
    d.sum().backward()
    assert block.global_offset.grad is not None


def test_a_rotation_changed_before_backward_is_noticed() -> None:
    block = AllInOneBlock(
        [(6,)], subnet_constructor=make_subnet(0), backend="eager", permute_soft=True
    )
    (y,), _ = block([torch.randn(30, 6, requires_grad=True)])
    with torch.no_grad():
        block.w_perm.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inverse_of_a_rotation_keeps_its_dtype_under_autocast() -> None:
    block = AllInOneBlock(
        [(6,)], subnet_constructor=make_subnet(0), backend="eager", permute_soft=True
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert block([torch.randn(30, 6)], rev=True)[0][0].dtype is torch.float32


class Derived(AllInOneBlock):
    """A block that computes its scale."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.raw = nn.Parameter(torch.full((1, 6, 1, 1), 0.3))

    @property
    def global_scale(self) -> Tensor:  # type: ignore[override]
        return 2.0 * self.raw


def test_attributes_that_a_subclass_computes_are_asked_for() -> None:
    block = Derived([(6, 4, 4)], subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1))
    block([torch.ones(2, 6, 4, 4)])[0][0].sum().backward()
    assert block.raw.grad.abs().max() > 0
