"""The narrowed network is the original with the removed channels replaced by a constant."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from zoo import (
    ZOO,
    Attention,
    C2f,
    ConvNext,
    Dense,
    Inverted,
    Net,
    Residual,
    ShuffleUnit,
    SqueezeExcite,
    conv,
    inputs,
    shuffle,
    some_units,
    traced,
)

from edgeprune.pruning.graph import Network, tensors, trace
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.surgery import StandIn, channel_ids, largest_difference, masked, remove, replay

TOLERANCE = 1e-5


def assert_removal_is_exact(groups: Groups, units: set[int], pictures: tuple[Tensor, ...]) -> Network:
    narrow, reference = remove(groups, units), masked(groups, units)
    # In double precision: what is left of a difference then is not rounding.
    exact = tuple(picture.double() if picture.is_floating_point() else picture for picture in pictures)
    assert largest_difference(reference.double(), copy.deepcopy(narrow).double(), exact) < TOLERANCE
    return narrow


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    """Few, half and nearly all units; then a second round on the result, replayed from what is kept."""
    pictures = inputs(name, batch=3)
    groups = traced(name)
    network = groups.network
    assert groups.units or name == "unbind"
    for seed, share in enumerate((0.2, 0.6, 1.0)):
        narrow = (
            assert_removal_is_exact(groups, some_units(groups, share, seed), pictures)
            if groups.units
            else network
        )
        again = find_groups(narrow)
        units = some_units(again, 0.4, seed)
        twice = assert_removal_is_exact(again, units, pictures)
        replayed = replay(groups, twice.kept, twice.added_biases)
        replayed.load_state_dict(twice.state_dict(), strict=True)
        assert largest_difference(twice, replayed, pictures) == 0.0
        assert replayed.kept == twice.kept


# --- random networks ----------------------------------------------------------------------------------------

WIDTH = 8


def plain() -> nn.Module:
    return conv(WIDTH, WIDTH)


LEAVES = {
    "conv": plain,
    "bottleneck": lambda: Residual(WIDTH, WIDTH, 1, 2),
    "inverted": lambda: Inverted(WIDTH, WIDTH, 1, True),
    "excite": lambda: SqueezeExcite(WIDTH),
    "c2f": lambda: C2f(WIDTH, WIDTH, 1),
    "dense": lambda: nn.Sequential(Dense(WIDTH, 3, 2), nn.Conv2d(WIDTH + 6, WIDTH, 1)),
    "shuffle": lambda: ShuffleUnit(WIDTH, 1),
    "convnext": ConvNext,
    "few blocks": lambda: nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=2),
    "many blocks": lambda: nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=4),
    "depthwise 2": lambda: nn.Sequential(nn.Conv2d(8, 16, 3, 1, 2, 2, 8), nn.PReLU(16), nn.Conv2d(16, 8, 1)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(8, 12, 2, 2, groups=2), nn.Conv2d(12, 8, 2, 2)),
    "pixels": lambda: nn.Sequential(
        nn.PixelUnshuffle(2), conv(32, 16), nn.PixelShuffle(2), nn.Conv2d(4, 8, 1)
    ),
    "group norm": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.GroupNorm(4, WIDTH), nn.SiLU()),
    "upsample": lambda: nn.Sequential(nn.MaxPool2d(2), plain(), nn.Upsample(scale_factor=2, mode="bilinear")),
    "attention": lambda: Net(
        lambda net, x: net.t(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape),
        t=Attention(WIDTH, 2, "sdpa"),
    ),
    "flip and roll": lambda: Net(lambda net, x: net.a(x.flip(1).roll(2, 1)), a=plain()),
    "indexed": lambda: Net(
        lambda net, x: net.a(x[:, net.i]), a=plain(), i=torch.tensor([0, 7, 2, 5, 4, 3, 6, 1])
    ),
}
COMBINATIONS = {
    "row": nn.Sequential,
    "sum": lambda a, b: Net(lambda net, x: net.a(x) + net.b(x), a=a, b=b),
    "residual": lambda a, b: Net(lambda net, x: functional.relu_(net.b(net.a(x)) + x), a=a, b=b),
    "gate": lambda a, b: Net(lambda net, x: torch.sigmoid(net.a(x)) * net.b(x), a=a, b=b),
    "pooled gate": lambda a, b: Net(lambda net, x: net.b(x) * net.a(x).mean((2, 3), keepdim=True), a=a, b=b),
    "joined": lambda a, b: Net(
        lambda net, x: net.c(torch.cat((net.a(x), x, net.b(x)), 1)),
        a=a,
        b=b,
        c=nn.Conv2d(3 * WIDTH, WIDTH, 1),
    ),
    "shuffled": lambda a, b: Net(
        lambda net, x: net.c(shuffle(torch.cat((net.a(x), net.b(x)), 1), 2)),
        a=a,
        b=b,
        c=nn.Conv2d(2 * WIDTH, WIDTH, 1),
    ),
    "halves": lambda a, b: Net(lambda net, x: torch.cat((net.a(x)[:, ::2], net.b(x)[:, 4:]), 1), a=a, b=b),
    "sliced residual": lambda a, b: Net(
        lambda net, x: torch.cat(((y := net.a(x))[:, :3] + net.b(x)[:, 2:5], y[:, 3:]), 1),
        a=a,
        b=b,
    ),
    "shared": lambda a, b: Net(lambda net, x: net.b(net.a(net.a(x))), a=a, b=b),
}
trees = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda part: st.tuples(st.sampled_from(sorted(COMBINATIONS)), part, part),
    max_leaves=5,
)


def grow(tree: object) -> nn.Module:
    if isinstance(tree, str):
        return LEAVES[tree]()
    assert isinstance(tree, tuple)
    return COMBINATIONS[tree[0]](grow(tree[1]), grow(tree[2]))


@given(trees, st.integers(0, 1000), st.floats(0.0, 1.0))
def test_random_networks(tree: object, seed: int, share: float) -> None:
    """Blocks nested at random: removal is exact, shapes are the units', gradients reach every parameter."""
    torch.manual_seed(seed)
    module = nn.Sequential(conv(3, WIDTH), grow(tree), nn.Conv2d(WIDTH, 3, 1)).eval()
    pictures = (torch.randn(2, 3, 16, 16),)
    network = trace(module, *pictures)
    groups = find_groups(network)
    units = some_units(groups, share, seed)
    if not units:
        return
    narrow = assert_removal_is_exact(groups, units, pictures)
    gone = np.isin(np.arange(groups.units + 1), sorted(units))
    for name, tensor in tensors(network):
        for axis, size in enumerate(
            dict(tensors(narrow))[name].shape if name in dict(tensors(narrow)) else ()
        ):
            ids = groups.axes.get((name, axis))
            assert size == (tensor.shape[axis] if ids is None else int((~gone[ids]).sum())), (name, axis)
    narrow.train()
    sum(leaf.square().mean() for leaf in pytree.tree_leaves(narrow(*pictures))).backward()
    assert all(parameter.grad is not None for parameter in narrow.parameters())


# --- folded means -------------------------------------------------------------------------------------------


class OwnBias(nn.Module):
    """A convolution whose bias is a parameter that it adds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Module()
        self.second.weight = nn.Parameter(torch.randn(5, 6, 1, 1))
        self.second.bias = nn.Parameter(torch.randn(5))
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.conv2d(functional.silu(self.first(images)), self.second.weight)
        last: Tensor = self.last(functional.silu(features + self.second.bias.view(1, -1, 1, 1)))
        return last


UNPADDED = {
    "bias added by hand": OwnBias,
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 2, 3)
    ),
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 2, 1)
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(), nn.Conv2d(8, 2, 1)
    ),
    "linear": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
    ),
    "functional": lambda: Net(
        lambda net, x: functional.conv2d(functional.silu(functional.conv2d(x, net.v)), net.w),
        v=nn.Parameter(torch.randn(6, 3, 1, 1)),
        w=nn.Parameter(torch.randn(2, 6, 1, 1)),
    ),
    "used twice": lambda: Net(
        lambda net, x: net.c(net.b(torch.relu(net.b(net.a(x))))),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(6, 6, 1, bias=False),
        c=nn.Conv2d(6, 2, 1),
    ),
    "one weight, two biases": lambda: Net(
        lambda net, x: functional.conv2d(torch.relu(functional.conv2d(net.a(x), net.w, net.p)), net.w, net.q),
        a=nn.Conv2d(3, 6, 1),
        w=nn.Parameter(torch.randn(6, 6, 1, 1)),
        p=nn.Parameter(torch.randn(6)),
        q=nn.Parameter(torch.randn(6)),
    ),
    "two weights, one bias": lambda: Net(
        lambda net, x: net.z(
            functional.conv2d(net.a(x), net.w, net.p) + functional.conv2d(net.b(x), net.v, net.p)
        ),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(3, 6, 1),
        w=nn.Parameter(torch.randn(6, 6, 1, 1)),
        z=nn.Conv2d(6, 2, 1),
        v=nn.Parameter(torch.randn(6, 6, 1, 1)),
        p=nn.Parameter(torch.randn(6)),
    ),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.SiLU(), nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(4, 2, 1)
    ),
}


@pytest.mark.parametrize("name", UNPADDED)
def test_folded_means(name: str) -> None:
    """A removed channel leaves its mean in the readers' biases: as with that constant in its place."""
    torch.manual_seed(0)
    module = UNPADDED[name]()
    pictures = (torch.randn(2, 3, 12, 12),)
    groups = find_groups(trace(module, *pictures))
    means = {
        r.weight: StandIn(None, torch.randn(len(channel_ids(groups, r))))
        for r in groups.readers
        if r.weight and r.foldable
    }
    for seed in range(3):
        units = some_units(groups, 0.5, seed)
        if not units:
            continue
        narrow = remove(groups, units, means)
        assert largest_difference(masked(groups, units, means), narrow, pictures) < TOLERANCE
        replayed = replay(groups, narrow.kept, narrow.added_biases)
        replayed.load_state_dict(narrow.state_dict(), strict=True)
        assert largest_difference(narrow, replayed, pictures) == 0.0


def test_constant_channel_goes_without_a_trace() -> None:
    """A dead channel with batch norm bias 2 before SiLU: folding its constant leaves the output as it was."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 3)).eval()
    with torch.no_grad():
        module[1].weight[3], module[1].bias[3] = 0.0, 2.0
    pictures = (torch.randn(2, 3, 12, 12),)
    network = trace(module, *pictures)
    groups = find_groups(network)
    unit = int(groups.channels("0")[3])
    constant = torch.zeros(8)
    constant[3] = functional.silu(torch.tensor(2.0))
    assert (
        largest_difference(network, remove(groups, {unit}, {"3.weight": StandIn(None, constant)}), pictures)
        < TOLERANCE
    )
    assert largest_difference(network, remove(groups, {unit}), pictures) > 0.01


# --- norms over channels ------------------------------------------------------------------------------------


def narrow_layers(layers: nn.Sequential, kept: Tensor) -> nn.Sequential:
    """Conv, norm, conv with the kept middle channels, made by hand."""
    first, norm, last = (copy.deepcopy(layer) for layer in layers)
    first.weight, first.bias = nn.Parameter(first.weight[kept]), nn.Parameter(first.bias[kept])
    norm.weight, norm.bias = nn.Parameter(norm.weight[kept]), nn.Parameter(norm.bias[kept])
    last.weight = nn.Parameter(last.weight[:, kept])
    return nn.Sequential(first, norm, last)


def test_group_norm_is_a_narrow_group_norm() -> None:
    """Two groups of four lose the same places: a group norm with two groups of two."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))
    nn.init.uniform_(module[1].weight)
    groups = find_groups(trace(module, torch.zeros(1, 3, 9, 9)))
    ids = groups.channels("0")
    assert groups.fragile == set(ids.tolist()) and ids[:4].tolist() == ids[4:].tolist()
    narrow = remove(groups, {int(ids[1]), int(ids[2])})
    by_hand = narrow_layers(module, torch.tensor([0, 3, 4, 7]))
    by_hand[1].num_channels = 4
    pictures = torch.randn(2, 3, 9, 9)
    assert torch.allclose(narrow(pictures), by_hand(pictures), atol=1e-6)


def test_layer_norm_is_a_narrow_layer_norm() -> None:
    """Over channels last, between linear layers."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    nn.init.uniform_(module[1].weight)
    groups = find_groups(trace(module, torch.zeros(1, 7, 5)))
    ids = groups.channels("0")
    assert groups.fragile == set(ids.tolist())
    narrow = remove(groups, {int(ids[0]), int(ids[6])})
    by_hand = narrow_layers(module, torch.tensor([1, 2, 3, 4, 5, 7]))
    by_hand[1].normalized_shape = (6,)
    rows = torch.randn(2, 7, 5)
    assert torch.allclose(narrow(rows), by_hand(rows), atol=1e-6)


# --- what is handed on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenet v3", "vit module", "shufflenet v2", "tied", "frozen"])
def test_result_is_a_network_like_any_other(name: str) -> None:
    """It deep-copies, trains, loads its state dict strictly, and what was frozen stays frozen."""
    pictures = inputs(name)
    groups = traced(name)
    network = groups.network
    narrow = remove(groups, some_units(groups, 0.4))
    frozen = {key for key, parameter in network.named_parameters() if not parameter.requires_grad}
    assert {key for key, parameter in narrow.named_parameters() if not parameter.requires_grad} == frozen
    twin = copy.deepcopy(narrow)
    twin.load_state_dict(narrow.state_dict(), strict=True)
    assert largest_difference(narrow, twin, pictures) == 0.0
    twin.train()(*pictures).square().mean().backward()
    torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], 0.1).step()
    assert largest_difference(narrow, twin.eval(), pictures) > 0.0
    for key, parameter in twin.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert key not in frozen or torch.equal(parameter, dict(narrow.named_parameters())[key])


def test_original_is_not_changed() -> None:
    """Removal makes a new network; the one that was traced computes what it did."""
    pictures = inputs("resnext")
    groups = traced("resnext")
    network = groups.network
    before, code = network(*pictures), network.code
    remove(groups, some_units(groups, 0.5))
    assert torch.equal(network(*pictures), before) and network.code == code


def test_impossible_removals_are_refused() -> None:
    """A unit that is not there, and a layer without channels."""
    groups = traced("resnet")
    with pytest.raises(ValueError, match="no unit 0"):
        remove(groups, {0})
    with pytest.raises(ValueError, match="without channels"):
        remove(groups, set(range(1, groups.units + 1)))


def test_specifications_that_do_not_fit_are_refused() -> None:
    """replay takes no unknown layer, no channel that is not there, and none apart from those it goes with."""
    groups = traced("mobilenet v2")
    layer = groups.producers[0].layer
    coupled = next(group.layers for group in groups.groups if len(group.layers) > 1)
    for kept, message in (
        ({"nowhere": (0,)}, "no layer 'nowhere'"),
        ({layer: (0, 0)}, "names others"),
        ({layer: (0, 99)}, "names others"),
        ({coupled[0]: (0,)}, "belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            replay(groups, kept, ())


def test_blocks_that_change_their_kind_are_replayed() -> None:
    """Four blocks of four first lose places in every block, then whole blocks; both are found again."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 2, 1))
    pictures = (torch.randn(2, 3, 8, 8),)
    groups = find_groups(trace(module, *pictures))
    narrow, current = None, groups
    for _ in range(3):
        narrow = remove(current, {int(current.channels("1")[0])})
        narrow = remove(find_groups(narrow), {int(find_groups(narrow).channels("0")[0])})
        current = find_groups(narrow)
    assert narrow is not None and narrow.get_parameter("1.weight").shape[0] < 16
    replayed = replay(groups, narrow.kept, ())
    replayed.load_state_dict(narrow.state_dict(), strict=True)
    assert largest_difference(narrow, replayed, pictures) == 0.0


def test_what_is_not_a_number_differs() -> None:
    """An output that is not a number is no small difference."""
    network = trace(nn.Conv2d(1, 2, 1), torch.zeros(1, 1, 2, 2))
    broken = copy.deepcopy(network)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    images = (torch.zeros(1, 1, 2, 2),)
    assert largest_difference(network, network, images) == 0
    assert math.isnan(largest_difference(network, broken, images))
    assert math.isnan(largest_difference(broken, network, images))
