"""The table of FrEIA's coupling blocks under test, with small builders.

Test ids read ``GLOW-B2-C7-3x5-split0.3-cond``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastflow_kernels
import reference
from tests.support import blocks
from tests.support.blocks import Results
from tests.support.cases import DEVICE, LAYOUTS, SHAPES, Shape, Subnet, seed_cpu
from tests.support.compare import assert_close

TWO_SIDED = ("NICECouplingBlock", "RNVPCouplingBlock", "GLOWCouplingBlock", "GINCouplingBlock")
NAMES = (*TWO_SIDED, "AffineCouplingOneSided", "ConditionalAffineTransform")
PRESERVE_VOLUME = ("NICECouplingBlock", "GINCouplingBlock")


def softsign(a: Tensor) -> Tensor:
    """Return ``a / (1 + |a|)``, a clamp activation that FrEIA has no name for."""
    return a / (1 + a.abs())


# Options by name. "conditions" holds the conditions' channels, and "split_len" the share or the
# number of channels of the first half; "all" stands for C.
OPTIONS: dict[str, dict[str, Any]] = {
    "atan": {},
    "tanh": {"clamp_activation": "TANH", "clamp": 0.9},
    "sigmoid": {"clamp_activation": "SIGMOID", "clamp": 1.272},
    "softsign": {"clamp_activation": softsign, "clamp": 1.5},
    "clamp5": {"clamp": 5.0},
    "clamp-1": {"clamp": -1.0, "clamp_activation": "TANH"},
    "clamp0": {"clamp": 0.0},
    "split0.3": {"split_len": 0.3},
    "split1": {"split_len": 1},
    "split0": {"split_len": 0},
    "split1.0": {"split_len": 1.0},
    "splitC": {"split_len": "all"},
    "cond": {"conditions": (3,)},
    "cond2-split0-tanh": {"conditions": (1, 4), "split_len": 0, "clamp_activation": "TANH"},
}
CLAMPS = ("clamp", "clamp_activation")  # what NICE does not take


@dataclass(frozen=True)
class Case:
    """One block and the shape of its input."""

    name: str
    shape: Shape
    option: str = "atan"
    conditions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        conditions = OPTIONS[self.option].get("conditions", ())
        if self.name == "ConditionalAffineTransform" and not conditions:
            conditions = (2,)  # it needs one
        object.__setattr__(self, "conditions", conditions)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's options without the shapes and the subnet."""
        options = {key: v for key, v in OPTIONS[self.option].items() if key != "conditions"}
        if options.get("split_len") == "all":
            options["split_len"] = self.shape.channels
        if self.name == "NICECouplingBlock":
            options = {key: v for key, v in options.items() if key not in CLAMPS}
        return options

    @property
    def dims_in(self) -> list[tuple[int, ...]]:
        return [self.shape.full[1:]]

    @property
    def dims_c(self) -> list[tuple[int, ...]]:
        return [(channels, *self.shape.spatial) for channels in self.conditions]

    @property
    def rank(self) -> int:
        return len(self.shape.spatial)

    @property
    def preserves_volume(self) -> bool:
        return self.name in PRESERVE_VOLUME

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        short = self.name.removesuffix("CouplingBlock")
        return f"{short}-{self.shape}-{self.option}"


def _table() -> tuple[Case, ...]:
    """Return every option on two shapes (rank 0 and 2), and every shape with two options."""
    pairs = [(shape, option) for shape in (SHAPES[0], SHAPES[6]) for option in OPTIONS]
    pairs += [(shape, option) for shape in SHAPES for option in ("atan", "cond2-split0-tanh")]
    pairs += [(SHAPES[1], "splitC"), (SHAPES[7], "splitC")]
    return tuple(
        Case(name, shape, option)
        for shape, option in dict.fromkeys(pairs)
        for name in NAMES
        if _is_of_interest(name, option)
    )


def _is_of_interest(name: str, option: str) -> bool:
    if name == "NICECouplingBlock":  # a clamp is no option, and the case would be another one
        return not OPTIONS[option].keys() & set(CLAMPS) or option == "cond2-split0-tanh"
    return True


CASES = _table()
# The second side multiplies the first one's rounding errors by up to e^5. One element then decides
# on the largest error of all draws, and the criterion would compare two random numbers.
AMPLIFYING_CASES = tuple(
    case for case in CASES if case.name in TWO_SIDED and case.option == "clamp5"
)
PARITY_CASES = tuple(case for case in CASES if case not in AMPLIFYING_CASES)
# A case of each class for tests that are about something else than shapes and options.
KINDS = tuple(Case(name, Shape(4, 7, (3, 5)), "cond") for name in NAMES)


class AnySubnet(Subnet):
    """The subnet of the other tests, and a constant where there is nothing to read.

    Half of these blocks may be empty. FrEIA's coefficients are not multiplied by 0.1, so that they
    are of order 1.5 here.
    """

    def __init__(self, channels_in: int, channels_out: int, rank: int) -> None:
        super().__init__(max(channels_in, 1), channels_out, rank, gain=1.5)
        self.is_constant = channels_in == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.is_constant:  # the sum of no channel is zero
            x = x.sum(dim=1, keepdim=True)
        return super().forward(x)


def make_subnet(rank: int) -> Callable[[int, int], nn.Module]:
    """Return a subnet constructor for data of this rank, with any number of channels."""
    return lambda channels_in, channels_out: AnySubnet(channels_in, channels_out, rank)


def build(
    module: Any, case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, **extra: Any
) -> Any:
    """Build a block of ``FrEIA.modules``, ``reference`` or ``fastflow_kernels``.

    Its parameters have values that ``dtype`` represents.
    """
    seed_cpu(seed)
    block = getattr(module, case.name)(
        case.dims_in,
        case.dims_c,
        subnet_constructor=make_subnet(case.rank),
        **case.options,
        **extra,
    )
    return block.to(dtype)


def make_input(
    case: Case, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, list[Tensor]]:
    """Return random ``(x, c)`` with values that ``dtype`` represents."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [case.shape.full, *((case.shape.batch, *dims) for dims in case.dims_c)]
    x, *c = (
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
        for shape in shapes
    )
    return x, c


class TensorLogDet(nn.Module):
    """A block whose log-determinant is a tensor (B,), also where the block returns 0.0."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: list[Tensor], c: list[Tensor], rev: bool = False) -> Any:
        (y,), log_det = self.block(x, c, rev=rev)
        if not isinstance(log_det, Tensor):
            # A leaf, so that evaluate() may give it a gradient.
            log_det = y.new_full(y.shape[:1], log_det, requires_grad=y.requires_grad)
        return (y,), log_det


def evaluate(
    block: nn.Module, x: Tensor, c: list[Tensor], rev: bool = False, grad: bool = True
) -> Results:
    """Return what :func:`tests.support.blocks.evaluate` does, for these blocks."""
    return blocks.evaluate(TensorLogDet(block), x, c, rev, grad)


def compare(
    case: Case,
    dtype: torch.dtype,
    rev: bool,
    grad: bool,
    backend: str = "eager",
    layout: str = "contiguous",
) -> None:
    """Check the criterion over several draws of weights and inputs.

    A small case takes four draws, as in :func:`tests.support.parity.compare`.
    """
    draws = 4 if math.prod(case.shape.full) < 1000 else 1
    expected = [_expect(case, dtype, rev, layout, seed) for seed in range(draws)]
    actual = [_results(e, case, rev, grad, backend) for e in expected]
    # The log-factors add up at random.
    terms = abs(case.options.get("clamp", 2.0)) * math.prod(case.shape.full[1:]) ** 0.5
    for name in actual[0]:
        assert_close(
            _stack([a[name] for a in actual]),
            _stack([e.truth[name] for e in expected]),
            _stack([e.baseline[name] for e in expected]),
            f"{case} {name}",
            magnitude=terms if name == "log-det" else None,
        )


def compare_typical(case: Case, dtype: torch.dtype, rev: bool, grad: bool, backend: str) -> None:
    """Check the criterion's factor 2 for the median of 25 draws, for :data:`AMPLIFYING_CASES`.

    The largest errors of a draw are compared as a ratio, because both are amplified alike.
    """
    ratios: dict[str, list[float]] = {}
    for seed in range(25):
        expected = _expect(case, dtype, rev, "contiguous", seed)
        for name, value in _results(expected, case, rev, grad, backend).items():
            truth, baseline = expected.truth[name], expected.baseline[name]
            error, base = ((t.double() - truth).abs().max().item() for t in (value, baseline))
            ratio = error / base if base else (math.inf if error else 0.0)
            ratios.setdefault(name, []).append(ratio)
    for name, values in ratios.items():
        median = statistics.median(values)
        assert median <= 2, f"{case} {name}: {median:.3g} times the error of the baseline"


def _stack(values: list[Tensor | None]) -> Tensor | None:
    return None if values[0] is None else torch.stack(values)


@dataclass
class _Expected:
    """An input in the dtype under test, weights, and the reference's results for them."""

    state: dict[str, Tensor]
    x: Tensor
    c: list[Tensor]
    baseline: Results
    truth: Results


@functools.lru_cache(maxsize=16)  # tests that differ only in the path run one after another
def _expect(case: Case, dtype: torch.dtype, rev: bool, layout: str, seed: int) -> _Expected:
    oracle = build(reference, case, dtype, seed).to(DEVICE)
    state = {key: value.clone() for key, value in oracle.state_dict().items()}
    x, c = make_input(case, dtype, seed + 1)
    x, c = LAYOUTS[layout](x.to(DEVICE)), [LAYOUTS[layout](t.to(DEVICE)) for t in c]
    lower = torch.float32 if dtype is torch.float64 else dtype
    baseline = evaluate(copy.deepcopy(oracle).to(lower), x.to(lower), [t.to(lower) for t in c], rev)
    truth = evaluate(oracle.double(), x.double(), [t.double() for t in c], rev)
    return _Expected(state, x, c, baseline, truth)


def _results(expected: _Expected, case: Case, rev: bool, grad: bool, backend: str) -> Results:
    dtype = expected.x.dtype
    block = build(fastflow_kernels, case, dtype, backend=backend).to(DEVICE)
    block.load_state_dict(expected.state)
    actual = evaluate(block, expected.x, expected.c, rev, grad)
    assert not grad or actual.keys() == expected.truth.keys()
    assert actual["output"].dtype == dtype
    if not case.preserves_volume:
        # Another clamp function runs the stock maths, whose log-determinant has the dtype of s.
        is_stock = callable(case.options.get("clamp_activation"))
        is_kept = is_stock or dtype is torch.float64
        assert actual["log-det"].dtype == (dtype if is_kept else torch.float32)
    # It is float32 for half precision, but the criterion is that of the baseline's dtype.
    actual["log-det"] = actual["log-det"].to(dtype)
    return actual
