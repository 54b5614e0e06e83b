"""Darknet's networks: a `.cfg` text becomes a detector, a `.weights` file fills it.

The format is that of pjreddie/darknet and AlexeyAB/darknet: sections of ``key=value`` lines, one section a layer,
and a header followed by nothing but float32 values in the order of the layers.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.anchors import BOX, AnchorLevel, AnchorLoss, Anchors
from edgeprune.detectors.classes import check_classes, keep_classes, names_of
from edgeprune.detectors.protocol import DetectorError, Targets
from edgeprune.detectors.weights import WeightsError

T = TypeVar("T")
BORDERS = ("replicate", "reflect", "zeros")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "leaky": lambda x: functional.leaky_relu(x, 0.1),
    "relu": functional.relu,
    "relu6": functional.relu6,
    "mish": functional.mish,
    "swish": functional.silu,
    "logistic": torch.sigmoid,
}

_CHANGES_THE_LAYER = (
    "antialiasing",
    "binary",
    "deform",
    "flipped",
    "new_coords",
    "rotate",
    "share_index",
    "stretch",
    "sway",
    "tree",
    "xnor",
)  # options that give a section another meaning, which is not written here


@dataclass(frozen=True)
class Section:
    """One section of a cfg."""

    kind: str
    line: int
    options: Mapping[str, str]

    def integer(self, key: str, default: int) -> int:
        return self._read(key, int, default)

    def number(self, key: str, default: float) -> float:
        return self._read(key, float, default)

    def integers(self, key: str) -> list[int]:
        return self._read(key, lambda text: [int(part) for part in text.split(",") if part], [])

    def numbers(self, key: str) -> list[float]:
        return self._read(key, lambda text: [float(part) for part in text.split(",") if part], [])

    def problem(self, what: str) -> DetectorError:
        return DetectorError(f"cfg, [{self.kind}] in line {self.line}: {what}")

    def _read(self, key: str, parse: Callable[[str], T], default: T) -> T:
        if key not in self.options:
            return default
        try:
            return parse(self.options[key])
        except ValueError:
            raise self.problem(f"{key}={self.options[key]} is no number") from None


def parse_cfg(text: str) -> list[Section]:
    """Split a cfg into its sections.

    Raises:
        DetectorError: With the line that is neither a section, an option nor a comment.
    """
    sections: list[tuple[str, int, dict[str, str]]] = []
    for number, written in enumerate(text.splitlines(), 1):
        line = "".join(written.split())
        if not line or line[0] in "#;":
            continue
        if line[0] == "[" and line[-1] == "]":
            sections.append((line[1:-1], number, {}))
        elif "=" in line and sections:
            key, value = line.split("=", 1)
            sections[-1][2][key] = value
        else:
            raise DetectorError(f"cfg, line {number}: {written.strip()[:60]!r} is no section and no option")
    if not sections or sections[0][0] not in ("net", "network"):
        raise DetectorError("cfg: its first section is not [net]; is it a Darknet network?")
    return [Section(*section) for section in sections]


class Convolution(nn.Module):
    """Convolution, batch norm if any, activation."""

    def __init__(self, section: Section, inputs: int, filters: int) -> None:
        super().__init__()
        size, groups = section.integer("size", 1), section.integer("groups", 1)
        stride = (
            section.integer("stride_y", section.integer("stride", 1)),
            section.integer("stride_x", section.integer("stride", 1)),
        )
        dilation = section.integer("dilation", 1)
        padding = (size // 2 if section.integer("pad", 0) else section.integer("padding", 0)) * dilation
        if min(size, groups, filters, *stride, dilation) < 1 or padding < 0:
            raise section.problem(
                "filters, size, stride, groups and dilation are 1 or more, padding is not negative"
            )
        if inputs % groups or filters % groups:
            raise section.problem(f"{inputs} channels to {filters} filters do not split into {groups} groups")
        normed = bool(section.integer("batch_normalize", 0))
        self.conv = nn.Conv2d(
            inputs, filters, size, stride, padding, groups=groups, dilation=dilation, bias=not normed
        )
        self.norm = nn.BatchNorm2d(filters) if normed else None
        self.activation = _activation(section, "logistic")
        self.stride, self.reach, self.padding = stride, dilation * (size - 1) + 1, padding

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Size of what it makes of an image."""
        rows, columns = (
            (side + 2 * self.padding - self.reach) // stride + 1
            for side, stride in zip((height, width), self.stride, strict=True)
        )
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.activation(x if self.norm is None else self.norm(x))


class MaxPool(nn.Module):
    """Darknet's pooling: `padding` (all but one of the window's size) is split, the odd one right and below.

    What lies outside the image is ignored, which a replicated border equals; for an odd padding, networks
    trained elsewhere may have another border.
    """

    def __init__(self, section: Section, border: str) -> None:
        super().__init__()
        self.size = section.integer("size", section.integer("stride", 1))
        self.stride = section.integer("stride", 1)
        self.padding = section.integer("padding", self.size - 1)
        self.border = "constant" if border == "zeros" else border
        if min(self.size, self.stride) < 1 or not 0 <= self.padding <= self.size:
            raise section.problem("size and stride are 1 or more, padding is at most the size")

    def output(self, side: int) -> int:
        return (side + self.padding - self.size) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        if self.padding % 2 == 0:
            return functional.max_pool2d(x, self.size, self.stride, self.padding // 2)
        before = self.padding // 2
        height, width = (
            max(0, (self.output(side) - 1) * self.stride + self.size - side - before) for side in x.shape[2:]
        )
        if before or height or width:
            x = functional.pad(x, (before, width, before, height), self.border)
        return functional.max_pool2d(x, self.size, self.stride)


class Route(nn.Module):
    """Concatenate layers along their channels, or of each one group of its channels."""

    def __init__(self, groups: int, group: int) -> None:
        super().__init__()
        self.groups, self.group = groups, group

    def forward(self, *xs: Tensor) -> Tensor:
        if self.groups > 1:
            xs = tuple(x.chunk(self.groups, 1)[self.group] for x in xs)
        return xs[0] if len(xs) == 1 else torch.cat(xs, 1)


class Shortcut(nn.Module):
    """Add layers of the same shape."""

    def __init__(self, section: Section) -> None:
        super().__init__()
        self.activation = _activation(section, "linear")

    def forward(self, *xs: Tensor) -> Tensor:
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return self.activation(total)


class Upsample(nn.Module):
    """Repeat pixels."""

    def __init__(self, factor: int, scale: float) -> None:
        super().__init__()
        self.factor, self.scale = float(factor), scale

    def forward(self, x: Tensor) -> Tensor:
        x = functional.interpolate(x, scale_factor=self.factor, mode="nearest")
        return x if self.scale == 1 else x * self.scale


class Reorg(nn.Module):
    """Pixels to channels, in the order of Darknet's own routine.

    It takes the memory of ``(C, H, W)`` for that of ``(C / s^2, H s, W s)``, which other ports do not.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        s, (channels, height, width) = self.stride, x.shape[1:]
        x = x.reshape(-1, channels * height // (s * s), s, width, s)
        x = x.permute(0, 2, 4, 1, 3)  # (N, s, s, C H / s^2, W)
        return x.reshape(-1, channels * s * s, height // s, width // s)


class GlobalAverage(nn.Module):
    """The mean of each channel, ``(N, C, 1, 1)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Darknet(nn.Module):
    """The network of a cfg as a `Detector`. Raw outputs: one ``(N, A x (5 + classes), H, W)`` a detection layer.

    Args:
        input_size: ``(H, W)``; width and height in the cfg are not used.
        classes: of its heads; their number replaces the cfg's.
        cfg: the text of the file.
        border: what is around the image for pools with odd padding, one of `BORDERS`.

    Raises:
        DetectorError: If the cfg cannot be read or built, or has no detection layer.
    """

    preprocessing = Preprocessing("rgb", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0), 127, "letterbox")

    def __init__(
        self,
        input_size: tuple[int, int],
        classes: Sequence[str] = ("person",),
        *,
        cfg: str,
        border: str = BORDERS[0],
    ) -> None:
        super().__init__()
        if border not in BORDERS:
            raise DetectorError(f"border is one of {', '.join(BORDERS)}, not {border!r}")
        self.input_size, self.classes = input_size, check_classes(classes)
        self.variant: Mapping[str, Any] = {"cfg": cfg, "border": border}
        self.untrained = False
        sections = parse_cfg(cfg)
        if sections[0].integer("channels", 3) != 3:
            raise sections[0].problem("only networks for images of 3 channels are read")
        builder = _Builder(sections[1:], input_size, len(self.classes), border)
        self.layers = nn.ModuleList(builder.layers)
        self.sources = tuple(builder.sources)
        self.outputs = tuple(builder.outputs)
        if not self.outputs:
            raise DetectorError("cfg: it has no [region] and no [yolo] section, so it detects nothing")
        if len(set(builder.softmax)) > 1:
            raise DetectorError("cfg: [region] and [yolo] in one network are not read")
        self.anchors = Anchors(
            builder.levels, input_size, len(self.classes), softmax=builder.softmax[0], loss=builder.loss
        )

    @property
    def classes_compete(self) -> bool:
        """Whether a class's score depends on the other classes."""
        return self.anchors.softmax

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        last = {source: index for index, sources in enumerate(self.sources) for source in sources}
        found: dict[int, Tensor] = {-1: images}
        for index, (layer, sources) in enumerate(zip(self.layers, self.sources, strict=True)):
            found[index] = layer(*(found[source] for source in sources))
            for source in sources:
                if last[source] == index and source not in self.outputs:
                    found.pop(source, None)
        return tuple(found[index] for index in self.outputs)

    def decode(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.anchors.decode(raw)

    def loss(self, raw: Sequence[Tensor], targets: Sequence[Targets]) -> Tensor:
        return self.anchors.losses(raw, targets)

    def class_rows(self, kept: Sequence[int]) -> dict[str, list[int]]:
        """Of the convolutions before the detection layers: each anchor has its box and its classes in turn."""
        rows = {}
        block = BOX + len(self.classes)
        for output, level in zip(self.outputs, self.anchors.levels, strict=True):
            head = self.sources[output][0]
            found = [
                anchor * block + value
                for anchor in range(len(level.anchors))
                for value in [*range(BOX), *(BOX + index for index in kept)]
            ]
            for name, _ in self.layers[head].named_parameters():
                rows[f"layers.{head}.{name}"] = found
        return rows


class _Builder:
    """Turns sections into layers, following the shape of every output."""

    def __init__(
        self, sections: Sequence[Section], input_size: tuple[int, int], classes: int, border: str
    ) -> None:
        self.sections, self.input_size, self.classes, self.border = sections, input_size, classes, border
        self.layers: list[nn.Module] = []
        self.sources: list[tuple[int, ...]] = []
        self.shapes: dict[int, tuple[int, int, int]] = {-1: (3, *input_size)}
        self.outputs: list[int] = []
        self.levels: list[AnchorLevel] = []
        self.softmax: list[bool] = []
        self.loss = AnchorLoss()
        for index, section in enumerate(sections):
            refused = [key for key in _CHANGES_THE_LAYER if section.options.get(key, "0") != "0"]
            if refused:
                raise section.problem(f"{refused[0]} is not supported")
            if section.kind not in _LAYERS:
                raise section.problem(
                    f"a layer of this kind is not supported; known: {', '.join(sorted(_LAYERS))}"
                )
            layer, sources, shape = _LAYERS[section.kind](self, section, index)
            if min(shape) < 1:
                raise section.problem(f"nothing is left of an input of {input_size[0]}x{input_size[1]}")
            self.layers.append(layer)
            self.sources.append(sources)
            self.shapes[index] = shape

    def convolutional(self, section: Section, index: int) -> "_Layer":
        inputs, height, width = self.shapes[index - 1]
        filters = section.integer("filters", 1)
        if index + 1 < len(self.sections) and self.sections[index + 1].kind in ("region", "yolo"):
            filters = self.head_filters(self.sections[index + 1], section, filters)
        layer = Convolution(section, inputs, filters)
        return layer, (index - 1,), (filters, *layer.output(height, width))

    def head_filters(self, head: Section, section: Section, filters: int) -> int:
        """Of the convolution before a detection layer: as many as its anchors and our classes need."""
        anchors = len(_anchors_of(head)[1])
        written = anchors * (BOX + head.integer("classes", 20))
        if filters != written:
            raise section.problem(f"filters={filters}, but the [{head.kind}] after it needs {written}")
        return anchors * (BOX + self.classes)

    def maxpool(self, section: Section, index: int) -> "_Layer":
        channels, height, width = self.shapes[index - 1]
        layer = MaxPool(section, self.border)
        return layer, (index - 1,), (channels, layer.output(height), layer.output(width))

    def route(self, section: Section, index: int) -> "_Layer":
        sources = self.earlier(section, "layers", index)
        groups, group = section.integer("groups", 1), section.integer("group_id", 0)
        shapes = [self.shapes[source] for source in sources]
        if len({shape[1:] for shape in shapes}) > 1:
            raise section.problem(
                f"its layers have the sizes {', '.join(f'{h}x{w}' for _, h, w in shapes)}; another input size "
                "(a multiple of 32) may fit"
            )
        if not 0 <= group < groups or any(shape[0] % groups for shape in shapes):
            raise section.problem(f"group {group} of {groups} of {[shape[0] for shape in shapes]} channels")
        channels = sum(shape[0] // groups for shape in shapes)
        return Route(groups, group), sources, (channels, *shapes[0][1:])

    def shortcut(self, section: Section, index: int) -> "_Layer":
        sources = (index - 1, *self.earlier(section, "from", index))
        if len({self.shapes[source] for source in sources}) > 1:
            raise section.problem(f"shapes {[self.shapes[source] for source in sources]} differ")
        if section.options.get("weights_type", "none") != "none":
            raise section.problem("weighted shortcuts are not supported")
        return Shortcut(section), sources, self.shapes[index - 1]

    def upsample(self, section: Section, index: int) -> "_Layer":
        channels, height, width = self.shapes[index - 1]
        factor = section.integer("stride", 2)
        if factor < 1:
            raise section.problem("stride is 1 or more")
        layer = Upsample(factor, section.number("scale", 1.0))
        return layer, (index - 1,), (channels, height * factor, width * factor)

    def reorg(self, section: Section, index: int) -> "_Layer":
        channels, height, width = self.shapes[index - 1]
        stride = section.integer("stride", 1)
        if section.integer("reverse", 0) or section.integer("flatten", 0) or section.integer("extra", 0):
            raise section.problem("reverse, flatten and extra are not supported")
        if stride < 1 or height % stride or width % stride or channels % (stride * stride):
            raise section.problem(f"{channels} channels of {height}x{width} do not split by {stride}")
        shape = (channels * stride**2, height // stride, width // stride)
        return Reorg(stride), (index - 1,), shape

    def dropout(self, section: Section, index: int) -> "_Layer":
        return nn.Dropout(section.number("probability", 0.5)), (index - 1,), self.shapes[index - 1]

    def avgpool(self, section: Section, index: int) -> "_Layer":
        return GlobalAverage(), (index - 1,), (self.shapes[index - 1][0], 1, 1)

    def nothing(self, section: Section, index: int) -> "_Layer":
        return nn.Identity(), (index - 1,), self.shapes[index - 1]

    def region(self, section: Section, index: int) -> "_Layer":
        if section.integer("coords", 4) != 4 or not section.integer("softmax", 1):
            raise section.problem("only coords=4 and softmax=1 are supported")
        height, width = self.shapes[index - 1][1:]
        stride = self.input_size[1] / width, self.input_size[0] / height
        _, anchors = _anchors_of(section)  # in cells
        self.loss = AnchorLoss(
            section.number("thresh", 0.6),
            section.number("object_scale", 5.0),
            section.number("noobject_scale", 1.0),
            section.number("coord_scale", 1.0),
        )
        pixels = tuple((w * stride[0], h * stride[1]) for w, h in anchors)
        return self.detection(section, index, AnchorLevel(pixels, (height, width)), softmax=True)

    def yolo(self, section: Section, index: int) -> "_Layer":
        height, width = self.shapes[index - 1][1:]
        self.loss = AnchorLoss(section.number("ignore_thresh", 0.7), object_scale=1.0)
        _, anchors = _anchors_of(section)
        level = AnchorLevel(anchors, (height, width), section.number("scale_x_y", 1.0))
        return self.detection(section, index, level, softmax=False)

    def detection(self, section: Section, index: int, level: AnchorLevel, *, softmax: bool) -> "_Layer":
        before = self.layers[index - 1] if index else None
        if not isinstance(before, Convolution):
            raise section.problem("the layer before it is no convolution")
        self.outputs.append(index)
        self.levels.append(level)
        self.softmax.append(softmax)
        return nn.Identity(), (index - 1,), self.shapes[index - 1]

    def earlier(self, section: Section, key: str, index: int) -> tuple[int, ...]:
        """Layers by number: from the first one, or, negative, backwards from this one."""
        given = section.integers(key)
        sources = tuple(index + source if source < 0 else source for source in given)
        if not sources or any(not 0 <= source < index for source in sources):
            raise section.problem(f"{key}={section.options.get(key, '')}: these are no earlier layers")
        return sources


_Layer = tuple[nn.Module, tuple[int, ...], tuple[int, int, int]]  # layer, where it reads, shape of its output
_LAYERS: dict[str, Callable[[_Builder, Section, int], _Layer]] = {
    "convolutional": _Builder.convolutional,
    "maxpool": _Builder.maxpool,
    "route": _Builder.route,
    "shortcut": _Builder.shortcut,
    "upsample": _Builder.upsample,
    "reorg": _Builder.reorg,
    "dropout": _Builder.dropout,
    "avgpool": _Builder.avgpool,
    "softmax": _Builder.nothing,
    "cost": _Builder.nothing,
    "region": _Builder.region,
    "yolo": _Builder.yolo,
}


def _activation(section: Section, default: str) -> Callable[[Tensor], Tensor]:
    name = section.options.get("activation", default)
    if name not in ACTIVATIONS:
        raise section.problem(f"activation={name} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _anchors_of(section: Section) -> tuple[list[int], tuple[tuple[float, float], ...]]:
    """Numbers and sizes of the anchors of one detection layer, in the cfg's own unit."""
    values = section.numbers("anchors")
    pairs = tuple(zip(values[::2], values[1::2], strict=False))
    mask = section.integers("mask") or list(range(section.integer("num", 1)))
    sound = len(values) % 2 == 0 and all(0 < value < math.inf for value in values)
    if not sound or any(not 0 <= index < len(pairs) for index in mask):
        raise section.problem(
            f"anchors={section.options.get('anchors', '')} does not have the anchors {mask}"
        )
    return mask, tuple(pairs[index] for index in mask)


D = TypeVar("D", bound=Darknet)


def cfg_classes(cfg: str) -> int:
    """The number of classes that a cfg's detection layers are written for.

    Raises:
        DetectorError: If it has none, or they differ.
    """
    counts = {s.integer("classes", 20) for s in parse_cfg(cfg) if s.kind in ("region", "yolo")}
    if len(counts) != 1:
        raise DetectorError("cfg: it needs [region] or [yolo] sections that agree on their classes")
    return counts.pop()


def build_darknet(path: str) -> Callable[..., Darknet]:
    """How the network of a cfg file is built; a saved step brings the text and needs no file."""

    def build(input_size: tuple[int, int], classes: Sequence[str], **variant: Any) -> Darknet:
        return Darknet(input_size, classes, **(variant or {"cfg": read_cfg(Path(path))}))

    return build


def load_darknet(cfg: str, path: Path, input_size: tuple[int, int], classes: Sequence[str]) -> Darknet:
    """Build the network of a cfg file with the values of a `.weights` file, for some of its classes.

    Names of the classes are read from a `.names` file beside the cfg, a name a line, if there is one.

    Raises:
        DetectorError: If the cfg cannot be read or built.
        WeightsError: If the weights are damaged, of another network, or lack a class.
    """
    text = read_cfg(Path(cfg))
    names = Path(cfg).with_suffix(".names")
    if names.is_file():
        known = tuple(line.strip() for line in names.read_text(errors="replace").splitlines() if line.strip())
        if len(known) != cfg_classes(text):
            raise WeightsError(f"{names} names {len(known)} classes; {cfg} has {cfg_classes(text)}")
    else:
        known = names_of(cfg_classes(text), classes, Path(cfg))
    detector = Darknet(input_size, known, cfg=text)
    read_darknet_weights(detector, path)
    return keep_competing(detector, classes, path)


def keep_competing(detector: D, classes: Sequence[str], path: Path) -> D:
    """`keep_classes`, noting where the scores of the classes left are no longer those that were trained."""
    kept = keep_classes(detector, classes, path)
    kept.untrained = kept is not detector and kept.classes_compete
    return kept


def read_cfg(path: Path) -> str:
    """The text of a cfg file.

    Raises:
        DetectorError: If there is none, or it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DetectorError(f"{path} cannot be read as a Darknet cfg: {error}") from error


def read_darknet_weights(detector: Darknet, path: Path) -> None:
    """Fill a network from a `.weights` file; every value of the file must have its place.

    Header: three int32 (major, minor, revision), then how many images were seen, an int64 from version 0.2 on
    and an int32 before. Then, for each convolution: biases, or with batch norm its biases, scales, means and
    variances; then the weights ``(out, in / groups, H, W)``.

    Raises:
        WeightsError: If the file is missing, too short or too long, or holds values that are not finite.
    """
    values = darknet_values(path)
    needed = sum(tensor.numel() for tensor in _darknet_order(detector))
    if len(values) != needed:
        raise WeightsError(
            f"{path} holds {len(values):,} values, the network of the cfg takes {needed:,}: it is of another "
            "network, of a part of it, or cut short"
        )
    start = 0
    with torch.no_grad():
        for tensor in _darknet_order(detector):
            part = values[start : start + tensor.numel()]
            tensor.copy_(torch.from_numpy(part.astype(np.float32)).view(tensor.shape))
            start += tensor.numel()


def darknet_values(path: Path) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The float32 values behind the header.

    Raises:
        WeightsError: If the file is missing, ends within a value, or holds values that are not finite.
    """
    try:
        data = path.read_bytes()
        major, minor, _ = struct.unpack_from("<3i", data)
    except (OSError, struct.error) as error:
        raise WeightsError(f"{path} is no Darknet weight file: {error}") from error
    wide = major * 10 + minor >= 2 and major < 1000 and minor < 1000
    start = 12 + (8 if wide else 4)
    if not (0 <= major < 1000 and 0 <= minor < 1000) or (len(data) - start) % 4 or len(data) < start:
        raise WeightsError(f"{path} is no Darknet weight file, or is cut short (version {major}.{minor})")
    values = np.frombuffer(data, "<f4", offset=start)
    if not np.isfinite(values).all():
        raise WeightsError(f"{path} is damaged: it has values that are not finite")
    return values


def _darknet_order(detector: Darknet) -> Iterator[Tensor]:
    for layer in detector.layers:
        if not isinstance(layer, Convolution):
            continue
        if layer.norm is None:
            assert layer.conv.bias is not None
            yield layer.conv.bias
        else:
            norm = layer.norm
            assert norm.running_mean is not None and norm.running_var is not None
            yield from (norm.bias, norm.weight, norm.running_mean, norm.running_var)
        yield layer.conv.weight
