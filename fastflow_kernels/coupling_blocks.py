"""The coupling blocks of FrEIA beside ``AllInOneBlock``: drop-in classes that run fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels import backends, options
from fastflow_kernels.call import SidesCall, check_conditions, single_input
from fastflow_kernels.coupling_forms import (
    CLAMP_FUNCTIONS,
    FORMS,
    KEPT,
    ClampFunction,
    constants_of,
    sides_of,
    sizes_of,
)
from fastflow_kernels.freia import InvertibleModule
from fastflow_kernels.modules import FusedForward
from fastflow_kernels.sides import split


class CouplingBlock(FusedForward, InvertibleModule):
    """The base class of the coupling blocks, whose arguments are those of most of them.

    The channels of x are split into x1 and x2. A subnet reads one of them, with the conditions, and
    returns the coefficients (a_s, a_t), which transform the other one::

        s      = clamp * f(a_s)
        y      = x * exp(s) + a_t
        logdet = sum(s)

    Args:
        dims_in: ``[(C, *S)]`` with 0 to 3 spatial dimensions. The block takes any spatial size.
        dims_c: Shapes of the conditions, ``[(C_k, *S), ...]``.
        subnet_constructor: A function ``f(channels_in, channels_out)`` that returns a subnet.
        clamp: Factor of the clamp function f. It bounds s.
        clamp_activation: The clamp function f: ``"ATAN"`` (0.636 * atan), ``"TANH"``, ``"SIGMOID"``
            (2 * sigmoid - 1) or a function. A function runs the stock maths.
        split_len: Channels of x1. A float is a share of C, which is rounded.
        backend: One of ``"auto"``, ``"eager"`` and ``"triton"``.

    Shape:
        ``block([x], c) -> ((y,), logdet)`` with x, y (B, C, *S) and logdet (B,) in nats per sample.
        The dtype of y is the promoted one of x and the coefficients. The dtype of logdet is float64
        for float64 data, otherwise float32.

    Raises:
        ValueError, TypeError: An option or a shape is not valid.
    """

    _kind: str  # a key of FORMS; torch 2.7 cannot trace other constants of a module

    def __init__(
        self,
        dims_in: Sequence[Sequence[int]],
        dims_c: Sequence[Sequence[int]] | None = None,
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        clamp: float = 2.0,
        clamp_activation: str | ClampFunction = "ATAN",
        split_len: float | int = 0.5,
        *,
        backend: str = "auto",
    ) -> None:
        dims_in, dims_c = options.check_dims(dims_in, dims_c)
        subnet_constructor = options.check_constructor(subnet_constructor)
        options.check_clamp("clamp", clamp)
        if isinstance(clamp_activation, str) and clamp_activation not in CLAMP_FUNCTIONS:
            raise ValueError(
                f"expected clamp_activation to be one of {', '.join(CLAMP_FUNCTIONS)} or a "
                f"function; got {clamp_activation!r}"
            )
        if FORMS[self._kind].parts[0][1] is None and not dims_c:
            raise ValueError(f"expected a condition: {type(self).__name__} needs dims_c, got none")
        channels = dims_in[0][0]
        split_len = options.check_split(split_len, channels)
        backend = backends.validated(backend)
        super().__init__(dims_in, dims_c)

        self.channels = channels
        self.ndims = len(dims_in[0])
        self.split_len1, self.split_len2 = split_len, channels - split_len
        self.clamp = clamp
        self.conditional = bool(dims_c)
        self.condition_length = sum(shape[0] for shape in dims_c)
        self.f_clamp = (
            CLAMP_FUNCTIONS[clamp_activation]
            if isinstance(clamp_activation, str)
            else clamp_activation
        )
        self.backend = backend
        self._make_subnets(subnet_constructor)

    def _make_subnets(self, constructor: Callable[[int, int], nn.Module]) -> None:
        form, sizes = FORMS[self._kind], sizes_of(self, FORMS[self._kind])
        sides = list(zip(form.subnets, form.parts, strict=True))
        # in the stock block's order, because subnets draw random numbers
        for names, (active, passive) in sides if form.is_additive else reversed(sides):
            channels_in = self.condition_length + (0 if passive is None else sizes[passive])
            is_joint = len(names) == 1 and not form.is_additive
            for name in names:
                subnet = constructor(channels_in, sizes[active] * (2 if is_joint else 1))
                setattr(self, name, options.check_subnet(subnet))

    @property
    def clamp_function(self) -> str | None:
        """The name of the clamp function. "" for an additive block, None for another function."""
        if FORMS[self._kind].is_additive:
            return ""
        for name, function in CLAMP_FUNCTIONS.items():
            if self.f_clamp is function:
                return name
        return None

    def _why_not_fused(self) -> str | None:
        if isinstance(self.clamp, Tensor):
            return "its clamp is a tensor: the stock maths runs"
        if self.clamp_function is None:
            return "its clamp function is not one of the known ones: the stock maths runs"
        if self._overrides_step():
            return "it overrides _coupling1 or _coupling2: the stock maths runs"
        return None

    def _overrides_step(self) -> bool:
        cls, own = type(self), self.__dict__
        return (
            cls._coupling1 is not _COUPLING1
            or cls._coupling2 is not _COUPLING2
            or "_coupling1" in own
            or "_coupling2" in own
        )

    def _subnets(self) -> tuple[Any, ...]:
        return tuple(
            subnet for side in sides_of(self, FORMS[self._kind]) for subnet in side.subnets
        )

    def _checked_call(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool
    ) -> SidesCall | None:
        form = FORMS[self._kind]
        x = single_input(x, self.channels, self.ndims - 1)
        c = check_conditions(c, self.dims_c, x)
        clamp_function = self.clamp_function
        if clamp_function is None or self._why_not_fused() is not None:
            return None
        return SidesCall(x, c, *constants_of(self, form, clamp_function), rev, self.backend)

    def _stock_forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool, jac: bool
    ) -> tuple[tuple[Tensor], Any]:
        if backends.requested(self.backend) == "triton":
            raise RuntimeError(
                f"backend 'triton' cannot be used here: {self._why_not_fused()}. Use "
                "backend='auto' to run it."
            )
        parts = split(x[0], sizes_of(self, FORMS[self._kind]))
        c = check_conditions(c, self.dims_c, x[0])
        log_det: Any = 0.0
        places = range(len(FORMS[self._kind].parts))
        for place in reversed(places) if rev else places:
            active, passive = FORMS[self._kind].parts[place]
            inputs = [*([] if passive is None else [parts[passive]]), *c]
            u = torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]
            step = self._coupling2 if active else self._coupling1
            parts[active], log_det_of_side = step(parts[active], u, rev=rev)
            log_det = log_det_of_side + log_det
        return (torch.cat(parts, 1) if len(parts) > 1 else parts[0],), log_det

    def _coupling1(self, x1: Tensor, u2: Tensor, rev: bool = False) -> tuple[Tensor, Any]:
        """Transform the first part of the channels.

        Args:
            x1: (B, C1, *S).
            u2: What the subnet reads: the second part and the conditions.
            rev: Compute the inverse.

        Returns:
            The transformed part (B, C1, *S) and its log-determinant, (B,) in nats or 0.0.
        """
        return self._transform(0, x1, u2, rev)

    def _coupling2(self, x2: Tensor, u1: Tensor, rev: bool = False) -> tuple[Tensor, Any]:
        """Transform the second part of the channels, as :meth:`_coupling1` does the first."""
        return self._transform(len(FORMS[self._kind].parts) - 1, x2, u1, rev)

    def _transform(self, place: int, x: Tensor, u: Tensor, rev: bool) -> tuple[Tensor, Any]:
        a = [subnet(u) for subnet in sides_of(self, FORMS[self._kind])[place].subnets]
        if FORMS[self._kind].is_additive:
            return (x - a[0] if rev else x + a[0]), 0.0
        a_s, a_t = a if len(a) > 1 else torch.split(a[0], x.shape[1], 1)
        s = self.clamp * self.f_clamp(a_s)
        log_det: Any = 0.0
        if FORMS[self._kind].is_gin:
            s = s - s.mean(1, keepdim=True)
        else:
            log_det = s.sum(tuple(range(1, s.dim())))
        if rev:
            return (x - a_t) * torch.exp(-s), -log_det
        return torch.exp(s) * x + a_t, log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the output's shape, which is the input's.

        Args:
            input_dims: ``[(C, *S)]``.

        Raises:
            ValueError: It is not one shape.
        """
        if len(input_dims) != 1:
            raise ValueError(f"expected one input, got {len(input_dims)}")
        return input_dims

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != KEPT}

    def extra_repr(self) -> str:
        return f"{self.channels} channels, split {self.split_len1}, backend={self.backend!r}"


# the original methods, even if the class gets others later
_COUPLING1, _COUPLING2 = CouplingBlock._coupling1, CouplingBlock._coupling2


class NICECouplingBlock(CouplingBlock):
    """Additive coupling of both halves: a drop-in for FrEIA's block of this name.

    With the subnets F and G::

        y1 = x1 + F(x2, *c)
        y2 = x2 + G(y1, *c)

    It runs plain operations, because an addition alone has nothing to fuse. In a reversible chain
    it keeps no activations. The log-determinant is the number 0.0, as in FrEIA.

    See :class:`CouplingBlock` for the arguments; there is no clamp.

    Source: Dinh, Krueger & Bengio 2015 (NICE); Ardizzone et al., FrEIA.
    """

    _kind = "NICECouplingBlock"

    def __init__(
        self,
        dims_in: Sequence[Sequence[int]],
        dims_c: Sequence[Sequence[int]] | None = None,
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        split_len: float | int = 0.5,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dims_in, dims_c, subnet_constructor, split_len=split_len, backend=backend)
        self.clamp = 0.0


class RNVPCouplingBlock(CouplingBlock):
    """Affine coupling of both halves, with two subnets a side: FrEIA's block of this name.

    With f and clamp as in :class:`CouplingBlock`, which documents the arguments::

        y1 = x1 * exp(clamp * f(subnet_s2(x2, *c))) + subnet_t2(x2, *c)
        y2 = x2 * exp(clamp * f(subnet_s1(y1, *c))) + subnet_t1(y1, *c)

    Source: Dinh, Sohl-Dickstein & Bengio 2017 (RealNVP); Ardizzone et al., FrEIA.
    """

    _kind = "RNVPCouplingBlock"


class GLOWCouplingBlock(CouplingBlock):
    """Affine coupling of both halves, with one subnet a side: FrEIA's block of this name.

    The first side transforms x1 by the coefficients subnet2(x2, *c). The second one transforms x2
    by subnet1(y1, *c). See :class:`CouplingBlock` for the formula and the arguments.

    Source: Kingma & Dhariwal 2018 (Glow); Ardizzone et al., FrEIA.

    Example:
        >>> import torch
        >>> from fastflow_kernels import GLOWCouplingBlock
        >>> block = GLOWCouplingBlock([(6,)], subnet_constructor=torch.nn.Linear)
        >>> (y,), logdet = block([torch.randn(2, 6)])
        >>> (x,), _ = block([y], rev=True)
        >>> y.shape, logdet.shape
        (torch.Size([2, 6]), torch.Size([2]))
    """

    _kind = "GLOWCouplingBlock"


class GINCouplingBlock(CouplingBlock):
    """:class:`GLOWCouplingBlock` that preserves volume: FrEIA's block of this name.

    The mean of s over the channels is removed in each pixel, so that s sums to 0. The
    log-determinant is the number 0.0, as in FrEIA.

    Source: Sorrenson, Rother & Koethe 2020 (GIN); Ardizzone et al., FrEIA.
    """

    _kind = "GINCouplingBlock"


class AffineCouplingOneSided(CouplingBlock):
    """Affine coupling of x2 alone: FrEIA's block of this name.

    ``y = cat(x1, x2 * exp(s) + a_t)`` with the coefficients subnet(x1, *c). See
    :class:`CouplingBlock` for s and the arguments.

    Source: Dinh, Sohl-Dickstein & Bengio 2017 (RealNVP); Ardizzone et al., FrEIA.
    """

    _kind = "AffineCouplingOneSided"


class ConditionalAffineTransform(CouplingBlock):
    """An affine transform of all channels by the conditions alone: FrEIA's block of this name.

    ``y = x * exp(s) + a_t`` with the coefficients subnet(*c). See :class:`CouplingBlock` for s and
    the arguments.

    Raises:
        ValueError: There is no condition, or as in :class:`CouplingBlock`.

    Source: Park et al. 2019 (SPADE); Ardizzone et al., FrEIA.
    """

    _kind = "ConditionalAffineTransform"
