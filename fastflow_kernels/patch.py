"""``accelerate(model)``, ``restore(model)``, ``report(model)``: the fused block, and reversible
chains, in models of FrEIA and anomalib.

A stock block stays the object it is, with its parameters, hooks and state-dict keys; only its class
is exchanged for a subclass of its own whose ``forward`` is the fused one. Containers that keep
references of their own (GraphINN's nodes) and optimizers notice nothing. What the block computes is
found by :mod:`fastflow_kernels.probe`; where that has changed since, ``forward`` is the stock
block's own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from fastflow_kernels import dispatch, modes, modules, probe
from fastflow_kernels.functional import all_in_one_block, check_conditions, single_input
from fastflow_kernels.permutations import IndexCache, IndexPermutation
from fastflow_kernels.probe import Left, Seen
from fastflow_kernels.reversible import Reversible, is_reversible
from fastflow_kernels.coupling import CouplingSpec

_Model = TypeVar("_Model", bound=nn.Module)

# --- what runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A block, or a chain of blocks.

    Attributes:
        name: Its name in the model, as ``named_modules`` gives it ("" for the model itself).
        kind: Its class, with the module that defines it.
        state: What runs. Of a block: "accelerated" or "fused" (built so), "stock maths"
            (accelerated or fused, but something that it reads was exchanged), "left" (a stock
            block, as it is). Of a chain: "reversible" or "left".
        changed: Whether :func:`~fastflow_kernels.accelerate` has changed its class.
        reason: How it was recognised, or why it runs as it does.
    """

    name: str
    kind: str
    state: str
    changed: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """What runs in a model, and why; see :func:`report`. ``print`` it.

    Attributes:
        entries: One per block, in the model's order.
        chains: One per chain that is a SequenceINN or was made from one.
    """

    entries: tuple[Entry, ...]
    chains: tuple[Entry, ...] = ()

    @property
    def changed(self) -> tuple[Entry, ...]:
        """The blocks that :func:`accelerate` has changed."""
        return tuple(entry for entry in self.entries if entry.changed)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The stock blocks that are as they were."""
        return tuple(entry for entry in self.entries if entry.state == "left")

    def __str__(self) -> str:
        fused = sum(entry.state in ("accelerated", "fused") for entry in self.entries)
        lines = [
            f"{fused} of {len(self.entries)} blocks run fused"
            if self.entries
            else "no AllInOneBlock found in the model"
        ]
        lines += [_line(entry) for entry in self.entries]
        if self.chains:
            reversible = sum(entry.state == "reversible" for entry in self.chains)
            lines.append(f"{reversible} of {len(self.chains)} chains are reversible")
            lines += [_line(entry) for entry in self.chains]
        return "\n".join(lines)


def _line(entry: Entry) -> str:
    return f"  {entry.state:<11} {entry.name or '(the model itself)'}  {entry.kind}: {entry.reason}"


def report(model: nn.Module) -> Report:
    """Say of every block and every chain in a model what runs, and why.

    It is found by asking the model as it is now, at any time, accelerated or not; nothing about the
    model changes.

    Args:
        model: Any module; a block itself will do.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.

    Example:
        >>> import torch
        >>> from fastflow_kernels import AllInOneBlock, report
        >>> print(report(torch.nn.Sequential(AllInOneBlock([(4,)], subnet_constructor=torch.nn.Linear))))
        1 of 1 blocks run fused
          fused       0  fastflow_kernels.modules.AllInOneBlock: dialect 'anomalib', SOFTPLUS, hard
          permutation; backend 'auto'
    """
    named = _modules_of(model)
    entries = [_entry_of_block(name, block) for name, block in named]
    chains = [_entry_of_chain(name, chain) for name, chain in named]
    return Report(
        tuple(entry for entry in entries if entry), tuple(entry for entry in chains if entry)
    )


def _entry_of_block(name: str, block: Any) -> Entry | None:
    kind = _kind(type(block))
    if isinstance(block, modules.AllInOneBlock):
        if block._overridden():
            reason = "a step is overridden, or its clamp, splits or softplus exchanged: its steps run one by one in plain operations"
            return Entry(name, kind, "stock maths", False, reason)
        maths = _in_words(block, block.dialect, block.global_affine_type)
        return Entry(name, kind, "fused", False, f"{maths}; backend {block.backend!r}")
    if isinstance(block, _Accelerated):
        held = block._fastflow
        if (changed := block._exchanged()) is not None:
            return Entry(
                name,
                kind,
                "stock maths",
                True,
                f"its {changed} is another one than when it was accelerated",
            )
        maths = _in_words(block, held.dialect, held.activation)
        return Entry(name, kind, "accelerated", True, f"computes {maths}; backend {held.backend!r}")
    if not probe.is_named(type(block)):
        return None
    try:
        maths = probe.identify(block, type(block))
    except Left as reason:
        return Entry(name, kind, "left", False, str(reason))
    words = _in_words(block, maths.dialect, maths.activation)
    return Entry(name, kind, "left", False, f"accelerate(model) would take it: computes {words}")


def _entry_of_chain(name: str, chain: Any) -> Entry | None:
    kind = _kind(type(chain))
    if isinstance(chain, Reversible):
        count = sum(map(is_reversible, chain.module_list))
        reason = f"{count} of its {len(chain.module_list)} modules are undone in the backward pass"
        return Entry(name, kind, "reversible", isinstance(chain, _Reversible), reason)
    if not probe.is_named(type(chain), "SequenceINN"):
        return None
    found = _made_reversible(probe.shallow_copy(chain, type(chain)))
    if found is None:
        return None
    would, reason = found
    return Entry(
        name,
        kind,
        "left",
        False,
        f"accelerate(model, reversible=True) would take it: {reason}" if would else reason,
    )


def _in_words(block: Any, dialect: str, activation: str) -> str:
    if block.householder:
        permutation = f"{block.householder} Householder reflections"
    elif modes.is_symbolic() or block.w_perm.is_meta:
        permutation = "a permutation that holds no values now"
    else:
        permutation = (
            "hard permutation"
            if isinstance(IndexCache().permutation(block), IndexPermutation)
            else "soft permutation"
        )
    return f"dialect {dialect!r}, {activation}, {permutation}"


def _kind(cls: type) -> str:
    cls = getattr(cls, "_fastflow_stock", cls)
    return f"{cls.__module__}.{cls.__qualname__}"


def _modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


# --- the two functions ----------------------------------------------------------------------------


def accelerate(model: _Model, *, backend: str = "auto", reversible: bool = False) -> _Model:
    """Make every AllInOneBlock of FrEIA or anomalib in ``model`` run fused, in place.

    Parameters and their identity, hooks, state-dict keys and values stay what they are. Each block
    is asked, by running a copy of it on a small input with random parameters, which maths it
    computes; a block that computes something else than expected, or whose class overrides a step of
    it, is left alone. :func:`report` says what was done. Something that a stock block reads in
    every call and that is exchanged later (``permute_function``, a step, the activation, ``clamp``
    for a tensor) takes effect: such a call runs the stock maths.

    Args:
        model: Any module; a block itself will do.
        backend: "auto", "eager" or "triton", for the changed blocks.
        reversible: Also make every SequenceINN of FrEIA train in memory that does not grow with its
            depth, as :class:`~fastflow_kernels.ReversibleSequence` does; its ``checkpoint_every``,
            ``debug`` and ``drift`` are attributes then, which can be set.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: An unknown backend.

    Warns:
        UserWarning: No block of the model runs fused afterwards, or no chain is reversible where
            that was asked for.

    Example:
        >>> import torch
        >>> from fastflow_kernels import AllInOneBlock, accelerate, report
        >>> model = torch.nn.Sequential(AllInOneBlock([(4,)], subnet_constructor=torch.nn.Linear))
        >>> model = accelerate(model)
        >>> print(report(model).entries[0].state)  # "accelerated" for a block of FrEIA or anomalib
        fused
    """
    dispatch.validated(backend)
    named = _modules_of(model)
    for _, block in named:
        if isinstance(block, _Accelerated) or (
            probe.is_named(type(block)) and not isinstance(block, modules.AllInOneBlock)
        ):
            _accelerate_block(block, backend)
    if reversible:
        for _, chain in named:
            _made_reversible(chain)
    missing = (
        []
        if any(_runs_fused(block) for _, block in named)
        else ["no block of the model runs fused"]
    )
    if reversible and not any(isinstance(chain, Reversible) for _, chain in named):
        missing.append(
            "no chain of the model was made reversible (a SequenceINN can be, a GraphINN cannot)"
        )
    if missing:
        warnings.warn(
            f"{' and '.join(missing)}; print(fastflow_kernels.report(model)) says why",
            UserWarning,
            stacklevel=2,
        )
    return model


def restore(model: _Model) -> _Model:
    """Give every block and chain that :func:`accelerate` changed its own class back, in place.

    Args:
        model: The model given to :func:`accelerate`, a copy of it, or a part.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        RuntimeError: The class of a changed block or chain was changed again since, by a
            parametrization for instance. Nothing is restored then.
    """
    changed = [
        (name, part)
        for name, part in _modules_of(model)
        if isinstance(part, (_Accelerated, _Reversible))
    ]
    stuck = [name or "the model itself" for name, part in changed if not _can_be_restored(part)]
    if stuck:
        raise RuntimeError(
            f"cannot restore {', '.join(stuck)}: the class was changed again since accelerate (by "
            "a parametrization or by FSDP, perhaps). "
            "Undo that first; nothing was restored"
        )
    for _, part in changed:
        for attribute in _addition(part)._fastflow_attributes:
            part.__dict__.pop(attribute, None)
        part.__class__ = part._fastflow_stock
    return model


def _can_be_restored(part: Any) -> bool:
    return type(part) is _derived(_addition(part), part._fastflow_stock)


def _addition(part: Any) -> Any:
    """What accelerate has added to the class of a block or chain."""
    return _Accelerated if isinstance(part, _Accelerated) else _Reversible


def _runs_fused(block: Any) -> bool:
    if isinstance(block, modules.AllInOneBlock):
        return not block._overridden()
    return isinstance(block, _Accelerated) and block._exchanged() is None


def _accelerate_block(block: Any, backend: str) -> None:
    """Exchange the class of a stock block, if it computes one of the known forms; ask an
    accelerated one again if it has changed since.
    """
    is_accelerated = isinstance(block, _Accelerated)
    if is_accelerated:
        block.__dict__["_fastflow"] = replace(block._fastflow, backend=backend)
        if block._exchanged() is None:
            return
    cls: Any = block._fastflow_stock if is_accelerated else type(block)
    try:
        maths = probe.identify(block, cls)
    except Left:
        return
    # a stock pass leaves its product here, which keeps a graph alive and breaks deepcopy
    if block.householder:
        block.w_perm = block.w_perm_inv = None
    held = _Held(maths.dialect, maths.activation, backend, maths.is_sized, maths.seen)
    # now, for the first forward may be a compiled one, which cannot look
    held.index.permutation(block)
    block.__dict__["_fastflow"] = held
    if not is_accelerated:
        block.__class__ = _derived(_Accelerated, cls)


# --- the accelerated block ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """What an accelerated block knows beside its own attributes."""

    dialect: str
    activation: str
    backend: str
    is_sized: bool  # whether the stock block refuses other spatial sizes than the declared one
    seen: Seen
    index: IndexCache = field(default_factory=IndexCache)


if TYPE_CHECKING:
    _Stock = nn.Module  # the stock block's class, which an accelerated one derives from beside this
else:
    _Stock = object


class _Accelerated(_Stock):
    """What the class of an accelerated block adds to its own."""

    _fastflow: _Held
    _fastflow_stock: type
    _fastflow_attributes = ("_fastflow",)

    # the stock block's
    in_channels: int
    input_rank: int
    conditional: bool
    condition_channels: int
    dims_c: Sequence[Sequence[int]]
    clamp: float
    GIN: bool
    reverse_pre_permute: bool
    dims_in: Sequence[tuple[int, ...]]
    global_scale: Tensor
    global_offset: Tensor
    subnet: nn.Module

    def forward(
        self,
        x: Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
        *,
        run: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[tuple[Tensor], Tensor]:
        """The fused form of the stock block's forward; see
        :class:`fastflow_kernels.AllInOneBlock`.
        """
        held = self._fastflow
        if self._exchanged() is not None:
            return super().forward(x, *(() if c is None else (c,)), rev=rev, jac=jac)
        given, x = (
            x,
            single_input(
                x,
                self.in_channels,
                self.input_rank,
                tuple(self.dims_in[0]) if held.is_sized else None,
            ),
        )
        if not x.is_floating_point():  # integers promote, step by step
            return super().forward(given, *(() if c is None else (c,)), rev=rev, jac=jac)
        # where parameters are found at once, if they are not parametrized: see
        # permutations.parameter
        own = self._parameters
        scale, offset = own.get("global_scale"), own.get("global_offset")
        y, logdet = (run or all_in_one_block)(
            x,
            self.subnet,
            self.global_scale if scale is None else scale,
            self.global_offset if offset is None else offset,
            held.index.permutation(self, rev, x),
            CouplingSpec.of(self.clamp, held.dialect, held.activation, self.GIN),
            check_conditions(c, self.dims_c, x),
            rev=rev,
            reverse_permutation=self.reverse_pre_permute,
            backend=held.backend,
        )
        return (y,), logdet

    def _exchanged(self) -> str | None:
        """The name of what the stock block reads and what is another one since the block was asked:
        then the stock maths runs.
        """
        held, clamp = self._fastflow, self.__dict__.get("clamp")
        if not probe.is_number(clamp) or (held.dialect == "freia" and clamp == 0):
            return "clamp"
        return held.seen.changed(self)

    def _takes_run(self) -> bool:
        """Whether ``forward`` is this class's own and hands everything to ``run``."""
        return type(self).forward is _Accelerated.forward and self._exchanged() is None

    def extra_repr(self) -> str:
        held, own = self._fastflow, super().extra_repr()
        return f"{own}{', ' if own else ''}accelerated, dialect={held.dialect!r}, backend={held.backend!r}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._exchanged() is None:
            # now, because the next forward may be a compiled one, which cannot look
            self._fastflow.index.permutation(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """As torch has it, but for what no copy takes: FrEIA's lambdas, and the product of
        reflections that a stock pass leaves behind.
        """
        state, held = self.__dict__.copy(), self._fastflow
        state |= {
            name: None
            for name in ("w_perm", "w_perm_inv")
            if isinstance(state.get(name), Tensor) and state[name].grad_fn
        }
        stand_ins: dict[str, Any] = {"global_scale_activation": probe.Activation(held.activation)}
        if getattr(getattr(self, "w_perm", None), "ndim", 0) == 1:
            stand_ins["permute_function"] = _take_channels
        lambdas = [
            name for name in stand_ins if "<lambda>" in getattr(state.get(name), "__qualname__", "")
        ]
        stand_ins = {
            name: stand_ins[name] for name in lambdas if held.seen.holds(name, state[name])
        }
        if stand_ins:
            state |= {
                **stand_ins,
                "_fastflow": replace(held, seen=held.seen.with_values(**stand_ins)),
            }
        return _new, (_Accelerated, self._fastflow_stock), state


def _take_channels(x: Tensor, index: Tensor) -> Tensor:
    """The permute_function of FrEIA's main branch for an index."""
    return x[:, index]


@cache
def _derived(addition: type, cls: type) -> Any:
    """The subclass of a stock class that has what ``addition`` adds."""
    name = f"{addition.__name__.removeprefix('_')}{cls.__name__}"
    return type(
        name,
        (addition, cls),
        {"__module__": __name__, "__doc__": cls.__doc__, "_fastflow_stock": cls},
    )


def _new(addition: type, cls: type) -> nn.Module:
    """An empty instance, for pickle, which finds no class of :func:`_derived` by its name."""
    derived = _derived(addition, cls)
    return derived.__new__(derived)


# --- chains ---------------------------------------------------------------------------------------


class _Reversible(Reversible):
    """What the class of a SequenceINN that was made reversible adds to its own."""

    _fastflow_stock: type
    _fastflow_attributes = ("_checkpoint_every", "debug", "drift", "_measured_spacing")

    def __getitem__(self, item: int | slice) -> Any:
        """As the stock class has it; where that makes a chain of a slice, this is reversible,
        too.
        """
        stock: Any = super()
        part = stock.__getitem__(item)
        if isinstance(item, slice):
            _made_reversible(part)
            if isinstance(part, Reversible):
                part.checkpoint_every, part.debug = self.checkpoint_every, self.debug
        return part

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _new, (_Reversible, self._fastflow_stock), self.__dict__.copy()


def _made_reversible(chain: Any) -> tuple[bool, str] | None:
    """Make a SequenceINN reversible: whether that was done, and why; None for another module."""
    if isinstance(chain, Reversible):
        return False, "is reversible already"
    cls: type = type(chain)
    stock: Any = next(
        (
            base
            for base in cls.__mro__
            if base.__name__ == "SequenceINN" and "forward" in vars(base)
        ),
        None,
    )
    if stock is None:
        return None
    if getattr(cls, "forward", None) is not stock.forward or "forward" in vars(chain):
        return False, f"{cls.__name__} overrides forward"
    try:
        reversible = _derived(_Reversible, cls)
        alike = all(
            _answers(cls, chain, rev) == _answers(reversible, chain, rev) for rev in (False, True)
        )
    except Exception as error:
        return False, f"it could not be asked: {type(error).__name__}: {error}"
    if not alike:
        return False, "it computes something else than FrEIA's SequenceINN"
    chain.__class__ = reversible
    count = sum(map(is_reversible, chain.module_list))
    return True, f"{count} of its {len(chain.module_list)} modules are undone in the backward pass"


class _Step(nn.Module):
    """A module of one number: x -> factor * x + c, with itself for a log-determinant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], float]:
        return (self.factor * x[0] + sum(c),), self.factor * (1 + 2 * rev + 4 * jac)


def _answers(cls: type, chain: Any, rev: bool) -> list[float]:
    """What a chain of two such modules, the second with a condition, returns as one of class
    ``cls``.
    """
    asked = copy.copy(chain)
    asked.__class__ = cls
    asked.__dict__["_modules"] = {"module_list": nn.ModuleList([_Step(2.0), _Step(3.0)])}
    asked.conditions, asked.force_tuple_output = [None, 1], False
    y, log_det = asked.forward(
        torch.ones(1), [torch.ones(1), torch.full((1,), 7.0)], rev=rev, jac=not rev
    )
    return [float(y), float(log_det)]
