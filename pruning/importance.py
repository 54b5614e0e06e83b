"""How important each unit is: Taylor 2017 and what to compare it with.

The Taylor criteria need one pass over labelled images. Wherever channels are read (`groups.Reader`) the
product of activation and gradient is summed over positions, for each example apart. A unit's estimate is the
signed sum over all the places where it is read, so the summands of an addition cancel as they do in the loss,
and the members of a chain (convolution, then depthwise or gate) count once.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from edgeprune.data.errors import EdgePruneError
from edgeprune.detectors import distributed
from edgeprune.detectors.protocol import Detector, Progress, Targets
from edgeprune.pruning.graph import BATCH, Network, argument, layer_of, operation, shapes, tensors, where
from edgeprune.pruning.groups import Groups, Reader
from edgeprune.pruning.replacement import InputStatistics, InputSums, input_statistics
from edgeprune.pruning.surgery import channel_ids, removable_readers

Scores = npt.NDArray[np.float64]  # (units + 1,): by unit id; entry 0 is unused
LossBatch = tuple[Tensor, Sequence[Targets]]  # images (N, 3, H, W) preprocessed, and their boxes

# Images that go forward and back together on a CPU: 8 take 3 % less time and a fifth more memory (NanoDet-g).
CPU_PASS = 4


class ImportanceError(EdgePruneError):
    """Importance cannot be computed."""


def channel_importance(activation: Tensor, gradient: Tensor) -> Tensor:
    """Estimate how much the loss changes if each channel is removed.

    First-order Taylor expansion (Molchanov et al. 2017, arXiv:1611.06440, eq. 8): the product is averaged
    over positions, its absolute value over examples.

    Args:
        activation: ``(N, C, H, W)``.
        gradient: of the summed per-example loss, shaped like `activation`.

    Returns:
        ``(C,)``, non-negative, in units of the loss per position; comparable across layers only after
        normalisation.

    Raises:
        ValueError: If the shapes differ.
    """
    if activation.shape != gradient.shape:
        raise ValueError(f"activation {tuple(activation.shape)} and gradient {tuple(gradient.shape)} differ")
    return (activation * gradient).flatten(2).mean(2).abs().mean(0)


@dataclass(frozen=True)
class Reading:
    """What one reader saw of each channel, example by example."""

    reader: Reader
    product: npt.NDArray[np.float64]  # (N, C): sum over positions of activation x gradient
    gradient: npt.NDArray[np.float64]  # (N, C): sum over positions of the gradient
    positions: int


class Scoring:
    """A network, the images that score it, and what several criteria compute from them, once."""

    def __init__(
        self,
        groups: Groups,
        detector: Detector,
        batches: Callable[[], Iterable[LossBatch]],
        *,
        replacement: str = "zero",
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            batches: gives the scoring images, the same ones at each call; under torchrun this process' share.
            replacement: what a removed channel leaves behind. Unless it is "zero", activations count from their mean.
            progress: called with images done; the total is not known here and given as 0.
        """
        self.groups, self.detector, self.batches = groups, detector, batches
        self.replacement, self.seed, self.progress = replacement, seed, progress

    @property
    def readings(self) -> tuple[Reading, ...]:
        """One for each of `removable_readers`, over the images of all processes."""
        return self._read[0]

    @cached_property
    def statistics(self) -> dict[str, InputStatistics]:
        """Of each weight's inputs, which removed ones leave behind; empty if they leave zero.

        They come with the readings, and for a criterion that reads nothing from a forward pass of their own.
        """
        if "_read" in self.__dict__:
            return self._read[1]
        if self.replacement == "zero":
            return {}
        return input_statistics(
            self.groups, lambda: (images for images, _ in self.batches()), self.replacement == "linear"
        )

    @cached_property
    def _read(self) -> tuple[tuple[Reading, ...], dict[str, InputStatistics]]:
        return _read_all(self)

    def first_order(self, per_position: bool) -> npt.NDArray[np.float64]:
        """``(N, units + 1)``: estimated change of each example's loss when a unit is removed, with its sign.

        Args:
            per_position: divide by the number of positions, as the paper does; else in units of the loss.
        """
        examples = len(self.readings[0].product)
        change = np.zeros((examples, self.groups.units + 1))
        for reading in self.readings:
            reader, product = reading.reader, reading.product
            if reader.weight in self.statistics and reader.foldable:
                product = product - self.statistics[reader.weight].mean.numpy() * reading.gradient
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
    """The same product summed over positions: in units of the loss, comparable across layers as it is."""
    return np.asarray(np.abs(scoring.first_order(per_position=False)).mean(0))


def taylor_weight(scoring: Scoring) -> Scores:
    """Molchanov et al. 2019 (arXiv:1906.10771, eq. 8): square of the summed weight x gradient of all
    parameters that make the unit's channels, batch norm included; mean over examples."""
    network, groups = scoring.groups.network, scoring.groups
    read = {(reader.weight, reader.axis) for reader in groups.readers}
    made = [(name, axis, ids) for (name, axis), ids in groups.axes.items() if (name, axis) not in read]
    owners = {name for name, _, _ in made}
    parameters = {name: parameter for name, parameter in network.named_parameters() if name in owners}
    total = np.zeros(groups.units + 1)
    examples = 0
    with _scoring_mode(network):
        for images, targets in scoring.batches():
            for index in range(len(images)):  # one example at a time: gradients of a batch are sums already
                image = images[index : index + 1]
                loss = scoring.detector.loss(network(image), targets[index : index + 1]).sum()
                if not torch.isfinite(loss):
                    raise _not_finite(network, image)
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                gradient_of = dict(zip(parameters, gradients, strict=True))
                change = np.zeros(groups.units + 1)
                for name, axis, ids in made:
                    gradient = gradient_of.get(name)
                    if gradient is None:  # a buffer, or it has no part in the loss
                        continue
                    product = (parameters[name].detach() * gradient).double().movedim(axis, 0)
                    if not torch.isfinite(product).all():
                        raise ImportanceError(
                            f"{name}: weight x gradient is NaN or infinite; check the weights"
                        )
                    np.add.at(change, ids, product.reshape(len(ids), -1).sum(1).cpu().numpy())
                total += change**2
                examples += 1
                if scoring.progress is not None:
                    scoring.progress(examples, 0)
    gathered = distributed.gather((total, examples))
    return np.asarray(sum(part for part, _ in gathered) / _some(sum(count for _, count in gathered)))


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
        ImportanceError: If a unit has no batch norm with a scale.
    """
    groups = scoring.groups
    scores = np.zeros(groups.units + 1)
    scaled = np.zeros(groups.units + 1, dtype=bool)
    weights = dict(tensors(groups.network))
    norms = (node for node in groups.network.graph.nodes if operation(node) == "batch_norm")
    scales = {str(weight.target) for node in norms if isinstance(weight := argument(node, "weight"), fx.Node)}
    for name in sorted(scales):
        ids = groups.axes.get((name, 0))
        if ids is not None:
            np.add.at(scores, ids, weights[name].detach().abs().double().cpu().numpy())
            scaled[ids] = True
    for group in groups.groups:
        if not scaled[list(group.units)].all():
            raise ImportanceError(
                f"--criterion batchnorm: channels of {', '.join(group.layers)} pass no batch norm (folded?); "
                "protect them or use another criterion"
            )
    return scores


def geometric_median(scoring: Scoring) -> Scores:
    """Sum of the distances to all other channels of the layer (FPGM, He et al. 2019, arXiv:1811.00250); then
    each layer is normalised by its L2 norm. Others can stand in for a channel near the geometric median."""
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
        raise ImportanceError(
            f"unknown criterion {name!r}; known: {', '.join(CRITERIA)}, or package.module:function"
        )
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found: Any = getattr(module, function)
    except Exception as error:  # whatever the user's module does
        raise ImportanceError(
            f"criterion {name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ImportanceError(f"criterion {name!r} is no function")
    criterion: Criterion = found
    return criterion


def score(name: str, scoring: Scoring) -> Scores:
    """Scores of all units by the named criterion.

    Raises:
        ImportanceError: If the criterion is unknown, or a score is NaN, infinite or negative.
    """
    groups, criterion = scoring.groups, find_criterion(name)
    if not groups.groups:
        return np.zeros(groups.units + 1)
    scores = np.asarray(criterion(scoring), dtype=np.float64)
    if scores.shape != (groups.units + 1,):
        raise ImportanceError(
            f"criterion {name!r} returned an array {scores.shape}; ({groups.units + 1},) is wanted: one "
            "score a unit, and entry 0 unused"
        )
    for group in groups.groups:
        for unit in group.units:
            if not 0 <= scores[unit] < np.inf:
                layers = [layer for layer in group.layers if unit in groups.channels(layer)]
                raise ImportanceError(
                    f"{', '.join(layers)}: criterion {name!r} gave the score {scores[unit]}; a score is "
                    "finite and not negative (check the weights)"
                )
    return scores


def by_layer(groups: Groups, scores: Scores) -> Scores:
    """Divide the scores of each group by their L2 norm (Molchanov et al. 2017, sec. 2.2)."""
    result: Scores = scores.copy()
    for group in groups.groups:
        units = list(group.units)
        norm = np.linalg.norm(scores[units])
        if norm > 0:
            result[units] = scores[units] / norm
    return result


@dataclass
class _Seen:
    """What one reader saw in one pass: sums over positions, ``(N, C)``, or ``(1, C)`` if rows are no examples."""

    reader: Reader
    by_example: bool
    activation: Tensor = field(init=False)
    product: Tensor = field(init=False)  # of activation and gradient
    gradient: Tensor = field(init=False)

    def forward(self, activation: Tensor) -> None:
        self.activation = self.by_channel(activation)
        self.product = self.gradient = torch.zeros_like(self.activation)  # unless it has a part in the loss

    def backward(self, activation: Tensor, gradient: Tensor) -> None:
        self.product = self.by_channel(activation.float() * gradient.float())
        self.gradient = self.by_channel(gradient)

    def by_channel(self, tensor: Tensor) -> Tensor:
        kept = (0, self.reader.dim) if self.by_example else (self.reader.dim,)
        others = [axis for axis in range(tensor.dim()) if axis not in kept]
        summed = tensor.float().sum(others) if others else tensor.float()
        return summed if self.by_example else summed[None]


class _Tap(torch.autograd.Function):
    """Passes a tensor on, and on the way back shows it and its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, seen: _Seen) -> Tensor:
        ctx.save_for_backward(tensor)
        # Nothing that leads back to the graph: such a cycle would never be freed.
        ctx.seen = seen
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.seen.backward(*ctx.saved_tensors, *gradients)
        return gradients[0], None


class _Tapped(fx.Interpreter):
    """Runs a network with a tap before every reader."""

    def __init__(self, network: Network, seen: Sequence[_Seen], inputs: InputSums | None) -> None:
        super().__init__(network)
        self.inputs = inputs
        self.taps: dict[fx.Node, list[_Seen]] = {}
        for tap in seen:
            self.taps.setdefault(tap.reader.node, []).append(tap)

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.taps:
            return super().run_node(n)
        arguments, keywords = self.fetch_args_kwargs_from_env(n)
        changed = list(arguments)
        for seen in self.taps[n]:
            tensor: Tensor = changed[seen.reader.position]
            seen.forward(tensor.detach())
            if self.inputs is not None:
                self.inputs.add(seen.reader, tensor.detach(), seen.activation.sum(0))
            if not tensor.requires_grad:  # nothing that may go is read before it: gradients stop here
                tensor = tensor.detach().requires_grad_()
            changed[seen.reader.position] = _Tap.apply(tensor, seen)  # type: ignore[no-untyped-call]
        assert callable(n.target)
        return n.target(*changed, **keywords)


def _read_all(scoring: Scoring) -> tuple[tuple[Reading, ...], dict[str, InputStatistics]]:
    groups = scoring.groups
    readers = removable_readers(groups)
    by_example = _batch_comes_first(groups, readers)
    widths = [len(channel_ids(groups, reader)) for reader in readers]
    rows = [np.zeros((0, 2 * sum(widths)))]
    inputs = None if scoring.replacement == "zero" else InputSums(groups, scoring.replacement == "linear")
    examples = 0
    with _scoring_mode(groups.network, parameters=False):
        for images, targets in scoring.batches():
            step = 1 if not by_example else CPU_PASS if images.device.type == "cpu" else max(len(images), 1)
            for start in range(0, len(images), step):
                part = slice(start, start + step)
                passed = [_Seen(reader, by_example) for reader in readers]
                rows.append(_pass(scoring, images[part], targets[part], passed, inputs))
                examples += len(rows[-1])
                if scoring.progress is not None:
                    scoring.progress(examples, 0)
    gathered = np.concatenate(distributed.gather(np.concatenate(rows)))
    _some(len(gathered))
    columns = np.split(gathered, np.cumsum(widths + widths)[:-1], axis=1)
    readings = tuple(
        Reading(reader, product, gradient, math.prod(groups.nodes[reader.tensor].shape) // (BATCH * width))
        for reader, width, product, gradient in zip(
            readers, widths, columns[: len(widths)], columns[len(widths) :], strict=True
        )
    )
    return readings, {} if inputs is None else inputs.statistics()


def _pass(
    scoring: Scoring,
    images: Tensor,
    targets: Sequence[Targets],
    passed: Sequence[_Seen],
    inputs: InputSums | None,
) -> npt.NDArray[np.float64]:
    """Forward and backward, adding to `inputs`; the products of all readers, then their gradients ``(N, 2 C)``."""
    network = scoring.groups.network
    losses = scoring.detector.loss(_Tapped(network, passed, inputs).run(images), targets)
    if not _all_finite([losses, torch.cat([seen.activation for seen in passed], 1)]):
        raise _not_finite(network, images)
    if losses.requires_grad:
        torch.autograd.backward(losses.sum())
    read = torch.cat([*(seen.product for seen in passed), *(seen.gradient for seen in passed)], 1)
    if not _all_finite([read]):
        reader = next(
            seen.reader for seen in reversed(passed) if not _all_finite([seen.product, seen.gradient])
        )
        name = layer_of(reader.weight) if reader.weight else where(reader.node)
        raise ImportanceError(f"{name}: the gradient of what it reads is NaN or infinite; check the loss")
    array: npt.NDArray[np.float64] = read.double().cpu().numpy()
    return array


def _batch_comes_first(groups: Groups, readers: Iterable[Reader]) -> bool:
    """Whether every reader's tensor has one row an example (attention code may put the batch elsewhere)."""
    larger = shapes(groups.network, BATCH + 1)  # than the batch that the groups were found with
    return all(
        reader.dim > 0
        and groups.nodes[reader.tensor].shape[0] == BATCH
        and larger[reader.tensor].shape[0] == BATCH + 1
        for reader in readers
    )


@contextmanager
def _scoring_mode(network: Network, parameters: bool = True) -> Iterator[None]:
    """Evaluation mode, so that examples do not mix; parameters with or without gradients; all put back."""
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    training = network.training
    network.eval()
    network.requires_grad_(parameters)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        network.train(training)


class _Checked(fx.Interpreter):
    """Runs a network up to the first result that is not finite."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output" and not _all_finite(t for t in tree_leaves(result) if isinstance(t, Tensor)):
            name = str(n.target) if n.op == "get_attr" else where(n)
            raise ImportanceError(f"{name} is NaN or infinite; check the weights and the images")
        return result


def _not_finite(network: Network, images: Tensor) -> ImportanceError:
    """What to raise where a loss or an activation is not finite; names the first layer that it shows in."""
    try:
        with torch.no_grad():
            _Checked(network).run(images)
    except ImportanceError as error:
        return error
    return ImportanceError("the loss of a training image is NaN or infinite; check its boxes")


def _all_finite(values: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in values)


def _some(examples: int) -> int:
    if examples == 0:
        raise ImportanceError("no image to score channels with: the training data is empty")
    return examples
