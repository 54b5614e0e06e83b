"""Export for a kind of device: in its opset and precision, proven against PyTorch, checked for its parser."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from edgeprune.data.dataset import Dataset
from edgeprune.detectors.protocol import Detector
from edgeprune.export.check import CheckReport, check_model
from edgeprune.export.errors import ExportError
from edgeprune.export.model import SINGLE, Batch, ExportedModel, Parity, check_parity, export_onnx
from edgeprune.export.quantise import Calibration, Quantised, quantise

STRONGLY_TYPED = 11  # TensorRT's major version that takes precision from the file alone

Precision = Literal["fp32", "fp16", "int8"]


class TargetLimits(Protocol):
    """What the export asks of a target; `deploy.targets.Target` is one."""

    @property
    def name(self) -> str: ...
    @property
    def tensorrt(self) -> str | None:
        """Version; None where ONNX Runtime runs the file."""

    @property
    def max_opset(self) -> int: ...
    @property
    def precisions(self) -> tuple[str, ...]:
        """In hardware."""


@dataclass(frozen=True)
class Int8Options:
    """What int8 needs beside the network: real training images, and how much AP it may cost."""

    calibrate: Dataset
    """For the activations' ranges."""
    select: Dataset
    """Others, with boxes: decide which layers stay in float."""
    method: Calibration = "minmax"
    max_ap_drop: float = 0.01
    """On `select`, 0 to 1."""
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class TargetExport:
    """A file that its target will read."""

    model: ExportedModel
    parity: Parity  # of the network in fp32, which fp16 and int8 files are made from
    check: CheckReport | None  # None where ONNX Runtime runs the file
    quantised: Quantised | None  # None unless int8

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        record["model"] = self.model.to_json()
        if self.quantised:
            record["quantised"].pop("model")
        return record


def export_for_target(
    detector: Detector,
    network: nn.Module,
    path: Path,
    target: TargetLimits,
    *,
    precision: Precision,
    parity: Dataset,
    metadata: Mapping[str, str],
    batch: Batch = SINGLE,
    input: Literal["float32", "uint8"] = "float32",
    int8: Int8Options | None = None,
) -> TargetExport:
    """Export a network for a target; no file is left where the target would refuse it.

    Args:
        path: of the ONNX file.
        precision: of the engine. Up to TensorRT 10 fp16 is the builder's choice, and the file stays fp32.
        parity: real images to compare ONNX Runtime with PyTorch on.
        int8: needed for precision "int8".

    Raises:
        ExportError: If the target lacks the precision, the file differs from the network, or the target's
            TensorRT would refuse it; then node, operator, reason and remedy of each violation.
    """
    if precision not in target.precisions:
        raise ExportError(
            f"{target.name} has no {precision} in hardware; choose from: {', '.join(target.precisions)}"
        )
    if precision == "int8" and int8 is None:
        raise ValueError("int8 needs training images")
    typed_half = precision == "fp16" and target.tensorrt and _major(target.tensorrt) >= STRONGLY_TYPED

    def export(to: Path, file_precision: Literal["fp32", "fp16"]) -> ExportedModel:
        return export_onnx(
            detector,
            network,
            to,
            opset=target.max_opset,
            metadata=metadata,
            batch=batch,
            input=input,
            precision=file_precision,
        )

    quantised = None
    with tempfile.TemporaryDirectory() as folder:
        exact = export(Path(folder) / "exact.onnx", "fp32")
        proof = check_parity(detector, network, exact.path, parity)
        if precision == "int8" and int8:
            quantised = quantise(
                exact,
                path,
                int8.calibrate,
                int8.select,
                method=int8.method,
                max_ap_drop=int8.max_ap_drop,
                progress=int8.progress,
            )
            model = quantised.model
        else:
            model = export(path, "fp16" if typed_half else "fp32")
    report = None
    if target.tensorrt:
        report = check_model(path, target.tensorrt, int8="int8" in target.precisions)
        if not report.ok:
            path.unlink()
            raise ExportError(f"TensorRT {target.tensorrt} of {target.name} would refuse the model. {report}")
    return TargetExport(model, proof, report, quantised)


def _major(version: str) -> int:
    return int(version.split(".", maxsplit=1)[0])
