"""``accelerate(model)`` and ``restore(model)``, for models of FrEIA and anomalib.

A stock block stays the object it is, with its parameters, hooks and state-dict keys. Only its class
is replaced by a subclass whose ``forward`` is fused. Containers that keep references to blocks
(GraphINN's nodes) and optimizers notice nothing.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn

from fastflow_kernels import (
    accelerated,
    accelerated_couplings,
    backends,
    probe,
    probe_couplings,
)
from fastflow_kernels.accelerated import AcceleratedModule, AcceleratedSequence
from fastflow_kernels.modules import FusedForward, why_not_fused
from fastflow_kernels.reporting import is_stock, modules_of
from fastflow_kernels.reversible import ReversibleChain
from fastflow_kernels.stock import PERMUTATION, Left, is_named

_Model = TypeVar("_Model", bound=nn.Module)


def accelerate(
    model: _Model,
    *,
    backend: str = "auto",
    reversible: bool = False,
    half_output: bool = False,
) -> _Model:
    """Make every AllInOneBlock and affine coupling block in ``model`` run fused, in place.

    These are the blocks of FrEIA and anomalib: AllInOneBlock, GLOWCouplingBlock, RNVPCouplingBlock,
    GINCouplingBlock, NICECouplingBlock, AffineCouplingOneSided and ConditionalAffineTransform.
    FrEIA's PermuteRandom then gathers channels in its backward pass, too. Consecutive
    AllInOneBlocks of a SequenceINN run together, so that less is computed and copied in between.

    Parameters stay the same objects. Hooks, state-dict keys and values do not change either.

    To find out which maths a block computes, a copy of it runs on a small input with random
    parameters. A block that computes something else than expected is left alone, and so is one
    whose class overrides a step. :func:`report` says what was done.

    Some things that a stock block reads in every call may be replaced later:
    ``permute_function``, a step, the activation, or ``clamp`` for a tensor. The change takes
    effect, because such a call runs the stock maths.

    Args:
        model: Any module, also a single block.
        backend: "auto", "eager" or "triton", for the changed blocks.
        reversible: Also make every SequenceINN of FrEIA train in memory that does not grow with its
            depth, as :class:`~fastflow_kernels.ReversibleSequence` does. The chain then has the
            attributes ``checkpoint_every``, ``debug`` and ``drift``, which can be set.
        half_output: Whether AllInOneBlock returns autocast's half precision where autocast is on,
            as the stock block of a hard or soft matrix does. Otherwise, and in the inverse, it
            returns float32.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``, or ``backend`` is not a string.
        ValueError: ``backend`` is unknown, or both ``reversible`` and ``half_output`` are set: an
            activation cannot be reconstructed from half precision.

    Warns:
        UserWarning: No block of the model runs fused afterwards, or no chain is reversible although
            ``reversible`` is set.

    Example:
        >>> import torch
        >>> from fastflow_kernels import AllInOneBlock, accelerate, report
        >>> model = torch.nn.Sequential(AllInOneBlock([(4,)], subnet_constructor=torch.nn.Linear))
        >>> model = accelerate(model)
        >>> print(report(model).entries[0].state)  # "accelerated" for a block of FrEIA or anomalib
        fused
    """
    backends.validated(backend)
    if reversible and half_output:
        raise ValueError(
            "expected at most one of reversible and half_output: activations are not reconstructed "
            "from half precision. Choose one of them"
        )
    parts = [part for _, part in modules_of(model)]
    for block in parts:
        if is_stock(block):
            _accelerate_block(block, backend, half_output)
    for chain in parts:
        if reversible:
            accelerated.make_reversible(chain)
        accelerated.make_fused(chain)
    missing = []
    if not any(isinstance(part, FusedForward) and why_not_fused(part) is None for part in parts):
        missing.append("no block of the model runs fused")
    if reversible and not any(isinstance(part, ReversibleChain) for part in parts):
        missing.append(
            "no chain of the model was made reversible (a SequenceINN can be, a GraphINN cannot)"
        )
    if missing:
        warnings.warn(
            f"{' and '.join(missing)}; print(fastflow_kernels.report(model)) says why",
            UserWarning,
            stacklevel=2,
        )
    return model


def restore(model: _Model) -> _Model:
    """Give the stock class back to every block and chain that :func:`accelerate` changed, in place.

    Args:
        model: The model that was passed to :func:`accelerate`, a copy of it, or a part of it.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        RuntimeError: The class of an accelerated block or chain was changed again afterwards, for
            example by a parametrization. Nothing is restored then.
    """
    changed = [
        (name, part)
        for name, part in modules_of(model)
        if isinstance(part, AcceleratedModule | AcceleratedSequence)
    ]
    stuck = [
        name or "the model itself"
        for name, part in changed
        if not accelerated.can_be_restored(part)
    ]
    if stuck:
        raise RuntimeError(
            f"cannot restore {', '.join(stuck)}: the class was changed again after accelerate (by "
            "a parametrization or by FSDP, perhaps). Revert that change first; nothing was restored"
        )
    for _, part in changed:
        accelerated.give_back_class(part)
    return model


def _accelerate_block(block: Any, backend: str, half_output: bool) -> None:
    """Replace the class of a stock block, if it computes one of the known forms.

    An accelerated block is probed again if it has changed since then.
    """
    if isinstance(block, AcceleratedModule):
        accelerated.set_options(block, backend, half_output)
        if why_not_fused(block) is None:
            return
    cls = accelerated.class_before(block)
    try:
        if is_named(cls):
            accelerated.hold(block, probe.identify(block, cls), backend, half_output)
        elif is_named(cls, PERMUTATION):
            probe_couplings.check_permutation(block, cls)
            accelerated_couplings.hold_permutation(block)
        else:
            maths = probe_couplings.identify(block, cls)
            accelerated_couplings.hold_coupling(block, maths, backend)
    except Left:
        return
