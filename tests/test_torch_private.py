"""Test every private name of torch that the package uses, to see versions that lack one.

ci/versions.sh runs the tests with every supported version of torch.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function, forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow_kernels import torch_private

# torch 2.7 does not say whether hooks for saved tensors are set, so the package assumes that they
# are.
CAN_TELL_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_nobody_looks_on_in_an_ordinary_call() -> None:
    assert not torch_private.is_watched()
    assert not torch_private.is_symbolic()
    assert not torch_private.is_traced()
    assert not torch_private.is_recorded()
    assert not torch_private.is_transformed()
    assert not torch_private.is_onnx_export()
    assert torch_private.has_saved_tensor_hooks() is not CAN_TELL_HOOKS
    assert not torch_private.is_parametrization_cached()
    assert not torch_private.needs_plain(torch.zeros(1), nn.Parameter(torch.zeros(1)), None)


def test_a_mode_that_looks_on_is_seen_and_can_be_left() -> None:
    with Watching():
        assert torch_private.is_watched()
        assert not torch_private.is_symbolic()
        with torch_private.unrecorded():
            assert not torch_private.is_watched()
        assert torch_private.is_watched()


def test_tensors_without_values_are_seen() -> None:
    with FakeTensorMode():
        assert torch_private.is_symbolic()
        assert torch_private.is_recorded()
        assert torch_private.needs_plain()
    answers = []

    def check(x: Tensor) -> Tensor:
        answers.append(torch_private.is_symbolic())
        return x + 1

    make_fx(check)(torch.zeros(1))
    assert answers == [True]


def test_tracing_is_seen_and_can_be_left() -> None:
    answers = []

    def check(x: Tensor) -> Tensor:
        answers.append(torch_private.is_traced())
        with torch_private.unrecorded():
            answers.append(torch_private.is_traced())
        answers.append(torch_private.is_recorded())
        return x + 1

    torch.jit.trace(check, torch.zeros(1), check_trace=False)
    assert answers == [True, False, True]


def test_compilation_is_seen() -> None:
    def check(x: Tensor) -> Tensor:
        return x + 1 if torch_private.needs_plain(x) and torch_private.is_traced() else x

    assert torch.compile(check, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1.0


def test_transforms_are_seen() -> None:
    answers = []

    def check(x: Tensor) -> Tensor:
        answers.append((torch_private.is_transformed(), torch_private.is_wrapped(x)))
        return x.sum()

    torch.func.vmap(check)(torch.zeros(2, 3))
    assert answers == [(True, True)]
    assert not torch_private.is_wrapped(torch.zeros(1))


def test_forward_mode_is_seen() -> None:
    with forward_ad.dual_level():
        assert torch_private.needs_plain()


def test_a_batch_of_gradients_and_subclasses_are_seen() -> None:
    answers = []

    class Checking(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            answers.append(torch_private.needs_plain(dy))
            return dy

    x = torch.zeros(2, requires_grad=True)
    torch.autograd.grad(Checking.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert answers == [True]
    assert torch_private.needs_plain(torch.zeros(1).as_subclass(type("Sub", (Tensor,), {})))


def test_hooks_and_caches_of_others_are_seen() -> None:
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        assert torch_private.has_saved_tensor_hooks()
    with parametrize.cached():
        assert torch_private.is_parametrization_cached()
    layer = nn.Linear(1, 1)
    assert not torch_private.has_hooks(layer)
    assert not torch_private.is_compiled(layer)
    for register in (
        layer.register_forward_hook,
        layer.register_forward_pre_hook,
        layer.register_full_backward_hook,
        layer.register_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert torch_private.has_hooks(layer), register
        handle.remove()
    layer.compile(backend="eager")
    assert torch_private.is_compiled(layer)


def test_what_comes_between_a_call_and_a_forward_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Calls(nn.Linear):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    assert not torch_private.are_calls_hooked()
    assert torch_private.is_called_directly(nn.Linear(2, 2))
    hooked, compiled, replaced, parametrized = (nn.Linear(2, 2) for _ in range(4))
    hooked.register_forward_hook(lambda *_: None)
    compiled.compile(backend="eager")
    replaced.__dict__["_call_impl"] = lambda x: x
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    for module in (hooked, compiled, replaced, parametrized, Calls(2, 2)):
        assert not torch_private.is_called_directly(module)
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ):
        handle = register(lambda *_: None)
        assert torch_private.are_calls_hooked(), register
        handle.remove()
    for name in ("__call__", "_call_impl"):
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, name, lambda *_: None)
            assert torch_private.are_calls_hooked()
    assert not torch_private.are_calls_hooked()


def test_a_write_in_place_counts_a_version() -> None:
    x = torch.zeros(2)
    before = torch_private.version_of(x)
    x[:1].add_(1.0)
    assert torch_private.version_of(x) != before
    with torch.inference_mode():
        assert torch_private.version_of(torch.zeros(1)) is None


def test_holders_of_a_tensor_are_counted() -> None:
    x = torch.zeros(2)
    before = torch_private.holders_of(x)
    alias = x
    assert torch_private.holders_of(x) > before
    del alias
    assert torch_private.holders_of(x) == before
    view = x[:1]
    assert torch_private.holders_of(x) > before
    del view


def test_the_direct_apply_of_a_function() -> None:
    class Double(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return 2 * dy

    x = torch.ones(1, requires_grad=True)
    y = torch_private.direct_apply(Double)(x)
    y.backward()
    assert (y.item(), x.grad.item()) == (2.0, 2.0)


def test_each_backward_pass_has_a_number() -> None:
    """The nodes of a pass see one number, and those of another pass another one."""
    numbers: list[list[int]] = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dx: torch.Tensor) -> torch.Tensor:
            numbers[-1].append(torch_private.backward_pass())
            return dx

    y = Node.apply(Node.apply(torch.ones(2, requires_grad=True))).sum()
    for _ in range(2):
        numbers.append([])
        y.backward(retain_graph=True)
    (first, second), (third, fourth) = numbers
    assert first == second != third == fourth


def test_a_parameter_is_found_as_getattr_finds_it() -> None:
    layer = nn.Linear(2, 2)
    assert torch_private.parameter_of(layer, "weight") is layer.weight
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    assert torch.equal(torch_private.parameter_of(layer, "weight"), layer.weight)


def test_an_unset_variable_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.environ.encodekey("FASTFLOW_KERNELS_NOT_THERE")
    assert torch_private.is_certainly_unset(name)
    monkeypatch.setenv("FASTFLOW_KERNELS_NOT_THERE", "1")
    assert not torch_private.is_certainly_unset(name)


def test_versions_are_counted_in_inference_mode_where_they_are_asked_for() -> None:
    x = torch.zeros(1, requires_grad=True)
    with torch.inference_mode():
        with torch_private.versions_counted():
            made = x + 1
            assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
        made.add_(1)
        assert torch_private.version_of(made) == 1
        assert torch_private.version_of(x + 1) is None
    with torch_private.versions_counted():  # otherwise does not change anything
        assert (x + 1).requires_grad


# --- what Dynamo traces ---------------------------------------------------------------------------


class Asks(nn.Module):
    """A module that asks a question while it runs, and keeps no answer but in its result."""

    def __init__(self, ask: Any, number: float = 2.0) -> None:
        super().__init__()
        self.ask, self.number = ask, number

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.ask(self.number) else x - 1


def asked_if_compiled_here(number: float) -> bool:
    return torch_private.is_compiled_here()


@pytest.mark.usefixtures("fresh_compiler")
def test_only_a_graph_for_this_process_is_compiled_here() -> None:
    model, x = Asks(asked_if_compiled_here), torch.zeros(2)
    assert (model(x) == -1).all()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert (compiled(x) == 1).all()
    for strict in (False, True):
        assert (torch.export.export(model, (x,), strict=strict).module()(x) == -1).all()
        assert (torch.jit.trace(model, (x,))(x) == -1).all()
    for function in (
        torch.func.grad(lambda x: model(x).sum()),
        torch.func.vmap(lambda x: model(x)),
    ):
        torch._dynamo.reset()
        torch.compile(function, fullgraph=True, backend="eager")(x)  # must not break
    mapped = torch.compile(lambda x: torch.func.vmap(lambda t: model(t))(x), backend="eager")
    assert (mapped(x) == -1).all()
    torch._dynamo.reset()
    assert (torch.compile(model, fullgraph=True, backend="eager")(x) == 1).all()


def is_large(number: float) -> bool:
    return _is_large_constant(torch_private.as_constant(number))


@torch_private.constant_in_graphs
def _is_large_constant(number: float) -> bool:
    assert type(number) is float
    return number > 1.6


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_constant_is_guarded(dynamic: bool | None) -> None:
    model, x = Asks(is_large), torch.zeros(2)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")
    for number in (2.0, 1.5, 2.0, 1.75, 1, 0.1 + 0.2):
        model.number = number
        assert (compiled(x) == (1 if number > 1.6 else -1)).all(), number


def is_a_constant(number: float) -> bool:
    return torch_private.is_constant(number)


def is_for_all_sizes(number: float) -> bool:
    return torch_private.compiles_for_all_sizes()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_number_that_has_changed_is_a_variable() -> None:
    model, x = Asks(is_a_constant), torch.zeros(2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    can_tell = hasattr(torch.fx.experimental.symbolic_shapes, "has_static_value")
    answers = []
    for number in (2.0, 1.5, 1.25):
        model.number = number
        answers.append(bool((compiled(x) == 1).all()))
    assert answers == [True, not can_tell, not can_tell]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_a_graph_for_all_sizes_is_known(dynamic: bool | None) -> None:
    compiled = torch.compile(Asks(is_for_all_sizes), dynamic=dynamic, backend="eager")
    assert (compiled(torch.zeros(2)) == (1 if dynamic else -1)).all()
