"""``report(model)``: what runs in a model, block by block and chain by chain, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastflow_kernels import probe, probe_couplings, torch_private
from fastflow_kernels.accelerated import (
    AcceleratedModule,
    AcceleratedSequence,
    class_before,
    describe_chain,
    held_by,
    make_reversible,
)
from fastflow_kernels.accelerated_couplings import HeldCoupling
from fastflow_kernels.backends import auto_chooses
from fastflow_kernels.coupling_blocks import CouplingBlock
from fastflow_kernels.index_cache import IndexCache
from fastflow_kernels.modules import AllInOneBlock, FusedForward, why_not_fused
from fastflow_kernels.permutations import IndexPermutation
from fastflow_kernels.predicates import SMALL
from fastflow_kernels.reversible import ReversibleChain
from fastflow_kernels.route import PRODUCT_COST
from fastflow_kernels.stock import GRAPH, PERMUTATION, SEQUENCE, Left, is_named, shallow_copy


@dataclass(frozen=True)
class Entry:
    """A block, or a chain of blocks.

    Attributes:
        name: Its name in the model, as ``named_modules`` gives it ("" for the model itself).
        kind: Its class, with the module that defines it.
        state: What runs. A block is "accelerated", "fused" (built so), "stock maths" (accelerated
            or fused, but something that it reads was replaced) or "left" (an unchanged stock
            block). A chain is "reversible", "accelerated" or "left".
        changed: Whether :func:`~fastflow_kernels.accelerate` has changed its class.
        reason: How it was recognised, or why it runs as it does.
    """

    name: str
    kind: str
    state: str
    changed: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """What runs in a model, and why: the result of :func:`report`, to be printed.

    Attributes:
        entries: One per block, in the model's order.
        chains: One per SequenceINN, reversible or not, and per GraphINN with blocks.
    """

    entries: tuple[Entry, ...]
    chains: tuple[Entry, ...] = ()

    @property
    def changed(self) -> tuple[Entry, ...]:
        """The blocks that :func:`accelerate` has changed."""
        return tuple(entry for entry in self.entries if entry.changed)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The stock blocks that were left alone."""
        return tuple(entry for entry in self.entries if entry.state == "left")

    def __str__(self) -> str:
        fused = sum(entry.state in ("accelerated", "fused") for entry in self.entries)
        lines = [
            f"{fused} of {len(self.entries)} blocks run fused"
            if self.entries
            else "no AllInOneBlock and no coupling block of FrEIA found in the model"
        ]
        lines += [_line(entry) for entry in self.entries]
        if self.chains:
            reversible = sum(entry.state == "reversible" for entry in self.chains)
            lines.append(f"{reversible} of {len(self.chains)} chains are reversible")
            lines += [_line(entry) for entry in self.chains]
        if any("backend 'auto'" in entry.reason for entry in self.entries) and auto_chooses():
            lines.append(NOTE_ON_SMALL_INPUTS)
        return "\n".join(lines)


_GATHER = "a permutation by a gather, forward and backward"
NOTE_ON_SMALL_INPUTS = (
    f"small inputs on a CPU run plain operations: up to {SMALL} elements, in training with a soft "
    f"permutation {PRODUCT_COST * SMALL}"
)


def _line(entry: Entry) -> str:
    return f"  {entry.state:<11} {entry.name or '(the model itself)'}  {entry.kind}: {entry.reason}"


def report(model: nn.Module) -> Report:
    """Say for every block and every chain in a model what runs, and why.

    The model is probed as it is now, accelerated or not. Nothing about it changes.

    Args:
        model: Any module, also a single block.

    Returns:
        One entry per block and per chain; its ``str`` is a line for each.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.

    Example:
        >>> import torch
        >>> from fastflow_kernels import AllInOneBlock, report
        >>> block = AllInOneBlock([(4,)], subnet_constructor=torch.nn.Linear)
        >>> print(report(torch.nn.Sequential(block)).entries[0].reason)
        dialect 'anomalib', SOFTPLUS, hard permutation; backend 'auto'
    """
    named = modules_of(model)
    entries = [_entry_of_block(name, block) for name, block in named]
    chains = [_entry_of_chain(name, chain) for name, chain in named]
    return Report(
        tuple(entry for entry in entries if entry), tuple(entry for entry in chains if entry)
    )


def _entry_of_block(name: str, block: Any) -> Entry | None:
    kind = _kind(block)
    is_changed = isinstance(block, AcceleratedModule)
    if isinstance(block, FusedForward):
        if (reason := why_not_fused(block)) is not None:
            return Entry(name, kind, "stock maths", is_changed, reason)
        state = "accelerated" if is_changed else "fused"
        return Entry(name, kind, state, is_changed, _describe_fused(block))
    if not is_stock(block):
        return None
    try:
        if is_named(type(block)):
            maths = probe.identify(block, type(block))
            words = _describe(block, maths.dialect, maths.activation)
        elif is_named(type(block), PERMUTATION):
            probe_couplings.check_permutation(block, type(block))
            words = _GATHER
        else:
            words = _describe_coupling(probe_couplings.identify(block, type(block)).clamp_function)
    except Left as reason:
        return Entry(name, kind, "left", False, str(reason))
    return Entry(name, kind, "left", False, f"accelerate(model) would take it: computes {words}")


def _entry_of_chain(name: str, chain: Any) -> Entry | None:
    kind = _kind(chain)
    if isinstance(chain, ReversibleChain):
        is_changed = isinstance(chain, AcceleratedSequence)
        return Entry(name, kind, "reversible", is_changed, describe_chain(chain))
    if isinstance(chain, AcceleratedSequence):
        return Entry(name, kind, "accelerated", True, describe_chain(chain))
    if is_named(type(chain), GRAPH) and any(map(is_stock, chain.modules())):
        reason = "a GraphINN cannot be made reversible; a SequenceINN of the same blocks can"
        return Entry(name, kind, "left", False, reason)
    if not is_named(type(chain), SEQUENCE):
        return None
    outcome = make_reversible(shallow_copy(chain, type(chain)))
    if outcome is None:
        return None
    can_be_reversible, reason = outcome
    if can_be_reversible:
        # how many of its modules depends on what accelerate makes of its blocks
        reason = "accelerate(model, reversible=True) would take it"
    return Entry(name, kind, "left", False, reason)


def _describe_fused(block: Any) -> str:
    if isinstance(block, AllInOneBlock):
        words = _describe(block, block.dialect, block.global_affine_type)
        return f"{words}; backend {block.backend!r}"
    if isinstance(block, CouplingBlock):
        return f"{_describe_coupling(block.clamp_function)}; backend {block.backend!r}"
    held = held_by(block)
    if isinstance(held, IndexCache):
        return f"computes {_GATHER}"
    if isinstance(held, HeldCoupling):
        return f"computes {_describe_coupling(held.clamp_function)}; backend {held.backend!r}"
    words = _describe(block, held.dialect, held.activation)
    return f"computes {words}; backend {held.backend!r}"


def _describe_coupling(clamp_function: str | None) -> str:
    if not clamp_function:
        return "an additive coupling, in plain operations"
    return f"an affine coupling with clamp function {clamp_function!r}"


def _describe(block: Any, dialect: str, activation: str) -> str:
    if block.householder:
        permutation = f"{block.householder} Householder reflections"
    elif torch_private.is_symbolic() or block.w_perm.is_meta:
        permutation = "a permutation that holds no values now"
    else:
        permutation = (
            "hard permutation"
            if isinstance(IndexCache().permutation(block), IndexPermutation)
            else "soft permutation"
        )
    scale = "GIN" if block.GIN else activation  # the scale of a GIN block is 1
    return f"dialect {dialect!r}, {scale}, {permutation}"


def _kind(part: Any) -> str:
    cls = class_before(part)
    return f"{cls.__module__}.{cls.__qualname__}"


def is_stock(block: Any) -> bool:
    """Return whether a module is a stock block of FrEIA or anomalib, accelerated or not."""
    if isinstance(block, AllInOneBlock | CouplingBlock):
        return False
    cls = type(block)
    return is_named(cls) or is_named(cls, PERMUTATION) or probe_couplings.form_of(cls) is not None


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return all modules of a model with their names; raise TypeError if it is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())
