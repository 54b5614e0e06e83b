"""Costs are exact: against torch's own counter, by hand, and as terms of what is kept."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import KEPT, ZOO, Net, build, inputs, some_units, traced

from edgeprune.pruning.counting import Terms, channel_terms, count, mac_terms, parameter_terms
from edgeprune.pruning.graph import trace
from edgeprune.pruning.surgery import remove

COUNTED = [
    name for name in [*ZOO, *KEPT] if name not in ("recurrent", "squeeze")
]  # squeeze takes no batch of 1


@pytest.mark.parametrize("name", COUNTED)
def test_macs_are_half_of_torchs_flops(name: str) -> None:
    """torch.utils.flop_counter counts a multiply-add as two; parameters are those that are used."""
    module = build(name)
    pictures = inputs(name, batch=1)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into fused attention
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            module(*pictures)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    network = traced(name).network
    cost = count(network)
    assert cost.macs * 2 == counter.get_total_flops()
    assert cost.params == sum(parameter.numel() for parameter in network.parameters())
    assert sum(layer.macs for layer in cost.layers) <= cost.macs


def macs(module: nn.Module, *shape: int) -> int:
    return count(trace(module, torch.zeros(1, *shape))).macs


def test_macs_by_hand() -> None:
    """out x in x kernel x positions; transposed over the input's positions; grouped over a block's inputs."""
    assert macs(nn.Conv2d(3, 8, (3, 5), 2, (1, 2)), 3, 16, 12) == 8 * 3 * 3 * 5 * 8 * 6
    assert macs(nn.Conv2d(8, 12, 3, groups=4), 8, 10, 10) == 12 * 2 * 9 * 64
    assert macs(nn.ConvTranspose2d(8, 6, 4, 2, 1), 8, 5, 7) == 8 * 6 * 16 * 5 * 7
    assert macs(nn.ConvTranspose2d(8, 12, 2, 2, groups=4), 8, 5, 5) == 8 * 3 * 4 * 25
    assert macs(nn.Linear(7, 9), 7) == 7 * 9
    assert macs(nn.Linear(7, 9), 5, 7) == 5 * 7 * 9
    attention = Net(lambda net, x: nn.functional.scaled_dot_product_attention(x, x, x))
    assert macs(attention, 2, 5, 4) == 2 * 2 * 5 * 5 * 4
    functional = Net(lambda net, x: nn.functional.conv2d(x, net.w), w=nn.Parameter(torch.zeros(4, 3, 3, 3)))
    assert macs(functional, 3, 6, 6) == 4 * 27 * 16


def test_layers() -> None:
    """A layer used twice has its parameters once and its MACs twice."""
    cost = count(trace(build("used twice"), *inputs("used twice")))
    layer = next(layer for layer in cost.layers if layer.layer == "b")
    assert (layer.params, layer.macs, layer.channels, layer.output_shape) == (
        72,
        2 * 64 * 256,
        8,
        (8, 16, 16),
    )


def test_activation_peak_by_hand() -> None:
    """The picture and the first result live at once, then the first and the second; float32."""
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    assert count(trace(module, torch.zeros(1, 3, 10, 10))).activation_bytes == (8 + 4) * 100 * 4


def evaluate(terms: Terms, units: set[int]) -> float:
    sizes = terms.sizes.copy()
    for unit in units:
        for factor, positions in terms.members[unit].items():
            sizes[factor] -= positions
    return terms.total(sizes)


@pytest.mark.parametrize("name", COUNTED)
def test_terms_foretell_the_narrowed_network(name: str) -> None:
    """Parameters, MACs and channels computed from kept counts are those of the network that removal makes."""
    groups = traced(name)
    before = count(groups.network)
    assert evaluate(parameter_terms(groups), set()) == before.params
    assert evaluate(mac_terms(groups), set()) == pytest.approx(before.macs, rel=1e-12)
    for seed, share in enumerate((0.2, 0.6)):
        if units := some_units(groups, share, seed, fragile=True):
            after = count(remove(groups, units))
            assert evaluate(parameter_terms(groups), units) == pytest.approx(after.params, rel=1e-12)
            assert evaluate(mac_terms(groups), units) == pytest.approx(after.macs, rel=1e-12)
            assert after.params < before.params


def test_channel_terms() -> None:
    """Every channel that a layer produces counts once."""
    groups = traced("resnet")
    assert channel_terms(groups).total() == sum(len(groups.channels(p.layer)) for p in groups.producers)
