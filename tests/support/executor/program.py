"""A kernel's PTX, decoded into blocks of operations for the machine, and the launch of a grid.

Decoding happens once. Each instruction becomes a function of the machine and of the threads that
execute it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tests.support.executor import instructions
from tests.support.executor.machine import SPECIAL, Machine, Mask
from tests.support.executor.memory import Global, GlobalTensor
from tests.support.executor.values import UNSIGNED, Fault, Type, Unsupported, constant, i8

Operation = Callable[[Machine, Mask], None]
Source = Callable[[Machine], np.ndarray]
Operands = list["str | list[str]"]  # a list is a vector in braces

THREADS_AT_ONCE = 1 << 14


class Statement(NamedTuple):
    """An instruction.

    Attributes:
        text: The instruction.
        where: The same with the kernel's name and the line of its source, for messages.
    """

    text: str
    where: str


class Block(NamedTuple):
    """Operations without a jump between them, and the jump or barrier after them.

    Attributes:
        operations: Operations, in order.
        is_barrier: Whether the threads then wait for all threads of their CTA.
        target: The block to jump to; None to continue with the next.
        predicate: Register that selects the threads that jump; None for all.
        is_negated: Whether the threads jump whose predicate is false.
    """

    operations: list[Operation]
    is_barrier: bool = False
    target: int | None = None
    predicate: int | None = None
    is_negated: bool = False


class Program:
    """A decoded kernel.

    Args:
        text: PTX with one entry point.

    Raises:
        Unsupported: If the PTX contains something that the executor does not know.
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
        self.name = re.search(r"\.visible \.entry (\w+)\(", text)[1]
        header, body = text[text.index(".entry") :].split("\n{", 1)
        if (
            re.search(
                r"\.shared (?!\.align \d+ \.b8 global_smem\[\])", text.split(".extern", 1)[-1]
            )
            or ".func" in text
        ):
            raise Unsupported(f"{self.name}: static shared memory or a function")
        self.params = re.findall(r"\.param \.(\w+) .*?(\w+_param_\d+)", header)  # types and names
        self.threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", header)[1])
        self.widths: list[int] = []  # bytes of each register; 1 for a predicate
        self._declared: dict[str, int] = {}  # bytes, by a register's name or its prefix
        self._numbers: dict[str, int] = {}
        files = {
            number: Path(path).name
            for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)
        }
        labels, blocks = self._split(body.split("\n}", 1)[0], files)
        self.blocks = [self._block(statements, labels, len(blocks)) for statements in blocks]

    def _split(
        self, body: str, files: dict[str, str]
    ) -> tuple[dict[str, int], list[list[Statement]]]:
        """Return the number of each label's block, and the statements of each block."""
        labels: dict[str, int] = {}
        blocks: list[list[Statement]] = [[]]
        source = ""
        for line in body.splitlines():
            line = line.strip()
            if location := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
                source = f"{files.get(location[1], '?')}:{location[2]}: "
                continue
            if label := re.fullmatch(r"(\$?[\w$]+):", line):
                if blocks[-1]:
                    blocks.append([])
                labels[label[1]] = len(blocks) - 1
                continue
            for statement in line.split(";"):
                # A brace opens the scope of inline assembly.
                statement = statement.strip().lstrip("{").strip()
                if declared := re.match(r"\.reg\s+\.(\w+)\s+(%?\w+)", statement):
                    kind, name = declared.groups()
                    self._declared[name] = 1 if kind == "pred" else int(kind[1:]) // 8
                elif statement and statement[0] not in ".}":
                    blocks[-1].append(Statement(statement, f"{self.name}: {source}{statement}"))
                    if re.match(r"(@!?%p\d+\s+)?(bra|ret|exit|bar\.sync|barrier)\b", statement):
                        blocks.append([])
        return labels, blocks

    def _block(self, statements: list[Statement], labels: dict[str, int], end: int) -> Block:
        operations: list[Operation] = []
        for text, where in statements:
            parts = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
            if parts is None:
                raise Unsupported(where)
            guard, op, operands = parts.groups()
            is_negated = guard is not None and guard[0] == "!"
            predicate = None if guard is None else self.register(guard.lstrip("!"))
            if op in ("ret", "exit", "bra", "bra.uni"):
                target = labels.get(operands.strip()) if op.startswith("bra") else end
                if target is None:
                    raise Unsupported(where)
                return Block(operations, target=target, predicate=predicate, is_negated=is_negated)
            if op in ("bar.sync", "barrier.sync") and not guard and operands.strip() == "0":
                return Block(operations, is_barrier=True)
            if op == "bar.warp.sync" and not guard and operands.strip() == "-1":
                operations.append(
                    lambda machine, mask, where=where: machine.expect_whole_warps(mask, where)
                )
                continue
            if op.split(".")[0] in ("bar", "bra", "barrier"):
                raise Unsupported(where)
            try:
                run = instructions.decode(self, op, _operands(operands), where)
            except Unsupported as error:
                raise Unsupported(where if str(error) == where else f"{where}: {error}") from None
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise Unsupported(f"{where}: {error!r}") from error
            operations.append(run if predicate is None else _guarded(run, predicate, is_negated))
        return Block(operations)

    def register(self, name: str) -> int | None:
        """Return a register's number; None for the sink."""
        if name == "_":
            return None
        if not re.fullmatch(r"%?\w+", name):
            raise Unsupported(f"a register {name}")
        if name not in self._numbers:
            self._numbers[name] = len(self.widths)
            declared = name if name in self._declared else re.match(r"%[a-z]+", name)[0]
            self.widths.append(self._declared[declared])
        return self._numbers[name]

    def source(self, name: str, kind: Type) -> Source:
        """Return a function that reads a register, a special register or a constant."""
        name = "0" if name == "global_smem" else name
        if name in ("%laneid", "%warpid") or (name[0] == "%" and "." in name):
            if name not in SPECIAL:
                raise Unsupported(f"a special register {name}")
            return lambda machine: kind.read(machine.special[name])
        if name[0] == "%" or name in self._declared:
            register = self.register(name)
            return lambda machine: kind.read(machine.registers[register])
        if kind.dtype is np.bool_ and name in ("-1", "1", "0"):
            value = np.array([name != "0"])
        else:
            value = kind.read(constant(name, kind.size))
        return lambda machine: value

    def address(self, text: str, kind: Type) -> Source:
        """Return a function that reads an address, ``[register + offset]``."""
        name, sign, offset = re.fullmatch(
            r"\[\s*([%\w$]+)\s*(?:([+-])\s*(-?\d+))?\s*\]", text
        ).groups()
        step = np.array([int(offset or 0) * (-1 if sign == "-" else 1)], i8).astype(kind.dtype)
        base = self.source(name, kind)
        return lambda machine: machine.full(base(machine) + step)

    def param(self, text: str) -> int:
        """Return the number of the parameter that ``[name]`` stands for."""
        return [name for _, name in self.params].index(text.strip("[] "))

    def launch(
        self,
        grid: tuple[int, int, int],
        args: list[tuple[str, torch.Tensor | int | None]],
        shared: int,
        perturb: int | None = None,
        ctas: list[int] | None = None,
    ) -> list[GlobalTensor]:
        """Run the kernel on a grid.

        Args:
            grid: The three sizes of the grid.
            args: For each parameter a name for messages, and a tensor, an integer, or None for a
                null pointer.
            shared: Bytes of shared memory.
            perturb: Seed. If set, the approximate instructions are off by up to their documented
                error.
            ctas: Numbers of the CTAs to run; None for all.

        Returns:
            The launch's tensors, which record the elements that were loaded and stored.

        Raises:
            Fault: If a GPU would stop, or silently compute something wrong.
            Unsupported: If tensors share memory and one of them was stored to.
        """
        if len(args) != len(self.params):
            raise Fault(f"{self.name}: {len(args)} arguments for {len(self.params)} parameters")
        params: list[np.ndarray] = []
        tensors: list[GlobalTensor] = []
        for (kind, _), (name, arg) in zip(self.params, args, strict=True):
            if isinstance(arg, torch.Tensor):
                arg = _in_address_space(name, arg, tensors).address
            bits = int(kind[1:])
            arg = 0 if arg is None else arg
            if not -(1 << bits - 1) <= arg < 1 << bits:
                raise Fault(f"{self.name}: {name} = {arg} does not fit its {bits} bits")
            params.append(np.array([arg & (1 << bits) - 1], UNSIGNED[bits // 8]))
        memory = Global(tensors)
        numbers = np.arange(grid[0] * grid[1] * grid[2]) if ctas is None else np.asarray(ctas)
        step = max(1, THREADS_AT_ONCE // self.threads)
        with np.errstate(all="ignore"):
            # The order of the CTAs must not matter, so take the last first.
            for start in reversed(range(0, len(numbers), step)):
                Machine(
                    self, numbers[start : start + step], grid, params, memory, shared, perturb
                ).run()
        for tensor in tensors:
            tensor.check_races(self.name, self.threads)
        for a, b in itertools.combinations(tensors, 2):
            if (a.stores or b.stores) and a.shares_memory_with(b):
                raise Unsupported(
                    f"{self.name}: {a.name} and {b.name} share memory, and one of them was "
                    "stored to"
                )
        return tensors


def _in_address_space(name: str, tensor: torch.Tensor, tensors: list[GlobalTensor]) -> GlobalTensor:
    """Return the launch's tensor for this one, and add it unless it was already passed."""
    for known in tensors:
        t = known.tensor
        if (
            tensor.numel()
            and t.data_ptr() == tensor.data_ptr()
            and t.shape == tensor.shape
            and t.stride() == tensor.stride()
        ):
            return known
    new = GlobalTensor(len(tensors) + 1, name, tensor)
    tensors.append(new)
    return new


def _guarded(run: Operation, predicate: int, is_negated: bool) -> Operation:
    """Restrict an operation to the threads whose predicate holds."""

    def guarded(machine: Machine, mask: Mask) -> None:
        holds = machine.registers[predicate].view(np.bool_) ^ is_negated
        if holds.shape[0] == 1:
            if holds[0]:
                run(machine, mask)
            return
        mask = holds if mask is None else mask & holds
        if mask.any():
            run(machine, None if mask.all() else mask)

    return guarded


def _operands(text: str) -> Operands:
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)
    return [
        [part.strip() for part in p[1:-1].split(",")] if p[0] == "{" else p.strip() for p in parts
    ]
