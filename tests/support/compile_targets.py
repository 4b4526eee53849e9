"""Compile kernels for several GPUs without having one, and read figures from the compiled code.

The launchers run on CPU tensors, and a recorder replaces the launch itself. So the compiled code is
what a GPU would get: it has the same constants and the same specialization of arguments (divisible
by 16, equal to 1, None). TRITON_INTERPRET must not be set.

tests/test_kernels_compiled.py checks the kernels against limits with it.
``python -m bench.gpu.compiled`` prints the figures.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastflow_kernels.coupling import Coupling, CouplingSpec, OutputGrads
from tests.support.kernel_passes import Inputs, run_pass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


class Recorded(NamedTuple):
    """A launch that was requested."""

    kernel: JITFunction
    args: tuple
    kwargs: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def values(self) -> dict[str, Any]:
        """The kernel's arguments by name, constants included."""
        names = self.kernel.arg_names
        return dict(zip(names, self.args, strict=False)) | {
            name: self.kwargs[name] for name in self.kwargs if name in names
        }


@dataclass
class Code:
    """The resources that a compiled kernel uses.

    Attributes:
        kernel: The kernel's name.
        warps: Warps of a program.
        registers: 32-bit vector registers of a thread.
        spills: Bytes of stack and local memory, and spilled registers; 0 means that all values live
            in registers.
        loads: Number of global loads by width in bits.
        stores: Number of global stores by width in bits.
        shared: Bytes of shared memory of a program.
    """

    kernel: str
    warps: int
    registers: int
    spills: int
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    shared: int = 0


def launches_of(call: Callable[[], object]) -> list[Recorded]:
    """Return the launches that ``call`` requests."""
    launches = []

    def record(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launches.append(Recorded(self, args, kwargs, grid))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return launches


def launches_of_passes(
    shape: tuple[int, ...], dtype: torch.dtype, spec: CouplingSpec, unpermutes_input: bool = False
) -> dict[str, list[Recorded]]:
    """Return the launches for an input of this shape, by pass."""
    inputs = _empty(shape, dtype, dtype, spec)
    inputs = inputs._replace(coupling=inputs.coupling._replace(unpermutes_input=unpermutes_input))
    return {
        name: launches_of(partial(run_pass, name, inputs))
        for name in ("forward", "backward", "inverse")
    }


def launches_of_side(
    shape: tuple[int, ...], dtype: torch.dtype, spec: CouplingSpec
) -> list[Recorded]:
    """Return the launches of one side of a coupling block, whose whole input has this shape."""
    from fastflow_kernels.engines.triton import engine

    batch, channels, *spatial = shape
    x = torch.empty(shape, dtype=dtype)[:, channels // 2 :]
    a = torch.empty(batch, 2 * x.shape[1], *spatial, dtype=dtype)
    coupling, grads = Coupling(None, None, spec), OutputGrads(x, torch.zeros(batch))

    def run() -> None:
        engine.forward(x, a, coupling, x)
        engine.backward(x, a, grads, coupling, False, x)
        engine.invert_active(x, x, a, coupling)

    return launches_of(run)


def launches_of_reconstruction(
    shape: tuple[int, ...], dtype: torch.dtype, spec: CouplingSpec
) -> list[Recorded]:
    """Return the launches of a reversible chain's backward pass for an input of this shape.

    ``dtype`` is the subnet's dtype. The chain is in float32 if that is a half precision.
    """
    inputs = _empty(shape, torch.promote_types(dtype, torch.float32), dtype, spec)
    return launches_of(partial(run_pass, "reversible", inputs))


def _empty(
    shape: tuple[int, ...], dtype: torch.dtype, dtype_a: torch.dtype, spec: CouplingSpec
) -> Inputs:
    batch, channels, *spatial = shape
    x = torch.empty(shape, dtype=dtype)
    a = torch.empty(batch, channels // 2 * 2, *spatial, dtype=dtype_a)
    g, perm = torch.zeros(channels, dtype=dtype), torch.arange(channels)
    grads = OutputGrads(x, torch.zeros(batch))
    return Inputs(x, a, grads, Coupling(g, g, spec, perm, perm))


def compile_for(target: str, launch: Recorded) -> Code:
    """Compile a recorded launch for a target of :data:`TARGETS`."""
    kernel, values = launch.kernel, launch.values
    options = {name: launch.kwargs[name] for name in launch.kwargs if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif type(value) is int and value != 1 and not kernel.params[i].is_constexpr:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_nvidia if "ptx" in compiled.asm else _read_amd
    return read(kernel.__name__, compiled)


def _read_nvidia(name: str, compiled: Any) -> Code:
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for kind, vector, bits in re.findall(
        r"\b(ld|st)\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)", compiled.asm["ptx"]
    ):
        (loads if kind == "ld" else stores)[int(vector or 1) * int(bits)] += 1
    usage = _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    counts = {key: _number(rf"\b{key}:(\d+)", usage) for key in ("REG", "STACK", "LOCAL")}
    metadata, spills = compiled.metadata, counts["STACK"] + counts["LOCAL"]
    return Code(
        name,
        metadata.num_warps,
        counts["REG"],
        spills,
        dict(loads),
        dict(stores),
        metadata.shared,
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run(
            [_TOOLS / "cuobjdump", option, f.name], capture_output=True, text=True, check=True
        ).stdout


def _read_amd(name: str, compiled: Any) -> Code:
    asm = compiled.asm["amdgcn"]
    bits = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for kind, width in re.findall(
        r"\b(?:global|buffer)_(load|store)_(?:[us]|d16_)?(?:hi_)?(byte|short|dword(?:x\d)?)", asm
    ):
        (loads if kind == "load" else stores)[bits[width]] += 1
    keys = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    count = {key: _number(rf"\.{key}:\s*(\d+)", asm) for key in keys}
    spills = (
        count["vgpr_spill_count"] + count["sgpr_spill_count"] + count["private_segment_fixed_size"]
    )
    return Code(
        name, compiled.metadata.num_warps, count["vgpr_count"], spills, dict(loads), dict(stores)
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"{pattern} is not in the compiler's output"
    return int(match[1])
