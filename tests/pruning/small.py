"""Networks of a few layers with a loss an image, for importance and budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from edgeprune.detectors.protocol import Targets
from edgeprune.pruning.graph import trace
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.importance import LossBatch, Scoring

SIDE = 12  # pixels


class Loss:
    """Stands for a detector: a smooth loss an image, of all that the network returns."""

    def loss(self, raw: Tensor, targets: Sequence[Targets]) -> Tensor:
        flat = raw.flatten(1)
        return (flat - torch.linspace(-1, 1, flat.shape[1]).to(flat)).square().sum(1) + flat.sin().sum(1)


def pictures(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def batches(images: Tensor, size: int = 2) -> Callable[[], Iterable[LossBatch]]:
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))
    return lambda: [(part, [nothing] * len(part)) for part in images.split(size)]


def groups_of(module: nn.Module) -> Groups:
    return find_groups(trace(module, torch.zeros(1, 3, SIDE, SIDE)))


def scoring_of(
    groups: Groups, images: Tensor, size: int = 2, replacement: str = "zero", seed: int = 0
) -> Scoring:
    return Scoring(groups, Loss(), batches(images, size), replacement=replacement, seed=seed)  # type: ignore[arg-type]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module with weights from a seed, in evaluation mode; batch norms have statistics of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make().eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.5)
                part.running_mean = torch.randn(part.num_features) * 0.2
                part.running_var = torch.rand(part.num_features) + 0.5
    return module


class Chain(nn.Module):
    """Three convolutions in a row, with activations that are read nowhere else."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.z = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, 2, 1), nn.Conv2d(5, 2, 1)
        self.norm = nn.BatchNorm2d(6) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.z(torch.tanh(self.b(torch.nn.functional.silu(self.norm(self.a(x))))))


class Residual(nn.Module):
    """The same channels are read by `b`, `c` and `z`, and made by `a`, `b` and `c`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.z = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 3, 2, 1)
        self.b, self.c = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = x + torch.tanh(self.b(x))
        return self.z(x + self.c(torch.tanh(x)))


class Gated(nn.Module):
    """Convolution, depthwise convolution and a squeeze-excite gate: a chain, read by the gate and by `z`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depth = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.down, self.up, self.z = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(self.depth(torch.tanh(self.a(x))))
        gate = torch.sigmoid(self.up(torch.tanh(self.down(x.mean((2, 3), keepdim=True)))))
        return self.z(x * gate)


class Attending(nn.Module):
    """nn.MultiheadAttention with the sequence before the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.up, self.z = nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).permute(2, 0, 1)  # (positions, N, 8)
        x = self.attention(x, x, x)[0]
        return self.z(torch.tanh(self.up(x))).transpose(0, 1)
