"""Which maths a foreign AllInOneBlock computes, found by asking a copy of it, and what it reads
while it computes.

A stock block reads its attributes, and the functions of its class, in every call. The fused block
reads some of them too: the parameters, the subnet, the clamp. All others are recorded here, so that
a call can tell whether the answer still holds (:class:`Seen`).
"""

from __future__ import annotations

import copy
import inspect
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow_kernels import modes
from fastflow_kernels.engines import eager
from fastflow_kernels.functional import all_in_one_block, starts_in_place
from fastflow_kernels.modules import is_known_softplus
from fastflow_kernels.permutations import IndexCache
from fastflow_kernels.coupling import ACTIVATIONS, DIALECTS, CouplingSpec

_NAME = "AllInOneBlock"
_STEPS = ("forward", "_affine", "_permute", "_pre_permute", "_construct_householder_permutation")
_ACTIVATION = "global_scale_activation"


class Left(Exception):
    """A block must be left alone; the message says why."""


class Maths(NamedTuple):
    """What a block computes.

    Attributes:
        dialect: "anomalib" or "freia".
        activation: "SIGMOID", "SOFTPLUS" or "EXP".
        is_sized: Whether it takes inputs of the declared spatial size only.
        seen: What it read of itself for that.
    """

    dialect: str
    activation: str
    is_sized: bool
    seen: Seen


# --- which class ----------------------------------------------------------------------------------


def is_named(cls: type, name: str = _NAME) -> bool:
    """Whether a class, or one that it derives from, is called AllInOneBlock: models also carry
    copies of the block.
    """
    return any(base.__name__ == name for base in cls.__mro__)


def shallow_copy(module: Any, cls: Any) -> Any:
    """Another module with the same attributes, without what the class does when it is copied."""
    copied = object.__new__(cls)
    copied.__dict__.update(vars(module))
    return copied


def stock_class(cls: type) -> Any:
    """The AllInOneBlock that ``cls`` is or derives from.

    Raises:
        Left: It has not the methods of the block that the fused one is a drop-in for.
    """
    named = [base for base in cls.__mro__ if base.__name__ == _NAME]
    for base in named:
        if {"forward", "_affine", "_permute"} <= vars(base).keys():
            return base
    if {"affine", "permute"} <= vars(named[0]).keys():
        raise Left(
            "is an old form of the block, with methods affine and permute, as FrEIA had before 0.2"
        )
    raise Left(
        "is called AllInOneBlock, but does not define forward, _affine and _permute as the known "
        "blocks do"
    )


# --- what it reads --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a stock block reads in a call and the fused one does not, as it was when the block was
    asked.

    Attributes:
        cls: The block's class.
        attributes: Names of the block's own attributes, in the order of ``values``.
        values: Their values; of lists and dictionaries, copies.
        steps: Names of what the block finds on its class, in the order of ``functions``; "forward"
            is the first.
        functions: What it found.
        softplus_of: The module whose ``softplus`` the activation calls, if it calls one.
    """

    cls: Any
    attributes: tuple[str, ...]
    values: tuple[Any, ...]
    steps: tuple[str, ...]
    functions: tuple[Any, ...]
    softplus_of: Any = None

    def changed(self, block: Any) -> str | None:
        """The name of what is another one now, or None. Asked in every call: see
        :meth:`_is_current`.
        """
        # a compiled call is tied to all that the loops look at
        if not torch.compiler.is_compiling() and self._is_current(block):
            return None
        own, cls = block.__dict__, type(block)
        for name, value in zip(self.attributes, self.values, strict=True):
            now = own.get(name, _GONE)
            # Dynamo of torch 2.7 knows no identity of lists
            same = False if isinstance(value, (list, dict)) else now is value
            if not same and (type(now) is not type(value) or now != value):
                return name
        for name, function in zip(self.steps, self.functions, strict=True):
            # so that a compiled call is tied to there being none on the block itself
            getattr(block, name, None)
            if (
                name in own
                or getattr(self.cls if name == "forward" else cls, name, None) is not function
            ):
                return name
        if self.softplus_of is not None and not is_known_softplus(
            self.softplus_of._modules.get("softplus")
        ):
            return "softplus"
        return None

    def _is_current(self, block: Any) -> bool:
        """Whether nothing is another one, by few calls of C: 0.8 to 1.0 us for the stock blocks,
        the loops 1.8 to 2.0 (AMD EPYC).
        """
        own = block.__dict__
        try:
            if (
                self._read_attributes(own) != self.values
                or self._read_steps(type(block)) != self.functions[1:]
            ):
                return False
        except (AttributeError, KeyError, RuntimeError, ValueError):
            # one is gone, or has become a tensor or an array
            return False
        if self.cls.forward is not self.functions[0] or not own.keys().isdisjoint(self.steps):
            return False
        return self.softplus_of is None or is_known_softplus(
            self.softplus_of._modules.get("softplus")
        )

    @cached_property
    def _read_attributes(self) -> Callable[[Any], tuple[Any, ...]]:
        return _reader(operator.itemgetter, self.attributes)

    @cached_property
    def _read_steps(self) -> Callable[[Any], tuple[Any, ...]]:
        return _reader(operator.attrgetter, self.steps[1:])

    def holds(self, name: str, value: Any) -> bool:
        """Whether an attribute is what it was, and reads what it read."""
        if (
            name == _ACTIVATION
            and self.softplus_of is not None
            and not is_known_softplus(self.softplus_of._modules.get("softplus"))
        ):
            return False
        return name in self.attributes and self.values[self.attributes.index(name)] is value

    def with_values(self, **values: Any) -> Seen:
        """The same with other values of some attributes, and with an activation that reads nothing
        if that is one of them.
        """
        softplus_of = None if _ACTIVATION in values else self.softplus_of
        pairs = zip(self.attributes, self.values, strict=True)
        return replace(
            self,
            values=tuple(values.get(name, value) for name, value in pairs),
            softplus_of=softplus_of,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Seen:
        values = copy.deepcopy(self.values, memo)
        place = self.attributes.index(_ACTIVATION) if _ACTIVATION in self.attributes else None
        # a bound method is bound to the copy; a lambda goes on reading the block that made it, as
        # in a copy of a stock block
        stays = place is not None and values[place] is self.values[place]
        return replace(
            self,
            values=values,
            softplus_of=self.softplus_of if stays else copy.deepcopy(self.softplus_of, memo),
        )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: functions of the class are looked up again where they are still those;
        otherwise none of them will do.
        """
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return state | {"functions": self.functions == _functions(self.cls, self.steps)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        cls, steps = state["cls"], state["steps"]
        self.__dict__.update(
            state, functions=_functions(cls, steps) if state["functions"] else (_GONE,) * len(steps)
        )


_GONE = object()
# read by the fused block in every call, too
_LIVE = {
    "global_scale",
    "global_offset",
    "subnet",
    "w_perm",
    "w_perm_inv",
    "w_0",
    "vk_householder",
    "clamp",
}

# read by the fused block, too, but not all by every stock block: where only one of the two would
# notice, the stock maths runs
_FIXED = (
    "householder",
    "reverse_pre_permute",
    "conditional",
    "condition_channels",
    "dims_c",
    "GIN",
    "in_channels",
    "input_rank",
    "splits",
)


def _reader(getter: Any, names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """What reads all the names at once, as a tuple."""
    if len(names) > 1:
        return getter(*names)
    return lambda source: tuple(getter(name)(source) for name in names)


def _functions(cls: Any, steps: Sequence[str]) -> tuple[Any, ...]:
    return tuple(getattr(cls, name, None) for name in steps)


def _look(block: Any, cls: Any, softplus_of: Any) -> Seen:
    """What the block's forward reads, by the names in its code and in that of the methods it calls
    on itself.
    """
    names = dict.fromkeys((*_FIXED, *_names_from(cls, "forward")))
    tensors = {**block._parameters, **block._buffers, **block._modules}
    attributes, steps = [], ["forward"]
    for name in names:
        if name in _LIVE or hasattr(nn.Module, name):
            continue
        if tensors.get(name) is not None and name not in ("softplus", _ACTIVATION):
            raise Left(f"a step reads its {name}, which the fused block knows nothing of")
        if name in vars(block):
            if not _is_comparable(vars(block)[name]):
                raise Left(
                    f"a step reads its {name}, of class {type(vars(block)[name]).__name__}, which "
                    "may change unnoticed"
                )
            attributes.append(name)
        elif inspect.getattr_static(cls, name, _GONE) is not _GONE:
            steps.append(name)
    for name in steps:
        if isinstance(inspect.getattr_static(cls, name), property):
            raise Left(f"computes its {name} by a property")
    values = tuple(
        copy.deepcopy(value) if isinstance(value, (list, dict)) else value
        for value in (vars(block)[name] for name in attributes)
    )
    return Seen(cls, tuple(attributes), values, tuple(steps), _functions(cls, steps), softplus_of)


def _is_comparable(value: Any) -> bool:
    """Whether a value that has changed, also within, differs from a copy of what it was."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_comparable, value))
    if isinstance(value, dict):
        return all(map(_is_comparable, value.values()))
    if value is None or isinstance(value, (numbers.Number, str, torch.dtype, torch.device)):
        return True
    return isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, Activation))


def _reads_more(function: Any) -> bool:
    """Whether a function among a block's attributes, such as permute_function, may read more than
    it is given and torch's functions.
    """
    if isinstance(function, MethodType):
        return True
    if not isinstance(function, FunctionType):
        return False
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    if not all(_is_of_torch(function.__globals__[name]) for name in names):
        return True
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__)


def _is_of_torch(value: Any) -> bool:
    """Whether this is torch, a module of it, or a function or class from there."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return (name or "").partition(".")[0] == "torch"


def _names_from(cls: Any, start: str) -> list[str]:
    """Every name in the code of a method, and of the methods of ``cls`` that are among those
    names.
    """
    names, pending = [start], [start]
    while pending:
        function = inspect.getattr_static(cls, pending.pop(), None)
        function = getattr(function, "__func__", function)  # a static method's
        if isinstance(function, FunctionType):
            found = [
                name for name in _names_in(inspect.unwrap(function).__code__) if name not in names
            ]
            names += dict.fromkeys(found)
            pending += [name for name in dict.fromkeys(found) if not hasattr(nn.Module, name)]
    return names


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a comprehension, a lambda
            yield from _names_in(constant)


# --- the activation of the global scale -----------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """A global_scale_activation that can be pickled."""

    name: str

    def __call__(self, g: Tensor) -> Tensor:
        return eager.scale_of(g, self.name)


_TORCH = (torch, nn, F, torch.exp, torch.sigmoid, F.sigmoid, F.softplus, nn.Softplus)
_TORCH_NAMES = {"nn", "functional", "exp", "sigmoid", "softplus", "Softplus"}


def _activation(block: Any, cls: Any) -> tuple[Callable[[Tensor], Tensor], Any]:
    """The block's activation, and the module whose softplus it calls, if it calls one.

    Raises:
        Left: It may read something that changes later: then no answer of today holds for tomorrow.
    """
    own = vars(block).get(_ACTIVATION)
    function = own if own is not None else inspect.getattr_static(cls, _ACTIVATION, None)
    if isinstance(function, Activation):
        return function, None
    if isinstance(function, BuiltinFunctionType) and _is_of_torch(function):
        return function, None
    owner: Any = block if own is None and isinstance(function, FunctionType) else None
    if isinstance(function, MethodType):
        owner = function.__self__
    function = getattr(function, "__func__", function)  # a bound or a static method's
    if not isinstance(function, FunctionType):
        kind = type(getattr(block, _ACTIVATION, None)).__name__
        raise Left(
            f"its {_ACTIVATION} is no function, but of class {kind}, and what that reads may change"
        )
    for cell in function.__closure__ or ():
        owner = cell.cell_contents
    if owner is not None and not (
        isinstance(owner, nn.Module)
        and is_named(type(owner))
        and len(function.__closure__ or ()) <= 1
    ):
        raise Left(
            f"its {_ACTIVATION} reads variables of the function around it, and those may change"
        )
    if (name := _foreign_name(function, owner)) is not None:
        raise Left(f"its {_ACTIVATION} uses {name}, which no known form does and which may change")
    calls_softplus = (
        owner is not None
        and "softplus" in function.__code__.co_names
        and "softplus" in owner._modules
    )
    return getattr(block, _ACTIVATION), owner if calls_softplus else None


def _foreign_name(function: FunctionType, owner: Any) -> str | None:
    """Something that an activation reads beside torch's functions of the known forms and its
    block's softplus.
    """
    code = function.__code__
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if any(not isinstance(value, numbers.Real) for value in defaults):
        return "its default arguments"
    if any(isinstance(constant, CodeType) for constant in code.co_consts):
        return "what a function in it reads"
    for name in code.co_names:
        if name in function.__globals__:
            known = any(function.__globals__[name] is value for value in _TORCH)
        else:
            known = name in _TORCH_NAMES and (
                name == "softplus" or owner is None or not hasattr(owner, name)
            )
        if not known:
            return name
    return None


def _known_activation(function: Callable[[Tensor], Tensor], like: Tensor) -> str:
    """The name of the activation, by its values over the whole range of its dtype, relative to
    their size.
    """
    dense, far = (700.0, 8.0) if like.dtype is torch.float64 else (80.0, 8.0)
    sizes = torch.logspace(-6.0, far, 500, dtype=torch.float64, device="cpu")
    samples = torch.cat(
        (torch.linspace(-dense, dense, 14001, dtype=torch.float64, device="cpu"), sizes, -sizes)
    ).to(like)
    values = function(samples)
    tolerance = 1e-12 if like.dtype is torch.float64 else 1e-4
    for name in ACTIVATIONS:
        known = eager.scale_of(samples, name)
        if (
            values.shape == known.shape
            and ((values == known) | ((values - known).abs() <= tolerance * known.abs())).all()
        ):
            return name
    raise Left(f"its {_ACTIVATION} is none of {', '.join(ACTIVATIONS)}")


# --- which maths ----------------------------------------------------------------------------------


def identify(block: Any, cls: Any) -> Maths:
    """What a block of class ``cls`` computes; nothing about the block changes.

    Raises:
        Left: It computes something else than the fused block, or may come to do so unnoticed, or it
            cannot be asked.
    """
    stock = stock_class(cls)
    for step in _STEPS:
        if step in vars(block) or getattr(cls, step, None) is not getattr(stock, step, None):
            raise Left(f"{cls.__name__} overrides {step}")
    try:
        if modes.is_symbolic():
            raise Left(
                "tensors have no values here, under FakeTensorMode or while tracing; accelerate it "
                "outside"
            )
        if block.global_scale.is_meta:
            raise Left("its parameters are on the meta device; accelerate it once they hold values")
        if isinstance(block.clamp, Tensor):
            raise Left("its clamp is a tensor; the fused block takes a number")
        if not is_number(vars(block).get("clamp")):
            raise Left(f"its clamp is no plain number that is an attribute, but {block.clamp!r}")
        if not block.conditional and starts_in_place(block.subnet):
            raise Left(
                "its subnet starts with an in-place operation, which changes the stock block's "
                "passive half"
            )
        device = block.global_scale.device
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.device(device),
        ):
            return _asked(block, cls, stock)
    except Left:
        raise
    except Exception as error:
        raise Left(f"could not be probed: {type(error).__name__}: {error}") from error


def is_number(clamp: Any) -> bool:
    """Whether the fused block takes this for its clamp; asked as torch.compile can trace it, also
    with a symbolic number.
    """
    return (type(clamp) is float or isinstance(clamp, numbers.Real)) and clamp - clamp == 0


def _asked(block: Any, cls: Any, stock: Any) -> Maths:
    function, softplus_of = _activation(block, cls)
    seen = _look(block, cls, softplus_of)
    if (name := seen.changed(block)) is not None:
        raise Left(f"its {name} is not one of the known forms")
    probe = _Probe(block, cls, stock)
    activation = _known_activation(function, probe.scale)
    dialects = probe.dialects(block.clamp, block.GIN, activation)
    if not dialects:
        raise Left("it computes something else than either known form of the block")
    # with a clamp of 1, or where GIN takes the mean of one value, both forms agree: another clamp,
    # and no GIN, tell them apart
    other = 1.7 if abs(abs(block.clamp) - 1.7) > 0.2 else 2.3
    dialects = [
        dialect for dialect in probe.dialects(other, block.GIN, activation) if dialect in dialects
    ]
    if not dialects:
        raise Left(
            "with another clamp it computes something else than either known form of the block"
        )
    if len(dialects) > 1 and block.GIN:
        dialects = probe.dialects(other, False, activation)
        if not dialects:
            raise Left("without GIN it computes something else than either known form of the block")
    for name, value in zip(seen.attributes, seen.values, strict=True):
        if name != _ACTIVATION and _reads_more(value):
            raise Left(f"its {name} reads variables around it, and those may change")
    return Maths(dialects[0], activation, probe.is_sized, seen)


class _Fixed(nn.Module):
    """A subnet that returns the same coefficients whatever it is given, and keeps that."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a, self.given = a, a

    def forward(self, x: Tensor) -> Tensor:
        self.given = x.clone()
        return self.a.clone()  # the stock block writes to what it gets


class _Probe:
    """A shallow copy of a block with random global affine and a fixed subnet: the block itself is
    not touched.
    """

    def __init__(self, block: Any, cls: Any, stock: Any) -> None:
        self.stock, self.is_sized = stock, False
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.block = shallow_copy(block, cls)
        own = self.block.__dict__
        dtype = _widest(block.global_scale)
        parameters = {
            name: p.to(dtype) if p is not None and p.is_floating_point() else p
            for name, p in block._parameters.items()
        }
        like = parameters["global_scale"]
        self.scale, self.offset = self._random(like.shape, like), self._random(like.shape, like)
        own["_parameters"] = parameters | {"global_scale": self.scale, "global_offset": self.offset}
        own["_modules"] = dict(block._modules)
        self.spatial = self._find_spatial(tuple(block.dims_in[0][1:]))

    def dialects(self, clamp: float, gin: bool, activation: str) -> list[str]:
        """The dialects in which the fused block gives the same answers, were the block's clamp and
        GIN these.
        """
        self.block.__dict__.update(clamp=clamp, GIN=gin)
        x, c, a, answers = self._ask(self.spatial)
        permutation = IndexCache().permutation(self.block)
        matching = []
        for dialect in DIALECTS:
            if clamp == 0 and dialect == "freia":
                continue
            subnet, ours = _Fixed(a), []
            spec = CouplingSpec.of(clamp, dialect, activation, gin)
            arguments = (subnet, self.scale, self.offset, permutation, spec, c)
            for rev in (False, True):
                result = all_in_one_block(
                    x,
                    *arguments,
                    rev=rev,
                    reverse_permutation=self.block.reverse_pre_permute,
                    backend="eager",
                )
                ours.append((*result, subnet.given))
            if all(
                _alike(theirs, mine)
                for pair in zip(answers, ours, strict=True)
                for theirs, mine in zip(*pair, strict=True)
            ):
                matching.append(dialect)
        return matching

    def _find_spatial(self, declared: tuple[int, ...]) -> tuple[int, ...]:
        """A small spatial size that the block takes, and whether it takes others than the declared
        one: FrEIA's main branch does not.
        """
        small = (2,) * len(declared)
        if small == declared and small:
            small = (3,) * len(declared)
        try:
            self._ask(small)
            return small
        except (RuntimeError, ValueError):
            self.is_sized = True
        dims_in = self.block.dims_in
        self.block.__dict__["dims_in"] = [(dims_in[0][0], *small)]
        try:
            self._ask(small)
            return small
        except (RuntimeError, ValueError):
            self.block.__dict__["dims_in"] = dims_in
            return declared

    def _random(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu").to(
            like
        )

    def _ask(
        self, spatial: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], Tensor, list[tuple[Tensor, ...]]]:
        """Input, conditions, coefficients and the stock block's answers, forward and in reverse: y,
        log-det, what the subnet was given.
        """
        channels, active = self.block.in_channels, sum(self.block.splits[1:])
        x = self._random((2, channels, *spatial), self.scale)
        # so that exp(clamp * tanh(0.1 * a)) does not overflow
        size = 10.0 / max(1.0, abs(self.block.clamp) / 5.0)
        a = size * self._random((2, 2 * active, *spatial), self.scale)
        self.block._modules["subnet"] = subnet = _Fixed(a)
        c = [self._random((2, shape[0], *spatial), self.scale) for shape in self.block.dims_c]
        answers: list[tuple[Tensor, ...]] = []
        for rev in (False, True):
            (y,), logdet = self.stock.forward(self.block, [x], c, rev=rev)
            answers.append((y, logdet, subnet.given))
        return x, c, a, answers


def _widest(parameter: Tensor) -> torch.dtype:
    """float64, in which the two formulas differ visibly also with a clamp near 1, or float32 on a
    device that has no float64.
    """
    try:
        parameter.to(torch.float64)
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def _alike(theirs: Tensor, ours: Tensor) -> bool:
    # far above rounding, far below what tells two formulas apart
    tolerance = 1e-9 if theirs.dtype is torch.float64 else 1e-3
    return theirs.shape == ours.shape and bool(
        (theirs - ours).abs().max() <= tolerance * ours.abs().max().clamp(min=1.0)
    )
