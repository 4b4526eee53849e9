"""Affine coupling, ActNorm and permutation in one invertible block, written to be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from reference.base import InvertibleModule, Shape

DIALECTS = ("anomalib", "freia")


def sigmoid_scale(g: torch.Tensor) -> torch.Tensor:
    """Return ``10 * sigmoid(g - 2)``, a scale in (0, 10)."""
    return 10 * torch.sigmoid(g - 2.0)


def softplus_scale(g: torch.Tensor) -> torch.Tensor:
    """Return ``0.1 * softplus(g, beta=0.5) = 0.2 * log(1 + exp(g / 2))``, a scale above 0."""
    return 0.1 * F.softplus(g, beta=0.5)


def exp_scale(g: torch.Tensor) -> torch.Tensor:
    """Return ``exp(g)``, a scale above 0, as in Glow."""
    return torch.exp(g)


SCALE_ACTIVATIONS = {"SIGMOID": sigmoid_scale, "SOFTPLUS": softplus_scale, "EXP": exp_scale}


def initial_global_scale(scale: float, activation: str, dialect: str) -> torch.Tensor:
    """Return the g with ``activation(g) == scale``, before the activation.

    Both peers invert the activation with the same formula, anomalib in the default dtype and FrEIA
    in float64. This function does the same, so that a fresh block has the bits of the peer's. It
    differs only where the peer's formula overflows or cancels to an infinity.

    Args:
        scale: The scale that a fresh block has.
        activation: "SIGMOID", "SOFTPLUS" or "EXP".
        dialect: "anomalib" or "freia", the peer whose bits are wanted.

    Returns:
        A tensor without dimensions, in the default dtype.
    """
    if activation == "SIGMOID":
        exact = 2.0 - math.log(10.0 / scale - 1.0)
    elif activation == "SOFTPLUS":
        exact = 2.0 * (5.0 * scale + math.log(-math.expm1(-5.0 * scale)))
    else:
        exact = math.log(scale)
    if dialect == "anomalib":
        if activation == "SIGMOID":
            rounded = 2.0 - torch.log(torch.tensor(10.0 / scale - 1.0))
        elif activation == "SOFTPLUS":
            rounded = 2.0 * torch.log(torch.exp(torch.tensor(5.0 * scale)) - 1.0)
        else:
            rounded = torch.log(torch.tensor(scale))
        if torch.isfinite(rounded):
            return rounded
    return torch.tensor(exact)


def random_rotation(n: int) -> torch.Tensor:
    """Draw a matrix uniformly (Haar) from SO(n), of shape (n, n), in float64.

    Q of the QR decomposition of a Gaussian matrix is uniform on O(n) if its columns get the signs
    of R's diagonal (Mezzadri 2007). Negating one column if the determinant is -1 makes it uniform
    on SO(n).
    """
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    q = q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q


class AllInOneBlock(InvertibleModule):
    r"""An invertible block: affine coupling, global affine (ActNorm) and channel permutation.

    The C channels are split into ``x1`` (the first C - C//2, passive) and ``x2`` (the last C//2,
    active). P is the number of pixels. ``a = subnet(cat(x1, *c))`` is split into the halves
    ``(a_s, a_t)``::

        s      = clamp * tanh(0.1 * a_s)            dialect "anomalib" (every anomalib, FrEIA 0.2)
        s      = clamp * tanh(0.1 * a_s / clamp)    dialect "freia"    (FrEIA's main branch)
        s      = s - mean(s)                        per sample, if gin_block
        u      = cat(x1, x2 * exp(s) + 0.1 * a_t)
        y      = permute(u * scale + offset)        scale = activation(global_scale); 1 if gin_block
        logdet = sum(s) + P * sum(log(scale))       per sample, in nats; 0 if gin_block

    The inverse computes these lines backwards and returns the negative log-determinant. As a
    matrix W, ``permute(v) = W v``. W is orthogonal with \|det W\| = 1, so it adds nothing to the
    log-determinant.

    Sources:

    - The block is FrEIA's (Ardizzone, Lueth, Kruse, Rother, Koethe 2019, and the FrEIA
      documentation).
    - Affine coupling with a clamped exponent is RealNVP's (Dinh, Sohl-Dickstein, Bengio 2017).
    - The global affine is Glow's ActNorm (Kingma, Dhariwal 2018).
    - GIN is Sorrenson, Rother, Koethe 2020.
    - The learned reflections are Householder flows (Tomczak, Welling 2016).
    - The inverse permutation before the block is Putzky, Welling 2019.

    Args:
        dims_in: One shape without the batch dimension, ``[(C, *S)]`` with S of rank 0 to 3 and C at
            least 1.
        dims_c: Shapes of the conditions, ``[(C_i, *S), ...]``. Their channels are appended to the
            subnet's input.
        subnet_constructor: ``f(channels_in, channels_out)`` returns the subnet, a module that keeps
            S.
        affine_clamping: Bound of \|s\|. 0 makes the coupling additive. Dialect "freia" divides by
            it and does not allow 0.
        gin_block: Whether the coupling preserves volume (GIN).
        global_affine_init: Initial ``scale``, above 0. For "SIGMOID" it is below 10.
        global_affine_type: The activation: "SIGMOID" (10 * sigmoid(g - 2)), "SOFTPLUS"
            (0.1 * softplus(g, beta=0.5)) or "EXP" (exp(g)).
        permute_soft: Whether W is a fixed random rotation from SO(C) instead of a permutation.
        learned_householder_permutation: Number K of learned reflections. W = w_0 H_1 ... H_K with
            H_k = I - 2 v_k v_k^T / v_k^T v_k.
        reverse_permutation: Whether to apply W^-1 before the coupling.
        dialect: "anomalib" or "freia". It decides the formula of s and the form of a hard
            permutation in the state dict.

    Attributes:
        global_scale: Parameter (1, C, 1, ...), before its activation.
        global_offset: Parameter (1, C, 1, ...).
        w_perm: W, a parameter without gradient. None with Householder reflections. A hard
            permutation is a float one-hot matrix (C, C, 1, ...) in dialect "anomalib". In dialect
            "freia" it is an int64 index (C,) with ``y[:, j] = v[:, w_perm[j]]``.
        w_perm_inv: The inverse of W, in the form of ``w_perm``.
        vk_householder: The reflections v_k, a parameter (K, C). Only with Householder reflections.
        w_0: The float matrix (C, C) that the reflections multiply. Only with them.
        subnet: The subnet that ``subnet_constructor`` returned.
        splits: The sizes of the halves, ``[C - C//2, C//2]``.
        in_channels, input_rank, sum_dims, conditional, condition_channels: Other sizes.
        clamp, GIN, householder, reverse_pre_permute, permute_soft, dialect: The options.
        global_scale_activation: The function that computes ``scale`` from ``global_scale``.

    Raises:
        ValueError: If an option is outside its range, or the shapes do not fit together.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from reference import AllInOneBlock
        >>> def subnet(channels_in, channels_out):
        ...     return nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> block = AllInOneBlock([(4, 8, 8)], subnet_constructor=subnet)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> (y,), log_det = block([x])
        >>> (reconstructed,), inverse_log_det = block([y], rev=True)
        >>> torch.allclose(reconstructed, x, atol=1e-5)
        True
        >>> torch.allclose(inverse_log_det, -log_det, atol=1e-3)
        True
    """

    def __init__(
        self,
        dims_in: Sequence[Sequence[int]],
        dims_c: Sequence[Sequence[int]] | None = (),
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
    ) -> None:
        super().__init__(dims_in, dims_c)
        if not callable(subnet_constructor):
            raise ValueError(
                "subnet_constructor must be a callable f(channels_in, channels_out), got "
                f"{subnet_constructor!r}"
            )
        _check_options(
            self.dims_in,
            self.dims_c,
            affine_clamping,
            global_affine_init,
            global_affine_type,
            learned_householder_permutation,
            dialect,
        )
        channels, *spatial = self.dims_in[0]
        ones = [1] * len(spatial)

        self.dialect = dialect
        self.in_channels = channels
        self.splits = [channels - channels // 2, channels // 2]
        self.input_rank = len(spatial)
        self.sum_dims = tuple(range(1, 2 + self.input_rank))  # all but the batch
        self.conditional = len(self.dims_c) > 0
        self.condition_channels = sum(dims[0] for dims in self.dims_c)
        self.clamp = affine_clamping
        self.GIN = gin_block
        self.permute_soft = permute_soft
        self.householder = learned_householder_permutation
        self.reverse_pre_permute = reverse_permutation
        self.global_scale_activation = SCALE_ACTIVATIONS[global_affine_type]
        self.last_jac = None

        # From here on the order of the parameters matters, and so does that of the random draws
        # (permutation, reflections, subnet).
        initial = initial_global_scale(global_affine_init, global_affine_type, dialect)
        self.global_scale = nn.Parameter(torch.ones(1, channels, *ones) * initial)
        self.global_offset = nn.Parameter(torch.zeros(1, channels, *ones))

        if permute_soft:
            index, matrix = None, random_rotation(channels).to(torch.get_default_dtype())
        else:
            index = torch.randperm(channels)
            matrix = F.one_hot(index, channels).to(torch.get_default_dtype())

        if self.householder:
            self.vk_householder = nn.Parameter(0.2 * torch.randn(self.householder, channels))
            self.w_perm = None
            self.w_perm_inv = None
            self.w_0 = _constant(matrix)
        elif dialect == "freia" and index is not None:
            self.w_perm = _constant(index)
            self.w_perm_inv = _constant(torch.argsort(index))
        else:
            self.w_perm = _constant(matrix.reshape(channels, channels, *ones))
            self.w_perm_inv = _constant(matrix.T.reshape(channels, channels, *ones))

        self.subnet = subnet_constructor(
            self.splits[0] + self.condition_channels, 2 * self.splits[1]
        )

    def forward(
        self,
        x: Sequence[torch.Tensor],
        c: Sequence[torch.Tensor] | None = (),
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        """Map ``x`` forward, or apply the inverse if ``rev``.

        Args:
            x: One tensor (B, C, *S), where B may be 0. S must be the declared one in dialect
                "freia" and may differ in "anomalib".
            c: The conditions, each (B, C_i, *S).
            rev: Whether to apply the inverse.
            jac: Ignored. The log-determinant is always returned, as by the peers, because their
                users add it to earlier ones.

        Returns:
            ``((y,), log_det)``. y has the shape of x. log_det is (B,), in nats per sample, of the
            direction that was evaluated.

        Raises:
            ValueError: If the number or the shape of the inputs is not the declared one.
        """
        c = () if c is None else c
        self._check_input(x, c)
        (v,) = x

        if rev:
            v, log_scale = self._permute(v, rev=True)
        elif self.reverse_pre_permute:
            v = self._pre_permute(v, rev=False)

        x1, x2 = torch.split(v, self.splits, dim=1)
        a = self.subnet(torch.cat([x1, *c], dim=1) if self.conditional else x1)
        x2, log_det = self._affine(x2, a, rev=rev)
        v = torch.cat([x1, x2], dim=1)

        if not rev:
            v, log_scale = self._permute(v, rev=False)
        elif self.reverse_pre_permute:
            v = self._pre_permute(v, rev=True)

        pixels = math.prod(v.shape[2:])  # v[0].numel() would fail for an empty batch
        return (v,), log_det + (-pixels if rev else pixels) * log_scale

    def output_dims(self, input_dims: list[Shape]) -> list[Shape]:
        """Return the shapes of the outputs, which are those of the inputs."""
        return input_dims

    def _affine(
        self, x: torch.Tensor, a: torch.Tensor, rev: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the coupling ``x * exp(s) + t``, or its inverse ``(x - t) * exp(-s)``.

        Args:
            x: The active half, (B, C//2, *S).
            a: The subnet's output, (B, 2 * (C//2), *S). It is not written to.
            rev: Whether to apply the inverse.

        Returns:
            The mapped half, of the shape of x, and its log-determinant, (B,), in nats per sample.
        """
        # Under autocast the subnet returns half precision. The coupling and its log-determinant
        # keep the dtype of x.
        a = a.to(torch.promote_types(a.dtype, x.dtype))
        active = x.shape[1]
        # The factor is small, so that a fresh block is close to the identity.
        a = a * 0.1
        s, t = a[:, :active], a[:, active:]
        s = self.clamp * torch.tanh(s / self.clamp if self.dialect == "freia" else s)
        if self.GIN:
            s = s - s.mean(dim=self.sum_dims, keepdim=True)
        log_det = s.sum(dim=self.sum_dims)
        if rev:
            return (x - t) * torch.exp(-s), -log_det
        return x * torch.exp(s) + t, log_det

    def _permute(
        self, x: torch.Tensor, rev: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Apply global affine and permutation, ``W (x * scale + offset)``, or their inverse.

        The inverse is ``(W^-1 x - offset) / scale``.

        Args:
            x: The tensor to map, (B, C, *S).
            rev: Whether to apply the inverse.

        Returns:
            The mapped tensor, of the shape of x, and ``sum(log(scale))``. This is the
            log-determinant per pixel of the forward direction, for either ``rev``.
        """
        w, w_inv = self._permutation()
        if self.GIN:
            scale, log_scale = 1.0, 0.0
        else:
            scale = self.global_scale_activation(self.global_scale)
            log_scale = torch.log(scale).sum()
        if rev:
            return (self.permute_function(x, w_inv) - self.global_offset) / scale, log_scale
        return self.permute_function(x * scale + self.global_offset, w), log_scale

    def _pre_permute(self, x: torch.Tensor, rev: bool = False) -> torch.Tensor:
        """Return ``W^-1 x``, or ``W x`` if ``rev``. Only for ``reverse_permutation``.

        It runs before the coupling, and with ``rev`` after the inverse coupling.
        """
        w, w_inv = self._permutation()
        return self.permute_function(x, w if rev else w_inv)

    def _construct_householder_permutation(self) -> torch.Tensor:
        """Return ``w_0 H_1 ... H_K`` as a matrix (C, C, 1, ...), differentiable in v_k."""
        w = self.w_0
        eye = torch.eye(self.in_channels, dtype=w.dtype, device=w.device)
        for v in self.vk_householder:
            w = w @ (eye - 2 * torch.outer(v, v) / torch.dot(v, v))
        return w.reshape(self.in_channels, self.in_channels, *[1] * self.input_rank)

    def permute_function(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Apply an index (C,) or a matrix (C, C, 1, ...) to the channels of x, (B, C, *S)."""
        if w.dtype == torch.int64:
            return x[:, w]
        w = w.flatten(1)
        # A one-hot matrix indexes: sums over 0 * x would spread inf and NaN to every channel. Check
        # the values, not the options, because any orthogonal matrix may have been loaded.
        if not w.requires_grad and bool(
            ((w != 0).sum(dim=1) == 1).all() and (w.amax(dim=1) == 1).all()
        ):
            return x[:, w.argmax(dim=1)]
        return torch.einsum("oc,bc...->bo...", w, x)

    def _permutation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W and its inverse.

        The Householder product is computed anew each time. An attribute would keep its graph alive.
        """
        if self.w_perm is None or self.w_perm_inv is None:
            w = self._construct_householder_permutation()
            return w, w.transpose(0, 1)
        return self.w_perm, self.w_perm_inv

    def _check_input(self, x: Sequence[torch.Tensor], c: Sequence[torch.Tensor]) -> None:
        """Raise a ValueError if the number or the shape of the inputs is wrong."""
        for name, tensors, count in (("x", x, 1), ("c", c, len(self.dims_c))):
            if isinstance(tensors, torch.Tensor) or len(tensors) != count:
                got = (
                    f"a tensor of shape {tuple(tensors.shape)}"
                    if isinstance(tensors, torch.Tensor)
                    else f"{len(tensors)}"
                )
                raise ValueError(f"{name} must be a list of {count} tensors, got {got}")
        expected, got = self.dims_in[0], tuple(x[0].shape[1:])
        if self.dialect == "freia" and got != expected:
            raise ValueError(
                f"x must have shape (B, {', '.join(map(str, expected))}), got {tuple(x[0].shape)}"
            )
        if len(got) != len(expected) or got[0] != expected[0]:
            raise ValueError(
                f"x must have {expected[0]} channels and {self.input_rank} spatial dimensions, got "
                f"{tuple(x[0].shape)}"
            )


def _constant(value: torch.Tensor) -> nn.Parameter:
    """Return a parameter without gradient.

    The peers store their permutations like this, and state dicts list them in this order.
    """
    return nn.Parameter(value.contiguous(), requires_grad=False)


def _check_options(
    dims_in: list[Shape],
    dims_c: list[Shape],
    clamp: float,
    init: float,
    activation: str,
    householder: int,
    dialect: str,
) -> None:
    """Raise a ValueError for the first option that is not valid."""
    if dialect not in DIALECTS:
        raise ValueError(f'dialect must be "anomalib" or "freia", got {dialect!r}')
    if len(dims_in) != 1:
        raise ValueError(f"dims_in must be a list of one shape, got {dims_in}")
    if not 1 <= len(dims_in[0]) <= 4:
        raise ValueError(
            "dims_in must be [(C,)] to [(C, D, H, W)], 1 to 4 dimensions without the batch, got "
            f"{dims_in}"
        )
    if dims_in[0][0] < 1:
        raise ValueError(f"dims_in must have at least one channel, got {dims_in}")
    for dims in dims_c:
        if dims[1:] != dims_in[0][1:]:
            raise ValueError(
                f"every condition must have the spatial shape of the input, {dims_in[0][1:]}, got "
                f"{dims_c}"
            )
    if not math.isfinite(clamp):
        raise ValueError(f"affine_clamping must be finite, got {clamp}")
    if dialect == "freia" and clamp == 0:
        raise ValueError('affine_clamping must not be 0 in dialect "freia", which divides by it')
    if activation not in SCALE_ACTIVATIONS:
        raise ValueError(
            f'global_affine_type must be "SIGMOID", "SOFTPLUS" or "EXP", got {activation!r}'
        )
    upper = 10.0 if activation == "SIGMOID" else math.inf
    if not 0.0 < init < upper:
        raise ValueError(
            f"global_affine_init must be above 0 and below {upper} for {activation}, got {init}"
        )
    if householder < 0:
        raise ValueError(
            "learned_householder_permutation must be 0 or a positive number of reflections, got "
            f"{householder}"
        )
