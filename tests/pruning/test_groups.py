"""Which channels go together: by hand, against torch-pruning, and what is kept with its reason."""

import time
import warnings

import numpy as np
import pytest
import torch
import torch_pruning
from torch import nn
from zoo import KEPT, ZOO, Net, build, c2, conv, inputs, net, some_units, traced

from edgeprune.detectors.registry import build_detector
from edgeprune.pruning.graph import UnsupportedNetwork, trace
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.surgery import largest_difference, masked, remove


def coupled(groups: Groups, layer: str, channel: int) -> set[tuple[str, int]]:
    """All (layer, output channel) that go with one."""
    unit = groups.channels(layer)[channel]
    if unit == 0:
        return set()
    pairs = ((name, np.flatnonzero(ids == unit)) for name, ids in groups.outputs.items())
    return {(name, int(index)) for name, indices in pairs for index in indices}


# --- by hand ------------------------------------------------------------------------------------------------


def find(forward: object, **parts: object) -> Groups:
    torch.manual_seed(0)
    return find_groups(trace(net(forward, **parts)(), *inputs("")))


def test_residual_goes_together() -> None:
    """Summands share their units; what is inside the branch has its own."""
    groups = traced("resnet")
    assert coupled(groups, "0.0", 3) == {("0.0", 3), ("1.body.1.0", 3)}
    assert coupled(groups, "1.body.0.0", 3) == {("1.body.0.0", 3)}
    assert groups.protected == {"6": "an output of the network"}


def test_depthwise_with_a_multiplier() -> None:
    """Channel i makes channels 2i and 2i + 1."""
    assert coupled(traced("depthwise 2"), "a.0", 3) == {("a.0", 3), ("b", 6), ("b", 7)}


def test_blocks_of_a_grouped_convolution() -> None:
    """Two blocks of four lose the same place in both; four blocks of two lose a whole block."""
    assert coupled(traced("few blocks"), "a.0", 1) == {("a.0", 1), ("a.0", 5)}
    assert coupled(traced("few blocks"), "b", 1) == {("b", 1), ("b", 5)}
    assert coupled(traced("many blocks"), "a.0", 2) == {("a.0", 2), ("a.0", 3), ("b", 2), ("b", 3)}
    assert coupled(traced("transposed few blocks"), "b", 1) == {("b", 1), ("b", 5)}
    whole = {("a.0", 2), ("a.0", 3), ("b", 3), ("b", 4), ("b", 5)}
    assert coupled(traced("transposed many blocks"), "a.0", 2) == whole


def test_slices_and_shuffles() -> None:
    """Channels are followed to where they go."""
    assert coupled(traced("residual with a slice"), "a.0", 3) == {("a.0", 3), ("b", 1)}
    assert coupled(traced("uneven split"), "a.0", 0) == {("a.0", 0), ("a.0", 2)}
    assert coupled(traced("flip"), "a.0", 0) == {("a.0", 0), ("b", 7)}
    assert coupled(traced("channel shuffle"), "a.0", 1) == {("a.0", 1), ("a.0", 5)}
    assert coupled(traced("pixel shuffle"), "b", 5) == {("b", 4), ("b", 5), ("b", 6), ("b", 7)}
    assert coupled(traced("glu"), "b", 2) == {("b", 2), ("b", 10)}
    assert coupled(traced("stacked"), "a.0", 2) == {("a.0", 2), ("b", 2)}
    assert coupled(traced("select"), "a.0", 3) == set()


def test_heads_stay_whole() -> None:
    """With two heads of four, queries, keys and values of a head go together; a single head loses places."""
    two = coupled(traced("vit by hand"), "attention.qkv", 0)
    assert two == {("attention.qkv", part + place) for part in (0, 8, 16) for place in range(4)}
    assert two == coupled(traced("vit sdpa"), "attention.qkv", 0) | {
        pair for head in (1,) for pair in coupled(traced("vit sdpa"), "attention.qkv", 2 * head)
    }
    assert coupled(traced("vit one head"), "attention.qkv", 0) == {
        ("attention.qkv", place) for place in (0, 8, 16)
    }
    module = coupled(traced("vit module"), "attention.attention.in_proj_weight", 0)
    assert module == {("attention.attention.in_proj_weight", place) for _, place in two}


def test_one_gate_for_all_channels_stays() -> None:
    """The gate's only channel cannot go; what it gates is free."""
    for name in ("one gate for all", "one gate expanded"):
        groups = traced(name)
        assert not groups.channels("b").any()
        assert "spread over several" in groups.protected["b"]
        assert len(set(groups.channels("c").tolist()) - {0}) == 8


def test_picture_and_constants() -> None:
    """Padded channels bind nothing; parameters and constants per channel narrow with their channel."""
    assert len(set(traced("pad channels").channels("a.0").tolist())) == 8
    groups = traced("weights per channel")
    assert groups.axes["m", 0].tolist() == groups.channels("a.0").tolist() == groups.axes["s", 1].tolist()


def test_norm_groups_that_go_whole_are_not_fragile() -> None:
    """Four groups of two before a convolution with four blocks: a group norm's group goes as one."""
    groups = find(lambda n, x: n.z(n.c(n.b(n.a(x)))), b=lambda: nn.GroupNorm(4, 8), c=c2(8, 8, 1, groups=4))
    assert groups.units and not groups.fragile
    assert traced("group norm").fragile and traced("convnext").fragile
    assert not traced("instance norm").fragile


def test_pieces() -> None:
    """Every half of a chunk, and every weight, keeps a channel."""
    groups = traced("c2f chunk")
    halves = groups.channels("1.first.0")
    pieces = {frozenset(piece.tolist()) for piece in groups.pieces}
    assert {frozenset(halves[:6].tolist()), frozenset(halves[6:].tolist())} <= pieces


def test_protect() -> None:
    """A layer protected by name leaves the groups, with all that goes with it; an unknown name is refused."""
    groups = traced("resnet").protect(["1.body.1*"])
    left = {unit for group in groups.groups for unit in group.units}
    assert not left & set(groups.channels("0.0").tolist())
    assert left & set(groups.channels("1.body.0.0").tolist())
    assert groups.protected["1.body.1.0"] == "protected by name"
    with pytest.raises(
        UnsupportedNetwork, match=r"--protect nowhere: no layer of that name; there are .*0\.0"
    ):
        traced("resnet").protect(["nowhere"])


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_the_reason(name: str) -> None:
    """What cannot be followed keeps its channels and names the operation; what is left can be removed."""
    groups = traced(name)
    first = "b" if name == "added to the picture" else "a.0"
    assert not groups.channels(first).any()
    assert KEPT[name][1] in groups.protected[first]


def test_reason_names_the_module() -> None:
    """The module's path is in the message."""
    inner = nn.Sequential(
        conv(3, 8), Net(lambda n, x: n.c(x.sort(1)[0]), c=nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 2, 1)
    )
    groups = find_groups(trace(inner.eval(), *inputs("")))
    assert groups.protected["0.0"] == "1: sort.default cannot be followed"
    assert groups.channels("1.c").all()


# --- torch-pruning ------------------------------------------------------------------------------------------

SAME = [
    "resnet",
    "resnet bottleneck",
    "mobilenet v2",
    "mobilenet v3",
    "densenet",
    "inception",
    "unet",
    "convnext",
    "depthwise 1",
    "linear after flatten",
    "linear after pooling",
    "gate times x plus x",
    "squeeze-excite",
    "prelu",
    "concatenated with the picture",
    "upsample nearest",
    "transposed",
    "used twice",
    "max of two",
    "csp",
]


def torch_pruning_group(module: nn.Module, layer: str, channel: int, name: str) -> set[tuple[str, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(module, inputs(name))
    target = module.get_submodule(layer)
    group = graph.get_pruning_group(target, graph.get_pruner_of_module(target).prune_out_channels, [channel])
    names = {part: path for path, part in module.named_modules()}
    weighted = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
    found = set()
    for dependency, indices in group:
        out = graph.is_out_channel_pruning_fn(dependency.handler)
        if out and isinstance(dependency.target.module, weighted):
            found |= {(names[dependency.target.module], int(index)) for index in indices}
    return found


@pytest.mark.parametrize("name", SAME)
def test_torch_pruning_agrees(name: str) -> None:
    """The same (layer, output channel) go together, for first, middle and last channel of every layer."""
    groups = traced(name)
    for layer, ids in groups.outputs.items():
        for channel in (0, len(ids) // 2, len(ids) - 1):
            if ids[channel]:
                theirs = torch_pruning_group(build(name), layer, channel, name)
                assert coupled(groups, layer, channel) == theirs, (layer, channel)


@pytest.mark.parametrize(
    "name",
    [
        "c2f chunk",
        "c2f split",
        "c2f slice",
        "strided slice",
        "shufflenet v2",
        "depthwise 2",
        "few blocks",
        "many blocks",
        "transposed few blocks",
        "transposed many blocks",
        "transposed depthwise",
        "functional",
        "frozen",
        "index by a list",
    ],
)
def test_where_torch_pruning_breaks_ours_holds(name: str) -> None:
    """Chunk, split, slice, multiplier 2, blocks, functional weights, frozen layers: removal is exact."""
    groups = traced(name)
    units = some_units(groups, 0.5)
    assert units
    assert largest_difference(masked(groups, units), remove(groups, units), inputs(name)) < 1e-5
    if name == "frozen":
        assert groups.channels("b").all()


def test_grouped_convolutions_lose_as_little_as_they_can() -> None:
    """Two blocks of eight lose the same place in both, eight blocks of two a whole block: 8 units each.

    Here we differ from torch-pruning, whose group for a grouped convolution is a single input channel.
    """
    torch.manual_seed(0)
    for blocks, units in ((2, 8), (8, 8)):
        module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=blocks), nn.Conv2d(16, 2, 1))
        groups = find_groups(trace(module, torch.zeros(1, 3, 8, 8)))
        assert len(set(groups.channels("0").tolist())) == units


# --- size ---------------------------------------------------------------------------------------------------


def test_nanodet() -> None:
    """NanoDet-g: its groups in under 2 s, the three laterals in one group of 128, its heads' outputs kept."""
    network = trace(build_detector("nanodet-g", (320, 320)), torch.zeros(1, 3, 320, 320))
    began = time.perf_counter()
    groups = find_groups(network)
    assert time.perf_counter() - began < 2.0
    laterals = next(group for group in groups.groups if "laterals.0" in group.layers)
    assert laterals.layers == ("laterals.0", "laterals.1", "laterals.2") and len(laterals.units) == 128
    assert set(groups.protected.values()) == {"an output of the network"}
    assert all(layer.startswith("heads.") for layer in groups.protected)


def test_every_network_of_the_zoo_has_units() -> None:
    """None but the one whose channels are taken apart one by one."""
    assert [name for name in ZOO if not traced(name).units] == ["unbind"]
