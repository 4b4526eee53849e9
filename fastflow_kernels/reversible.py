"""Chains of invertible blocks whose training memory does not grow with their depth.

A flow's activations need not be kept: the backward pass walks the chain from its output, inverts one block at a time, and differentiates it.
Every block is an autograd node of its own, so that hooks, distributed training and frozen parameters see an ordinary graph; the activation
that a block has reconstructed travels to the block before it through their :class:`_Link`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastflow_kernels import dispatch, eager
from fastflow_kernels.functional import all_in_one_block, all_in_one_block_bwd
from fastflow_kernels.modules import InvertibleModule
from fastflow_kernels.permutations import HouseholderPermutation, IndexPermutation, Permutation
from fastflow_kernels.spec import CouplingSpec

# --- a subnet that runs twice --------------------------------------------------------------------------------------------------------


class _Subnet:
    """A block's subnet in one forward pass, with all that its result depends on beside its input: so that it can run again.

    That is: parameters, buffers, training flags, autocast, and the state of the random numbers.
    """

    def __init__(self, module: nn.Module, evaluate: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.evaluate, self.device = evaluate, device
        modules = list(module.modules())
        self.training = [(m, m.training) for m in modules]
        self.places = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
        self.parameters = list(dict.fromkeys(p for *_, p in self.places))
        self.buffers = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
        self.changed: list[tuple[dict[str, Tensor | None], str, Tensor]] = []  # buffers that a run changes, as they were before it
        self.random: list[Tensor] | None = None
        self.autocast = _autocast(device.type)

    def __call__(self, x: Tensor) -> Tensor:
        random = self._random_state()
        before = [(b._version, b.clone()) for *_, b in self.buffers]
        with self.autocast():
            a = self.evaluate(x)
        if random is not None and not all(map(torch.equal, random, self._random_state())):
            self.random = random
        for (holder, name, b), (version, value) in zip(self.buffers, before, strict=True):
            if holder[name] is not b or b._version != version:  # a batch norm's statistics, a spectral norm's vectors
                self.changed.append((holder, name, value))
        return a

    def constants(self) -> list[Tensor]:
        """The buffers that the run has left alone."""
        changed = {(id(holder), name) for holder, name, _ in self.changed}
        return [b for holder, name, b in self.buffers if (id(holder), name) not in changed]

    def again(self, x: Tensor) -> Tensor:
        """What the run returned, from the same random numbers."""
        if self.random is None:
            with self.autocast():
                return self.evaluate(x)
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            torch.set_rng_state(self.random[0])
            for device, state in zip(devices, self.random[1:], strict=True):
                torch.get_device_module(device).set_rng_state(state, device)
            with self.autocast():
                return self.evaluate(x)

    @contextmanager
    def as_it_was(self, stand_ins: dict[Tensor, Tensor]) -> Iterator[None]:
        """Within: the run's training flags, its buffers as they were before it, and stand-ins for its parameters.

        Stand-ins collect the gradients, so that a parameter's own hooks fire when autograd accumulates what the block's node returns, and
        only then.
        """
        now = [(m, m.training) for m, _ in self.training]
        mine = [(holder, name, stand_ins[p]) for holder, name, p in self.places]
        mine += [(holder, name, value.clone()) for holder, name, value in self.changed]  # a copy, for a run changes it
        outside = [(holder, name, holder.get(name)) for holder, name, _ in mine]
        try:
            _assign(self.training, mine)
            yield
        finally:
            _assign(now, outside)

    def _random_state(self) -> list[Tensor] | None:
        if self.device.type == "cpu":
            return [torch.get_rng_state()]
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # neither can it be read then; a graph advances it by itself
        return [torch.get_rng_state(), torch.get_device_module(self.device).get_rng_state(self.device)]


def _assign(training: list[tuple[nn.Module, bool]], tensors: list[tuple[dict[str, Any], str, Any]]) -> None:
    for module, flag in training:
        module.training = flag
    for holder, name, tensor in tensors:
        holder[name] = tensor


def _autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """A context manager's constructor: autocast as it is now."""
    if not _is_autocast(device_type):
        return nullcontext
    return partial(torch.autocast, device_type, torch.get_autocast_dtype(device_type), True, torch.is_autocast_cache_enabled())


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _without_autocast(device_type: str) -> AbstractContextManager:
    return torch.autocast(device_type, enabled=False) if _is_autocast(device_type) else nullcontext()


# --- one block of a chain ------------------------------------------------------------------------------------------------------------


class _Link:
    """One block's place in one forward pass of a chain: evaluates it without keeping its input or output.

    Attributes:
        first: Its input is kept, to check the reconstruction against.
        last: Its output is kept: nobody reconstructs it.
        output: Its output, as the block after it has reconstructed it; only while the backward pass is between the two.
    """

    def __init__(self, chain: Reversible, place: int, previous: _Link | None, first: bool) -> None:
        self.chain, self.place, self.previous, self.first = chain, place, previous, first
        self.last = True
        if previous is not None and not first:
            previous.last = False
        self.subnet_module = chain.module_list[place].subnet
        self.output: Tensor | None = None
        self.seen: tuple[Any, Any] | None = None  # which tensors came in and went out

    def __call__(
        self,
        x: Tensor,
        subnet: Callable[[Tensor], Tensor],
        global_scale: Tensor,
        global_offset: Tensor,
        permutation: Permutation,
        spec: CouplingSpec,
        conditions: Sequence[Tensor] = (),
        *,
        rev: bool,
        jac: bool,
        reverse_permutation: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        recorded = _Subnet(self.subnet_module, subnet, x.device)
        call = _Call(self, recorded, permutation, spec, len(conditions), jac, reverse_permutation, backend)
        vectors = permutation.vectors if isinstance(permutation, HouseholderPermutation) else None
        y, logdet = _Block.apply(call, x, global_scale, global_offset, vectors, *conditions, *recorded.parameters)
        self.seen = _identity(x), _identity(y)
        return y, logdet

    def take_output(self) -> Tensor:
        y, self.output = self.output, None
        if y is None:
            raise RuntimeError(
                f"block {self.place} of the reversible chain has no output to start from: gradients were asked of it without those of the "
                f"block after it. Make the loss depend on the chain's result, or use a chain that is not reversible."
            )
        return y


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.dtype


class _Call(NamedTuple):
    """What a block is evaluated with, beside the tensors that take gradients."""

    link: _Link
    subnet: _Subnet
    permutation: Permutation
    spec: CouplingSpec
    conditions: int
    jac: bool
    reverse_permutation: bool
    backend: str


class _Block(Function):
    """A block that keeps neither its input nor its coefficients; see :class:`_Link` for what it keeps instead."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, g: Tensor, offset: Tensor, vectors: Tensor | None, *rest: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        link = call.link
        with _without_autocast(x.device.type):
            y, logdet = all_in_one_block(
                x, call.subnet, g, offset, call.permutation, call.spec, rest[: call.conditions],
                jac=call.jac, reverse_permutation=call.reverse_permutation, backend=call.backend,
            )  # fmt: skip
        if y.dtype is not x.dtype:
            raise TypeError(f"expected block {link.place} of the reversible chain to return {x.dtype}, its input's dtype; got {y.dtype}")
        if not call.jac:
            ctx.mark_non_differentiable(logdet)
        kept_x = x if link.first or link.chain.debug else None
        kept_y = y if link.last and not link.first else None
        # the parameters, constant buffers and indices too, for autograd to notice if one is changed before the backward pass
        ctx.save_for_backward(kept_x, kept_y, g, offset, vectors, *rest, *call.subnet.constants(), *_fixed(call.permutation))
        return y, logdet

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlogdet: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or any(t is not None and dispatch.needs_composite(t) for t in (dy, dlogdet)):
            raise RuntimeError("a reversible chain has no second or batched gradients (create_graph, is_grads_batched): use one that is not")
        call: _Call = ctx.call
        x, y, g, offset, vectors, *rest = ctx.saved_tensors
        rest = rest[: call.conditions + len(call.subnet.parameters)]
        needs = ctx.needs_input_grad
        leaves = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip((g, offset, vectors, *rest), needs[2:], strict=True)
        ]
        g, offset, vectors, *rest = leaves
        permutation = call.permutation if vectors is None else call.permutation._replace(vectors=vectors)
        conditions, parameters = rest[: call.conditions], rest[call.conditions :]
        arguments = (call.subnet.again, g, offset, permutation, call.spec, conditions)
        options = {"reverse_permutation": call.reverse_permutation, "backend": call.backend}
        with (
            _without_autocast(call.subnet.device.type),
            call.subnet.as_it_was(dict(zip(call.subnet.parameters, parameters, strict=True))),
        ):
            if call.link.first and call.link.last:
                dx = _differentiated(x, dy, dlogdet, needs[1], arguments, options)
                return None, dx, *(None if t is None else t.grad for t in leaves)
            y = call.link.take_output() if y is None else y
            dy = torch.zeros_like(y) if dy is None else dy
            found = all_in_one_block_bwd(y, dy, dlogdet, *arguments, needs=(needs[1], needs[2] or needs[3]), **options)
        if x is not None:
            call.link.chain._check(call.link, found.x, x)
        if needs[1] and not call.link.first:
            call.link.previous.output = found.x
        return None, found.dx if needs[1] else None, found.dg, found.doffset, *(None if t is None else t.grad for t in leaves[2:])


def _differentiated(
    x: Tensor, dy: Tensor | None, dlogdet: Tensor | None, need: bool, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Tensor | None:
    """The gradient of x where x itself was kept: the block runs once more, for autograd."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(need)
        subnet, *others = arguments
        outputs = all_in_one_block(x, subnet, *others, **options)
    pairs = [(t, dt) for t, dt in zip(outputs, (dy, dlogdet), strict=True) if dt is not None and t.requires_grad]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [dt for _, dt in pairs])
    return x.grad


def _fixed(permutation: Permutation) -> tuple[Tensor, ...]:
    """The tensors of a permutation that take no gradient."""
    return _fixed(permutation.base) if isinstance(permutation, HouseholderPermutation) else tuple(permutation)


# --- the chain -----------------------------------------------------------------------------------------------------------------------


class Reversible:
    """What the class of a reversible chain adds to that of FrEIA's SequenceINN.

    Attributes:
        checkpoint_every: Blocks between two activations that are kept; None: as many as the measured error allows.
        debug: Keep every activation and compare.
        drift: Of the last backward pass, by block: the relative error of its reconstructed input, where that was compared.
    """

    module_list: nn.ModuleList
    conditions: list[int | None]
    force_tuple_output: bool
    checkpoint_every: int | None = None
    debug: bool = False

    def forward(
        self, x_or_z: Tensor | Sequence[Tensor], c: Iterable[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor | tuple[Tensor, ...], Tensor | int]:
        """Evaluate the chain or its inverse.

        Args:
            x_or_z: (B, C, *S), or a list or tuple with that one tensor.
            c: The conditions that the blocks' ``cond`` count in.
            rev: Compute the inverse. Its gradients, if asked for, are those of an ordinary chain.
            jac: Compute the log-determinant.

        Returns:
            The result, in a tuple if ``force_tuple_output``, and the log-determinant (B,) in nats per sample.
        """
        x = (x_or_z,) if isinstance(x_or_z, Tensor) else x_or_z
        links: dict[int, _Link] = {}
        if not rev and torch.is_grad_enabled() and len(x) == 1 and x[0].numel() and not dispatch.needs_composite(x[0]):
            links = self._links(x[0].dtype)
            if 0 in links:
                x = (x[0].to(eager.promoted(x[0], self.module_list[0].global_scale)),)
        order = range(len(self.module_list))
        log_det: Tensor | int = 0
        for i in reversed(order) if rev else order:
            arguments = {"jac": jac, "rev": rev}
            if self.conditions[i] is not None:
                arguments["c"] = [c[self.conditions[i]]]
            if i in links:
                given = x
                x, j = self.module_list[i](x, run=links[i], **arguments)
                if links[i].seen != (_identity(given[0]), _identity(x[0])):
                    raise RuntimeError(f"a hook exchanged the input or the output of block {i}, which a reversible chain cannot undo")
            else:
                x, j = self.module_list[i](x, **arguments)
            log_det = j + log_det
        return x if self.force_tuple_output else x[0], log_det

    def _links(self, dtype: torch.dtype) -> dict[int, _Link]:
        """A link for every block that can be undone."""
        links: dict[int, _Link] = {}
        every = self.checkpoint_every or math.inf
        length = 0
        for i, module in enumerate(self.module_list):
            if not _is_reversible(module):
                continue
            previous = links.get(i - 1)
            length = length + 1 if previous is not None and length < every else 1
            links[i] = _Link(self, i, previous, length == 1)
        return links

    def _check(self, link: _Link, found: Tensor, truth: Tensor) -> None:
        error = torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth)
        self.__dict__.setdefault("drift", {})[link.place] = error.item()


def _is_reversible(module: nn.Module) -> bool:
    """Whether a module is a block whose every gradient the reversible backward knows."""
    takes_run = getattr(module, "_takes_run", None)
    if takes_run is None or not takes_run() or not isinstance(module.subnet, nn.Module) or module._compiled_call_impl is not None:
        return False
    return not any(getattr(getattr(module, name, None), "requires_grad", False) for name in ("w_perm", "w_perm_inv", "w_0"))


class ReversibleSequence(Reversible, InvertibleModule):
    """A chain of invertible modules, with the interface and the state dict of FrEIA's SequenceINN."""

    def __init__(self, *dims: int, force_tuple_output: bool = False, checkpoint_every: int | None = None, debug: bool = False) -> None:
        super().__init__([dims])
        self.shapes = [tuple(dims)]
        self.conditions = []
        self.module_list = nn.ModuleList()
        self.force_tuple_output = force_tuple_output
        self.checkpoint_every, self.debug = checkpoint_every, debug

    def append(self, module_class, cond=None, cond_shape=None, **kwargs):
        dims_in = [self.shapes[-1]]
        if isinstance(module_class, nn.Module):
            module = module_class
        else:
            if cond is not None:
                kwargs["dims_c"] = [cond_shape]
            module = module_class(dims_in, **kwargs)
        self.conditions.append(cond)
        self.module_list.append(module)
        self.shapes.append(module.output_dims(dims_in)[0])

    def __getitem__(self, item):
        return self.module_list[item]

    def __len__(self):
        return len(self.module_list)

    def __iter__(self):
        return iter(self.module_list)
