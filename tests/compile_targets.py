"""Compile kernels for GPUs that are not there, and read what the compiler made of them.

The launchers run on CPU tensors with the launch itself replaced by a recorder, so that what is compiled is what a GPU would be given:
the same constants, the same specialization of the arguments (divisible by 16, equal to 1, None). Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


@dataclass
class Code:
    """What a compiled kernel needs.

    Attributes:
        kernel: The kernel's name.
        warps: Warps of a program.
        registers: 32-bit vector registers of a thread.
        spills: Bytes of stack and local memory and spilled registers; 0 means that all values live in registers.
        loads, stores: How many global accesses there are of each width in bits.
    """

    kernel: str
    warps: int
    registers: int
    spills: int
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)


def launches_of(call: Callable[[], object]) -> list[tuple[JITFunction, tuple, dict]]:
    """The (kernel, arguments, keywords) that ``call`` would launch."""
    found = []

    def record(self, *args, grid, warmup, **kwargs):
        found.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return found


def compile_for(target: str, kernel: JITFunction, args: tuple, kwargs: dict) -> Code:
    """Compile one recorded launch for a target of :data:`TARGETS`."""
    options = {name: kwargs[name] for name in kwargs if name not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {name: kwargs[name] for name in kwargs if name in kernel.arg_names}
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


def _read_nvidia(name: str, compiled) -> Code:
    loads, stores = collections.Counter(), collections.Counter()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)", compiled.asm["ptx"]):
        (loads if kind == "ld" else stores)[int(vector or 1) * int(bits)] += 1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    return Code(name, compiled.metadata.num_warps, found["REG"], found["STACK"] + found["LOCAL"], dict(loads), dict(stores))


def _read_amd(name: str, compiled) -> Code:
    asm = compiled.asm["amdgcn"]
    bits = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads, stores = collections.Counter(), collections.Counter()
    for kind, width in re.findall(r"\b(?:global|buffer)_(load|store)_(?:[us]|d16_)?(?:hi_)?(byte|short|dword(?:x\d)?)", asm):
        (loads if kind == "load" else stores)[bits[width]] += 1
    keys = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    count = {key: int(re.search(rf"\.{key}:\s*(\d+)", asm)[1]) for key in keys}
    spills = count["vgpr_spill_count"] + count["sgpr_spill_count"] + count["private_segment_fixed_size"]
    return Code(name, compiled.metadata.num_warps, count["vgpr_count"], spills, dict(loads), dict(stores))
