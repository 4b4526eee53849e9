"""The maths that a foreign coupling block computes, found by running a copy of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.call import SidesCall, starts_in_place
from fastflow_kernels.coupling_forms import (
    CLAMP_FUNCTIONS,
    FORMS,
    Form,
    sides_of,
    sizes_of,
    spec_of,
)
from fastflow_kernels.probe import FixedSubnet, are_alike, probing
from fastflow_kernels.seen import Seen, may_read_state, record_reads
from fastflow_kernels.sides import evaluate
from fastflow_kernels.stock import PERMUTATION, Left, is_named, shallow_copy


class CouplingMaths(NamedTuple):
    """The maths that a coupling block computes.

    Attributes:
        form: The form of its class.
        clamp_function: "ATAN", "TANH" or "SIGMOID"; "" for an additive one.
        seen: What it reads of itself and of its class for that.
    """

    form: Form
    clamp_function: str
    seen: Seen


def form_of(cls: type) -> str | None:
    """Return the name of FrEIA's coupling block that a class is or derives from, or None."""
    return next((name for name in FORMS if is_named(cls, name)), None)


def identify(block: Any, cls: Any) -> CouplingMaths:
    """Find out what a coupling block computes, without changing it.

    Args:
        block: The block.
        cls: Its class, or the class that it had before it was accelerated.

    Raises:
        Left: The block computes something else than the fused block, may later do so unnoticed, or
            cannot be probed.
    """
    name = form_of(cls)
    assert name is not None  # the caller has asked
    form, stock = FORMS[name], next(base for base in cls.__mro__ if base.__name__ == name)
    for step in ("forward", "_coupling1", "_coupling2"):
        if step in vars(block) or getattr(cls, step, None) is not getattr(stock, step, None):
            raise Left(f"{cls.__name__} overrides {step}")
    names = [subnet for subnets in form.subnets for subnet in subnets]
    with probing(block, names, None):
        # With conditions the stock block copies the passive part, once for both subnets of a side.
        if len(names) == 4 and any(starts_in_place(block._modules[subnet]) for subnet in names):
            raise Left("its subnet starts with an in-place operation, which the side's other sees")
        seen = record_reads(block, cls, live={*names, "clamp"})
        f_clamp = vars(block).get("f_clamp")
        if not form.is_additive and may_read_state(f_clamp):
            raise Left("its clamp function reads variables around it, and those may change")
        functions = [""] if form.is_additive else list(CLAMP_FUNCTIONS)
        # large coefficients tell a function that is clipped; exp(s) must not overflow
        for clamp, largest in ((block.clamp, 1.0), (1.3, 100.0)):
            functions = _matching(block, cls, form, (clamp, largest), functions)
        if not functions:
            raise Left("it computes something else than FrEIA's block with a known clamp function")
        return CouplingMaths(form, functions[0], seen)


def _matching(
    block: Any, cls: Any, form: Form, case: tuple[float, float], functions: list[str]
) -> list[str]:
    """Return the clamp functions with which the fused block gives the stock block's results.

    Args:
        block: The block.
        cls: Its stock class.
        form: Its form.
        case: The clamp, and the factor of the largest coefficients; the smallest one's is 0.1.
        functions: Names of the functions to try.
    """
    clamp, largest = case
    probe, generator = shallow_copy(block, cls), torch.Generator("cpu").manual_seed(0)
    spatial = (2,) * (block.ndims - 1)

    def random(channels: int) -> Tensor:
        shape = 2, channels, *spatial
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    sizes, factor = sizes_of(block, form), 1 if form.is_additive else 2
    subnets = {}
    for names, (active, _) in zip(form.subnets, form.parts, strict=True):
        for name in names:
            a = random(sizes[active] * factor // len(names))
            factors = torch.linspace(0.1, largest, a.numel(), dtype=a.dtype, device="cpu")
            subnets[name] = FixedSubnet(a * factors.view(a.shape))
    probe.__dict__.update(_modules={**block._modules, **subnets}, clamp=clamp)
    x, c = random(sum(sizes)), [random(shape[0]) for shape in block.dims_c]
    stock = [_flat(cls.forward(probe, [x], c, rev=rev), subnets) for rev in (False, True)]
    matching = []
    for function in functions:
        spec = spec_of(form, clamp, function)
        call = SidesCall(x, c, sides_of(probe, form), sizes, spec)
        fused = []
        for rev in (False, True):
            y, log_det = evaluate(call._replace(rev=rev))
            fused.append(_flat(((y,), log_det), subnets))
        pairs = zip(sum(stock, []), sum(fused, []), strict=True)
        if all(are_alike(of_stock, of_fused) for of_stock, of_fused in pairs):
            matching.append(function)
    return matching


def _flat(results: tuple[Any, Any], subnets: dict[str, FixedSubnet]) -> list[Tensor]:
    """Return the output, the log-determinant and what the subnets have received."""
    (y,), log_det = results
    log_det = torch.as_tensor(log_det, dtype=y.dtype)
    return [y, log_det, *(subnet.received for subnet in subnets.values())]


def check_permutation(module: Any, cls: Any) -> None:
    """Check that a module permutes as FrEIA's PermuteRandom does, without changing it.

    Raises:
        Left: It does something else, or cannot be probed.
    """
    stock = next(base for base in cls.__mro__ if base.__name__ == PERMUTATION)
    if "forward" in vars(module) or getattr(cls, "forward", None) is not stock.forward:
        raise Left(f"{cls.__name__} overrides forward")
    reads_of_permutation(module, cls)
    try:
        if torch_private.is_symbolic():
            raise Left("tensors have no values here, under FakeTensorMode or while tracing")
        if module._parameters["perm"].is_meta:
            raise Left("its index is on the meta device; accelerate it once it holds values")
        index = [module._parameters[name].detach().cpu() for name in ("perm", "perm_inv")]
        x = torch.arange(2.0 * len(index[0]), device="cpu").view(2, -1)
        copied = shallow_copy(module, cls)
        copied.__dict__["_parameters"] = dict(zip(("perm", "perm_inv"), index, strict=True))
        results = [cls.forward(copied, [x], rev=rev) for rev in (False, True)]
    except Left:
        raise
    except Exception as error:
        raise Left(f"could not be probed: {type(error).__name__}: {error}") from error
    for ((y,), log_det), order in zip(results, index, strict=True):
        if log_det != 0 or not torch.equal(y, x[:, order]):
            raise Left("it computes something else than FrEIA's PermuteRandom")


def reads_of_permutation(module: Any, cls: Any) -> Seen:
    """Record what a permutation reads beside its index.

    Raises:
        Left: It may change unnoticed.
    """
    return record_reads(module, cls, live={"perm", "perm_inv"})
