"""Use the installed package as its users do: ``python ci/package_use.py alone|freia``.

The script has to run outside the checkout.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fastflow_kernels
from fastflow_kernels import AllInOneBlock, accelerate, report, restore

CHECKOUT = Path(__file__).resolve().parent.parent
assert CHECKOUT not in Path(fastflow_kernels.__file__).resolve().parents, (
    "expected the installed package, but the checkout was imported: run outside the checkout"
)


def subnet(channels_in: int, channels_out: int) -> torch.nn.Module:
    return torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)


def alone() -> None:
    """Run a block forward, backward and inverse where only torch is installed."""
    block = AllInOneBlock([(16, 32, 32)], subnet_constructor=subnet)
    x = torch.randn(4, 16, 32, 32)
    (y,), logdet = block([x])
    (y.square().mean() - logdet.mean()).backward()
    assert block.global_scale.grad is not None
    with torch.no_grad():
        (inverse,), inverse_logdet = block([y], rev=True)
    torch.testing.assert_close(inverse, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(inverse_logdet, -logdet, atol=1e-2, rtol=1e-4)
    assert not {"numpy", "scipy", "FrEIA", "anomalib"} & {
        name for name in sys.modules if "." not in name
    }


def freia() -> None:
    """Accelerate a model of FrEIA and restore it. The outputs must stay the same."""
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock as Stock

    flow = SequenceINN(16, 32, 32)
    for _ in range(3):
        flow.append(Stock, subnet_constructor=subnet)
    x = torch.randn(4, 16, 32, 32)
    expected = flow(x)
    flow = accelerate(flow)
    print(report(flow))
    assert len(report(flow).changed) == 3
    torch.testing.assert_close(flow(x), expected, atol=1e-2, rtol=1e-4)
    assert len(report(restore(flow)).left) == 3
    torch.testing.assert_close(flow(x), expected, atol=0.0, rtol=0.0)


{"alone": alone, "freia": freia}[sys.argv[1]]()
