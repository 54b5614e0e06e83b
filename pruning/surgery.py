"""Physical removal: narrow every tensor and every constant of the graph that the removed units appear in.

The narrowed network computes what the original computes with each removed channel replaced, where it is read,
by a stand-in: zero, a constant, or a linear combination of the channels that stay (`replacement.py` makes
them). The stand-in moves into the reader's weight and bias; a constant is exact away from padded borders
only. `masked` builds that reference from the original, and `largest_difference` compares the two.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from edgeprune.pruning.graph import (
    Network,
    argument,
    assemble,
    aten,
    copy_graph,
    layer_of,
    operation,
    shapes,
    tensors,
    where,
)
from edgeprune.pruning.groups import Groups, Labels, Reader, find_groups
from edgeprune.pruning.labels import by_position, constant

Mask = npt.NDArray[np.bool_]


class StandIn(NamedTuple):
    """What the removed ones of a weight's input channels are read as."""

    matrix: Tensor | None
    """``(C, C)``: x is read as ``matrix @ x + constant``; columns of removed channels are zero, rows of kept
    ones those of the unit matrix. None: only the constant is left of a removed channel."""
    constant: Tensor
    """``(C,)``; counts for removed channels only."""


StandIns = Mapping[str, StandIn]  # by weight


def remove(groups: Groups, units: Collection[int], stand_ins: StandIns | None = None) -> Network:
    """A new network without `units`; the one that `groups` describes is not changed.

    Args:
        units: ids from 1 to `groups.units`.
        stand_ins: what removed channels leave behind, for readers that can carry it; elsewhere they
            leave zero.

    Raises:
        ValueError: If a unit does not exist or a layer would be left without channels.
    """
    gone = _gone(groups, units)
    for piece in groups.pieces:
        if gone[piece].all():
            raise ValueError("a tensor would be left without channels")
    network = groups.network
    stand_ins = _carried(groups, stand_ins or {})
    values: dict[str, Tensor] = {}
    for name, tensor in tensors(network):
        narrowed = tensor.detach()
        if name in stand_ins and (matrix := stand_ins[name].matrix) is not None:
            narrowed = torch.einsum("oi...,ij->oj...", narrowed.double(), matrix.to(narrowed.device)).to(
                narrowed
            )
        for axis in range(tensor.dim()):
            ids = groups.axes.get((name, axis))
            if ids is not None and gone[ids].any():
                index = torch.from_numpy(np.flatnonzero(~gone[ids])).to(tensor.device)
                narrowed = narrowed.index_select(axis, index)
        narrowed = narrowed.clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        values[name] = (
            nn.Parameter(narrowed, requires_grad=tensor.requires_grad) if is_parameter else narrowed
        )
    graph = copy_graph(network.graph)
    twins = dict(zip(network.graph.nodes, graph.nodes, strict=True))
    _rewrite(groups, gone, twins, values)
    biases = list(network.added_biases)
    for weight, shift in _bias_shifts(groups, gone, stand_ins).items():
        biases += _add_bias(graph, values, weight, shift)
    graph.eliminate_dead_code()
    result = assemble(values, graph, network)
    result.added_biases = tuple(biases)
    for layer, ids in groups.outputs.items():
        before = network.kept.get(layer, tuple(range(len(ids))))
        if gone[ids].any():
            result.kept[layer] = tuple(np.asarray(before)[~gone[ids]].tolist())
    _check_shapes(groups, gone, result)
    return result


def masked(groups: Groups, units: Collection[int], stand_ins: StandIns | None = None) -> Network:
    """The original with removed channels replaced where they are read: what `remove` must equal."""
    gone = _gone(groups, units)
    network = groups.network
    graph = copy_graph(network.graph)
    twins = dict(zip(network.graph.nodes, graph.nodes, strict=True))
    values = {name: tensor.detach().clone() for name, tensor in tensors(network)}
    stand_ins = _carried(groups, stand_ins or {})
    for index, reader in enumerate(groups.readers):
        ids = channel_ids(groups, reader)
        if not gone[ids].any():
            continue
        like = _like(values)
        lost = torch.from_numpy(gone[ids]).to(like)
        stand_in = stand_ins.get(reader.weight or "", StandIn(None, torch.zeros_like(lost)))
        matrix = torch.diag(1 - lost) if stand_in.matrix is None else stand_in.matrix.to(like)
        values[f"matrix_{index}"], values[f"constant_{index}"] = matrix.T, lost * stand_in.constant.to(like)
        node = twins[reader.node]
        with graph.inserting_before(node):
            # Channels last, times the matrix, and back.
            moved = graph.call_function(aten.movedim.int, (node.args[reader.position], reader.dim, -1))
            mixed = graph.call_function(aten.matmul.default, (moved, graph.get_attr(f"matrix_{index}")))
            shifted = graph.call_function(aten.add.Tensor, (mixed, graph.get_attr(f"constant_{index}")))
            node.update_arg(reader.position, graph.call_function(aten.movedim.int, (shifted, -1, reader.dim)))
    return assemble(values, graph, network)


def largest_difference(left: Network, right: Network, inputs: tuple[Tensor, ...]) -> float:
    """Largest difference of any output, relative to that output's range in `left`; both run in eval mode.

    Not a number where an output is.
    """
    modes = left.training, right.training
    with torch.no_grad():
        a = pytree.tree_leaves(left.eval()(*inputs))
        b = pytree.tree_leaves(right.eval()(*inputs))
    left.train(modes[0])
    right.train(modes[1])
    differences = [
        (x - y).abs().max().item() / ((x.max() - x.min()).item() or 1.0) for x, y in zip(a, b, strict=True)
    ]
    return float(np.max(differences))  # not a number where one is; Python's max would drop it


def replay(groups: Groups, kept: Mapping[str, Collection[int]], added_biases: Collection[str]) -> Network:
    """Narrow an unpruned network to the channels that a specification keeps; its weights are loaded
    afterwards.

    What goes together can change as a network narrows (a grouped convolution first loses places in every
    block, then whole blocks), so removal is repeated until nothing is left to remove.

    Raises:
        ValueError: If the specification does not fit the network.
    """
    for layer, channels in kept.items():
        if layer not in groups.outputs:
            raise ValueError(f"no layer {layer!r} in the network")
        count = len(groups.channels(layer))
        if len(set(channels)) != len(channels) or not set(channels) <= set(range(count)):
            raise ValueError(f"layer {layer!r} has {count} channels; the specification names others")
    while units := _units_outside(groups, kept):
        groups = find_groups(remove(groups, units))
    narrow = groups.network
    if {layer: tuple(channels) for layer, channels in kept.items()} != narrow.kept:
        raise ValueError("the specification keeps channels apart that belong together")
    graph = copy_graph(narrow.graph)
    values = {name: copy.deepcopy(tensor) for name, tensor in tensors(narrow)}
    weights = {layer_of(reader.weight): reader.weight for reader in groups.readers if reader.weight}
    for layer in added_biases:
        if layer not in weights:
            raise ValueError(f"no layer {layer!r} in the network")
        outputs = values[weights[layer]].shape[0]
        _add_bias(graph, values, weights[layer], values[weights[layer]].new_zeros(outputs))
    result = assemble(values, graph, narrow)
    result.added_biases = tuple(added_biases)
    return result


def _units_outside(groups: Groups, kept: Mapping[str, Collection[int]]) -> set[int]:
    """Units none of whose channels a specification keeps."""
    lost: set[int] = set()
    held = {0}
    for layer, ids in groups.outputs.items():
        original = groups.network.kept.get(layer, range(len(ids)))
        stays = set(kept.get(layer, original))
        for unit, channel in zip(ids.tolist(), original, strict=True):
            (held if channel in stays else lost).add(unit)
    return lost - held


def channel_ids(groups: Groups, reader: Reader) -> npt.NDArray[np.int64]:
    """Unit ids along the channel axis of what a reader reads."""
    labels = _labels(groups, reader.tensor)
    return np.broadcast_to(by_position(labels.array, reader.dim)[:, 0], (labels.shape[reader.dim],))


def removable_readers(groups: Groups) -> tuple[Reader, ...]:
    """Readers of channels that may go: not of pictures, nor of what is protected as a whole."""
    removable = _gone(groups, [unit for group in groups.groups for unit in group.units])
    return tuple(reader for reader in groups.readers if removable[channel_ids(groups, reader)].any())


def _add_bias(graph: fx.Graph, values: dict[str, Tensor], weight: str, shift: Tensor) -> list[str]:
    """Add `shift` to the bias of all that uses `weight`; returns the layer if it had no bias before."""
    users = [
        node for node in graph.nodes if any(_is_constant(source, weight) for source in node.all_input_nodes)
    ]
    bias = argument(users[0], "bias")
    if bias is not None:
        old = values[bias.target]
        values[bias.target] = nn.Parameter(old.detach() + shift, requires_grad=old.requires_grad)
        return []
    name = f"{layer_of(weight)}.bias" if weight.endswith(".weight") else f"{weight}_bias"
    while name in values:  # a layer that adds a bias of its own by hand
        name += "_"
    values[name] = nn.Parameter(shift.clone(), requires_grad=values[weight].requires_grad)
    for node in users:
        with graph.inserting_before(node):
            node.args = (*node.args[:2], graph.get_attr(name), *node.args[3:])
    return [layer_of(weight)]


def _is_constant(node: fx.Node, name: str) -> bool:
    return node.op == "get_attr" and node.target == name


def _like(values: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the network's own type and device."""
    return next(value for value in values.values() if value.is_floating_point())


def _gone(groups: Groups, units: Collection[int]) -> Mask:
    gone = np.zeros(groups.units + 1, dtype=bool)
    for unit in units:
        if not 1 <= unit <= groups.units:
            raise ValueError(f"no unit {unit}; there are 1 to {groups.units}")
        gone[unit] = True
    return gone


def _labels(groups: Groups, node: fx.Node) -> Labels:
    labels = groups.nodes[node]
    assert isinstance(labels, Labels)
    return labels


def _carried(groups: Groups, stand_ins: StandIns) -> dict[str, StandIn]:
    """Stand-ins of the weights whose readers can carry them."""
    able = {reader.weight for reader in groups.readers if reader.foldable}
    return {weight: stand_in for weight, stand_in in stand_ins.items() if weight in able}


def _bias_shifts(groups: Groups, gone: Mask, stand_ins: StandIns) -> dict[str, Tensor]:
    """What the constants add to each reader's outputs that stay."""
    shifts: dict[str, Tensor] = {}
    weights = dict(tensors(groups.network))
    for reader in groups.readers:
        if reader.weight is None or reader.weight in shifts or reader.weight not in stand_ins:
            continue
        ids = channel_ids(groups, reader)
        if not gone[ids].any():
            continue
        weight = weights[reader.weight].detach()
        constant = stand_ins[reader.weight].constant.to(weight) * torch.from_numpy(gone[ids]).to(weight)
        taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight  # (out, in of a block)
        blocks = len(ids) // taps.shape[1]
        by_block = taps.reshape(blocks, -1, taps.shape[1])
        shift = torch.einsum("boi,bi->bo", by_block.double(), constant.double().reshape(blocks, -1)).flatten()
        outputs = groups.axes.get((reader.weight, 0))
        if outputs is not None:
            shift = shift[torch.from_numpy(~gone[outputs]).to(shift.device)]
        shifts[reader.weight] = shift.to(weight)
    return shifts


# --- constants of the graph ---------------------------------------------------------------------------------


def _kept_counts(labels: Labels, gone: Mask) -> list[int]:
    """The shape that is left."""
    counts = list(labels.shape)
    for axis, size in enumerate(labels.array.shape):
        if size > 1:
            counts[axis] = int((~gone[by_position(labels.array, axis)[:, 0]]).sum())
    return counts


def _rewrite(groups: Groups, gone: Mask, twins: Mapping[fx.Node, fx.Node], values: dict[str, Tensor]) -> None:
    for node, twin in twins.items():
        held = groups.nodes.get(node)
        if node.op != "call_function" or held is None:
            continue
        touched = [node, *node.all_input_nodes]
        if not any(
            gone[labels.array].any()
            for part in touched
            if part in groups.nodes
            for labels in _as_list(groups.nodes[part])
        ):
            continue
        rule = _REWRITES.get(operation(node))
        if rule is not None:
            rule(_Edit(groups, gone, node, twin, values))


def _as_list(held: Any) -> list[Labels]:
    return held if isinstance(held, list) else [held] if isinstance(held, Labels) else []


class _Edit:
    """One operation whose constants are to be narrowed."""

    def __init__(
        self, groups: Groups, gone: Mask, node: fx.Node, twin: fx.Node, values: dict[str, Tensor]
    ) -> None:
        self.groups, self.gone, self.node, self.twin, self.values = groups, gone, node, twin, values

    def labels(self, node: fx.Node | None = None) -> Labels:
        return _labels(self.groups, node or self.node)

    def source(self) -> fx.Node:
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        return source

    def set(self, name: str, value: Any) -> None:
        schema = self.node.target._schema  # type: ignore[union-attr]
        for position, declared in enumerate(schema.arguments):
            if declared.name == name:
                if position < len(self.twin.args):
                    self.twin.update_arg(position, value)
                else:
                    self.twin.update_kwarg(name, value)
                return
        raise AssertionError(f"{self.node.target} has no argument {name}")

    def survivors(self, node: fx.Node, dim: int) -> Mask:
        """Which positions along `dim` of a node's result stay."""
        labels = self.labels(node)
        dim %= len(labels.shape)
        if labels.array.shape[dim] < 2:  # channels lie along another axis
            return np.ones(labels.shape[dim], dtype=bool)
        return ~self.gone[by_position(labels.array, dim)[:, 0]]

    def sizes(self, given: Sequence[Any], kept: Sequence[int], shape: Sequence[int]) -> list[Any]:
        """Sizes for a view: `given`, with a new constant where channels went; -1 stays inferred."""
        new = list(given)
        for axis, (left, full) in enumerate(zip(kept, shape, strict=True)):
            if left == full or given[axis] == -1:
                continue
            new[axis] = left
            if isinstance(given[axis], fx.Node):  # the batch times some channels
                with self.twin.graph.inserting_before(self.twin):
                    product = self.twin.graph.call_function(operator.mul, (given[axis], left))
                    new[axis] = self.twin.graph.call_function(operator.floordiv, (product, full))
        return new

    def pick(self, dim: int, positions: npt.NDArray[np.int64]) -> None:
        """Replace the operation by taking `positions` along `dim` of its (narrowed) source."""
        name = f"{self.node.name}_index"
        self.values[name] = torch.from_numpy(positions).to(_like(self.values).device)
        with self.twin.graph.inserting_before(self.twin):
            index = self.twin.graph.get_attr(name)
        if positions.ndim == 1:
            self.twin.target, self.twin.args = aten.index_select.default, (self.twin.args[0], dim, index)
        else:
            self.twin.target, self.twin.args = aten.index.Tensor, (self.twin.args[0], [None] * dim + [index])
        self.twin.kwargs = {}


def _view(edit: _Edit) -> None:
    name = "size" if argument(edit.node, "size") is not None else "shape"
    labels = edit.labels()
    edit.set(name, edit.sizes(argument(edit.twin, name), _kept_counts(labels, edit.gone), labels.shape))


def _unflatten(edit: _Edit) -> None:
    dim = int(argument(edit.node, "dim")) % len(edit.labels(edit.source()).shape)
    given = argument(edit.twin, "sizes")
    own = slice(dim, dim + len(given))
    labels = edit.labels()
    edit.set("sizes", edit.sizes(given, _kept_counts(labels, edit.gone)[own], labels.shape[own]))


def _expand(edit: _Edit) -> None:
    """Only copies are counted; where the source has more than one position, -1 takes it as it is."""
    labels, source = edit.labels(), edit.labels(edit.source()).shape
    offset = len(labels.shape) - len(source)
    given = [
        size if axis < offset or source[axis - offset] == 1 else -1
        for axis, size in enumerate(argument(edit.twin, "size"))
    ]
    edit.set("size", edit.sizes(given, _kept_counts(labels, edit.gone), labels.shape))


def _squeeze(edit: _Edit) -> None:
    """An axis that is narrowed down to one channel is not one to squeeze."""
    shape = edit.labels(edit.source()).shape
    given = argument(edit.node, "dim")
    dims = range(len(shape)) if given is None else [given] if isinstance(given, int) else given
    edit.twin.target = aten.squeeze.dims
    edit.twin.args, edit.twin.kwargs = (edit.twin.args[0], [dim for dim in dims if shape[dim] == 1]), {}


def _pad(edit: _Edit) -> None:
    """A negative amount takes positions away, of which some may be gone."""
    amounts = [int(amount) for amount in argument(edit.node, "pad")]
    for index, amount in enumerate(amounts):
        if amount < 0:
            stays = edit.survivors(edit.source(), -1 - index // 2)
            amounts[index] = -int((stays[amount:] if index % 2 else stays[:-amount]).sum())
    edit.set("pad", amounts)


def _split(edit: _Edit) -> None:
    dim = int(argument(edit.node, "dim") or 0)
    pieces: list[Labels] = edit.groups.nodes[edit.node]
    axis = dim % len(pieces[0].shape)
    counts = [_kept_counts(piece, edit.gone)[axis] for piece in pieces]
    edit.twin.target = aten.split_with_sizes.default
    edit.twin.args, edit.twin.kwargs = (edit.twin.args[0], counts, dim), {}


def _slice(edit: _Edit) -> None:
    dim, step = int(argument(edit.node, "dim") or 0), int(argument(edit.node, "step") or 1)
    stays = edit.survivors(edit.source(), dim)
    if stays.all():
        return
    taken = np.arange(len(stays))[slice(argument(edit.node, "start"), argument(edit.node, "end"), step)]
    positions = _rank(stays)[taken[stays[taken]]]
    if step == 1:
        first = int(positions[0]) if len(positions) else 0
        edit.set("start", first)
        edit.set("end", first + len(positions))
    else:
        edit.pick(dim, positions)


def _select(edit: _Edit) -> None:
    dim, index = int(argument(edit.node, "dim")), int(argument(edit.node, "index"))
    stays = edit.survivors(edit.source(), dim)
    edit.set("index", int(_rank(stays)[index]))


def _narrow(edit: _Edit) -> None:
    dim, start, length = (int(argument(edit.node, name)) for name in ("dim", "start", "length"))
    stays = edit.survivors(edit.source(), dim)
    start %= len(stays)
    edit.set("start", int(stays[:start].sum()))
    edit.set("length", int(stays[start : start + length].sum()))


def _pick(edit: _Edit) -> None:
    """Indexing by constants: follow each position to where it lies now."""
    if operation(edit.node) == "index":
        indices: Any = edit.node.args[1]
        dims = [axis for axis, index in enumerate(indices) if index is not None]
        held = [indices[dim] for dim in dims]
    else:
        dims, held = [int(argument(edit.node, "dim"))], [argument(edit.node, "index")]
    for dim, index in zip(dims, held, strict=True):
        stays = edit.survivors(edit.source(), dim)
        if stays.all():
            continue
        network = edit.groups.network
        positions = constant(network, shapes(network), index).cpu().numpy() % len(stays)
        for axis in range(positions.ndim):
            positions = np.compress(
                edit.survivors(edit.node, dim % len(edit.labels(edit.source()).shape) + axis),
                positions,
                axis=axis,
            )
        edit.pick(dim, _rank(stays)[positions])


def _roll(edit: _Edit) -> None:
    """Rolling channels by a constant has no narrow twin: take them in their new order."""
    dims, shifts = list(argument(edit.node, "dims")), list(argument(edit.node, "shifts"))
    for dim, shift in zip(dims, shifts, strict=True):
        stays = edit.survivors(edit.source(), dim)
        if not stays.all():
            others = [axis for axis in range(len(dims)) if dims[axis] != dim]
            if others:
                arguments = (
                    edit.twin.args[0],
                    *([given[axis] for axis in others] for given in (shifts, dims)),
                )
                with edit.twin.graph.inserting_before(edit.twin):
                    edit.twin.update_arg(0, edit.twin.graph.call_function(aten.roll.default, arguments))
            order = np.roll(np.arange(len(stays)), shift)
            edit.pick(dim, _rank(stays)[order[stays[order]]])
            return


def _rank(stays: Mask) -> npt.NDArray[np.int64]:
    """Where each surviving position lies now."""
    return np.cumsum(stays) - 1


def _blocks(edit: _Edit) -> None:
    """Grouped convolution: whole blocks went, or the same place in every block."""
    blocks = int(argument(edit.node, "groups"))
    if blocks == 1:
        return
    if _whole_blocks(edit, edit.survivors(edit.source(), 1).reshape(blocks, -1)):
        edit.set("groups", int(edit.survivors(edit.source(), 1).reshape(blocks, -1)[:, 0].sum()))


def _group_norm(edit: _Edit) -> None:
    blocks = int(argument(edit.node, "num_groups"))
    stays = edit.survivors(edit.node, 1).reshape(blocks, -1)
    if _whole_blocks(edit, stays):
        edit.set("num_groups", int(stays[:, 0].sum()))


def _whole_blocks(edit: _Edit, stays: Mask) -> bool:
    """Whether what is left is whole rows of the grid (then their number fell) or whole columns."""
    return bool((stays == stays[:, :1]).all())


def _shuffle(edit: _Edit) -> None:
    blocks = int(argument(edit.node, "groups"))
    stays = edit.survivors(edit.source(), 1).reshape(blocks, -1)
    if _whole_blocks(edit, stays):
        edit.set("groups", int(stays[:, 0].sum()))


def _layer_norm(edit: _Edit) -> None:
    axes = len(argument(edit.node, "normalized_shape"))
    edit.set("normalized_shape", _kept_counts(edit.labels(), edit.gone)[-axes:])


def _attention(edit: _Edit) -> None:
    """The default scale is 1/sqrt(size of a head): state it, so that it stays the original's."""
    if argument(edit.node, "scale") is None:
        edit.twin.update_kwarg("scale", float(edit.labels(edit.source()).shape[-1]) ** -0.5)


_REWRITES: dict[str, Callable[[_Edit], None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    "unflatten": _unflatten,
    "expand": _expand,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "slice": _slice,
    "select": _select,
    "squeeze": _squeeze,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "narrow": _narrow,
    **dict.fromkeys(("index", "index_select"), _pick),
    "roll": _roll,
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _blocks
    ),
    "group_norm": _group_norm,
    "channel_shuffle": _shuffle,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "scaled_dot_product_attention": _attention,
}


def _check_shapes(groups: Groups, gone: Mask, narrow: Network) -> None:
    """Every tensor of the narrow graph has the shape that its labels say; else it is a defect of ours."""
    found = shapes(narrow)
    by_name = {node.name: value for node, value in found.items()}
    for node, held in groups.nodes.items():
        if not isinstance(held, Labels) or node.name not in by_name:
            continue
        got, wanted = tuple(by_name[node.name].shape), tuple(_kept_counts(held, gone))
        if got != wanted:
            raise AssertionError(
                f"{where(node)}: {got} after removal, {wanted} by its labels; please report this"
            )
