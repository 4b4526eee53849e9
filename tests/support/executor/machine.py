"""Some CTAs of a launch: their registers, and the order in which their threads run.

Threads run in lockstep where their paths agree. Otherwise those at the least address run first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.support.executor.memory import Global, Shared, Threads
from tests.support.executor.values import UNSIGNED, Fault, Unsupported, f4, i4, i8, u4

if TYPE_CHECKING:
    from tests.support.executor.program import Program

SPECIAL = {"%laneid", "%warpid"} | {
    f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"
}
MOST_BLOCKS = 500_000  # a loop that never ends is a fault

Mask = np.ndarray | None  # the threads that execute an instruction; None for all


class Machine:
    """The state of these CTAs.

    Args:
        program: What they run.
        numbers: Which of the grid they are.
        grid: Its three sizes.
        params: The kernel's parameters, as arrays of one.
        memory: The launch's tensors.
        shared: Bytes of shared memory for each.
        perturb: See :meth:`approximate`.
    """

    def __init__(
        self,
        program: Program,
        numbers: np.ndarray,
        grid: tuple[int, int, int],
        params: list[np.ndarray],
        memory: Global,
        shared: int,
        perturb: int | None,
    ) -> None:
        self.program, self.params, self.memory, self.perturb = program, params, memory, perturb
        threads, ctas = program.threads, len(numbers)
        self.ctas, self.size = ctas, threads * ctas
        self.shared = Shared(ctas, shared, threads)
        self._everyone = np.arange(self.size)
        # Registers start with garbage. LLVM leaves some unwritten where their value does not
        # matter.
        self.registers = [_garbage(width) for width in program.widths]
        thread, cta = np.tile(np.arange(threads, dtype=u4), ctas), np.repeat(numbers, threads)
        self.who = Threads(cta.astype(i8) * threads + thread, threads)
        one, zero = np.ones(1, u4), np.zeros(1, u4)
        self.special = {
            "%tid.x": thread,
            "%ntid.x": one * u4(threads),
            "%laneid": thread % u4(32),
            "%warpid": thread // u4(32),
        }
        axes = (cta % grid[0], cta // grid[0] % grid[1], cta // (grid[0] * grid[1]))
        self.special |= {
            f"%ctaid.{axis}": number.astype(u4) for axis, number in zip("xyz", axes, strict=True)
        }
        self.special |= {
            f"%nctaid.{axis}": one * u4(n) for axis, n in zip("xyz", grid, strict=True)
        }
        self.special |= {"%tid.y": zero, "%tid.z": zero, "%ntid.y": one, "%ntid.z": one}

    def run(self) -> None:
        """Run all threads to their end."""
        end = len(self.program.blocks)
        counter, waiting = np.zeros(self.size, i4), np.zeros(self.size, bool)
        for _ in range(MOST_BLOCKS):
            ready = (counter < end) & ~waiting
            if not ready.any():
                if waiting.any():
                    raise Fault(
                        f"{self.program.name}: threads wait at a barrier that others never reach"
                    )
                return
            first = int(counter[ready].min())
            active = ready & (counter == first)
            mask = None if active.all() else active
            block = self.program.blocks[first]
            for operation in block.operations:
                operation(self, mask)
            counter[active] = first + 1
            if block.target is not None:
                taken = active
                if block.predicate is not None:
                    taken = active & (
                        self.registers[block.predicate].view(np.bool_) ^ block.is_negated
                    )
                counter[taken] = block.target
            elif block.is_barrier:
                waiting |= active
            if waiting.any():
                self._release(counter, waiting, end)
        raise Fault(f"{self.program.name}: still runs after {MOST_BLOCKS} blocks of instructions")

    def _release(self, counter: np.ndarray, waiting: np.ndarray, end: int) -> None:
        """Let the CTAs go on whose threads all wait, or have ended."""
        by_cta = waiting.reshape(self.ctas, -1)
        free = (by_cta | (counter == end).reshape(self.ctas, -1)).all(1) & by_cta.any(1)
        at = counter.reshape(self.ctas, -1)[free]
        if (np.where(at == end, -1, at).max(1) != np.where(at == end, end, at).min(1)).any():
            raise Fault(f"{self.program.name}: threads of one CTA wait at different barriers")
        by_cta[free] = False
        self.shared.interval[free] += 1

    def write(self, register: int | None, values: np.ndarray, mask: Mask) -> None:
        """Write a register, extended by the sign of its type where the value is narrower; None is
        the sink.
        """
        if register is None:
            return
        width = self.program.widths[register]
        if values.dtype.itemsize < width:
            values = (
                values.view(UNSIGNED[values.dtype.itemsize]) if values.dtype.kind == "f" else values
            )
            values = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{width}")
        elif values.dtype.itemsize > width:
            raise Unsupported("a register narrower than its value")
        if mask is None:
            self.registers[register] = values
        else:
            before = self.registers[register].view(UNSIGNED[width])
            self.registers[register] = np.where(mask, values.view(UNSIGNED[width]), before)

    def full(self, values: np.ndarray) -> np.ndarray:
        """One value for each thread."""
        return values if values.shape[0] == self.size else np.broadcast_to(values, (self.size,))

    def threads(self, mask: Mask) -> np.ndarray:
        """The numbers of the threads that execute."""
        return self._everyone if mask is None else np.flatnonzero(mask)

    def spread(self, threads: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Values of some threads as a register's."""
        if threads.size == self.size:
            return values
        register = np.zeros(self.size, values.dtype)
        register[threads] = values
        return register

    def expect_whole_warps(self, mask: Mask, where: str) -> None:
        """Raise Fault unless all threads of a warp execute, or none."""
        if mask is not None and (mask.reshape(-1, 32).any(1) != mask.reshape(-1, 32).all(1)).any():
            raise Fault(f"{where}: not all threads of a warp reach it")

    def approximate(self, exact: np.ndarray, ulps: int, *operands: np.ndarray) -> np.ndarray:
        """float32 of a float64 result. With ``perturb`` off by up to so many ulps, always the same
        for the same operands.
        """
        result = exact.astype(f4)
        if self.perturb is None:
            return result
        mix = np.array([self.perturb], u4)
        for operand in operands:
            mix = (mix ^ operand.view(u4)) * u4(2654435761)
            mix ^= mix >> 15
        off = (mix % u4(2 * ulps + 1)).astype(i4) - ulps
        is_steady = ~np.isfinite(result) | (np.abs(result) < 1e-37) | (np.abs(result) > 3e38)
        return np.where(is_steady, result, (result.view(i4) + off).view(f4))


def _garbage(width: int) -> np.ndarray:
    """What a register holds that nobody has written; a predicate (one byte) is False."""
    return np.array(
        [0xA5A5A5A5A5A5A5A5 & (1 << 8 * width) - 1 if width > 1 else 0], UNSIGNED[width]
    )
