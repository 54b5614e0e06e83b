"""Small networks in the style of the well-known ones, and one for each way to move channels about.

`ZOO` holds networks for pictures of `(N, 3, 16, 16)` whose channels can be followed (some are kept where that
is right).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.pruning.graph import trace
from edgeprune.pruning.groups import Groups, find_groups

SIDE = 16


class Net(nn.Module):
    """Modules by name, and a forward pass given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def conv(
    ins: int, outs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    layers = [
        nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outs),
    ]
    return nn.Sequential(*layers, act()) if act is not None else nn.Sequential(*layers)


class Residual(nn.Module):
    """ResNet's basic or bottleneck block (ResNeXt's with groups)."""

    def __init__(self, ins: int, outs: int, stride: int = 1, groups: int = 0) -> None:
        super().__init__()
        hidden = outs // 2 * (2 if groups > 1 else 1)
        self.body = (
            nn.Sequential(conv(ins, outs, 3, stride), conv(outs, outs, act=None))
            if not groups
            else nn.Sequential(
                conv(ins, hidden, 1), conv(hidden, hidden, 3, stride, groups), conv(hidden, outs, 1, act=None)
            )
        )
        self.shortcut = conv(ins, outs, 1, stride, act=None) if stride > 1 or ins != outs else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.shortcut(x)
        return self.act(out)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = functional.adaptive_avg_pool2d(x, 1)
        return x * functional.hardsigmoid(self.up(functional.relu(self.down(gate))))


class Inverted(nn.Module):
    """MobileNetV2's block, with V3's squeeze-excite and hard swish."""

    def __init__(self, ins: int, outs: int, stride: int, excite: bool) -> None:
        super().__init__()
        wide, act = ins * 3, nn.Hardswish if excite else nn.ReLU6
        gate = [SqueezeExcite(wide)] if excite else []
        self.body = nn.Sequential(
            conv(ins, wide, 1, act=act),
            conv(wide, wide, 3, stride, wide, act),
            *gate,
            conv(wide, outs, 1, act=None),
        )
        self.same = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's two units."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        half = channels if stride > 1 else channels // 2
        self.main = nn.Sequential(
            conv(half, half, 1), conv(half, half, 3, stride, half, None), conv(half, half, 1)
        )
        self.side = (
            nn.Sequential(conv(half, half, 3, stride, half, None), conv(half, half, 1))
            if stride > 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.side is not None:
            return shuffle(torch.cat((self.side(x), self.main(x)), 1), 2)
        kept, used = x.chunk(2, dim=1)
        return shuffle(torch.cat((kept, self.main(used)), 1), 2)


class Dense(nn.Module):
    def __init__(self, ins: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(ins + i * growth), nn.ReLU(), nn.Conv2d(ins + i * growth, growth, 3, 1, 1)
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Inception(nn.Module):
    def __init__(self, ins: int) -> None:
        super().__init__()
        self.one, self.three = conv(ins, 4, 1), nn.Sequential(conv(ins, 6, 1), conv(6, 8))
        self.wide = nn.Sequential(
            nn.Conv2d(ins, 6, (1, 7), padding=(0, 3)), nn.ReLU(), nn.Conv2d(6, 5, (7, 1), padding=(3, 0))
        )
        self.pool = conv(ins, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(functional.avg_pool2d(x, 3, 1, 1))
        return torch.cat([self.one(x), self.three(x), self.wide(x), pooled], 1)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv(3, 8), conv(8, 12), conv(12, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 3, 2, 1, 1)
        self.side2, self.side1, self.head = conv(24, 12), conv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(functional.max_pool2d(one, 2))
        x = self.side2(torch.cat([two, self.up2(self.bottom(functional.max_pool2d(two, 2)))], 1))
        return self.head(self.side1(torch.cat([one, self.up1(x)], 1)))


class C2f(nn.Module):
    """YOLOv8's block: split, bottlenecks in a row, all concatenated."""

    def __init__(self, ins: int, outs: int, depth: int, by: str = "chunk") -> None:
        super().__init__()
        self.half, self.by = outs // 2, by
        self.first = conv(ins, outs, 1, act=nn.SiLU)
        self.last = conv((2 + depth) * self.half, outs, 1, act=nn.SiLU)
        self.rows = nn.ModuleList(Residual(self.half, self.half) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.by == "chunk":
            parts = list(x.chunk(2, 1))
        elif self.by == "split":
            parts = list(x.split((self.half, self.half), 1))
        else:
            parts = [x[:, : self.half], x[:, self.half :]]
        parts.extend(row(parts[-1]) for row in self.rows)
        return self.last(torch.cat(parts, 1))


class CSP(nn.Module):
    """Focus stem, cross-stage partial block, spatial pyramid pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(12, 16), conv(16, 8, 1), conv(16, 8, 1)
        self.row, self.join = Residual(8, 8), conv(16, 16, 1)
        self.squeeze, self.out = conv(16, 8, 1), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        x = self.stem(torch.cat(corners, 1))
        x = self.squeeze(self.join(torch.cat((self.row(self.left(x)), self.right(x)), 1)))
        return self.out(torch.cat([x] + [functional.max_pool2d(x, k, 1, k // 2) for k in (3, 5, 7)], 1))


class SharedHead(nn.Module):
    """YOLOX-like: pyramid with upsampling, one decoupled head for all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 8, 3, 2), conv(8, 12, 3, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(12, 8, 1)])
        self.cls, self.reg = (
            nn.Sequential(conv(8, 8), nn.Conv2d(8, 2, 1)),
            nn.Sequential(conv(8, 8), nn.Conv2d(8, 4, 1)),
        )

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        one = self.stages[0](x)
        two = self.lateral[1](self.stages[1](one))
        one = self.lateral[0](one) + functional.interpolate(two, scale_factor=2, mode="nearest")
        return {"scores": [self.cls(one), self.cls(two)], "boxes": [self.reg(level) for level in (one, two)]}


class ConvNext(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(functional.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head attention: written by hand, by scaled_dot_product_attention, or nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        if kind == "module":
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        else:
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "module":
            return self.attention(x, x, x)[0]
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "sdpa":
            y = functional.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class ViT(nn.Module):
    def __init__(self, heads: int, kind: str, norm: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.position = nn.Parameter(torch.randn(1, (SIDE // 4) ** 2 + 1, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()
        self.attention = Attention(8, heads, kind)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.position
        x = x + self.attention(self.norm(x))
        x = x + self.mlp(x)
        return self.head(x[:, 0])


def net(forward: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    """A network of `a` (3 -> 8), whatever is given, and `z` (8 -> 2) unless given."""

    def make() -> nn.Module:
        made = {
            name: part() if callable(part) and not isinstance(part, nn.Module) else part
            for name, part in parts.items()
        }
        return Net(forward, **{"a": conv(3, 8, 3, act=nn.SiLU), "z": nn.Conv2d(8, 2, 3, padding=1), **made})

    return make


def c2(ins: int = 8, outs: int = 8, kernel: int = 1, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(ins, outs, kernel, **options)


def tensor(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(*shape))


def stack(*parts: Callable[[], nn.Module] | nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(part if isinstance(part, nn.Module) else part() for part in parts))


def _gate(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.z(torch.sigmoid(net.b(x)) * x + x)


def _in_place(net: Any, x: Tensor) -> Tensor:
    x = functional.relu_(net.a(x))
    y = net.b(x)
    y += x
    y.mul_(0.5).clamp_(min=-1)
    return net.z(functional.leaky_relu_(y, 0.1))


def _batch_mixed(net: Any, x: Tensor) -> Tensor:
    """Attention over groups of channels, as in shuffle attention: groups join the batch."""
    x = net.a(x)
    b, c, h, w = x.shape
    y = x.view(b * 4, c // 4, h, w)
    y = y * torch.sigmoid(functional.adaptive_avg_pool2d(y, 1) * net.w + 0.1)
    return net.z(y.view(b, c, h, w))


def _space_to_depth(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    b, c, h, w = x.shape
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, c * 4, h // 2, w // 2)
    return net.z(x)


def _inputs(net: Any, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    both = net.a(x) + net.b(y)
    return net.z(both), {"mean": net.y(both).mean((2, 3))}


def _frozen() -> nn.Module:
    made = net(lambda n, x: n.z(n.b(n.a(x))), b=c2())()
    made.b.requires_grad_(False)
    return made


def _tied() -> nn.Module:
    made = net(lambda n, x: n.z(n.c(functional.relu(n.b(n.a(x))))), b=c2(), c=c2())()
    made.c.weight = made.b.weight
    made.b.weight.requires_grad_(False)
    return made


ZOO: dict[str, Callable[[], nn.Module]] = {
    "resnet": stack(
        lambda: conv(3, 8),
        lambda: Residual(8, 8),
        lambda: Residual(8, 12, 2),
        lambda: Residual(12, 12),
        lambda: nn.AdaptiveAvgPool2d(1),
        nn.Flatten,
        lambda: nn.Linear(12, 3),
    ),
    "resnet bottleneck": stack(
        lambda: conv(3, 8),
        lambda: Residual(8, 16, 1, 1),
        lambda: Residual(16, 16, 1, 1),
        lambda: nn.Conv2d(16, 3, 1),
    ),
    "resnext": stack(
        lambda: conv(3, 8),
        lambda: Residual(8, 16, 1, 4),
        lambda: Residual(16, 16, 1, 2),
        lambda: nn.Conv2d(16, 3, 1),
    ),
    "mobilenet v2": stack(
        lambda: conv(3, 4),
        lambda: Inverted(4, 4, 1, False),
        lambda: Inverted(4, 6, 2, False),
        lambda: nn.Conv2d(6, 3, 1),
    ),
    "mobilenet v3": stack(
        lambda: conv(3, 4),
        lambda: Inverted(4, 4, 1, True),
        lambda: Inverted(4, 6, 2, True),
        lambda: nn.Conv2d(6, 3, 1),
    ),
    "shufflenet v2": stack(
        lambda: conv(3, 8, 3, 2),
        lambda: ShuffleUnit(8, 2),
        lambda: ShuffleUnit(16, 1),
        lambda: ShuffleUnit(16, 1),
        lambda: nn.Conv2d(16, 3, 1),
    ),
    "densenet": stack(
        lambda: conv(3, 6),
        lambda: Dense(6, 4, 3),
        nn.ReLU,
        lambda: conv(18, 8, 1),
        lambda: nn.AvgPool2d(2),
        lambda: Dense(8, 4, 2),
        lambda: nn.Conv2d(16, 3, 1),
    ),
    "inception": stack(lambda: conv(3, 6), lambda: Inception(6), lambda: nn.Conv2d(20, 3, 1)),
    "unet": UNet,
    "c2f chunk": stack(lambda: conv(3, 8), lambda: C2f(8, 12, 2), lambda: nn.Conv2d(12, 3, 1)),
    "c2f split": stack(lambda: conv(3, 8), lambda: C2f(8, 12, 2, "split"), lambda: nn.Conv2d(12, 3, 1)),
    "c2f slice": stack(lambda: conv(3, 8), lambda: C2f(8, 12, 2, "slice"), lambda: nn.Conv2d(12, 3, 1)),
    "csp": CSP,
    "shared head": SharedHead,
    "convnext": stack(lambda: nn.Conv2d(3, 8, 2, 2), ConvNext, ConvNext, lambda: nn.Conv2d(8, 2, 1)),
    "vit by hand": lambda: ViT(2, "hand"),
    "vit sdpa": lambda: ViT(4, "sdpa"),
    "vit one head": lambda: ViT(1, "sdpa"),
    "vit one head by hand": lambda: ViT(1, "hand"),
    "vit module": lambda: ViT(2, "module"),
    "vit norm": lambda: ViT(2, "sdpa", norm=True),
    # Convolutions.
    "depthwise 1": net(lambda n, x: n.z(n.b(n.a(x))), b=c2(8, 8, 3, padding=1, groups=8)),
    "depthwise 2": net(lambda n, x: n.z(n.c(n.b(n.a(x)))), b=c2(8, 16, 3, padding=1, groups=8), c=c2(16, 8)),
    "few blocks": net(lambda n, x: n.z(n.b(n.a(x))), b=c2(8, 8, 3, groups=2)),
    "many blocks": net(lambda n, x: n.z(n.b(n.a(x))), b=c2(8, 8, 3, groups=4)),
    "few blocks, more outputs": net(
        lambda n, x: n.z(n.c(n.b(n.a(x)))), b=c2(8, 12, 3, groups=2), c=c2(12, 8)
    ),
    "many blocks, fewer outputs": net(
        lambda n, x: n.z(n.c(n.b(n.a(x)))), b=c2(8, 4, 3, groups=4), c=c2(4, 8)
    ),
    "dilated, strided, lopsided": net(
        lambda n, x: n.z(n.b(functional.pad(n.a(x), (1, 2, 0, 3)))), b=c2(8, 8, 3, dilation=2, stride=2)
    ),
    "same padding": net(lambda n, x: n.z(n.b(n.a(x))), b=c2(8, 8, 3, padding="same", padding_mode="reflect")),
    "transposed": net(lambda n, x: n.z(n.b(n.a(x))), b=lambda: nn.ConvTranspose2d(8, 8, 3, 2)),
    "transposed few blocks": net(
        lambda n, x: n.z(n.b(n.a(x))), b=lambda: nn.ConvTranspose2d(8, 8, 3, 2, groups=2)
    ),
    "transposed many blocks": net(
        lambda n, x: n.z(n.c(n.b(n.a(x)))), b=lambda: nn.ConvTranspose2d(8, 12, 3, 2, groups=4), c=c2(12, 8)
    ),
    "transposed depthwise": net(
        lambda n, x: n.z(n.b(n.a(x))), b=lambda: nn.ConvTranspose2d(8, 8, 3, 2, groups=8)
    ),
    "functional": net(
        lambda n, x: n.z(functional.conv2d(functional.conv2d(n.a(x), n.v), n.w, n.c)),
        v=parameter(6, 8, 1, 1),
        w=parameter(8, 6, 1, 1),
        c=parameter(8),
    ),
    "one dimension": net(
        lambda n, x: n.z(n.b(n.a(x).flatten(2)).unflatten(2, (16, 16))),
        b=lambda: nn.Conv1d(8, 8, 3, padding=1),
    ),
    "three dimensions": net(
        lambda n, x: n.z(n.c(n.b(n.a(x).unsqueeze(2))).squeeze(2)),
        b=lambda: nn.Conv3d(8, 6, (1, 3, 3)),
        c=lambda: nn.ConvTranspose3d(6, 8, (1, 3, 3)),
    ),
    "used twice": net(lambda n, x: n.z(n.b(functional.relu(n.b(n.a(x))))), b=c2()),
    "tied": _tied,
    "frozen": _frozen,
    # Linear.
    "linear after flatten": net(
        lambda n, x: n.c(functional.relu(n.b(functional.max_pool2d(n.a(x), 4).flatten(1)))),
        b=lambda: nn.Linear(128, 6),
        c=lambda: nn.Linear(6, 2),
    ),
    "linear after pooling": net(lambda n, x: n.b(n.a(x).mean(dim=(2, 3))), b=lambda: nn.Linear(8, 2)),
    "linear after view": net(
        lambda n, x: n.b(functional.adaptive_max_pool2d(n.a(x), (2, 1)).view(x.shape[0], -1)),
        b=lambda: nn.Linear(16, 2),
    ),
    "matmul with a parameter": net(
        lambda n, x: n.a(x).mean((2, 3)) @ n.w @ n.v, w=parameter(8, 6), v=parameter(6, 2)
    ),
    # Norms and activations.
    "group norm": net(lambda n, x: n.z(n.b(n.a(x))), b=stack(c2(), lambda: nn.GroupNorm(2, 8))),
    "group norm many": net(lambda n, x: n.z(n.b(n.a(x))), b=stack(c2(), lambda: nn.GroupNorm(4, 8))),
    "instance norm": net(
        lambda n, x: n.z(n.b(n.a(x))), b=stack(c2(), lambda: nn.InstanceNorm2d(8, affine=True))
    ),
    "instance norm, running": net(
        lambda n, x: n.z(n.b(n.a(x))), b=lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    ),
    "batch norm without statistics": net(
        lambda n, x: n.z(n.b(n.a(x))), b=lambda: nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "prelu": net(lambda n, x: n.z(n.c(n.b(n.a(x)))), b=lambda: nn.PReLU(8), c=nn.PReLU),
    "squeeze-excite": net(lambda n, x: n.z(n.b(n.a(x))), b=lambda: SqueezeExcite(8)),
    "glu": net(lambda n, x: n.z(functional.glu(n.b(n.a(x)), 1)), b=c2(8, 16)),
    "dropout": net(
        lambda n, x: n.z(n.b(n.a(x))), b=stack(c2(), lambda: nn.Dropout2d(0.5), lambda: nn.Dropout(0.5))
    ),
    "activations": net(
        lambda n, x: n.z(
            functional.mish(
                functional.logsigmoid(
                    functional.softplus(
                        functional.hardswish(functional.elu(functional.gelu(functional.relu6(n.a(x)))))
                    )
                )
            )
        ),
    ),
    "weights per channel": net(
        lambda n, x: n.z(n.a(x) * n.m + n.s), m=parameter(8, 1, 1), s=tensor(1, 8, 1, 1)
    ),
    "position": net(lambda n, x: n.z(n.a(x) + n.p), p=parameter(1, 8, 16, 16)),
    # Meeting.
    "gate times x plus x": net(_gate, b=c2()),
    "one gate for all": net(lambda n, x: n.z(torch.sigmoid(n.b(n.a(x))) * n.c(n.a(x))), b=c2(8, 1), c=c2()),
    "one gate expanded": net(
        lambda n, x: n.z(torch.sigmoid(n.b(n.a(x))).expand(-1, 8, -1, -1) * n.c(n.a(x))), b=c2(8, 1), c=c2()
    ),
    "one gate expanded as": net(
        lambda n, x: n.z(n.b(n.a(x)).expand_as(n.a(x)) * n.c(n.a(x))), b=c2(8, 1), c=c2()
    ),
    "gate expanded over space": net(
        lambda n, x: n.z(n.b(n.a(x).amax((2, 3), True)).expand(-1, -1, 16, 16) * n.a(x)), b=c2()
    ),
    "residual with a slice": net(
        lambda n, x: n.z(torch.cat((n.b(n.a(x)) + n.a(x)[:, 2:6], n.a(x)[:, 6:], n.a(x)[:, :2]), 1)),
        b=c2(8, 4),
    ),
    "concatenated with itself": net(lambda n, x: n.z(torch.cat((y := n.a(x), y), 1)), z=c2(16, 2)),
    "concatenated with the picture": net(lambda n, x: n.z(torch.cat((x, n.a(x), x), 1)), z=c2(14, 2)),
    "stacked": net(lambda n, x: n.z(torch.stack((n.a(x), n.b(n.a(x))), 2).sum(2)), b=c2()),
    "stacked and flattened": net(
        lambda n, x: n.z(torch.stack((n.a(x), n.b(n.a(x))), 1).flatten(1, 2)), b=c2(), z=c2(16, 2)
    ),
    "max of two": net(lambda n, x: n.z(torch.max(n.a(x), n.b(n.a(x)))), b=c2()),
    "where": net(lambda n, x: n.z(torch.where((y := n.a(x)) > 0, y, n.b(y)).masked_fill(y > 2, 1.0)), b=c2()),
    "in place": net(_in_place, b=c2()),
    "in place after flatten": net(
        lambda n, x: n.b(functional.relu_(n.a(x).mean((2, 3)).flatten(1))), b=lambda: nn.Linear(8, 2)
    ),
    # Movement.
    "channel shuffle": net(lambda n, x: n.z(shuffle(n.a(x), 2))),
    "channel shuffle, built in": net(lambda n, x: n.z(functional.channel_shuffle(n.a(x), 4))),
    "pixel shuffle": net(lambda n, x: n.z(functional.pixel_shuffle(n.b(n.a(x)), 2)), b=c2(8, 32)),
    "pixel shuffle to one": net(
        lambda n, x: n.z(functional.pixel_shuffle(n.b(n.a(x)), 2).flatten(1)),
        b=c2(8, 4),
        z=lambda: nn.Linear(1024, 2),
    ),
    "pixel unshuffle": net(lambda n, x: n.z(functional.pixel_unshuffle(n.a(x), 2)), z=c2(32, 2)),
    "space to depth": net(_space_to_depth, z=c2(32, 2)),
    "uneven split": net(
        lambda n, x: n.z(torch.cat(((p := n.a(x).split([2, 2, 4], 1))[2], p[0] + p[1]), 1)), z=c2(6, 2)
    ),
    "split by size": net(lambda n, x: n.z(torch.cat(n.a(x).split(3, 1)[::-1], 1))),
    "unbind": net(lambda n, x: n.z(torch.stack(n.a(x).unbind(1)[:4], 1)), z=c2(4, 2)),
    "select": net(lambda n, x: n.z(n.a(x)[:, 3].unsqueeze(1) + n.a(x)[:, -1:]), z=c2(1, 2)),
    "slice": net(lambda n, x: n.z(n.a(x)[:, 1:-1]), z=c2(6, 2)),
    "strided slice": net(lambda n, x: n.z(n.a(x)[:, 1::2]), z=c2(4, 2)),
    "empty slice": net(lambda n, x: n.z(torch.cat((n.a(x)[:, 8:], n.a(x)), 1))),
    "narrow": net(lambda n, x: n.z(n.a(x).narrow(1, 2, 5)), z=c2(5, 2)),
    "index by a buffer": net(
        lambda n, x: n.z(n.a(x)[:, n.i]), i=lambda: torch.tensor([6, 1, 1, -1]), z=c2(4, 2)
    ),
    "index by a list": net(lambda n, x: n.z(n.a(x)[:, [7, 0, 3]]), z=c2(3, 2)),
    "index by a table": net(
        lambda n, x: n.z(n.a(x)[:, n.i].flatten(1, 2)), i=lambda: torch.tensor([[6, 1], [1, 2]]), z=c2(4, 2)
    ),
    "index select": net(
        lambda n, x: n.z(n.a(x).index_select(1, n.i)), i=lambda: torch.tensor([5, 2, 0]), z=c2(3, 2)
    ),
    "flip": net(lambda n, x: n.z(n.a(x).flip(1) + n.b(x)), b=c2(3, 8)),
    "roll": net(lambda n, x: n.z(n.a(x).roll(3, 1))),
    "roll along two": net(lambda n, x: n.z(n.a(x).roll((3, 2), (1, 3)))),
    "roll all": net(lambda n, x: n.z(n.a(x)) + n.z(n.a(x)).roll(2)),
    "repeat": net(lambda n, x: n.z(n.a(x).repeat(1, 2, 1, 1)), z=c2(16, 2)),
    "pad channels": net(lambda n, x: n.z(functional.pad(n.a(x), (0, 0, 0, 0, 1, 2))), z=c2(11, 2)),
    "crop channels": net(lambda n, x: n.z(functional.pad(n.a(x), (0, 0, 1, 0, -3, -1))), z=c2(4, 2)),
    "upsample nearest": net(lambda n, x: n.z(functional.interpolate(n.a(x), scale_factor=2))),
    "upsample bilinear": net(lambda n, x: n.z(functional.interpolate(n.a(x), size=(9, 20), mode="bilinear"))),
    "permute and back": net(
        lambda n, x: n.z(n.b(n.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), b=lambda: nn.Linear(8, 8)
    ),
    "squeeze": net(
        lambda n, x: n.z(n.b(n.a(x).mean((2, 3), True).squeeze())[..., None, None]), b=lambda: nn.Linear(8, 8)
    ),
    "squeeze one axis": net(lambda n, x: n.b(n.a(x).amax(3).squeeze(1).mean(2)), b=lambda: nn.Linear(8, 2)),
    "batch mixed with channels": net(_batch_mixed, w=parameter(1, 2, 1, 1)),
    "softmax over space": net(
        lambda n, x: n.z((n.a(x).flatten(2).softmax(-1) * n.a(x).flatten(2)).view(-1, 8, 16, 16))
    ),
    "two inputs": net(_inputs, b=c2(1, 8, 3, padding=1), y=c2(8, 2)),
}

# Kept or refused, with a reason that names module and operation: name -> (network, part of the reason).
KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sort": (net(lambda n, x: n.z(n.a(x).sort(1)[0])), "sort"),
    "fft": (net(lambda n, x: n.z(torch.fft.fft(n.a(x)).real)), "fft"),
    "mean over channels": (net(lambda n, x: n.z((y := n.a(x)) * y.mean(1, True))), "mean.dim mixes channels"),
    "max over channels": (net(lambda n, x: n.z((y := n.a(x)) * y.max(1, True)[0])), "max.dim mixes channels"),
    "softmax over channels": (net(lambda n, x: n.z(n.a(x).softmax(1))), "softmax.int mixes channels"),
    "cumulative sum": (net(lambda n, x: n.z(n.a(x).cumsum(1))), "cumsum"),
    "normalised over channels": (
        net(lambda n, x: n.z(functional.normalize(n.a(x), dim=1))),
        "mixes channels",
    ),
    "computed weight": (
        net(
            lambda n, x: n.z(functional.conv2d(n.a(x), n.w - n.w.mean((1, 2, 3), True))),
            w=parameter(8, 8, 1, 1),
        ),
        "its weight is computed",
    ),
    "einsum": (
        net(lambda n, x: n.z(torch.einsum("bchw,dc->bdhw", n.a(x), n.w)), w=parameter(8, 8)),
        "einsum",
    ),
    "mirrored channels": (
        net(
            lambda n, x: n.z(
                functional.pad(n.a(x).unsqueeze(1), (0, 0, 0, 0, 1, 1), mode="reflect").squeeze(1)
            ),
            z=c2(10, 2),
        ),
        "mirrors channels",
    ),
    "added to the picture": (net(lambda n, x: n.z(n.b(x) + x), b=c2(3, 3), z=c2(3, 2)), "with a constant"),
    "an output": (net(lambda n, x: (n.a(x), n.z(n.a(x)))), "an output of the network"),
    "recurrent": (
        net(
            lambda n, x: n.b(functional.max_pool2d(n.a(x), 8).flatten(2).transpose(1, 2))[0],
            b=lambda: nn.GRU(8, 4, batch_first=True),
        ),
        "gru",
    ),
    "index that is computed": (
        net(lambda n, x: n.z(n.a(x)[:, x.argmax(1)[0, 0]]), z=c2(16, 2)),
        "an index that depends on the input",
    ),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A zoo network with random weights and statistics that are not the neutral ones."""
    torch.manual_seed(seed)
    made = (ZOO[name] if name in ZOO else KEPT[name][0])()
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return made.eval()


@functools.cache
def traced(name: str) -> Groups:
    """Groups, and with them the traced network, of a zoo network; made once."""
    return find_groups(trace(build(name), *inputs(name)))


def inputs(name: str, batch: int = 2, seed: int = 1) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    pictures = torch.randn(batch, 3, SIDE, SIDE)
    return (pictures, torch.randn(batch, 1, SIDE, SIDE)) if name == "two inputs" else (pictures,)


def some_units(groups: Groups, share: float, seed: int = 0, fragile: bool = False) -> set[int]:
    """A random share of the units, of which every piece keeps one; without `fragile` ones unless asked."""
    units = [unit for unit in range(1, groups.units + 1) if fragile or unit not in groups.fragile]
    random.Random(seed).shuffle(units)
    chosen: set[int] = set()
    for unit in units[: round(len(units) * share + 0.5)]:
        if all(not set(piece.tolist()) <= chosen | {unit} for piece in groups.pieces):
            chosen.add(unit)
    return chosen
