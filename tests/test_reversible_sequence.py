"""Chains as containers: mixed modules, chains made from FrEIA's, slices, exchanges, copies."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from fastflow_kernels import (
    AllInOneBlock,
    ReversibleSequence,
    accelerate,
    report,
    restore,
)
from tests.support.cases import Case, make_subnet
from tests.support.chains import (
    DEPTH,
    SHAPE,
    assert_like_plain,
    assert_same,
    chain_of,
    gradients,
    parameter_gradients,
    random_input,
    simple,
)
from tests.support.graph import reversible_blocks
from tests.support.peers import anomalib_block, freia
from tests.support.plain_chain import plain_of
from tests.support.stock_blocks import released

pytestmark = pytest.mark.usefixtures("fused")


class Doubled(reference.InvertibleModule):
    """An invertible module that is not a block of ours."""

    def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        n = x[0][0].numel() * 0.6931471805599453
        return (x[0] * (0.5 if rev else 2.0),), x[0].new_full((len(x[0]),), -n if rev else n)

    def output_dims(self, input_dims: Any) -> Any:
        return input_dims


class Overriding(AllInOneBlock):
    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        return super()._affine(x, 0.5 * a, rev)


@pytest.mark.parametrize("every", [None, 2])
def test_mixed_chains(every: int | None) -> None:
    torch.manual_seed(0)
    chain = ReversibleSequence(6, 3, 5, checkpoint_every=every)
    for kind in (
        Doubled,
        AllInOneBlock,
        AllInOneBlock,
        Doubled,
        AllInOneBlock,
        Overriding,
        AllInOneBlock,
        AllInOneBlock,
        Doubled,
    ):
        chain.append(kind, **({} if kind is Doubled else {"subnet_constructor": make_subnet(2)}))
    chain.double()
    x = random_input()
    assert_like_plain(chain, x)
    assert reversible_blocks(chain(x)[0]) == 5


@pytest.mark.peers
def test_mixed_chains_with_modules_of_freia() -> None:
    import FrEIA.modules as fm

    torch.manual_seed(0)
    chain = ReversibleSequence(6, 4, 4)
    for kind in (
        fm.PermuteRandom,
        AllInOneBlock,
        AllInOneBlock,
        fm.ActNorm,
        AllInOneBlock,
        fm.IRevNetDownsampling,
        AllInOneBlock,
    ):
        chain.append(
            kind, **({"subnet_constructor": make_subnet(2)} if kind is AllInOneBlock else {})
        )
    chain.double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    chain(x)  # ActNorm initialises itself
    assert_like_plain(chain, x)
    assert reversible_blocks(chain(x)[0]) == 4
    torch.testing.assert_close(chain(chain(x)[0], rev=True)[0], x)


@released
def test_accelerate_makes_freias_chains_reversible_and_restore_puts_them_back(
    peer: Callable,
) -> None:
    chain = freia().framework.SequenceINN(6, 4, 4)
    for i in range(DEPTH):
        chain.append(
            peer(),
            cond=0 if i % 2 else None,
            cond_shape=(2, 4, 4),
            subnet_constructor=make_subnet(2),
        )
    model = nn.Sequential(chain.double())
    x, c = (
        torch.randn(2, 6, 4, 4, dtype=torch.float64),
        [torch.randn(2, 2, 4, 4, dtype=torch.float64)],
    )
    before, state = gradients(chain, x, c), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    after = report(accelerate(model, reversible=True))
    assert [(entry.name, entry.changed) for entry in after.chains] == [("0", True)]
    assert f"{DEPTH} of its {DEPTH} modules" in str(after)
    assert [id(p) for p in model.parameters()] == [
        id(p) for group in optimizer.param_groups for p in group["params"]
    ]
    assert state.keys() == model.state_dict().keys()
    chain.zero_grad()
    assert_same(gradients(chain, x, c), before)
    assert reversible_blocks(chain(x, c)[0]) == DEPTH
    assert isinstance(chain, freia().framework.SequenceINN)
    for copied in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        copied.zero_grad()
        assert_same(gradients(copied, x, c), before)
        assert reversible_blocks(copied(x, c)[0]) == DEPTH
    assert report(accelerate(model, reversible=True)) == after
    chain.checkpoint_every = 2
    assert [entry.state for entry in report(restore(model)).chains] == ["left"]
    assert type(chain) is freia().framework.SequenceINN
    assert not {"checkpoint_every", "drift"} & vars(chain).keys()
    chain.zero_grad()
    assert_same(gradients(chain, x, c), before)


def test_accelerate_says_where_there_is_no_chain() -> None:
    blocks = nn.ModuleList(simple())
    with pytest.warns(UserWarning, match="no chain of the model was made reversible"):
        assert report(accelerate(blocks, reversible=True)).chains == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(blocks)


@pytest.mark.peers
def test_accelerate_leaves_chains_of_another_kind() -> None:
    base: Any = freia().framework.SequenceINN

    class Overridden(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class SequenceINN(nn.Module):
        """A copy that counts the log-determinant twice."""

        def __init__(self) -> None:
            super().__init__()
            self.module_list, self.force_tuple_output = nn.ModuleList(), False
            self.conditions: list[Any] = []

        def forward(
            self, x: Tensor, c: Any = None, rev: bool = False, jac: bool = True
        ) -> tuple[Tensor, Any]:
            total: Any = 0
            for i in reversed(range(2)) if rev else range(2):
                (x,), log_det = self.module_list[i](
                    (x,),
                    c=[] if self.conditions[i] is None else [c[self.conditions[i]]],
                    rev=rev,
                    jac=jac,
                )
                total = total + 2 * log_det
            return x, total

    model = nn.ModuleList([Overridden(4), SequenceINN()])
    with pytest.warns(
        UserWarning,
        match="no block of the model runs fused and no chain of the model was made reversible",
    ):
        accelerate(model, reversible=True)
    assert [(entry.changed, entry.reason) for entry in report(model).chains] == [
        (False, "Overridden overrides forward"),
        (False, "it computes something else than FrEIA's SequenceINN"),
    ]


def test_slices_of_a_chain_that_was_made_reversible() -> None:
    """A slice is a reversible chain where the stock class makes a chain of it.

    FrEIA's main branch does. FrEIA 0.2 makes something else of a slice, and that stays so.
    """

    class SequenceINN(nn.Module):
        def __init__(self, modules: Any, conditions: Any) -> None:
            super().__init__()
            self.module_list, self.conditions, self.force_tuple_output = (
                nn.ModuleList(modules),
                list(conditions),
                False,
            )

        def forward(
            self, x: Any, c: Any = None, rev: bool = False, jac: bool = True
        ) -> tuple[Tensor, Any]:
            x, total = (x,), torch.zeros(len(x))
            for i in (
                reversed(range(len(self.module_list))) if rev else range(len(self.module_list))
            ):
                condition = {} if self.conditions[i] is None else {"c": [c[self.conditions[i]]]}
                x, log_det = self.module_list[i](x, **condition, jac=jac, rev=rev)
                total = log_det + total
            return x[0], total

        def __getitem__(self, item: Any) -> Any:
            taken = self.module_list[item]
            return (
                SequenceINN(taken, self.conditions[item])
                if isinstance(item, slice) and item.step is None
                else taken
            )

    chain = SequenceINN(simple().module_list, [None] * DEPTH)
    accelerate(chain, reversible=True)
    chain.checkpoint_every = 2
    x = random_input()
    part = chain[1:4]
    assert (part.checkpoint_every, part.debug, reversible_blocks(part(x)[0])) == (2, False, 3)
    assert part.module_list[0] is chain[1]
    assert type(chain[::1]) is nn.ModuleList


class Inverted(nn.Module):
    """The inverse of a chain as FrEIA's main branch builds it, for its distributions to wrap."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.dims_in = module.output_dims(module.dims_in if module.force_tuple_output else None)

    def forward(self, *args: Any, rev: bool = False, **kwargs: Any) -> Any:
        return self.module(*args, rev=not rev, **kwargs)

    def output_dims(self, _: Any) -> Any:
        return self.module.dims_in


@pytest.mark.parametrize("wrap", [False, True], ids=["tensor", "tuple"])
def test_a_chain_in_freias_inverse_and_distributions(wrap: bool) -> None:
    """They call it with conditions and jac=False, and add the log-determinant all the same."""
    chain = conditional(None, 0, None, force_tuple_output=wrap)
    normal, c = torch.distributions.Normal(0.0, 1.0), [torch.randn(3, 2, 3, 4, dtype=torch.float64)]
    inverse = Inverted(chain)
    assert inverse.dims_in == inverse.output_dims(None) == [(6, 3, 4)]
    z = normal.sample((3, 6, 3, 4)).double()
    with torch.no_grad():
        sample = inverse((z,) if wrap else z, jac=False, c=c)[0]
    assert not (sample[0] if wrap else sample).requires_grad
    plain = plain_of(chain)
    results = []
    for model in (chain, plain):
        latent, log_det = Inverted(model)(sample, c=c, jac=False, rev=True)
        latent = latent[0] if wrap else latent
        torch.testing.assert_close(latent, z)
        (normal.log_prob(latent).flatten(1).sum(1) + log_det).mean().neg().backward()
        results.append(parameter_gradients(model))
    assert_same(*results)
    rsample = inverse(
        (z.clone().requires_grad_(),) if wrap else z.clone().requires_grad_(), jac=False, c=c
    )[0]
    assert (rsample[0] if wrap else rsample).requires_grad


@pytest.mark.peers
def test_sequence_is_freias_sequence() -> None:
    reversible, stock = (
        ReversibleSequence(6, 4, 4, force_tuple_output=True),
        freia().framework.SequenceINN(6, 4, 4, force_tuple_output=True),
    )
    for chain in (reversible, stock):
        torch.manual_seed(0)
        chain.append(anomalib_block(), subnet_constructor=make_subnet(2))
        chain.append(
            anomalib_block(), cond=1, cond_shape=(3, 4, 4), subnet_constructor=make_subnet(2)
        )
    assert reversible.state_dict().keys() == stock.state_dict().keys()
    reversible.load_state_dict(stock.state_dict())
    assert (reversible.shapes, reversible.conditions, len(reversible)) == (
        stock.shapes,
        stock.conditions,
        len(stock),
    )
    assert [type(b) for b in reversible] == [type(b) for b in stock]
    assert reversible[1] is reversible.module_list[1]
    assert len(reversible[0:1]) == 1
    assert reversible.output_dims([(6, 4, 4)]) == stock.output_dims([(6, 4, 4)])
    c = [torch.zeros(0), torch.randn(2, 3, 4, 4)]
    x = torch.randn(2, 6, 4, 4)
    for rev in (False, True):
        for x_or_z in (x, (x,), [x]):
            actual, expected = (chain(x_or_z, c, rev=rev) for chain in (reversible, stock))
            assert isinstance(actual[0], tuple)
            torch.testing.assert_close(actual, expected)


class Halving(nn.Module):
    """A module that leaves out every second pixel: it changes shapes, and has no inverse."""

    def __init__(self, dims_in: Any) -> None:
        super().__init__()
        self.dims_in = dims_in
        self.dims_c: list[Any] = []

    def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        return (x[0].repeat_interleave(2, -1) if rev else x[0][..., ::2],), 0.0

    def output_dims(self, input_dims: Any) -> Any:
        (*shape, width) = input_dims[0]
        return [(*shape, width // 2)]


def conditional(*conditions: int | None, **options: Any) -> ReversibleSequence:
    """Make a chain whose condition number ``cond`` has ``cond + 2`` channels."""
    torch.manual_seed(0)
    chain = ReversibleSequence(6, 3, 4, **options)
    for cond in conditions:
        shape = None if cond is None else (cond + 2, 3, 4)
        chain.append(AllInOneBlock, cond=cond, cond_shape=shape, subnet_constructor=make_subnet(2))
    return chain.double()


def test_slices_are_chains() -> None:
    chain = conditional(None, 2, 0, 2, None, checkpoint_every=2, force_tuple_output=True)
    x, c = (
        torch.randn(2, 6, 3, 4, dtype=torch.float64),
        [torch.randn(2, n + 2, 3, 4, dtype=torch.float64) for n in range(3)],
    )
    (z,), log_det = chain(x, c)
    for split in range(6):
        first, last = chain[:split], chain[split:]
        assert type(first) is type(last) is ReversibleSequence
        assert (first.checkpoint_every, first.force_tuple_output, len(first), len(last)) == (
            2,
            True,
            split,
            5 - split,
        )
        (middle,), log_det_first = first(x, [c[2], c[0]])
        (end,), log_det_last = last(middle, [c[0], c[2]] if split == 2 else [c[2], c[0]])
        torch.testing.assert_close((end, log_det_first + log_det_last), (z, log_det))
        assert log_det_first.shape == log_det_last.shape == (2,)
        assert reversible_blocks(first(x.clone().requires_grad_(), [c[2], c[0]])[0][0]) == split
    assert chain[1:4].conditions == [0, 1, 0]
    assert chain[1] is chain[1:4][0]
    assert chain[::-1].conditions == [None, 0, 1, 0, None]
    (back,), log_det_back = chain[::-1](z, [c[2], c[0]])
    torch.testing.assert_close((back, log_det_back), (x, -log_det))
    (again,), log_det_again = chain[::-1](x, [c[2], c[0]], rev=True)
    torch.testing.assert_close((again, log_det_again), (z, log_det))
    assert [name for name, _ in chain[4:3:-1].named_parameters()][
        0
    ] == "module_list.0.module.global_scale"
    twice = chain[::-1][::-1]
    torch.testing.assert_close(twice(x, [c[2], c[0]]), chain(x, c))
    assert (
        len(chain[3:3])
        == len(chain[0:3:-1])
        == len(chain[9:])
        == len(ReversibleSequence(4)[::-1])
        == 0
    )
    every_other = chain[0](chain[2](chain[4]([x], rev=True)[0], [c[0]], rev=True)[0], rev=True)[0]
    torch.testing.assert_close(chain[::-2](x, [c[0]])[0], every_other)


def test_gradients_of_a_slice_and_of_its_inverse() -> None:
    chain = simple()
    plain, x = plain_of(chain), random_input()
    for item in (slice(1, 4), slice(None, None, -1)):
        chain.zero_grad()
        part, plain_part = chain[item], plain_of(plain[item])
        assert_same(gradients(part, x), gradients(plain_part, x))


def test_slices_where_shapes_change() -> None:
    chain = ReversibleSequence(6, 3, 8)
    for _ in range(2):
        chain.append(AllInOneBlock, subnet_constructor=make_subnet(2))
        chain.append(Halving)
    assert chain[1:3].shapes == [(6, 3, 8), (6, 3, 4), (6, 3, 4)]
    assert chain[3:0:-1].shapes == [(6, 3, 2), (6, 3, 4), (6, 3, 4), (6, 3, 8)]
    assert chain[::-1](torch.randn(2, 6, 3, 2))[0].shape == (2, 6, 3, 8)
    with pytest.raises(ValueError, match="expected a module for inputs of shape"):
        chain[::2]


def test_modules_can_be_exchanged() -> None:
    chain = conditional(None, 0, None)

    def block(*shape: int, **options: Any) -> AllInOneBlock:
        return AllInOneBlock([shape], subnet_constructor=make_subnet(len(shape) - 1), **options)

    for place in (0, -1):
        chain[place] = new = block(6, 3, 4).double()
        assert chain[place] is new
    chain[1] = new = block(6, 3, 4, dims_c=[(2, 3, 4)]).double()
    assert chain[1] is chain.module_list[1] is new
    x, c = (
        torch.randn(2, 6, 3, 4, dtype=torch.float64),
        [torch.randn(2, 2, 3, 4, dtype=torch.float64)],
    )
    assert_like_plain(chain, x, c)
    before = list(chain)
    with pytest.raises(ValueError, match="inputs of shape"):
        chain[0] = block(6, 3, 5)
    with pytest.raises(ValueError, match="outputs of shape"):
        chain[0] = Halving([(6, 3, 4)])
    with pytest.raises(ValueError, match="conditions of shape"):
        chain[0] = block(6, 3, 4, dims_c=[(2, 3, 4)])
    with pytest.raises(ValueError, match="conditions of shape"):
        chain[1] = block(6, 3, 4)
    with pytest.raises(NotImplementedError, match="got a slice"):
        chain[0:1] = chain[0:1]
    with pytest.raises(TypeError, match="an invertible module, got Linear"):
        chain[0] = nn.Linear(6, 6)
    with pytest.raises(IndexError):
        chain[3] = block(6, 3, 4)
    assert list(chain) == before


def test_output_dims_are_known() -> None:
    chain = ReversibleSequence(6, 3, 8)
    chain.append(Halving)
    assert chain.output_dims() == chain.output_dims(None) == [(6, 3, 4)]
    with pytest.raises(ValueError, match="force_tuple_output=True"):
        chain.output_dims([(6, 3, 8)])
    chain.force_tuple_output = True
    assert (
        chain.output_dims([(6, 3, 8)])
        == chain.output_dims([[6, 3, 8]])
        == chain.output_dims((6, 3, 8))
        == [(6, 3, 4)]
    )
    with pytest.raises(ValueError, match="expected input_dims"):
        chain.output_dims([(6, 3, 4)])


def test_the_log_determinant_starts_at_zero() -> None:
    """It has the default dtype, as FrEIA's, and exists even if no module of the chain has one."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(3, 8, dtype=dtype)
        chain = ReversibleSequence(8)
        for rev in (False, True):
            z, log_det = chain(x, rev=rev)
            assert torch.equal(z, x)
            assert torch.equal(log_det, torch.zeros(3))
        chain.append(Halving)
        assert chain(x)[1].shape == (3,)
    assert chain.to("meta")(torch.empty(3, 8, device="meta"))[1].device.type == "meta"
    with pytest.raises((TypeError, ValueError)):
        simple(1)([[1.0]])


def test_append_refuses_what_does_not_fit() -> None:
    chain = ReversibleSequence(6, 4, 4)
    block = AllInOneBlock([(6, 4, 4)], subnet_constructor=make_subnet(2))
    with pytest.raises(ValueError, match="expected a module for inputs of shape"):
        chain.append(AllInOneBlock([(4, 4, 4)], subnet_constructor=make_subnet(2)))
    for error in (TypeError, ValueError):
        with pytest.raises(
            error, match="expected no arguments beside an instance, got affine_clamping"
        ):
            chain.append(block, affine_clamping=1.0)
    with pytest.raises(TypeError, match="expected cond_shape"):
        chain.append(AllInOneBlock, cond=0, subnet_constructor=make_subnet(2))
    assert len(chain) == len(chain.conditions) == 0
    with pytest.raises(ValueError, match="force_tuple_output"):
        chain.output_dims([(6, 4, 4)])
    with pytest.raises(ValueError, match="checkpoint_every of 1 or more, got 0"):
        ReversibleSequence(6, checkpoint_every=0)
    with pytest.raises(TypeError, match="checkpoint_every as an integer or None, got 1.5"):
        ReversibleSequence(6, checkpoint_every=1.5)


def test_copies_and_files() -> None:
    chain, x = simple(checkpoint_every=2), random_input()
    expected = gradients(chain, x)
    file = io.BytesIO()
    torch.save(simple(), file)
    file.seek(0)
    for copied in (copy.deepcopy(chain), torch.load(file, weights_only=False)):
        copied.load_state_dict(chain.state_dict())
        copied.zero_grad()
        assert_same(gradients(copied, x), expected)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("rev", [False, True])
def test_a_block_without_its_condition_says_what_it_expects(
    rev: bool, with_gradients: bool
) -> None:
    chain = chain_of(Case(SHAPE, "cond"), depth=2)
    with torch.set_grad_enabled(with_gradients), pytest.raises(ValueError, match="condition"):
        chain(random_input(), rev=rev)
