"""Measure what a network's kernels cost on a device, as stairs in their channel counts, and how well the sum
of them predicts whole networks.

Kind by kind: first which counts cost the same (few counts, around a multiple of 32), then the steps alone.
Every file of probes holds the same reference kernel, and times are kept relative to it, so that a device that
slows down from one file to the next does not tilt the stairs. At last a few whole networks of other widths,
interleaved, give what is no convolution and the error of the prediction.
"""

import hashlib
import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import nnls

from edgeprune.benchmarks.energy import energy_of, tells_power
from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.latency_probes import QUANTILE, Probe, probe_times, write_probes
from edgeprune.benchmarks.layers import layer_times
from edgeprune.benchmarks.measure import ENERGY_S, disturbed_rounds, gray_image
from edgeprune.data.errors import EdgePruneError
from edgeprune.data.files import read_json, write_json
from edgeprune.deploy.device.bench import END_TO_END, ENGINE
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import Engine, Latencies
from edgeprune.deploy.session import Session
from edgeprune.deploy.targets import Target
from edgeprune.detectors.protocol import Progress
from edgeprune.export.target import STRONGLY_TYPED
from edgeprune.pruning.footprint import footprint
from edgeprune.pruning.graph import Network
from edgeprune.pruning.groups import Groups
from edgeprune.pruning.latency import (
    KindCosts,
    LatencyTable,
    LatencyTerms,
    LayerKind,
    LayerUse,
    Malformed,
    MeasuredNetwork,
    RestTerm,
    Stairs,
    Surface,
    latency_terms,
    read_record,
)
from edgeprune.pruning.memory import Footprint, MeasuredMemory, MemoryModel
from edgeprune.pruning.surgery import remove

T = TypeVar("T")

CACHE_VERSION = 1  # changes when what is measured does: then nothing kept holds
ROUNDS = 3  # in which every file of a kind is profiled once, in random order
PROFILE_RUNS = 15
NETWORKS = 16  # whole networks that are measured
NETWORK_RUNS = 40
BLOCK_RUNS = 5
FILE_BYTES = 48 << 20  # of weights in a file of probes
FILE_PROBES = 80

BASES = (64, 32, 16)  # counts below which steps are looked for, the largest that a kind has
DISTANCES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32)
STEPS = (32, 16, 8, 4, 2)
ALIGNMENTS = (1, 2, 4, 8)
SAME = 0.06  # costs this close are of one step
MOST_OUT, MOST_IN = 16, 4  # grid points
LEAST_MS = 0.01  # per million elements
HELD = 0.1
SMALLEST_SHARE = 0.4  # of a group's channels that stays in a measured network


def measure_table(
    session: Session,
    groups: Groups,
    export: Callable[[Network, Path], object],
    preprocessing: Preprocessing,
    cache: Path,
    *,
    input_size: tuple[int, int],
    precision: str = "fp32",
    options: Mapping[str, Any] | None = None,
    again: bool = False,
    progress: Progress = lambda done, total: None,
    seed: int = 0,
) -> LatencyTable:
    """Measure a network's table, or take from the cache what was measured before.

    Args:
        groups: of the unpruned network.
        export: writes a narrowed network, with its decoding, as the ONNX file that the session builds.
        cache: folder that keeps what was measured, by device, backend, precision, options, power mode, whether
            clocks are locked, and kind of kernel; an interrupted measurement goes on there.
        options: of the engine (`Session.build`).
        again: all is measured although the cache has it: something else ran beside it, or the device has changed.
        progress: takes (done, total): a kind of kernel is one, all whole networks are one.

    Raises:
        DeviceError: If the device fails.
        BenchmarkError: If the engine's profile does not tell its kernels apart, or the precision is int8.
    """
    if precision == "int8":
        raise BenchmarkError("latency tables are measured in fp32 or fp16: probes have no ranges for int8")
    info = session.probe()
    terms = latency_terms(groups)
    wanted = _wanted(terms)
    made_for = {
        "device": info.board,
        "target": session.target.name,
        "backend": info.backend,
        "backend_version": info.backend_version,
        "precision": precision,
        "options": dict(options or {}),
        "power_mode": session.power_mode or info.power_mode,
    }
    locked = session.power["lock_clocks"]
    folder = cache / _hash({"version": CACHE_VERSION, "lock_clocks": locked, **made_for})
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        device = _Device(session, preprocessing, precision, dict(options or {}), Path(temporary), seed)
        measured: list[_KindTimes] = []
        for each in wanted:
            progress(len(measured), len(wanted) + 1)
            path = folder / f"kind-{_hash(asdict(each))}.json"
            times = None if again else _read_cached(path, _KindTimes.from_json)
            if times is None:
                times = _measure_kind(device, each, _usual_stairs(measured, each.kind, session.target))
                write_json(path, asdict(times))
            measured.append(times)
        progress(len(wanted), len(wanted) + 1)
        path = folder / f"networks-{_hash([seed, [asdict(use) for use in terms.uses]])}.json"
        networks = None if again else _read_cached(path, _Networks.from_json)
        if networks is None:
            networks = _measure_networks(device, groups, terms, measured, export)
            write_json(path, asdict(networks))
        progress(len(wanted) + 1, len(wanted) + 1)
    return _table(made_for, measured, networks, terms, input_size)


@dataclass(frozen=True)
class _Wanted:
    """A kind of kernel and the channel counts that a network may use it with."""

    kind: LayerKind
    in_most: int
    out_most: int
    in_fixed: bool  # no channel can go: one count is measured
    out_fixed: bool


def _wanted(terms: LatencyTerms) -> list[_Wanted]:
    """Every measured kind once, the widest first: the narrow ones may need its steps."""
    found: dict[LayerKind, _Wanted] = {}
    for use, i, o in zip(terms.uses, terms.inputs, terms.outputs, strict=True):
        if use.kind.measured:
            before = found.get(use.kind, _Wanted(use.kind, use.in_channels, use.out_channels, True, True))
            found[use.kind] = _Wanted(
                use.kind,
                max(before.in_most, use.in_channels),
                max(before.out_most, use.out_channels),
                # a count of its own beside another one is as good as free
                before.in_fixed and i is None and before.in_most == use.in_channels,
                before.out_fixed and o is None and before.out_most == use.out_channels,
            )
    return sorted(found.values(), key=lambda each: -min(each.in_most, each.out_most))


@dataclass(frozen=True)
class _KindTimes:
    """What was measured of a kind, in units of the reference kernel; `measurements` of counts in all."""

    costs: KindCosts
    reference_ms: float
    measurements: int

    @classmethod
    def from_json(cls, record: Any) -> "_KindTimes":
        found: _KindTimes = read_record(cls, record)
        return found


@dataclass(frozen=True)
class _Networks:
    """Whole networks that were measured together."""

    sizes: tuple[tuple[int, ...], ...]  # of each, by factor
    measured_ms: tuple[float, ...]  # of the engine, interleaved, nothing profiled
    convolutions_ms: tuple[float, ...]  # the profile's sum over the kernels of convolutions
    rest_ms: tuple[float, ...]  # over all others
    footprints: tuple[Footprint, ...]
    memory_mib: tuple[float, ...] | None  # of the engine; None: the device does not tell
    power_w: float | None
    disturbed: str | None

    @classmethod
    def from_json(cls, record: Any) -> "_Networks":
        found: _Networks = read_record(cls, record)
        return found


class _Device:
    """Times probes on a session's device."""

    def __init__(
        self,
        session: Session,
        preprocessing: Preprocessing,
        precision: str,
        options: Mapping[str, Any],
        folder: Path,
        seed: int,
    ) -> None:
        self.session = session
        self.preprocessing = preprocessing
        self.folder = folder
        self.image = gray_image(folder)
        self.seed = seed
        self._shuffle = random.Random(seed).shuffle
        self._precision = precision
        self._options = options
        self._files = 0

    def build(self, model: Path) -> Engine:
        return self.session.build(model, self._precision, self._options)

    def relative_times(self, probes: Sequence[Probe]) -> tuple[list[float], float]:
        """The time of each probe over that of the reference kernel, and the latter in milliseconds."""
        target = self.session.target
        files = []
        for part in _parts(probes):
            self._files += 1
            path = self.folder / f"probes{self._files}.onnx"
            write_probes(part, path, opset=target.max_opset, half=is_typed_half(target, self._precision))
            files.append((part, self.build(path)))
        samples: dict[Probe, list[float]] = {probe: [] for probe in probes}
        references = []
        for _ in range(ROUNDS):
            self._shuffle(files)
            for part, engine in files:
                profile = self.session.profile(engine, self.image, self.preprocessing, runs=PROFILE_RUNS)
                found = probe_times(profile, len(part))
                references.append(found.reference_ms)
                for probe, times_ms in zip(part, found.times_ms, strict=True):
                    samples[probe] += [ms / found.reference_ms for ms in times_ms]
        times = [float(np.quantile(samples[probe], QUANTILE)) for probe in probes]
        return times, float(np.median(references))

    def kernel_times(self, engines: Sequence[tuple[Path, Engine]]) -> list[tuple[float, float]]:
        """Of each network the milliseconds of its convolutions' kernels and of all others."""
        samples: list[dict[str, list[float]]] = [{} for _ in engines]
        order = list(range(len(engines)))
        for _ in range(ROUNDS):
            self._shuffle(order)
            for index in order:
                profile = self.session.profile(
                    engines[index][1], self.image, self.preprocessing, runs=PROFILE_RUNS
                )
                for name, times_ms in profile.times_ms.items():
                    samples[index].setdefault(name, []).extend(times_ms)
        found = []
        for (model, _), kernels in zip(engines, samples, strict=True):
            times = {name: float(np.quantile(times_ms, QUANTILE)) for name, times_ms in kernels.items()}
            layers = sum(layer.time_ms or 0.0 for layer in layer_times(model, times))
            found.append((layers, sum(times.values()) - layers))
        return found


def is_typed_half(target: Target, precision: str) -> bool:
    """Whether a target's engines take float16 from the file, and not from the builder's settings."""
    return precision == "fp16" and int((target.tensorrt or "0").split(".")[0]) >= STRONGLY_TYPED


def _parts(probes: Sequence[Probe]) -> Iterator[list[Probe]]:
    """In files of bounded size."""
    part: list[Probe] = []
    for probe in probes:
        full = sum(each.weight_bytes for each in part) + probe.weight_bytes > FILE_BYTES
        if part and (full or len(part) == FILE_PROBES):
            yield part
            part = []
        part.append(probe)
    yield part


def find_stairs(costs: Mapping[int, float], usual: Stairs | None = None) -> Stairs | None:
    """The stairs that costs by count lie on.

    Counts between two multiples of the step cost the same, if they are aligned, and the next step clearly
    less. The stairs that are usual are tried first; then the smallest alignment counts that leaves stairs,
    and the largest step. Where every other count costs more than the multiple above, that is the alignment.

    Returns:
        None where the costs hardly change, so that no stairs can be told from none; ``Stairs(1)`` where they
        change, and not in steps.
    """
    most, least = max(costs), min(costs)
    if costs[least] > (1 - SAME) * costs[most]:
        return None
    tried = [Stairs(step, alignment) for alignment in ALIGNMENTS for step in STEPS if step >= 2 * alignment]
    for stairs in [usual, *tried] if usual else tried:
        if 8 * stairs.step >= most and _on_stairs(costs, stairs, 1 / 2 if stairs == usual else 1 / 3):
            return stairs
    return next((Stairs(step, step) for step in STEPS if _only_multiples(costs, step)), Stairs(1))


def _only_multiples(costs: Mapping[int, float], step: int) -> bool:
    """Whether every count between two multiples costs clearly more than the one above it."""
    above = {count: costs.get(-(-count // step) * step) for count in costs if count % step}
    dearer = [costs[count] > (1 + SAME) * ms for count, ms in above.items() if ms is not None]
    return len(dearer) > 0 and all(dearer)


def _on_stairs(costs: Mapping[int, float], stairs: Stairs, share: float) -> bool:
    """Whether the costs of a step lie within a share of what the next one is lower by."""
    levels: dict[int, dict[int, float]] = {}
    for count, cost in costs.items():
        if stairs.aligned(count):
            levels.setdefault(stairs.above(count), {})[count] = cost
    heights = [float(np.median(list(levels[top].values()))) for top in sorted(levels)]
    drops = [1 - low / high for low, high in pairwise(heights)]
    if not drops or min(drops) <= 0:
        return False
    widest = max(max(level) - min(level) for level in levels.values())
    spreads = [_spread(list(level.values())) for level in levels.values()]
    # Without stairs, counts half a step apart would differ by half a drop.
    return max(spreads) < min(2 * SAME, share * min(drops)) and widest >= stairs.step / 2


def _spread(costs: Sequence[float]) -> float:
    """How far costs lie apart, without the highest of five or more: something else may have run just then."""
    kept = sorted(costs)[:-1] if len(costs) >= 5 else costs
    return max(kept) / min(kept) - 1


def _usual_stairs(measured: Sequence[_KindTimes], kind: LayerKind, target: Target) -> tuple[Stairs, Stairs]:
    """What most kinds of the same operation have; before there is any, what the target's kernels like."""
    alike = [
        each.costs
        for each in measured
        if each.costs.kind.op == kind.op and each.costs.kind.one_axis == kind.one_axis
    ]

    def most_common(sides: list[Stairs]) -> Stairs:
        found = Counter(side for side in sides if side.step > 1).most_common(1)
        return found[0][0] if found else Stairs(target.channel_multiple)

    return most_common([costs.inputs for costs in alike]), most_common([costs.outputs for costs in alike])


def _measure_kind(device: _Device, wanted: _Wanted, usual: tuple[Stairs, Stairs]) -> _KindTimes:
    kind = wanted.kind
    inputs, outputs, tried = _find_steps(device, wanted, usual)
    aligned = _Grid(
        (0,) if kind.one_axis else _counts(inputs, wanted.in_most, wanted.in_fixed, MOST_IN),
        _counts(outputs, wanted.out_most, wanted.out_fixed, MOST_OUT),
    )
    grids = [aligned]
    if kind.groups <= 1 and max(inputs.alignment, outputs.alignment) > 1:
        grids.append(
            _Grid(
                aligned.inputs if kind.one_axis else _off_counts(inputs, wanted.in_most, wanted.in_fixed),
                _off_counts(outputs, wanted.out_most, wanted.out_fixed),
            )
        )
    probes = [probe for grid in grids for probe in grid.probes(kind)]
    times, reference_ms = device.relative_times(probes)
    surfaces = []
    for grid in grids:
        size = len(grid.inputs) * len(grid.outputs)
        surfaces.append(grid.surface(times[:size]))
        times = times[size:]
    costs = KindCosts(kind, inputs, outputs, *surfaces)
    return _KindTimes(costs, reference_ms, tried + len(probes))


def _find_steps(device: _Device, wanted: _Wanted, usual: tuple[Stairs, Stairs]) -> tuple[Stairs, Stairs, int]:
    """The stairs of both axes, and how many counts were measured for them."""
    kind = wanted.kind
    if kind.groups > 1:
        return Stairs(kind.groups, kind.groups), Stairs(kind.groups, kind.groups), 0
    in_base = None if wanted.in_fixed or kind.one_axis else _base(wanted.in_most)
    out_base = None if wanted.out_fixed else _base(wanted.out_most)
    in_at, out_at = in_base or wanted.in_most, out_base or wanted.out_most
    in_counts, out_counts = _near(in_base), _near(out_base)
    probes = [Probe(kind, count, out_at) for count in in_counts]
    probes += [Probe(kind, count if kind.one_axis else in_at, count) for count in out_counts]
    times = device.relative_times(probes)[0] if probes else []
    found = []
    for counts, fixed, default in (
        (in_counts, wanted.in_fixed or kind.one_axis, usual[0]),
        (out_counts, wanted.out_fixed, usual[1]),
    ):
        costs = dict(zip(counts, times, strict=False))
        stairs = find_stairs(costs, default) if counts else None
        times = times[len(counts) :]
        found.append(Stairs(1) if fixed else stairs or default)
    return found[0], found[1], len(probes)


def _base(most: int) -> int | None:
    """The count around which steps are looked for; None where there are too few channels."""
    return next((base for base in BASES if base <= most), None)


def _near(base: int | None) -> list[int]:
    return [base - distance for distance in DISTANCES if 2 * distance <= base] if base else []


def _counts(stairs: Stairs, most: int, fixed: bool, points: int) -> tuple[int, ...]:
    """A grid on the steps, with the smallest and the largest; evenly spaced if wide, else by ratio."""
    if fixed:
        return (most,)
    space = np.linspace if points == MOST_OUT else np.geomspace
    if stairs.step == 1:  # ends with the largest itself: all grids of a kind then reach as far
        return tuple(sorted({round(count) for count in space(max(1, most // points), most, points)}))
    step = stairs.step
    top = -(-most // step) * step
    spread = [round(count / step) * step for count in space(step, top, points)]
    return tuple(range(step, top + 1, step)) if top // step <= points else tuple(sorted(set(spread)))


def _off_counts(stairs: Stairs, most: int, fixed: bool) -> tuple[int, ...]:
    """A coarse grid off the alignment."""
    counts = _counts(stairs, most, fixed, MOST_IN)
    return counts if fixed or stairs.alignment == 1 else tuple(count - 1 for count in counts)


@dataclass(frozen=True)
class _Grid:
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def probes(self, kind: LayerKind) -> list[Probe]:
        return [Probe(kind, o if kind.one_axis else i, o) for i in self.inputs for o in self.outputs]

    def surface(self, times: Sequence[float]) -> Surface:
        rows = np.reshape(times, (len(self.inputs), len(self.outputs))).tolist()
        return Surface(self.inputs, self.outputs, tuple(map(tuple, rows)))


def _measure_networks(
    device: _Device,
    groups: Groups,
    terms: LatencyTerms,
    measured: Sequence[_KindTimes],
    export: Callable[[Network, Path], object],
) -> _Networks:
    engines: list[tuple[Path, Engine]] = []
    sizes, footprints = [], []
    step = _rest_step(measured)
    for number, gone in enumerate(_removals(groups, step, device.seed)):
        path = device.folder / f"network{number}.onnx"
        network = remove(groups, gone)
        export(network, path)
        footprints.append(footprint(network, step))
        engines.append((path, device.build(path)))
        taken = Counter(f for unit in gone for f, count in terms.members[unit].items() for _ in range(count))
        sizes.append(tuple(int(size) - taken[factor] for factor, size in enumerate(terms.sizes)))
    kernels = device.kernel_times(engines)
    latencies = device.session.benchmark(
        [engine for _, engine in engines],
        [device.image],
        device.preprocessing,
        runs=NETWORK_RUNS,
        block_runs=BLOCK_RUNS,
        seed=device.seed,
        scopes=[ENGINE],
    )
    return _Networks(
        sizes=tuple(sizes),
        measured_ms=tuple(
            float(np.median(latencies.samples_ms(index, ENGINE))) for index in range(len(engines))
        ),
        convolutions_ms=tuple(convolutions for convolutions, _ in kernels),
        rest_ms=tuple(rest for _, rest in kernels),
        footprints=tuple(footprints),
        memory_mib=_memory_mib([engine for _, engine in engines]),
        power_w=_power_w(device, engines[0][1]) if tells_power(latencies.telemetry) else None,
        disturbed=_disturbed(latencies, [engine for _, engine in engines]),
    )


def _memory_mib(engines: Sequence[Engine]) -> tuple[float, ...] | None:
    """Of all engines; None where the device does not tell that of each."""
    told = tuple(engine.memory_mib for engine in engines if engine.memory_mib)
    return told if len(told) == len(engines) else None


def _power_w(device: _Device, engine: Engine) -> float | None:
    """What the device draws while one engine runs over and over."""
    energy = energy_of(
        device.session.benchmark(
            [engine],
            [device.image],
            device.preprocessing,
            runs=1,
            min_seconds=ENERGY_S,
            scopes=[END_TO_END],
        )
    )
    return energy.watts if energy else None


def _disturbed(latencies: Latencies, engines: Sequence[Engine]) -> str | None:
    """What disturbed more than half of the rounds."""
    rounds, found = disturbed_rounds(latencies, engines)
    return next(iter(found.values())) if 2 * len(found) > rounds else None


def _removals(groups: Groups, step: int, seed: int) -> Iterator[list[int]]:
    """Units to remove: none; then in turn every group by one share or each by its own, and down to multiples
    of the step or to any count."""
    rng = random.Random(seed)
    yield []
    for number in range(1, NETWORKS):
        same = rng.uniform(SMALLEST_SHARE, 1.0)
        gone: set[int] = set()
        for group in groups.groups:
            count = len(group.units)
            keep = round(count * (same if number % 4 < 2 else rng.uniform(SMALLEST_SHARE, 1.0)))
            if number % 2 == 0:
                keep = round(keep / step) * step or keep
            gone.update(rng.sample(group.units, count - min(max(keep, 1), count)))
        for piece in groups.pieces:
            if gone.issuperset(piece.tolist()):
                gone.remove(int(piece[0]))
        yield sorted(gone)


def _rest_step(measured: Sequence[_KindTimes]) -> int:
    """The block of the layout that the convolutions write: the step that most of them have."""
    steps = Counter(each.costs.outputs.step for each in measured if each.costs.outputs.step > 1)
    return steps.most_common(1)[0][0] if steps else 1


def _table(
    made_for: Mapping[str, Any],
    measured: Sequence[_KindTimes],
    networks: _Networks,
    terms: LatencyTerms,
    input_size: tuple[int, int],
) -> LatencyTable:
    reference_ms = float(np.median([each.reference_ms for each in measured]))
    table = LatencyTable(
        **made_for,
        input_size=input_size,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kinds=tuple(_in_ms(each.costs, reference_ms) for each in measured),
        rest=(),
        rest_step=_rest_step(measured),
        scale=1.0,
        constant_ms=0.0,
        networks=(),
        power_w=networks.power_w,
        disturbed=networks.disturbed,
    )
    observed = [
        Observed(terms.kept(sizes), *times)
        for sizes, *times in zip(
            networks.sizes, networks.measured_ms, networks.convolutions_ms, networks.rest_ms, strict=True
        )
    ]
    evidence = []
    for index, own in enumerate(observed):
        without = fitted(table, observed[:index] + observed[index + 1 :])
        channels = {use.layer: use.out_channels for use in own.uses if use.kind.measured}
        evidence.append(MeasuredNetwork(channels, own.measured_ms, without.predict_ms(own.uses)))
    memory = networks.memory_mib and fitted_memory(networks.footprints, networks.memory_mib)
    return replace(fitted(table, observed), networks=tuple(evidence), memory=memory or None)


def _in_ms(costs: KindCosts, reference_ms: float) -> KindCosts:
    def scaled(surface: Surface) -> Surface:
        return replace(surface, ms=tuple(tuple(ms * reference_ms for ms in row) for row in surface.ms))

    return replace(
        costs, aligned=scaled(costs.aligned), unaligned=scaled(costs.unaligned) if costs.unaligned else None
    )


@dataclass(frozen=True)
class Observed:
    """A whole network and its times."""

    uses: Sequence[LayerUse]
    measured_ms: float
    convolutions_ms: float
    rest_ms: float


def fitted(table: LatencyTable, networks: Sequence[Observed]) -> LatencyTable:
    """The table with the scale of its convolutions, the constant and the rest's terms that suit whole networks.

    The scale is what kernels take in networks over what they take alone. The rest is fitted to the other
    kernels by least squares with no negative coefficient: first one cost per element for all operations (and
    one more off the step), then each its own, held near the common one by a penalty, since a few networks
    cannot tell a dozen operations apart. At last all is multiplied by what engines take over the sum of their
    profiled kernels.
    """
    alone_ms = [
        sum(table.cost_ms(u.kind, u.in_channels, u.out_channels) for u in network.uses if u.kind.measured)
        for network in networks
    ]
    scale = _median_ratio([each.convolutions_ms for each in networks], alone_ms)
    ops = sorted({use.kind.op for network in networks for use in network.uses if not use.kind.measured})
    elements = np.zeros((len(networks), 2, len(ops)))  # millions: all of them, and those off the step
    for row, network in enumerate(networks):
        for use in network.uses:
            if not use.kind.measured:
                millions = use.in_channels * math.prod(use.kind.input) / 1e6
                elements[row, 0, ops.index(use.kind.op)] += millions
                elements[row, 1, ops.index(use.kind.op)] += millions * (use.in_channels % table.rest_step > 0)
    ones = np.ones((len(networks), 1))
    rest_ms = np.array([each.rest_ms for each in networks])
    common = nnls(np.concatenate([ones, elements.sum(2)], axis=1), rest_ms)[0]
    columns = np.concatenate([ones, elements[:, 0], elements[:, 1]], axis=1)
    expected = np.concatenate([common[:1], np.repeat(np.maximum(common[1:], LEAST_MS), len(ops))])
    # A term at twice its expected cost weighs as much as HELD of one network's rest missed.
    weights = HELD * float(np.median(rest_ms)) / np.maximum(expected, LEAST_MS)
    weights[0] = 0.0
    constant_ms, *terms = nnls(
        np.concatenate([columns, np.diag(weights)]), np.concatenate([rest_ms, weights * expected])
    )[0].tolist()
    engine = _median_ratio(
        [each.measured_ms for each in networks], [each.convolutions_ms + each.rest_ms for each in networks]
    )
    rest = tuple(
        RestTerm(op, engine * ms, engine * (ms + more))
        for op, ms, more in zip(ops, terms[: len(ops)], terms[len(ops) :], strict=True)
    )
    return replace(table, scale=engine * scale, constant_ms=engine * constant_ms, rest=rest)


def fitted_memory(footprints: Sequence[Footprint], memory_mib: Sequence[float]) -> MemoryModel:
    """The model that suits the memory of whole networks' engines, and how it predicts each of them without it.

    The relative errors' least squares, with no negative coefficient.
    """
    measured = np.array(memory_mib)
    columns = np.array([(1.0, each.weights_mib, each.activations_mib) for each in footprints])
    relative = columns / measured[:, None]

    def fit(chosen: np.ndarray) -> np.ndarray:
        coefficients: np.ndarray = nnls(relative[chosen], np.ones(chosen.sum()))[0]
        return coefficients

    numbers = np.arange(len(measured))
    evidence = tuple(
        MeasuredMemory(float(measured[own]), float(columns[own] @ fit(numbers != own))) for own in numbers
    )
    constant_mib, per_weight, per_activation = fit(numbers >= 0).tolist()
    return MemoryModel(constant_mib, per_weight, per_activation, evidence)


def _median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return float(np.median(np.array(values) / np.array(others)))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read_cached(path: Path, read: Callable[[Any], T]) -> T | None:
    """What was measured before; None where there is nothing, or nothing that can be read."""
    try:
        return read(read_json(path))
    except (EdgePruneError, Malformed):
        return None
