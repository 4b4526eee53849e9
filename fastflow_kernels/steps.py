"""The stock block's steps, which evaluate a block that cannot run fused.

The steps are methods. Where a subclass overrides one, or an instance has its own, the steps run one
by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels import torch_private
from fastflow_kernels.backends import requested
from fastflow_kernels.channels import multiply_channels
from fastflow_kernels.coupling import CouplingSpec
from fastflow_kernels.dtypes import accumulator, cast, promoted
from fastflow_kernels.engines import plain
from fastflow_kernels.index_cache import IndexCache
from fastflow_kernels.permutations import Permutation

STEPS = ("_affine", "_permute", "_pre_permute", "_construct_householder_permutation")
_EXCHANGED = (
    "a step is overridden, or the clamp, the splits or the softplus are replaced: the steps run "
    "one by one in plain operations"
)
_OVERRIDABLE = (*STEPS, "permute_function", "global_scale_activation")


class StockSteps:
    """The methods of the stock block that subclasses override."""

    # attributes of the block
    GIN: bool
    backend: str
    clamp: float | Tensor
    dialect: str
    global_affine_type: str
    global_offset: Tensor
    global_scale: Tensor
    householder: int
    in_channels: int
    input_rank: int
    reverse_pre_permute: bool
    softplus: Any
    splits: list[int]
    subnet: Any
    w_perm: Any  # a parameter; None with reflections
    w_perm_inv: Any
    _index: IndexCache
    _modules: dict[str, Any]
    _subnet_starts_in_place: bool

    def global_scale_activation(self, g: Tensor) -> Tensor:
        """Apply the activation of the global scale, elementwise.

        It is 10 * sigmoid(g - 2), 0.1 * softplus(g, beta=0.5) or exp(g).
        """
        if self.global_affine_type == "SOFTPLUS":
            return 0.1 * self.softplus(g)
        return plain.activated(g, self.global_affine_type)

    def permute_function(self, x: Tensor, w: Tensor) -> Tensor:
        """Apply an index (C,) or a matrix (C, C, 1, ...) to the channels of x (B, C, *S)."""
        return x.index_select(1, w) if w.dim() == 1 else multiply_channels(x, w)

    def _spec(self) -> CouplingSpec:
        return CouplingSpec.of(self.clamp, self.dialect, self.global_affine_type, self.GIN)

    def _permutation(self) -> Permutation:
        return self._index.permutation(self)

    def _run_subnet(self, x: Tensor) -> Tensor:
        return self.subnet(x.clone() if self._subnet_starts_in_place else x)

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """Compute the coupling alone.

        Args:
            x: The active half, (B, C2, *S).
            a: The subnet's output, (B, 2*C2, *S). It is not written to.
            rev: Compute the inverse.

        Returns:
            The transformed active half (B, C2, *S) and its log-determinant (B,) in nats. That is
            the sum of the log-factors, negated for the inverse.
        """
        dtype = promoted(x, a)
        wide = accumulator(dtype)
        y, log_det = plain.couple(
            cast(x, wide), cast(a, wide), self._spec(), rev, plain.may_write()
        )
        return y.to(dtype), log_det

    def _permute(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor | float]:
        """Apply the global affine and the permutation, or their inverse.

        Args:
            x: (B, C, *S).
            rev: Compute the inverse.

        Returns:
            The transformed tensor (B, C, *S) and sum(log(scale)), a scalar in nats per pixel (0.0
            for GIN). The inverse returns the forward direction's sum, too.
        """
        scale: Tensor | float = 1.0
        log_scale: Tensor | float = 0.0
        if not self.GIN:
            scale = self.global_scale_activation(self.global_scale)
            log_scale = scale.log().sum()
        if rev:
            return (self._permuted(x, rev=True) - self.global_offset) / scale, log_scale
        return self._permuted(x * scale + self.global_offset, rev=False), log_scale

    def _pre_permute(self, x: Tensor, rev: bool = False) -> Tensor:
        """Invert the permutation ahead of the coupling, or apply it after the coupling's inverse.

        Only ``reverse_permutation`` uses it.

        Args:
            x: (B, C, *S).
            rev: Apply the permutation.
        """
        return self._permuted(x, rev=not rev)

    def _construct_householder_permutation(self) -> Tensor:
        """Return the matrix w_0 H_1 ... H_K, (C, C, 1, ...) with a one per spatial dimension."""
        w = self._permutation().matrix(self.global_scale.dtype)
        return w.view(*w.shape, *[1] * self.input_rank)

    def _why_not_fused(self) -> str | None:
        """Return why the block's steps run one by one, or None if it runs fused."""
        cls = type(self)
        for name, own in _OWN.items():
            if getattr(cls, name) is not own:
                return _EXCHANGED
        if (
            _has_any(self.__dict__, _OVERRIDABLE)
            or isinstance(self.clamp, Tensor)
            or self.splits[1] != self.in_channels // 2
            or not self._has_own_softplus()
        ):
            return _EXCHANGED
        return None

    def _has_own_softplus(self) -> bool:
        if self.global_affine_type != "SOFTPLUS":
            return True
        return is_known_softplus(self._modules.get("softplus"))

    def _is_replaced(self, name: str) -> bool:
        return name in self.__dict__ or getattr(type(self), name) is not _OWN[name]

    def _permuted(self, x: Tensor, rev: bool) -> Tensor:
        """Permute x, or invert the permutation, by the replaced methods if there are any."""
        if not self._is_replaced("permute_function") and not (
            self.householder and self._is_replaced("_construct_householder_permutation")
        ):
            permutation = self._permutation()
            return permutation.unpermute(x) if rev else permutation.permute(x)
        if self.householder:
            w = self._construct_householder_permutation()
            return self.permute_function(x, w.transpose(0, 1).contiguous() if rev else w)
        return self.permute_function(x, self.w_perm_inv if rev else self.w_perm)

    def _evaluate_in_steps(
        self, x: Tensor, c: Sequence[Tensor], rev: bool
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the block in the stock block's steps, by the overridden methods if any.

        Raises:
            RuntimeError: The requested backend is "triton".
        """
        if requested(self.backend) == "triton":
            raise RuntimeError(
                "backend 'triton' cannot be used here: a step of the block is overridden, its "
                "clamp is a tensor, or the input is integer. Use backend='auto' to run the steps "
                "in plain operations."
            )
        if not self.householder:
            return self._run_steps(x, c, rev)
        # The stock block keeps these. They hold a graph, therefore here they end with the call.
        self.w_perm = self._construct_householder_permutation()
        self.w_perm_inv = self.w_perm.transpose(0, 1).contiguous()
        try:
            return self._run_steps(x, c, rev)
        finally:
            self.w_perm = self.w_perm_inv = None

    def _run_steps(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        log_scale: Tensor | float = 0.0
        if rev:
            x, log_scale = self._permute(x, rev=True)
        elif self.reverse_pre_permute:
            x = self._pre_permute(x, rev=False)
        x1, x2 = x.split(self.splits, 1)
        x2, logdet = self._affine(
            x2, self._run_subnet(torch.cat((x1, *c), 1) if c else x1), rev=rev
        )
        x = torch.cat((x1, x2), 1)
        if not rev:
            x, log_scale = self._permute(x, rev=False)
        elif self.reverse_pre_permute:
            x = self._pre_permute(x, rev=True)
        pixels = math.prod(x.shape[2:])
        return x, logdet + (-pixels if rev else pixels) * log_scale


def is_known_softplus(module: Any) -> bool:
    """Return whether a module is ``nn.Softplus(beta=0.5)``, without hooks or a forward of its own.

    Only then its formula can be used instead of a call.
    """
    if type(module) is not nn.Softplus:
        return False
    own = module.__dict__
    beta = own.get("beta")
    if type(beta) is not float or beta != 0.5 or own.get("threshold") != 20:
        return False
    return not (torch_private.has_hooks(module) or "forward" in own)


# the original methods, even if the class gets others later
_OWN = {name: getattr(StockSteps, name) for name in _OVERRIDABLE}


def _has_any(own: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Return whether an object's own attributes include one of the names.

    Every call asks this, and a loop is faster than a generator.
    """
    for name in names:  # noqa: SIM110
        if name in own:
            return True
    return False
