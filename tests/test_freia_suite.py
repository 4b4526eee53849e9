"""What FrEIA's own tests ask of its coupling blocks, asked of ours in the same networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastflow_kernels
from fastflow_kernels import accelerate, report
from tests.support.peers import freia

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("fused")]

BATCH, IMAGE = 8, (3, 10, 10)
CONDITIONS = ((1, 10, 10), (50,), (20,))
FEATURES = 300
TWO_SIDED = ("NICECouplingBlock", "RNVPCouplingBlock", "GLOWCouplingBlock", "GINCouplingBlock")
NAMES = (*TWO_SIDED, "AffineCouplingOneSided")
every_block = pytest.mark.parametrize("name", NAMES)
# The classes come from FrEIA, from FrEIA and then accelerate, or from us.
every_side = pytest.mark.parametrize("side", ["stock", "accelerated", "ours"])


def two_layers(first: nn.Module, last: nn.Module, gain: float) -> nn.Module:
    """Return a subnet whose coefficients stay moderate: the numerical Jacobian needs that."""
    for layer in (first, last):
        nn.init.kaiming_uniform_(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(gain)
            layer.bias.mul_(0.1)
    return nn.Sequential(first, nn.ReLU(), last)


def convolutions(channels_in: int, channels_out: int) -> nn.Module:
    layers = nn.Conv2d(channels_in, 32, 3, padding=1), nn.Conv2d(32, channels_out, 3, padding=1)
    return two_layers(*layers, gain=0.5)


def linear_layers(channels_in: int, channels_out: int) -> nn.Module:
    layers = nn.Linear(channels_in, 128), nn.Linear(128, channels_out)
    return two_layers(*layers, gain=0.5)


class Network:
    """A GraphINN under construction.

    Attributes:
        nodes: Its nodes so far.
    """

    def __init__(self, name: str, side: str) -> None:
        torch.manual_seed(0)
        self.name, self.side = name, side
        self.nodes: list[Any] = []
        self.framework, self.modules = freia().framework, freia().modules

    def source(self, *size: int, condition: bool = False) -> Any:
        kind = self.framework.ConditionNode if condition else self.framework.InputNode
        self.nodes.append(kind(*size))
        return self.nodes[-1]

    def add(self, inputs: Any, kind: str, **options: Any) -> Any:
        """Append a module of FrEIA."""
        return self.append(inputs, getattr(self.modules, kind), options)

    def append(
        self, inputs: Any, module: Any, options: dict[str, Any], conditions: Any = ()
    ) -> Any:
        name = f"node {len(self.nodes)}"
        self.nodes.append(self.framework.Node(inputs, module, options, conditions, name))
        return self.nodes[-1]

    def couple(self, inputs: Any, subnet: Callable[..., nn.Module], conditions: Any = ()) -> Any:
        """Append a coupling block."""
        module = getattr(fastflow_kernels if self.side == "ours" else self.modules, self.name)
        options = {"subnet_constructor": subnet}
        if self.name != "NICECouplingBlock":
            options["clamp"] = 1.0
        return self.append(inputs, module, options, conditions)

    def finish(self, last: Any) -> Any:
        self.nodes.append(self.framework.OutputNode(last))
        net = self.framework.GraphINN(self.nodes)
        if self.side == "accelerated":
            accelerate(net)
            assert not report(net).left
            assert report(net).changed
        return net


def conditioned(name: str, side: str) -> tuple[Any, list[Tensor], tuple[int, ...]]:
    """Return an image flow that ends in a flow of vectors, both with conditions.

    Returns:
        The net, conditions for it, and the size of its output.
    """
    net = Network(name, side)
    start = net.source(*IMAGE)
    image, *vectors = (net.source(*size, condition=True) for size in CONDITIONS)
    flat = net.add(net.couple(start, convolutions, image), "Flatten")
    net_of = net.finish(net.couple(flat, linear_layers, vectors))
    c = [torch.randn(BATCH, *size) for size in CONDITIONS]
    return net_of, c, (FEATURES,)


def branched(name: str, side: str) -> tuple[Any, list[Tensor], tuple[int, ...]]:
    """Return a graph with two branches: a permutation, and a flow of images and then of vectors."""
    net = Network(name, side)
    start, condition = net.source(*IMAGE), net.source(1, 10, 10, condition=True)
    split = net.add(start, "Split", section_sizes=[1, 2], dim=0)
    permuted = net.add(net.add(split.out0, "Flatten"), "PermuteRandom", seed=123)
    one = net.add(permuted, "Reshape", output_dims=(1, 10, 10))
    image = net.couple(split.out1, convolutions, condition)
    vector = net.couple(net.add(image, "Flatten"), linear_layers)
    two = net.add(vector, "Reshape", output_dims=(2, 10, 10))
    joined = net.add([one.out0, two.out0], "Concat", dim=0)
    whole = net.finish(net.add(joined, "HaarDownsampling"))
    return whole, [torch.randn(BATCH, 1, 10, 10)], (12, 5, 5)


NETWORKS = {"conditioned": conditioned, "branched": branched}
every_network = pytest.mark.parametrize("network", NETWORKS)


@every_network
@every_block
@every_side
def test_output(network: str, name: str, side: str) -> None:
    net, c, size = NETWORKS[network](name, side)
    x = torch.randn(BATCH, *IMAGE)
    for jac in (True, False):
        y, _ = net(x, c=c, jac=jac)
        assert isinstance(y, Tensor)
        assert y.shape == (BATCH, *size)
    net.force_tuple_output = True
    (only,), _ = net(x, c=c)
    torch.testing.assert_close(only, y)


@every_network
@every_block
@every_side
def test_inverse(network: str, name: str, side: str) -> None:
    net, c, size = NETWORKS[network](name, side)
    x = torch.randn(BATCH, *IMAGE)
    y, log_det = net(x, c=c)
    # FrEIA's HaarDownsampling overwrites what it inverts.
    back, minus_log_det = net(y.clone(), c=c, rev=True)
    assert (back - x).abs().max() < 1e-4
    assert torch.as_tensor(log_det + minus_log_det).abs().max() < 1e-4
    z = torch.randn(BATCH, *size)
    back, log_det = net(z.clone(), c=c, rev=True)
    again, minus_log_det = net(back, c=c)
    assert (again - z).abs().max() < 1e-4
    assert torch.as_tensor(log_det + minus_log_det).abs().max() < 1e-4


@every_network
@pytest.mark.parametrize("name", ["GINCouplingBlock", "RNVPCouplingBlock"])
@every_side
def test_log_determinant_is_that_of_the_numerical_jacobian(
    network: str, name: str, side: str
) -> None:
    """In float64 they agree to 1e-6. FrEIA asks for 3%."""
    net, c, _ = NETWORKS[network](name, side)
    x, c = torch.randn(2, *IMAGE).double(), [t[:2].double() for t in c]
    log_det = torch.as_tensor(net.double()(x, c=c)[1]).expand(2).double()
    numerical = net.log_jacobian_numerical(x, c=c)
    assert ((log_det - numerical).abs() <= 0.03 * log_det.abs() + 1e-3).all()
    assert name == "GINCouplingBlock" or log_det.abs().max() > 1.0


WRONG: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "order": lambda c: [c[1], c[0], c[2]],
    "channels of a vector": lambda c: [c[0], torch.randn(BATCH, 54), c[2]],
    "size of an image": lambda c: [torch.randn(BATCH, 1, 10, 11), *c[1:]],
    "batch": lambda c: [c[0], c[1][:1], c[2]],
    "none of one": lambda c: c[:2],
}


@every_block
@every_side
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_conditions_raise(name: str, side: str, wrong: str) -> None:
    net, c, _ = conditioned(name, side)
    x = torch.randn(BATCH, *IMAGE)
    for rev in (False, True):
        y = net(x, c=c)[0] if rev else x
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            net(y, c=WRONG[wrong](c), rev=rev)


@every_block
@every_side
def test_gradients_are_those_of_freias_blocks(name: str, side: str) -> None:
    stock, c, _ = branched(name, "stock")
    net, *_ = branched(name, side)
    # A graph orders its modules anew each time.
    modules, theirs = ({node.name: node.module for node in n.node_list} for n in (net, stock))
    for key, module in theirs.items():
        if module is not None:
            modules[key].load_state_dict(module.state_dict())
    x = torch.randn(BATCH, *IMAGE)
    results = []
    for model in (stock, net):
        leaf = x.clone().requires_grad_()
        y, log_det = model(leaf, c=c)
        (y.square().mean() - torch.as_tensor(log_det).mean()).backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@every_block
@every_side
def test_block_that_exists_already_becomes_a_node(name: str, side: str) -> None:
    net = Network(name, side)
    start = net.source(4)
    module: Any = getattr(fastflow_kernels if side == "ours" else net.modules, name)
    block = module([(4,)], subnet_constructor=nn.Linear)
    if side == "accelerated":
        accelerate(block)
    x = torch.randn(16, 4)
    whole = net.finish(net.append(start, lambda dims_in: block, {}))
    y, _ = whole(x)
    assert y.shape == (16, 4)
    assert (whole(y, rev=True)[0] - x).abs().max() < 1e-4


@every_block
@every_side
def test_dimensions_of_nodes(name: str, side: str) -> None:
    net = Network(name, side)
    start = net.source(*IMAGE)
    node = net.couple(start, convolutions)
    whole = net.finish(node)
    end = net.nodes[-1]
    assert (start.input_dims, end.output_dims) == ([], [])
    assert start.output_dims == node.input_dims == node.output_dims == end.input_dims
    assert whole.dims_in == start.output_dims == [IMAGE]
