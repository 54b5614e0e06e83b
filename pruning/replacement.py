"""What stands in for a removed channel where it was read: zero, its mean, or its prediction from those that
stay.

A removed channel is rarely independent of its neighbours. For each weight the covariance of its input
channels gives the linear prediction of the removed ones from the kept ones (ridge regression in closed form),
and that prediction moves into the weight: ``W x = W_K x_K + W_R x_R ~ (W_K + W_R A) x_K + W_R b``. It costs
little beside the pass that scores, no training, and is exact for a channel that is constant or repeats others.
Only the constant ``b`` is not exact at padded borders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from edgeprune.detectors import distributed
from edgeprune.pruning.graph import tensors
from edgeprune.pruning.groups import Groups, Reader
from edgeprune.pruning.surgery import StandIn, channel_ids, removable_readers

RIDGE = 1e-4  # of the mean variance of a weight's inputs: keeps predictions from few positions tame
WIDEST = 4096  # inputs; beyond (a linear layer behind a large flatten) the covariance would not pay
POSITIONS = 200  # of an image that the covariance is taken from, at most about: neighbours tell the same


@dataclass(frozen=True)
class InputStatistics:
    """Of a weight's input channels, over images and positions."""

    mean: Tensor
    """``(C,)`` float64."""
    covariance: Tensor | None
    """``(C, C)`` float64; None for grouped and very wide inputs, which are replaced by their mean."""


def input_statistics(
    groups: Groups, images: Callable[[], Iterable[Tensor]], covariances: bool
) -> dict[str, InputStatistics]:
    """Measure the inputs of every weight that can lose some and whose bias can carry a constant, in a forward
    pass of its own.

    Args:
        images: gives batches ``(N, 3, H, W)``; under torchrun this process' share.
    """
    sums = InputSums(groups, covariances)
    network = groups.network
    training = network.training
    network.eval()
    with torch.no_grad():
        for batch in images():
            _Watch(groups, sums).run(batch)
    network.train(training)
    return sums.statistics()


class _Sums(NamedTuple):
    """Of one weight's inputs, over all positions, and over those that the covariance is taken from (if any)."""

    total: Tensor  # (C,)
    positions: Tensor  # ()
    sampled: Tensor  # (C,), or (0,)
    samples: Tensor  # ()
    products: Tensor  # (C, C), or (0, 0)

    def statistics(self) -> InputStatistics:
        mean = self.sampled / self.samples
        covariance = self.products / self.samples - mean[:, None] * mean
        return InputStatistics(self.total / self.positions, covariance if len(covariance) else None)


class InputSums:
    """Sums up what weights read, in whatever pass shows it."""

    def __init__(self, groups: Groups, covariances: bool) -> None:
        self.covariances = covariances
        self.shapes = {name: tensor.shape for name, tensor in tensors(groups.network)}
        self.sums: dict[str, _Sums] = {}  # float64

    def add(self, reader: Reader, tensor: Tensor, total: Tensor) -> None:
        """Take what a reader reads, and its sum ``(C,)``; nothing if no bias of its weight can carry a constant."""
        if reader.weight is None or not reader.foldable:
            return
        width = len(total)
        count = tensor.numel() // width
        if self.covariances and width == self.shapes[reader.weight][reader.axis] and width <= WIDEST:
            channels = tensor.movedim(reader.dim, 0)
            channels = channels.reshape(width, tensor.shape[0] if reader.dim else 1, -1)  # (C, N, positions)
            # Odd: a stride that divides the width of the image would see some of its columns only.
            stride = -(-channels.shape[2] // POSITIONS) | 1
            samples = channels[..., ::stride].flatten(1).float()
        else:
            samples = total.new_zeros(0, count)
        counts = torch.tensor([count, samples.shape[1]])
        seen = _Sums(total, counts[0], samples.sum(1), counts[1], samples @ samples.T)
        _add(self.sums, reader.weight, seen)

    def statistics(self) -> dict[str, InputStatistics]:
        """By weight, over the images of all processes."""
        held = {weight: _Sums(*(each.cpu() for each in sums)) for weight, sums in self.sums.items()}
        total: dict[str, _Sums] = {}
        for part in distributed.gather(held):
            for weight, sums in part.items():
                _add(total, weight, sums)
        return {weight: sums.statistics() for weight, sums in total.items()}


def _add(total: dict[str, _Sums], weight: str, sums: _Sums) -> None:
    """Add to a weight's sums, in place."""
    if weight in total:
        for known, new in zip(total[weight], sums, strict=True):
            known.add_(new)
    else:
        total[weight] = _Sums(*(each.to(torch.float64, copy=True) for each in sums))


def zeros(
    groups: Groups, units: Collection[int], statistics: Mapping[str, InputStatistics]
) -> dict[str, StandIn]:
    """Removed channels leave nothing behind."""
    return {}


def means(
    groups: Groups, units: Collection[int], statistics: Mapping[str, InputStatistics]
) -> dict[str, StandIn]:
    """Removed channels leave their mean behind."""
    return {
        weight: StandIn(None, torch.where(gone, statistics[weight].mean, 0.0))
        for weight, gone in _losses(groups, units, statistics)
    }


def predictions(
    groups: Groups, units: Collection[int], statistics: Mapping[str, InputStatistics]
) -> dict[str, StandIn]:
    """Removed channels leave what the kept channels of the same input tell about them."""
    found = means(groups, units, statistics)
    for weight, gone in _losses(groups, units, statistics):
        mean, covariance = statistics[weight].mean, statistics[weight].covariance
        if covariance is None:
            continue
        kept = ~gone
        among = covariance[kept][:, kept]
        among = among + RIDGE * among.diagonal().mean().clamp_min(1e-12) * torch.eye(
            len(among), dtype=among.dtype
        )
        slopes = torch.linalg.solve(among, covariance[kept][:, gone]).T  # (removed, kept)
        matrix = torch.diag(kept.double())
        matrix[gone.nonzero(), kept.nonzero().T] = slopes
        constant = torch.zeros_like(mean)
        constant[gone] = mean[gone] - slopes @ mean[kept]
        found[weight] = StandIn(matrix, constant)
    return found


REPLACEMENTS = {"zero": zeros, "mean": means, "linear": predictions}


def _losses(
    groups: Groups, units: Collection[int], statistics: Mapping[str, InputStatistics]
) -> list[tuple[str, Tensor]]:
    """Weights that lose inputs, and which."""
    removed = np.zeros(groups.units + 1, dtype=bool)
    removed[list(units)] = True
    lost: dict[str, Tensor] = {}
    for reader in groups.readers:
        if reader.weight is not None and reader.weight in statistics:
            gone = removed[channel_ids(groups, reader)]
            if gone.any():
                lost[reader.weight] = torch.from_numpy(gone)
    return list(lost.items())


class _Watch(fx.Interpreter):
    """Runs a network and sums up what its readers read."""

    def __init__(self, groups: Groups, sums: InputSums) -> None:
        super().__init__(groups.network)
        self.sums = sums
        self.readers: dict[fx.Node, list[Reader]] = {}
        for reader in removable_readers(groups):
            self.readers.setdefault(reader.node, []).append(reader)

    def run_node(self, n: fx.Node) -> Any:
        for reader in self.readers.get(n, []):
            tensor = self.fetch_args_kwargs_from_env(n)[0][reader.position]
            others = [axis for axis in range(tensor.dim()) if axis != reader.dim]
            self.sums.add(reader, tensor, tensor.float().sum(others) if others else tensor.float())
        return super().run_node(n)
