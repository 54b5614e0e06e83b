"""Each target gets a file that it reads, and nothing is left where it would not."""

import re
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from small_detectors import SmallDetector, make_dataset

from edgeprune.cli.export_table import section
from edgeprune.deploy.targets import load_target
from edgeprune.detectors.registry import DETECTORS, build_detector
from edgeprune.export.errors import ExportError
from edgeprune.export.model import Batch, export_onnx
from edgeprune.export.target import Int8Options, export_for_target
from edgeprune.pruning.graph import trace
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.surgery import remove

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class StronglyTyped:
    """A board with TensorRT 11."""

    name: str = "board"
    tensorrt: str | None = "11.4"
    max_opset: int = 17
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")


class Modulo(SmallDetector):
    """Decodes with an operator that TensorRT 8.2 lacks."""

    def decode(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        boxes, scores = super().decode(raw)
        return torch.fmod(boxes, 1000.0), scores


@pytest.fixture
def detector() -> SmallDetector:
    torch.manual_seed(0)
    return SmallDetector().eval()


@pytest.mark.parametrize(
    ("name", "precision", "opset", "tensor_type"),
    [
        ("jetson-nano", "fp16", 13, onnx.TensorProto.FLOAT),
        ("jetson-orin-nano", "fp16", 17, onnx.TensorProto.FLOAT),
        ("host", "fp32", 13, onnx.TensorProto.FLOAT),
        (None, "fp16", 17, onnx.TensorProto.FLOAT16),
    ],
)
def test_target_decides(
    detector: SmallDetector, tmp_path: Path, name: str | None, precision: str, opset: int, tensor_type: int
) -> None:
    """Opset and types follow the target: up to TensorRT 10 fp16 is the builder's, from 11 on the file's."""
    target = load_target(name) if name else StronglyTyped()
    dataset = make_dataset(tmp_path / "data", images=2)
    path = tmp_path / "model.onnx"
    found = export_for_target(
        detector, detector, path, target, precision=precision, parity=dataset, metadata={}
    )
    weights = {t.name.removesuffix("_half"): t for t in onnx.load(path).graph.initializer}
    assert weights["stem.weight"].data_type == tensor_type and found.model.opset == opset
    assert found.parity.images == 2 and (found.check is None) == (target.tensorrt is None)
    assert found.to_json()["model"]["path"] == "model.onnx"


def test_int8_for_a_target(detector: SmallDetector, tmp_path: Path) -> None:
    """Int8 is made where the hardware has it, and refused on a Nano with what it has instead."""
    dataset = make_dataset(tmp_path / "data", images=2)
    options = Int8Options(dataset, dataset, max_ap_drop=1.0)
    path = tmp_path / "model.onnx"
    for name in ("jetson-nano", "jetson-tx2"):
        with pytest.raises(ExportError, match="no int8 in hardware; choose from: fp32, fp16"):
            export_for_target(
                detector,
                detector,
                path,
                load_target(name),
                precision="int8",
                parity=dataset,
                metadata={},
                int8=options,
            )
    found = export_for_target(
        detector,
        detector,
        path,
        load_target("jetson-orin-nx"),
        precision="int8",
        parity=dataset,
        metadata={},
        int8=options,
    )
    assert found.model.precision == "int8" and found.quantised and found.quantised.int8_macs_share == 1.0
    assert found.check and found.check.ok


@pytest.mark.parametrize(
    ("module", "input", "reason"), [(Modulo, "float32", "Mod"), (SmallDetector, "uint8", "UINT8")]
)
def test_refused_models_leave_no_file(
    module: type[SmallDetector], input: str, reason: str, tmp_path: Path
) -> None:
    """What the target's TensorRT would refuse is named with its remedy, and no file is left to deploy."""
    detector = module().eval()
    dataset = make_dataset(tmp_path / "data", images=1)
    with pytest.raises(ExportError, match=rf"{reason}.*remedy"):
        export_for_target(
            detector,
            detector,
            tmp_path / "model.onnx",
            load_target("jetson-nano"),
            precision="fp32",
            parity=dataset,
            metadata={},
            input=input,
        )
    assert not (tmp_path / "model.onnx").exists()


def test_the_real_builder_takes_every_kind(detector: SmallDetector, tmp_path: Path) -> None:
    """TensorRT's own parser and builder take float32, float16-typed, uint8 and dynamic-batch files."""
    from rtx import BuildError, build_engine

    path = tmp_path / "model.onnx"
    for options in ({}, {"precision": "fp16"}, {"input": "uint8"}, {"precision": "fp16", "input": "uint8"}):
        build_engine(export_onnx(detector, detector, path, opset=17, metadata={}, **options).path)
    batch = Batch(1, 4, 8)
    exported = export_onnx(detector, detector, path, opset=13, metadata={}, batch=batch)
    shapes = tuple((size, *exported.inputs[0].shape[1:]) for size in (batch.min, batch.opt, batch.max))
    assert build_engine(exported.path, {"images": shapes})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BuildError, match="cannot parse"):
        build_engine(path)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_the_real_builder_takes_every_detector(name: str, tmp_path: Path) -> None:
    """TensorRT's own parser and builder take each detector, unpruned and with 40 % of its channels removed, in
    float32 at both opsets and typed in float16."""
    from rtx import build_engine

    torch.manual_seed(0)
    size = (64, 64)
    module = build_detector(name, size).eval()
    network = trace(module, torch.zeros(1, 3, *size))
    groups = find_groups(network)
    units = [unit for group in groups.groups for unit in group.units[: int(0.4 * len(group.units))]]
    for each in (network, remove(groups, units)):
        for options in ({"opset": 13}, {"opset": 17}, {"opset": 17, "precision": "fp16"}):
            path = tmp_path / "model.onnx"
            assert build_engine(export_onnx(module, each, path, metadata={}, **options).path)


def test_documented_table_is_current() -> None:
    """docs/export.md has every detector, says no of nothing but uint8 input, and is current for NanoDet-g."""
    text = (ROOT / "docs" / "export.md").read_text()
    assert section("nanodet-g") in text
    loaders = {name: getattr(made.load, "func", made.load) for name, made in DETECTORS.items()}
    ours = [
        name for name, load in loaders.items() if load.__module__.startswith("edgeprune.")
    ]  # not a test's
    assert len(ours) > 1 and all(f"\n## {name}, " in text for name in ours)
    assert set(re.findall(r"no: (\w+ \w+ is \w+)", text)) == {"input images is UINT8"}
    assert text.count("no: ") == text.count("no: input images is UINT8")
