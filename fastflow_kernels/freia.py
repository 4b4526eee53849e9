"""FrEIA's base class, and how classes of ours count as FrEIA's once that is imported.

FrEIA's containers ask ``isinstance(module, InvertibleModule)`` for their own class. Importing FrEIA
to derive from it would cost every user that import, and SciPy with it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor, nn


def adopt(cls: type, module: str, name: str) -> None:
    """Make a class of another module a base of ``cls``: now if that module is imported, else right
    after it has been.

    Instances that exist by then are instances of it, too. Where the other class changes, because
    its module is imported anew, the new one takes the place of the old one at the next call.

    Args:
        cls: The class of ours; it defines all that the other one does.
        module: The other module's name.
        name: Of its class.
    """
    _wanted[module] = (cls, name)
    if module in sys.modules:
        _adopt(sys.modules[module])
    elif not any(finder is _finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _finder)


_wanted: dict[str, tuple[type, str]] = {}
_adopted: dict[type, type] = {}


def _adopt(module: ModuleType) -> None:
    cls, name = _wanted[module.__name__]
    foreign, before = getattr(module, name, None), _adopted.get(cls)
    if not isinstance(foreign, type) or foreign is before or issubclass(cls, foreign):
        return
    bases = tuple(base for base in cls.__bases__ if base is not before)
    # in place of a base that the foreign class derives from, otherwise after ours
    remaining = tuple(base for base in bases if not issubclass(foreign, base))
    try:
        cls.__bases__ = (*remaining, foreign)
    except TypeError:
        # a class of the same name that has nothing to do with modules, or does not fit ours
        return
    _adopted[cls] = foreign


class _Finder(MetaPathFinder):
    """Stands first among the finders until the modules that are waited for have come: finds nothing
    itself, but looks at what they find.
    """

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _wanted or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = _found(fullname, path, target, self)
        finally:
            self._asking.now = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


def _found(
    fullname: str, path: Sequence[str] | None, target: ModuleType | None, without: _Finder
) -> ModuleSpec | None:
    """What the other finders say."""
    for finder in list(sys.meta_path):
        find_spec = None if finder is without else getattr(finder, "find_spec", None)
        spec = None if find_spec is None else find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


class _Loader(Loader):
    """Another loader, after which a class is adopted. Only while it loads: the module keeps the
    other one.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create: Any = getattr(self._loader, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _adopt(module)
        if all(name in sys.modules for name in _wanted) and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_finder = _Finder()


class InvertibleModule(nn.Module):
    """Base class of invertible modules, with FrEIA's interface.

    ``module([x], c, rev=False, jac=True)`` returns ``((z,), logdet)`` with ``logdet = log |det
    dz/dx|`` (B,) in nats per sample, and ``module([z], c, rev=True)`` returns ``((x,), -logdet)``.
    Where FrEIA is imported, before or after, instances pass ``isinstance(module,
    FrEIA.modules.InvertibleModule)``.

    Args:
        dims_in: One shape per input, without the batch dimension: ``[(C, *S)]``.
        dims_c: One shape per condition.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> InvertibleModule:
        _adopt_freia()  # again: FrEIA may have been reloaded
        return super().__new__(cls)

    def __init__(
        self, dims_in: Iterable[Sequence[int]], dims_c: Iterable[Sequence[int]] | None = None
    ) -> None:
        nn.Module.__init__(self)  # by name: FrEIA's base, where adopted, would ask for dims_in
        self.dims_in = list(dims_in)
        self.dims_c = list(dims_c) if dims_c is not None else []

    def forward(
        self,
        x_or_z: Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Compute the outputs and the log-determinant; to be implemented by subclasses.

        Args:
            x_or_z: Inputs, one tensor (B, *dims_in[k]) each.
            c: Conditions, one tensor (B, *dims_c[k]) each.
            rev: Compute the inverse.
            jac: Whether the log-determinant is wanted.

        Raises:
            NotImplementedError: Always, here.
        """
        raise NotImplementedError(f"{type(self).__name__} does not provide forward(...)")

    def log_jacobian(self, *args: Any, **kwargs: Any) -> None:
        """Deprecated; ``forward`` returns the log-determinant.

        Raises:
            DeprecationWarning: Always.
        """
        raise DeprecationWarning(
            "log_jacobian is deprecated: forward(..., jac=True) returns (outputs, log-determinant)"
        )

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The outputs' shapes for inputs of shapes ``input_dims``; to be implemented by subclasses.

        Raises:
            NotImplementedError: Always, here.
        """
        raise NotImplementedError(f"{type(self).__name__} does not provide output_dims(...)")


def _adopt_freia() -> None:
    """Make FrEIA's base class a base of ours once FrEIA is imported, so that its containers
    recognise our modules.
    """
    adopt(InvertibleModule, "FrEIA.modules.base", "InvertibleModule")


_adopt_freia()
