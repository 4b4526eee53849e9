"""torch.compile of a flow: one graph without breaks, for every batch size.

The default backend, inductor, needs a C++ compiler: python compiled.py [--backend aot_eager]

On a GPU the graph has one operator for each block. To see it without a GPU, let Triton interpret
its kernels: TRITON_INTERPRET=1 FASTFLOW_KERNELS_BACKEND=triton python compiled.py
"""

import argparse

import torch
from FrEIA.framework import SequenceINN
from torch import nn

from fastflow_kernels import AllInOneBlock


def subnet(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels_in, 64), nn.ReLU(), nn.Linear(64, channels_out))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    backend = parser.parse_args().backend

    torch.manual_seed(0)
    flow = SequenceINN(16)
    for _ in range(2):
        flow.append(AllInOneBlock, subnet_constructor=subnet)

    # A stock model is compiled the same way: call accelerate(model) first.
    explanation = torch._dynamo.explain(flow)(torch.randn(8, 16))
    print(f"graphs: {explanation.graph_count}, breaks: {explanation.graph_break_count}")
    names = [str(node.target) for graph in explanation.graphs for node in graph.graph.nodes]
    print(f"operators of ours: {sum('fastflow_kernels' in name for name in names)}")

    compiled = torch.compile(flow, backend=backend, fullgraph=True, dynamic=True)
    compare(flow, compiled, batch=8)
    # From here on, another compilation would be an error.
    with torch.compiler.set_stance("fail_on_recompile"):
        compare(flow, compiled, batch=5)
        compare(flow, compiled, batch=100)


def compare(flow: nn.Module, compiled: nn.Module, batch: int) -> None:
    """Print how far results and gradients are apart, relative to the largest value."""
    x = torch.randn(batch, 16, requires_grad=True)
    results = []
    for model in (flow, compiled):
        z, log_det = model(x)
        loss = (0.5 * z.square().sum(dim=1) - log_det).mean()
        (gradient,) = torch.autograd.grad(loss, x)
        results.append((z, log_det, gradient))
    errors = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True)]
    print("batch {}: z, log_det, gradient differ by {:.0e}, {:.0e}, {:.0e}".format(batch, *errors))


if __name__ == "__main__":
    main()
