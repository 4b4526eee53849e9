"""Accelerate anomalib's released models, with random weights, and compare them with stock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.models.image.cflow.utils import get_logp, positional_encoding_2d
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel
from anomalib.models.image.patchflow.loss import PatchflowLoss
from anomalib.models.image.patchflow.torch_model import PatchflowModel
from anomalib.models.image.uflow.loss import UFlowLoss
from anomalib.models.image.uflow.torch_model import UflowModel
from FrEIA.framework import GraphINN, SequenceINN
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow_kernels import accelerate, report, restore
from tests.support.compare import assert_close
from tests.support.graph import reversible_blocks

pytestmark = pytest.mark.usefixtures("fused")

Step = Callable[[nn.Module, Tensor], dict[str, Tensor]]


class Model(NamedTuple):
    """One of anomalib's models.

    Attributes:
        build: Builds the model.
        step: Computes its training step: latent variables, log-determinants, and the loss.
        blocks: Number of its AllInOneBlocks.
        size: Height and width of the images in pixels.
        batch: Number of images.
    """

    build: Callable[[], nn.Module]
    step: Step
    blocks: int
    size: int = 64
    batch: int = 2


def _with_loss(loss: nn.Module) -> Step:
    def step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        hidden, jacobians = model(images)
        results: dict[str, Tensor] = {}
        for name, value in (("z", hidden), ("logdet", jacobians)):
            values = value if isinstance(value, list | tuple) else [value]
            results |= {f"{name}{k}": t for k, t in enumerate(values)}
        return results | {"loss": loss(hidden, jacobians)}

    return step


def _cflow_step(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Compute the loss of Cflow.training_step on the first fibers of each layer.

    The released training step also steps its optimizer in between.
    """
    features = model.encoder(images)
    results: dict[str, Tensor] = {}
    losses = []
    for name, decoder in zip(model.pool_layers, model.decoders, strict=True):
        batch, channels, height, width = features[name].shape
        fibers = features[name].detach().movedim(1, -1).reshape(-1, channels)[:64]
        position = positional_encoding_2d(model.condition_vector, height, width).to(images)
        conditions = (
            position.expand(batch, -1, -1, -1)
            .movedim(1, -1)
            .reshape(-1, model.condition_vector)[:64]
        )
        z, logdet = decoder(fibers, [conditions])
        losses.append(-F.logsigmoid(get_logp(channels, z, logdet) / channels).mean())
        results |= {f"{name} z": z, f"{name} logdet": logdet}
    return results | {"loss": torch.stack(losses).sum()}


MODELS = {
    "fastflow-resnet18": Model(
        lambda: FastflowModel((64, 64), "resnet18", pre_trained=False),
        _with_loss(FastflowLoss()),
        24,
    ),
    "fastflow-wide_resnet50_2": Model(
        lambda: FastflowModel((64, 64), "wide_resnet50_2", pre_trained=False),
        _with_loss(FastflowLoss()),
        24,
    ),
    "fastflow-deit": Model(
        lambda: FastflowModel(
            (384, 384),
            "deit_base_distilled_patch16_384",
            pre_trained=False,
            flow_steps=4,
            hidden_ratio=0.16,
        ),
        _with_loss(FastflowLoss()),
        4,
        size=384,
        batch=1,
    ),
    "cflow": Model(
        lambda: CflowModel("resnet18", ("layer2", "layer3"), pre_trained=False), _cflow_step, 16
    ),
    "cflow-soft": Model(
        lambda: CflowModel(
            "resnet18", ("layer2",), pre_trained=False, coupling_blocks=4, permute_soft=True
        ),
        _cflow_step,
        4,
    ),
    "uflow": Model(lambda: UflowModel((64, 64), backbone="resnet18"), _with_loss(UFlowLoss()), 12),
    "uflow-soft": Model(
        lambda: UflowModel((64, 64), backbone="resnet18", permute_soft=True),
        _with_loss(UFlowLoss()),
        12,
    ),
    "patchflow": Model(
        lambda: PatchflowModel((64, 64), "resnet18", pre_trained=False, flow_steps=3),
        _with_loss(PatchflowLoss()),
        3,
    ),
}


def _build(model: Model) -> nn.Module:
    """Build a model with random global affines, because fresh ones are equal in all channels."""
    torch.manual_seed(0)
    numpy.random.seed(0)  # SciPy draws the rotations of stock blocks
    module = model.build()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("global_scale"):
                p.add_(0.2 * torch.randn_like(p))
            elif name.endswith("global_offset"):
                p.add_(0.1 * torch.randn_like(p))
    return module


def _train_step(
    model: nn.Module, step: Step, images: Tensor, reversible_count: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Run one training step.

    Args:
        model: The model.
        step: Its training step.
        images: The batch.
        reversible_count: Number of blocks that must have a reversible chain's node in the graph.

    Returns:
        The results, and the gradients together with the buffers (batch-norm statistics).
    """
    model.train()
    results = step(model, images)
    assert reversible_blocks(results["loss"]) == reversible_count
    results["loss"].backward()
    gradients = {f"{key}.grad": p.grad for key, p in model.named_parameters()}
    return {key: t.detach() for key, t in results.items()}, gradients | dict(model.named_buffers())


def _anomaly_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.eval()
    with torch.no_grad():
        batch = model(images)
    return {"anomaly_map": batch.anomaly_map, "pred_score": batch.pred_score}


@pytest.mark.parametrize(
    ("name", "reversible"),
    # UFlow is not among the reversible ones, because it holds a GraphINN.
    [(name, False) for name in MODELS] + [(name, True) for name in ("fastflow-resnet18", "cflow")],
)
def test_accelerated_model_gives_the_same(name: str, reversible: bool) -> None:
    """Every result in float32 and float64 meets the criterion, and gradients do in float64.

    In float32 a rounding switches a ReLU's gate, so gradients are not compared there.
    """
    model = MODELS[name]
    stock = _build(model)
    images = torch.rand(model.batch, 3, model.size, model.size)
    ours = copy.deepcopy(stock)
    outcome = report(accelerate(ours, reversible=reversible))
    assert (len(outcome.changed), len(outcome.left)) == (model.blocks, 0), str(outcome)
    state = "reversible" if reversible else "accelerated"
    expected = [  # UFlow's flow is a GraphINN, whose blocks run one by one
        state if isinstance(module, SequenceINN) else "left"
        for module in stock.modules()
        if isinstance(module, SequenceINN | GraphINN)
    ]
    assert [chain.state for chain in outcome.chains] == expected, str(outcome)

    exact, exact_ours = copy.deepcopy(stock).double(), copy.deepcopy(ours).double()
    truth = _anomaly_maps(exact, images.double())
    baseline = _anomaly_maps(stock, images)
    for key, actual in _anomaly_maps(ours, images).items():
        assert_close(actual, truth[key].double(), baseline[key], f"float32 {key}")

    moved = _move(copy.deepcopy(exact))
    truth, true_gradients = _train_step(exact, model.step, images.double())
    _, moved_gradients = _train_step(moved, model.step, images.double())
    baseline, rough_gradients = _train_step(stock, model.step, images)
    reversible_count = model.blocks if reversible else 0
    for key, actual in _train_step(ours, model.step, images, reversible_count)[0].items():
        assert_close(actual, truth[key].double(), baseline[key], f"float32 {key}")
    results, gradients = _train_step(exact_ours, model.step, images.double(), reversible_count)
    for key, actual in results.items():
        if actual.dtype is torch.float64:  # anomalib sums FastFlow's loss in float32
            assert_close(actual, truth[key], baseline[key], f"float64 {key}")
    assert gradients.keys() == true_gradients.keys()
    assert sum(g is not None for g in gradients.values()) >= 6 * model.blocks
    for key, true in true_gradients.items():
        if true is not None and not true.is_floating_point():
            assert torch.equal(gradients[key], true), key
        else:
            assert_close(
                gradients[key],
                true,
                rough_gradients[key],
                key,
                magnitude=_magnitude(true, moved_gradients[key]),
            )


def _move(model: nn.Module) -> nn.Module:
    """Move every floating-point parameter to the next number up or down, at random.

    The results change by as much as those of a correct implementation may.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point() and "w_perm" not in name:
                up = torch.randint(0, 2, p.shape, generator=generator).bool()
                p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf).to(p)))
    return model


def _magnitude(true: Tensor | None, moved: Tensor | None) -> float | None:
    """Return the magnitude for the criterion's floor.

    It covers a rounding of the value itself, and of each weight. A weight's gradient is a sum over
    batch and pixels whose terms cancel, and one float32 run says too little about how much.
    """
    if true is None or moved is None:
        return None
    return (true.abs().max() + (moved - true).abs().max() / torch.finfo(true.dtype).eps).item()


@pytest.mark.parametrize("name", ["fastflow-resnet18", "cflow", "uflow-soft", "patchflow"])
def test_checkpoints_load_either_way_and_restore_gives_the_stock_model_back(name: str) -> None:
    model = MODELS[name]
    stock = _build(model)
    torch.manual_seed(1)
    ours = model.build()
    accelerate(ours)
    assert list(ours.state_dict()) == list(stock.state_dict())
    images = torch.rand(2, 3, model.size, model.size)
    expected = _anomaly_maps(stock, images)
    ours.load_state_dict(stock.state_dict(), strict=True)
    again = model.build()
    again.load_state_dict(ours.state_dict(), strict=True)
    for key, value in _anomaly_maps(again, images).items():
        assert torch.equal(value, expected[key])
    for key, value in _anomaly_maps(ours, images).items():
        # With different weights the values differ in the first digit.
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    assert len(report(restore(ours)).left) == model.blocks
    for key, value in _anomaly_maps(ours, images).items():
        assert torch.equal(value, expected[key])
