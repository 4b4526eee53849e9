"""``AllInOneBlock``: the drop-in class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastflow_kernels import backends, options
from fastflow_kernels.call import (
    BlockCall,
    SidesCall,
    check_conditions,
    single_input,
    starts_in_place,
)
from fastflow_kernels.checkpoints import HeldPermutation, inverse_of, read_permutations
from fastflow_kernels.errors import InputValueError
from fastflow_kernels.freia import InvertibleModule
from fastflow_kernels.index_cache import IndexCache
from fastflow_kernels.permutations import one_hot, random_rotation
from fastflow_kernels.predicates import autocast_dtype
from fastflow_kernels.sides import evaluate
from fastflow_kernels.steps import StockSteps
from fastflow_kernels.torch_private import parameter_of


class ChainLink(Protocol):
    """A block's place in a reversible chain, which evaluates the block in its own way."""

    def evaluate(self, call: Any) -> tuple[Tensor, Any]:
        """Return what :func:`fastflow_kernels.sides.evaluate` returns."""


class FusedForward:
    """The ``forward`` of blocks that run fused: ours, and stock blocks that are accelerated."""

    subnet: Any  # of an AllInOneBlock
    _is_all_in_one = False  # whether a checked call is a BlockCall

    def forward(
        self,
        x: Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
        *,
        link: ChainLink | None = None,
    ) -> tuple[tuple[Tensor], Tensor]:
        """Evaluate the block or its inverse.

        Args:
            x: ``[x]`` with x (B, C, *S) in a floating-point dtype. Integers promote, as in the
                stock blocks.
            c: Conditions of shapes (B, C_k, *S), of any dtype.
            rev: Compute the inverse.
            jac: Whether the log-determinant is wanted. It is always returned, as by the stock
                blocks.
            link: For reversible chains only.

        Returns:
            ``((y,), logdet)`` with y (B, C, *S) and logdet (B,) in nats per sample.

        Raises:
            TypeError, ValueError: The input or the subnet's output does not fit. Input is checked
                before any work. Both are RuntimeErrors too, as in the stock blocks.
            RuntimeError: Backend "triton" cannot be used, or the subnet writes to its input.
        """
        call = self._checked_call(x, c, rev)
        if call is None:
            return self._stock_forward(x, c, rev, jac)
        y, log_det = evaluate(call) if link is None else link.evaluate(call)
        return (y,), log_det

    def _why_not_fused(self) -> str | None:
        raise NotImplementedError

    def _subnets(self) -> tuple[Any, ...]:
        return (self.subnet,)

    def _checked_call(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool
    ) -> BlockCall | SidesCall | None:
        """Check a call and return it, or None if it runs the stock block's steps."""
        raise NotImplementedError

    def _stock_forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool, jac: bool
    ) -> tuple[tuple[Tensor], Tensor]:
        """Evaluate a call in the stock block's steps."""
        raise NotImplementedError


# The original forwards that take a link, even if their classes get others later.
FORWARDS_WITH_LINK: set[Any] = {FusedForward.forward}


def why_not_fused(block: FusedForward) -> str | None:
    """Return why every call of a block runs the stock block's steps, or None if calls run fused."""
    return block._why_not_fused()


def subnets_of(block: FusedForward) -> tuple[Any, ...]:
    """Return the subnets of a block."""
    return block._subnets()


def takes_link(block: FusedForward) -> bool:
    """Return whether a block runs fused by a ``forward`` that uses ``link``."""
    return (
        type(block).forward in FORWARDS_WITH_LINK
        and "forward" not in block.__dict__
        and why_not_fused(block) is None
    )


class AllInOneBlock(StockSteps, FusedForward, InvertibleModule):
    r"""Affine coupling with soft clamping, global affine ("ActNorm") and permutation, fused.

    It is a drop-in for ``anomalib.models.components.flow.AllInOneBlock`` and the block of FrEIA 0.2
    (``dialect="anomalib"``), and for the block of FrEIA's main branch (``dialect="freia"``).
    Arguments, parameters, checkpoints and results are the same.

    The input x is split into (x1, x2) after C - C//2 channels. The subnet predicts the coefficients
    (a_s, a_t) = subnet(cat(x1, *c)). In the formula g is the global scale, Psi its activation, t
    the global offset, R the permutation and P the number of pixels:

    .. math::
        s &= \alpha \tanh(0.1\, a_s) \quad\text{("anomalib")},\qquad s = \alpha \tanh(0.1\, a_s /
        \alpha) \quad\text{("freia")} \\ u &= \mathrm{cat}(x_1,\; x_2 \odot e^{s} + 0.1\, a_t) \\
        y &= R\,(\Psi(g) \odot u + t), \qquad \log\det = \sum s + P \sum \log \Psi(g)

    Args:
        dims_in: ``[(C, *S)]`` with 0 to 3 spatial dimensions. Dialect "anomalib" takes any spatial
            size, "freia" only the declared one.
        dims_c: Shapes of the conditions, ``[(C_k, *S), ...]``.
        subnet_constructor: A function ``f(channels_in, channels_out)`` that returns the subnet, a
            module that predicts the coefficients.
        affine_clamping: Bound of the log-factors s. 0 is an additive coupling in dialect "anomalib"
            and an error in "freia".
        gin_block: Volume-preserving coupling (Sorrenson, Rother & Koethe 2020): the mean of s is
            removed, and the scale is 1.
        global_affine_init: Initial global scale, in the range of its activation: (0, 10) for
            SIGMOID, otherwise above 0.
        global_affine_type: Activation of the global scale: ``"SIGMOID"``, ``"SOFTPLUS"`` or
            ``"EXP"``.
        permute_soft: Use a fixed rotation from SO(C) instead of a permutation. It is drawn by
            torch; the stock blocks draw theirs from NumPy.
        learned_householder_permutation: Number of learned Householder reflections (Tomczak &
            Welling 2016) beside the permutation.
        reverse_permutation: Invert the permutation before the coupling (Putzky & Welling 2019).
        dialect: Either ``"anomalib"`` or ``"freia"``. It sets the clamp formula, the layout of
            ``w_perm`` in the state dict, and the shape check.
        backend: One of ``"auto"``, ``"eager"`` and ``"triton"``. Where FASTFLOW_KERNELS_BACKEND is
            set, "auto" follows it.
        half_output: Whether y has autocast's half precision where autocast is on, as in the stock
            blocks. Otherwise it is float32, as x is in the inverse. A chain then keeps two bytes
            instead of four for each value, and rounds once a block. While gradients are enabled a
            reversible chain ignores it.

    Shape:
        ``block([x], c) -> ((y,), logdet)`` with x, y (B, C, *S) and logdet (B,) in nats per sample.
        The dtype of y is the promoted one of x, the coefficients and the parameters. The dtype of
        logdet is float64 for float64 data, otherwise float32.

    Raises:
        ValueError, TypeError: An option or a shape is not valid. All are checked before anything is
            drawn or built.

    Source: Ardizzone et al., FrEIA (2018-2022); Dinh, Sohl-Dickstein & Bengio 2017 (RealNVP);
    Kingma & Dhariwal 2018 (Glow).

    Example:
        >>> import torch
        >>> from fastflow_kernels import AllInOneBlock
        >>> def subnet(channels_in, channels_out):
        ...     return torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> block = AllInOneBlock([(4, 8, 8)], subnet_constructor=subnet)
        >>> (y,), logdet = block([torch.randn(2, 4, 8, 8)])
        >>> y.shape, logdet.shape
        (torch.Size([2, 4, 8, 8]), torch.Size([2]))
    """

    half_output: bool = False  # for pickles of earlier versions
    _is_all_in_one = True

    def __init__(
        self,
        dims_in: Sequence[Sequence[int]],
        dims_c: Sequence[Sequence[int]] | None = None,
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        affine_clamping: float = 2.0,
        gin_block: bool = False,
        global_affine_init: float = 1.0,
        global_affine_type: str = "SOFTPLUS",
        permute_soft: bool = False,
        learned_householder_permutation: int = 0,
        reverse_permutation: bool = False,
        *,
        dialect: str = "anomalib",
        backend: str = "auto",
        half_output: bool = False,
    ) -> None:
        dims_in, dims_c = options.check_dims(dims_in, dims_c)
        subnet_constructor = options.check_constructor(subnet_constructor)
        options.check_options(affine_clamping, learned_householder_permutation, dialect)
        backend = backends.validated(backend)
        initial = options.initial_global_scale(global_affine_type, global_affine_init, dialect)
        super().__init__(dims_in, dims_c)

        channels, *spatial = dims_in[0]
        self.in_channels = channels
        self.input_rank = len(spatial)
        self.sum_dims = tuple(range(1, 2 + self.input_rank))
        self.splits = [channels - channels // 2, channels // 2]
        self.conditional = bool(dims_c)
        self.condition_channels = sum(shape[0] for shape in dims_c)
        self.clamp = affine_clamping
        self.GIN = gin_block
        self.householder = learned_householder_permutation
        self.reverse_pre_permute = reverse_permutation
        self.permute_soft = permute_soft
        self.global_affine_type = global_affine_type
        self.dialect = dialect
        self.backend = backend
        self.half_output = half_output
        self.last_jac = None  # the stock blocks have it, too
        if global_affine_type == "SOFTPLUS":
            self.softplus = nn.Softplus(beta=0.5)

        ones = (1,) * self.input_rank
        self.global_scale = nn.Parameter(torch.ones(1, channels, *ones) * initial)
        self.global_offset = nn.Parameter(torch.zeros(1, channels, *ones))
        # Random numbers are drawn in the stock block's order: permutation, reflections, subnet.
        self._index = IndexCache()
        self._draw_permutation()
        self._make_subnet(subnet_constructor)

    def _draw_permutation(self) -> None:
        channels, ones = self.in_channels, (1,) * self.input_rank
        index = None if self.permute_soft else torch.randperm(channels)
        if index is not None and self._holds_index():
            self.w_perm = nn.Parameter(index, requires_grad=False)
            self.w_perm_inv = nn.Parameter(torch.argsort(index), requires_grad=False)
            return
        if index is None:
            w = random_rotation(channels)
        else:
            w = one_hot(index, self.global_scale.dtype)
        if self.householder:
            self.vk_householder = nn.Parameter(0.2 * torch.randn(self.householder, channels))
            self.w_0 = nn.Parameter(w, requires_grad=False)
            self.w_perm = self.w_perm_inv = None
        else:
            shape = channels, channels, *ones
            self.w_perm = nn.Parameter(w.view(shape), requires_grad=False)
            # clone(), because with one channel contiguous() would return the memory of w
            inverse = w.T.clone(memory_format=torch.contiguous_format)
            self.w_perm_inv = nn.Parameter(inverse.view(shape), requires_grad=False)
        self._index.refresh(self)

    def _make_subnet(self, constructor: Callable[[int, int], nn.Module]) -> None:
        state_before = torch.get_rng_state() if self.permute_soft else None
        self.subnet = constructor(self.splits[0] + self.condition_channels, 2 * self.splits[1])
        if state_before is not None and torch.equal(state_before, torch.get_rng_state()):
            # The subnet drew no random numbers: advance the generator, so that the next block gets
            # another rotation.
            torch.rand((), device="cpu")
        options.check_subnet(self.subnet)
        self._subnet_starts_in_place = starts_in_place(self.subnet)

    def _checked_call(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool
    ) -> BlockCall | None:
        shape = tuple(self.dims_in[0]) if self.dialect == "freia" else None
        x = single_input(x, self.in_channels, self.input_rank, shape)
        c = check_conditions(c, self.dims_c, x)
        global_scale = parameter_of(self, "global_scale")
        if x.device != global_scale.device:
            raise InputValueError(
                f"expected the input on {global_scale.device}, where the block is; got {x.device}"
            )
        if not x.is_floating_point() or self._why_not_fused() is not None:
            return None
        return BlockCall(
            x,
            c,
            self._run_subnet,
            global_scale,
            parameter_of(self, "global_offset"),
            self._index.permutation(self, rev, x if self.backend == "auto" else None),
            self._spec(),
            rev,
            self.reverse_pre_permute,
            self.backend,
            autocast_dtype(x, global_scale) if self.half_output and not rev else None,
        )

    def _stock_forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool, jac: bool
    ) -> tuple[tuple[Tensor], Tensor]:
        y, log_det = self._evaluate_in_steps(x[0], check_conditions(c, self.dims_c, x[0]), rev)
        return (y,), log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the output's shape, which is the input's.

        Args:
            input_dims: ``[(C, *S)]``.

        Returns:
            The same list.
        """
        return input_dims

    def _holds_index(self) -> bool:
        """Return whether ``w_perm`` is an int64 index, as in the stock block of this dialect.

        Otherwise it is a float matrix.
        """
        return self.dialect == "freia" and not self.permute_soft and not self.householder

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        names = ("w_0",) if self.householder else ("w_perm", "w_perm_inv")
        ones = () if self.householder else (1,) * self.input_rank
        held = HeldPermutation(
            type(self).__name__,
            names,
            (self.in_channels, self.in_channels, *ones),
            getattr(self, names[0]).dtype,
            self._holds_index(),
            self.dialect == "anomalib" and bool(self.clamp != 1),
        )
        permutations = read_permutations(state_dict, prefix, held)
        # in place, because hooks and submodules see the same dictionary
        state_dict.update({prefix + name: w for name, w in permutations.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # With strict=False one of the two may be missing. It must follow the other one.
        if len(permutations) == 1 and not self.householder:
            loaded, missing = self.w_perm, self.w_perm_inv
            if "w_perm" not in permutations:
                loaded, missing = missing, loaded
            with torch.no_grad():
                missing.copy_(inverse_of(loaded))
        self._index.refresh(self)

    def extra_repr(self) -> str:
        kind = "soft" if self.permute_soft else "hard"
        reflections = f", householder={self.householder}" if self.householder else ""
        return (
            f"{self.in_channels} channels, rank {self.input_rank}, {kind}{reflections}, "
            f"dialect={self.dialect!r}, backend={self.backend!r}"
        )
