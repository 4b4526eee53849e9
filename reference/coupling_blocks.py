"""FrEIA's affine and additive coupling blocks, written to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reference.base import InvertibleModule, Shape

Tensors = Sequence[Tensor]
Shapes = Sequence[Sequence[int]]
Subnets = Callable[[int, int], nn.Module]
Clamp = Callable[[Tensor], Tensor]
# A tensor (B,), or FrEIA's float 0.0. The signature of InvertibleModule names the tensor only.
LogDet = Any


# Functions into (-1, 1). FrEIA rounds 2 / pi to 0.636.
CLAMPS: dict[str, Clamp] = {
    "ATAN": lambda a: 0.636 * torch.atan(a),
    "TANH": torch.tanh,
    "SIGMOID": lambda a: 2.0 * (torch.sigmoid(a) - 0.5),
}


def couple(x: Tensor, s: Tensor, t: Tensor, rev: bool) -> Tensor:
    """Return ``x * exp(s) + t``, or its inverse ``(x - t) * exp(-s)`` if ``rev``."""
    return (x - t) * torch.exp(-s) if rev else x * torch.exp(s) + t


class CouplingBlock(InvertibleModule):
    r"""A block whose halves transform each other, the base class of FrEIA's coupling blocks.

    The C channels are split into ``x1`` (the first ``split_len1``) and ``x2`` (the others)::

        a2, t2 = predict(2, cat(x2, *c))    by subnets that read the second half
        y1     = x1 * exp(s2) + t2          s2 = clamp * f(a2)
        a1, t1 = predict(1, cat(y1, *c))    by subnets that read the new first half
        y2     = x2 * exp(s1) + t1          s1 = clamp * f(a1)
        logdet = sum(s1) + sum(s2)          per sample, in nats

    The inverse computes these lines backwards and returns the negative log-determinant.
    A class that preserves volume returns the float 0.0, as FrEIA's does.

    Sources: FrEIA (Ardizzone, Lueth, Kruse, Rother, Koethe 2019), and those of each class.

    Args:
        dims_in: One shape without the batch dimension, ``[(C, *S)]`` with S of rank 0 to 3.
        dims_c: Shapes of the conditions, ``[(C_i, *S), ...]``.
        subnet_constructor: ``f(channels_in, channels_out)`` returns a subnet that keeps S.
        clamp: Bound of \|s\|.
        clamp_activation: f, one of "ATAN" (0.636 * atan(a)), "TANH" and "SIGMOID"
            (2 * (sigmoid(a) - 0.5)), or a function of a tensor.
        split_len: Size of the first half. A float in [0, 1] is multiplied by C and rounded.

    Attributes:
        channels, ndims: C, and the number of dimensions without the batch.
        split_len1, split_len2: The sizes of the halves. One may be 0.
        conditional, condition_length: Whether there are conditions, and their channels in all.
        clamp, f_clamp: The bound, and f as a function.

    Raises:
        ValueError: If an option is outside its range, or the shapes do not fit together.
    """

    preserves_volume = False

    def __init__(
        self,
        dims_in: Shapes,
        dims_c: Shapes | None = (),
        subnet_constructor: Subnets | None = None,
        clamp: float = 2.0,
        clamp_activation: str | Clamp = "ATAN",
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__(dims_in, dims_c)
        if len(self.dims_in) != 1 or not 1 <= len(self.dims_in[0]) <= 4:
            raise ValueError(f"dims_in must be one shape, (C,) to (C, D, H, W), got {dims_in}")
        self.channels, *spatial = self.dims_in[0]
        if any(list(dims[1:]) != spatial for dims in self.dims_c):
            raise ValueError(f"dims_c must have the spatial shape of {dims_in}, got {dims_c}")
        if not callable(subnet_constructor):
            raise ValueError(f"subnet_constructor must be callable, got {subnet_constructor!r}")
        if not callable(clamp_activation) and clamp_activation not in CLAMPS:
            raise ValueError(
                f"clamp_activation must be in {list(CLAMPS)} or callable, got {clamp_activation!r}"
            )
        is_share = isinstance(split_len, float)
        kind, upper = ("a float", 1) if is_share else ("an int", self.channels)
        if not 0 <= split_len <= upper:
            raise ValueError(f"split_len as {kind} must be in [0, {upper}], got {split_len}")
        self.ndims = len(self.dims_in[0])
        self.split_len1 = round(self.channels * split_len) if is_share else int(split_len)
        self.split_len2 = self.channels - self.split_len1
        self.conditional = len(self.dims_c) > 0
        self.condition_length = sum(dims[0] for dims in self.dims_c)
        self.clamp = clamp
        self.f_clamp = clamp_activation if callable(clamp_activation) else CLAMPS[clamp_activation]
        more = self.condition_length
        self._make_subnets(subnet_constructor, self.split_len1 + more, self.split_len2 + more)

    def forward(
        self, x: Tensors, c: Tensors | None = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], LogDet]:
        """Map ``x`` = [(B, C, *S)] with conditions (B, C_i, *S), or apply the inverse if ``rev``.

        It returns ``((y,), log_det)`` with log_det (B,) in nats per sample, whatever ``jac`` is.
        It raises a ValueError for another number of inputs, channels or dimensions than declared.
        """
        c = () if c is None else c
        for name, tensors, declared in (("x", x, self.dims_in), ("c", c, self.dims_c)):
            shapes = [tuple(t.shape) for t in tensors]
            expected = [(len(dims) + 1, dims[0]) for dims in declared]
            if [(len(shape), *shape[1:2]) for shape in shapes] != expected:
                raise ValueError(f"{name} must have shapes (B, *{declared}), got {shapes}")
        y, log_det = self._map(x[0], c, rev)
        return (y,), log_det

    def output_dims(self, input_dims: list[Shape]) -> list[Shape]:
        """Return the shape of the output, which is that of the input."""
        if len(input_dims) != 1:
            raise ValueError(f"input_dims must be one shape, got {input_dims}")
        return input_dims

    def _map(self, x: Tensor, c: Tensors, rev: bool) -> tuple[Tensor, LogDet]:
        x1, x2 = torch.split(x, [self.split_len1, self.split_len2], dim=1)
        if rev:
            x2, log_det2 = self._transform(x2, 1, [x1, *c], rev)
            x1, log_det1 = self._transform(x1, 2, [x2, *c], rev)
        else:
            x1, log_det1 = self._transform(x1, 2, [x2, *c], rev)
            x2, log_det2 = self._transform(x2, 1, [x1, *c], rev)
        return torch.cat([x1, x2], dim=1), log_det1 + log_det2

    def _transform(self, x: Tensor, source: int, u: Tensors, rev: bool) -> tuple[Tensor, LogDet]:
        """Transform the half x by what the half number ``source`` predicts out of ``u``."""
        a, t = self._predict(source, torch.cat([*u], dim=1))
        # Under autocast a subnet returns half precision. The coupling keeps the dtype of x.
        dtype = torch.promote_types(a.dtype, x.dtype)
        s = self._log_factors(a.to(dtype))
        y = couple(x, s, t.to(dtype), rev)
        if self.preserves_volume:
            return y, 0.0
        log_det = s.sum(dim=tuple(range(1, self.ndims + 1)))
        return y, -log_det if rev else log_det

    def _log_factors(self, a: Tensor) -> Tensor:
        return self.clamp * self.f_clamp(a)

    def _make_subnets(self, make: Subnets, channels1: int, channels2: int) -> None:
        """Set the subnets. Those of half i read ``channels``i channels, with the conditions."""
        raise NotImplementedError

    def _predict(self, source: int, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the subnets of half number ``source`` predict out of u."""
        raise NotImplementedError


class NICECouplingBlock(CouplingBlock):
    """Additive coupling, ``y1 = x1 + F(x2)`` and ``y2 = x2 + G(y1)`` (NICE, Dinh et al. 2015)."""

    preserves_volume = True

    def __init__(
        self,
        dims_in: Shapes,
        dims_c: Shapes | None = (),
        subnet_constructor: Subnets | None = None,
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__(dims_in, dims_c, subnet_constructor, 0.0, lambda a: a, split_len)

    def _make_subnets(self, make: Subnets, channels1: int, channels2: int) -> None:
        self.F = make(channels2, self.split_len1)
        self.G = make(channels1, self.split_len2)

    def _predict(self, source: int, u: Tensor) -> tuple[Tensor, Tensor]:
        t = self.G(u) if source == 1 else self.F(u)
        return torch.zeros_like(t), t  # exp(0) * x is x to the bit


class RNVPCouplingBlock(CouplingBlock):
    """Affine coupling with a subnet each for s and t (RealNVP, Dinh et al. 2017)."""

    def _make_subnets(self, make: Subnets, channels1: int, channels2: int) -> None:
        self.subnet_s1 = make(channels1, self.split_len2)
        self.subnet_t1 = make(channels1, self.split_len2)
        self.subnet_s2 = make(channels2, self.split_len1)
        self.subnet_t2 = make(channels2, self.split_len1)

    def _predict(self, source: int, u: Tensor) -> tuple[Tensor, Tensor]:
        if source == 1:
            return self.subnet_s1(u), self.subnet_t1(u)
        return self.subnet_s2(u), self.subnet_t2(u)


class GLOWCouplingBlock(CouplingBlock):
    """Affine coupling with one subnet for s and t (Glow, Kingma and Dhariwal 2018)."""

    def _make_subnets(self, make: Subnets, channels1: int, channels2: int) -> None:
        self.subnet1 = make(channels1, 2 * self.split_len2)
        self.subnet2 = make(channels2, 2 * self.split_len1)

    def _predict(self, source: int, u: Tensor) -> tuple[Tensor, Tensor]:
        return (self.subnet1(u) if source == 1 else self.subnet2(u)).chunk(2, dim=1)


class GINCouplingBlock(GLOWCouplingBlock):
    """Coupling that preserves volume (GIN, Sorrenson et al. 2020).

    ``s = clamp * f(a) - mean(clamp * f(a))``, where the mean is over the channels of each pixel.
    """

    preserves_volume = True

    def _log_factors(self, a: Tensor) -> Tensor:
        s = super()._log_factors(a)
        return s - s.mean(dim=1, keepdim=True)


class AffineCouplingOneSided(CouplingBlock):
    """The second step alone: ``y1 = x1``, ``y2 = x2 * exp(s) + t``, predicted from x1 by subnet."""

    def _make_subnets(self, make: Subnets, channels1: int, channels2: int) -> None:
        self.subnet = make(channels1, 2 * self.split_len2)

    def _predict(self, source: int, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.subnet(u).chunk(2, dim=1)

    def _map(self, x: Tensor, c: Tensors, rev: bool) -> tuple[Tensor, LogDet]:
        x1, x2 = torch.split(x, [self.split_len1, self.split_len2], dim=1)
        y2, log_det = self._transform(x2, 1, [x1, *c], rev)
        return torch.cat([x1, y2], dim=1), log_det


class ConditionalAffineTransform(AffineCouplingOneSided):
    """``y = x * exp(s) + t``, predicted from the conditions alone (SPADE, Park et al. 2019)."""

    def _make_subnets(self, make: Subnets, channels1: int, channels2: int) -> None:
        if not self.conditional:
            raise ValueError("ConditionalAffineTransform needs a condition, got dims_c without one")
        self.subnet = make(self.condition_length, 2 * self.channels)

    def _map(self, x: Tensor, c: Tensors, rev: bool) -> tuple[Tensor, LogDet]:
        return self._transform(x, 0, c, rev)
