"""Stand-ins for removed channels."""

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.pruning.graph import trace
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.replacement import RIDGE, input_statistics, means, predictions, zeros
from edgeprune.pruning.surgery import largest_difference, masked, remove


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), *middle, nn.Conv2d(8, 4, 3, bias=False)).eval()


def groups_of(module: nn.Module) -> tuple[Groups, torch.Tensor]:
    pictures = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return find_groups(trace(module, pictures)), pictures


def test_statistics_are_those_of_numpy() -> None:
    """Mean and covariance over images and positions, in any division into batches, equal numpy's."""
    module = network()
    groups, pictures = groups_of(module)
    found = input_statistics(groups, lambda: iter([pictures[:1], pictures[1:]]), True)["2.weight"]
    rows = module[:2](pictures).detach().movedim(1, -1).reshape(-1, 8).double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), rows.mean(0), atol=1e-6)
    assert found.covariance is not None
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(rows.T, bias=True), atol=1e-6)


@pytest.mark.parametrize("replacement", [zeros, means, predictions])
def test_removal_equals_the_stand_in(replacement) -> None:  # type: ignore[no-untyped-def]
    """The narrowed network is the original that reads the stand-in where a channel was, without padding."""
    groups, pictures = groups_of(network())
    units = [1, 4, 5]
    stand_ins = replacement(groups, units, input_statistics(groups, lambda: iter([pictures]), True))
    narrow = remove(groups, units, stand_ins)
    assert largest_difference(masked(groups, units, stand_ins), narrow, (pictures,)) < 1e-5


def test_predictions_are_ridge_regression() -> None:
    """Slopes and intercepts are those of least squares with the ridge as extra rows."""
    module = network()
    groups, pictures = groups_of(module)
    units = [2, 3]
    found = predictions(groups, units, input_statistics(groups, lambda: iter([pictures]), True))["2.weight"]
    rows = module[:2](pictures).detach().movedim(1, -1).reshape(-1, 8).double().numpy()
    gone = np.isin(groups.channels("0"), units)
    kept, lost = rows[:, ~gone], rows[:, gone]
    centred = kept - kept.mean(0)
    ridge = np.sqrt(RIDGE * centred.var(0).mean() * len(rows)) * np.eye(centred.shape[1])
    slopes, *_ = np.linalg.lstsq(
        np.concatenate([centred, ridge]),
        np.concatenate([lost - lost.mean(0), np.zeros((len(ridge), lost.shape[1]))]),
    )
    assert found.matrix is not None
    np.testing.assert_allclose(found.matrix.numpy()[np.ix_(gone, ~gone)], slopes.T, atol=1e-5)
    np.testing.assert_allclose(found.constant.numpy()[gone], lost.mean(0) - kept.mean(0) @ slopes, atol=1e-5)


def test_repeated_and_constant_channels_go_without_a_trace() -> None:
    """A channel that repeats another, and one that is constant, leave the output as it was."""
    module = network()
    with torch.no_grad():
        module[0].weight[3], module[0].bias[3] = module[0].weight[0], module[0].bias[0]
        module[0].weight[5] = 0
    groups, pictures = groups_of(module)
    units = {int(groups.channels("0")[channel]) for channel in (3, 5)}
    narrow = remove(
        groups, units, predictions(groups, units, input_statistics(groups, lambda: iter([pictures]), True))
    )
    # The ridge keeps a prediction a little short of perfect.
    assert largest_difference(groups.network, narrow, (pictures,)) < 5 * RIDGE


def test_predictions_beat_means_beat_zeros() -> None:
    """On channels that tell about each other the outputs stay closer to the original's."""
    module = network(nn.Conv2d(8, 8, 1), nn.SiLU())
    groups, pictures = groups_of(module)
    units = [1, 2, 9, 10]
    statistics = input_statistics(groups, lambda: iter([pictures]), True)
    distances = []
    for replacement in (predictions, means, zeros):
        narrow = remove(groups, units, replacement(groups, units, statistics))
        distances.append((narrow(pictures) - module(pictures)).square().mean().item())
    assert distances == sorted(distances)


def test_grouped_inputs_leave_their_mean() -> None:
    """A grouped convolution's inputs are replaced by their mean: no channel is predicted across its blocks."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1)
    ).eval()
    groups, pictures = groups_of(module)
    statistics = input_statistics(groups, lambda: iter([pictures]), True)
    assert statistics["2.weight"].covariance is None
    unit = int(groups.channels("0")[0])
    stand_ins = predictions(groups, [unit], statistics)
    assert stand_ins["2.weight"].matrix is None
    narrow = remove(groups, [unit], stand_ins)
    assert largest_difference(masked(groups, [unit], stand_ins), narrow, (pictures,)) < 1e-5
