"""The table of configurations, shapes, layouts and dtypes under test, with small builders.

Test ids read ``B2-C7-5x5-freia-gin-rev``, or with a dtype ``B2-C7-5x5-...-bf16``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastflow_kernels.engines import available

# Tests that run kernels use a GPU if there is one. The interpreter checks accesses to CPU memory.
ON_GPU = torch.cuda.is_available() and not available.is_interpreted()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DIALECTS = ("anomalib", "freia")

both_dialects = pytest.mark.parametrize("dialect", DIALECTS)
with_and_without_grad = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
both_directions = pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])


@dataclass(frozen=True)
class Shape:
    """A batch, a channel count and a spatial shape of rank 0 to 3."""

    batch: int
    channels: int
    spatial: tuple[int, ...] = ()

    @property
    def full(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.spatial)

    def __str__(self) -> str:
        pixels = "x".join(map(str, self.spatial))
        return f"B{self.batch}-C{self.channels}" + (f"-{pixels}" if pixels else "")


# Small enough for a brute-force Jacobian. They include C odd, 1 and 2, P = 1, and P not divisible
# by 4, and avoid powers of two.
SHAPES = (
    Shape(2, 7),
    Shape(3, 1),
    Shape(1, 2),
    Shape(5, 12),
    Shape(2, 5, (7,)),
    Shape(2, 2, (1,)),
    Shape(2, 7, (3, 5)),
    Shape(3, 1, (3, 3)),
    Shape(2, 2, (2, 3)),
    Shape(2, 9, (1, 1)),
    Shape(1, 6, (4, 4)),
    Shape(2, 3, (2, 3, 3)),
)

# For the kernels and the fast paths: more than one tile in some direction, ragged ends, and sizes
# that are and are not divisible by the vector widths.
LARGE_SHAPES = (
    Shape(5, 513),
    Shape(300, 33),
    Shape(2, 64, (1030,)),
    Shape(2, 33, (14, 14)),
    Shape(3, 130, (7, 9)),
    Shape(2, 64, (32, 32)),
    Shape(1, 5, (61, 67)),
    Shape(2, 10, (5, 6, 7)),
)

# Constructor options by name. "conditions" is not an option: it holds the conditions' channels.
OPTIONS: dict[str, dict[str, Any]] = {
    "hard": {},
    "sigmoid": {"global_affine_type": "SIGMOID", "global_affine_init": 0.7, "affine_clamping": 1.9},
    "exp": {"global_affine_type": "EXP", "global_affine_init": 1.3, "affine_clamping": 5.0},
    "clamp0.5": {"affine_clamping": 0.5, "global_affine_init": 0.92},
    "rev": {"reverse_permutation": True},
    "cond": {"conditions": (3,)},
    "cond2-rev": {"conditions": (1, 4), "reverse_permutation": True},
    "gin": {"gin_block": True},
    "gin-rev-cond": {
        "gin_block": True,
        "reverse_permutation": True,
        "conditions": (2,),
        "affine_clamping": 3.0,
    },
    "soft": {"permute_soft": True},
    "soft-rev-exp": {
        "permute_soft": True,
        "reverse_permutation": True,
        "global_affine_type": "EXP",
    },
    "gin-soft": {"gin_block": True, "permute_soft": True},
    "hh1": {"learned_householder_permutation": 1},
    "hh3-rev-cond": {
        "learned_householder_permutation": 3,
        "reverse_permutation": True,
        "conditions": (2,),
    },
    "hh2-soft-sigmoid": {
        "learned_householder_permutation": 2,
        "permute_soft": True,
        "global_affine_type": "SIGMOID",
    },
    "gin-hh2": {"gin_block": True, "learned_householder_permutation": 2},
}
# Around the bound of the eager engine's cheap forms. With "freia", 50 makes the argument of tanh
# tiny and 0.001 huge. A separate table, because numerical differences cannot check exp(50).
CLAMP_OPTIONS: dict[str, dict[str, Any]] = {
    "clamp2": {"affine_clamping": 2.0},
    "clamp2.1-rev": {"affine_clamping": 2.1, "reverse_permutation": True},
    "clamp8-exp": {"affine_clamping": 8.0, "global_affine_type": "EXP"},
    "clamp50": {"affine_clamping": 50.0},
    "clamp-3": {"affine_clamping": -3.0},
    "clamp0.001": {"affine_clamping": 1e-3},
    "gin-clamp8": {"gin_block": True, "affine_clamping": 8.0},
    "gin-clamp50": {"gin_block": True, "affine_clamping": 50.0},
}
# Every kind of permutation, with and without GIN, conditions and the pre-permutation.
KINDS = (
    "hard",
    "rev",
    "cond",
    "gin",
    "gin-rev-cond",
    "soft",
    "soft-rev-exp",
    "gin-soft",
    "hh3-rev-cond",
    "hh2-soft-sigmoid",
    "gin-hh2",
)
kinds = pytest.mark.parametrize("name", KINDS)
HARD_OPTIONS = tuple(name for name in OPTIONS if not any(word in name for word in ("soft", "hh")))


@dataclass(frozen=True)
class Case:
    """One block and the shape of its input."""

    shape: Shape
    name: str
    dialect: str = "anomalib"

    @property
    def conditions(self) -> tuple[int, ...]:
        return self._all_options.get("conditions", ())

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's options without the shapes, the subnet and the dialect."""
        return {key: value for key, value in self._all_options.items() if key != "conditions"}

    @property
    def _all_options(self) -> dict[str, Any]:
        return CLAMP_OPTIONS[self.name] if self.name in CLAMP_OPTIONS else OPTIONS[self.name]

    @property
    def dims_in(self) -> list[tuple[int, ...]]:
        return [self.shape.full[1:]]

    @property
    def dims_c(self) -> list[tuple[int, ...]]:
        return [(channels, *self.shape.spatial) for channels in self.conditions]

    @property
    def rank(self) -> int:
        return len(self.shape.spatial)

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        return f"{self.shape}-{self.dialect}-{self.name}"


def _table() -> tuple[Case, ...]:
    """Return every option on two shapes (rank 0 and 2), and every shape with a few options.

    Each pair comes in both dialects.
    """
    pairs = [(shape, name) for shape in (SHAPES[0], SHAPES[6]) for name in OPTIONS]
    pairs += [
        (shape, name)
        for shape in SHAPES
        for name in ("hard", "gin-rev-cond", "soft-rev-exp", "hh3-rev-cond")
    ]
    return tuple(
        Case(shape, name, dialect) for shape, name in dict.fromkeys(pairs) for dialect in DIALECTS
    )


CASES = _table()
HARD_CASES = tuple(case for case in CASES if case.name in HARD_OPTIONS)
CLAMP_CASES = tuple(
    Case(shape, name, dialect)
    for shape in (SHAPES[0], SHAPES[6])
    for name in CLAMP_OPTIONS
    for dialect in DIALECTS
)
LARGE_CASES = tuple(
    Case(shape, name, dialect)
    for shape in LARGE_SHAPES
    for name in ("hard", "gin", "rev")
    for dialect in DIALECTS
)


# --- layouts: the same values with different strides


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _strided(x: torch.Tensor) -> torch.Tensor:
    """Return x as every second element of a larger tensor, from an odd offset in each dimension."""
    big = x.new_full([2 * n + 1 for n in x.shape], float("nan"))
    view = big[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view.copy_(x)
    return view


def _transposed(x: torch.Tensor) -> torch.Tensor:
    """Return x dense, with the dimensions in memory in reverse order."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _expanded(x: torch.Tensor) -> torch.Tensor:
    """Return the first sample, broadcast over the batch."""
    return x[:1].expand(x.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "strided": _strided,
    "transposed": _transposed,
    "expanded": _expanded,
}


# --- builders


class Subnet(nn.Module):
    """A smooth two-layer network with kernel sizes 3 and 1.

    Its output is of order ``gain``, so that the clamp has an effect (0.1 * a of order 1).
    """

    def __init__(self, channels_in: int, channels_out: int, rank: int, gain: float = 6.0) -> None:
        super().__init__()
        hidden = 6
        kernel = 3 if rank else 1
        self.rank = rank
        self.w1 = nn.Parameter(
            torch.randn(hidden, channels_in, *[kernel] * rank)
            * (channels_in * kernel**rank) ** -0.5
        )
        self.b1 = nn.Parameter(0.1 * torch.randn(hidden))
        self.w2 = nn.Parameter(torch.randn(channels_out, hidden, *[1] * rank) * gain * hidden**-0.5)
        self.b2 = nn.Parameter(0.1 * gain * torch.randn(channels_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # One channel has no active half, and a convolution must have outputs.
        if self.w2.shape[0] == 0:
            return x[:, :0].clone()  # a copy, because the peers write to it
        if self.rank == 0:
            return F.linear(torch.tanh(F.linear(x, self.w1, self.b1)), self.w2, self.b2)
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.rank - 1]
        return conv(torch.tanh(conv(x, self.w1, self.b1, padding=1)), self.w2, self.b2)


def make_subnet(rank: int, gain: float = 6.0) -> Callable[[int, int], nn.Module]:
    """Return a subnet constructor for data of this rank."""
    return lambda channels_in, channels_out: Subnet(channels_in, channels_out, rank, gain)


@torch.no_grad()
def randomize(block: nn.Module) -> nn.Module:
    """Convert a fresh block to float64 and randomize its parameters.

    It gets a random global affine, unit reflections, and matrices orthogonal to the last bit.
    """
    block.double()
    block.global_scale += 0.5 * torch.randn_like(block.global_scale)
    block.global_offset += torch.randn_like(block.global_offset)
    # A reflection does not depend on the vector's length, but its gradient does (1 / length).
    if getattr(block, "householder", 0):
        block.vk_householder /= block.vk_householder.norm(dim=1, keepdim=True)
    for name in ("w_0", "w_perm"):
        w = getattr(block, name, None)
        if w is not None and w.is_floating_point():  # drawn in float32, so orthogonal only to 1e-7
            if not _one_hot(w):
                u, _, vh = torch.linalg.svd(w.flatten(1))
                w.copy_((u @ vh).view_as(w))
            if name == "w_perm":
                block.w_perm_inv.copy_(w.transpose(0, 1))
    return block


def _one_hot(w: torch.Tensor) -> bool:
    return bool(((w == 0) | (w == 1)).all())


def build_block(cls: type, case: Case, seed: int = 0, **extra: Any) -> Any:
    """Build a block of class ``cls`` with the parameters that its constructor draws.

    Pass ``dialect`` in ``extra`` for our block only, because the real peers do not take it.
    """
    seed_cpu(seed)
    return cls(
        case.dims_in,
        case.dims_c,
        subnet_constructor=make_subnet(case.rank),
        **case.options,
        **extra,
    )


def make_block(
    cls: type, case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, **extra: Any
) -> Any:
    """Build a block of class ``cls`` with random parameters that ``dtype`` represents."""
    return randomize(build_block(cls, case, seed, **extra)).to(dtype)


def seed_cpu(seed: int) -> None:
    """Seed torch's CPU generator only.

    ``torch.manual_seed`` takes 2 ms without other devices, because it records its caller for them.
    """
    torch.default_generator.manual_seed(seed)


def make_input(
    case: Case, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return random ``(x, c)`` with values that ``dtype`` represents."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    x = torch.randn(case.shape.full, **drawn).to(dtype)
    c = [torch.randn(case.shape.batch, *dims, **drawn).to(dtype) for dims in case.dims_c]
    return x, c


def ids(values: Iterable[object]) -> list[str]:
    """Return readable test ids for anything with a ``str``."""
    return [str(value) for value in values]
