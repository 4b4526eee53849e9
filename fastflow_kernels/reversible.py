"""Chains of invertible blocks whose training memory does not grow with their depth.

A flow's activations need not be kept: the backward pass walks the chain from its output, inverts
one block at a time and differentiates it. Every block is an autograd node of its own, so that
hooks, distributed training and frozen parameters see an ordinary graph; the activation that a block
has reconstructed travels to the block before it by way of their links.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from fastflow_kernels import dispatch
from fastflow_kernels.adoption import adopt
from fastflow_kernels.engines import eager
from fastflow_kernels.functional import all_in_one_block, all_in_one_block_bwd
from fastflow_kernels.modules import InvertibleModule
from fastflow_kernels.permutations import HouseholderPermutation, Permutation
from fastflow_kernels.coupling import CouplingSpec

# Errors of a reconstructed activation relative to its norm. FastFlow on photographs, 32 blocks,
# float32: the reconstruction is off by 3e-7 and the gradients of a plain chain by 1e-5. above this,
# the passes to come keep more
_WANTED = {torch.float32: 2.0**-17, torch.float64: 2.0**-33}
_WARNED = 2.0**-11  # above this, the user is told
# as much may a block's second output differ from its first; of other dtypes as much as nobody is
# told of
_SAME = {torch.float64: 2.0**-33}
_REFUSED = 2.0**-6  # above this, the gradients are wrong
# an input that is smaller than this times the output is measured by the output
_SMALL_INPUT = 2.0**-10
_RANGE = (2.0**-40, 2.0**40)  # of norms whose squares float32 certainly holds
# elements: on a GPU, asking whether a buffer has changed costs more time than keeping a copy costs
# memory
_SMALL_BUFFER = 1 << 16

_swapping = threading.RLock()  # of a subnet's parameters, while a backward pass runs it again


# --- a subnet that runs twice ---------------------------------------------------------------------


class _Subnet:
    """A block's subnet in one forward pass, with all that its result depends on beside its input:
    so that it can run again.

    That is: parameters, buffers, training flags, autocast, and the state of the random numbers.
    """

    def __init__(
        self, module: nn.Module, evaluate: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.evaluate, self.device = evaluate, device
        modules = list(module.modules())
        self.training = [(m, m.training) for m in modules]
        self.places = [
            (m._parameters, name, p)
            for m in modules
            for name, p in m._parameters.items()
            if p is not None
        ]
        self.parameters = list(dict.fromkeys(p for *_, p in self.places))
        self.buffers = [
            (m._buffers, name, b, m.training)
            for m in modules
            for name, b in m._buffers.items()
            if b is not None
        ]
        # buffers that a run changes, as they were before it
        self.changed: list[tuple[dict[str, Any], str, Tensor]] = []
        self.input_takes_gradient = False
        self.random: list[Tensor] | None = None
        self.autocast = _autocast(device)

    def __call__(self, x: Tensor) -> Tensor:
        """The first run: with gradients enabled, as in a plain chain, for a subnet may ask; what
        autograd records is dropped at once.
        """
        random = self._random_state()
        before = [(b._version, b.clone()) for _, _, b, _ in self.buffers]
        # by the user's hooks
        unseen = saved_tensors_hooks(Tensor.detach, _itself) if _hooks_are_set() else nullcontext()
        with self.autocast(), torch.enable_grad(), unseen:
            x = (
                _Sealed.apply(x.detach().requires_grad_())
                if self.input_takes_gradient
                else x.detach()
            )
            a = self.evaluate(x)
        if random is not None and not all(map(torch.equal, random, self._random_state() or random)):
            self.random = random
        for (holder, name, b, training), (version, value) in zip(self.buffers, before, strict=True):
            if holder[name] is not b or b._version != version or _is_written(b, value, training):
                self.changed.append((holder, name, value))
        return a.detach() if isinstance(a, Tensor) else a

    def constants(self) -> list[Tensor]:
        """The buffers that the run has left alone."""
        changed = {(id(holder), name) for holder, name, _ in self.changed}
        return [b for holder, name, b, _ in self.buffers if (id(holder), name) not in changed]

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
        """Within: the run's training flags, its buffers as they were before it, and stand-ins for
        its parameters.

        Stand-ins collect the gradients, so that a parameter's own hooks fire when autograd
        accumulates what the block's node returns, and only then.
        """
        now = [(m, m.training) for m, _ in self.training]
        mine: list[tuple[dict[str, Any], str, Tensor]] = [
            (holder, name, stand_ins[p]) for holder, name, p in self.places
        ]
        # a copy, for a run changes it
        mine += [(holder, name, value.clone()) for holder, name, value in self.changed]
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
        return [
            torch.get_rng_state(),
            torch.get_device_module(self.device).get_rng_state(self.device),
        ]


def _itself(x: Tensor) -> Tensor:
    return x


class _Sealed(Function):
    """A subnet's input in its first run: what is computed from it takes gradients, which nobody may
    ask for beside the block's backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> None:
        raise RuntimeError(
            "a subnet in a reversible chain handed out something beside its result (an auxiliary "
            "loss, a feature map), whose gradient "
            "cannot reach the blocks before it: use a chain that is not reversible"
        )


def _is_written(b: Tensor, before: Tensor, training: bool) -> bool:
    """Whether a buffer has changed without a sign, as a batch norm's statistics do, and what is
    written through ``.data``.
    """
    if b.device.type != "cpu" and (not training or b.numel() <= _SMALL_BUFFER or _is_capturing(b)):
        return training  # to ask would be to wait for the device
    return not torch.equal(b, before)


def _is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing can be asked of values then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _assign(
    training: list[tuple[nn.Module, bool]], tensors: list[tuple[dict[str, Any], str, Any]]
) -> None:
    for module, flag in training:
        module.training = flag
    for holder, name, tensor in tensors:
        holder[name] = tensor


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager]:
    """A context manager's constructor: autocast as it is now."""
    if not dispatch.is_autocast(device):
        return nullcontext
    return partial(
        torch.autocast,
        device.type,
        torch.get_autocast_dtype(device.type),
        True,
        torch.is_autocast_cache_enabled(),
    )


def _without_autocast(device: torch.device) -> AbstractContextManager:
    return (
        torch.autocast(device.type, enabled=False)
        if dispatch.is_autocast(device)
        else nullcontext()
    )


# --- one block of a chain -------------------------------------------------------------------------


@dataclass
class _Segment:
    """A part of a chain in one forward pass: its first block's input is kept, to compare with, and
    its last one's output, to start from.

    Attributes:
        first, last: The blocks' places.
        largest: The largest magnitude in that output, once the backward pass has begun: not finite
            only if the forward pass overflowed.
    """

    first: int
    last: int
    largest: Tensor | None = None


class _Link:
    """One block's place in one forward pass of a chain: evaluates it without keeping its input or
    output.

    Attributes:
        drift: The errors found in this pass, by block.
        segment: The part of the chain that it belongs to.
        output: The block's output, as the block after it has reconstructed it; only while the
            backward pass is between the two.
    """

    def __init__(
        self,
        chain: Reversible,
        place: int,
        segment: _Segment,
        previous: _Link | None,
        drift: dict[int, float],
    ) -> None:
        self.chain, self.place, self.segment, self.previous, self.drift = (
            chain,
            place,
            segment,
            previous,
            drift,
        )
        self.output: Tensor | None = None
        # of second runs, not looked at yet
        self.differences: list[tuple[int, Tensor]] = (
            [] if previous is None else previous.differences
        )
        self.seen: tuple[Any, Any] | None = None  # which tensors came in and went out

    @property
    def first(self) -> bool:
        return self.place == self.segment.first

    @property
    def last(self) -> bool:
        return self.place == self.segment.last

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
        reverse_permutation: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        recorded = _Subnet(self.chain.module_list[self.place].subnet, subnet, x.device)
        for p in recorded.parameters:
            if type(p) is not Tensor and type(p) is not nn.Parameter:
                raise TypeError(
                    f"expected the parameters of the subnet of block {self.place} in a reversible "
                    "chain to be plain tensors, got "
                    f"{type(p).__name__}; initialise lazy modules first, and shard whole blocks or "
                    "the chain, not the subnet"
                )
        call = _Call(
            self, recorded, permutation, spec, len(conditions), reverse_permutation, backend
        )
        vectors = permutation.vectors if isinstance(permutation, HouseholderPermutation) else None
        y, logdet = _Block.apply(
            call, x, global_scale, global_offset, vectors, *conditions, *recorded.parameters
        )
        self.seen = _identity(x), _identity(y)
        return y, logdet

    def take_output(self) -> Tensor:
        y, self.output = self.output, None
        if y is None:
            raise RuntimeError(
                f"block {self.place} of the reversible chain has no output to start from: "
                "gradients were asked of it without those of the "
                "block after it. Make the loss depend on the chain's result, or use a chain that "
                "is not reversible."
            )
        return y

    def compare(self, found: Tensor, x: Tensor, y: Tensor) -> None:
        """Note how far the reconstructed input is from the kept one, and say so where that is too
        much for the gradients to be right.
        """
        if _is_capturing(x):
            return
        # by halves, for one that is small beside the other is lost first
        whole, of_output, *parts = _norms(x, y, *eager.halves(x), *eager.halves(found - x))
        least = 64 * torch.finfo(x.dtype).eps * _largest(whole, of_output * _SMALL_INPUT)
        error = _largest(
            *(
                _ratio(off, _largest(half, least))
                for half, off in zip(parts[:2], parts[2:], strict=True)
            )
        )
        largest = self.segment.largest
        if math.isnan(error) and largest is not None and largest.isfinite():
            # the inverse has overflowed, not the forward pass, whose gradients would be nan in a
            # plain chain, too
            error = math.inf
        self.drift[self.place] = error
        if self.first:
            self.chain._heed(error, self.segment, x.dtype)

    def compare_runs(self, again: Tensor, y: Tensor) -> None:
        """Note how far a block's second output from the same input is from the first; on a CPU,
        where that is known at once, say so.
        """
        if _is_capturing(y):
            return
        # on a CPU most are the same, which is seen at once: (4, 64, 32, 32) in 0.12 ms, where
        # _difference takes 1.3, AMD EPYC
        if y.device.type != "cpu" or not torch.equal(again, y):
            self.differences.append((self.place, _difference(again.detach(), y)))
        if y.device.type == "cpu":
            self.refuse_differences(y.dtype)

    def refuse_differences(self, dtype: torch.dtype) -> None:
        """Raise if a second run was another one. At the end of a backward pass, so that a GPU is
        waited for once.
        """
        if not self.differences:
            return
        places, errors = zip(*self.differences, strict=True)
        self.differences.clear()
        allowed = max(_SAME.get(dtype, _WARNED), torch.finfo(dtype).eps)
        for place, error in zip(places, torch.stack(errors).tolist(), strict=True):
            if error > allowed:
                raise RuntimeError(
                    f"block {place} of the reversible chain returned something else when it ran "
                    "again for its gradients, off by "
                    f"{error:.2g}: its subnet depends on what is not replayed (a random generator "
                    "of its own, random numbers of Python or "
                    "NumPy, a state that is no buffer). Discard the gradients, and use a chain "
                    "that is not reversible"
                )


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference of a channel relative to its largest magnitude in y: a small one may
    be the one that differs.
    """
    others = (0, *range(2, y.dim()))
    magnitude = torch.linalg.vector_norm(y, math.inf, dim=others)
    least = 64 * torch.finfo(y.dtype).eps * magnitude.amax()
    return (
        torch.linalg.vector_norm(x - y, math.inf, dim=others) / torch.maximum(magnitude, least)
    ).amax()


def _norms(*tensors: Tensor) -> list[float]:
    """Euclidean norms without float64, which not every device has, and without overflow."""
    found: list[float] = torch.stack(
        [torch.linalg.vector_norm(t, dtype=_wide(t)) for t in tensors]
    ).tolist()
    return [
        n if n == 0 or _RANGE[0] < n < _RANGE[1] else _scaled_norm(t)
        for n, t in zip(found, tensors, strict=True)
    ]


def _scaled_norm(x: Tensor) -> float:
    largest = torch.linalg.vector_norm(x, math.inf).item()
    if not 0 < largest < math.inf:
        return largest
    return largest * torch.linalg.vector_norm(x / largest, dtype=_wide(x)).item()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _largest(*values: float) -> float:
    """The maximum, nan if one of them is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else part * math.inf  # nan for 0 of 0


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.dtype, None if x.is_inference() else x._version


class _Call(NamedTuple):
    """What a block is evaluated with, beside the tensors that take gradients."""

    link: _Link
    subnet: _Subnet
    permutation: Permutation
    spec: CouplingSpec
    conditions: int
    reverse_permutation: bool
    backend: str


class _Block(Function):
    """A block that keeps neither its input nor its coefficients; see :class:`_Link` for what it
    keeps instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        x: Tensor,
        g: Tensor,
        offset: Tensor,
        vectors: Tensor | None,
        *rest: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        link = call.link
        call.subnet.input_takes_gradient = any(
            (ctx.needs_input_grad[1], *ctx.needs_input_grad[5 : 5 + call.conditions])
        )
        with _without_autocast(x.device):
            y, logdet = all_in_one_block(
                x, call.subnet, g, offset, call.permutation, call.spec, rest[: call.conditions],
                reverse_permutation=call.reverse_permutation, backend=call.backend,
            )  # fmt: skip
        if y.dtype is not x.dtype:
            raise TypeError(
                f"expected block {link.place} of the reversible chain to return {x.dtype}, its "
                f"input's dtype; got {y.dtype}"
            )
        kept_x = x if link.first or link.chain.debug else None
        kept_y = y if link.last else None
        # the parameters, constant buffers and indices too, for autograd to notice if one is changed
        # before the backward pass
        ctx.save_for_backward(
            kept_x,
            kept_y,
            g,
            offset,
            vectors,
            *rest,
            *call.subnet.constants(),
            *_fixed(call.permutation),
        )
        return y, logdet

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlogdet: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or dispatch.needs_composite(dy, dlogdet):
            raise RuntimeError(
                "a reversible chain has no second or batched gradients (create_graph, "
                "is_grads_batched): use FrEIA's SequenceINN, or "
                "accelerate without reversible=True"
            )
        call: _Call = ctx.call
        x, y, g, offset, vectors, *rest = ctx.saved_tensors
        rest = rest[: call.conditions + len(call.subnet.parameters)]
        needs = ctx.needs_input_grad
        leaves: list[Any] = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip((g, offset, vectors, *rest), needs[2:], strict=True)
        ]
        g, offset, vectors, *rest = leaves
        permutation = call.permutation
        if isinstance(permutation, HouseholderPermutation) and vectors is not None:
            permutation = permutation._replace(vectors=vectors)
        conditions, parameters = rest[: call.conditions], rest[call.conditions :]
        arguments: Any = (call.subnet.again, g, offset, permutation, call.spec, conditions)
        options: Any = {"reverse_permutation": call.reverse_permutation, "backend": call.backend}
        with (
            _swapping,
            _without_autocast(call.subnet.device),
            call.subnet.as_it_was(dict(zip(call.subnet.parameters, parameters, strict=True))),
        ):
            if call.link.first and call.link.last:
                x = x.detach().requires_grad_(needs[1])
                with torch.enable_grad():
                    again = all_in_one_block(x, *arguments, **options)
                call.link.compare_runs(again[0], y)
                if call.link.previous is None or not needs[1]:
                    call.link.refuse_differences(y.dtype)
                _differentiate(again, (dy, dlogdet))
                return None, x.grad, *(None if t is None else t.grad for t in leaves)
            if y is None:
                y = call.link.take_output()
            else:
                call.link.segment.largest = torch.linalg.vector_norm(y, math.inf)
            dy = torch.zeros_like(y) if dy is None else dy
            found = all_in_one_block_bwd(
                y,
                dy,
                dlogdet,
                *arguments,
                need_x=needs[1],
                need_params=needs[2] or needs[3],
                **options,
            )
        if call.link.previous is None or not needs[1]:
            call.link.refuse_differences(y.dtype)
        if x is not None:
            call.link.compare(found.x, x, y)
        if needs[1] and not call.link.first and call.link.previous is not None:
            call.link.previous.output = found.x
        return (
            None,
            found.dx if needs[1] else None,
            found.dg,
            found.doffset,
            *(None if t is None else t.grad for t in leaves[2:]),
        )


def _differentiate(results: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add the gradients of what results depend on to the ``grad`` of each."""
    pairs = [
        (t, dt)
        for t, dt in zip(results, gradients, strict=True)
        if dt is not None and t.requires_grad
    ]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [dt for _, dt in pairs])


def _fixed(permutation: Permutation) -> tuple[Tensor, ...]:
    """The tensors of a permutation that take no gradient."""
    return (
        _fixed(permutation.base)
        if isinstance(permutation, HouseholderPermutation)
        else tuple(permutation)
    )


# --- the chain ------------------------------------------------------------------------------------


class Reversible:
    """What the class of a reversible chain adds to that of FrEIA's SequenceINN; see
    :class:`ReversibleSequence`.
    """

    module_list: Any  # an nn.ModuleList of modules of which no type tells the attributes
    conditions: list[int | None]
    force_tuple_output: bool
    debug: bool = False
    drift: Mapping[int, float] = MappingProxyType({})
    _checkpoint_every: int | None = None
    _measured_spacing: float = math.inf  # what checkpoint_every = None stands for

    @property
    def checkpoint_every(self) -> int | None:
        """How many blocks lie between two activations that are kept, None for as many as the
        measured error allows; can be set.
        """
        return self._checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, value: int | None) -> None:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"expected checkpoint_every as an integer or None, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"expected checkpoint_every of 1 or more, got {value}")
        self._checkpoint_every = value

    def forward(
        self,
        x_or_z: Tensor | Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[Any, Any]:
        """Evaluate the chain or its inverse.

        Args:
            x_or_z: (B, C, *S), or a list or tuple with that one tensor.
            c: The conditions, in which the blocks' ``cond`` count.
            rev: Compute the inverse. Its gradients, if asked for, are those of an ordinary chain.
            jac: Whether the log-determinant is wanted; the blocks return it anyway, other modules
                of the chain are told.

        Returns:
            The result, in a tuple if ``force_tuple_output``, and the log-determinant (B,) in nats
            per sample.

        Raises:
            RuntimeError: A hook exchanged a block's input or output.
            TypeError: A subnet's parameters are no plain tensors while its block runs, or it widens
                the dtype.
        """
        x: Sequence[Tensor] = (x_or_z,) if isinstance(x_or_z, Tensor) else x_or_z
        links = {} if rev else self._links(x, c)
        order = range(len(self.module_list))
        # as FrEIA's, also where no module has one
        log_det: Any = torch.zeros(len(x[0]), device=x[0].device) if _is_batch(x) else 0
        for i in reversed(order) if rev else order:
            module, link, condition = self.module_list[i], links.get(i), self.conditions[i]
            if link is not None and x[0].is_floating_point() and dispatch.is_autocast(x[0].device):
                # the chain's state stays in the parameters' dtype
                x = (x[0].to(eager.promoted(x[0], module.global_scale)),)
            given = x
            arguments: dict[str, Any] = (
                {"jac": jac, "rev": rev} if link is None else {"jac": jac, "rev": rev, "run": link}
            )
            if condition is not None and c is not None:
                arguments["c"] = [c[condition]]
            x, j = module(x, **arguments)
            if link is not None and link.seen != (_identity(given[0]), _identity(x[0])):
                raise RuntimeError(
                    f"a hook exchanged the input or the output of block {i}, which a reversible "
                    "chain cannot undo"
                )
            log_det = j + log_det
        return x if self.force_tuple_output else x[0], log_det

    def drift_report(self) -> str:
        """The reconstruction's errors in the last backward pass, and with ``debug`` the block that
        has made them grow most.
        """
        if not self.drift:
            return "nothing was compared yet"
        places = sorted(self.drift, reverse=True)
        lines = [
            f"block {place}: its input is off by {self.drift[place]:.2g} of its norm"
            for place in places
        ]
        growth = {
            after: self.drift[after] / max(self.drift[before], 1e-30)
            for before, after in pairwise(places)
            if before == after + 1
        }
        if growth:
            worst = max(growth, key=growth.__getitem__)
            lines.append(
                f"worst: block {worst}, whose inverse multiplies the error by {growth[worst]:.2g}"
            )
        return "\n".join(lines)

    def _links(self, x: Sequence[Tensor], c: Sequence[Tensor] | None) -> dict[int, _Link]:
        """A link for every block that can be undone; none where plain operations must do, or where
        no gradients are wanted.
        """
        if (
            not torch.is_grad_enabled()
            or len(x) != 1
            or not isinstance(x[0], Tensor)
            or not x[0].numel()
            or dispatch.needs_composite(x[0])
        ):
            return {}
        # there is nothing to look at for drift; integers run step by step
        if x[0].is_meta or not x[0].is_floating_point():
            return {}
        # the cache would hand a first run's parameters to the second
        if parametrize._cache_enabled:
            return {}
        links: dict[int, _Link] = {}
        drift: dict[int, float] = {}
        self.drift = drift
        needed = x[0].requires_grad  # whether the backward pass reaches the block
        for i, (module, condition) in enumerate(
            zip(self.module_list, self.conditions, strict=True)
        ):
            given = None if condition is None or c is None else c[condition]
            needed = (
                needed
                or any(p.requires_grad for p in module.parameters())
                or (isinstance(given, Tensor) and given.requires_grad)
            )
            if needed and is_reversible(module):
                previous = links.get(i - 1)
                segment = None if previous is None else previous.segment
                if segment is None or i - segment.first >= self._spacing(
                    eager.promoted(x[0], module.global_scale)
                ):
                    segment = _Segment(i, i)
                segment.last = i
                links[i] = _Link(self, i, segment, previous, drift)
        return links

    def _spacing(self, dtype: torch.dtype) -> float:
        """Blocks from one kept activation to the next."""
        if self.checkpoint_every is not None:
            return self.checkpoint_every
        # half precision loses too much in a single block
        return 1 if dtype.itemsize == 2 else self._measured_spacing

    def _heed(self, error: float, segment: _Segment, dtype: torch.dtype) -> None:
        """Draw the conclusions from the error that has built up between the last and the first
        block of a segment.
        """
        eps, wanted = torch.finfo(dtype).eps, _WANTED.get(dtype, _WARNED)
        if not error > wanted:  # nan: the forward pass has overflowed
            return
        blocks = segment.last - segment.first + 1
        if self.checkpoint_every is None:  # as if every block multiplied the error alike
            share = math.log(wanted / eps) / math.log(error / eps)
            self._measured_spacing = max(1, min(self._measured_spacing, int(blocks * share)))
            remedy = f"the passes to come keep an activation every {self._measured_spacing} blocks"
        else:
            remedy = "set a smaller checkpoint_every"
        said = (
            f"the input of block {segment.first} of the reversible chain, reconstructed from the "
            f"output of block {segment.last}, is off by "
            f"{error:.2g} of its norm, and the gradients are off accordingly: discard them; "
            f"{remedy}. With debug=True, drift_report() "
            "names the block that amplifies most"
        )
        if error > _REFUSED:
            raise RuntimeError(said)
        if error > _WARNED:
            warnings.warn(said, RuntimeWarning, stacklevel=2)


def _is_batch(x: Sequence[Any]) -> bool:
    return len(x) > 0 and isinstance(x[0], Tensor) and x[0].dim() > 0


def _hooks_are_set() -> bool:
    """Whether somebody looks on at what autograd keeps. Hooks of our own are set then only:
    torch.func.grad refuses to run under any.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def is_reversible(module: nn.Module) -> bool:
    """Whether a module is a block whose every gradient the reversible backward knows."""
    # of its own type, for wrappers hand on what they are asked for
    takes_run = getattr(type(module), "_takes_run", None)
    block: Any = module
    if (
        takes_run is None
        or not takes_run(block)
        or block._compiled_call_impl is not None
        or not _runs_twice(block.subnet)
    ):
        return False
    return not any(
        getattr(getattr(block, name, None), "requires_grad", False)
        for name in ("w_perm", "w_perm_inv", "w_0")
    )


def _runs_twice(subnet: Any) -> bool:
    """Whether a subnet can run again with stand-ins for its parameters, which collect their
    gradients.
    """
    if not isinstance(subnet, nn.Module):
        return False
    if any(b.requires_grad for b in subnet.buffers()) or any(
        map(nn.parameter.is_lazy, subnet.parameters())
    ):
        return False
    # takes no other tensors for its parameters
    return not any(isinstance(m, torch.jit.ScriptModule) for m in subnet.modules())


class ReversibleSequence(Reversible, InvertibleModule):
    """A chain of invertible modules whose training memory does not grow with its depth.

    A drop-in for FrEIA's SequenceINN: same methods, attributes and state dict, and where FrEIA is
    imported an instance of it. The backward pass starts from the chain's output and undoes one
    block at a time. Only :class:`AllInOneBlock` is undone; other modules in between are kept as
    they are, with what they keep.

    The reconstruction loses digits. Where its input is alive anyway, at the start of the chain and
    wherever an activation is kept, it is compared, relative to its norm: an error above 8e-6 (1e-10
    in float64) makes the passes to come keep activations, so many that it stays below if every
    block multiplies it alike; above 5e-4 there is a RuntimeWarning, above 2e-2 a RuntimeError. In
    half precision every activation is kept, and only the coefficients are not.

    A block's inverse multiplies errors of its active half by exp(-s) / scale, at most exp(clamp) /
    scale, and adds what the subnet makes of those of the passive half. That is the bound; a trained
    FastFlow of 32 blocks (clamp 2) is off by 3e-7 in all, 3 eps.

    Args:
        dims: The input's shape without the batch, C, *S.
        force_tuple_output: Return the result in a tuple, as other invertible modules do.
        checkpoint_every: Blocks between two activations that are kept. None: as many as the
            measured error allows, at first all.
        debug: Keep every activation and compare it; see :meth:`drift_report`. For a look, for it
            takes the memory that is saved otherwise.

    Attributes:
        drift: Of the last backward pass, by block: the error of its reconstructed input relative to
            the norm, where it was compared.

    Raises:
        ValueError, TypeError: ``checkpoint_every`` is no positive integer.

    Example:
        >>> import torch
        >>> from fastflow_kernels import AllInOneBlock, ReversibleSequence
        >>> flow = ReversibleSequence(4, 8, 8)
        >>> for _ in range(3):
        ...     flow.append(AllInOneBlock, subnet_constructor=lambda i, o: torch.nn.Conv2d(i, o, 3, padding=1))
        >>> z, log_det = flow(torch.randn(2, 4, 8, 8))
        >>> (0.5 * z.square().sum() - log_det.sum()).backward()
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _adopt_freia()  # see InvertibleModule
        return super().__new__(cls)

    def __init__(
        self,
        *dims: int,
        force_tuple_output: bool = False,
        checkpoint_every: int | None = None,
        debug: bool = False,
    ) -> None:
        super().__init__([dims])
        self.shapes = [tuple(dims)]
        self.conditions: list[int | None] = []
        self.module_list = nn.ModuleList()
        self.force_tuple_output = force_tuple_output
        self.checkpoint_every = checkpoint_every
        self.debug = debug

    def append(
        self,
        module_class: Callable[..., nn.Module] | nn.Module,
        cond: int | None = None,
        cond_shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a module.

        Args:
            module_class: An invertible module's class, called as ``module_class([shape],
                **kwargs)``; or an instance.
            cond: Which of the conditions given to ``forward`` the module takes.
            cond_shape: That condition's shape without the batch; an instance knows it.
            kwargs: For the class.

        Raises:
            TypeError: Arguments for an instance (a ValueError, too), or a condition without a
                shape.
            ValueError: The module has more than one output, or an instance was built for another
                shape.
        """
        dims_in = [self.shapes[-1]]
        if isinstance(module_class, nn.Module):
            if kwargs:
                raise _ArgumentError(
                    f"expected no arguments beside an instance, got {', '.join(kwargs)}"
                )
            module: Any = module_class
            expected = _shapes(module, "dims_in", dims_in)
            if expected != dims_in:
                raise ValueError(
                    f"expected a module for inputs of shape {dims_in}, got one for {expected}"
                )
        else:
            if cond is not None:
                if cond_shape is None:
                    raise TypeError(f"expected cond_shape, the shape of condition {cond}, got None")
                kwargs["dims_c"] = [cond_shape]
            module = module_class(dims_in, **kwargs)
        dims_out: list[tuple[int, ...]] = module.output_dims(dims_in)
        if len(dims_out) != 1:
            raise ValueError(
                f"expected a module with one output, got {len(dims_out)} of {type(module).__name__}"
            )
        self.conditions.append(cond)
        self.module_list.append(module)
        self.shapes.append(tuple(dims_out[0]))

    def __getitem__(self, item: int | slice) -> nn.Module:
        """A module; or the chain of those in a slice, which shares them.

        Where the slice runs backwards, the chain holds their inverses. Conditions are numbered
        anew, in the order in which the modules of the new chain first ask for them.
        """
        if not isinstance(item, slice):
            return self.module_list[item]
        places = range(len(self))[item]
        backwards = places.step < 0
        part = ReversibleSequence(
            *self.shapes[places.start + backwards],
            force_tuple_output=self.force_tuple_output,
            checkpoint_every=self.checkpoint_every,
            debug=self.debug,
        )
        renumbered: dict[int, int] = {}
        for place in places:
            module, cond = self.module_list[place], self.conditions[place]
            if cond is not None:
                cond = renumbered.setdefault(cond, len(renumbered))
            part.append(Inverse(module) if backwards else module, cond)
        return part

    def __setitem__(self, key: int, value: nn.Module) -> None:
        """Put another module in the place of one.

        Raises:
            NotImplementedError: ``key`` is a slice.
            TypeError: The module is not an invertible one.
            ValueError: Its inputs, outputs or conditions have other shapes than those of the module
                that it replaces.
        """
        if isinstance(key, slice):
            raise NotImplementedError("expected the place of one module, got a slice")
        before, place = self.module_list[key], range(len(self))[key]
        output_dims = getattr(value, "output_dims", None)
        if not isinstance(value, nn.Module) or output_dims is None:
            raise TypeError(f"expected an invertible module, got {type(value).__name__}")
        dims_in, dims_out = [self.shapes[place]], [self.shapes[place + 1]]
        for what, expected, actual in (
            ("inputs", dims_in, _shapes(value, "dims_in", dims_in)),
            ("outputs", dims_out, [tuple(shape) for shape in output_dims(dims_in)]),
            ("conditions", _shapes(before, "dims_c", []), _shapes(value, "dims_c", [])),
        ):
            if actual != expected:
                raise ValueError(
                    f"expected a module with {what} of shape {expected} at place {place}, got one "
                    f"with {actual}"
                )
        self.module_list[place] = value

    def __len__(self) -> int:
        return len(self.module_list)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.module_list)

    def output_dims(
        self, input_dims: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[int, ...]]:
        """The output's shape.

        Args:
            input_dims: ``[(C, *S)]``, the input's shape; or None.

        Raises:
            ValueError: Another input shape than the chain's; or one without ``force_tuple_output``,
                for then the chain is no module of another container.
        """
        if input_dims is not None:
            if not self.force_tuple_output:
                raise ValueError(
                    "output_dims needs force_tuple_output=True, which makes the chain a module of "
                    "other containers"
                )
            expected = self.shapes[0]
            if tuple(input_dims) != expected and [tuple(shape) for shape in input_dims] != [
                expected
            ]:
                raise ValueError(
                    f"expected input_dims {[expected]}, the chain's input, got {input_dims}"
                )
        return [self.shapes[-1]]


class Inverse(InvertibleModule):
    """The inverse of an invertible module, in the part of a chain that runs backwards; with the
    state dict of FrEIA's Inverse.

    Args:
        module: The other module.
    """

    module: Any  # an nn.Module of which no type tells the attributes

    def __init__(self, module: Any) -> None:
        super().__init__(module.output_dims(module.dims_in), getattr(module, "dims_c", None))
        self.module = module

    def forward(
        self, *args: Any, rev: bool = False, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Evaluate the other module in the other direction; the arguments are its own."""
        results: tuple[tuple[Tensor, ...], Tensor] = self.module(*args, rev=not rev, **kwargs)
        return results

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes of the other module's inputs."""
        return [tuple(shape) for shape in self.module.dims_in]


class _ArgumentError(TypeError, ValueError):
    """Arguments that a call does not take, which FrEIA calls a ValueError."""


def _shapes(module: nn.Module, name: str, default: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """An invertible module's dims_in or dims_c."""
    return [tuple(shape) for shape in getattr(module, name, default)]


def _adopt_freia() -> None:
    adopt(ReversibleSequence, "FrEIA.framework.sequence_inn", "SequenceINN")


_adopt_freia()
