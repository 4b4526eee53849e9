"""Measure anomalib's FastFlow from PyPI, stock and accelerated.

It measures the size of the exported file and the time to compile. ``bench.ecosystem`` measures the
time of a call. Run it in the environment of ``make ecosystem``::

    .venv-ecosystem/bin/python -m tests.support.anomalib_flows [size|compile]
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fastflow_kernels import accelerate
from tests.support import peers

CHANNELS = {"resnet18": (64, 128, 256), "wide_resnet50_2": (256, 512, 1024)}


class Flows(nn.Module):
    """The flow part of anomalib's FastflowModel: three chains.

    Args:
        backbone: A key of ``CHANNELS``.
        size: Height and width of the image in pixels.
    """

    def __init__(self, backbone: str, size: int = 256) -> None:
        from anomalib.models.image.fastflow.torch_model import create_fast_flow_block

        super().__init__()
        self.shapes = [
            (channels, size // scale, size // scale)
            for channels, scale in zip(CHANNELS[backbone], (4, 8, 16), strict=True)
        ]
        self.flows = nn.ModuleList(
            create_fast_flow_block(shape, conv3x3_only=False, hidden_ratio=1.0, flow_steps=8)
            for shape in self.shapes
        )

    def features(self, batch: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, *shape) for shape in self.shapes)

    def forward(self, *features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [flow(x) for flow, x in zip(self.flows, features, strict=True)]
        return [z for z, _ in pairs], [logdet for _, logdet in pairs]


def stock_and_ours(backbone: str, size: int = 256) -> tuple[Flows, Flows]:
    """Return a stock model and its accelerated copy.

    Their global affines are random, because fresh ones are equal in all channels.
    """
    torch.manual_seed(0)
    stock = Flows(backbone, size)
    with torch.no_grad():
        for name, p in stock.named_parameters():
            if name.endswith("global_scale"):
                p.add_(0.2 * torch.randn_like(p))
            elif name.endswith("global_offset"):
                p.add_(0.1 * torch.randn_like(p))
    ours = copy.deepcopy(stock)
    accelerate(ours)
    return stock, ours


def file_sizes(backbone: str, size: int = 64) -> dict[str, object]:
    """Return the megabytes of both ONNX files, with and without the subnets' weights."""
    import onnx

    sizes: dict[str, object] = {"backbone": backbone}
    for name, model in zip(("stock", "ours"), stock_and_ours(backbone, size), strict=True):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "flow.onnx"
            torch.onnx.export(
                model.eval(),
                model.features(1),
                str(path),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            total = path.stat().st_size
            tensors = onnx.load(str(path)).graph.initializer
            subnets = sum(
                onnx.numpy_helper.to_array(tensor).nbytes
                for tensor in tensors
                if "subnet" in tensor.name
            )
        sizes |= {f"{name}_mb": total / 1e6, f"{name}_without_subnets_mb": (total - subnets) / 1e6}
    return sizes | {"ours/stock": sizes["ours_mb"] / sizes["stock_mb"]}


def compile_times(backbone: str, batch: int, size: int) -> dict[str, object]:
    """Compile a training step of all blocks by Inductor, with plain operations and with operators.

    Returns:
        Seconds that a first step takes longer than a second one.
    """
    from tests.support.mock_driver import mock_gpu

    torch.set_num_threads(1)
    seconds: dict[str, object] = {"backbone": backbone, "batch": batch, "image": size}
    for name, backend in (("plain", "eager"), ("operators", "triton")):
        torch._dynamo.reset()
        flows = accelerate(Flows(backbone, size), backend=backend)
        features = [t.requires_grad_() for t in flows.features(batch)]
        compiled = torch.compile(flows, fullgraph=True)
        steps = []
        with mock_gpu():  # no kernel runs
            for _ in range(2):
                start = time.perf_counter()
                z, log_dets = compiled(*features)
                torch.stack([t.sum() for t in (*z, *log_dets)]).sum().backward()
                steps.append(time.perf_counter() - start)
        seconds[f"{name}_s"] = steps[0] - steps[1]
    return seconds


def main(measurement: str = "all") -> None:
    peers.prepare_torchvision()
    if measurement in ("all", "size"):
        for backbone in CHANNELS:
            print(json.dumps(file_sizes(backbone)))
    if measurement in ("all", "compile"):
        print(json.dumps(compile_times("wide_resnet50_2", batch=2, size=64)))


if __name__ == "__main__":
    main(*sys.argv[1:])
