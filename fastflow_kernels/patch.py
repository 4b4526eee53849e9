"""``accelerate(model)`` and ``restore(model)``: the fused block, and reversible chains, inside models that hold FrEIA's or anomalib's.

A stock block stays the object it is, with its parameters, hooks and state-dict keys; only its class is exchanged for a subclass of its own
whose ``forward`` is the fused one. Containers that keep references of their own (GraphINN's nodes) and optimizers notice nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor, nn

from fastflow_kernels import dispatch, eager, modules
from fastflow_kernels.functional import all_in_one_block, check_conditions, single_input, starts_in_place
from fastflow_kernels.permutations import IndexCache, IndexPermutation
from fastflow_kernels.reversible import Reversible, is_reversible
from fastflow_kernels.spec import ACTIVATIONS, DIALECTS, CouplingSpec

_STEPS = ("forward", *modules.STEPS)


# --- what was done -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One block that was looked at.

    Attributes:
        name: Its name in the model, as ``named_modules`` gives it ("" for the model itself).
        kind: Its class, with the module that defines it.
        changed: Whether it was changed.
        reason: How it was recognised, or why it was left as it is.
    """

    name: str
    kind: str
    changed: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` or :func:`restore` did; ``print`` it.

    Attributes:
        action: "accelerated" or "restored".
        entries: One per block found, in the model's order.
        chains: One per chain found, where reversible chains were asked for.
        reversible: Whether they were.
    """

    action: str
    entries: tuple[Entry, ...]
    chains: tuple[Entry, ...] = ()
    reversible: bool = False

    @property
    def changed(self) -> tuple[Entry, ...]:
        """The blocks that were changed."""
        return tuple(entry for entry in self.entries if entry.changed)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The blocks that were left as they are."""
        return tuple(entry for entry in self.entries if not entry.changed)

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} of {len(self.entries)} blocks {self.action}"]
        if not self.entries:
            lines = ["no AllInOneBlock found in the model"]
        lines += [f"  {self.action if entry.changed else 'left':<11} {_line(entry)}" for entry in self.entries]
        if self.reversible and not self.chains:
            lines.append("no SequenceINN found: no chain was made reversible (a GraphINN cannot be)")
        if self.chains:
            changed = sum(entry.changed for entry in self.chains)
            lines.append(f"{changed} of {len(self.chains)} chains {'restored' if self.action == 'restored' else 'made reversible'}")
            lines += [f"  {'changed' if entry.changed else 'left':<11} {_line(entry)}" for entry in self.chains]
        return "\n".join(lines)


def _line(entry: Entry) -> str:
    return f"{entry.name or '(the model itself)'}  {entry.kind}: {entry.reason}"


class _Left(Exception):
    """A block must be left alone; the message says why."""


# --- the two functions -------------------------------------------------------------------------------------------------------------


def accelerate(model: nn.Module, *, backend: str = "auto", reversible: bool = False) -> Report:
    """Make every AllInOneBlock of FrEIA or anomalib in ``model`` run fused, in place.

    Parameters and their identity, hooks, state-dict keys and values stay what they are. Each block is asked, by running a copy of it on a
    small input with random parameters, which maths it computes; a block that computes something else than expected, or whose class
    overrides a step of it, is left alone.

    Args:
        model: Any module; a block itself will do.
        backend: "auto", "eager" or "triton", for the changed blocks.
        reversible: Also make every SequenceINN of FrEIA train in memory that does not grow with its depth, as
            :class:`~fastflow_kernels.ReversibleSequence` does; its ``checkpoint_every``, ``debug`` and ``drift`` are attributes then,
            which can be set.

    Returns:
        What was changed and what was left, with reasons.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: An unknown backend.

    Example:
        >>> import torch
        >>> from fastflow_kernels import accelerate
        >>> print(accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2))))
        no AllInOneBlock found in the model
    """
    dispatch.validated(backend)
    entries, chains = [], []
    for name, block in _modules_of(model):
        kind = _kind(type(block))
        if isinstance(block, modules.AllInOneBlock):
            entries.append(Entry(name, kind, False, "is fused already"))
        elif isinstance(block, _Accelerated):
            changed, block._fastflow.backend = block._fastflow.backend != backend, backend
            entries.append(Entry(name, kind, changed, f"was accelerated already; backend is {backend!r}{' now' if changed else ''}"))
        elif (stock := _stock_class(type(block))) is not None:
            try:
                dialect, activation = _identify(block, stock)
            except _Left as reason:
                entries.append(Entry(name, kind, False, str(reason)))
                continue
            _exchange(block, dialect, activation, backend)
            entries.append(Entry(name, kind, True, f"computes dialect {dialect!r}, {activation}, {_permutation_kind(block)}"))
    for name, chain in _modules_of(model) if reversible else ():
        kind = _kind(type(chain))
        if (found := _made_reversible(chain)) is not None:
            chains.append(Entry(name, kind, *found))
    return Report("accelerated", tuple(entries), tuple(chains), reversible)


def restore(model: nn.Module) -> Report:
    """Give every block and chain that :func:`accelerate` changed its own class back, in place.

    Args:
        model: The model given to :func:`accelerate`, a copy of it, or a part.

    Returns:
        What was restored.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    entries: list[Entry] = []
    chains: list[Entry] = []
    for name, block in _modules_of(model):
        if isinstance(block, (_Accelerated, _Reversible)):
            addition = _Accelerated if isinstance(block, _Accelerated) else _Reversible
            found = entries if addition is _Accelerated else chains
            if type(block) is not _derived(addition, block._fastflow_stock):
                found.append(Entry(name, _kind(type(block)), False, "its class was changed since (parametrized, perhaps): undo that first"))
                continue
            for attribute in addition._fastflow_attributes:
                block.__dict__.pop(attribute, None)
            block.__class__ = block._fastflow_stock
            found.append(Entry(name, _kind(type(block)), True, "has its own class again"))
        elif isinstance(block, modules.AllInOneBlock):
            entries.append(Entry(name, _kind(type(block)), False, "was built fused, not made so by accelerate"))
    return Report("restored", tuple(entries), tuple(chains))


def _modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _permutation_kind(block: Any) -> str:
    if block.householder:
        return f"{block.householder} Householder reflections"
    return "hard permutation" if isinstance(IndexCache().permutation(block), IndexPermutation) else "soft permutation"


def _kind(cls: type) -> str:
    cls = getattr(cls, "_fastflow_stock", cls)
    return f"{cls.__module__}.{cls.__qualname__}"


# --- which class, which maths ------------------------------------------------------------------------------------------------------


def _stock_class(cls: type) -> type | None:
    """The AllInOneBlock that ``cls`` is or derives from, by name and methods: models also carry vendored copies of it."""
    for base in cls.__mro__:
        if base.__name__ == "AllInOneBlock" and {"forward", "_affine", "_permute"} <= vars(base).keys():
            return base
    return None


def _identify(block: Any, stock: Any) -> tuple[str, str]:
    """Dialect and activation of a stock block, found by asking it; _Left if it computes anything else."""
    for step in _STEPS:
        if step in vars(block) or getattr(type(block), step, None) is not getattr(stock, step, None):
            raise _Left(f"{type(block).__name__} overrides {step}")
    try:
        if block.global_scale.is_meta:
            raise _Left("its parameters are on the meta device; accelerate it once they hold values")
        if isinstance(block.clamp, Tensor):
            raise _Left("its clamp is a tensor; the fused block takes a number")
        if not block.conditional and starts_in_place(block.subnet):
            raise _Left("its subnet starts with an in-place operation, which changes the stock block's passive half")
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(block.global_scale.device.type, enabled=False):
            return _compare(_Probe(block, stock))
    except _Left:
        raise
    except Exception as error:
        raise _Left(f"it could not be asked: {type(error).__name__}: {error}") from error


class _Fixed(nn.Module):
    """A subnet that returns the same coefficients whatever it is given, and keeps that."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a, self.given = a, a

    def forward(self, x: Tensor) -> Tensor:
        self.given = x.clone()
        return self.a.clone()  # the stock block writes to what it gets


class _Probe:
    """A shallow copy of a block with random global affine and a fixed subnet: the block itself is not touched."""

    def __init__(self, block: Any, stock: Any) -> None:
        self.stock, self.generator = stock, torch.Generator().manual_seed(0)
        self.block = copy.copy(block)
        # in float64, for with a clamp near 1 the two formulas differ by little
        dtype = torch.float32 if block.global_scale.device.type == "mps" else torch.float64
        parameters = {name: p.to(dtype) if p is not None and p.is_floating_point() else p for name, p in block._parameters.items()}
        like = parameters["global_scale"]
        self.scale, self.offset = self._random(like.shape, like), self._random(like.shape, like)
        parameters |= {"global_scale": self.scale, "global_offset": self.offset}
        self.block.__dict__["_parameters"] = parameters
        self.block.__dict__["_modules"] = dict(block._modules)

    def _random(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(like)

    def ask(self, spatial: Sequence[int]) -> tuple[Tensor, list[Tensor], Tensor, list[tuple[Tensor, ...]]]:
        """Input, conditions, coefficients and the stock block's answers, forward and in reverse: y, log-det, what the subnet was given."""
        channels, passive = self.block.in_channels, sum(self.block.splits[1:])
        x = self._random((2, channels, *spatial), self.scale)
        a = 10.0 * self._random((2, 2 * passive, *spatial), self.scale)
        self.block._modules["subnet"] = subnet = _Fixed(a)
        c = [self._random((2, shape[0], *spatial), self.scale) for shape in self.block.dims_c]
        answers: list[tuple[Tensor, ...]] = []
        for rev in (False, True):
            (y,), logdet = self.stock.forward(self.block, [x], c, rev=rev)
            answers.append((y, logdet, subnet.given))
        return x, c, a, answers


def _compare(probe: _Probe) -> tuple[str, str]:
    block = probe.block
    rank = block.input_rank
    try:
        x, c, a, answers = probe.ask((2,) * rank)
    except (RuntimeError, ValueError):  # some take the declared size only: FrEIA's main branch, the reference
        x, c, a, answers = probe.ask(tuple(block.dims_in[0][1:]))
    samples = torch.linspace(-3.0, 60.0, 64).to(x)
    activations = [name for name in ACTIVATIONS if _alike(block.global_scale_activation(samples), eager.scale_of(samples, name))]
    if not activations:
        raise _Left("its global_scale_activation is none of SIGMOID, SOFTPLUS, EXP")
    for dialect in DIALECTS:
        if block.clamp == 0 and dialect == "freia":
            continue
        spec = CouplingSpec.of(block.clamp, dialect, activations[0], block.GIN)
        subnet = _Fixed(a)
        ours: list[tuple[Tensor, ...]] = []
        arguments = (subnet, probe.scale, probe.offset, IndexCache().permutation(block), spec, c)
        for rev in (False, True):
            result = all_in_one_block(x, *arguments, rev=rev, reverse_permutation=block.reverse_pre_permute, backend="eager")
            ours.append((*result, subnet.given))
        if all(_alike(theirs, mine) for pair in zip(answers, ours, strict=True) for theirs, mine in zip(*pair, strict=True)):
            return dialect, activations[0]
    raise _Left("it computes something else than either known form of the block")


def _alike(theirs: Tensor, ours: Tensor) -> bool:
    tolerance = 1e-9 if theirs.dtype is torch.float64 else 1e-3  # far above rounding, far below what tells two formulas apart
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= tolerance * ours.abs().max().clamp(min=1.0))


# --- the accelerated block ---------------------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """What an accelerated block knows beside its own attributes."""

    dialect: str
    activation: str
    backend: str
    function: Any  # the block's own global_scale_activation, where that is an attribute
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
        run: Callable[..., tuple[Tensor, Tensor]] = all_in_one_block,
    ) -> tuple[tuple[Tensor], Tensor]:
        """The fused form of the stock block's forward; see :class:`fastflow_kernels.AllInOneBlock`."""
        held = self._fastflow
        if self._exchanged():
            return super().forward(x, c, rev=rev, jac=jac)
        x = single_input(x, self.in_channels, self.input_rank)
        y, logdet = run(
            x,
            self.subnet,
            self.global_scale,
            self.global_offset,
            held.index.permutation(self, rev, x),
            CouplingSpec.of(self.clamp, held.dialect, held.activation, self.GIN),
            self._checked_conditions(c, x),
            rev=rev,
            reverse_permutation=self.reverse_pre_permute,
            backend=held.backend,
        )
        return (y,), logdet

    def _exchanged(self) -> bool:
        """Whether a step was exchanged on this very block since."""
        own = self.__dict__
        return own.get("global_scale_activation") is not self._fastflow.function or modules.has_any(own, _STEPS)

    def _takes_run(self) -> bool:
        """Whether ``forward`` is this class's own and hands everything to ``run``."""
        return type(self).forward is _Accelerated.forward and not self._exchanged()

    def _checked_conditions(self, c: Sequence[Tensor] | None, x: Tensor) -> Sequence[Tensor]:
        if not self.conditional:
            return ()  # like the stock block, which ignores what it did not declare
        given = [t.shape[1:] if isinstance(t, Tensor) and t.dim() > 1 else (0,) for t in c] if isinstance(c, (list, tuple)) else []
        alike = given and sum(shape[0] for shape in given) == self.condition_channels  # the stock block does not mind how they are split
        return check_conditions(c, given if alike else self.dims_c, x)

    def extra_repr(self) -> str:
        held, own = self._fastflow, super().extra_repr()
        return f"{own}{', ' if own else ''}accelerated, dialect={held.dialect!r}, backend={held.backend!r}"

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        self._fastflow.index.permutation(self)  # see AllInOneBlock._apply
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fastflow.index.permutation(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fastflow.index.permutation(self)  # now, for a compiled forward cannot look

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        state = self.__dict__.copy()
        activation, held = state.get("global_scale_activation"), self._fastflow
        if activation is held.function and "<lambda>" in getattr(activation, "__qualname__", ""):  # FrEIA 0.2's, which no pickle takes
            state["global_scale_activation"] = function = _Activation(held.activation)
            state["_fastflow"] = replace(held, function=function)
        if "<lambda>" in getattr(state.get("permute_function"), "__qualname__", ""):
            state["permute_function"] = _take_channels
        return _new, (_Accelerated, self._fastflow_stock), state


@dataclass(frozen=True)
class _Activation:
    """A global_scale_activation that can be pickled."""

    name: str

    def __call__(self, g: Tensor) -> Tensor:
        return eager.scale_of(g, self.name)


def _take_channels(x: Tensor, index: Tensor) -> Tensor:
    """The permute_function of FrEIA's main branch for an index."""
    return x[:, index]


@cache
def _derived(addition: type, cls: type) -> Any:
    """The subclass of a stock class that has what ``addition`` adds."""
    name = f"{addition.__name__.removeprefix('_')}{cls.__name__}"
    return type(name, (addition, cls), {"__module__": __name__, "__doc__": cls.__doc__, "_fastflow_stock": cls})


def _new(addition: type, cls: type) -> nn.Module:
    """An empty instance, for pickle, which finds no class of :func:`_derived` by its name."""
    derived = _derived(addition, cls)
    return derived.__new__(derived)


def _exchange(block: Any, dialect: str, activation: str, backend: str) -> None:
    if block.householder:  # a stock pass leaves its product here, which keeps a graph alive and breaks deepcopy
        block.w_perm = block.w_perm_inv = None
    held = _Held(dialect, activation, backend, block.__dict__.get("global_scale_activation"))
    held.index.permutation(block)  # now, for the first forward may be a compiled one, which cannot look
    block.__dict__["_fastflow"] = held
    stock: type = type(block)
    block.__class__ = _derived(_Accelerated, stock)


# --- chains --------------------------------------------------------------------------------------------------------------------------


class _Reversible(Reversible):
    """What the class of a SequenceINN that was made reversible adds to its own."""

    _fastflow_stock: type
    _fastflow_attributes = ("_checkpoint_every", "debug", "drift", "_measured_spacing")

    def __getitem__(self, item: int | slice) -> Any:
        """As the stock class has it; where that makes a chain of a slice, this is reversible, too."""
        stock: Any = super()
        part = stock.__getitem__(item)
        if isinstance(item, slice) and (_made_reversible(part) or (False,))[0]:
            part.checkpoint_every, part.debug = self.checkpoint_every, self.debug
        return part

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _new, (_Reversible, self._fastflow_stock), self.__dict__.copy()


def _made_reversible(chain: Any) -> tuple[bool, str] | None:
    """Make a SequenceINN reversible: whether that was done, and why; None for another module."""
    if isinstance(chain, Reversible):
        return False, "is reversible already"
    cls: type = type(chain)
    stock: Any = next((base for base in cls.__mro__ if base.__name__ == "SequenceINN" and "forward" in vars(base)), None)
    if stock is None:
        return None
    if getattr(cls, "forward", None) is not stock.forward or "forward" in vars(chain):
        return False, f"{cls.__name__} overrides forward"
    try:
        reversible = _derived(_Reversible, cls)
        alike = all(_answers(cls, chain, rev) == _answers(reversible, chain, rev) for rev in (False, True))
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

    def forward(self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True) -> tuple[tuple[Tensor], float]:
        return (self.factor * x[0] + sum(c),), self.factor * (1 + 2 * rev + 4 * jac)


def _answers(cls: type, chain: Any, rev: bool) -> list[float]:
    """What a chain of two such modules, the second with a condition, returns as one of class ``cls``."""
    asked = copy.copy(chain)
    asked.__class__ = cls
    asked.__dict__["_modules"] = {"module_list": nn.ModuleList([_Step(2.0), _Step(3.0)])}
    asked.conditions, asked.force_tuple_output = [None, 1], False
    y, log_det = asked.forward(torch.ones(1), [torch.ones(1), torch.full((1,), 7.0)], rev=rev, jac=not rev)
    return [float(y), float(log_det)]
