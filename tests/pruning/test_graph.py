"""The traced network is the module: same outputs, names, modes and gradients."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from zoo import KEPT, ZOO, Net, build, inputs, traced

from edgeprune.pruning.graph import UnsupportedNetwork, trace


def same(left: object, right: object) -> bool:
    pairs = zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("name", [*ZOO, *KEPT])
def test_outputs_are_those_of_the_module(name: str) -> None:
    """For batches that were not traced, in the module's own structure, and with its parameters' names."""
    module, network = build(name), traced(name).network
    for batch in (2, 3):
        wanted = module(*inputs(name, batch))
        assert same(network(*inputs(name, batch)), wanted)
        assert pytree.tree_structure(network(*inputs(name, batch))) == pytree.tree_structure(wanted)
    assert set(dict(network.named_parameters())) <= set(dict(module.named_parameters()))


@pytest.mark.parametrize("name", ["resnet", "instance norm", "batch norm without statistics", "mobilenet v3"])
def test_training_mode_is_that_of_the_module(name: str) -> None:
    """In training mode batch norm measures and updates its running statistics as the module does."""
    module = build(name)
    network = trace(module, *inputs(name))
    assert same(network.train()(*inputs(name, 4)), module.train()(*inputs(name, 4)))
    assert same(network.eval()(*inputs(name)), module.eval()(*inputs(name)))


def test_dropout_follows_the_mode() -> None:
    """Two passes differ in training mode and agree in eval mode."""
    network = trace(build("dropout"), *inputs("dropout"))
    pictures = inputs("dropout")
    network.train()
    assert not same(network(*pictures), network(*pictures))
    network.eval()
    assert same(network(*pictures), network(*pictures))


def test_module_is_not_changed() -> None:
    """Tracing leaves weights, and modes that differ between parts, as they were; nothing is shared."""
    module = build("resnet").train()
    module[1].eval()
    before = copy.deepcopy(module.state_dict())
    network = trace(module, *inputs("resnet"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    assert module.training and not module[1].training and not module[1].body[0][1].training


def test_frozen_and_tied_parameters() -> None:
    """A frozen parameter stays frozen; a tied one is there once, under its first name."""
    network = trace(build("tied"), *inputs("tied"))
    assert not network.b.weight.requires_grad
    assert "c.weight" not in dict(network.named_parameters())
    assert network.b.bias.requires_grad and network.c.bias.requires_grad


def test_copy_and_state_dict() -> None:
    """A deep copy computes the same and shares nothing; a state dict goes from one to another, strictly."""
    network = trace(build("csp"), *inputs("csp"))
    twin = copy.deepcopy(network)
    other = trace(build("csp", seed=5), *inputs("csp"))
    assert same(twin(*inputs("csp")), network(*inputs("csp")))
    assert not same(other(*inputs("csp")), network(*inputs("csp")))
    other.load_state_dict(network.state_dict(), strict=True)
    assert same(other(*inputs("csp")), network(*inputs("csp")))
    with torch.no_grad():
        twin.stem.get_submodule("0").weight.zero_()
    assert not same(twin(*inputs("csp")), network(*inputs("csp")))


def test_gradients_are_those_of_the_module() -> None:
    """Backward through the graph gives every parameter the module's own gradient."""
    module = build("shufflenet v2")
    network = trace(module, *inputs("shufflenet v2"))
    for each in (module, network):
        each(*inputs("shufflenet v2")).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(
            parameter.grad, dict(network.named_parameters())[name].grad, rtol=1e-4, atol=1e-5
        ), name


def through_a_view(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    return functional.relu_(x.view(-1, 8, 64)).sum((1, 2)) + x.sum((1, 2, 3))


def seen_in_a_slice(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    part = x[:, 2:]
    return part + functional.relu_(x).mean()


def seen_in_an_unsqueezed_view(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    view = x.unsqueeze(1)
    x.add_(1)
    return view


def a_buffer(net: Net, x: Tensor) -> Tensor:
    net.seen.add_(1)
    return net.a(x) * net.seen


@pytest.mark.parametrize("forward", [through_a_view, seen_in_a_slice, seen_in_an_unsqueezed_view, a_buffer])
def test_in_place_that_others_see_is_refused(forward: Callable[..., Tensor]) -> None:
    """What would be wrong when executed out of place is refused by the name of the operation."""
    module = Net(forward, a=nn.Conv2d(3, 8, 1), seen=torch.zeros(1))
    with pytest.raises(
        UnsupportedNetwork, match=r"(relu_|add_).*: what it changes in place is used elsewhere"
    ):
        trace(module, torch.zeros(1, 3, 8, 8))


def test_branching_on_values_is_refused() -> None:
    """Control flow that depends on the picture names the network and says what to do."""
    module = Net(lambda net, x: net.a(x) if x.sum() > 0 else x, a=nn.Conv2d(3, 3, 1))
    with pytest.raises(UnsupportedNetwork, match="must not branch on tensor values"):
        trace(module, torch.zeros(1, 3, 8, 8))
