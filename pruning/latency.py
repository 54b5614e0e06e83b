"""What a network's kernels cost on a device: a table of measured stairs, and a prediction from it.

The time of a network is the sum over its kernels, and a convolution's is a staircase in its channel counts:
kernels work in blocks, and a count between two steps costs as much as the step above it. Counts off the
kernel's alignment may run another kernel altogether, whose cost is a surface of its own. What is no
convolution (pooling, concatenation, resizing, the decoding of boxes) is a sum of a few terms whose
coefficients are fitted to whole networks that were measured.

The table is measured by `benchmarks/latency_table.py`; its file is described in docs/latency-tables.md.
"""

from __future__ import annotations

import collections.abc
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx

from edgeprune.data.errors import EdgePruneError
from edgeprune.data.files import read_json, write_json
from edgeprune.pruning.counting import TermBuilder, unit_ids
from edgeprune.pruning.graph import Network, argument, layer_of, operation, shapes
from edgeprune.pruning.groups import Groups
from edgeprune.pruning.memory import MemoryModel

VERSION = 2
FILE_NAME = "latency_table.json"
DEPTHWISE = 0  # `LayerKind.groups` where every channel is a group of its own
MEASURED = ("conv", "conv_transpose")  # operations with stairs of their own; others are terms of the rest
_CONVOLUTIONS = {"conv2d": "conv", "conv_transpose2d": "conv_transpose"}
FUSED = ("relu", "leaky_relu", "hardtanh", "silu", "sigmoid", "hardswish")  # measured with their convolution

_FREE = frozenset(  # cost nothing, or are folded into a convolution
    {"", "view", "reshape", "_unsafe_view", "alias", "clone", "contiguous", "detach", "flatten", "unflatten"}
    | {"squeeze", "unsqueeze", "expand", "dropout", "feature_dropout", "to", "_to_copy", "batch_norm"}
)
AS_MUCH = 0.005  # a cost that is higher by no more is the same
LARGEST_MS = 1e6  # what is above is no latency


class LatencyTableError(EdgePruneError):
    """A table that cannot be read, or is not for this device or this network."""


@dataclass(frozen=True)
class LayerKind:
    """What a kernel's time depends on apart from its channel counts."""

    op: str  # "conv", "conv_transpose"; else the ATen operation's name
    input: tuple[int, int]  # (H, W); (1, elements per channel) for what is no image
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = ""  # the operation that runs with it

    @property
    def measured(self) -> bool:
        """Has stairs of its own in a table; otherwise it is a term of the rest."""
        return self.op in MEASURED

    @property
    def one_axis(self) -> bool:
        """The cost depends on one channel count: the in and out channels are the same ones."""
        return self.groups == DEPTHWISE or not self.measured

    def __str__(self) -> str:
        words = [self.op]
        if self.measured:
            words.append("x".join(map(str, self.kernel)))
            words += [f"stride {self.stride[0]}"] * (self.stride != (1, 1))
            words += [f"dilation {self.dilation[0]}"] * (self.dilation != (1, 1))
            words += ["depthwise"] * (self.groups == DEPTHWISE) + [f"{self.groups} groups"] * (
                self.groups > 1
            )
        words.append(f"at {self.input[0]}x{self.input[1]}")
        return " ".join(words + [self.activation] * bool(self.activation))


@dataclass(frozen=True)
class LayerUse:
    """One kernel of a network."""

    layer: str  # the layer with weights; for other operations the graph node's name
    kind: LayerKind
    in_channels: int
    out_channels: int  # the same as `in_channels` where `kind.one_axis`


@dataclass(frozen=True)
class LatencyTerms:
    """The kernels of a network, with their channel counts in terms of the units kept (as `counting.Terms`)."""

    uses: tuple[LayerUse, ...]
    inputs: tuple[int | None, ...]  # of each use: the factor of its in channels; None: they all stay
    outputs: tuple[int | None, ...]  # the same for its out channels; as `inputs` where `kind.one_axis`
    sizes: npt.NDArray[np.int64]  # (factors,): before any removal
    members: Mapping[int, Mapping[int, int]]  # unit -> factor -> positions that it takes

    def kept(self, sizes: Sequence[int] | npt.NDArray[np.int64]) -> tuple[LayerUse, ...]:
        """The same kernels with `sizes[f]` channels in factor f."""
        return tuple(
            replace(
                use,
                in_channels=use.in_channels if i is None else int(sizes[i]),
                out_channels=use.out_channels if o is None else int(sizes[o]),
            )
            for use, i, o in zip(self.uses, self.inputs, self.outputs, strict=True)
        )


def layer_uses(network: Network) -> tuple[LayerUse, ...]:
    """The kernels of a network, in the order of execution; views and what is fused are left out."""
    return tuple(found.use for found in _found_uses(network))


def latency_terms(groups: Groups) -> LatencyTerms:
    """The kernels of a grouped network, with their channel counts as factors."""
    build = TermBuilder(groups)

    def factor(node: fx.Node, dim: int) -> int | None:
        ids = unit_ids(groups, node, dim)
        return build.factor(ids) if ids is not None and ids.any() else None

    found = _found_uses(groups.network)
    inputs = tuple(factor(*each.input) for each in found)
    outputs = tuple(
        i if each.use.kind.one_axis else factor(*each.output) for i, each in zip(inputs, found, strict=True)
    )
    terms = build.terms()
    return LatencyTerms(tuple(each.use for each in found), inputs, outputs, terms.sizes, terms.members)


def free_operations(network: Network) -> frozenset[fx.Node]:
    """Operations that take no time and no memory of their own: views, and what runs as part of a convolution."""
    nodes = [node for node in network.graph.nodes if node.op == "call_function"]
    fused = [_activation_after(node) for node in nodes if operation(node) in _CONVOLUTIONS]
    return frozenset([*(node for node in nodes if operation(node) in _FREE), *filter(None, fused)])


class _FoundUse(NamedTuple):
    use: LayerUse
    input: tuple[fx.Node, int]  # the tensor whose axis holds its in channels
    output: tuple[fx.Node, int]


def _found_uses(network: Network) -> list[_FoundUse]:
    values = shapes(network)
    free = free_operations(network)
    found = []
    for node in network.graph.nodes:
        if node.op != "call_function" or node in free:
            continue
        if operation(node) in _CONVOLUTIONS:
            activation = _activation_after(node)
            found.append(_convolution(node, values, operation(activation) if activation else ""))
        else:
            found += _other(node, values)
    return found


def _activation_after(node: fx.Node) -> fx.Node | None:
    """The activation that runs as part of a convolution: batch norm between them is folded."""
    while len(node.users) == 1:
        [node] = node.users
        if operation(node) in FUSED:
            return node
        if operation(node) != "batch_norm":
            return None
    return None


def _convolution(node: fx.Node, values: Mapping[fx.Node, Any], activation: str) -> _FoundUse:
    source, weight = argument(node, "input"), argument(node, "weight")
    taken, given = values[source].shape, values[node].shape
    kernel, stride, dilation = (
        tuple(values[weight].shape[2:]),
        argument(node, "stride"),
        argument(node, "dilation"),
    )
    padding = argument(node, "padding")
    if isinstance(padding, str):
        padding = [
            d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)
        ]
    groups = argument(node, "groups")
    kind = LayerKind(
        op=_CONVOLUTIONS[operation(node)],
        input=tuple(taken[2:]),
        kernel=kernel,
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=DEPTHWISE if groups > 1 and groups == taken[1] == given[1] else groups,
        activation=activation,
    )
    use = LayerUse(layer_of(str(weight.target)), kind, taken[1], given[1])
    return _FoundUse(use, (source, 1), (node, 1))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[-1])  # one value holds for both


def _other(node: fx.Node, values: Mapping[fx.Node, Any]) -> Iterator[_FoundUse]:
    """What an operation writes; of a concatenation each part, of what gives several tensors all that it reads."""
    sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
    written = [node] if isinstance(values[node], Tensor) else sources[:1]
    if operation(node) == "cat":
        written = sources
    for each in written:
        shape = values[each].shape
        if len(shape) < 2:
            continue
        dim = 1 if len(shape) > 2 else len(shape) - 1
        kind = LayerKind(operation(node), (1, math.prod(shape[2:])) if len(shape) != 4 else tuple(shape[2:]))
        yield _FoundUse(LayerUse(node.name, kind, shape[dim], shape[dim]), (each, dim), (each, dim))


@dataclass(frozen=True)
class Surface:
    """Milliseconds on a grid of channel counts, linear between grid points."""

    in_channels: tuple[int, ...]  # ascending; (0,) where the kind has one axis
    out_channels: tuple[int, ...]  # ascending
    ms: tuple[tuple[float, ...], ...]  # [in][out]

    def at(self, in_channels: int, out_channels: int) -> float:
        """Bilinear; below the first grid point as much as there.

        Raises:
            ValueError: If a count is beyond the last grid point.
        """
        row, right = _place(self.in_channels, in_channels)
        column, above = _place(self.out_channels, out_channels)
        ms = np.array(self.ms)[np.ix_([row - 1, row], [column - 1, column])]
        return float(np.array([1 - right, right]) @ ms @ np.array([1 - above, above]))

    def check(self, where: str) -> None:
        """Raise Malformed if this is no grid of times."""
        for counts in (self.in_channels, self.out_channels):
            if not counts or list(counts) != sorted(set(counts)):
                raise Malformed(f"{where}: counts {counts} do not ascend")
        if [len(row) for row in self.ms] != [len(self.out_channels)] * len(self.in_channels):
            raise Malformed(f"{where}: the times do not fill the grid")
        if any(ms <= 0 for row in self.ms for ms in row):
            raise Malformed(f"{where}: a time is not above 0")


def _place(grid: Sequence[int], count: int) -> tuple[int, float]:
    """The grid point at or above a count, and the share that it has in the interpolation."""
    if count > grid[-1]:
        raise ValueError(count)
    index = bisect_left(grid, count)
    if index == 0:
        return 0, 1.0
    return index, (count - grid[index - 1]) / (grid[index] - grid[index - 1])


@dataclass(frozen=True)
class Stairs:
    """How counts along one axis are costed: multiples of `alignment` cost as much as the next multiple of
    `step`; other counts take another kernel."""

    step: int  # 1: no stairs
    alignment: int = 1  # divides `step`; 1: every count is aligned

    def aligned(self, count: int) -> bool:
        return count % self.alignment == 0

    def above(self, count: int) -> int:
        return -(-count // self.step) * self.step


@dataclass(frozen=True)
class KindCosts:
    """The measured costs of one kind of kernel."""

    kind: LayerKind
    inputs: Stairs
    outputs: Stairs
    aligned: Surface  # on multiples of the steps
    unaligned: Surface | None = None  # off the alignment; None where every count is aligned

    def ms(self, in_channels: int, out_channels: int) -> float:
        """As measured, alone on the device.

        Raises:
            ValueError: If the table does not reach that far.
        """
        if self.kind.one_axis:
            in_channels = 0
        if self.unaligned and not (self.inputs.aligned(in_channels) and self.outputs.aligned(out_channels)):
            # beyond its last point, which is off the alignment too, there is less than one step
            last_in, last_out = self.unaligned.in_channels[-1], self.unaligned.out_channels[-1]
            if in_channels < last_in + self.inputs.step and out_channels < last_out + self.outputs.step:
                in_channels, out_channels = min(in_channels, last_in), min(out_channels, last_out)
            return self.unaligned.at(in_channels, out_channels)
        return self.aligned.at(self.inputs.above(in_channels), self.outputs.above(out_channels))


@dataclass(frozen=True)
class RestTerm:
    """What an operation that is no convolution costs, per million elements that it writes."""

    op: str
    ms: float  # where its channels are a multiple of the step
    unaligned_ms: float  # where they are not: it also leaves the blocked layout and returns to it


@dataclass(frozen=True)
class MeasuredNetwork:
    """A whole network that was measured: evidence of how well the table predicts."""

    channels: Mapping[str, int]  # layer -> channels that it produces
    measured_ms: float  # median, engine scope
    predicted_ms: float  # by a table that was fitted without this network


@dataclass(frozen=True)
class LatencyTable:
    """Costs of kernels, measured on one device with one backend.

    Methods that price a kernel raise LatencyTableError where the table does not hold its kind or its counts.
    """

    device: str  # the board or machine, as it names itself
    target: str
    backend: str
    backend_version: str
    precision: str
    options: Mapping[str, Any]  # of the engine
    power_mode: str | None  # that it was measured in; None: the device has none
    input_size: tuple[int, int]  # (H, W) of the network that it was made for
    date: str  # ISO 8601, UTC
    kinds: tuple[KindCosts, ...]
    rest: tuple[RestTerm, ...]
    rest_step: int  # the multiple of channels that counts as aligned in `rest`
    scale: float  # of every convolution: in a network over alone
    constant_ms: float  # what does not depend on channels
    networks: tuple[MeasuredNetwork, ...]
    memory: MemoryModel | None = None  # None: the device does not tell what engines hold
    power_w: float | None = None  # mean while the unpruned network ran; None: the device does not tell
    disturbed: str | None = None  # what else the device did while whole networks ran; None: nothing was seen
    correction: float = 1.0  # measured over predicted, of the engines measured since
    version: int = VERSION

    def cost_ms(self, kind: LayerKind, in_channels: int, out_channels: int) -> float:
        """One kernel's part of a network's latency; `out_channels` is not looked at where `kind.one_axis`."""
        if not kind.measured:
            term = self._terms.get(kind.op)
            if term is None:
                raise LatencyTableError(f"the latency table holds no {kind.op}: it is of another network")
            aligned = in_channels % self.rest_step == 0
            millions = in_channels * math.prod(kind.input) / 1e6
            return millions * (term.ms if aligned else term.unaligned_ms) * self.correction
        if kind.one_axis:
            out_channels = in_channels
        try:
            alone_ms = self.costs(kind).ms(in_channels, out_channels)
        except ValueError:
            raise LatencyTableError(
                f"the latency table holds {kind} for fewer channels than {in_channels} to {out_channels}"
            ) from None
        return alone_ms * self.scale * self.correction

    def costs(self, kind: LayerKind) -> KindCosts:
        """What was measured of a kind."""
        if kind not in self._costs:
            raise LatencyTableError(
                f"the latency table holds no {kind}: it is of another network or input size"
            )
        return self._costs[kind]

    @cached_property
    def _costs(self) -> Mapping[LayerKind, KindCosts]:
        return {costs.kind: costs for costs in self.kinds}

    @cached_property
    def _terms(self) -> Mapping[str, RestTerm]:
        return {term.op: term for term in self.rest}

    @property
    def fixed_ms(self) -> float:
        """The part of every network's latency that no channel changes."""
        return self.constant_ms * self.correction

    def predict_ms(self, network: Network | Iterable[LayerUse]) -> float:
        """The latency of a whole network: `fixed_ms` and the sum of its kernels' costs."""
        uses = layer_uses(network) if isinstance(network, Network) else network
        return self.fixed_ms + sum(self.cost_ms(use.kind, use.in_channels, use.out_channels) for use in uses)

    def candidates(self, kind: LayerKind, axis: str, most: int) -> tuple[int, ...]:
        """Counts worth choosing along "in" or "out", ascending, up to and with `most`: those on the steps,
        and `most` itself. Without stairs, sixteen evenly spaced ones."""
        if not kind.measured:
            return self.multiples(most)
        costs = self.costs(kind)
        return _multiples((costs.inputs if axis == "in" and not kind.one_axis else costs.outputs).step, most)

    def multiples(self, most: int) -> tuple[int, ...]:
        """Counts worth choosing where no kernel's steps are known: those of `rest_step`, and `most` itself."""
        return _multiples(self.rest_step, most)

    def corrected(self, predicted_ms: float, measured_ms: float) -> LatencyTable:
        """The table that would have predicted `measured_ms`."""
        return replace(self, correction=self.correction * measured_ms / predicted_ms)

    def energy_mj(self, latency_ms: float) -> float | None:
        """Energy of one inference; None where the device does not tell its power."""
        return None if self.power_w is None else self.power_w * latency_ms

    def check(
        self,
        *,
        device: str,
        target: str,
        backend: str,
        backend_version: str | None,
        precision: str,
        dla_core: int | None,
        power_mode: str | None = None,
    ) -> None:
        """Refuse to be used for another device than the one it was measured on.

        Args:
            dla_core: that engines are built for; None: the GPU or CPU.
            power_mode: None: whichever; the measured engine corrects the table then.

        Raises:
            LatencyTableError: If device, target, backend, its version, precision, DLA core or power mode differ.
        """
        wanted = {
            "target": target,
            "device": device,
            "backend": backend,
            "backend_version": backend_version,
            "precision": precision,
            "dla_core": dla_core,
            "power_mode": self.power_mode if power_mode is None else power_mode,
        }
        for name, value in wanted.items():
            found = getattr(self, name)
            if found != value:
                raise LatencyTableError(
                    f"the latency table was measured on {self.target} ({self.device}, {self.backend} "
                    f"{self.backend_version}, {self.precision}) and is not for {target}: its "
                    f"{name.replace('_', ' ')} is {found}, not {value}; measure one there with "
                    f"`edgeprune latency-table measure --target {target}`"
                )

    @property
    def dla_core(self) -> int | None:
        """That the engines were built for; None: the GPU or CPU."""
        return self.options.get("dla_core")

    @property
    def median_error(self) -> float | None:
        """Median of the relative errors of `networks`; None without any."""
        errors = [abs(each.predicted_ms / each.measured_ms - 1) for each in self.networks]
        return float(np.median(errors)) if errors else None

    def write(self, path: Path) -> None:
        """Write the table's file (docs/latency-tables.md), whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """Read a table's file.

        Raises:
            EdgePruneError: If it is missing, unreadable or no JSON; as LatencyTableError, if it is no table.
        """
        return cls.from_json(read_json(path), str(path))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any, where: str) -> LatencyTable:
        """Read what `to_json` gave, after JSON.

        Args:
            where: the file, for messages.

        Raises:
            LatencyTableError: If a field is missing, unknown or malformed, or the version is another.
        """
        if not isinstance(record, Mapping) or "version" not in record or "kinds" not in record:
            raise LatencyTableError(
                f"{where} is no latency table: `edgeprune latency-table measure` makes one"
            )
        if record["version"] == 1:  # knew nothing of memory
            record = {**record, "version": VERSION, "memory": None}
        if record["version"] != VERSION:
            raise LatencyTableError(
                f"{where} is a latency table of version {record['version']!r}; this edgeprune reads {VERSION}"
            )
        try:
            table: LatencyTable = read_record(cls, record)
            table._check_values()
        except Malformed as error:
            raise LatencyTableError(f"{where} is a damaged latency table: {error}") from error
        return table

    def _check_values(self) -> None:
        for costs in self.kinds:
            for stairs in (costs.inputs, costs.outputs):
                if stairs.step < 1 or stairs.alignment < 1 or stairs.step % stairs.alignment:
                    raise Malformed(f"{costs.kind}: step {stairs.step} and alignment {stairs.alignment}")
            for surface in (costs.aligned, costs.unaligned):
                if surface is not None:
                    surface.check(str(costs.kind))
        if len(self._costs) != len(self.kinds) or not self.kinds:
            raise Malformed("no kind, or one twice")
        if self.rest_step < 1 or not (self.scale > 0 and self.correction > 0 and self.constant_ms >= 0):
            raise Malformed("scale, correction and rest step must be above 0, the constant not below")
        if any(each.measured_ms <= 0 for each in self.networks):
            raise Malformed("a measured network took no time")
        if self.memory is not None:
            parts = (self.memory.constant_mib, self.memory.per_weight, self.memory.per_activation)
            if min(parts) < 0 or max(parts) == 0 or self.memory.correction <= 0:
                raise Malformed("memory must have no part below 0, one above, and a correction above 0")
            if any(each.measured_mib <= 0 for each in self.memory.networks):
                raise Malformed("a measured network took no memory")


def _multiples(step: int, most: int) -> tuple[int, ...]:
    """Ascending, up to and with `most`; sixteen evenly spaced counts where the step is 1."""
    step = max(1, most // 16) if step == 1 else step
    return (*range(step, most, step), most)


@dataclass(frozen=True)
class Wasteful:
    """A channel count that costs as much as a larger one."""

    layer: str
    kind: LayerKind
    axis: str  # "in" or "out"
    channels: int
    as_much_as: int  # the largest count on the steps that costs no more
    below: int  # the step below; 0: there is none
    ms: float
    below_ms: float | None  # of the step below

    def __str__(self) -> str:
        line = f"{self.layer}: {self.channels} {self.axis} channels cost as much as {self.as_much_as}"
        if self.below_ms is None or self.below_ms >= self.ms:
            return line
        return f"{line} ({self.ms:.3f} ms); {self.below} would cost {1 - self.below_ms / self.ms:.0%} less"


def wasteful(table: LatencyTable, uses: Iterable[LayerUse]) -> list[Wasteful]:
    """The counts of a network's convolutions that cost as much as larger ones, in the order of the layers.

    Raises:
        LatencyTableError: If the table is of another network.
    """
    found: list[Wasteful] = []
    for use in uses:
        if not use.kind.measured:
            continue
        for axis in ("out",) if use.kind.one_axis else ("in", "out"):
            found += _wasteful_axis(table, use, axis)
    return found


def _wasteful_axis(table: LatencyTable, use: LayerUse, axis: str) -> Iterator[Wasteful]:
    now = use.in_channels if axis == "in" else use.out_channels

    def ms(count: int) -> float:
        if axis == "in":
            return table.cost_ms(use.kind, count, use.out_channels)
        return table.cost_ms(use.kind, count if use.kind.one_axis else use.in_channels, count)

    now_ms = ms(now)
    surface = table.costs(use.kind).aligned
    most = (surface.in_channels if axis == "in" else surface.out_channels)[-1]
    steps = table.candidates(use.kind, axis, most)
    larger = [count for count in steps if count > now and ms(count) <= now_ms * (1 + AS_MUCH)]
    if larger and len(steps) > 1:
        below = max((count for count in steps if count < now), default=0)
        below_ms = ms(below) if below else None
        yield Wasteful(use.layer, use.kind, axis, now, larger[-1], below, now_ms, below_ms)


class Malformed(Exception):
    """What is wrong with a field of a record."""


def read_record(kind: Any, value: Any, where: str = "it") -> Any:  # noqa: PLR0911 - a type each
    """A frozen record, or a value of one of its fields' types, from JSON.

    Args:
        kind: a dataclass of numbers, strings, tuples, mappings and other such dataclasses; or a field's type.
        where: what the value is of, for the message.

    Raises:
        Malformed: If a field is missing, unknown, of another type, or no finite number.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else read_record(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(read_record(arguments[0], item, where) for item in value)
        if len(value) == len(arguments):
            return tuple(read_record(t, item, where) for t, item in zip(arguments, value, strict=True))
    elif origin is collections.abc.Mapping and isinstance(value, dict):
        return {name: read_record(arguments[1], item, f"{where} {name}") for name, item in value.items()}
    elif isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if value.keys() == hints.keys():
            return kind(
                **{name: read_record(hints[name], item, f"{where} {name}") for name, item in value.items()}
            )
        odd = ", ".join(sorted(value.keys() ^ hints.keys()))
        raise Malformed(f"{where} lacks or should not have: {odd}")
    elif kind is float and type(value) in (int, float) and abs(value) < LARGEST_MS:  # NaN is not
        return float(value)
    elif kind is Any or type(value) is kind:
        return value
    raise Malformed(f"{where} is {value!r:.60}")
