"""Test that the executor of compiled kernels notices every kind of fault."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs a process without TRITON_INTERPRET (ci/kernels.sh)", allow_module_level=True)
pytest.importorskip("triton")

from tests.support.executor import Program, Unsupported, machine, watched
from tests.support.ptx import HEADER, execute, fault, floats, of_float32

pytestmark = pytest.mark.kernels


# --- faults in global memory ----------------------------------------------------------------------


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
