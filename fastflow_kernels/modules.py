"""``AllInOneBlock``: the drop-in class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastflow_kernels import backends, options
from fastflow_kernels.block import evaluate
from fastflow_kernels.call import BlockCall, check_conditions, single_input, starts_in_place
from fastflow_kernels.checkpoints import HeldPermutation, inverse_of, read_permutations
from fastflow_kernels.errors import InputValueError
from fastflow_kernels.freia import InvertibleModule
from fastflow_kernels.index_cache import IndexCache
from fastflow_kernels.permutations import one_hot, random_rotation
from fastflow_kernels.steps import StockSteps
from fastflow_kernels.torch_private import parameter_of


class ChainLink(Protocol):
    """A block's place in a reversible chain, which evaluates the block in its own way."""

    def evaluate(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """As :func:`fastflow_kernels.block.evaluate`."""


class FusedForward:
    """``forward`` of a block that runs fused: one of ours, or a stock block, accelerated."""

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
            x: ``[x]`` with x (B, C, *S), floating point; integers promote, as in the stock blocks.
            c: Conditions, one (B, C_k, *S) each, of any dtype.
            rev: Compute the inverse.
            jac: Whether the log-determinant is wanted. It is returned anyway, as the stock blocks
                do.
            link: Given by reversible chains only.

        Returns:
            ``((y,), logdet)``, see the class.

        Raises:
            TypeError, ValueError, RuntimeError: Before any work, saying what was expected and what
                came. Those for bad input are RuntimeErrors too, as the stock blocks' are.
        """
        call = self._checked_call(x, c, rev)
        if call is None:
            return self._stock_forward(x, c, rev, jac)
        y, log_det = evaluate(call) if link is None else link.evaluate(call)
        return (y,), log_det

    def _why_not_fused(self) -> str | None:
        raise NotImplementedError

    def _checked_call(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool
    ) -> BlockCall | None:
        """The call, checked; None if the stock block's steps take it."""
        raise NotImplementedError

    def _stock_forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool, jac: bool
    ) -> tuple[tuple[Tensor], Tensor]:
        """The call in the stock block's steps."""
        raise NotImplementedError


_FUSED_FORWARD = FusedForward.forward  # as written here, whatever the class is given later


def why_not_fused(block: FusedForward) -> str | None:
    """Why every call of a block runs the stock block's steps, in words; None if calls run fused."""
    return block._why_not_fused()


def takes_link(block: FusedForward) -> bool:
    """Whether a block's ``forward`` is the one above and evaluates fused calls by its ``link``."""
    return (
        type(block).forward is _FUSED_FORWARD
        and "forward" not in block.__dict__
        and why_not_fused(block) is None
    )


class AllInOneBlock(StockSteps, FusedForward, InvertibleModule):
    r"""Affine coupling with soft clamping, global affine ("ActNorm") and channel permutation,
    fused.

    A drop-in for ``anomalib.models.components.flow.AllInOneBlock`` (``dialect="anomalib"``, also
    FrEIA 0.2) and for the block of FrEIA's main branch (``dialect="freia"``): same arguments,
    parameters, checkpoints and results. With x = (x1, x2) split after C - C//2 channels and (a_s,
    a_t) = subnet(cat(x1, *c)):

    .. math::
        s &= \alpha \tanh(0.1\, a_s) \quad\text{("anomalib")},\qquad s = \alpha \tanh(0.1\, a_s /
        \alpha) \quad\text{("freia")} \\ u &= \mathrm{cat}(x_1,\; x_2 \odot e^{s} + 0.1\, a_t) \\
        y &= R\,(\Psi(g) \odot u + t), \qquad \log\det = \sum s + P \sum \log \Psi(g)

    Args:
        dims_in: ``[(C, *S)]`` with 0 to 3 spatial dimensions. Dialect "anomalib" takes any spatial
            size, "freia" only the declared one.
        dims_c: Shapes of the conditions, ``[(C_k, *S), ...]``.
        subnet_constructor: Called as ``f(channels_in, channels_out)``, returns the module that
            predicts the coefficients.
        affine_clamping: Bound of the log-factors s. 0 is an additive coupling in dialect "anomalib"
            and an error in "freia".
        gin_block: Volume-preserving coupling (Sorrenson, Rother & Koethe 2020): the mean of s is
            removed, scale is 1.
        global_affine_init: Initial global scale, in the range of its activation: (0, 10) for
            SIGMOID, else above 0.
        global_affine_type: ``"SIGMOID"``, ``"SOFTPLUS"`` or ``"EXP"``.
        permute_soft: A fixed rotation from SO(C) instead of a permutation. Drawn by torch; the
            stock blocks ask NumPy.
        learned_householder_permutation: Number of learned Householder reflections (Tomczak &
            Welling 2016) beside the permutation.
        reverse_permutation: Invert the permutation before the coupling (Putzky & Welling 2019).
        dialect: ``"anomalib"`` or ``"freia"``: the clamp formula, the state dict's layout of
            ``w_perm``, the shape check.
        backend: ``"auto"``, ``"eager"`` or ``"triton"``; "auto" follows FASTFLOW_KERNELS_BACKEND
            where that is set.

    Shape:
        ``block([x], c) -> ((y,), logdet)`` with x, y (B, C, *S) and logdet (B,) in nats per sample
        (float32, or float64 for float64 data). y has the promoted dtype of x, the coefficients and
        the parameters.

    Raises:
        ValueError, TypeError: An option or shape that makes no sense; nothing is drawn or built
            then.

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
    ) -> None:
        dims_in, dims_c = options.checked_dims(dims_in, dims_c)
        subnet_constructor = options.checked_constructor(subnet_constructor)
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
        self.last_jac = None  # which the stock blocks have, too
        if global_affine_type == "SOFTPLUS":
            self.softplus = nn.Softplus(beta=0.5)

        ones = (1,) * self.input_rank
        self.global_scale = nn.Parameter(torch.ones(1, channels, *ones) * initial)
        self.global_offset = nn.Parameter(torch.zeros(1, channels, *ones))
        # the order of draws is the stock block's: permutation, reflections, subnet
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
            # of one channel, too, contiguous() would be the same memory
            inverse = w.T.clone(memory_format=torch.contiguous_format)
            self.w_perm_inv = nn.Parameter(inverse.view(shape), requires_grad=False)
        self._index.refresh(self)

    def _make_subnet(self, constructor: Callable[[int, int], nn.Module]) -> None:
        drawn = torch.get_rng_state() if self.permute_soft else None
        self.subnet = constructor(self.splits[0] + self.condition_channels, 2 * self.splits[1])
        if drawn is not None and torch.equal(drawn, torch.get_rng_state()):
            # The subnet drew no random numbers: advance the generator, so that the next block gets
            # another rotation.
            torch.rand((), device="cpu")
        if not callable(self.subnet):
            raise TypeError(
                f"expected subnet_constructor to return a module, got {type(self.subnet).__name__}"
            )
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
        )

    def _stock_forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None, rev: bool, jac: bool
    ) -> tuple[tuple[Tensor], Tensor]:
        y, log_det = self._composed(x[0], check_conditions(c, self.dims_c, x[0]), rev)
        return (y,), log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The output's shape: the input's.

        Args:
            input_dims: ``[(C, *S)]``.

        Returns:
            The same list.
        """
        return input_dims

    def _holds_index(self) -> bool:
        """Whether ``w_perm`` is an int64 index.

        Otherwise it is a float matrix, as in the stock block of that dialect.
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
        read = read_permutations(state_dict, prefix, held)
        # in place: hooks and submodules see the same dictionary
        state_dict.update({prefix + name: w for name, w in read.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # with strict=False: the other one must not stay behind
        if len(read) == 1 and not self.householder:
            loaded, missing = self.w_perm, self.w_perm_inv
            if "w_perm" not in read:
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
