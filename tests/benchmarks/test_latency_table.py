"""Stairs, drift, interruption and cost of measuring, on a device whose kernels' costs are known; a small one
on ONNX Runtime."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import kernel_device
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_device import KernelDevice, export, kernel_ms
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.benchmarks.errors import BenchmarkError
from edgeprune.benchmarks.latency_figure import draw_stairs
from edgeprune.benchmarks.latency_probes import Probe, probe_times, write_probes
from edgeprune.benchmarks.latency_table import find_stairs, fitted_memory, measure_table
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.deploy.records import Profile
from edgeprune.deploy.session import local_session
from edgeprune.deploy.targets import Target, known_targets, load_target
from edgeprune.export.check import check_model
from edgeprune.pruning.footprint import footprint
from edgeprune.pruning.graph import trace
from edgeprune.pruning.groups import Groups, find_groups
from edgeprune.pruning.latency import DEPTHWISE, LatencyTable, LayerKind, Stairs, layer_uses
from edgeprune.pruning.memory import Footprint, MemoryModel
from edgeprune.pruning.surgery import remove

PREPROCESSING = Preprocessing("bgr", (0.0,) * 3, (1.0,) * 3)
SIDE = 32


class Small(nn.Module):
    """Four kinds of kernel, one of them depthwise, and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.wide = nn.Conv2d(32, 64, 3, 1, 1)
        self.depth = nn.Conv2d(64, 64, 3, 1, 1, groups=64)
        self.deep = nn.Conv2d(64, 96, 3, 1, 1)
        self.head = nn.Conv2d(96, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.stem(images)), 2)
        x = functional.relu(self.depth(functional.relu(self.wide(x))))
        result: Tensor = self.head(functional.relu(self.deep(x)))
        return result


@pytest.fixture(scope="module")
def groups() -> Groups:
    return find_groups(trace(Small().eval(), torch.zeros(1, 3, SIDE, SIDE)))


def measured(device: KernelDevice, groups: Groups, cache: Path, *, again: bool = False) -> LatencyTable:
    return measure_table(
        device,  # type: ignore[arg-type]
        groups,
        export,
        PREPROCESSING,
        cache,
        input_size=(SIDE, SIDE),
        again=again,
    )


def kinds_of(table: LatencyTable) -> dict[str, tuple[Stairs, Stairs]]:
    return {str(costs.kind): (costs.inputs, costs.outputs) for costs in table.kinds}


DEVICES = {
    "quiet": KernelDevice,
    "noisy": lambda: KernelDevice(noise=0.02),
    "drifting": lambda: KernelDevice(slowdown=lambda call: 1 + 0.02 * call, noise=0.01),
    "jumping": lambda: KernelDevice(slowdown=lambda call: 2.5 if call % 3 else 1.0),
}


@pytest.mark.parametrize("name", DEVICES)
def test_steps_are_found_and_costs_are_the_true_ones(name: str, groups: Groups, tmp_path: Path) -> None:
    """The device's own steps and alignment; every count's cost, relative to another count's of its kind, within
    3 % of the truth on the steps, although the device may get slower while it is measured."""
    table = measured(DEVICES[name](), groups, tmp_path)
    wide = Stairs(kernel_device.IN_STEP, kernel_device.ALIGNMENT)
    out = Stairs(kernel_device.OUT_STEP)
    found = kinds_of(table)
    assert found["conv 3x3 at 8x8 relu"] == (wide, out)
    assert found["conv 3x3 stride 2 at 32x32 relu"] == (Stairs(1), out)
    assert found["conv 3x3 depthwise at 8x8 relu"] == (Stairs(1), Stairs(8, 8))
    assert found["conv 1x1 at 8x8"] == (wide, Stairs(1))
    kind = next(costs.kind for costs in table.kinds if str(costs.kind) == "conv 3x3 at 8x8 relu")
    most = table.cost_ms(kind, 64, 96)
    for ins, outs in [(64, 88), (60, 95), (48, 40), (20, 24), (16, 8)]:
        truth = kernel_ms(64, 9, ins, outs) / kernel_ms(64, 9, 64, 96)
        assert table.cost_ms(kind, ins, outs) / most == pytest.approx(truth, rel=0.03)
    for ins, outs in [(63, 96), (33, 50), (17, 20)]:
        truth = kernel_ms(64, 9, ins, outs) / kernel_ms(64, 9, 64, 96)
        assert table.cost_ms(kind, ins, outs) / most == pytest.approx(truth, rel=0.1)


def test_networks_of_other_widths_are_predicted(groups: Groups, tmp_path: Path) -> None:
    """Within 3 %, of those the rest was fitted on (each left out) and of fresh ones, whose true time is the sum
    that the device would take."""
    device = KernelDevice(noise=0.02)
    table = measured(device, groups, tmp_path)
    assert table.median_error is not None
    assert table.median_error < 0.03
    assert table.disturbed is None
    rng = np.random.default_rng(5)
    for number in range(8):
        gone = [
            int(unit)
            for group in groups.groups
            for unit in rng.choice(group.units, int(len(group.units) * rng.uniform(0, 0.6)), replace=False)
        ]
        network = remove(groups, gone)
        path = tmp_path / f"fresh{number}.onnx"
        export(network, path)
        truth = sum(kernel_device._times(onnx.load(path)).values())
        assert table.predict_ms(network) == pytest.approx(truth, rel=0.06)


def test_memory_is_fitted_to_whole_networks(groups: Groups, tmp_path: Path) -> None:
    """The parts that the device's engines are made of are found, so that each is predicted by the others; what was
    kept of kernels before memory was measured is not measured again, whole networks are."""
    truth = MemoryModel(1.5, 1.1, 2.5, ())
    table = measured(KernelDevice(), groups, tmp_path)
    assert table.memory is None
    networks = next(tmp_path.rglob("networks-*.json"))
    record = json.loads(networks.read_text())
    del record["memory_mib"], record["footprints"]
    networks.write_text(json.dumps(record))
    later = KernelDevice(memory=truth)
    table = measured(later, groups, tmp_path)
    assert len(later.probed) == 0
    assert later.benchmarks == 1
    assert table.memory is not None
    found = (table.memory.constant_mib, table.memory.per_weight, table.memory.per_activation)
    assert found == pytest.approx((1.5, 1.1, 2.5))
    assert len(table.memory.networks) == len(table.networks)
    assert table.memory.median_error == pytest.approx(0, abs=1e-9)
    assert table.memory.networks[0].measured_mib == pytest.approx(
        truth.predict_mib(footprint(groups.network, kernel_device.OUT_STEP))
    )


@given(
    st.tuples(st.floats(0, 5), st.floats(0.5, 2), st.floats(0.5, 4)),
    st.floats(0, 0.05),
    st.integers(0, 99),
)
def test_a_fit_of_noisy_memory(truth: tuple[float, float, float], noise: float, seed: int) -> None:
    """No part is below 0, and networks that were left out are predicted within a few times the noise."""
    rng = np.random.default_rng(seed)
    held = [Footprint(*each) for each in rng.uniform((1, 2), (15, 6), (16, 2)).tolist()]
    exact = [MemoryModel(*truth, ()).predict_mib(each) for each in held]
    model = fitted_memory(held, [mib * float(rng.normal(1, noise)) for mib in exact])
    assert min(model.constant_mib, model.per_weight, model.per_activation) >= 0
    assert model.median_error is not None
    assert model.median_error <= 4 * noise + 1e-6
    assert [model.predict_mib(each) for each in held] == pytest.approx(exact, rel=4 * noise + 1e-6)


def test_only_steps_are_measured(groups: Groups, tmp_path: Path) -> None:
    """Few counts: of a kind with 64 x 96 channels under 2 % of the pairs."""
    device = KernelDevice()
    measured(device, groups, tmp_path)
    wide = sorted({pair for pair in device.probed if pair[0] > 1})
    assert len(wide) < 150
    assert device.profiles < 100


def test_an_interrupted_measurement_goes_on_and_a_second_one_measures_nothing(
    groups: Groups, tmp_path: Path
) -> None:
    """What was finished before the interruption is not measured again; the table is the same as without one."""
    whole = KernelDevice()
    table = measured(whole, groups, tmp_path / "whole")
    interrupted = KernelDevice(fails_at=whole.profiles // 4)
    cut = tmp_path / "cut"
    cut.mkdir()
    with pytest.raises(KeyboardInterrupt):
        measured(interrupted, groups, cut)
    second = KernelDevice()
    again = measured(second, groups, cut)
    assert 0 < second.profiles < whole.profiles
    assert [costs for costs in again.kinds] == [costs for costs in table.kinds]
    third = KernelDevice()
    assert replace(measured(third, groups, cut), date="") == replace(again, date="")
    assert (third.profiles, third.benchmarks) == (0, 0)


def test_a_damaged_cache_is_measured_again(groups: Groups, tmp_path: Path) -> None:
    """A file that another version wrote, or half a disk."""
    table = measured(KernelDevice(), groups, tmp_path)
    for index, path in enumerate(sorted(tmp_path.rglob("*.json"))):
        path.write_text(["{}", "[1", '{"costs": 3}'][index % 3])
    assert replace(measured(KernelDevice(), groups, tmp_path), date="") == replace(table, date="")


def test_a_disturbance_is_named(groups: Groups, tmp_path: Path) -> None:
    """Of networks that were measured on a hot board; when asked, all is measured again, and kept."""
    busy = KernelDevice(noise=0.01, telemetry=lambda time_s: {"temperatures_c": {"cpu": 99.0}})
    table = measured(busy, groups, tmp_path)
    assert table.disturbed == "cpu reached 99 °C"
    quiet = KernelDevice()
    assert measured(quiet, groups, tmp_path).disturbed == table.disturbed
    assert quiet.benchmarks == 0
    anew = measured(quiet, groups, tmp_path, again=True)
    assert anew.disturbed is None
    assert quiet.benchmarks == 1
    assert sorted(quiet.probed) == sorted(busy.probed)
    assert measured(KernelDevice(), groups, tmp_path).kinds == anew.kinds != table.kinds


def test_locked_clocks_are_measured_apart(groups: Groups, tmp_path: Path) -> None:
    """What was measured with clocks that came and went is no table of locked ones."""
    free, locked, later = KernelDevice(), KernelDevice(lock_clocks=True), KernelDevice(lock_clocks=True)
    for device in (free, locked, later):
        measured(device, groups, tmp_path)
    assert locked.profiles == free.profiles > 0
    assert later.profiles == 0


def test_int8_is_refused(groups: Groups, tmp_path: Path) -> None:
    """Before the device is asked for anything."""
    with pytest.raises(BenchmarkError, match="int8"):
        measure_table(
            KernelDevice(),
            groups,
            export,
            PREPROCESSING,
            tmp_path,
            input_size=(SIDE, SIDE),
            precision="int8",  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("step", [1, 8, 16, 32])
@pytest.mark.parametrize("overhead", [0.0, 0.5])
def test_stairs_from_few_costs(step: int, overhead: float) -> None:
    """With 1 % of noise and one disturbed count; no steps where there are none; undecided where nothing
    changes."""
    rng = np.random.default_rng(step)
    counts = [64 - distance for distance in (0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32)]
    costs = {c: (overhead + -(-c // step) * step / 64) * rng.lognormal(0, 0.01) for c in counts}
    assert find_stairs(costs) == Stairs(step)
    if step > 8:
        assert find_stairs({**costs, 61: 3.0}) == Stairs(step)
    assert find_stairs(dict.fromkeys(counts, 1.0)) is None


def test_a_profile_that_does_not_tell_kernels_apart_is_refused() -> None:
    """An engine that merged them gives no table rather than a wrong one."""
    with pytest.raises(BenchmarkError, match="cannot be timed one by one"):
        probe_times(Profile({"one kernel for all": (1.0, 1.0)}), 3)


KINDS = [
    LayerKind("conv", (16, 16), (3, 3), padding=(1, 1), activation="leaky_relu"),
    LayerKind("conv", (16, 16), (3, 3), (2, 2), (1, 1), activation="silu"),
    LayerKind("conv", (16, 16), (5, 5), padding=(2, 2), groups=DEPTHWISE, activation="hardtanh"),
    LayerKind("conv", (16, 16), groups=2, activation="relu"),
    LayerKind("conv_transpose", (16, 16), (2, 2), (2, 2), activation="sigmoid"),
    LayerKind("conv", (16, 16), (3, 3), padding=(1, 1), activation="hardswish"),
]


def test_probes_are_whole_models_whose_kernels_onnx_runtime_names(tmp_path: Path) -> None:
    """Every kind of convolution and activation, at both opsets; ONNX's checker and ONNX Runtime take the file,
    and each probe's profile is found by its name."""
    probes = [
        Probe(kind, 16 if kind.groups == DEPTHWISE else ins, 16)
        for kind in KINDS
        for ins in ((16, 14) if kind.groups == 1 else (16,))
    ]
    session = local_session(load_target("host"), tmp_path / "device")
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), np.zeros((16, 16, 3), np.uint8))
    for opset in (13, 17):
        path = tmp_path / f"{opset}.onnx"
        write_probes(probes, path, opset=opset, half=False)
        onnx.checker.check_model(onnx.load(path), full_check=True)
        runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        boxes, scores = runtime.run(["boxes", "scores"], {"images": np.ones((1, 3, 16, 16), np.float32)})
        assert boxes.shape == (1, scores.shape[1], 4)
        found = probe_times(session.profile(session.build(path), image, PREPROCESSING, runs=3), len(probes))
        assert len(found.times_ms) == len(probes)
        assert all(ms > 0 for times in found.times_ms for ms in times)
        assert found.reference_ms > 0
    write_probes(probes[:3], tmp_path / "half.onnx", opset=17, half=True)
    half = onnx.load(tmp_path / "half.onnx")
    assert {t.data_type for t in half.graph.initializer if len(t.dims) == 4} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    "target", [t for t in known_targets().values() if t.tensorrt], ids=lambda target: str(target.name)
)
def test_every_targets_tensorrt_reads_the_probes(target: Target, tmp_path: Path) -> None:
    """By its operator table: that of the parser's documentation, not a run on a board."""
    path = tmp_path / "probes.onnx"
    write_probes([Probe(kind, 16, 16) for kind in KINDS], path, opset=target.max_opset, half=False)
    report = check_model(path, str(target.tensorrt))
    assert report.ok, str(report)


def test_a_real_tensorrt_builds_the_probes(tmp_path: Path) -> None:
    """The parser and builder of TensorRT for RTX, which need no GPU: every kind of kernel becomes an engine."""
    from rtx import build_engine

    for half in (False, True):
        path = tmp_path / "probes.onnx"
        write_probes([Probe(kind, 16, 16) for kind in KINDS], path, opset=17, half=half)
        assert len(build_engine(path)) > 0


def test_the_picture_has_a_panel_for_each_kind(groups: Groups, tmp_path: Path) -> None:
    """With its steps in the title, and the network's own counts marked."""
    table = measured(KernelDevice(), groups, tmp_path)
    figure = draw_stairs(table, layer_uses(groups.network))
    titles = [axes.get_title() for axes in figure.axes]
    assert len([title for title in titles if title]) == len(table.kinds)
    assert any("in: steps of 16 (aligned: 4), out: steps of 8" in title for title in titles)
    legends = [legend for axes in figure.axes if (legend := axes.get_legend()) is not None]
    labels = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert labels.count("this network") == len(table.kinds)
    figure.savefig(tmp_path / "stairs.svg")
    assert (tmp_path / "stairs.svg").read_text().startswith("<?xml")
