"""What a network must hold: by hand, and in terms of the units kept."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.pruning.counting import count
from edgeprune.pruning.footprint import footprint, footprint_terms
from edgeprune.pruning.graph import trace
from edgeprune.pruning.memory import Footprint, MeasuredMemory, MemoryModel
from edgeprune.pruning.surgery import remove

MIB = 1 << 20


class Steps(nn.Module):
    """Batch norm and activation after a convolution, a view, a sum of what was long held, a split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10)
        self.wide, self.back = nn.Conv2d(10, 24, 1), nn.Conv2d(24, 10, 1)

    def forward(self, images: Tensor) -> Tensor:
        held = functional.relu(self.norm(self.stem(images)))
        both = held + self.back(self.wide(held)).view(-1, 10, 8, 8)
        first, second = both.split((4, 6), 1)
        return torch.cat((second, first), 1)


def activations_mib(block: int) -> float:
    return footprint(trace(Steps().eval(), torch.zeros(1, 3, 8, 8)), block).activations_mib


def test_activations_by_hand() -> None:
    """What is fused, a view and the input hold nothing; at the most there are two results of 10 channels and the
    one of 24. In blocks of 16 two of 16 and one of 32 besides; in blocks of 2 there is no need of these."""
    assert activations_mib(1) == pytest.approx((10 + 24 + 10) * 64 * 4 / MIB)
    assert activations_mib(2) == activations_mib(1)
    assert activations_mib(16) == pytest.approx((10 + 16 + 24 + 32 + 10 + 16) * 64 * 4 / MIB)


def test_what_no_convolution_made_lies_in_no_blocks() -> None:
    """Slices of the image are as large as they are."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(6, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.stem(torch.cat((images, images + 1), 1))

    network = trace(Sliced().eval(), torch.zeros(1, 3, 8, 8))
    assert footprint(network, 16).activations_mib == pytest.approx((6 + 2 + 16) * 64 * 4 / MIB)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_terms_foretell_the_narrowed_network(name: str, block: int) -> None:
    """For networks of every style: what the terms give for the units kept is what the network that surgery makes
    holds, which is followed anew."""
    groups = zoo.traced(name)
    terms = footprint_terms(groups)
    gone = zoo.some_units(groups, 0.4)
    sizes = terms.parameters.sizes.copy()
    for unit in gone:
        for factor, positions in terms.parameters.members[unit].items():
            sizes[factor] -= positions
    found, narrowed = terms.footprint(block, sizes), footprint(remove(groups, gone), block)
    assert found.weights_mib == pytest.approx(narrowed.weights_mib)
    assert found.activations_mib == pytest.approx(narrowed.activations_mib)
    assert terms.footprint(block).weights_mib == pytest.approx(count(groups.network).params * 4 / MIB)


def test_a_model_is_a_sum_and_a_correction_moves_it() -> None:
    """By hand; after it the measured network is predicted as measured."""
    model = MemoryModel(2.0, 1.5, 3.0, (MeasuredMemory(10.0, 11.0), MeasuredMemory(10.0, 9.6)))
    held = Footprint(4.0, 1.0)
    assert model.predict_mib(held) == pytest.approx(11.0)
    assert model.corrected(11.0, 22.0).predict_mib(Footprint(0.0, 0.0)) == pytest.approx(4.0)
    assert model.corrected(11.0, 22.0).corrected(22.0, 12.0).predict_mib(held) == pytest.approx(12.0)
    assert model.median_error == pytest.approx((0.1 + 0.04) / 2)
