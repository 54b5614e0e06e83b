"""What stands in for a removed channel where it was read: zero, its mean, or its prediction from those that
stay.

A removed channel is rarely independent of its neighbours. For each weight the covariance of its input
channels gives the linear prediction of the removed ones from the kept ones (ridge regression in closed form),
and that prediction moves into the weight: ``W x = W_K x_K + W_R x_R ~ (W_K + W_R A) x_K + W_R b``. It costs
one forward pass over the scoring images, no training, and is exact for a channel that is constant or repeats
others. Only the constant ``b`` is not exact at padded borders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from edgeprune.detectors import distributed
from edgeprune.pruning.graph import Network, tensors
from edgeprune.pruning.groups import Groups, Reader
from edgeprune.pruning.surgery import StandIn, channel_ids

RIDGE = 1e-3  # of the mean variance of a weight's inputs: keeps predictions from few positions tame
WIDEST = 4096  # inputs; beyond (a linear layer behind a large flatten) the covariance would not pay


@dataclass(frozen=True)
class InputStatistics:
    """Of a weight's input channels, over images and positions."""

    mean: Tensor
    """``(C,)`` float64."""
    covariance: Tensor | None
    """``(C, C)`` float64; None for grouped and very wide inputs, which are replaced by their mean."""


def input_statistics(groups: Groups, images: Callable[[], Iterable[Tensor]]) -> dict[str, InputStatistics]:
    """Measure the inputs of every weight whose bias can carry a constant.

    Args:
        images: gives batches ``(N, 3, H, W)``; under torchrun this process' share.
    """
    sums: dict[str, tuple[Tensor, Tensor | None, int]] = {}
    network = groups.network
    training = network.training
    network.eval()
    with torch.no_grad():
        for batch in images():
            _Watch(network, groups, sums).run(batch)
    network.train(training)
    gathered = distributed.gather(_on_cpu(sums))
    statistics = {}
    for weight in dict.fromkeys(weight for part in gathered for weight in part):
        parts = [part[weight] for part in gathered if weight in part]
        count = sum(part[2] for part in parts)
        mean = torch.stack([part[0] for part in parts]).sum(0) / count
        products = [part[1] for part in parts if part[1] is not None]
        covariance = torch.stack(products).sum(0) / count - mean[:, None] * mean if products else None
        statistics[weight] = InputStatistics(mean, covariance)
    return statistics


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


def _on_cpu(
    sums: Mapping[str, tuple[Tensor, Tensor | None, int]],
) -> dict[str, tuple[Tensor, Tensor | None, int]]:
    return {
        weight: (total.cpu(), None if products is None else products.cpu(), count)
        for weight, (total, products, count) in sums.items()
    }


class _Watch(fx.Interpreter):
    """Runs a network and sums up what its readers read."""

    def __init__(
        self, network: Network, groups: Groups, sums: dict[str, tuple[Tensor, Tensor | None, int]]
    ) -> None:
        super().__init__(network)
        self.sums = sums
        self.shapes = {name: tensor.shape for name, tensor in tensors(network)}
        self.readers: dict[fx.Node, list[Reader]] = {}
        for reader in groups.readers:
            if reader.weight is not None and reader.foldable:
                self.readers.setdefault(reader.node, []).append(reader)

    def run_node(self, n: fx.Node) -> Any:
        for reader in self.readers.get(n, []):
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            self.add(reader, arguments[reader.position])
        return super().run_node(n)

    def add(self, reader: Reader, tensor: Tensor) -> None:
        assert reader.weight is not None
        rows = tensor.movedim(reader.dim, -1).flatten(0, -2).float()  # (positions, C)
        total, products = rows.double().sum(0), None
        width = rows.shape[1]
        if width == self.shapes[reader.weight][reader.axis] and width <= WIDEST:
            products = (rows.T @ rows).double()
        old = self.sums.get(reader.weight)
        if old is not None:
            total += old[0]
            products = None if products is None or old[1] is None else products + old[1]
        self.sums[reader.weight] = (total, products, len(rows) + (old[2] if old else 0))
