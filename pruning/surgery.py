"""Physical removal: narrow every tensor and every constant of the graph that the removed units appear in.

The narrowed network computes what the original computes with each removed channel replaced, where it is read, by a
constant: zero, or its mean activation, whose effect moves into the reader's bias (exact away from padded borders).
`masked` builds that reference from the original, and `largest_difference` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from edgeprune.pruning.graph import Network, aten, assemble, copy_graph, layer_of, shapes, tensors, where
from edgeprune.pruning.groups import Groups, Labels, Reader, argument

Mask = npt.NDArray[np.bool_]
Means = Mapping[str, Tensor]  # weight -> the constant that stands for each of its input channels


def remove(groups: Groups, units: Collection[int], means: Means | None = None) -> Network:
    """A new network without `units`; the one that `groups` describes is not changed.

    Args:
        units: ids from 1 to `groups.units`.
        means: mean activation of each input channel, by weight; a removed channel then leaves its mean behind in the
            reader's bias, where the reader can carry it. Without it, it leaves zero.

    Raises:
        ValueError: If a unit does not exist or a layer would be left without channels.
    """
    gone = _gone(groups, units)
    for piece in groups.pieces:
        if gone[piece].all():
            raise ValueError("a tensor would be left without channels")
    network = groups.network
    values: dict[str, Tensor] = {}
    for name, tensor in tensors(network):
        narrowed = tensor.detach()
        for axis in range(tensor.dim()):
            ids = groups.axes.get((name, axis))
            if ids is not None and gone[ids].any():
                index = torch.from_numpy(np.flatnonzero(~gone[ids])).to(tensor.device)
                narrowed = narrowed.index_select(axis, index)
        narrowed = narrowed.clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        values[name] = nn.Parameter(narrowed, requires_grad=tensor.requires_grad) if is_parameter else narrowed
    graph = copy_graph(network.graph)
    twins = dict(zip(network.graph.nodes, graph.nodes, strict=True))
    _rewrite(groups, gone, twins, values)
    biases = list(network.added_biases)
    for weight, shift in (_bias_shifts(groups, gone, means) if means else {}).items():
        biases += add_bias(graph, values, weight, shift)
    result = assemble(values, graph, network)
    result.added_biases = tuple(biases)
    for producer in groups.producers:
        ids = groups.axes[producer.weight, producer.axis]
        before = network.kept.get(producer.layer, tuple(range(len(ids))))
        if gone[ids].any():
            result.kept[producer.layer] = tuple(np.asarray(before)[~gone[ids]].tolist())
    _check_shapes(groups, gone, result)
    return result


def masked(groups: Groups, units: Collection[int], means: Means | None = None) -> Network:
    """The original with removed channels replaced where they are read: the reference that `remove` must equal."""
    gone = _gone(groups, units)
    network = groups.network
    graph = copy_graph(network.graph)
    twins = dict(zip(network.graph.nodes, graph.nodes, strict=True))
    values = {name: tensor.detach().clone() for name, tensor in tensors(network)}
    for index, reader in enumerate(groups.readers):
        ids = channel_ids(groups, reader)
        if not gone[ids].any():
            continue
        shape = [-1 if axis == reader.dim else 1 for axis in range(len(_labels(groups, reader.tensor).shape))]
        device = next(iter(values.values())).device
        keep = torch.from_numpy((~gone[ids]).astype(np.float32)).to(device)
        mean = torch.zeros_like(keep)
        if means is not None and reader.foldable and reader.weight in means:
            mean = (1 - keep) * means[reader.weight].to(keep)
        values[f"keep_{index}"], values[f"mean_{index}"] = keep.reshape(shape), mean.reshape(shape)
        node = twins[reader.node]
        with graph.inserting_before(node):
            kept = graph.call_function(
                aten.mul.Tensor, (node.args[reader.position], graph.get_attr(f"keep_{index}"))
            )
            node.update_arg(reader.position, graph.call_function(aten.add.Tensor, (kept, graph.get_attr(f"mean_{index}"))))
    reference = assemble(values, graph, network)
    return reference


def largest_difference(left: Network, right: Network, inputs: tuple[Tensor, ...]) -> float:
    """Largest difference of any output, relative to that output's range in `left`; both run in eval mode."""
    modes = left.training, right.training
    with torch.no_grad():
        a = pytree.tree_leaves(left.eval()(*inputs))
        b = pytree.tree_leaves(right.eval()(*inputs))
    left.train(modes[0])
    right.train(modes[1])
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        span = (x.max() - x.min()).item() or 1.0
        worst = max(worst, (x - y).abs().max().item() / span)
    return worst


def replay(groups: Groups, kept: Mapping[str, Collection[int]], added_biases: Collection[str]) -> Network:
    """Narrow an unpruned network to the channels that a specification keeps; its weights are loaded afterwards.

    Raises:
        ValueError: If the specification does not fit the network.
    """
    layers = {producer.layer for producer in groups.producers}
    if unknown := sorted(set(kept) - layers):
        raise ValueError(f"no layer {unknown[0]!r} in the network")
    units: set[int] = set()
    for layer, channels in kept.items():
        ids = groups.channels(layer)
        lost = np.setdiff1d(np.arange(len(ids)), np.asarray(sorted(channels), dtype=np.int64))
        if len(lost) + len(set(channels)) != len(ids):
            raise ValueError(f"layer {layer!r} has {len(ids)} channels; the specification names others")
        units.update(int(unit) for unit in ids[lost])
    if 0 in units:
        raise ValueError("the specification removes channels that must stay")
    narrow = remove(groups, units) if units else assemble(
        {n: t.clone() for n, t in tensors(groups.network)}, copy_graph(groups.network.graph), groups.network
    )
    if {layer: tuple(channels) for layer, channels in kept.items()} != narrow.kept:
        raise ValueError("the specification keeps channels apart that belong together")
    if not added_biases:
        return narrow
    values, graph = dict(tensors(narrow)), copy_graph(narrow.graph)
    weights = {layer_of(reader.weight): reader.weight for reader in groups.readers if reader.weight}
    for layer in added_biases:
        if layer not in weights:
            raise ValueError(f"no layer {layer!r} in the network")
        weight = values[weights[layer]]
        add_bias(graph, values, weights[layer], weight.new_zeros(weight.shape[0]))
    result = assemble(values, graph, narrow)
    result.added_biases = tuple(added_biases)
    return result


def channel_ids(groups: Groups, reader: Reader) -> npt.NDArray[np.int64]:
    """Unit ids along the channel axis of what a reader reads."""
    labels = _labels(groups, reader.tensor)
    ids = np.moveaxis(labels.array, reader.dim, 0).reshape(labels.array.shape[reader.dim], -1)[:, 0]
    return np.broadcast_to(ids, (labels.shape[reader.dim],))


def add_bias(graph: fx.Graph, values: dict[str, Tensor], weight: str, shift: Tensor) -> list[str]:
    """Add `shift` to the bias of every operation that uses `weight`; returns the layer if it had no bias before."""
    for node in graph.nodes:
        if node.op == "call_function" and any(n.op == "get_attr" and n.target == weight for n in node.all_input_nodes):
            bias = argument(node, "bias")
            if isinstance(bias, fx.Node):
                name = str(bias.target)
                old = values[name]
                values[name] = nn.Parameter(old.detach() + shift, requires_grad=old.requires_grad)
                return []
            break
    name = weight.rpartition(".")[0] + ".bias" if "." in weight else f"{weight}_bias"
    values[name] = nn.Parameter(shift.clone(), requires_grad=values[weight].requires_grad)
    for node in list(graph.nodes):
        if node.op == "call_function" and any(n.op == "get_attr" and n.target == weight for n in node.all_input_nodes):
            with graph.inserting_before(node):
                attribute = graph.get_attr(name)
            arguments = list(node.args) + [None] * (3 - len(node.args))
            arguments[2] = attribute
            node.args = tuple(arguments)
    return [layer_of(weight)]


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


def _bias_shifts(groups: Groups, gone: Mask, means: Means) -> dict[str, Tensor]:
    """What the removed channels' means add to each reader's outputs that stay."""
    shifts: dict[str, Tensor] = {}
    weights = dict(tensors(groups.network))
    for reader in groups.readers:
        if reader.weight is None or not reader.foldable or reader.weight in shifts or reader.weight not in means:
            continue
        ids = channel_ids(groups, reader)
        if not gone[ids].any():
            continue
        weight = weights[reader.weight].detach()
        mean = means[reader.weight].to(weight) * torch.from_numpy(gone[ids]).to(weight)
        taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight  # (out, in of a block)
        blocks = len(ids) // taps.shape[1]
        by_block = taps.reshape(blocks, -1, taps.shape[1])
        shift = torch.einsum("boi,bi->bo", by_block.double(), mean.double().reshape(blocks, -1)).flatten()
        outputs = groups.axes.get((reader.weight, 0))
        if outputs is not None:
            shift = shift[torch.from_numpy(~gone[outputs]).to(shift.device)]
        shifts[reader.weight] = shift.to(weight)
    return shifts


# --- constants of the graph ----------------------------------------------------------------------------------------


def _kept_counts(labels: Labels, gone: Mask) -> list[int]:
    """The shape that is left."""
    counts = list(labels.shape)
    for axis, size in enumerate(labels.array.shape):
        if size > 1:
            ids = np.moveaxis(labels.array, axis, 0).reshape(size, -1)[:, 0]
            counts[axis] = int((~gone[ids]).sum())
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
        name = getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::")
        rule = _REWRITES.get(name)
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
        ids = np.moveaxis(labels.array, dim, 0).reshape(labels.array.shape[dim], -1)[:, 0]
        return np.broadcast_to(~self.gone[ids], (labels.shape[dim],))

    def sizes(self, given: list[Any], kept: list[int], shape: tuple[int, ...]) -> list[Any]:
        """Sizes of a view: constants for what was narrowed; -1 where the batch is part of it."""
        new = list(given)
        for axis, (left, full) in enumerate(zip(kept, shape, strict=True)):
            if left != full:
                new[axis] = left
                if isinstance(given[axis], fx.Node):
                    assert -1 not in new, f"{where(self.node)}: two sizes that depend on the batch"
                    new[axis] = -1
        return new

    def select(self, dim: int, positions: Any) -> None:
        """Replace the operation by picking `positions` along `dim` of its (narrowed) source."""
        name = f"{self.twin.name}_index"
        device = next(iter(self.values.values())).device
        self.values[name] = torch.as_tensor(np.asarray(positions, dtype=np.int64)).to(device)
        with self.twin.graph.inserting_before(self.twin):
            index = self.twin.graph.get_attr(name)
        self.twin.target = aten.index_select.default
        self.twin.args = (self.twin.args[0], dim, index)
        self.twin.kwargs = {}


def _view(edit: _Edit) -> None:
    labels = edit.labels()
    given = argument(edit.node, "size") or argument(edit.node, "shape")
    name = "size" if argument(edit.node, "size") is not None else "shape"
    twin_sizes = argument(edit.twin, name)
    # A size of -1 is inferred; the others are stated.
    new = edit.sizes(list(twin_sizes), _kept_counts(labels, edit.gone), labels.shape)
    for axis, size in enumerate(given):
        if size == -1:
            new[axis] = -1
    edit.set(name, new)


def _unflatten(edit: _Edit) -> None:
    labels = edit.labels()
    dim = int(argument(edit.node, "dim")) % len(edit.labels(edit.source()).shape)
    sizes = list(argument(edit.twin, "sizes"))
    edit.set("sizes", edit.sizes(sizes, _kept_counts(labels, edit.gone)[dim : dim + len(sizes)],
                                 labels.shape[dim : dim + len(sizes)]))


def _expand(edit: _Edit) -> None:
    labels = edit.labels()
    source = edit.labels(edit.source()).shape
    kept = _kept_counts(labels, edit.gone)
    sizes = list(argument(edit.twin, "size"))
    offset = len(sizes) - len(source)
    new = edit.sizes(sizes, kept, labels.shape)
    edit.set("size", [size if axis < offset or source[axis - offset] == 1 else -1 for axis, size in enumerate(new)])


def _split(edit: _Edit) -> None:
    dim = int(argument(edit.node, "dim") or 0)
    pieces: list[Labels] = edit.groups.nodes[edit.node]
    axis = dim % len(pieces[0].shape)
    counts = [_kept_counts(piece, edit.gone)[axis] for piece in pieces]
    edit.twin.target = aten.split_with_sizes.default
    edit.twin.args, edit.twin.kwargs = (edit.twin.args[0], counts, dim), {}


def _slice(edit: _Edit) -> None:
    dim = int(argument(edit.node, "dim") or 0)
    stays = edit.survivors(edit.source(), dim)
    step = int(argument(edit.node, "step") or 1)
    if stays.all() and edit.survivors(edit.node, dim).all():
        return  # narrowed along another axis
    start, end = argument(edit.node, "start"), argument(edit.node, "end")
    taken = np.arange(len(stays))[slice(start, end, step)]
    rank = np.cumsum(stays) - 1
    positions = rank[taken[stays[taken]]]
    if step == 1:
        first = int(positions[0]) if len(positions) else 0
        edit.set("start", first)
        edit.set("end", first + len(positions))
    else:
        edit.select(dim, positions)


def _select_one(edit: _Edit) -> None:
    dim, index = int(argument(edit.node, "dim")), int(argument(edit.node, "index"))
    stays = edit.survivors(edit.source(), dim)
    edit.set("index", int(np.cumsum(stays)[index % len(stays)]) - 1)


def _narrow(edit: _Edit) -> None:
    dim, start, length = (int(argument(edit.node, name)) for name in ("dim", "start", "length"))
    stays = edit.survivors(edit.source(), dim)
    start %= len(stays)
    edit.set("start", int(stays[:start].sum()))
    edit.set("length", int(stays[start : start + length].sum()))


def _pick(edit: _Edit) -> None:
    """Index along one axis by constants: follow each position to where it lies now."""
    if edit.node.target is aten.index.Tensor:
        indices: Any = edit.node.args[1]
        used = [axis for axis, index in enumerate(indices) if index is not None]
        dim, index = used[0], indices[used[0]]
        stays = edit.survivors(edit.source(), dim)
        if stays.all():
            return
        assert len(used) == 1, f"{where(edit.node)} along two axes"
    else:
        dim, index = int(argument(edit.node, "dim")), argument(edit.node, "index")
        stays = edit.survivors(edit.source(), dim)
        if stays.all():
            return
    value = dict(tensors(edit.groups.network))[str(index.target)].cpu()
    if value.dtype == torch.bool:
        value = value.nonzero().flatten()
    positions = value.numpy() % len(stays)
    edit.select(dim, (np.cumsum(stays) - 1)[positions[stays[positions]]])


def _roll(edit: _Edit) -> None:
    """Rolling channels by a constant has no narrow twin: pick them in their new order."""
    dims = argument(edit.node, "dims")
    if len(dims) != 1:
        return
    dim, shift = int(dims[0]), int(argument(edit.node, "shifts")[0])
    stays = edit.survivors(edit.source(), dim)
    if not stays.all():
        order = np.roll(np.arange(len(stays)), shift)
        edit.select(dim, (np.cumsum(stays) - 1)[order[stays[order]]])


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
    "select": _select_one,
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
    """Every tensor of the narrow graph has the shape that its labels say; a difference is a defect of ours."""
    found = shapes(narrow)
    by_name = {node.name: value for node, value in found.items()}
    for node, held in groups.nodes.items():
        if not isinstance(held, Labels) or node.name not in by_name:
            continue
        got, wanted = tuple(by_name[node.name].shape), tuple(_kept_counts(held, gone))
        if got != wanted:
            raise AssertionError(f"{where(node)}: {got} after removal, {wanted} by its labels; please report this")

