"""Which kernels a network has, what a table says they cost, and the table's file."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.data.errors import EdgePruneError
from edgeprune.pruning.graph import trace
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.latency import (
    DEPTHWISE,
    KindCosts,
    LatencyTable,
    LatencyTableError,
    LayerKind,
    LayerUse,
    MeasuredNetwork,
    RestTerm,
    Stairs,
    Surface,
    latency_terms,
    layer_uses,
    wasteful,
)
from edgeprune.pruning.memory import MeasuredMemory, MemoryModel
from edgeprune.pruning.surgery import remove

CONV = LayerKind("conv", (8, 8), (3, 3), padding=(1, 1), activation="relu")
DEPTH = replace(CONV, groups=DEPTHWISE)
POOL = LayerKind("max_pool2d", (4, 4))


class Cells(nn.Module):
    """A convolution with batch norm and activation, a depthwise one, pooling, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.up = nn.ConvTranspose2d(16, 4, 2, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.leaky_relu(self.norm(self.stem(images)), 0.1)
        y = self.depth(x)
        y = functional.max_pool2d(functional.silu(y) + y, 3, 1, 1)
        result: Tensor = self.up(functional.relu(torch.cat((x, y), 1)))
        return result


def test_kernels_are_convolutions_with_what_runs_in_them_and_all_else_that_writes() -> None:
    """Batch norm is folded; an activation runs with its convolution only if nobody else reads that one's result;
    each part of a concatenation is written once. By hand."""
    uses = layer_uses(trace(Cells().eval(), zoo.inputs("chain")[0]))
    half = zoo.SIDE // 2
    found = [
        (u.layer, u.kind.op, u.kind.groups, u.kind.activation, u.in_channels, u.out_channels) for u in uses
    ]
    assert found == [
        ("stem", "conv", 1, "leaky_relu", 3, 8),
        ("depth", "conv", DEPTHWISE, "", 8, 8),
        ("silu", "silu", 1, "", 8, 8),
        ("add", "add", 1, "", 8, 8),
        ("max_pool2d", "max_pool2d", 1, "", 8, 8),
        ("cat", "cat", 1, "", 8, 8),
        ("cat", "cat", 1, "", 8, 8),
        ("relu", "relu", 1, "", 16, 16),
        ("up", "conv_transpose", 1, "", 16, 4),
    ]
    assert uses[0].kind == LayerKind(
        "conv", (zoo.SIDE, zoo.SIDE), (3, 3), (2, 2), (1, 1), activation="leaky_relu"
    )
    assert all(use.kind.input == (half, half) for use in uses[1:])


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_counts_in_terms_of_units_are_those_of_the_narrowed_network(name: str) -> None:
    """For networks of every style: the convolutions that terms give for what is kept are those of the network that
    surgery makes, which is followed anew."""
    groups = zoo.traced(name)
    terms = latency_terms(groups)
    assert terms.kept(terms.sizes) == terms.uses == layer_uses(groups.network)
    gone = zoo.some_units(groups, 0.4)
    sizes = terms.sizes.copy()
    for unit in gone:
        for factor, positions in terms.members[unit].items():
            sizes[factor] -= positions
    kept = [use for use in terms.kept(sizes) if use.kind.measured]
    narrowed = [use for use in layer_uses(remove(groups, gone)) if use.kind.measured]
    assert [(u.layer, u.in_channels, u.out_channels) for u in kept] == [
        (u.layer, u.in_channels, u.out_channels) for u in narrowed
    ]
    for use, own in zip(kept, narrowed, strict=True):
        assert use.kind == own.kind or use.kind.groups > 1  # of which whole ones may go


def table(**changed: Any) -> LatencyTable:
    """Stairs of 8 in and 4 out; in channels that are no multiple of 2 take another kernel."""
    steps, stages = (8, 16, 32), (4, 8, 12, 16)
    aligned = Surface(steps, stages, tuple(tuple(0.01 * i * o for o in stages) for i in steps))
    unaligned = Surface((7, 31), (4, 16), tuple(tuple(0.03 * i * o for o in (4, 16)) for i in (7, 31)))
    values: dict[str, Any] = {
        "device": "a board",
        "target": "host",
        "backend": "onnxruntime",
        "backend_version": "1.0",
        "precision": "fp32",
        "options": {},
        "power_mode": "MAXN",
        "input_size": (16, 16),
        "date": "2026-01-01T00:00:00+00:00",
        "kinds": (
            KindCosts(CONV, Stairs(8, 2), Stairs(4), aligned, unaligned),
            KindCosts(DEPTH, Stairs(1), Stairs(8), Surface((0,), (8, 16), ((1.0, 2.0),))),
        ),
        "rest": (RestTerm("max_pool2d", 100.0, 300.0),),
        "rest_step": 8,
        "scale": 2.0,
        "constant_ms": 0.5,
        "networks": (MeasuredNetwork({"stem": 8}, 10.0, 11.0), MeasuredNetwork({"stem": 4}, 10.0, 9.6)),
    }
    return LatencyTable(**values | changed)


def test_a_count_between_two_steps_costs_as_much_as_the_step_above() -> None:
    """And off the alignment what the other kernel takes there, interpolated between measured counts."""
    costs = table()
    assert costs.cost_ms(CONV, 10, 5) == costs.cost_ms(CONV, 16, 8) == pytest.approx(2 * 0.01 * 16 * 8)
    assert costs.cost_ms(CONV, 24, 4) == pytest.approx(2 * 0.01 * 24 * 4)  # between the steps 16 and 32
    assert costs.cost_ms(CONV, 11, 10) == pytest.approx(2 * 0.03 * 11 * 10)
    assert costs.cost_ms(CONV, 3, 4) == pytest.approx(2 * 0.03 * 7 * 4)  # below the first point: as there
    assert costs.cost_ms(DEPTH, 9, 9) == pytest.approx(2 * 2.0)
    assert costs.cost_ms(POOL, 8, 8) == pytest.approx(100 * 8 * 16 / 1e6)
    assert costs.cost_ms(POOL, 9, 9) == pytest.approx(300 * 9 * 16 / 1e6)


def test_a_prediction_is_the_fixed_part_and_the_sum_of_the_kernels() -> None:
    """A correction moves all of it, and then the measured network is predicted as measured."""
    costs = table()
    uses = [LayerUse("a", CONV, 16, 8), LayerUse("b", DEPTH, 8, 8), LayerUse("c", POOL, 8, 8)]
    predicted = costs.predict_ms(uses)
    assert predicted == pytest.approx(0.5 + 2 * 1.28 + 2 * 1.0 + 0.0128)
    assert costs.corrected(predicted, 7.0).predict_ms(uses) == pytest.approx(7.0)
    assert costs.corrected(predicted, 7.0).corrected(7.0, 8.0).predict_ms(uses) == pytest.approx(8.0)
    assert costs.median_error == pytest.approx((0.1 + 0.04) / 2)
    assert costs.energy_mj(4.0) is None
    assert table(power_w=2.5).energy_mj(4.0) == pytest.approx(10.0)


def test_candidates_are_the_steps_and_what_there_is() -> None:
    """Other counts cost as much as one of these."""
    costs = table()
    assert costs.candidates(CONV, "in", 30) == (8, 16, 24, 30)
    assert costs.candidates(CONV, "out", 8) == (4, 8)
    assert costs.candidates(DEPTH, "in", 16) == costs.candidates(DEPTH, "out", 16) == (8, 16)
    assert costs.candidates(POOL, "out", 20) == (8, 16, 20)


def test_wasteful_counts_are_those_that_a_larger_one_costs_no_more_than() -> None:
    """A count on a step is not among them; one off the alignment can cost as much as several steps above."""
    found = wasteful(
        table(), [LayerUse("a", CONV, 16, 8), LayerUse("b", CONV, 10, 5), LayerUse("c", CONV, 9, 12)]
    )
    assert [(w.layer, w.axis, w.channels, w.as_much_as, w.below) for w in found] == [
        ("b", "in", 10, 16, 8),
        ("b", "out", 5, 8, 4),
        ("c", "in", 9, 24, 8),
    ]
    assert str(found[1]) == "b: 5 out channels cost as much as 8 (2.560 ms); 4 would cost 50% less"


@pytest.mark.parametrize(
    ("kind", "ins", "outs"),
    [(CONV, 40, 8), (CONV, 8, 20), (replace(CONV, input=(9, 9)), 8, 8), (replace(POOL, op="softmax"), 8, 8)],
)
def test_what_the_table_does_not_hold_is_not_guessed(kind: LayerKind, ins: int, outs: int) -> None:
    """More channels than were measured, another kind, another operation: an error that names it."""
    with pytest.raises(LatencyTableError, match=r"conv 3x3|softmax"):
        table().cost_ms(kind, ins, outs)


counts = st.integers(1, 40)


@given(counts, counts, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_costs_are_never_less_for_more_channels_on_the_steps(
    ins: int, outs: int, in_more: int, out_more: int
) -> None:
    """Of a table whose measured costs grow: aligned counts, any two of them."""
    costs = table()
    i, o = min(2 * ins, 32), min(outs, 16)
    more_in, more_out = min(i + 2 * in_more, 32), min(o + out_more, 16)
    assert costs.cost_ms(CONV, i, o) <= costs.cost_ms(CONV, more_in, more_out) + 1e-12


def test_the_file_gives_the_same_table(tmp_path: Path) -> None:
    """Through JSON on disk, with and without what may be absent."""
    memory = MemoryModel(1.0, 2.0, 0.0, (MeasuredMemory(3.0, 2.9),), 1.1)
    for each in (table(), table(power_w=3.0, networks=(), correction=1.1), table(memory=memory)):
        each.write(tmp_path / "table.json")
        assert LatencyTable.read(tmp_path / "table.json") == each


def test_a_file_of_version_1_holds_no_memory(tmp_path: Path) -> None:
    """It is read as it was, and its memory is not known."""
    record = table().to_json()
    del record["memory"]
    (tmp_path / "table.json").write_text(json.dumps({**record, "version": 1}))
    assert LatencyTable.read(tmp_path / "table.json") == table()


def spoiled() -> list[Any]:
    """One spoiled record for each thing that can be wrong."""
    good = json.loads(json.dumps(table().to_json()))
    bad: list[Any] = [[], {}, {"version": 1}, 3, None, "table"]
    for name in good:
        if name not in ("options", "version"):
            bad.append({key: value for key, value in good.items() if key != name})
            bad.append({**good, name: {"no": "such"}})
    bad += [{**good, "version": 3}, {**good, "extra": 1}, {**good, "scale": math.nan}, {**good, "scale": 0.0}]
    bad += [{**good, "scale": True}, {**good, "constant_ms": -1.0}, {**good, "kinds": []}]
    bad.append({**good, "kinds": good["kinds"] * 2})
    spoil: dict[str, Any]
    for spoil in ({"ms": [[1.0]]}, {"in_channels": [16, 8, 32]}, {"in_channels": []}):
        kind = good["kinds"][0]
        bad.append({**good, "kinds": [{**kind, "aligned": {**kind["aligned"], **spoil}}]})
    memory = asdict(MemoryModel(1.0, 2.0, 0.0, (MeasuredMemory(3.0, 2.9),)))
    for spoil in ({"per_weight": -1.0}, {"correction": 0.0}, {"constant_mib": None}, {"of": 1}):
        bad.append({**good, "memory": {**memory, **spoil}})
    bad.append({**good, "memory": {**memory, "per_weight": 0.0, "constant_mib": 0.0}})
    bad.append({**good, "memory": {**memory, "networks": [{"measured_mib": 0.0, "predicted_mib": 1.0}]}})
    negative = [[-1.0] * 4] * 3
    kind = good["kinds"][0]
    bad.append({**good, "kinds": [{**kind, "aligned": {**kind["aligned"], "ms": negative}}]})
    bad.append({**good, "kinds": [{**kind, "inputs": {"step": 8, "alignment": 3}}]})
    bad.append({**good, "kinds": [{**kind, "inputs": {"step": 0, "alignment": 1}}]})
    return bad


@pytest.mark.parametrize("index", range(len(spoiled())))
def test_a_damaged_or_foreign_file_is_one_clear_line(index: int, tmp_path: Path) -> None:
    """Never a traceback, and the file is named."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps(spoiled()[index]))
    with pytest.raises(LatencyTableError) as caught:
        LatencyTable.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_json_is_one_clear_line(tmp_path: Path) -> None:
    """Cut off while copied, say."""
    path = tmp_path / "table.json"
    table().write(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(EdgePruneError, match="not valid JSON"):
        LatencyTable.read(path)


RIGHT = {
    "device": "a board",
    "target": "host",
    "backend": "onnxruntime",
    "backend_version": "1.0",
    "precision": "fp32",
    "dla_core": None,
    "power_mode": "MAXN",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", "jetson-nano"),
        ("device", "another board"),
        ("backend", "tensorrt"),
        ("backend_version", "1.1"),
        ("backend_version", None),
        ("precision", "fp16"),
        ("dla_core", 0),
        ("power_mode", "5W"),
    ],
)
def test_a_table_is_for_the_device_it_was_measured_on_alone(name: str, value: str | int | None) -> None:
    """A workstation's table is never used for a Jetson, nor another runtime's or precision's, nor one of the GPU for
    a DLA or the reverse."""
    table().check(**RIGHT)
    table(options={"dla_core": 1, "workspace_mib": 64}).check(**{**RIGHT, "dla_core": 1})
    with pytest.raises(LatencyTableError, match="its dla core is 1, not None"):
        table(options={"dla_core": 1}).check(**RIGHT)
    with pytest.raises(LatencyTableError, match=f"is {RIGHT[name]}, not {value}"):
        table().check(**{**RIGHT, name: value})


def test_terms_of_a_concatenation_count_its_parts() -> None:
    """What reads a concatenation loses a channel with each part's; found by following the units."""
    groups = find_groups(trace(Cells().eval(), zoo.inputs("chain")[0]))
    terms = latency_terms(groups)
    last = terms.uses.index(next(use for use in terms.uses if use.layer == "up"))
    factor = terms.inputs[last]
    assert factor is not None
    assert terms.sizes[factor] == 16
    taken = [members.get(factor, 0) for members in terms.members.values()]
    assert np.sum(taken) == 16
    assert terms.outputs[last] is None  # the network's output stays
