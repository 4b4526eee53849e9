"""Export accelerated models: torch.export, ONNX, OpenVINO, TorchScript, anomalib's own export.

They export like the stock models, and their files are smaller.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.models import Fastflow
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from anomalib.models.image.patchflow.torch_model import PatchflowModel
from anomalib.models.image.uflow.torch_model import UflowModel
from torch import Tensor, nn

from fastflow_kernels import accelerate, report
from tests.support.anomalib_flows import file_sizes

pytestmark = [
    pytest.mark.usefixtures("fused"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BATCH, HEIGHT, WIDTH = (torch.export.Dim(name) for name in ("batch", "height", "width"))
MODELS = {  # builders, and the number of blocks of each model
    "fastflow": (lambda: FastflowModel((64, 64), "resnet18", pre_trained=False, flow_steps=2), 6),
    "cflow": (lambda: CflowModel("resnet18", ("layer2",), pre_trained=False, coupling_blocks=2), 2),
    "uflow": (lambda: UflowModel((64, 64), backbone="resnet18", flow_steps=2), 6),
    "patchflow": (lambda: PatchflowModel((64, 64), "resnet18", pre_trained=False, flow_steps=2), 2),
}


def _pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Randomize a model's global affines, and return it and an accelerated copy."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("global_scale", "global_offset")):
                p.add_(0.1 * torch.randn_like(p))
    ours = copy.deepcopy(model)
    assert report(accelerate(ours)).changed
    return model.eval(), ours.eval()


def _flow() -> tuple[nn.Module, nn.Module]:
    return _pair(
        create_fast_flow_block([16, 12, 10], conv3x3_only=False, hidden_ratio=1.0, flow_steps=3)
    )


def _to_onnx(
    model: nn.Module, x: Tensor, path: Path, dynamic: dict[int, torch.export.Dim]
) -> onnx.ModelProto:
    with torch.no_grad():
        torch.onnx.export(
            model,
            (x,),
            str(path),
            dynamo=True,
            dynamic_shapes=(dynamic,),
            external_data=False,
            verbose=False,
        )
    return onnx.load(str(path))


def _assert_close(actual: Tensor | np.ndarray, expected: Tensor) -> None:
    """Assert that values agree to some hundred float32 roundings of the largest value.

    Each runtime sums in its own order.
    """
    actual = torch.as_tensor(actual)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def _namespaces(program: torch.export.ExportedProgram) -> set[str]:
    """Return the namespaces of a program's operators, with those of higher order and nested graphs.

    The program may also call Python's own functions on sizes.
    """
    graphs = [
        module.graph
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
    ]
    targets = [
        node.target for graph in graphs for node in graph.nodes if node.op == "call_function"
    ]
    operators: list[Any] = [
        target for target in targets if isinstance(target, torch._ops.OperatorBase)
    ]
    assert {target.__module__ for target in targets if target not in operators} <= {
        "_operator",
        "math",
        "torch",
    }
    return {operator.namespace for operator in operators}


def test_exported_program_holds_gathers_and_no_operator_of_ours() -> None:
    stock, ours = _flow()
    programs = [
        torch.export.export(
            m, (torch.randn(2, 16, 12, 10),), dynamic_shapes=({0: BATCH, 2: HEIGHT, 3: WIDTH},)
        )
        for m in (stock, ours)
    ]
    assert _namespaces(programs[1]) == {"aten"}
    names = [
        Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
        for program in programs
    ]
    assert names[1]["aten.index_select.default"] == 3
    products = [sum(n for name, n in counts.items() if "conv" in name) for counts in names]
    assert products[1] == products[0] - 3
    for shape in ((2, 16, 12, 10), (5, 16, 9, 11)):
        x = torch.randn(shape)
        with torch.no_grad():
            for actual, expected in zip(programs[1].module()(x), stock(x), strict=True):
                _assert_close(actual, expected)


@pytest.mark.parametrize("name", MODELS)
def test_onnx_of_a_whole_model(name: str, tmp_path: Path) -> None:
    build, blocks = MODELS[name]
    stock, ours = _pair(build())
    images = torch.rand(3, 3, 64, 64)
    proto = _to_onnx(
        ours, images[:2], tmp_path / "model.onnx", {} if name == "cflow" else {0: BATCH}
    )
    assert {node.domain for node in proto.graph.node} == {""}
    assert sum(node.op_type == "Gather" for node in proto.graph.node) >= blocks
    assert not [tensor.name for tensor in proto.graph.initializer if "w_perm" in tensor.name]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    # anomalib's CFlow repeats its encoding for a fixed batch
    for x in (images[:2],) if name == "cflow" else (images[:2], images):
        results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = stock(x)
        for actual, key in zip(results, ("pred_score", "anomaly_map"), strict=True):
            _assert_close(actual, getattr(expected, key))


def test_onnx_of_a_flow_takes_every_image_size_and_openvino_too(tmp_path: Path) -> None:
    stock, ours = _flow()
    path = tmp_path / "flow.onnx"
    _to_onnx(ours, torch.randn(2, 16, 12, 10), path, {0: BATCH, 2: HEIGHT, 3: WIDTH})
    session = onnxruntime.InferenceSession(str(path))
    compiled = openvino.compile_model(
        openvino.convert_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for shape in ((2, 16, 12, 10), (5, 16, 9, 11)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = stock(x)
        for results in (
            session.run(None, {session.get_inputs()[0].name: x.numpy()}),
            list(compiled(x.numpy()).values()),
        ):
            for actual, value in zip(results, expected, strict=True):
                _assert_close(actual, value)


def test_the_file_holds_the_index_and_not_the_matrix(tmp_path: Path) -> None:
    """Apart from the subnets' weights, which are the same, almost nothing is left."""
    sizes = []
    for k, model in enumerate(
        _pair(
            create_fast_flow_block([256, 8, 8], conv3x3_only=False, hidden_ratio=0.16, flow_steps=2)
        )
    ):
        proto = _to_onnx(model, torch.randn(1, 256, 8, 8), tmp_path / f"{k}.onnx", {})
        tensors = {
            tensor.name: onnx.numpy_helper.to_array(tensor).nbytes
            for tensor in proto.graph.initializer
        }
        sizes.append(sum(size for name, size in tensors.items() if "subnet" not in name))
    assert sizes[0] >= 2 * 256 * 256 * 4
    assert sizes[1] <= 2 * 8 * 256 * 3  # an int64 index, and two or three float32 vectors


def test_onnx_of_fastflows_flow_part_is_smaller() -> None:
    """The subnets' weights, which are the same, are 79% of the stock file."""
    sizes = file_sizes("wide_resnet50_2")
    assert sizes["ours_mb"] <= 0.80 * sizes["stock_mb"], sizes
    assert sizes["ours_without_subnets_mb"] <= 0.05 * sizes["stock_without_subnets_mb"], sizes


def test_torchscript_trace() -> None:
    stock, ours = _flow()
    x = torch.randn(2, 16, 12, 10)
    with torch.no_grad():
        traced = torch.jit.trace(ours, (x,))
        assert str(traced.inlined_graph).count("aten::index_select") == 3
        for actual, expected in zip(traced(x), stock(x), strict=True):
            _assert_close(actual, expected)
        x = torch.randn(3, 16, 9, 11)  # no size is a constant in the trace
        for actual, expected in zip(traced(x), stock(x), strict=True):
            _assert_close(actual, expected)


def test_anomalibs_own_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export as Engine.export does, with pre- and post-processing in the file."""
    monkeypatch.chdir(tmp_path)  # OpenVINOInferencer writes its cache to the working directory
    # anomalib requires this variable to unpickle a whole model, stock or accelerated.
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model = Fastflow(
        "resnet18",
        pre_trained=False,
        flow_steps=2,
        pre_processor=Fastflow.configure_pre_processor((64, 64)),
        visualizer=False,
    )
    stock, ours = _pair(model)
    image = torch.rand(3, 80, 72)
    with torch.no_grad():
        expected = stock(image[None])

    path = ours.to_torch(tmp_path)
    predicted = TorchInferencer(path=path, device="cpu").predict(image)
    _assert_close(predicted.anomaly_map[None], expected.anomaly_map)

    path = ours.to_openvino(tmp_path, input_size=(80, 72))  # goes through ONNX
    inferencer = OpenVINOInferencer(
        path=path, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    predicted = inferencer.predict(image.movedim(0, -1).numpy())
    _assert_close(
        torch.as_tensor(predicted.anomaly_map).reshape(expected.anomaly_map.shape),
        expected.anomaly_map,
    )
