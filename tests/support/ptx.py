"""Execute a few instructions of PTX in one CTA on given values."""

from __future__ import annotations

import pytest
import torch

from tests.support.executor import Fault, Program

HEADER = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, {size};
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
{body}
    ret;
}}
"""


def execute(
    body: str,
    values: torch.Tensor,
    result: torch.Tensor | None = None,
    shared: int = 0,
    **options: object,
) -> torch.Tensor:
    """Run PTX in one CTA with a thread for each value.

    %rd4 is the address of a thread's value, and %rd5 is the address of its result.
    """
    result = torch.zeros_like(values) if result is None else result
    program = Program(HEADER.format(threads=values.numel(), size=values.element_size(), body=body))
    program.launch((1, 1, 1), [("values", values), ("result", result)], shared, **options)
    return result


def of_float32(instructions: str, values: torch.Tensor, **options: object) -> torch.Tensor:
    """Run instructions that compute %r3 from %r2."""
    return execute(
        f"ld.global.b32 %r2, [%rd4];\n{instructions}\nst.global.b32 [%rd5], %r3;", values, **options
    )


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat(-(-32 // len(values)))[:32].contiguous()


def fault(message: str):
    return pytest.raises(Fault, match=message)
