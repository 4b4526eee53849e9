"""A mock of the CUDA driver that executes Triton's kernels on the CPU.

Everything up to the driver's launch is real: the package's dispatch and prepared launches, Triton's
specialization, and its compiler down to PTX. Only ptxas is left out. Each launch is checked:

- The binary's assumptions hold: types, constants that were compiled in, and pointers or integers
  that were taken as divisible by 16.
- It is the binary that Triton itself would choose for these arguments.
- If the kernel is executed, everything that ``memory.py`` and ``machine.py`` check.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from fastflow_kernels.engines.available import is_interpreted
from fastflow_kernels.engines.triton import backward, forward, inverse, plan, sums
from tests.support import mock_driver
from tests.support.executor.memory import GlobalTensor
from tests.support.executor.program import Program
from tests.support.executor.values import POISON, Fault, Unsupported
from tests.support.fresh_memory import filled
from tests.support.launches import Launch

_DTYPES = {
    "*fp64": torch.float64,
    "*fp32": torch.float32,
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*u1": torch.bool,
}
_DTYPES |= {
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*i16": torch.int16,
    "*i8": torch.int8,
    "*u8": torch.uint8,
}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Executor:
    """Settings of the executor, and a record of its launches.

    Attributes:
        is_executing: Whether kernels are executed. If not, launches are only checked.
        perturb: Seed. If set, the approximate instructions are off by up to their documented error.
        ctas: Function from the grid's length to the CTAs to run; None for all.
        launches: Launches within the innermost :func:`watched`; None outside.
    """

    is_executing: bool = True
    perturb: int | None = None
    ctas: Callable[[int], list[int]] | None = None
    launches: list[Launch] | None = None


EXECUTOR = Executor()


@contextlib.contextmanager
def gpu(is_compiling: bool = True) -> Iterator[Executor]:
    """Let ``backend="triton"`` run compiled kernels on CPU tensors.

    Args:
        is_compiling: Whether kernels are compiled and executed. If not, launches are only checked
            against the binary that would be compiled for them.

    Yields:
        The settings of the executor.

    Raises:
        RuntimeError: If Triton interprets kernels in this process.
    """
    if is_interpreted():
        raise RuntimeError("gpu() executes compiled kernels, and TRITON_INTERPRET is set: unset it")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock_driver.mock_gpu(_Driver()))
        # Use a separate cache key, because the executor stores PTX where Triton stores a cubin.
        stack.enter_context(mock.patch.object(CUDABackend, "hash", return_value="executor"))
        stack.enter_context(
            mock.patch.object(CUDABackend, "make_cubin", lambda self, ptx, *_: ptx.encode())
        )
        if not is_compiling:
            stack.enter_context(mock.patch.object(EXECUTOR, "is_executing", False))
            stack.enter_context(mock.patch("triton.compiler.compile", _uncompiled))
        stack.callback(_forget_kernels)
        _forget_kernels()
        yield EXECUTOR


@contextlib.contextmanager
def watched() -> Iterator[list[Launch]]:
    """Fill fresh memory with NaNs that no kernel may read, and yield the list of launches."""
    launches: list[Launch] = []
    with filled(_poison), mock.patch.object(EXECUTOR, "launches", launches):
        yield launches


def _poison(t: torch.Tensor) -> None:
    if t.dtype in POISON and not t.is_meta:
        t.view(_INTEGERS[t.element_size()]).fill_(POISON[t.dtype])


def _forget_kernels() -> None:
    """Drop compiled kernels and prepared launches, because they hold the previous driver."""
    for module in (backward, forward, inverse, plan, sums):
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()
            elif hasattr(value, "cache_clear"):
                value.cache_clear()


@functools.lru_cache(maxsize=4096)
def _program(ptx: bytes) -> Program:
    return Program(ptx.decode())


class _Utils(mock_driver.Utils):
    """The mock driver's functions, with a list of loaded binaries; a handle is an index."""

    def __init__(self) -> None:
        self.functions: list[tuple[bytes, int]] = []  # PTX and bytes of shared memory

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int | None, ...]:
        self.functions.append((kernel, shared))
        module, _, *properties = super().load_binary()
        return (module, len(self.functions) - 1, *properties)


class _Driver(mock_driver.Driver):
    """A mock driver that executes its launches; its base class only counts them."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launcher_cls = functools.partial(_Launcher, self.utils)


class _Launcher:
    """The launcher of one binary: checks each launch against the binary, then executes it."""

    def __init__(self, utils: _Utils, source: Any, metadata: Any) -> None:
        self.utils, self.kernel = utils, source.fn
        self.names = list(source.fn.arg_names)
        self.types = [source.signature[name] for name in self.names]
        self.constants = {self._position(key): value for key, value in source.constants.items()}
        self.attributes = {
            self._position(key): dict(map(tuple, value)) for key, value in source.attrs.items()
        }

    def _position(self, key: Any) -> int:
        return self.names.index(key) if isinstance(key, str) else key[0]

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: int,
        packed,
        metadata,
        enter,
        leave,
        *args: Any,
    ) -> None:
        try:
            self._check(args)
            tensors = self._execute((x, y, z), function, args) if EXECUTOR.is_executing else []
        except Fault as fault:
            raise Fault(str(fault)) from None  # without the frames of the executor
        if EXECUTOR.launches is not None:
            moved = Launch(self.kernel.__name__)
            for t in tensors:
                moved.count(t.name, t.loaded, t.stored, t.itemsize)
            EXECUTOR.launches.append(moved)

    def _execute(
        self, grid: tuple[int, int, int], function: int, args: tuple[Any, ...]
    ) -> list[GlobalTensor]:
        ptx, shared = self.utils.functions[function]
        params = [
            (name, arg)
            for name, kind, arg in zip(self.names, self.types, args, strict=True)
            if kind != "constexpr"
        ]
        params += [("scratch", None)] * 2
        ctas = None if EXECUTOR.ctas is None else EXECUTOR.ctas(math.prod(grid))
        return _program(ptx).launch(grid, params, shared, EXECUTOR.perturb, ctas)

    def _check(self, args: tuple[Any, ...]) -> None:
        """Raise Fault unless the binary was compiled for these arguments."""
        name = self.kernel.__name__
        if len(args) != len(self.names):
            raise Fault(f"{name}: {len(args)} arguments for {len(self.names)}")
        for position, (label, kind, arg) in enumerate(
            zip(self.names, self.types, args, strict=True)
        ):
            where = (
                f"{name}: {label} = {tuple(arg.shape) if isinstance(arg, torch.Tensor) else arg}"
            )
            if kind == "constexpr":
                constant = self.constants[position]
                if not (arg is constant or (type(arg) is type(constant) and arg == constant)):
                    raise Fault(f"{where} where {constant} was compiled in")
                continue
            if kind[0] == "*":
                if kind not in _DTYPES:
                    raise Unsupported(f"{where}: a pointer of type {kind}")
                if not isinstance(arg, torch.Tensor) or arg.dtype != _DTYPES[kind]:
                    raise Fault(f"{where}: {getattr(arg, 'dtype', arg)} for {kind}")
                value = arg.data_ptr()
            else:
                value, bits = arg, int(kind[1:])
                if type(arg) is not int or not -(2 ** (bits - 1)) <= arg < 2 ** (
                    bits - (kind[0] == "i")
                ):
                    raise Fault(f"{where} as {kind}")
            divisor = self.attributes.get(position, {}).get("tt.divisibility", 1)
            if value % divisor:
                raise Fault(f"{where}: {value} is taken for a multiple of {divisor}")
        self._check_choice(args)

    def _check_choice(self, args: tuple[Any, ...]) -> None:
        """Raise Fault unless Triton itself would choose this binary for these arguments."""
        cache, _, _, _, binder = self.kernel.device_caches[0]
        _, specialization, _ = binder(*args, debug=False)
        keys = [key for key, compiled in cache.items() if compiled._run is self]
        if not any(key.startswith(str(specialization)) for key in keys):
            raise Fault(
                f"{self.kernel.__name__}: Triton would choose another binary, for "
                f"{specialization}; this one is for {keys}"
            )


def _uncompiled(source: Any, target: Any = None, options: Any = None, **_: Any) -> CompiledKernel:
    """Return a kernel without code, in place of ``triton.compiler.compile``."""
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.metadata = type(
        "Metadata", (), {"shared": 0, "warp_size": 32, "tmem_size": None, **options}
    )()
    kernel.packed_metadata, kernel.src, kernel.hash, kernel.name = (
        (),
        source,
        str(id(kernel)),
        source.fn.__name__,
    )
    kernel.kernel, kernel.metadata_group, kernel.module, kernel.function, kernel._run = (
        b"",
        {},
        None,
        None,
        None,
    )
    return kernel
