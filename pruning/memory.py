"""An engine's memory as a function of what its network must hold, fitted to engines that were measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Footprint:
    """What a network must hold, as float32 (`footprint.py`)."""

    weights_mib: float
    activations_mib: float  # most that live at once


@dataclass(frozen=True)
class MeasuredMemory:
    """The memory of a whole network's engine: evidence of how well the model predicts."""

    measured_mib: float
    predicted_mib: float  # by a model that was fitted without this network


@dataclass(frozen=True)
class MemoryModel:
    """What a backend holds for a network on a device."""

    constant_mib: float
    per_weight: float  # MiB for each MiB of `Footprint.weights_mib`
    per_activation: float  # the same of `Footprint.activations_mib`
    networks: tuple[MeasuredMemory, ...]  # those of the table, in its order
    correction: float = 1.0  # measured over predicted, of the engines measured since

    def predict_mib(self, footprint: Footprint) -> float:
        """The memory of a whole network's engine."""
        weights_mib = self.per_weight * footprint.weights_mib
        activations_mib = self.per_activation * footprint.activations_mib
        return self.correction * (self.constant_mib + weights_mib + activations_mib)

    def corrected(self, predicted_mib: float, measured_mib: float) -> MemoryModel:
        """The model that would have predicted `measured_mib`."""
        return replace(self, correction=self.correction * measured_mib / predicted_mib)

    @property
    def median_error(self) -> float | None:
        """Median of the relative errors of `networks`; None without any."""
        errors = [abs(each.predicted_mib / each.measured_mib - 1) for each in self.networks]
        return float(np.median(errors)) if errors else None
