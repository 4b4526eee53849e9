"""Reversible chains: a plain chain's gradients, in memory that does not grow with depth."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastflow_kernels import (
    ReversibleSequence,
    link,
)
from tests.support.cases import LAYOUTS, OPTIONS, Case, Shape, make_input
from tests.support.chains import (
    DEPTH,
    SHAPE,
    assert_like_plain,
    assert_same,
    chain_of,
    gradients,
    loss_of,
    parameter_gradients,
    random_input,
    simple,
)
from tests.support.graph import reversible_blocks
from tests.support.memory import bytes_kept_for_backward
from tests.support.plain_chain import plain_of
from tests.support.small_inputs import plain_and_fused

pytestmark = pytest.mark.usefixtures("fused")


@plain_and_fused
@pytest.mark.parametrize(
    "name", [name for name in OPTIONS if len(OPTIONS[name].get("conditions", ())) < 2]
)
def test_every_option_rank_and_layout_gives_a_plain_chains_gradients(name: str, small: int) -> None:
    for shape in (
        Shape(3, 7),
        Shape(2, 5, (7,)),
        SHAPE,
        Shape(2, 6, (2, 3, 2)),
        Shape(2, 2),
        Shape(2, 1, (3,)),
    ):
        layouts = (
            ("contiguous", "channels_last", "expanded")
            if shape is SHAPE and not small
            else ("contiguous",)
        )
        for layout in layouts if len(shape.spatial) != 3 else ("channels_last",):
            case = Case(shape, name)
            x, c = make_input(case)
            chain = chain_of(case, 3)
            for every in (None, 1, 2):
                chain.checkpoint_every = every
                chain.zero_grad()
                assert_like_plain(chain, LAYOUTS[layout](x), c)


@plain_and_fused
@pytest.mark.parametrize(
    "name", [name for name in OPTIONS if len(OPTIONS[name].get("conditions", ())) < 2]
)
def test_every_option_where_the_input_takes_no_gradient(name: str, small: int) -> None:
    """The input takes no gradient, as in training.

    Then only what learns ahead of the first coupling needs the gradient of its input, such as
    reflections.
    """
    for shape, layout in (
        (Shape(3, 7), "contiguous"),
        (SHAPE, "contiguous"),
        (SHAPE, "channels_last"),
        (Shape(2, 3), "contiguous"),
    ):
        case = Case(shape, name)
        x, c = make_input(case)
        x = LAYOUTS[layout](x)
        for every, frozen in ((None, ()), (None, ("subnet", "global")), (1, ()), (2, ("vk",))):
            chain = chain_of(case, 3, checkpoint_every=every)
            for key, p in chain[0].named_parameters():
                p.requires_grad_(p.requires_grad and not key.startswith(frozen or "-"))
            plain = plain_of(chain)
            for model in (chain, plain):
                loss_of(*model(x, c or None)).backward()
            assert_same(*(parameter_gradients(model) for model in (chain, plain)))


def with_matrices(
    chain: ReversibleSequence, changed: Callable[[Tensor], Tensor]
) -> ReversibleSequence:
    """Replace each rotation w of a chain by changed(w), and return the chain."""
    for block in chain:
        w, w_inv = (block.w_0, None) if block.householder else (block.w_perm, block.w_perm_inv)
        matrix = changed(w.detach().flatten(1))
        w.data.copy_(matrix.view_as(w))
        if w_inv is not None:
            w_inv.data.copy_(matrix.T.reshape(w.shape))
    return chain


def nearest_rotation(w: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(w)
    return u @ v


@pytest.mark.parametrize(
    "name", ["soft", "soft-rev-exp", "gin-soft", "hh2-soft-sigmoid", "hh2-soft-rev"]
)
def test_rotations_made_in_float32_are_inverted_like_those_in_float64(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both errors are rounding errors of float64, which the blocks amplify alike.

    By luck of signs one may be a few times the other.
    """
    monkeypatch.setitem(
        OPTIONS, "hh2-soft-rev", OPTIONS["hh2-soft-sigmoid"] | {"reverse_permutation": True}
    )
    for shape in (Shape(5, 16), Shape(2, 3), SHAPE):  # reflections in compact and in dense form
        case = Case(shape, name)
        x, _ = make_input(case)
        drift = []
        for changed in (lambda w: w.float().double(), nearest_rotation):
            chain = with_matrices(chain_of(case, 12), changed)
            assert_like_plain(chain, x)
            drift.append(chain.drift[0])
        assert drift[0] <= 8 * drift[1] + 64 * torch.finfo(torch.float64).eps


def test_the_chain_is_what_is_tested() -> None:
    z, _ = simple()(random_input())
    assert reversible_blocks(z) == DEPTH
    assert reversible_blocks(plain_of(simple())(random_input())[0]) == 0


def test_float32_is_as_accurate_as_a_plain_chain() -> None:
    """The error, a norm over each kind of parameter, is at most three times the plain chain's."""
    chain = simple(32, torch.float64, shape=(8, 6, 6))
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    for p in chain.parameters():
        if p.requires_grad:
            p.data.copy_(p.data.float())
    x = x.float().double()
    truth = gradients(plain_of(chain), x)
    chain.float()
    of_reversible, of_plain = gradients(chain, x.float()), gradients(plain_of(chain), x.float())
    assert 0 < chain.drift[0] < 1e-5
    errors: dict[str, dict[int, list[float]]] = {}
    for actual in (of_reversible, of_plain):
        for name, t in actual.items():
            if truth[name] is not None:
                error = (t.double() - truth[name]).norm().item() / truth[name].norm().item()
                errors.setdefault(name.split(".", 2)[-1], {}).setdefault(id(actual), []).append(
                    error**2
                )
    for kind, pair in errors.items():
        reversible_error, plain_error = (sum(values) ** 0.5 for values in pair.values())
        assert reversible_error <= 3 * plain_error, kind


def test_without_gradients_in_reverse_and_with_jac_false() -> None:
    chain = simple()
    plain, x = plain_of(chain), random_input()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            z, log_det = chain(x)
            assert torch.equal(z, plain(x)[0])
            torch.testing.assert_close(chain(z, rev=True)[0], x)
    z, log_det = chain(x.requires_grad_(), jac=False)
    torch.testing.assert_close(log_det, plain(x)[1])
    z.square().sum().backward()
    expected = x.clone().detach().requires_grad_()
    plain(expected)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-9, atol=1e-9)
    back = chain(z.detach().requires_grad_(), rev=True)[0]
    assert back.requires_grad
    assert reversible_blocks(back) == 0


# --- memory ---------------------------------------------------------------------------------------


def test_bytes_kept_do_not_grow_with_depth() -> None:
    x = torch.randn(8, 16, 12, 12)

    def kept_by(chain: ReversibleSequence) -> int:
        return bytes_kept_for_backward(chain, lambda: loss_of(*chain(x)))

    kept = {}
    for depth in (4, 32):
        chain = simple(depth, torch.float32, shape=(16, 12, 12))
        kept[depth] = kept_by(chain)
    index = 2 * 8 * 16  # what each further block adds: its permutation, both ways
    assert kept[32] <= kept[4] + 28 * index
    assert kept[32] <= 1.2 * kept[4]
    assert kept_by(plain_of(chain)) > 10 * kept[32]


def test_activations_are_freed_in_the_forward_and_in_the_backward_pass() -> None:
    chain = simple(8, torch.float32, shape=(16, 12, 12))
    born: list[weakref.ref] = []

    def note(module: nn.Module, arguments: Any, result: Any) -> None:
        born.append(weakref.ref(result[0][0].untyped_storage()))

    for block in chain:
        block.register_forward_hook(note)
    x = torch.randn(8, 16, 12, 12)
    z, log_det = chain(x)
    assert [ref() is not None for ref in born] == [False] * 7 + [True]
    reconstructed: list[weakref.ref] = []
    reconstruct = link.reconstruct

    def reconstruct_and_note(*args: Any, **kwargs: Any) -> Any:
        alive = sum(ref() is not None for ref in reconstructed)
        # This block's output, as reconstructed by the block behind, and another one while it is
        # handed on.
        assert alive <= 2, alive
        result = reconstruct(*args, **kwargs)
        reconstructed.append(weakref.ref(result.x.untyped_storage()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "reconstruct", reconstruct_and_note)
        loss_of(z, log_det).backward()
    assert len(reconstructed) == 8
    assert not any(ref() is not None for ref in reconstructed)
