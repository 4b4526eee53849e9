"""Some CTAs of a launch: their registers, and the order in which their threads run.

Threads run in lockstep while their paths agree. Otherwise the threads at the lowest address run
first.
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
MOST_BLOCKS = 500_000  # more are taken for a loop that never ends

Mask = np.ndarray | None  # the threads that execute an instruction; None for all


class Machine:
    """The state of some CTAs of a launch.

    Args:
        program: The kernel that they run.
        numbers: Their numbers within the grid.
        grid: The three sizes of the grid.
        params: The kernel's parameters, as arrays of one value.
        memory: The launch's tensors.
        shared: Bytes of shared memory for each CTA.
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
        # Registers start with garbage: LLVM leaves some unwritten if their value does not matter.
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
        """Run all threads until they exit.

        Raises:
            Fault: If threads wait for each other forever, or a loop never ends.
        """
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
        """Release the CTAs whose threads have all reached the barrier or exited."""
        by_cta = waiting.reshape(self.ctas, -1)
        free = (by_cta | (counter == end).reshape(self.ctas, -1)).all(1) & by_cta.any(1)
        next_block = counter.reshape(self.ctas, -1)[free]
        last = np.where(next_block == end, -1, next_block).max(1)
        if (last != np.where(next_block == end, end, next_block).min(1)).any():
            raise Fault(f"{self.program.name}: threads of one CTA wait at different barriers")
        by_cta[free] = False
        self.shared.interval[free] += 1

    def write(self, register: int | None, values: np.ndarray, mask: Mask) -> None:
        """Write values to a register; narrower values are extended by the sign of their type.

        Args:
            register: The register's number; None is the sink.
            values: One value per thread, or one for all.
            mask: The threads that execute.
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
        """Broadcast values to one per thread."""
        return values if values.shape[0] == self.size else np.broadcast_to(values, (self.size,))

    def threads(self, mask: Mask) -> np.ndarray:
        """Return the numbers of the threads that execute."""
        return self._everyone if mask is None else np.flatnonzero(mask)

    def spread(self, threads: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Expand the values of some threads to a whole register, with zeros elsewhere."""
        if threads.size == self.size:
            return values
        register = np.zeros(self.size, values.dtype)
        register[threads] = values
        return register

    def expect_whole_warps(self, mask: Mask, where: str) -> None:
        """Raise Fault unless each warp executes with all of its threads or with none."""
        if mask is not None and (mask.reshape(-1, 32).any(1) != mask.reshape(-1, 32).all(1)).any():
            raise Fault(f"{where}: not all threads of a warp reach it")

    def approximate(self, exact: np.ndarray, ulps: int, *operands: np.ndarray) -> np.ndarray:
        """Round a float64 result to float32, and perturb it if ``perturb`` is set.

        The perturbation is at most ``ulps`` ulps, and always the same for the same operands.
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
    """Return the initial value of a register; a predicate (one byte) is False."""
    return np.array(
        [0xA5A5A5A5A5A5A5A5 & (1 << 8 * width) - 1 if width > 1 else 0], UNSIGNED[width]
    )
