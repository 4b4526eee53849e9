"""The executor of compiled kernels itself: it computes what PTX says, and it notices every kind of
fault.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs a process without TRITON_INTERPRET (ci/kernels.sh)", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fastflow_kernels.coupling import Coupling, CouplingSpec
from fastflow_kernels.engines.triton import engine, forward, launch
from tests.support.executor import EXECUTOR, Fault, Program, Unsupported, gpu, machine, watched

pytestmark = pytest.mark.kernels

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
    """Run PTX in one CTA, a thread for each value: %rd4 is the address of a thread's value, %rd5
    that of its result.
    """
    result = torch.zeros_like(values) if result is None else result
    program = Program(HEADER.format(threads=values.numel(), size=values.element_size(), body=body))
    program.launch((1, 1, 1), [("values", values), ("result", result)], shared, **options)
    return result


def of_float32(instructions: str, values: torch.Tensor, **options: object) -> torch.Tensor:
    """Run instructions that make %r3 of %r2."""
    return execute(
        f"ld.global.b32 %r2, [%rd4];\n{instructions}\nst.global.b32 [%rd5], %r3;", values, **options
    )


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat(-(-32 // len(values)))[:32].contiguous()


# --- instructions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instructions", "formula"),
    [
        ("add.f32 %r3, %r2, 0f3F800000;", lambda x: x + 1),
        ("sub.f32 %r3, 0f3F800000, %r2;", lambda x: 1 - x),
        ("mul.f32 %r3, %r2, %r2;", lambda x: x * x),
        ("div.full.f32 %r3, 0f40000000, %r2;", lambda x: 2 / x),
        ("rcp.approx.ftz.f32 %r3, %r2;", lambda x: 1 / x),
        (
            "abs.f32 %r4, %r2;\nsqrt.approx.ftz.f32 %r3, %r4;",
            lambda x: x.double().abs().sqrt().float(),
        ),
        (
            "abs.f32 %r4, %r2;\nrsqrt.approx.ftz.f32 %r3, %r4;",
            lambda x: x.double().abs().rsqrt().float(),
        ),
        ("ex2.approx.ftz.f32 %r3, %r2;", lambda x: torch.exp2(x.double()).float()),
        ("neg.f32 %r3, %r2;", torch.neg),
        ("abs.f32 %r3, %r2;", torch.abs),
        ("max.f32 %r3, %r2, 0f00000000;", lambda x: x.clamp(min=0)),
        ("cvt.rmi.f32.f32 %r3, %r2;", torch.floor),
        (
            "setp.lt.f32 %p1, %r2, 0f00000000;\nselp.b32 %r3, 0fBF800000, 0f3F800000, %p1;",
            lambda x: torch.where(x < 0, -1.0, 1.0),
        ),
        (
            "setp.ge.f32 %p1, %r2, 0f00000000;\nmov.b32 %r3, 0f00000000;\n@%p1 mov.b32 %r3, %r2;",
            torch.relu,
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_float_instructions(instructions, formula):
    x = torch.randn(64) * 3
    torch.testing.assert_close(of_float32(instructions, x), formula(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("instructions", "formula"),
    [
        ("add.s32 %r3, %r2, -5;", lambda x: x - 5),
        ("mul.lo.s32 %r3, %r2, %r2;", lambda x: x * x),
        ("div.s32 %r3, %r2, 7;", lambda x: torch.div(x, 7, rounding_mode="trunc")),
        ("rem.s32 %r3, %r2, 7;", lambda x: torch.fmod(x, 7)),
        ("shr.s32 %r3, %r2, 3;", lambda x: x >> 3),
        ("shl.b32 %r3, %r2, 3;", lambda x: x << 3),
        ("shl.b32 %r3, %r2, 40;", torch.zeros_like),
        ("bfe.s32 %r3, %r2, 4, 6;", lambda x: (x << 22) >> 26),
        ("lop3.b32 %r3, %r2, 15, 240, 0xEA;", lambda x: x & 15 | 240),
        ("prmt.b32 %r3, %r2, 0, 0x0123U;", lambda x: torch.from_numpy(x.numpy().byteswap())),
        ("cvt.rn.f32.s32 %r4, %r2;\ncvt.rzi.s32.f32 %r3, %r4;", lambda x: x),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_integer_instructions(instructions, formula):
    x = torch.randint(-10_000, 10_000, (64,), dtype=torch.int32)
    assert torch.equal(of_float32(instructions, x), formula(x))


def test_an_integer_overflows_as_on_a_gpu():
    x = torch.full((32,), 2**30, dtype=torch.int32)
    assert (of_float32("mul.lo.s32 %r3, %r2, 4;", x) == 0).all()


def test_a_fused_multiply_add_is_rounded_once():
    """The exact sum lies just above the middle between two float32 numbers, and its float64
    rounding in the middle.
    """
    x = torch.full((32,), 1 + 2.0**-12)
    tiny = f"0f{int(torch.tensor(2.0**-80).view(torch.int32)):08X}"
    assert (of_float32(f"fma.rn.f32 %r3, %r2, %r2, {tiny};", x) == 1 + 2.0**-11 + 2.0**-23).all()
    assert (
        of_float32(f"fma.rn.f32 %r3, %r2, %r2, -{tiny};".replace("-0f1", "0f9"), x) == 1 + 2.0**-11
    ).all()


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("min.f32 %r3, %r2, 0f80000000;", -0.0),
        ("min.f32 %r3, 0f80000000, %r2;", -0.0),
        ("max.f32 %r3, %r2, 0f80000000;", 0.0),
        ("max.f32 %r3, 0f80000000, %r2;", 0.0),
        ("max.f32 %r3, %r2, 0f7FC00000;", 0.0),
        ("max.NaN.f32 %r3, %r2, 0f7FC00000;", float("nan")),
        ("setp.neu.f32 %p1, %r2, 0f7FC00000;\nselp.b32 %r3, 0f3F800000, 0f00000000, %p1;", 1.0),
        ("setp.ne.f32 %p1, %r2, 0f7FC00000;\nselp.b32 %r3, 0f3F800000, 0f00000000, %p1;", 0.0),
        ("setp.gt.f32 %p1, 0f00000100, %r2;\nselp.b32 %r3, 0f3F800000, 0f00000000, %p1;", 1.0),
        ("setp.gt.ftz.f32 %p1, 0f00000100, %r2;\nselp.b32 %r3, 0f3F800000, 0f00000000, %p1;", 0.0),
        (
            "setp.eq.f32 %p2, %r2, %r2;\nsetp.lt.and.f32 %p1, %r2, 0f00000000, %p2;\nselp.b32 %r3, "
            "0f3F800000, 0f00000000, %p1;",
            0.0,
        ),
        ("mul.f32 %r4, 0f00800000, 0f3F000000;\nmul.f32 %r3, %r4, 0f40000000;", 2.0**-126),
        ("mul.ftz.f32 %r4, 0f00800000, 0f3F000000;\nmul.f32 %r3, %r4, 0f40000000;", 0.0),
    ],
)
def test_zeros_nans_and_subnormal_numbers(instruction, expected):
    torch.testing.assert_close(
        of_float32(instruction, torch.zeros(32)),
        torch.full((32,), expected),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    assert (
        of_float32(instruction, torch.zeros(32))[0].signbit() == torch.tensor(expected).signbit()
        or expected != expected
    )


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("mul.hi.u32 %r3, %r2, %r2;", lambda x: (x.long() * x.long() >> 32).int()),
        ("mul.wide.u16 %r3, %h1, %h2;", lambda x: (x & 0xFFFF) * (x >> 16)),
        ("mad.lo.s32 %r3, %r2, 3, %r2;", lambda x: 4 * x),
        ("and.b32 %r4, %r2, 255;\nxor.b32 %r3, %r4, -1;", lambda x: ~(x & 255)),
        ("or.b32 %r4, %r2, 255;\nnot.b32 %r3, %r4;", lambda x: ~(x | 255)),
        ("min.s32 %r3, %r2, 70000;", lambda x: x.clamp(max=70000)),
        ("mov.b32 %r3, {%h2, %h1};", lambda x: x << 16 | x >> 16 & 0xFFFF),
        (
            "shfl.sync.idx.b32 %r3, %r2, 5, 31, -1;",
            lambda x: x.view(-1, 32)[:, 5:6].expand(-1, 32).reshape(-1),
        ),
        ("div.s32 %r3, 7, %r4;", None),
    ],
)
def test_more_integer_instructions(instruction, expected):
    x = torch.randint(0, 2**30, (64,), dtype=torch.int32)
    result = of_float32("mov.b32 {%h1, %h2}, %r2;\nmov.b32 %r4, 0;\n" + instruction, x)
    # what a division by 0 gives is unspecified
    assert expected is None or torch.equal(result, expected(x))


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_in_shared_memory(trans):
    """Two 8 x 8 matrices of 16 bits through stmatrix and ldmatrix; the second transposes."""
    x = torch.arange(32, dtype=torch.int32)
    body = f"""ld.global.b32 %r2, [%rd4];
    shl.b32 %r4, %r1, 4;
    and.b32 %r4, %r4, 127;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {{%r2}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r3}}, [%r4];
    st.global.b32 [%rd5], %r3;"""
    halves = x.view(torch.int16).view(8, 8)
    expected = (halves.T if trans else halves).contiguous().view(torch.int32).view(-1)
    assert torch.equal(execute(body, x, shared=128), expected)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_half_precision_is_rounded_to_nearest(kind, dtype):
    x = torch.randn(64) * torch.logspace(-8, 8, 64)
    body = (
        f"ld.global.b32 %r2, [%rd4];\ncvt.rn.{kind}.f32 %h1, %r2;\n"
        f"cvt.f32.{kind} %r3, %h1;\nst.global.b32 [%rd5], %r3;"
    )
    assert torch.equal(execute(body, x), x.to(dtype).float())


def test_float64_is_rounded_to_bfloat16_once():
    """By way of float32 a value just above a tie would become the tie, and then go to the even
    neighbour.
    """
    x = torch.full((32,), 1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)
    x[1::2] *= -1
    body = (
        "ld.global.b64 %rd6, [%rd4];\ncvt.rn.bf16.f64 %h1, %rd6;\n"
        "cvt.f64.bf16 %rd7, %h1;\nst.global.b64 [%rd5], %rd7;"
    )
    assert execute(body, x).abs().tolist() == [1 + 2.0**-7] * 32


def test_a_pair_keeps_its_halves_apart():
    body = (
        "ld.global.b32 %r2, [%rd4];\ncvt.rn.bf16x2.f32 %r4, %r2, 0f3F800000;\n"
        "mov.b32 {%h1, %h2}, %r4;\n"
    )
    low, high = (
        execute(body + f"cvt.f32.bf16 %r3, %h{i};\nst.global.b32 [%rd5], %r3;", floats(2, 3))
        for i in (1, 2)
    )
    assert low.tolist() == [1.0] * 32  # the first operand goes to the upper half
    assert torch.equal(high, floats(2, 3))


def test_a_shuffle_exchanges_lanes():
    x = torch.arange(64).float()
    assert torch.equal(
        of_float32("shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", x), x.view(-1, 2).flip(1).reshape(-1)
    )


def test_threads_take_different_ways():
    body = """
    ld.global.b32 %r2, [%rd4];
    mov.b32 %r3, 0f00000000;
    $again:
    setp.le.f32 %p1, %r2, 0f00000000;
    @%p1 bra $done;
    add.f32 %r3, %r3, %r2;
    sub.f32 %r2, %r2, 0f3F800000;
    bra.uni $again;
    $done:
    st.global.b32 [%rd5], %r3;"""
    n = torch.arange(32).float()
    assert torch.equal(execute(body, n), n * (n + 1) / 2)


@pytest.mark.parametrize(
    "instruction", ["ex2.approx.ftz.f32 %r3, %r2;", "div.full.f32 %r3, 0f40400000, %r2;"]
)
def test_perturbed_instructions_stay_within_their_documented_error(instruction):
    x = torch.rand(1024) + 0.5
    exact, *others = (of_float32(instruction, x, perturb=seed) for seed in (None, 1, 1, 2))
    units = [(other.view(torch.int32) - exact.view(torch.int32)) for other in others]
    assert all(set(u.tolist()) == {-2, -1, 0, 1, 2} for u in units)
    assert torch.equal(units[0], units[1])
    assert not torch.equal(units[0], units[2])


@pytest.mark.parametrize(
    "instruction",
    [
        "sin.approx.f32 %r3, %r2;",
        "mul.rz.f32 %r3, %r2, %r2;",
        "mul.ftz.f16 %h1, %h1, %h1;",
        "mul.hi.f32 %r3, %r2, %r2;",
        "cp.async.wait_all;",
        "bar.sync 1;",
        "bra $nowhere;",
        "mov.u32 %r3, %cluster_ctaid.x;",
        "shfl.sync.bfly.b32 %r3|%p1, %r2, 1, 31, -1;",
    ],
)
def test_what_is_not_known_is_not_guessed(instruction):
    with pytest.raises(Unsupported):
        of_float32(instruction, floats(1))


# --- faults in global memory ----------------------------------------------------------------------


def fault(message: str):
    return pytest.raises(Fault, match=message)


def test_a_misaligned_vector():
    with fault("misaligned: 8 bytes"):
        execute("ld.global.v2.b32 {%r2, %r3}, [%rd4];", floats(1))


@pytest.mark.parametrize(
    ("offset", "message"),
    [(128, "out of bounds"), (-4, "out of bounds"), (1 << 46, "wild pointer")],
)
def test_an_access_outside_the_tensor(offset, message):
    memory = torch.zeros(96)
    with fault(message):
        execute(
            f"mov.b64 %rd6, {offset};\nadd.s64 %rd7, %rd4, %rd6;\nld.global.b32 %r2, [%rd7];",
            memory[32:64],
        )


def test_tensors_that_share_memory_are_refused():
    memory = torch.zeros(48)
    copy = "ld.global.b32 %r2, [%rd4];\nst.global.b32 [%rd5], %r2;"
    with pytest.raises(Unsupported, match="values and result share memory"):
        execute(copy, memory[:32], memory[16:])
    execute(copy, memory[:32], memory[:32])
    execute("ld.global.b32 %r2, [%rd4];", memory[:32], memory[16:])


def test_an_access_between_the_elements_of_a_view():
    memory = torch.zeros(64)
    with fault("out of bounds"):
        execute("ld.global.b32 %r2, [%rd4];", memory[::2])


def test_a_guarded_access_is_left_alone():
    body = (
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 ld.global.b32 %r2, [%rd4];\n"
        "@%p1 st.global.b32 [%rd5], %r2;"
    )
    x = torch.randn(32)
    half = torch.zeros(16)
    program = Program(HEADER.format(threads=32, size=4, body=body))
    program.launch((1, 1, 1), [("values", x), ("result", half)], 0)
    assert torch.equal(half, x[:16])


def test_memory_that_nobody_wrote():
    with watched():
        fresh = torch.empty(32)
    with fault("nothing was written"):
        of_float32("mov.b32 %r3, %r2;", fresh)


def test_two_threads_that_store_to_one_element():
    with fault("31 elements stored twice .31 with different values."):
        execute("st.global.b32 [%rd2], %r1;", floats(1))


def test_a_thread_that_loads_what_another_stores():
    x = torch.zeros(33)
    with fault("loaded by one thread and stored by another"):
        program = Program(
            HEADER.format(
                threads=32, size=4, body="ld.global.b32 %r2, [%rd4+4];\nst.global.b32 [%rd4], %r2;"
            )
        )
        program.launch((1, 1, 1), [("values", x), ("result", None)], 0)


# --- faults between the threads of a CTA ----------------------------------------------------------

STORE_SHARED = "shl.b32 %r4, %r1, 2;\nst.shared.b32 [%r4], %r1;\n"
LOAD_NEXT_WARP = (
    "add.s32 %r5, %r4, 128;\nand.b32 %r5, %r5, 255;\nld.shared.b32 %r3, [%r5];\n"
    "st.global.b32 [%rd5], %r3;"
)


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_a_barrier_between_two_warps(space):
    body = (STORE_SHARED + "bar.sync 0;\n" + LOAD_NEXT_WARP).replace("shared", space)
    result = execute(body, torch.zeros(64, dtype=torch.int32), shared=256)
    assert torch.equal(result, (torch.arange(64, dtype=torch.int32) + 32) % 64)


def test_a_missing_barrier():
    with fault("without a barrier between"):
        execute(STORE_SHARED + LOAD_NEXT_WARP, torch.zeros(64, dtype=torch.int32), shared=256)


def test_a_missing_barrier_before_the_next_use():
    body = (
        STORE_SHARED
        + "bar.sync 0;\n"
        + LOAD_NEXT_WARP
        + "\nadd.s32 %r6, %r1, 1;\nst.shared.b32 [%r4], %r6;"
    )
    with fault("another warp touched without a barrier between"):
        execute(body, torch.zeros(64, dtype=torch.int32), shared=256)


def test_shared_memory_that_nobody_wrote():
    with fault("that nobody wrote"):
        execute("ld.shared.b32 %r3, [0];", floats(1), shared=256)


def test_shared_memory_beyond_its_size():
    with fault("beyond 64 bytes"):
        execute(STORE_SHARED, floats(1), shared=64)


def test_threads_that_have_ended_are_not_waited_for():
    body = (
        "setp.lt.u32 %p1, %r1, 32;\n@!%p1 bra $wait;\nmov.b32 %r2, 0;\nret;\n$wait:\n"
        "bar.sync 0;\nst.global.b32 [%rd5], %r1;"
    )
    assert execute(body, torch.zeros(64, dtype=torch.int32))[32:].tolist() == list(range(32, 64))


@pytest.mark.parametrize(
    "value",
    ["not.b32 %r3, %r1;", "shl.b32 %r3, %r1, 31;"],
    ids=["negative integers", "zeros of either sign"],
)
def test_values_that_are_equal_as_floats_are_not_for_memory(value):
    with fault("different values to one shared address"):
        execute(f"{value}\nst.shared.b32 [0], %r3;", floats(1), shared=4)


def test_threads_of_a_warp_that_store_different_values_to_one_address():
    with fault("different values to one shared address, 31 are lost"):
        execute("st.shared.b32 [0], %r1;", floats(1), shared=4)
    execute("st.shared.b32 [0], 7;", floats(1), shared=4)


def test_a_barrier_that_some_threads_never_reach():
    body = (
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $spin;\nbar.sync 0;\nbra.uni $end;\n$spin:\n"
        "bar.sync 0;\nbar.sync 0;\n$end:"
    )
    with fault("different barriers|never reach"):
        execute(body, torch.zeros(64))


def test_a_loop_that_never_ends(monkeypatch):
    monkeypatch.setattr(machine, "MOST_BLOCKS", 100)
    with fault("still runs after 100 blocks"):
        execute("$again:\nbra.uni $again;", floats(1))


def test_a_shuffle_that_not_all_threads_of_a_warp_reach():
    with fault("not all threads of a warp"):
        execute("setp.lt.u32 %p1, %r1, 7;\n@%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", floats(1))


# --- launches -------------------------------------------------------------------------------------


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, stride_x, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride_x, mask=i < N), mask=i < N)


def copy_launch(programs: int) -> launch.Launch:
    return launch.Launch(_copy_kernel, programs, 1, {"N": 100, "stride_x": 1, "BLOCK": 64})


def copy(is_aligned: bool, x: torch.Tensor, copying: launch.Launch) -> torch.Tensor:
    y = torch.zeros(x.shape)
    copying(is_aligned, x, y)
    return y


def test_a_triton_kernel_runs():
    copying = copy_launch(3)
    x = torch.randn(100)
    with gpu():
        assert torch.equal(copy(True, x, copying), x)
        assert torch.equal(copy(True, x, copying), x)  # straight to the binary


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    "dtype",
    [torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.bfloat16, torch.float64],
)
def test_a_triton_kernel_that_is_launched_as_usual(dtype):
    """Without options, or with any; Triton warns of what it will take for fp fusion some day."""
    x = torch.randint(2, (100,)).to(dtype)
    with gpu():
        for options in ({}, {"num_warps": 2}, {"num_stages": 2, "num_warps": 1}):
            y = torch.zeros_like(x)
            _copy_kernel[(2,)](x, y, 100, 1, BLOCK=64, **options)
            assert torch.equal(x, y)


def test_a_fault_names_the_line_the_element_and_the_program():
    with (
        gpu(),
        fault(
            r"_copy_kernel: test_executor.py:\d+: .*x_ptr \(90,\) .* element 90 of 90, program 1, "
            r"thread \d+"
        ),
    ):
        _copy_kernel[(2,)](torch.zeros(90), torch.zeros(100), 100, 1, BLOCK=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda copying, x: copy(True, x[1:], copying), "taken for a multiple of 16"),
        (lambda copying, x: copy(True, x.double(), copying), "torch.float64 for \\*fp32"),
        (
            lambda copying, x: copy(True, x, _changed(copying, (96, 1, 64))),
            "would choose another binary",
        ),
        (
            lambda copying, x: copy(True, x, _changed(copying, (100, 1, 32))),
            "where 64 was compiled in",
        ),
        (
            lambda copying, x: copy(True, x, _changed(copying, (100, 2, 64))),
            "where 1 was compiled in",
        ),
        (lambda copying, x: copy(True, x, _changed(copying, (2**31, 1, 64))), "as i32"),
        (lambda copying, x: copy(True, x, _changed(copying, (100, 1))), "4 arguments for 5"),
    ],
    ids=["pointer", "dtype", "divisible", "constexpr", "one", "too large", "too few"],
)
def test_a_binary_that_was_compiled_for_other_arguments(change, message):
    copying = copy_launch(2)
    x = torch.randn(112)
    with gpu():
        copy(True, x, copying)
        with fault(message):
            change(copying, x)


def _changed(copying: launch.Launch, tail: tuple[int, ...]) -> launch.Launch:
    copying._tail = tail
    return copying


def test_it_leaves_no_trace():
    spec = CouplingSpec.of(1.9, "anomalib", "SOFTPLUS", False)
    coupling = Coupling(torch.randn(4), torch.randn(4), spec)
    with gpu():
        engine.forward(torch.randn(2, 4), torch.randn(2, 4), coupling)
    for value in vars(forward).values():
        if isinstance(value, JITFunction):
            assert not value.device_caches
        elif hasattr(value, "cache_info"):
            assert value.cache_info().currsize == 0
    assert EXECUTOR.launches is None


def test_fresh_memory_is_poisoned_where_it_is_watched():
    empty = torch.empty
    with watched() as launches, gpu():
        assert torch.empty(2).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        assert torch.zeros(1).new_empty(2).isnan().all()
        copy(True, torch.randn(100), copy_launch(2))
    assert torch.empty is empty
    (launch,) = launches
    assert (launch.kernel, launch.loaded, launch.stored) == (
        "_copy_kernel",
        {"x_ptr": 400},
        {"y_ptr": 400},
    )
