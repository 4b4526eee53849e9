"""FrEIA's base class, and how classes of ours become subclasses of it once FrEIA is imported.

FrEIA's containers check ``isinstance(module, InvertibleModule)`` with their own class. If ours
derived from it directly, every user would have to import FrEIA, and SciPy with it.
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
    """Make a class of another module a base of ``cls``, now or right after that module's import.

    Existing instances of ``cls`` become instances of it, too. If its module is imported anew, the
    next call puts the new class in the place of the old one.

    Args:
        cls: A class of ours. It defines everything that the other class does.
        module: Name of the other module.
        name: Name of the class in that module.
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
    # The foreign class replaces a base that it derives from itself. Otherwise it comes last.
    remaining = tuple(base for base in bases if not issubclass(foreign, base))
    try:
        cls.__bases__ = (*remaining, foreign)
    except TypeError:
        # the class has only the name in common with FrEIA's, or its layout does not fit
        return
    _adopted[cls] = foreign


class _Finder(MetaPathFinder):
    """An import finder that lets the others find the expected modules, and wraps their loaders.

    It stands first in ``sys.meta_path`` until all of them are imported.
    """

    def __init__(self) -> None:
        self._search = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _wanted or getattr(self._search, "is_running", False):
            return None
        self._search.is_running = True
        try:
            spec = _find_without(self, fullname, path, target)
        finally:
            self._search.is_running = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


def _find_without(
    skipped: _Finder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    """Return what the finders other than ``skipped`` find, or None."""
    for finder in list(sys.meta_path):
        find_spec = None if finder is skipped else getattr(finder, "find_spec", None)
        spec = None if find_spec is None else find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


class _Loader(Loader):
    """A loader that runs another one and then adopts the loaded class.

    It serves during the import only: the module keeps the other loader.
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
    dz/dx|`` (B,) in nats per sample. The inverse ``module([z], c, rev=True)`` returns ``((x,),
    -logdet)``. If FrEIA is imported, before or after, instances pass ``isinstance(module,
    FrEIA.modules.InvertibleModule)``.

    Args:
        dims_in: One shape per input, without the batch dimension: ``[(C, *S)]``.
        dims_c: One shape per condition, without the batch dimension.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> InvertibleModule:
        _adopt_freia()  # again: FrEIA may have been reloaded
        return super().__new__(cls)

    def __init__(
        self, dims_in: Iterable[Sequence[int]], dims_c: Iterable[Sequence[int]] | None = None
    ) -> None:
        nn.Module.__init__(self)  # not super(): once adopted, FrEIA's base would expect dims_in
        self.dims_in = list(dims_in)
        self.dims_c = list(dims_c) if dims_c is not None else []

    def forward(
        self,
        x_or_z: Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Compute the outputs and the log-determinant. Subclasses implement this.

        Args:
            x_or_z: Inputs of shapes (B, *dims_in[k]).
            c: Conditions of shapes (B, *dims_c[k]).
            rev: Compute the inverse.
            jac: Whether the log-determinant is wanted.

        Returns:
            The outputs and the log-determinant (B,) in nats per sample.

        Raises:
            NotImplementedError: Always, in this class.
        """
        raise NotImplementedError(f"{type(self).__name__} does not provide forward(...)")

    def log_jacobian(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error, because ``forward`` returns the log-determinant.

        Raises:
            DeprecationWarning: Always.
        """
        raise DeprecationWarning(
            "log_jacobian is deprecated: forward(..., jac=True) returns (outputs, log-determinant)"
        )

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes of the outputs. Subclasses implement this.

        Args:
            input_dims: The shapes of the inputs, without the batch dimension.

        Raises:
            NotImplementedError: Always, in this class.
        """
        raise NotImplementedError(f"{type(self).__name__} does not provide output_dims(...)")


def _adopt_freia() -> None:
    """Make FrEIA's base class a base of ours, so that FrEIA's containers accept our modules."""
    adopt(InvertibleModule, "FrEIA.modules.base", "InvertibleModule")


_adopt_freia()
