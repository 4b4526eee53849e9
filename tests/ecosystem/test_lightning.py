"""Run anomalib's Engine on a folder of real images, stock and with the callback.

The tests cover training, checkpoints, resuming and prediction.
"""

from __future__ import annotations

import doctest
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import skimage.io
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Cflow, Fastflow
from anomalib.models.components.flow import AllInOneBlock
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor

from fastflow_kernels import backends, lightning
from fastflow_kernels.engines import eager
from fastflow_kernels.lightning import Accelerate
from tests.support import textures

pytestmark = [
    pytest.mark.usefixtures("fused"),
    # Warnings about few workers, no logger, and small batches.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SIZE = (64, 64)
EPOCHS = 2


def _fastflow() -> AnomalibModule:
    return Fastflow(
        "resnet18",
        pre_trained=False,
        flow_steps=4,
        pre_processor=Fastflow.configure_pre_processor(SIZE),
        visualizer=False,
    )


def _cflow() -> AnomalibModule:
    return Cflow(
        "resnet18",
        ("layer2", "layer3"),
        pre_trained=False,
        coupling_blocks=2,
        pre_processor=Cflow.configure_pre_processor(SIZE),
        visualizer=False,
    )


models = pytest.mark.parametrize("build", [_fastflow, _cflow], ids=["fastflow", "cflow"])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder in anomalib's layout.

    It holds crops of a photograph for training, and crops with painted defects and their masks for
    testing.
    """
    root, rng = tmp_path_factory.mktemp("brick"), np.random.default_rng(0)
    photographs = {name: textures.load_photograph(name) for name in textures.TEXTURES}

    def save(folder: str, name: int, grey: np.ndarray) -> None:
        (root / folder).mkdir(exist_ok=True)
        image = (255 * grey).round().astype(np.uint8)
        skimage.io.imsave(
            root / folder / f"{name}.png", np.stack([image] * 3, -1), check_contrast=False
        )

    for k, crop in enumerate(textures.training_crops(photographs["brick"], 8, rng)):
        save("train", k, crop.numpy())
    for k, example in enumerate(textures.held_out_examples("brick", photographs, 2, rng)):
        save("good" if example.kind == "clean" else "bad", k, example.image)
        if example.kind != "clean":
            save("mask", k, example.mask.astype(float))
    return root


class Run(NamedTuple):
    """The results of a training run."""

    model: AnomalibModule
    metrics: dict[str, float]
    checkpoint: Path
    predictions: dict[str, Tensor]


def _run(
    build: Callable[[], AnomalibModule],
    images: Path,
    out: Path,
    accelerated: bool,
    epochs: int = EPOCHS,
    resume: Path | None = None,
) -> Run:
    seed_everything(0, verbose=False)
    model = build()
    data = Folder(
        "brick",
        root=images,
        normal_dir="train",
        normal_test_dir="good",
        abnormal_dir="bad",
        mask_dir="mask",
        train_batch_size=4,
        eval_batch_size=4,
        num_workers=0,
        val_split_mode="same_as_test",
    )
    callbacks = [Accelerate()] if accelerated else []
    engine = Engine(
        callbacks=callbacks,
        default_root_dir=out,
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    engine.fit(model, datamodule=data, ckpt_path=resume)
    metrics = dict(engine.trainer.callback_metrics)
    for tested in engine.test(model, datamodule=data, verbose=False):
        metrics |= tested
    metrics = {key: float(value) for key, value in metrics.items()}
    batches = engine.predict(model, datamodule=data)
    predictions = {
        key: torch.cat([getattr(batch, key) for batch in batches])
        for key in ("pred_score", "pred_label", "anomaly_map", "pred_mask")
    }
    return Run(model, metrics, Path(engine.best_model_path), predictions)


def _assert_same(ours: Run, stock: Run, start: AnomalibModule) -> None:
    """Assert that both runs trained to the same model.

    The weights may differ by 1% of the change that training made. The criterion of
    tests/support/compare.py does not apply: Adam's first step is the sign of a gradient, even of
    one that is only rounding.
    """
    assert (
        ours.metrics.keys() == stock.metrics.keys() >= {"train_loss", "image_AUROC", "pixel_AUROC"}
    )
    for key, value in stock.metrics.items():
        assert ours.metrics[key] == pytest.approx(value, rel=1e-3), key
    weights, expected, begun = (
        dict(model.named_parameters()) for model in (ours.model, stock.model, start)
    )
    changed = sum((w - begun[name]).square().sum() for name, w in expected.items()).sqrt()
    apart = sum((w - weights[name]).square().sum() for name, w in expected.items()).sqrt()
    assert 0 < apart <= 0.01 * changed, f"{apart:.3g} of {changed:.3g}"
    for key, value in stock.predictions.items():
        torch.testing.assert_close(
            ours.predictions[key].float(), value.float(), rtol=1e-2, atol=1e-3, msg=key
        )


@models
def test_training_resuming_and_prediction_agree(
    build: Callable[[], AnomalibModule], images: Path, tmp_path: Path
) -> None:
    stock, ours = (
        _run(build, images, tmp_path / kind, kind == "ours") for kind in ("stock", "ours")
    )
    seed_everything(0, verbose=False)
    start = build()
    _assert_same(ours, stock, start)
    runs = {
        (writer, reader): _run(
            build,
            images,
            tmp_path / f"{writer}-{reader}",
            reader == "ours",
            EPOCHS + 1,
            run.checkpoint,
        )
        for writer, run in (("stock", stock), ("ours", ours))
        for reader in ("stock", "ours")
    }
    reference = runs.pop(("stock", "stock"))
    for run in runs.values():
        _assert_same(run, reference, start)


def test_every_block_runs_fused_under_the_engine(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches arrive as torchvision's tensor subclass, which must not lead to plain operations."""
    calls = dict.fromkeys(["blocks", "forward", "backward"], 0)

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(eager, name, counted(name, getattr(eager, name)))
    monkeypatch.setattr(AllInOneBlock, "__call__", counted("blocks", AllInOneBlock.__call__))
    with caplog.at_level(logging.INFO):
        run = _run(_fastflow, images, tmp_path, accelerated=True)
    # accelerate compares each block with both dialects and two clamps.
    assert calls["forward"] == calls["blocks"] + 4 * 12
    assert calls["backward"] == 12 * EPOCHS * 2  # blocks, epochs, batches
    messages = [record.message for record in caplog.records if "fastflow_kernels" in record.message]
    # The message appears once, because the blocks are already accelerated at prediction.
    assert messages == ["fastflow_kernels: 12 of 12 blocks run fused"]
    assert run.checkpoint.exists()


def test_example_of_the_docstring_runs() -> None:
    failed, attempted = doctest.testmod(lightning)
    assert (failed, attempted > 0) == (0, True)


def test_callback_refuses_a_backend_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="expected backend to be one of"):
        Accelerate(backend="cuda")
    assert Accelerate().backend in backends.BACKENDS


def test_callback_warns_where_there_is_nothing_to_accelerate() -> None:
    with pytest.warns(UserWarning, match="no block of the model runs fused"):
        Accelerate().setup(None, LightningModule(), "fit")


def test_callback_says_what_it_left(caplog: pytest.LogCaptureFixture) -> None:
    model = _fastflow()
    model.model.fast_flow_blocks[0][1]._permute = None
    with caplog.at_level(logging.INFO):
        Accelerate().setup(None, model, "fit")
    message = "\n".join(record.message for record in caplog.records)
    assert "11 of 12 blocks run fused" in message
    assert "AllInOneBlock overrides _permute" in message


def test_callback_can_be_named_in_a_configuration(images: Path, tmp_path: Path) -> None:
    """The configuration is one of anomalib's command line: ``anomalib train --config ...``."""
    path = tmp_path / "config.yaml"
    path.write_text(f"""
model:
  class_path: anomalib.models.Fastflow
  init_args: {{backbone: resnet18, pre_trained: false, flow_steps: 2}}
data:
  class_path: anomalib.data.Folder
  init_args: {{name: brick, root: {images}, normal_dir: train}}
trainer:
  callbacks:
    - class_path: fastflow_kernels.lightning.Accelerate
      init_args: {{backend: eager}}
""")
    engine, _, _ = Engine.from_config(config_path=path)
    (callback,) = (c for c in engine._cache.args["callbacks"] if isinstance(c, Accelerate))
    assert callback.backend == "eager"
