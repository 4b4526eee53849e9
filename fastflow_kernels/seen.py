"""What a stock block reads of itself and of its class while it computes.

A stock block reads its attributes, and the functions of its class, in every call. The fused block
reads some of them too: the parameters, the subnet, the clamp. All others are recorded here, so that
a call can tell whether the probe's result still holds.
"""

from __future__ import annotations

import copy
import inspect
import numbers
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels.engines import plain
from fastflow_kernels.steps import is_known_softplus
from fastflow_kernels.stock import Left

ACTIVATION = "global_scale_activation"


@dataclass(frozen=True)
class Activation:
    """A global_scale_activation that can be pickled."""

    name: str

    def __call__(self, g: Tensor) -> Tensor:
        return plain.activated(g, self.name)


@dataclass(frozen=True)
class Seen:
    """What a stock block reads in a call and the fused block does not, as it was when probed.

    Attributes:
        cls: The block's class.
        attributes: Names of the block's own attributes, in the order of ``values``.
        values: Their values. Lists and dictionaries are copies.
        steps: Names that the block looks up on its class, in the order of ``functions``. "forward"
            is the first.
        functions: What the class had by these names.
        softplus_of: The module whose ``softplus`` the activation calls, if it calls one.
    """

    cls: Any
    attributes: tuple[str, ...]
    values: tuple[Any, ...]
    steps: tuple[str, ...]
    functions: tuple[Any, ...]
    softplus_of: Any = None

    def find_change(self, block: Any) -> str | None:
        """Return the name of something that has changed, or None.

        This runs in every call; :meth:`_is_current` makes it fast.
        """
        # A compiled call takes the loops, so that it is guarded by all that they look at.
        if not torch.compiler.is_compiling() and self._is_current(block):
            return None
        own, cls = block.__dict__, type(block)
        for name, value in zip(self.attributes, self.values, strict=True):
            now = own.get(name, _GONE)
            # Dynamo of torch 2.7 cannot compare lists by identity.
            same = False if isinstance(value, (list, dict)) else now is value
            if not same and (type(now) is not type(value) or now != value):
                return name
        for name, function in zip(self.steps, self.functions, strict=True):
            # This guards a compiled call against such an attribute on the block itself.
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
        """Return whether nothing has changed, in few calls to C.

        It takes 0.8 to 1.0 us for the stock blocks, the loops take 1.8 to 2.0 us (AMD EPYC).
        """
        own = block.__dict__
        try:
            if (
                self._read_attributes(own) != self.values
                or self._read_steps(type(block)) != self.functions[1:]
            ):
                return False
        except (AttributeError, KeyError, RuntimeError, ValueError):
            # Something is gone, or has become a tensor or an array.
            return False
        if self.cls.forward is not self.functions[0] or not own.keys().isdisjoint(self.steps):
            return False
        return self.softplus_of is None or is_known_softplus(
            self.softplus_of._modules.get("softplus")
        )

    @cached_property
    def _read_attributes(self) -> Callable[[Any], tuple[Any, ...]]:
        return _make_reader(operator.itemgetter, self.attributes)

    @cached_property
    def _read_steps(self) -> Callable[[Any], tuple[Any, ...]]:
        return _make_reader(operator.attrgetter, self.steps[1:])

    def is_unchanged(self, name: str, value: Any) -> bool:
        """Return whether an attribute is what it was, and the activation's softplus is known."""
        if (
            name == ACTIVATION
            and self.softplus_of is not None
            and not is_known_softplus(self.softplus_of._modules.get("softplus"))
        ):
            return False
        return name in self.attributes and self.values[self.attributes.index(name)] is value

    def with_values(self, **values: Any) -> Seen:
        """Return a copy with other values of some attributes.

        An activation among them must be one that reads nothing.
        """
        softplus_of = None if ACTIVATION in values else self.softplus_of
        pairs = zip(self.attributes, self.values, strict=True)
        return replace(
            self,
            values=tuple(values.get(name, value) for name, value in pairs),
            softplus_of=softplus_of,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Seen:
        values = copy.deepcopy(self.values, memo)
        index = self.attributes.index(ACTIVATION) if ACTIVATION in self.attributes else None
        # A bound method gets bound to the copy. A lambda keeps reading the block that made it, as
        # in a copy of a stock block.
        is_kept = index is not None and values[index] is self.values[index]
        return replace(
            self,
            values=values,
            softplus_of=self.softplus_of if is_kept else copy.deepcopy(self.softplus_of, memo),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Replace the functions, for pickle, by whether they are still those of the class.

        If they are, unpickling looks them up again. Otherwise the copy counts as changed.
        """
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return state | {"functions": self.functions == _find_functions(self.cls, self.steps)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        cls, steps = state["cls"], state["steps"]
        self.__dict__.update(
            state,
            functions=_find_functions(cls, steps) if state["functions"] else (_GONE,) * len(steps),
        )


_GONE = object()
# The fused block reads these in every call, too.
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

# The fused block reads these, too, but not every stock block reads all of them. A change that only
# one of the two would notice makes the stock maths run.
_FIXED = (
    "channels",
    "condition_length",
    "householder",
    "reverse_pre_permute",
    "conditional",
    "condition_channels",
    "dims_c",
    "GIN",
    "in_channels",
    "input_rank",
    "ndims",
    "split_len1",
    "split_len2",
    "splits",
)


def _make_reader(getter: Any, names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function that reads all the names at once, as a tuple."""
    if len(names) > 1:
        return getter(*names)
    return lambda source: tuple(getter(name)(source) for name in names)


def _find_functions(cls: Any, steps: Sequence[str]) -> tuple[Any, ...]:
    return tuple(getattr(cls, name, None) for name in steps)


def record_reads(
    block: Any, cls: Any, softplus_of: Any = None, live: Collection[str] = _LIVE
) -> Seen:
    """Record what a block's ``forward`` reads, except what is ``live``.

    The names come from its code and from that of the methods that it calls on itself.

    Raises:
        Left: A step reads something that the fused block does not know, or that may change
            unnoticed.
    """
    names = dict.fromkeys((*_FIXED, *_names_from(cls, "forward")))
    tensors = {**block._parameters, **block._buffers, **block._modules}
    attributes, steps = [], ["forward"]
    for name in names:
        if name in live or hasattr(nn.Module, name):
            continue
        if tensors.get(name) is not None and name not in ("softplus", ACTIVATION):
            raise Left(f"a step reads its {name}, which the fused block does not know")
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
    return Seen(
        cls, tuple(attributes), values, tuple(steps), _find_functions(cls, steps), softplus_of
    )


def _is_comparable(value: Any) -> bool:
    """Return whether a change of a value, also inside it, shows in a comparison with a copy."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_comparable, value))
    if isinstance(value, dict):
        return all(map(_is_comparable, value.values()))
    if value is None or isinstance(value, (numbers.Number, str, torch.dtype, torch.device)):
        return True
    return isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, Activation))


def may_read_state(function: Any) -> bool:
    """Return whether a function may read more than its arguments and torch's functions.

    It is one among a block's attributes, such as permute_function.
    """
    if isinstance(function, MethodType):
        return True
    if not isinstance(function, FunctionType):
        return False
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    if not all(is_of_torch(function.__globals__[name]) for name in names):
        return True
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__)


def is_of_torch(value: Any) -> bool:
    """Return whether this is torch, a module of it, or a function or class from there."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return (name or "").partition(".")[0] == "torch"


def _names_from(cls: Any, start: str) -> list[str]:
    """Return every name in the code of a method, and in that of methods of ``cls`` named there."""
    names, pending = [start], [start]
    while pending:
        function = inspect.getattr_static(cls, pending.pop(), None)
        function = getattr(function, "__func__", function)  # a static method's
        if isinstance(function, FunctionType):
            in_code = dict.fromkeys(_names_in(inspect.unwrap(function).__code__))
            new = [name for name in in_code if name not in names]
            names += new
            pending += [name for name in new if not hasattr(nn.Module, name)]
    return names


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a comprehension, a lambda
            yield from _names_in(constant)


def is_number(clamp: Any) -> bool:
    """Return whether the fused block takes this for its clamp.

    torch.compile can trace it, also with a symbolic number.
    """
    return (type(clamp) is float or isinstance(clamp, numbers.Real)) and clamp - clamp == 0
