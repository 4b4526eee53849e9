"""One block of a reversible chain, as an autograd node that keeps no activations.

The activation that a block has reconstructed travels to the block before it through their links.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastflow_kernels.call import BlockCall, PermutationCall, SidesCall
from fastflow_kernels.coupling import OutputGrads
from fastflow_kernels.drift import Checkpoints, Differences, Segment, error_of
from fastflow_kernels.modules import subnets_of
from fastflow_kernels.permutations import HouseholderPermutation
from fastflow_kernels.predicates import is_capturing
from fastflow_kernels.reconstruct import reconstruct
from fastflow_kernels.replay import ReplayedSubnet, swap_lock, without_autocast
from fastflow_kernels.sides import evaluate
from fastflow_kernels.torch_private import needs_plain, version_of


class Pass:
    """One forward pass of a chain, and the backward pass after it.

    Attributes:
        checkpoints: The chain's checkpoints.
        keeps_all: Whether every activation is kept, to compare with.
        drift: The errors found in the backward pass, by the block's index.
        differences: Differences between the blocks' first and second outputs.
    """

    def __init__(self, checkpoints: Checkpoints, keeps_all: bool) -> None:
        self.checkpoints, self.keeps_all = checkpoints, keeps_all
        self.drift: dict[int, float] = {}
        self.differences = Differences()


class Link:
    """A block's place in a pass, which evaluates it without keeping its input or output.

    Attributes:
        block: The block. Its subnet is read when it runs.
        place: Index of the block in the chain.
        segment: The part of the chain that the block belongs to.
        previous: The link of the block before it; None if that block keeps its activations.
        output: The block's output, as reconstructed by the block after it. It is only there while
            the backward pass is between the two.
        seen: Identities of the tensors that came in and went out.
    """

    def __init__(
        self,
        chain_pass: Pass,
        block: Any,
        place: int,
        segment: Segment,
        previous: Link | None,
    ) -> None:
        self.chain_pass, self.block = chain_pass, block
        self.place, self.segment, self.previous = place, segment, previous
        self.output: Tensor | None = None
        self.seen: tuple[Any, Any] | None = None

    @property
    def is_first(self) -> bool:
        return self.place == self.segment.first

    @property
    def is_last(self) -> bool:
        return self.place == self.segment.last

    def evaluate(self, call: AnyCall) -> tuple[Tensor, Any]:
        """Evaluate a call as :func:`fastflow_kernels.sides.evaluate` does."""
        replayed = _replayed_subnets(call, self.block)
        parameters = dict.fromkeys(p for subnet in replayed for p in subnet.parameters)
        for p in parameters:
            if type(p) is not Tensor and type(p) is not nn.Parameter:
                raise TypeError(
                    f"expected the parameters of the subnet of block {self.place} in a reversible "
                    f"chain to be plain tensors, got {type(p).__name__}; initialise lazy modules "
                    "first, and shard whole blocks or the chain, not the subnet"
                )
        permutation, template = call.permutation, cast(Any, call)._replace(x=None, conditions=())
        if isinstance(template, BlockCall):  # reconstruction needs the digits of float32
            template = template._replace(output_dtype=None)
        linked = _Linked(
            self, replayed, list(parameters), template, len(call.conditions), call.x.device
        )
        vectors = permutation.vectors if isinstance(permutation, HouseholderPermutation) else None
        y, log_det = _LinkedBlock.apply(
            linked,
            call.x,
            call.global_scale,
            call.global_offset,
            vectors,
            *call.conditions,
            *parameters,
        )
        self.seen = identity_of(call.x), identity_of(y)
        return y, log_det

    def take_output(self) -> Tensor:
        """Return the output that the block after this one has reconstructed, and let go of it."""
        y, self.output = self.output, None
        if y is None:
            raise RuntimeError(
                f"block {self.place} of the reversible chain has no output to start from: "
                "its gradients were asked for without those of the block after it. Make the loss "
                "depend on the chain's result, or use a chain that is not reversible."
            )
        return y

    def compare(self, reconstructed: Tensor, x: Tensor, y: Tensor) -> None:
        """Record how far the reconstructed input is from the kept one.

        At the first block of a segment, also act on it: keep more activations, warn or raise.
        """
        if is_capturing(x):
            return
        error = error_of(reconstructed, x, y, self.segment)
        self.chain_pass.drift[self.place] = error
        if self.is_first:
            self.chain_pass.checkpoints.act_on(error, self.segment, x.dtype)

    def finish(self, dtype: torch.dtype, want_x: bool) -> None:
        """Check the differences of the second runs, if the backward pass ends here."""
        if self.previous is None or not want_x:
            self.chain_pass.differences.check(dtype)


def identity_of(x: Tensor) -> tuple[Any, ...]:
    """Return what changes when another tensor takes the place of x, or when x is written to."""
    return x.data_ptr(), x.shape, x.dtype, version_of(x)


AnyCall = BlockCall | SidesCall | PermutationCall


def _replayed_subnets(call: AnyCall, block: Any) -> list[ReplayedSubnet]:
    """Return the subnets of a call, each ready to run again."""
    sides = call.sides if isinstance(call, SidesCall) else ()
    runs = [subnet for side in sides for subnet in side.subnets]
    if isinstance(call, BlockCall):
        runs = [call.subnet]
    pairs = zip(subnets_of(block), runs, strict=True)
    return [ReplayedSubnet(module, run, call.x.device) for module, run in pairs]


def _subnets_of_later_sides(call: Any) -> range:
    """Return the places of subnets that read what an earlier side's parameters have changed."""
    if not isinstance(call, SidesCall):
        return range(0)
    return range(len(call.sides[0].subnets), sum(len(side.subnets) for side in call.sides))


class _Linked(NamedTuple):
    """The inputs of a linked block that take no gradients.

    Attributes:
        link: Its place in the chain.
        subnets: Its subnets.
        parameters: The parameters of all of them, each once.
        template: The call without x and conditions.
        condition_count: Number of its conditions.
        device: Where it runs.
    """

    link: Link
    subnets: list[ReplayedSubnet]
    parameters: list[Tensor]
    template: Any
    condition_count: int
    device: torch.device


class _LinkedBlock(Function):
    """A block that keeps neither its input nor its coefficients; see :class:`Link`."""

    @staticmethod
    def forward(ctx: Any, linked: _Linked, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.linked, link = linked, linked.link
        # For x and the conditions, which come after the parameters and vectors.
        wanted = ctx.needs_input_grad[1], *ctx.needs_input_grad[5 : 5 + linked.condition_count]
        later = _subnets_of_later_sides(linked.template)
        for i, subnet in enumerate(linked.subnets):
            subnet.input_takes_gradient = any(wanted) or i in later
        with without_autocast(x.device):
            y, log_det = evaluate(_make_call(linked, x, tensors, linked.subnets))
        if y.dtype is not x.dtype:
            raise TypeError(
                f"expected block {link.place} of the reversible chain to return {x.dtype}, its "
                f"input's dtype; got {y.dtype}"
            )
        kept_x = x if link.is_first or link.chain_pass.keeps_all else None
        kept_y = y if link.is_last else None
        # Parameters, constant buffers and indices are saved, too, so that autograd notices if one
        # changes before the backward pass.
        unchanged = [t for subnet in linked.subnets for t in subnet.constants()]
        unchanged += _fixed_tensors(linked.template)
        ctx.save_for_backward(kept_x, kept_y, *tensors, *unchanged)
        return y, log_det

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlog_det: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or needs_plain(dy, dlog_det):
            raise RuntimeError(
                "a reversible chain has no second or batched gradients (create_graph, "
                "is_grads_batched): use FrEIA's SequenceINN, or accelerate without reversible=True"
            )
        linked: _Linked = ctx.linked
        link = linked.link
        x, y, *tensors = ctx.saved_tensors
        _, want_x, *wanted = ctx.needs_input_grad
        leaves: list[Any] = [
            None if t is None else t.detach().requires_grad_(want)
            for t, want in zip(tensors[: len(wanted)], wanted, strict=True)
        ]
        parameters = leaves[3 + linked.condition_count :]
        stand_ins: dict[Tensor, Tensor] = dict(zip(linked.parameters, parameters, strict=True))
        with ExitStack() as stack:
            stack.enter_context(swap_lock)
            stack.enter_context(without_autocast(linked.device))
            for subnet in linked.subnets:
                stack.enter_context(subnet.as_it_was(stand_ins))
            if link.is_first and link.is_last:
                dx = _differentiate_kept(
                    linked, x.detach().requires_grad_(want_x), y, leaves, (dy, dlog_det)
                )
                return None, dx, *(None if t is None else t.grad for t in leaves)
            if y is None:
                y = link.take_output()
            else:
                link.segment.largest = torch.linalg.vector_norm(y, torch.inf)
            dy = torch.zeros_like(y) if dy is None else dy
            call = _make_call(linked, y, leaves, [s.run_again for s in linked.subnets])
            block = reconstruct(call, OutputGrads(dy, dlog_det), want_x, wanted[0] or wanted[1])
        link.finish(y.dtype, want_x)
        if x is not None:
            link.compare(block.x, x, y)
        if want_x and not link.is_first and link.previous is not None:
            link.previous.output = block.x
        from_leaves = (None if t is None else t.grad for t in leaves[2:])
        dx = block.dx if want_x else None
        return None, dx, block.dglobal_scale, block.dglobal_offset, *from_leaves


def _make_call(linked: _Linked, x: Tensor, tensors: Sequence[Any], subnets: Sequence[Any]) -> Any:
    """Make the call of a linked block.

    Args:
        linked: The block.
        x: The block's input, or its output if the input is to be reconstructed.
        tensors: global_scale, global_offset, the reflections' vectors or None, the conditions, the
            subnets' parameters.
        subnets: What runs the subnets.
    """
    global_scale, global_offset, vectors, *conditions_and_parameters = tensors
    call, conditions = linked.template, tuple(conditions_and_parameters[: linked.condition_count])
    if isinstance(call, PermutationCall):
        return call._replace(x=x)
    if isinstance(call, SidesCall):
        runs = iter(subnets)
        sides = [
            side._replace(subnets=tuple(next(runs) for _ in side.subnets)) for side in call.sides
        ]
        return call._replace(x=x, conditions=conditions, sides=tuple(sides))
    permutation = call.permutation
    if isinstance(permutation, HouseholderPermutation):
        permutation = permutation._replace(vectors=vectors)
    return call._replace(
        x=x,
        conditions=conditions,
        subnet=subnets[0],
        global_scale=global_scale,
        global_offset=global_offset,
        permutation=permutation,
    )


def _differentiate_kept(
    linked: _Linked,
    x: Tensor,
    y: Tensor,
    leaves: Sequence[Any],
    gradients: tuple[Tensor | None, Tensor | None],
) -> Tensor | None:
    """Differentiate a block whose input and output are kept, and return the gradient of x."""
    link = linked.link
    with torch.enable_grad():
        call = _make_call(linked, x, leaves, [s.run_again for s in linked.subnets])
        results = evaluate(call)
    link.chain_pass.differences.record(link.place, results[0], y)
    link.finish(y.dtype, x.requires_grad)
    pairs = [
        (t, dt)
        for t, dt in zip(results, gradients, strict=True)
        if dt is not None and t.requires_grad
    ]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [dt for _, dt in pairs])
    return x.grad


def _fixed_tensors(call: AnyCall) -> tuple[Tensor, ...]:
    """Return the tensors of a call's permutation that take no gradient."""
    permutation = call.permutation
    if isinstance(permutation, HouseholderPermutation):
        permutation = permutation.base
    return () if permutation is None else tuple(permutation)
