"""What each ATen operation does to labels.

An operation that only moves data is executed on the labels themselves, so there is no rule per architecture.
Where elements meet (addition, gate, batch norm, a weight's input axis) their labels are united. What has no
rule keeps its channels, with the reason.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from edgeprune.pruning.graph import UnsupportedNetwork, argument, aten, operation, where
from edgeprune.pruning.labels import Book, Ids, Labels, compact


def follow(book: Book, node: fx.Node) -> Any:
    """Labels of what a node returns: Labels, a list of them, or None for numbers."""
    if node.target is operator.getitem:
        source, index = node.args
        held = book.labels.get(source)  # type: ignore[arg-type]
        return held[index] if isinstance(held, list) else None  # type: ignore[index]
    if not any(book.of(tensor) for tensor in node.all_input_nodes):
        return book.kept(node)
    try:
        return _rule(node)(book, node)
    except UnsupportedNetwork as error:
        return book.refuse(node, str(error))


def _rule(node: fx.Node) -> Callable[[Book, fx.Node], Any]:
    """What an operation does to labels.

    Raises:
        UnsupportedNetwork: If that is not known.
    """
    name = operation(node)
    if name in _RULES:
        return _RULES[name]
    for names, rule in ((_MOVES, _move), (_PASSES, _pointwise), (_REDUCTIONS, _reduce)):
        # max and min of two tensors are elementwise, those of one are not.
        if name in names and torch.Tag.pointwise not in node.target.tags:  # type: ignore[union-attr]
            return rule
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    if _SPATIAL.fullmatch(name):
        return _spatial
    raise UnsupportedNetwork(f"{where(node)} cannot be followed")


# --- weights ------------------------------------------------------------------------------------------------


def _weight(book: Book, node: fx.Node, name: str) -> tuple[str, tuple[int, ...]] | None:
    """Name and shape of a parameter among the arguments."""
    weight = argument(node, name)
    if not isinstance(weight, fx.Node):
        return None
    if weight.op != "get_attr":
        raise UnsupportedNetwork(f"{where(node)}: its {name} is computed, not a parameter")
    return str(weight.target), tuple(book.values[weight].shape)


def _convolution(book: Book, node: fx.Node) -> Labels:
    """Weights: `(out, in of a block, ...)`, or `(in, out of a block, ...)` if transposed."""
    tensor: fx.Node = node.args[0]  # type: ignore[assignment]
    reason = where(node)
    found, bias = _weight(book, node, "weight"), _weight(book, node, "bias")
    assert found is not None
    weight, shape = found
    if book.values[tensor].dim() != len(shape):
        raise UnsupportedNetwork(f"{reason}: its input has no batch axis")
    transposed = "transpose" in operation(node)
    blocks = int(argument(node, "groups"))
    inputs = book.collapse(book.one(tensor), 1, reason)
    inputs_in_block = len(inputs) // blocks
    outputs_in_block = shape[1] if transposed else shape[0] // blocks
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    if blocks == 1:
        book.unite(book.axis(weight, in_axis, shape[in_axis]), inputs, reason)
        outputs = book.axis(weight, out_axis, shape[out_axis])
    else:
        full = book.axis(weight, 0, shape[0])  # the axis that the weight has in full
        grid, grid_in = full.reshape(blocks, -1), inputs.reshape(blocks, -1)
        if inputs_in_block == 1 or outputs_in_block == 1 or blocks > inputs_in_block:
            # Whole blocks go: a block's inputs and outputs are one unit, and nothing is read here.
            book.unite(grid, grid[:, :1], reason)
            book.unite(grid_in, grid[:, :1], reason)
            outputs = np.repeat(grid[:, 0], outputs_in_block)
            out_axis = 0
        else:
            # The same place in every block goes.
            inner = book.axis(weight, 1, shape[1])
            book.unite(grid, grid[:1], reason)
            book.unite(grid_in, grid[:1] if transposed else inner[None], reason)
            outputs = np.tile(inner, blocks) if transposed else full
    if (weight, in_axis) in book.axes and (blocks == 1 or (weight, 1) in book.axes):
        book.read(node, tensor, 1, weight, in_axis, foldable=not transposed)
    if bias is not None:
        book.unite(book.axis(bias[0], 0, len(outputs)), outputs, reason)
    book.produce(weight, out_axis, outputs)
    return book.along(outputs, node, 1)


def _linear(book: Book, node: fx.Node) -> Labels:
    tensor: fx.Node = node.args[0]  # type: ignore[assignment]
    found, bias = _weight(book, node, "weight"), _weight(book, node, "bias")
    assert found is not None
    weight, shape = found
    inputs = book.collapse(book.one(tensor), -1, where(node))
    book.unite(book.axis(weight, 1, shape[1]), inputs, where(node))
    outputs = book.axis(weight, 0, shape[0])
    if bias is not None:
        book.unite(book.axis(bias[0], 0, shape[0]), outputs, where(node))
    book.produce(weight, 0, outputs)
    book.read(node, tensor, book.values[tensor].dim() - 1, weight, 1, foldable=True)
    return book.along(outputs, node, -1)


def _channel_norm(book: Book, node: fx.Node) -> Labels:
    """Batch norm, instance norm, PReLU: parameters with one entry for each channel."""
    labels = book.one(node.args[0])
    for name in ("weight", "bias", "running_mean", "running_var"):
        found = _weight(book, node, name)
        if found is not None and found[1] != (1,):
            channels = book.collapse(labels, 1, where(node))
            book.unite(book.axis(found[0], 0, len(channels)), channels, where(node))
    return labels


def _group_norm(book: Book, node: fx.Node) -> Labels:
    labels = _channel_norm(book, node)
    grid = book.collapse(labels, 1, where(node)).reshape(int(argument(node, "num_groups")), -1)
    book.grids.append(grid)
    book.normed.append(grid)
    return labels


def _layer_norm(book: Book, node: fx.Node) -> Labels:
    labels = book.one(node.args[0])
    for name in ("weight", "bias"):
        parameter = argument(node, name)
        if isinstance(parameter, fx.Node):
            book.unite(book.one(parameter).array, labels.array, where(node))
    axes = len(argument(node, "normalized_shape"))
    book.normed.append(labels.array.reshape(-1, labels.array[(0,) * (labels.array.ndim - axes)].size))
    return labels


# --- products of activations --------------------------------------------------------------------------------


def _product(book: Book, node: fx.Node) -> Labels:
    """matmul: `(..., M, K) x (..., K, N)`."""
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if right.op == "get_attr" and book.values[right].dim() == 2:
        name, (inputs, outputs) = str(right.target), tuple(book.values[right].shape)
        channels = book.collapse(book.one(left), -1, where(node))
        book.unite(book.axis(name, 0, inputs), channels, where(node))
        made = book.axis(name, 1, outputs)
        book.produce(name, 1, made)
        book.read(node, left, book.values[left].dim() - 1, name, 0, foldable=False)
        return book.along(made, node, -1)
    if min(book.values[left].dim(), book.values[right].dim()) < 2:
        raise UnsupportedNetwork(f"{where(node)}: a product with a vector cannot be followed")
    scores = _scores(book, node, book.one(left), book.one(right), left)
    return Labels(scores, tuple(book.values[node].shape))


def _scores(book: Book, node: fx.Node, left: Labels, right: Labels, summed: fx.Node) -> Ids:
    """Labels of `left @ right`; `summed` is the argument whose channels end if both have them along K.

    Attention heads, seen as labels on a leading axis, are kept whole.
    """
    reason = where(node)
    dims = max(len(left.shape), len(right.shape))
    a, b = (_stretched(labels.array, dims) for labels in (left, right))
    if max(*a.shape[:-2], *b.shape[:-2], 1) > 1:
        heads_a, heads_b = a[..., :1, :1], b[..., :1, :1]
        book.unite(a, heads_a, reason)
        book.unite(b, heads_b, reason)
        book.unite(heads_a, heads_b, reason)
        return np.where(heads_a > 0, heads_a, heads_b)
    over_k = a.shape[-1] > 1 or b.shape[-2] > 1
    rows, columns = a.shape[-2] > 1, b.shape[-1] > 1
    if over_k + rows + columns > 1:
        raise UnsupportedNetwork(f"{reason}: a product over two channel axes cannot be followed")
    if over_k:
        book.unite(a[..., 0, :], b[..., :, 0], reason)
        book.read(node, summed, book.values[summed].dim() - 1, None, 0, foldable=False)
        return np.zeros((1,) * dims, dtype=np.int64)
    if rows or columns:
        book.pin(b if rows else a, f"{reason} with several channels")
        return a[..., :, :1] if rows else b[..., :1, :]
    book.unite(a, b, reason)
    return np.where(a > 0, a, b)


def _stretched(array: Ids, dims: int) -> Ids:
    """With leading axes of size 1, as broadcasting adds them."""
    stretched: Ids = array.reshape((1,) * (dims - array.ndim) + array.shape)
    return stretched


def _attention(book: Book, node: fx.Node) -> Labels:
    query, key, value = (book.one(node.args[index]) for index in range(3))
    if argument(node, "enable_gqa"):
        raise UnsupportedNetwork(f"{where(node)}: heads that share keys cannot be followed")
    turned = Labels(np.swapaxes(key.array, -1, -2), (*key.shape[:-2], key.shape[-1], key.shape[-2]))
    tensor: fx.Node = node.args[0]  # type: ignore[assignment]
    scores = Labels(_scores(book, node, query, turned, tensor), (*query.shape[:-1], key.shape[-2]))
    mask = argument(node, "attn_mask")
    if isinstance(mask, fx.Node):
        scores = _join(book, scores, book.one(mask), where(node))
    return Labels(_scores(book, node, scores, value, tensor), tuple(book.values[node].shape))


# --- element by element -------------------------------------------------------------------------------------


def _pointwise(book: Book, node: fx.Node) -> Labels:
    shape = tuple(book.values[node].shape)
    total = Labels(np.zeros((), np.int64), ())
    for index, labels in enumerate(labels for tensor in node.all_input_nodes for labels in book.of(tensor)):
        total = labels if index == 0 else _join(book, total, labels, where(node))
    return Labels(_stretched(total.array, len(shape)), shape)


def _join(book: Book, left: Labels, right: Labels, reason: str) -> Labels:
    """Elements that meet go together, but one that is spread over many channels stays."""
    dims = max(len(left.shape), len(right.shape))
    sides = []
    for labels in (left, right):
        fill = (1,) * (dims - len(labels.shape))
        sides.append(Labels(_stretched(labels.array, dims), fill + labels.shape))
    shape = tuple(
        max(pair) if 0 not in pair else 0 for pair in zip(sides[0].shape, sides[1].shape, strict=True)
    )
    joined = []
    for labels, other in (sides, sides[::-1]):
        if any(labels.shape[d] < shape[d] and other.array.shape[d] > 1 for d in range(dims)):
            book.pin(labels.array, f"{reason}: one channel is spread over several")
        else:
            joined.append(labels.array)
    if len(joined) == 2:
        book.unite(joined[0], joined[1], f"{reason} with a constant")
        return Labels(np.where(joined[0] > 0, joined[0], joined[1]), shape)
    return Labels(joined[0] if joined else np.zeros((1,) * dims, dtype=np.int64), shape)


def _first(book: Book, node: fx.Node) -> Labels:
    """Shaped like the first argument; a second one gives no more than its type."""
    return book.one(node.args[0])


def _glu(book: Book, node: fx.Node) -> Labels:
    labels = book.one(node.args[0])
    dim = int(argument(node, "dim")) % len(labels.shape)
    channels = book.collapse(labels, dim, where(node))
    value, gate = np.split(channels, 2)
    book.unite(value, gate, where(node))
    return book.along(value, node, dim)


# --- data movement ------------------------------------------------------------------------------------------


def _move(book: Book, node: fx.Node) -> Any:
    """Execute an operation that only moves data on the labels (float64 holds them exactly)."""

    def spread(held: fx.Node) -> Any:
        return _spread(book.one(held)) if book.of(held) else book.values[held]  # labels, or a size

    # Labels are spread without memory of their own, which view() does not take.
    action = (
        aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else node.target
    )
    assert callable(action)
    moved = action(*fx.map_arg(node.args, spread), **fx.map_arg(node.kwargs, spread))
    return [_labels(item) for item in moved] if isinstance(moved, (list, tuple)) else _labels(moved)


def _labels(tensor: Tensor) -> Labels:
    return Labels(compact(tensor.numpy().astype(np.int64)), tuple(tensor.shape))


def _pick(book: Book, node: fx.Node) -> Any:
    """Indexing by constants, along one axis of channels at most."""
    labels = book.one(node.args[0])
    if operation(node) == "index":
        indices = book.constant(node.args[1])
        used = [axis for axis, index in enumerate(indices) if index is not None]
        if any(indices[axis].dtype == torch.bool for axis in used):
            raise UnsupportedNetwork(f"{where(node)}: a mask as an index cannot be followed")
        if len(used) > 1 and any(labels.array.shape[axis] > 1 for axis in used):
            raise UnsupportedNetwork(f"{where(node)} along several axes at once")
        indices = [None if index is None else index.cpu() for index in indices]
        return _labels(aten.index.Tensor(_spread(labels), indices))
    index = book.constant(argument(node, "index")).cpu()
    return _labels(_spread(labels).index_select(int(argument(node, "dim")), index))


def _spread(labels: Labels) -> Tensor:
    return torch.from_numpy(labels.array.astype(np.float64)).expand(labels.shape)


def _expand(book: Book, node: fx.Node) -> Labels:
    """Copies of a single channel are channels of their own: their number is a constant of the graph."""
    source = book.one(node.args[0])
    moved: Labels = _move(book, node)
    if source.array.size > 1:
        return moved
    sizes = argument(node, "size")
    offset = len(moved.shape) - len(source.shape)
    for axis, size in enumerate(moved.shape):
        copied = size > 1 and (axis < offset or source.shape[axis - offset] == 1)
        if copied and not isinstance(sizes[axis], fx.Node):
            book.pin(source.array, f"{where(node)}: one channel is spread over several")
            return book.along(book.fresh(size), node, axis)
    return moved


def _view_as(book: Book, node: fx.Node) -> Labels:
    """Its sizes are another tensor's, so both narrow together."""
    other = book.one(node.args[1])
    return _join(book, _labels(_spread(book.one(node.args[0])).reshape(other.shape)), other, where(node))


def _expand_as(book: Book, node: fx.Node) -> Labels:
    return _join(book, book.one(node.args[0]), book.one(node.args[1]), where(node))


def _concatenate(book: Book, node: fx.Node) -> Labels:
    shape = tuple(book.values[node].shape)
    dim = int(argument(node, "dim")) % len(shape)
    parts = [book.one(tensor) for tensor in node.args[0]]  # type: ignore[union-attr]
    parts = [part for part in parts if len(part.shape) == len(shape)]  # torch lets an empty 1-D tensor pass
    common = [max(part.array.shape[axis] for part in parts) for axis in range(len(shape))]
    pieces = []
    for part in parts:
        size = [part.shape[axis] if axis == dim else common[axis] for axis in range(len(shape))]
        pieces.append(np.broadcast_to(part.array, size))
    return Labels(compact(np.concatenate(pieces, axis=dim)), shape)


def _pad(book: Book, node: fx.Node) -> Labels:
    labels = book.one(node.args[0])
    amounts = [int(amount) for amount in argument(node, "pad")]
    if all(labels.array.shape[-1 - index // 2] == 1 for index, amount in enumerate(amounts) if amount):
        return Labels(labels.array, tuple(book.values[node].shape))
    if str(argument(node, "mode") or "constant") != "constant":
        raise UnsupportedNetwork(f"{where(node)} mirrors channels")
    return _labels(functional.pad(_spread(labels), amounts))


def _roll(book: Book, node: fx.Node) -> Any:
    if not argument(node, "dims"):
        raise UnsupportedNetwork(f"{where(node)} along all axes at once")
    return _move(book, node)


def _channel_shuffle(book: Book, node: fx.Node) -> Any:
    channels = book.collapse(book.one(node.args[0]), 1, where(node))
    book.grids.append(channels.reshape(int(argument(node, "groups")), -1))
    return _move(book, node)


def _pixel_shuffle(book: Book, node: fx.Node) -> Any:
    """The channels that become one picture's pixels go together: the factor cannot change."""
    channels = book.collapse(book.one(node.args[0]), 1, where(node))
    blocks = channels.reshape(-1, int(argument(node, "upscale_factor")) ** 2)
    book.unite(blocks, blocks[:, :1], where(node))
    return book.along(blocks[:, 0], node, 1)


def _pixel_unshuffle(book: Book, node: fx.Node) -> Any:
    channels = book.collapse(book.one(node.args[0]), 1, where(node))
    return book.along(np.repeat(channels, int(argument(node, "downscale_factor")) ** 2), node, 1)


# --- mixing -------------------------------------------------------------------------------------------------


def _reduce(book: Book, node: fx.Node) -> Any:
    dims = argument(node, "dim")
    if dims is None or dims == []:
        dims = range(book.one(node.args[0]).array.ndim)
    return _mix(book, node, [dims] if isinstance(dims, int) else dims)


def _spatial(book: Book, node: fx.Node) -> Any:
    """Pooling and upsampling: the last axes, by the number in the name."""
    axes = _SPATIAL.fullmatch(operation(node))
    assert axes is not None
    dims = book.one(node.args[0]).array.ndim
    return _mix(book, node, range(dims - int(axes[1]), dims))


def _mix(book: Book, node: fx.Node, dims: Iterable[int]) -> Any:
    """An operation that mixes elements along `dims` and keeps every other position apart."""
    array = book.one(node.args[0]).array
    axes = {dim % array.ndim for dim in dims}
    if any(book.of(tensor) for tensor in node.all_input_nodes[1:]):
        raise UnsupportedNetwork(f"{where(node)} of several tensors")
    first = array[tuple(slice(1) if axis in axes else slice(None) for axis in range(array.ndim))]
    if first.size < array.size:
        if first.size < 2:
            raise UnsupportedNetwork(f"{where(node)} mixes channels without weights")
        book.unite(array, first, where(node))  # tensors that were stacked, and now meet

    def shaped(value: Tensor) -> Labels:
        sizes = [
            size for axis, size in enumerate(first.shape) if value.dim() == array.ndim or axis not in axes
        ]
        return Labels(first.reshape(sizes), tuple(value.shape))

    values = book.values[node]
    return shaped(values) if isinstance(values, Tensor) else [shaped(value) for value in values]


_RULES: dict[str, Callable[[Book, fx.Node], Any]] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        _convolution,
    ),
    "linear": _linear,
    **dict.fromkeys(("batch_norm", "instance_norm", "prelu"), _channel_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("matmul", "bmm", "mm"), _product),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(
        ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"), _first
    ),
    **dict.fromkeys(("to", "type_as"), _first),
    "glu": _glu,
    **dict.fromkeys(("index", "index_select"), _pick),
    "expand": _expand,
    "expand_as": _expand_as,
    **dict.fromkeys(("view_as", "reshape_as"), _view_as),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenate),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "roll": _roll,
    "channel_shuffle": _channel_shuffle,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
}

# Elementwise, though torch does not tag them so.
_PASSES = frozenset((
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "alias", "contiguous",
    "detach", "_to_copy", "hardswish", "log_sigmoid", "masked_fill", "where", "rsub", "lift_fresh_copy",
    "lift_fresh", "divide", "true_divide", "multiply", "subtract",
))  # fmt: skip

_MOVES = frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "numpy_T",
    "mT", "squeeze", "unsqueeze", "slice", "select", "split", "split_with_sizes", "chunk", "unbind",
    "stack", "flip", "repeat", "tile", "movedim", "narrow", "swapaxes",
))  # fmt: skip

_REDUCTIONS = frozenset((
    "mean", "sum", "amax", "amin", "max", "min", "softmax", "log_softmax", "logsumexp", "var", "std",
    "prod", "norm", "linalg_vector_norm", "cumsum", "argmax", "argmin", "var_mean", "std_mean",
))  # fmt: skip

_SPATIAL = re.compile(r"(?:(?:adaptive_)?(?:max|avg)_pool|_?upsample_[a-z_]+?)([123])d(?:_aa)?")
