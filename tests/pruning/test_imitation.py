"""Following the unpruned network inside."""

import pytest
import torch
from torch import nn

from edgeprune.pruning.graph import Network, trace
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.imitation import Imitation
from edgeprune.pruning.surgery import remove


def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 6, 3), nn.SiLU(), nn.Conv2d(6, 2, 1)
    ).eval()


def pair(channels: dict[str, list[int]]) -> tuple[Groups, Network, torch.Tensor]:
    pictures = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    groups = find_groups(trace(module(), pictures))
    units = {int(groups.channels(layer)[channel]) for layer, gone in channels.items() for channel in gone}
    return groups, remove(groups, units), pictures


def test_equals_a_computation_by_hand() -> None:
    """The loss is the squared difference of surviving channels over the teacher's variance, mean over what is read."""
    groups, student, pictures = pair({"0": [1, 4], "2": [0]})
    raw, teacher_raw, loss = Imitation(groups, student)(student, groups.network, pictures)
    teacher, first, second = module(), student.get_submodule("0"), student.get_submodule("2")
    by_hand = []
    x, y = teacher[:2](pictures), nn.functional.silu(nn.functional.conv2d(pictures, first.weight, first.bias))
    target = x[:, [0, 2, 3, 5, 6, 7]]
    by_hand.append((y - target).flatten(1).square().mean(1) / target.flatten(1).var(1))
    x, y = teacher[:4](pictures), nn.functional.silu(nn.functional.conv2d(y, second.weight, second.bias))
    target = x[:, 1:]
    by_hand.append((y - target).flatten(1).square().mean(1) / target.flatten(1).var(1))
    by_hand.append(torch.zeros(5))  # the picture itself
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(0))
    torch.testing.assert_close(raw, student(pictures))
    torch.testing.assert_close(teacher_raw, teacher(pictures))


def test_nothing_removed_is_no_loss() -> None:
    """A student with all channels and the same weights has nothing to learn."""
    groups, student, pictures = pair({})
    assert Imitation(groups, student)(student, groups.network, pictures)[2].abs().max() == 0


def test_loss_is_each_images_own() -> None:
    """An image's loss does not depend on its batch mates."""
    groups, student, pictures = pair({"0": [2]})
    follow = Imitation(groups, student)
    together = follow(student, groups.network, pictures)[2]
    alone = torch.cat([follow(student, groups.network, picture[None])[2] for picture in pictures])
    torch.testing.assert_close(together, alone)


def test_gradients_reach_the_student_alone() -> None:
    """The student's layers learn; the teacher's do not."""
    groups, student, pictures = pair({"0": [2], "2": [1]})
    Imitation(groups, student)(student, groups.network, pictures)[2].sum().backward()
    assert student.get_parameter("0.weight").grad is not None
    assert all(parameter.grad is None for parameter in groups.network.parameters())


def test_two_rounds_find_their_twins() -> None:
    """After a second removal every surviving channel is still compared with its own twin: copies lose nothing."""
    groups, once, _ = pair({"0": [1]})
    again = find_groups(once)
    student = remove(again, {int(again.channels("0")[3])})
    assert student.kept["0"] == pytest.approx((0, 2, 3, 5, 6, 7))
    first = Imitation(groups, student).survivors
    assert [1 for _, index in first.values() if index.tolist() == [0, 2, 3, 5, 6, 7]] == [1]
