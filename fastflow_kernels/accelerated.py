"""The classes that accelerate gives to stock blocks and chains.

:mod:`fastflow_kernels.probe` finds out what a block computes. If the block has changed since then,
its ``forward`` runs the stock block's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor, nn

from fastflow_kernels.call import (
    BlockCall,
    check_conditions,
    single_input,
)
from fastflow_kernels.chain import FusedChain
from fastflow_kernels.coupling import CouplingSpec
from fastflow_kernels.coupling_forms import KEPT
from fastflow_kernels.index_cache import IndexCache
from fastflow_kernels.modules import FusedForward
from fastflow_kernels.predicates import autocast_dtype
from fastflow_kernels.probe import Maths
from fastflow_kernels.reversible import OWN_ATTRIBUTES, ReversibleChain, is_reversible
from fastflow_kernels.seen import Activation, Seen, is_number
from fastflow_kernels.stock import SEQUENCE


@dataclass(frozen=True)
class Held:
    """What an accelerated block keeps beside its own attributes: mainly the probe's result."""

    dialect: str
    activation: str
    backend: str
    is_sized: bool  # whether the stock block refuses other spatial sizes than the declared one
    seen: Seen
    half_output: bool = False
    index: IndexCache = field(default_factory=IndexCache)


if TYPE_CHECKING:
    _Stock = nn.Module  # stands for the stock block's class, the other base class
else:
    _Stock = object


class AcceleratedModule(FusedForward, _Stock):
    """A mixin that makes a stock block of any kind run fused."""

    _fastflow_prefix = "Accelerated"
    _fastflow_attributes: tuple[str, ...] = ("_fastflow",)
    _fastflow_stock: Any

    _fastflow: Any

    dims_c: Sequence[Sequence[int]]  # the stock block's
    clamp: float

    def _why_not_fused(self) -> str | None:
        changed = self._find_change()
        return changed and f"its {changed} has changed since it was accelerated"

    def _find_change(self) -> str | None:
        """Return the name of something that the stock block reads and that has changed, or None."""
        if not is_number(self.__dict__.get("clamp")):
            return "clamp"
        return self._fastflow.seen.find_change(self)

    def _stock_forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool, jac: bool
    ) -> tuple[tuple[Tensor], Tensor]:
        conditions = () if c is None else (c,)
        result: tuple[tuple[Tensor], Tensor] = self._fastflow_stock.forward(
            self, x, *conditions, rev=rev, jac=jac
        )
        return result

    def _describe(self) -> str:
        raise NotImplementedError

    def extra_repr(self) -> str:
        own, added = super().extra_repr(), f"accelerated, {self._describe()}"
        return f"{own}, {added}" if own else added

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != KEPT}
        return _new, (_mixin_of(self), self._fastflow_stock), state


class AcceleratedBlock(AcceleratedModule):
    """A mixin that makes a stock AllInOneBlock run fused."""

    _is_all_in_one = True
    _fastflow: Held

    # the stock block's
    in_channels: int
    input_rank: int
    GIN: bool
    reverse_pre_permute: bool
    dims_in: Sequence[tuple[int, ...]]
    global_scale: Tensor
    global_offset: Tensor
    subnet: nn.Module

    def _find_change(self) -> str | None:
        held, clamp = self._fastflow, self.__dict__.get("clamp")
        if not is_number(clamp) or (held.dialect == "freia" and clamp == 0):
            return "clamp"
        return held.seen.find_change(self)

    def _checked_call(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool
    ) -> BlockCall | None:
        held = self._fastflow
        if self._find_change() is not None:
            return None
        shape = tuple(self.dims_in[0]) if held.is_sized else None
        x = single_input(x, self.in_channels, self.input_rank, shape)
        if not x.is_floating_point():  # the stock block's steps promote integers
            return None
        # parameter_of, inlined: calling it takes 1% of a small call
        own = self._parameters
        scale, offset = own.get("global_scale"), own.get("global_offset")
        return BlockCall(
            x,
            check_conditions(c, self.dims_c, x),
            self.subnet,
            self.global_scale if scale is None else scale,
            self.global_offset if offset is None else offset,
            held.index.permutation(self, rev, x if held.backend == "auto" else None),
            CouplingSpec.of(self.clamp, held.dialect, held.activation, self.GIN),
            rev,
            self.reverse_pre_permute,
            held.backend,
            autocast_dtype(x, self.global_scale) if held.half_output and not rev else None,
        )

    def _describe(self) -> str:
        return f"dialect={self._fastflow.dialect!r}, backend={self._fastflow.backend!r}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._find_change() is None:
            self._fastflow.index.refresh(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Reduce the block as torch does, without what cannot be copied.

        That is FrEIA's lambdas, and the product of reflections that a stock pass leaves behind.
        """
        state, held = self.__dict__.copy(), self._fastflow
        for name in ("w_perm", "w_perm_inv"):
            if isinstance(state.get(name), Tensor) and state[name].grad_fn:
                state[name] = None
        stand_ins: dict[str, Any] = {"global_scale_activation": Activation(held.activation)}
        if getattr(getattr(self, "w_perm", None), "ndim", 0) == 1:
            stand_ins["permute_function"] = _take_channels
        stand_ins = {
            name: stand_in
            for name, stand_in in stand_ins.items()
            if "<lambda>" in getattr(state.get(name), "__qualname__", "")
            and held.seen.is_unchanged(name, state[name])
        }
        if stand_ins:
            seen = held.seen.with_values(**stand_ins)
            state |= {**stand_ins, "_fastflow": replace(held, seen=seen)}
        return _new, (AcceleratedBlock, self._fastflow_stock), state


def _take_channels(x: Tensor, index: Tensor) -> Tensor:
    """Permute channels by an index, as the permute_function of FrEIA's main branch does."""
    return x[:, index]


class AcceleratedSequence(FusedChain):
    """A mixin that makes a SequenceINN evaluate consecutive blocks together."""

    _fastflow_prefix = "Accelerated"
    _fastflow_attributes: tuple[str, ...] = ()
    _fastflow_stock: Any
    _fastflow_forward: Any  # the stock class's forward when the chain was accelerated

    def forward(
        self,
        x_or_z: Tensor | Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[Any, Any]:
        """Evaluate the chain as :class:`FusedChain` does, unless its class has another forward."""
        stock = self._fastflow_stock
        if stock.forward is not type(self)._fastflow_forward:
            result: tuple[Any, Any] = stock.forward(self, x_or_z, c, rev, jac)
            return result
        return super().forward(x_or_z, c, rev, jac)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _new, (_mixin_of(self), self._fastflow_stock), self.__dict__.copy()


class AcceleratedChain(AcceleratedSequence, ReversibleChain):
    """A mixin that makes a SequenceINN reversible, too."""

    _fastflow_prefix = "Reversible"
    _fastflow_attributes = OWN_ATTRIBUTES

    def __getitem__(self, item: int | slice) -> Any:
        """Return what the stock class returns. The chain of a slice is reversible, too."""
        stock: Any = super()
        part = stock.__getitem__(item)
        if isinstance(item, slice):
            make_reversible(part)
            if isinstance(part, ReversibleChain):
                part.checkpoint_every, part.debug = self.checkpoint_every, self.debug
        return part


# --- replacing a class ----------------------------------------------------------------------------


def hold(block: Any, maths: Maths, backend: str, half_output: bool) -> None:
    """Turn a stock block into an accelerated one, or renew what an accelerated block holds."""
    # A stock pass leaves the product of reflections here, which keeps a graph alive and breaks
    # deepcopy.
    if block.householder:
        block.w_perm = block.w_perm_inv = None
    held = Held(maths.dialect, maths.activation, backend, maths.is_sized, maths.seen, half_output)
    held.index.refresh(block)
    change_class(block, held, AcceleratedBlock)


def change_class(block: Any, held: Any, mixin: Any) -> None:
    """Give a stock module a subclass of its class, with a mixin and what that keeps."""
    block.__dict__["_fastflow"] = held
    if not isinstance(block, mixin):
        cls: Any = type(block)
        block.__class__ = _derive(mixin, cls)


def held_by(block: Any) -> Any:
    """Return what an accelerated block keeps beside its own attributes."""
    return block._fastflow


def set_options(block: Any, backend: str, half_output: bool) -> None:
    """Set the options of an accelerated block, as far as its kind has them."""
    held = block._fastflow
    if isinstance(held, Held):
        block.__dict__["_fastflow"] = replace(held, backend=backend, half_output=half_output)
    elif not isinstance(held, IndexCache):
        block.__dict__["_fastflow"] = replace(held, backend=backend)


def make_reversible(chain: Any) -> tuple[bool, str] | None:
    """Make a SequenceINN reversible, if it computes what FrEIA's does.

    Returns:
        Whether it was made reversible now, and the reason in words. None for any other module.
    """
    if isinstance(chain, ReversibleChain):
        return False, "is reversible already"
    return _change_chain(chain, AcceleratedChain)


def make_fused(chain: Any) -> tuple[bool, str] | None:
    """Make a SequenceINN evaluate consecutive blocks together, as :func:`make_reversible` does."""
    if isinstance(chain, FusedChain):
        return False, "is fused already"
    return _change_chain(chain, AcceleratedSequence)


def _change_chain(chain: Any, mixin: Any) -> tuple[bool, str] | None:
    cls: type = class_before(chain)
    bases = (base for base in cls.__mro__ if base.__name__ == SEQUENCE)
    stock: Any = next((base for base in bases if "forward" in vars(base)), None)
    if stock is None:
        return None
    if getattr(cls, "forward", None) is not stock.forward or "forward" in vars(chain):
        return False, f"{cls.__name__} overrides forward"
    try:
        derived = _derive(mixin, cls)
        is_alike = all(
            _run_as(cls, chain, rev) == _run_as(derived, chain, rev) for rev in (False, True)
        )
    except Exception as error:
        return False, f"could not be probed: {type(error).__name__}: {error}"
    if not is_alike:
        return False, "it computes something else than FrEIA's SequenceINN"
    chain.__class__ = derived
    return True, describe_chain(chain)


def describe_chain(chain: Any) -> str:
    """Say how the modules of a chain run."""
    count, size = sum(map(is_reversible, chain.module_list)), len(chain.module_list)
    if isinstance(chain, ReversibleChain):
        return f"{count} of its {size} modules are reconstructed in the backward pass"
    return "consecutive AllInOneBlocks run together"


def class_before(part: Any) -> Any:
    """Return the class that a block or chain had before accelerate, or has if it is unchanged."""
    is_changed = isinstance(part, AcceleratedModule | AcceleratedSequence)
    return part._fastflow_stock if is_changed else type(part)


def can_be_restored(part: Any) -> bool:
    """Return whether the class of a changed block or chain is the one that accelerate gave it."""
    return type(part) is _derive(_mixin_of(part), part._fastflow_stock)


def give_back_class(part: Any) -> None:
    """Give a changed block or chain its stock class back."""
    for attribute in _mixin_of(part)._fastflow_attributes:
        part.__dict__.pop(attribute, None)
    part.__class__ = part._fastflow_stock


def _mixin_of(part: Any) -> Any:
    """Return the mixin that accelerate has added to the class of a block or chain."""
    return next(base for base in type(part).__mro__ if "_fastflow_stock" in vars(base)).__bases__[0]


@cache
def _derive(mixin: Any, cls: Any) -> Any:
    """Return the subclass of a stock class with a mixin as its first base."""
    attributes = {
        "__module__": __name__,
        "__doc__": cls.__doc__,
        "_fastflow_stock": cls,
        "_fastflow_forward": cls.forward,
    }
    return type(f"{mixin._fastflow_prefix}{cls.__name__}", (mixin, cls), attributes)


def _new(mixin: type, cls: type) -> nn.Module:
    """Return an empty instance of a class of :func:`_derive`, which pickle cannot find by name.

    Pickles refer to this function: it keeps its name.
    """
    derived = _derive(mixin, cls)
    instance: nn.Module = derived.__new__(derived)
    return instance


class _Step(nn.Module):
    """A module that computes factor * x + c.

    Its log-determinant tells the factor and how it was called.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], float]:
        return (self.factor * x[0] + sum(c),), self.factor * (1 + 2 * rev + 4 * jac)


def _run_as(cls: type, chain: Any, rev: bool) -> list[float]:
    """Run a copy of a chain as an instance of ``cls``, with two :class:`_Step` for modules.

    The second module takes a condition.

    Returns:
        The output and the log-determinant.
    """
    probe = copy.copy(chain)
    probe.__class__ = cls
    probe.__dict__["_modules"] = {"module_list": nn.ModuleList([_Step(2.0), _Step(3.0)])}
    probe.conditions, probe.force_tuple_output = [None, 1], False
    y, log_det = probe.forward(
        torch.ones(1), [torch.ones(1), torch.full((1,), 7.0)], rev=rev, jac=not rev
    )
    return [float(y), float(log_det)]
