"""How important each unit is: Taylor 2017 and what to compare it with.

The Taylor criteria need one pass over labelled images. Wherever channels are read (`groups.Reader`) the product of
activation and gradient is summed over positions, for each example apart. A unit's estimate is the signed sum over all
the places where it is read, so the summands of an addition cancel as they do in the loss, and the members of a chain
(convolution, then depthwise or gate) count once.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from edgeprune.data.errors import EdgePruneError
from edgeprune.detectors import distributed
from edgeprune.detectors.protocol import Detector, Progress, Targets
from edgeprune.pruning.graph import Network, layer_of, tensors, where
from edgeprune.pruning.groups import Groups, Reader
from edgeprune.pruning.surgery import channel_ids

Scores = npt.NDArray[np.float64]  # (units + 1,): by unit id; entry 0 is unused
LossBatch = tuple[Tensor, Sequence[Targets]]  # images (N, 3, H, W) preprocessed, and their boxes


class ImportanceError(EdgePruneError):
    """Importance cannot be computed."""


def channel_importance(activation: Tensor, gradient: Tensor) -> Tensor:
    """Estimate how much the loss changes if each channel is removed.

    First-order Taylor expansion (Molchanov et al. 2017, arXiv:1611.06440, eq. 8): the product is averaged over
    positions, its absolute value over examples.

    Args:
        activation: ``(N, C, H, W)``.
        gradient: of the summed per-example loss, shaped like `activation`.

    Returns:
        ``(C,)``, non-negative, in units of the loss per position; comparable across layers only after normalisation.

    Raises:
        ValueError: If the shapes differ.
    """
    if activation.shape != gradient.shape:
        raise ValueError(f"activation {tuple(activation.shape)} and gradient {tuple(gradient.shape)} differ")
    return (activation * gradient).flatten(2).mean(2).abs().mean(0)


@dataclass(frozen=True)
class Reading:
    """What one reader saw of each channel, example by example."""

    product: npt.NDArray[np.float64]  # (N, C): sum over positions of activation x gradient
    gradient: npt.NDArray[np.float64]  # (N, C): sum over positions of the gradient
    activation: npt.NDArray[np.float64]  # (C,): mean over examples and positions
    positions: int


class Scoring:
    """A network, the images that score it, and what is computed from them once and used by several criteria."""

    def __init__(
        self,
        groups: Groups,
        detector: Detector,
        batches: Callable[[], Iterable[LossBatch]],
        *,
        fold_means: bool,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            batches: gives the scoring images, the same ones at each call; under torchrun this process' share.
            fold_means: whether a removed channel leaves its mean behind: then activations count from their mean.
            progress: called with images done; the total is not known here and given as 0.
        """
        self.groups, self.detector, self.batches = groups, detector, batches
        self.fold_means, self.seed, self.progress = fold_means, seed, progress

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """One for each of `groups.readers`, over the images of all processes."""
        return _read_all(self)

    @cached_property
    def means(self) -> dict[str, Tensor]:
        """Mean input of each weight's channels, which a removed channel leaves behind; empty where zero stays."""
        if not self.fold_means:
            return {}
        totals: dict[str, tuple[npt.NDArray[np.float64], int]] = {}
        for reader, reading in zip(self.groups.readers, self.readings, strict=True):
            if reader.weight is not None and reader.foldable:
                total, positions = totals.get(reader.weight, (np.zeros_like(reading.activation), 0))
                totals[reader.weight] = (
                    total + reading.activation * reading.positions,
                    positions + reading.positions,
                )
        return {weight: torch.from_numpy(total / count).float() for weight, (total, count) in totals.items()}

    def first_order(self, per_position: bool) -> npt.NDArray[np.float64]:
        """``(N, units + 1)``: estimated change of each example's loss when a unit is removed, with its sign.

        Args:
            per_position: divide by the number of positions, as the paper does; else the sum, in units of the loss.
        """
        examples = len(self.readings[0].product)
        change = np.zeros((examples, self.groups.units + 1))
        for reader, reading in zip(self.groups.readers, self.readings, strict=True):
            product = reading.product
            if reader.weight in self.means and reader.foldable:
                product = product - self.means[reader.weight].double().numpy() * reading.gradient
            if per_position:
                product = product / reading.positions
            np.add.at(change.T, channel_ids(self.groups, reader), -product.T)
        return change

    def producer_slices(self) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        """Of each layer's weight: unit ids ``(C,)`` of its channels and their weights ``(C, K)``."""
        weights = dict(tensors(self.groups.network))
        slices = []
        for producer in self.groups.producers:
            weight = weights[producer.weight].detach().double().cpu().movedim(producer.axis, 0).flatten(1)
            slices.append((self.groups.axes[producer.weight, producer.axis], weight.numpy()))
        return slices


Criterion = Callable[[Scoring], Scores]


def taylor(scoring: Scoring) -> Scores:
    """Molchanov et al. 2017: activation x gradient, mean over positions, absolute value, mean over examples;
    then each layer is normalised by its L2 norm."""
    return by_layer(scoring.groups, np.abs(scoring.first_order(per_position=True)).mean(0))


def taylor_sum(scoring: Scoring) -> Scores:
    """The same product summed over positions: an estimate in units of the loss, comparable across layers as it is."""
    return np.asarray(np.abs(scoring.first_order(per_position=False)).mean(0))


def taylor_weight(scoring: Scoring) -> Scores:
    """Molchanov et al. 2019 (arXiv:1906.10771, eq. 8): square of the summed weight x gradient of all parameters that
    make the unit's channels, batch norm included; mean over examples."""
    network, groups = scoring.groups.network, scoring.groups
    reading = {(reader.weight, reader.axis) for reader in groups.readers}
    made = [(name, axis, ids) for (name, axis), ids in groups.axes.items() if (name, axis) not in reading]
    parameters = {name: p for name, p in network.named_parameters() if any(name == m[0] for m in made)}
    total = np.zeros(groups.units + 1)
    examples = 0
    with _scoring_mode(network):
        for images, targets in scoring.batches():
            for index in range(len(images)):  # one example at a time: gradients of a batch are sums already
                loss = scoring.detector.loss(network(images[index : index + 1]), targets[index : index + 1]).sum()
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                change = np.zeros(groups.units + 1)
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                    if gradient is None:
                        continue
                    product = (parameter.detach() * gradient).double()
                    _finite(product, name)
                    for owner, axis, ids in made:
                        if owner == name:
                            by_channel = product.movedim(axis, 0).reshape(product.shape[axis], -1).sum(1)
                            np.add.at(change, ids, by_channel.cpu().numpy())
                total += change**2
                examples += 1
                if scoring.progress is not None:
                    scoring.progress(examples, 0)
    gathered = distributed.gather((total, examples))
    _some(sum(count for _, count in gathered))
    return np.asarray(sum(part for part, _ in gathered) / sum(count for _, count in gathered))


def magnitude(scoring: Scoring) -> Scores:
    """L2 norm of the weights that make a unit's channels; then each layer is normalised by its L2 norm."""
    return by_layer(scoring.groups, np.sqrt(_norms(scoring, 2)))


def magnitude_l1(scoring: Scoring) -> Scores:
    """L1 norm of the weights that make a unit's channels; then each layer is normalised by its L2 norm."""
    return by_layer(scoring.groups, _norms(scoring, 1))


def _norms(scoring: Scoring, power: int) -> Scores:
    scores = np.zeros(scoring.groups.units + 1)
    for ids, weights in scoring.producer_slices():
        np.add.at(scores, ids, (np.abs(weights) ** power).sum(1))
    return scores


def batchnorm(scoring: Scoring) -> Scores:
    """Sum of the absolute scales of a unit's batch norms (Liu et al. 2017, arXiv:1708.06519).

    Raises:
        ImportanceError: If the network has no batch norm with a scale.
    """
    scores = np.zeros(scoring.groups.units + 1)
    weights = dict(tensors(scoring.groups.network))
    found = False
    for node in scoring.groups.network.graph.nodes:
        if str(node.target) == "aten.batch_norm.default" and isinstance(node.args[1], fx.Node):
            name = str(node.args[1].target)
            found = True
            if (name, 0) in scoring.groups.axes:
                np.add.at(scores, scoring.groups.axes[name, 0], weights[name].detach().abs().double().cpu().numpy())
    if not found:
        raise ImportanceError("--criterion batchnorm: the network has no batch norm (folded?); use taylor or magnitude")
    return scores


def geometric_median(scoring: Scoring) -> Scores:
    """Sum of the distances to all other channels of the layer (FPGM, He et al. 2019, arXiv:1811.00250); then each
    layer is normalised by its L2 norm. A channel near the geometric median can be replaced by the others."""
    scores = np.zeros(scoring.groups.units + 1)
    for ids, weights in scoring.producer_slices():
        squares = (weights**2).sum(1)
        distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * weights @ weights.T, 0))
        np.add.at(scores, ids, distances.sum(1))
    return by_layer(scoring.groups, scores)


def random(scoring: Scoring) -> Scores:
    """Uniform numbers from the run's seed."""
    return np.random.default_rng(scoring.seed).random(scoring.groups.units + 1)


CRITERIA: dict[str, Criterion] = {
    "taylor": taylor,
    "taylor-sum": taylor_sum,
    "taylor-weight": taylor_weight,
    "magnitude": magnitude,
    "magnitude-l1": magnitude_l1,
    "batchnorm": batchnorm,
    "geometric-median": geometric_median,
    "random": random,
}


def find_criterion(name: str) -> Criterion:
    """A criterion by its name, or a user's own as ``package.module:function`` or ``file.py:function``.

    Raises:
        ImportanceError: If there is none.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    place, _, function = name.rpartition(":")
    if not place:
        raise ImportanceError(f"unknown criterion {name!r}; known: {', '.join(CRITERIA)}, or package.module:function")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found: Any = getattr(module, function)
    except (ImportError, OSError, AttributeError) as error:
        raise ImportanceError(f"criterion {name!r} cannot be loaded: {error}") from error
    return found  # type: ignore[no-any-return]


def score(name: str, scoring: Scoring) -> Scores:
    """Scores of all units by the named criterion.

    Raises:
        ImportanceError: If the criterion is unknown, or a score is NaN, infinite or negative.
    """
    scores = np.asarray(find_criterion(name)(scoring), dtype=np.float64)
    if scores.shape != (scoring.groups.units + 1,):
        raise ImportanceError(f"criterion {name!r} returned {scores.shape}; one score a unit and entry 0 is wanted")
    for group in scoring.groups.groups:
        values = scores[list(group.units)]
        if not np.isfinite(values).all() or (values < 0).any():
            raise ImportanceError(f"{group.layers[0]}: criterion {name!r} gave a score that is NaN, infinite or negative")
    return scores


def by_layer(groups: Groups, scores: Scores) -> Scores:
    """Divide the scores of each group by their L2 norm (Molchanov et al. 2017, sec. 2.2)."""
    result = scores.copy()
    for group in groups.groups:
        units = list(group.units)
        norm = np.linalg.norm(scores[units])
        if norm > 0:
            result[units] = scores[units] / norm
    return result


class _Tap(torch.autograd.Function):
    """Passes a tensor on, and on the way back tells `sink` what flowed there and back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(tensor)
        ctx.dim, ctx.sink = dim, sink
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        (tensor,) = ctx.saved_tensors
        ctx.sink(_by_channel(tensor.float() * gradient.float(), ctx.dim), _by_channel(gradient.float(), ctx.dim))
        return gradient, None, None


def _by_channel(tensor: Tensor, dim: int) -> Tensor:
    """``(N, C)``: summed over all axes but the first and `dim`."""
    others = [axis for axis in range(1, tensor.dim()) if axis != dim]
    return tensor.sum(others) if others else tensor


class _Tapped(fx.Interpreter):
    """Runs a network with a tap before every reader."""

    def __init__(self, network: Network, readers: Sequence[Reader]) -> None:
        super().__init__(network)
        self.taps: dict[fx.Node, list[int]] = {}
        for index, reader in enumerate(readers):
            self.taps.setdefault(reader.node, []).append(index)
        self.readers = readers
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.activations: dict[int, Tensor] = {}
        self.positions: dict[int, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.taps:
            return super().run_node(n)
        arguments, keywords = self.fetch_args_kwargs_from_env(n)
        changed = list(arguments)
        for index in self.taps[n]:
            reader = self.readers[index]
            tensor: Tensor = changed[reader.position]
            detached = tensor.detach()
            self.activations[index] = _by_channel(detached.float(), reader.dim).sum(0).double()
            self.positions[index] = detached[0].numel() // detached.shape[reader.dim]

            def sink(product: Tensor, gradient: Tensor, index: int = index) -> None:
                self.seen[index] = (product, gradient)

            changed[reader.position] = _Tap.apply(tensor, reader.dim, sink)
        return self.call_function(n.target, tuple(changed), keywords)  # type: ignore[arg-type]


def _read_all(scoring: Scoring) -> tuple[Reading, ...]:
    groups, network = scoring.groups, scoring.groups.network
    readers = groups.readers
    parts: list[tuple[list[npt.NDArray[np.float64]], list[npt.NDArray[np.float64]], list[npt.NDArray[np.float64]]]]
    parts = [([], [], []) for _ in readers]
    positions = [1] * len(readers)
    examples = 0
    one_by_one = not _batch_comes_first(network, readers)
    with _scoring_mode(network, parameters=False):
        for images, targets in scoring.batches():
            for start in range(0, len(images), 1 if one_by_one else len(images)):
                part = slice(start, start + 1) if one_by_one else slice(None)
                tapped = _Tapped(network, readers)
                # Gradients flow from the pictures on; those of the parameters are not needed.
                raw = tapped.run(images[part].detach().requires_grad_())
                losses = scoring.detector.loss(raw, targets[part])
                _finite(losses.detach(), "loss")
                torch.autograd.backward(losses.sum())
                count = len(losses)
                for index, reader in enumerate(readers):
                    width = len(channel_ids(groups, reader))
                    zero = torch.zeros(count, width)
                    product, gradient = tapped.seen.get(index, (zero, zero))  # unseen: no part in the loss
                    _finite(product, layer_of(reader.weight) if reader.weight else where(reader.node))
                    if one_by_one:
                        product, gradient = product.sum(0, keepdim=True), gradient.sum(0, keepdim=True)
                    for store, value in zip(parts[index], (product, gradient, tapped.activations[index][None]), strict=True):
                        store.append(value.double().cpu().numpy())
                    rows = 1 if not one_by_one else product.shape[0]
                    positions[index] = tapped.positions[index] * rows
                examples += count
                if scoring.progress is not None:
                    scoring.progress(examples, 0)
    gathered = distributed.gather((parts, examples))
    _some(sum(count for _, count in gathered))
    total = sum(count for _, count in gathered)
    readings = []
    for index in range(len(readers)):
        product, gradient, activation = (
            np.concatenate([array for ranks, _ in gathered for array in ranks[index][kind]]) for kind in range(3)
        )
        readings.append(Reading(product, gradient, activation.sum(0) / (total * positions[index]), positions[index]))
    return tuple(readings)


def _batch_comes_first(network: Network, readers: Sequence[Reader]) -> bool:
    """Whether every reader's tensor has one row an example (attention code may put the batch elsewhere)."""
    from edgeprune.pruning.graph import BATCH, shapes

    two, three = shapes(network), shapes(network, BATCH + 1)
    return all(
        two[reader.tensor].shape[0] == BATCH and three[reader.tensor].shape[0] == BATCH + 1 for reader in readers
    )


class _scoring_mode:  # noqa: N801 - used as a with statement
    """Evaluation mode, so that examples do not mix; gradients of the parameters on or off; all put back afterwards."""

    def __init__(self, network: Network, parameters: bool = True) -> None:
        self.network, self.wanted = network, parameters
        self.before = [parameter.requires_grad for parameter in network.parameters()]
        self.training = network.training

    def __enter__(self) -> None:
        self.network.eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(self.wanted)

    def __exit__(self, *error: object) -> None:
        for parameter, wanted in zip(self.network.parameters(), self.before, strict=True):
            parameter.requires_grad_(wanted)
        self.network.train(self.training)


def _finite(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ImportanceError(
            f"{name}: activation x gradient is NaN or infinite; check the weights (or train without AMP)"
        )


def _some(examples: int) -> None:
    if examples == 0:
        raise ImportanceError("no image to score channels with: the training data is empty")
