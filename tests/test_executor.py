"""Test that the executor of compiled kernels computes what PTX specifies."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs a process without TRITON_INTERPRET (ci/kernels.sh)", allow_module_level=True)
pytest.importorskip("triton")

from tests.support.executor import Unsupported
from tests.support.ptx import execute, floats, of_float32

pytestmark = pytest.mark.kernels


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
    """The exact sum lies just above the middle between two float32 numbers.

    Rounded to float64, it lies in the middle.
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
    # The result of a division by 0 is unspecified.
    assert expected is None or torch.equal(result, expected(x))


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_in_shared_memory(trans):
    """An 8 x 8 matrix of 16-bit values goes through stmatrix and ldmatrix, which may transpose."""
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
    """Rounding to float32 first would turn a value just above a tie into the tie.

    The tie would then round to the even neighbour.
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
    exact, *perturbed = (of_float32(instruction, x, perturb=seed) for seed in (None, 1, 1, 2))
    units = [(result.view(torch.int32) - exact.view(torch.int32)) for result in perturbed]
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
