"""``InvertibleModule`` and ``AllInOneBlock``: the drop-in classes."""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels import dispatch
from fastflow_kernels.adoption import adopt
from fastflow_kernels.engines import eager
from fastflow_kernels.errors import InputValueError
from fastflow_kernels.functional import (
    all_in_one_block,
    check_conditions,
    single_input,
    starts_in_place,
)
from fastflow_kernels.permutations import (
    IndexCache,
    Permutation,
    hard_index,
    multiply_channels,
    one_hot,
    parameter,
    random_rotation,
)
from fastflow_kernels.coupling import ACTIVATIONS, DIALECTS, CouplingSpec

# the block's methods that a subclass may override
STEPS = ("_affine", "_permute", "_pre_permute", "_construct_householder_permutation")
_OVERRIDABLE = (*STEPS, "permute_function", "global_scale_activation")


class InvertibleModule(nn.Module):
    """Base class of invertible modules, with FrEIA's interface.

    ``module([x], c, rev=False, jac=True)`` returns ``((z,), logdet)`` with ``logdet = log |det
    dz/dx|`` (B,) in nats per sample, and ``module([z], c, rev=True)`` returns ``((x,), -logdet)``.
    Where FrEIA is imported, before or after, instances pass ``isinstance(module,
    FrEIA.modules.InvertibleModule)``.

    Args:
        dims_in: One shape per input, without the batch dimension: ``[(C, *S)]``.
        dims_c: One shape per condition.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> InvertibleModule:
        _adopt_freia()  # again: FrEIA may have been reloaded
        return super().__new__(cls)

    def __init__(
        self, dims_in: Iterable[Sequence[int]], dims_c: Iterable[Sequence[int]] | None = None
    ) -> None:
        nn.Module.__init__(self)  # by name: FrEIA's base, where adopted, would ask for dims_in
        self.dims_in = list(dims_in)
        self.dims_c = list(dims_c) if dims_c is not None else []

    def forward(
        self,
        x_or_z: Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Compute the outputs and the log-determinant; to be implemented by subclasses.

        Args:
            x_or_z: Inputs, one tensor (B, *dims_in[k]) each.
            c: Conditions, one tensor (B, *dims_c[k]) each.
            rev: Compute the inverse.
            jac: Whether the log-determinant is wanted.

        Raises:
            NotImplementedError: Always, here.
        """
        raise NotImplementedError(f"{type(self).__name__} does not provide forward(...)")

    def log_jacobian(self, *args: Any, **kwargs: Any) -> None:
        """Deprecated; ``forward`` returns the log-determinant.

        Raises:
            DeprecationWarning: Always.
        """
        raise DeprecationWarning(
            "log_jacobian is deprecated: forward(..., jac=True) returns (outputs, log-determinant)"
        )

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The outputs' shapes for inputs of shapes ``input_dims``; to be implemented by subclasses.

        Raises:
            NotImplementedError: Always, here.
        """
        raise NotImplementedError(f"{type(self).__name__} does not provide output_dims(...)")


def _adopt_freia() -> None:
    """Make FrEIA's base class a base of ours once FrEIA is imported, so that its containers
    recognise our modules.
    """
    adopt(InvertibleModule, "FrEIA.modules.base", "InvertibleModule")


_adopt_freia()


class AllInOneBlock(InvertibleModule):
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
        reverse_permutation: Undo the permutation before the coupling (Putzky & Welling 2019).
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
        >>> block = AllInOneBlock([(4, 8, 8)], subnet_constructor=lambda i, o: torch.nn.Conv2d(i, o, 3, padding=1))
        >>> (y,), logdet = block([torch.randn(2, 4, 8, 8)])
        >>> y.shape, logdet.shape
        (torch.Size([2, 4, 8, 8]), torch.Size([2]))
    """

    clamp: float | Tensor
    w_perm: Any  # a parameter; None with reflections
    w_perm_inv: Any

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
        dims_in, dims_c = _checked_dims(dims_in, dims_c)
        subnet_constructor = _checked_constructor(subnet_constructor)
        _check_options(affine_clamping, learned_householder_permutation, dialect)
        backend = dispatch.validated(backend)
        initial = _initial_global_scale(global_affine_type, global_affine_init, dialect)
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
        index = None if permute_soft else torch.randperm(channels)
        if index is not None and self._holds_index():
            self.w_perm = nn.Parameter(index, requires_grad=False)
            self.w_perm_inv = nn.Parameter(torch.argsort(index), requires_grad=False)
        else:
            w = (
                random_rotation(channels)
                if index is None
                else one_hot(index, self.global_scale.dtype)
            )
            if self.householder:
                self.vk_householder = nn.Parameter(0.2 * torch.randn(self.householder, channels))
                self.w_0 = nn.Parameter(w, requires_grad=False)
                self.w_perm = self.w_perm_inv = None
            else:
                self.w_perm = nn.Parameter(w.view(channels, channels, *ones), requires_grad=False)
                # of one channel, too, contiguous() would be the same memory
                inverse = w.T.clone(memory_format=torch.contiguous_format)
                self.w_perm_inv = nn.Parameter(
                    inverse.view(channels, channels, *ones), requires_grad=False
                )
            # now, for the first forward may be a compiled one, which cannot look
            self._index.permutation(self)
        drawn = torch.get_rng_state() if permute_soft else None
        self.subnet = subnet_constructor(
            self.splits[0] + self.condition_channels, 2 * self.splits[1]
        )
        if drawn is not None and torch.equal(drawn, torch.get_rng_state()):
            # the subnet drew nothing: lest the next block draws the same rotation
            torch.rand((), device="cpu")
        if not callable(self.subnet):
            raise TypeError(
                f"expected subnet_constructor to return a module, got {type(self.subnet).__name__}"
            )
        self._subnet_starts_in_place = starts_in_place(self.subnet)

    # --- evaluation ---

    def forward(
        self,
        x: Sequence[Tensor],
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
        *,
        run: Callable[..., tuple[Tensor, Tensor]] = all_in_one_block,
    ) -> tuple[tuple[Tensor], Tensor]:
        """Evaluate the block or its inverse.

        Args:
            x: ``[x]`` with x (B, C, *S), floating point; integers promote, as in the stock blocks.
            c: Conditions, one (B, C_k, *S) each, of any dtype.
            rev: Compute the inverse.
            jac: Whether the log-determinant is wanted. It is returned anyway, as the stock blocks
                do.
            run: What evaluates the checked call, with ``functional.all_in_one_block``'s arguments;
                a reversible chain hands in its own.

        Returns:
            ``((y,), logdet)``, see the class.

        Raises:
            TypeError, ValueError, RuntimeError: Before any work, saying what was expected and what
                came. Those for bad input are RuntimeErrors too, as the stock blocks' are.
        """
        shape = tuple(self.dims_in[0]) if self.dialect == "freia" else None
        x = single_input(x, self.in_channels, self.input_rank, shape)
        c = check_conditions(c, self.dims_c, x)
        global_scale = parameter(self, "global_scale")
        if x.device != global_scale.device:
            raise InputValueError(
                f"expected the input on {global_scale.device}, where the block is; got {x.device}"
            )
        if self._overridden() or not x.is_floating_point():
            y, logdet = self._composed(x, c, rev)
        else:
            y, logdet = run(
                x,
                self._checked_subnet,
                global_scale,
                parameter(self, "global_offset"),
                self._index.permutation(self, rev, x),
                self._spec(),
                c,
                rev=rev,
                reverse_permutation=self.reverse_pre_permute,
                backend=self.backend,
            )
        return (y,), logdet

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The output's shape: the input's.

        Args:
            input_dims: ``[(C, *S)]``.

        Returns:
            The same list.
        """
        return input_dims

    def global_scale_activation(self, g: Tensor) -> Tensor:
        """The activation of the global scale, elementwise: 10*sigmoid(g - 2), 0.1*softplus(g,
        beta=0.5) or exp(g).
        """
        if self.global_affine_type == "SOFTPLUS":
            return 0.1 * self.softplus(g)
        return eager.scale_of(g, self.global_affine_type)

    def permute_function(self, x: Tensor, w: Tensor) -> Tensor:
        """An index (C,) or a matrix (C, C, 1, ...) applied to the channels of x (B, C, *S)."""
        return x.index_select(1, w) if w.dim() == 1 else multiply_channels(x, w)

    def _spec(self) -> CouplingSpec:
        return CouplingSpec.of(self.clamp, self.dialect, self.global_affine_type, self.GIN)

    def _holds_index(self) -> bool:
        """Whether ``w_perm`` is an int64 index; else it is a float matrix, as in the stock block of
        that dialect.
        """
        return self.dialect == "freia" and not self.permute_soft and not self.householder

    def _permutation(self) -> Permutation:
        return self._index.permutation(self)

    def _checked_subnet(self, x: Tensor) -> Tensor:
        return self.subnet(x.clone() if self._subnet_starts_in_place else x)

    # --- the documented methods that subclasses override ---

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """The coupling alone.

        Args:
            x: The active half, (B, C2, *S).
            a: The subnet's output, (B, 2*C2, *S); it is not written to.
            rev: Compute the inverse.

        Returns:
            The transformed active half and the sum of its log-factors (B,), negated in reverse.
        """
        wide_x, wide_a = eager.accumulated(x, a)
        y, logdet = eager.composite_affine(wide_x, wide_a, self._spec(), rev)
        return y.to(eager.promoted(x, a)), logdet

    def _permute(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor | float]:
        """Global affine and permutation, or their inverse.

        Args:
            x: (B, C, *S).
            rev: Compute the inverse.

        Returns:
            The transformed tensor and sum(log(scale)) (0.0 for GIN), of the forward direction in
            both cases.
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
        """The permutation undone before the coupling, or redone after its inverse; only used with
        ``reverse_permutation``.

        Args:
            x: (B, C, *S).
            rev: Redo it.
        """
        return self._permuted(x, rev=not rev)

    def _construct_householder_permutation(self) -> Tensor:
        """The matrix w_0 H_1 ... H_K, (C, C, 1, ...) with as many ones as spatial dimensions."""
        w = self._permutation().matrix(self.global_scale.dtype)
        return w.view(*w.shape, *[1] * self.input_rank)

    def _takes_run(self) -> bool:
        """Whether ``forward`` is this class's own and hands everything to ``run``."""
        return (
            type(self).forward is _FORWARD
            and "forward" not in self.__dict__
            and not self._overridden()
        )

    def _overridden(self) -> bool:
        """Whether the block computes something that the fused form does not: a step was exchanged,
        or the clamp learns.
        """
        cls = type(self)
        for name, own in _OWN.items():
            if getattr(cls, name) is not own:
                return True
        if (
            has_any(self.__dict__, _OVERRIDABLE)
            or isinstance(self.clamp, Tensor)
            or self.splits[1] != self.in_channels // 2
        ):
            return True
        return not self._has_own_softplus()

    def _has_own_softplus(self) -> bool:
        if self.global_affine_type != "SOFTPLUS":
            return True
        return is_known_softplus(self._modules.get("softplus"))

    def _exchanged(self, name: str) -> bool:
        return name in self.__dict__ or getattr(type(self), name) is not _OWN[name]

    def _permuted(self, x: Tensor, rev: bool) -> Tensor:
        """x permuted, or permuted back, by the methods that were exchanged if any were."""
        if not self._exchanged("permute_function") and not (
            self.householder and self._exchanged("_construct_householder_permutation")
        ):
            permutation = self._permutation()
            return permutation.unpermute(x) if rev else permutation.permute(x)
        if self.householder:
            w = self._construct_householder_permutation()
            return self.permute_function(x, w.transpose(0, 1).contiguous() if rev else w)
        return self.permute_function(x, self.w_perm_inv if rev else self.w_perm)

    def _composed(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        """The block in the stock block's steps, through the methods that are overridden."""
        if dispatch.resolved(self.backend) == "triton":
            raise RuntimeError(
                "backend 'triton' cannot be used here: a step of the block is overridden, its "
                "clamp is a tensor, or the input is integer"
            )
        if not self.householder:
            return self._in_steps(x, c, rev)
        # as the stock block does, but not for longer than the call: it holds a graph
        self.w_perm = self._construct_householder_permutation()
        self.w_perm_inv = self.w_perm.transpose(0, 1).contiguous()
        try:
            return self._in_steps(x, c, rev)
        finally:
            self.w_perm = self.w_perm_inv = None

    def _in_steps(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        log_scale: Tensor | float = 0.0
        if rev:
            x, log_scale = self._permute(x, rev=True)
        elif self.reverse_pre_permute:
            x = self._pre_permute(x, rev=False)
        x1, x2 = x.split(self.splits, 1)
        x2, logdet = self._affine(
            x2, self._checked_subnet(torch.cat((x1, *c), 1) if c else x1), rev=rev
        )
        x = torch.cat((x1, x2), 1)
        if not rev:
            x, log_scale = self._permute(x, rev=False)
        elif self.reverse_pre_permute:
            x = self._pre_permute(x, rev=True)
        pixels = math.prod(x.shape[2:])
        return x, logdet + (-pixels if rev else pixels) * log_scale

    # --- checkpoints: either layout of the permutation loads ---

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        names = ("w_0",) if self.householder else ("w_perm", "w_perm_inv")
        for name in names:
            if prefix + name in state_dict and not isinstance(state_dict[prefix + name], Tensor):
                raise RuntimeError(
                    f"expected {prefix}{name} to be a tensor, got "
                    f"{type(state_dict[prefix + name]).__name__}"
                )
        found = {
            name: state_dict[prefix + name]
            for name in names
            if isinstance(state_dict.get(prefix + name), Tensor)
        }
        try:
            read = {name: self._read_permutation(prefix + name, w) for name, w in found.items()}
        except ValueError as error:
            # the type that load_state_dict raises; at once, so that the subnet stays as it is, too
            raise RuntimeError(
                f"Error in loading state_dict for {type(self).__name__}: {error}"
            ) from None
        if len(read) == 2 and not self._are_inverse(*read.values()):
            warnings.warn(
                f"{prefix}w_perm_inv is not the inverse of {prefix}w_perm: the block's inverse "
                "will not undo it",
                stacklevel=2,
            )
        if (
            self.dialect == "anomalib"
            and self.clamp != 1
            and any(w.dim() == 1 for w in found.values())
        ):
            warnings.warn(
                f"{prefix}w_perm is stored as an index, as in FrEIA's main branch, which computes "
                "tanh(0.1 a / clamp); this block is of "
                "dialect 'anomalib', tanh(0.1 a). Build it with dialect='freia' to get the results "
                "of the block that was saved.",
                stacklevel=2,
            )
        # in place, for hooks and submodules see the same dictionary
        state_dict.update({prefix + name: w for name, w in read.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # with strict=False: the other one must not stay behind
        if len(read) == 1 and not self.householder:
            given, other = (
                (self.w_perm, self.w_perm_inv)
                if "w_perm" in read
                else (self.w_perm_inv, self.w_perm)
            )
            with torch.no_grad():
                other.copy_(torch.argsort(given) if self._holds_index() else given.transpose(0, 1))
        self._index.permutation(self)

    def _read_permutation(self, key: str, w: Tensor) -> Tensor:
        """A stored permutation, index or matrix, in the form this block holds; ValueError if it is
        none.
        """
        channels = self.in_channels
        shape = (channels, channels, *[1] * (0 if self.householder else self.input_rank))
        unloaded = "nothing was loaded into this block"
        if w.dim() == 1:
            if (
                w.numel() != channels
                or w.is_floating_point()
                or not torch.equal(w.sort().values, torch.arange(channels, device=w.device))
            ):
                raise ValueError(
                    f"{key} of shape {tuple(w.shape)} is not a permutation of {channels} channels; "
                    f"{unloaded}"
                )
            return (
                w.long()
                if self._holds_index()
                else one_hot(w.long(), self.global_scale.dtype).view(shape)
            )
        if not w.is_floating_point():
            w = w.to(self.global_scale.dtype)  # copy_ would convert it, too
        if w.numel() != channels**2 or w.shape[:2] != (channels, channels):
            raise ValueError(
                f"{key} has shape {tuple(w.shape)}, expected ({channels},) or ({channels}, "
                f"{channels}); {unloaded}"
            )
        matrix = w.reshape(channels, channels)
        index = hard_index(matrix)
        if index is None and self._holds_index():
            raise ValueError(
                f"{key} is not a permutation matrix; {unloaded}. For a rotation build the block "
                "with permute_soft=True."
            )
        if index is None:  # the stock blocks load any matrix, and so it is multiplied by
            error = (
                (matrix.float() @ matrix.float().T - torch.eye(channels, device=w.device))
                .abs()
                .max()
            )
            if not error < 0.02:  # a rotation rounded to bfloat16 is orthogonal to about 2^-8
                warnings.warn(
                    f"{key} is no rotation: w w^T differs from the identity by {error:.2g}. The "
                    "block computes with it as the stock block "
                    "does, which leaves it out of the log-determinant.",
                    stacklevel=2,
                )
        return index if index is not None and self._holds_index() else w.reshape(shape)

    def _are_inverse(self, w: Tensor, w_inv: Tensor) -> bool:
        if self._holds_index():
            return torch.equal(torch.argsort(w), w_inv)
        return torch.allclose(w.transpose(0, 1).float(), w_inv.float(), atol=1e-5)

    def extra_repr(self) -> str:
        kind = "soft" if self.permute_soft else "hard"
        more = f", householder={self.householder}" if self.householder else ""
        return f"{self.in_channels} channels, rank {self.input_rank}, {kind}{more}, dialect={self.dialect!r}, backend={self.backend!r}"


def is_known_softplus(module: Any) -> bool:
    """Whether a block's softplus computes the known form, and nobody looks on."""
    if type(module) is not nn.Softplus:
        return False
    own = module.__dict__
    beta = own.get("beta")
    if type(beta) is not float or beta != 0.5 or own.get("threshold") != 20:
        return False
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


# as written here, whatever the class is given later
_OWN = {name: getattr(AllInOneBlock, name) for name in _OVERRIDABLE}
_FORWARD = AllInOneBlock.forward


def has_any(own: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether one of the names is among an object's own attributes, without the cost of a
    generator: it is asked in every call.
    """
    for name in names:  # noqa: SIM110
        if name in own:
            return True
    return False


# --- options --------------------------------------------------------------------------------------


def _checked_dims(
    dims_in: Sequence[Sequence[int]], dims_c: Sequence[Sequence[int]] | None
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    dims_in = _shapes("dims_in", dims_in)
    dims_c = _shapes("dims_c", dims_c if dims_c is not None else [])
    if len(dims_in) != 1:
        raise ValueError(f"expected dims_in with one shape (C, *S), got {len(dims_in)}: {dims_in}")
    if len(dims_in[0]) > 4:
        raise ValueError(
            "expected data of rank 0 to 3 (1 to 4 dimensions without the batch), got dims_in "
            f"{dims_in}"
        )
    if dims_in[0][0] < 1 or min(dims_in[0]) < 0:
        raise ValueError(
            f"expected at least one channel and no negative size, got dims_in {dims_in}"
        )
    for shape in dims_c:
        if shape[1:] != dims_in[0][1:]:
            raise ValueError(
                f"expected conditions of the input's spatial shape {dims_in[0][1:]}, got dims_c "
                f"{dims_c}"
            )
    return dims_in, dims_c


def _shapes(name: str, value: Any) -> list[tuple[int, ...]]:
    try:
        shapes = [tuple(operator.index(n) for n in shape) for shape in value]
    except TypeError:
        raise TypeError(
            f"expected {name} as a list of shapes such as [(64, 32, 32)], got {value!r}"
        ) from None
    if any(not shape for shape in shapes):
        raise ValueError(
            f"expected {name} as a list of shapes such as [(64, 32, 32)], got {value!r}"
        )
    return shapes


def _checked_constructor(subnet_constructor: Any) -> Callable[[int, int], nn.Module]:
    if subnet_constructor is None:
        raise ValueError(
            "expected a subnet_constructor, called as f(channels_in, channels_out); got None"
        )
    if not callable(subnet_constructor) or isinstance(subnet_constructor, nn.Module):
        raise TypeError(
            "expected subnet_constructor to be callable, as f(channels_in, channels_out); got "
            f"{type(subnet_constructor).__name__}"
        )
    return subnet_constructor


def _check_options(clamp: Any, householder: Any, dialect: Any) -> None:
    if dialect not in DIALECTS:
        raise ValueError(f"expected dialect to be one of {', '.join(DIALECTS)}; got {dialect!r}")
    if not math.isfinite(_number("affine_clamping", clamp)):
        raise ValueError(f"expected a finite affine_clamping, got {clamp}")
    if clamp == 0 and dialect == "freia":
        raise ValueError(
            "affine_clamping=0 divides by zero in dialect 'freia'; dialect 'anomalib' makes it an "
            "additive coupling"
        )
    try:
        negative = operator.index(householder) < 0
        if isinstance(householder, bool):
            raise TypeError
    except TypeError:
        raise TypeError(
            f"expected learned_householder_permutation to be an integer, got {householder!r}"
        ) from None
    if negative:
        raise ValueError(
            "expected a number of reflections of 0 or more as learned_householder_permutation, "
            f"got {householder!r}"
        )


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    return float(value)


def _initial_global_scale(activation: str, init: float, dialect: str) -> float:
    """The g with activation(g) = init, computed in the stock block's precision so that the first
    bits agree too.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"expected global_affine_type to be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    init = _number("global_affine_init", init)
    upper = 10.0 if activation == "SIGMOID" else math.inf
    if not 0.0 < init < upper:
        raise ValueError(
            f"expected global_affine_init in (0, {upper:g}), the range of {activation}; got {init}"
        )
    dtype = torch.get_default_dtype() if dialect == "anomalib" else torch.float64
    if activation == "SIGMOID":
        start = 10.0 / init - 1.0
        rounded, exact = 2.0 - _tensor(start, dtype).log(), 2.0 - math.log(start)
    elif activation == "SOFTPLUS":
        start = 5.0 * init
        rounded, exact = (
            2.0 * (_tensor(start, dtype).exp() - 1).log(),
            2.0 * (start + math.log(-math.expm1(-start))),
        )
    else:
        rounded, exact = _tensor(init, dtype).log(), math.log(init)
    g = rounded.item()
    # out of that precision's range, or rounded to 0 on the way
    return g if math.isfinite(g) else exact


def _tensor(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")
