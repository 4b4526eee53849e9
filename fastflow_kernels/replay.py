"""A second run of a subnet, with all that its result depends on beside its input."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from fastflow_kernels import torch_private
from fastflow_kernels.predicates import is_autocast, is_capturing
from fastflow_kernels.torch_private import version_of

# Elements of a buffer. On a GPU, asking whether a smaller one has changed costs more time than
# keeping a copy costs memory.
_SMALL_BUFFER = 1 << 16

swap_lock = threading.RLock()  # held while a backward pass swaps a subnet's parameters


class ReplayedSubnet:
    """A block's subnet in one forward pass, with all that it needs to run again.

    Beside its input, its result depends on parameters, buffers, training flags, autocast, and the
    state of the random number generators.
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
        # Buffers that the run changes, with their values before it.
        self.changed: list[tuple[dict[str, Any], str, Tensor]] = []
        self.input_takes_gradient = False
        self.random: list[Tensor] | None = None
        self.autocast = _autocast(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the subnet for the first time.

        Gradients are enabled as in a plain chain, because a subnet may ask whether they are. What
        autograd records is dropped at once.
        """
        random = self._random_state()
        # A subnet that ran before may share modules with this one, and have changed them.
        self.buffers = [
            (h, name, b, t) for h, name, _, t in self.buffers if (b := h[name]) is not None
        ]
        before = [(version_of(b), b.clone()) for _, _, b, _ in self.buffers]
        # The user's hooks would otherwise keep what autograd saves here.
        unseen = (
            saved_tensors_hooks(Tensor.detach, _itself)
            if torch_private.has_saved_tensor_hooks()
            else nullcontext()
        )
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
            if holder[name] is not b or version_of(b) != version or _is_written(b, value, training):
                self.changed.append((holder, name, value))
        return a.detach() if isinstance(a, Tensor) else a

    def constants(self) -> list[Tensor]:
        """Return the buffers that the run has left alone."""
        changed = {(id(holder), name) for holder, name, _ in self.changed}
        return [b for holder, name, b, _ in self.buffers if (id(holder), name) not in changed]

    def run_again(self, x: Tensor) -> Tensor:
        """Run the subnet again, from the same random numbers and buffers."""
        for holder, name, value in self.changed:
            holder[name] = value.clone()
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
        """Restore the state before the first run within the context.

        Training flags and buffers are what they were, and stand-ins take the parameters' places.
        The stand-ins collect the gradients, so that a parameter's own hooks fire only when autograd
        accumulates what the block's node returns.
        """
        now = [(m, m.training) for m, _ in self.training]
        replacements: list[tuple[dict[str, Any], str, Tensor]] = [
            (holder, name, stand_ins[p]) for holder, name, p in self.places
        ]
        # A copy, because a run changes it.
        replacements += [(holder, name, value.clone()) for holder, name, value in self.changed]
        outside = [(holder, name, holder.get(name)) for holder, name, _ in replacements]
        try:
            _assign(self.training, replacements)
            yield
        finally:
            _assign(now, outside)

    def _random_state(self) -> list[Tensor] | None:
        """Return the random number generators' states: the CPU's, then the device's."""
        if self.device.type == "cpu":
            return [torch.get_rng_state()]
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # it cannot be read then, and a graph advances it by itself
        return [
            torch.get_rng_state(),
            torch.get_device_module(self.device).get_rng_state(self.device),
        ]


def _itself(x: Tensor) -> Tensor:
    return x


class _Sealed(Function):
    """The identity, for a subnet's input in its first run.

    What is computed from the input requires gradients, as in a plain chain. Only the block's
    backward pass may ask for them; any other use raises.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> None:
        raise RuntimeError(
            "a subnet in a reversible chain handed out something beside its result (an auxiliary "
            "loss, a feature map), whose gradient cannot reach the blocks before it: use a chain "
            "that is not reversible"
        )


def _is_written(b: Tensor, before: Tensor, training: bool) -> bool:
    """Return whether a buffer has changed although its version has not.

    The statistics of a batch norm do, and so does what is written through ``.data``.
    """
    if b.device.type != "cpu" and (not training or b.numel() <= _SMALL_BUFFER or is_capturing(b)):
        return training  # because a comparison would wait for the device
    return not torch.equal(b, before)


def _assign(
    training: list[tuple[nn.Module, bool]], tensors: list[tuple[dict[str, Any], str, Any]]
) -> None:
    for module, flag in training:
        module.training = flag
    for holder, name, tensor in tensors:
        holder[name] = tensor


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes a context with autocast as it is now."""
    if not is_autocast(device):
        return nullcontext
    return partial(
        torch.autocast,
        device.type,
        torch.get_autocast_dtype(device.type),
        True,
        torch.is_autocast_cache_enabled(),
    )


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()
