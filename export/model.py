"""Write a detector as one ONNX file, `boxes` and `scores` out, and prove that the file is the network.

The file has a static shape, decoding inside the graph, and metadata that says how to feed it. It is traced by
PyTorch's TorchScript exporter: the newer exporter keeps opset 18 when asked for 13, which TensorRT 8.2 cannot
read. Opset, IR version and the shapes of the convolutions are read back from the written file.
"""

import copy
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgeprune.data.dataset import Dataset
from edgeprune.data.files import sha256_of, write_bytes
from edgeprune.data.precision import average_precision
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.protocol import Detector
from edgeprune.export.errors import ExportError
from edgeprune.export.float16 import HALF, to_float16
from edgeprune.export.runtime import OnnxModel, detections_of, inputs_of
from edgeprune.export.tidy import WEIGHTED, check_free_batch, free_batch, tidy

MAX_IR_VERSION = (
    8  # the parsers of TensorRT 8 and ONNX Runtime 1.10, the last for Python 3.6, read no newer one
)
TRACED_BATCH = 7  # when the batch is to be free; no activation has another first dimension of 7
MAX_BOX_DIFFERENCE_PX = 0.05
MAX_SCORE_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Batch:
    """Images per run: fixed, or a range for which the device makes an optimisation profile."""

    min: int = 1
    opt: int = 1
    max: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ExportError(f"batch {self}: needs 1 <= MIN <= OPT <= MAX")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}" if self.dynamic else str(self.max)

    @property
    def dynamic(self) -> bool:
        return self.min != self.max

    @classmethod
    def parse(cls, text: str) -> "Batch":
        """Read ``"4"`` or ``"MIN:OPT:MAX"``.

        Raises:
            ExportError: If it is neither, or not in ascending order.
        """
        if re.fullmatch(r"\d+", text):
            return cls(*[int(text)] * 3)
        if re.fullmatch(r"\d+:\d+:\d+", text):
            return cls(*map(int, text.split(":")))
        raise ExportError(f"batch {text!r}: give a number, or MIN:OPT:MAX such as 1:4:8")


SINGLE = Batch()


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a model; a dimension that is free bears a name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str  # numpy's name: "float32", "uint8"


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX file and what was read back from it."""

    path: Path
    sha256: str
    size_bytes: int
    opset: int
    ir_version: int
    precision: str  # of the file: "fp32", "fp16" or "int8"
    batch: Batch
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    nodes_traced: int  # before the graph was made clean
    nodes: int

    def to_json(self) -> dict[str, Any]:
        """The record for the run folder; the file is named relative to the record."""
        return {**asdict(self), "path": self.path.name, "batch": str(self.batch)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], folder: Path) -> "ExportedModel":
        """Read what `to_json` wrote into `folder`.

        Raises:
            ExportError: If a field is missing, unknown or malformed, or the file's name leaves the folder.
        """
        try:
            if Path(record["path"]).name != record["path"]:
                raise ValueError(f"{record['path']!r} is not a file name")
            fields = {**record, "path": folder / record["path"], "batch": Batch.parse(record["batch"])}
            for side in ("inputs", "outputs"):
                fields[side] = tuple(
                    TensorInfo(t["name"], tuple(t["shape"]), t["dtype"]) for t in record[side]
                )
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ExportError(
                f"the export record in {folder} is damaged ({error}): export the step again"
            ) from error


class _Deployed(nn.Module):
    """What runs on a device: network, then decoding; for uint8 input, normalisation before."""

    def __init__(
        self,
        network: nn.Module,
        decode: Callable[[Any], tuple[Tensor, Tensor]],
        normalise: Preprocessing | None,
    ) -> None:
        super().__init__()
        self.network = network
        self._decode = decode
        self._normalise = normalise

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._normalise is not None:  # (N, H, W, 3) uint8 BGR
            mean, std = (
                torch.tensor(values)[:, None, None] for values in (self._normalise.mean, self._normalise.std)
            )
            images = images.float().permute(0, 3, 1, 2)  # cast first: TensorRT does nothing else with UINT8
            if self._normalise.color == "rgb":
                images = images[:, [2, 1, 0]]
            images = (images - mean) / std
        boxes, scores = self._decode(self.network(images))  # (N, M, 4), (N, M)
        return boxes, scores


def export_onnx(
    detector: Detector,
    network: nn.Module,
    path: Path,
    *,
    opset: int,
    metadata: Mapping[str, str],
    batch: Batch = SINGLE,
    input: Literal["float32", "uint8"] = "float32",
    precision: Literal["fp32", "fp16"] = "fp32",
) -> ExportedModel:
    """Export `network` followed by `detector.decode`; the file is written whole or not at all.

    Args:
        detector: gives decoding, classes, input size and preprocessing.
        network: called like ``detector.forward``; left untouched, and exported as in evaluation.
        path: of the ONNX file.
        opset: of the file; 13 for TensorRT 8.2 and 8.4.
        metadata: goes into the file beside classes, input size, preprocessing, batch and precision.
        batch: images per run.
        input: "float32", preprocessed ``images (N, 3, H, W)``; or "uint8", the letterboxed BGR image itself,
            ``images (N, H, W, 3)``, normalised inside the graph (TensorRT 8.6 and later).
        precision: "fp16" types the network in float16 for TensorRT 11 (see `to_float16`).

    Returns:
        The record of the written file. Its outputs are ``boxes (N, M, 4)``, xyxy in input pixels, and
        ``scores (N, M)``.

    Raises:
        ExportError: If the network cannot be expressed in `opset`, or the file is not what was asked for.
    """
    images = TRACED_BATCH if batch.dynamic else batch.max
    traced = _trace(detector, network, opset, images, input)
    model = tidy(traced, "network")
    if batch.dynamic:
        freed = free_batch(model, TRACED_BATCH)
        if freed is None:  # traced with a free batch instead, the graph keeps arithmetic on its shape
            freed = tidy(_trace(detector, network, opset, images, input, free=True), "network")
            check_free_batch(freed)
        model = freed
    if precision == "fp16":
        model = to_float16(model)
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    described = {
        **metadata,
        "classes": json.dumps(list(detector.classes)),
        "input_size": json.dumps(list(detector.input_size)),
        "preprocessing": json.dumps(detector.preprocessing.to_json()),
        "batch": str(batch),
        "precision": precision,
    }
    onnx.helper.set_model_props(model, described)
    _check_layers(model, network, path)
    return write_model(
        model, path, opset=opset, precision=precision, batch=batch, nodes_traced=len(traced.graph.node)
    )


def write_model(
    model: onnx.ModelProto, path: Path, *, opset: int, precision: str, batch: Batch, nodes_traced: int
) -> ExportedModel:
    """Check a model, write it and read it back.

    Raises:
        ExportError: If ONNX's checker refuses the model, or opset or IR version are not the wanted ones.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"ONNX's checker refuses the graph for {path}: {error}") from error
    write_bytes(path, model.SerializeToString())
    written = onnx.load(path)
    found = next(entry.version for entry in written.opset_import if entry.domain in ("", "ai.onnx"))
    if found != opset or written.ir_version > MAX_IR_VERSION:
        raise ExportError(
            f"{path} has opset {found} and IR version {written.ir_version}; "
            f"wanted opset {opset} and IR version {MAX_IR_VERSION} or lower"
        )
    return ExportedModel(
        path=path,
        sha256=sha256_of(path),
        size_bytes=path.stat().st_size,
        opset=found,
        ir_version=written.ir_version,
        precision=precision,
        batch=batch,
        inputs=tuple(_tensor_info(value) for value in written.graph.input),
        outputs=tuple(_tensor_info(value) for value in written.graph.output),
        nodes_traced=nodes_traced,
        nodes=len(written.graph.node),
    )


def _trace(
    detector: Detector, network: nn.Module, opset: int, images: int, input: str, *, free: bool = False
) -> onnx.ModelProto:
    uint8 = input == "uint8"
    deployed = _Deployed(
        copy.deepcopy(network).cpu().float().eval(),
        detector.decode,
        detector.preprocessing if uint8 else None,
    )
    height, width = detector.input_size
    shape = (images, height, width, 3) if uint8 else (images, 3, height, width)
    example = torch.zeros(shape, dtype=torch.uint8 if uint8 else torch.float32)
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter(
                "ignore"
            )  # deprecation, and shapes becoming constants, which is what we want
            torch.onnx.export(
                deployed,
                (example,),
                buffer,  # type: ignore[arg-type]  # this exporter takes a file object too
                dynamo=False,
                opset_version=opset,
                # PRESERVE leaves batch norm for `tidy` to fold, which keeps the parameters' names.
                training=torch.onnx.TrainingMode.PRESERVE,
                input_names=["images"],
                output_names=["boxes", "scores"],
                dynamic_axes={name: {0: "batch"} for name in ("images", "boxes", "scores")} if free else None,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"the network cannot be expressed in ONNX opset {opset}: {error}") from error
    return onnx.load_from_string(buffer.getvalue())


def _check_layers(model: onnx.ModelProto, network: nn.Module, path: Path) -> None:
    """The file's weights have the shapes of the network's parameters, and none of those is missing."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    exported = {
        node.input[1].removesuffix(HALF): shapes.get(node.input[1])
        for node in model.graph.node
        if node.op_type in WEIGHTED
    }
    for name, parameter in network.named_parameters():
        if parameter.dim() == 4 and exported.get(name) != tuple(parameter.shape):
            raise ExportError(
                f"{name} has shape {exported.get(name)} in {path}, {tuple(parameter.shape)} in the network"
            )


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorInfo(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime is from PyTorch on real images."""

    images: int
    max_box_difference_px: float
    max_score_difference: float
    ap_pytorch: float | None
    """AP on these images alone; None where they have no labelled box."""
    ap_onnx: float | None


def check_parity(
    detector: Detector, network: nn.Module, model_path: Path, dataset: Dataset, *, images: int = 16
) -> Parity:
    """Compare an exported file with the network that it came from, on the first `images` of a data set.

    Every candidate counts, before threshold and NMS.

    Raises:
        ExportError: If a box differs by more than 0.05 pixels or a score by more than 1e-4, or there is no
            image.
    """
    model = OnnxModel(model_path)
    chosen = dataset.subset(range(min(images, len(dataset.samples))))
    if not chosen.samples:
        raise ExportError(f"{dataset.path} has no image: parity needs real ones")
    deployed = _Deployed(
        copy.deepcopy(network).cpu().float().eval(),
        detector.decode,
        detector.preprocessing if model.uint8 else None,
    )
    box_px = score = 0.0
    found: tuple[list[Any], list[Any]] = ([], [])
    for image_id, inputs, placement in inputs_of(model, chosen):
        with torch.no_grad():
            boxes, scores = (output[0].numpy() for output in deployed(torch.from_numpy(inputs)))
        onnx_boxes, onnx_scores = model.run(inputs)
        if boxes.shape != onnx_boxes.shape:
            raise ExportError(f"{model_path} gives boxes {onnx_boxes.shape}, the network {boxes.shape}")
        box_px = float(np.maximum(box_px, np.abs(boxes - onnx_boxes).max()))  # maximum, not max: keeps NaN
        score = float(np.maximum(score, np.abs(scores - onnx_scores).max()))
        found[0].append(detections_of(image_id, (boxes, scores), placement))
        found[1].append(detections_of(image_id, (onnx_boxes, onnx_scores), placement))
    if not (box_px <= MAX_BOX_DIFFERENCE_PX and score <= MAX_SCORE_DIFFERENCE):
        raise ExportError(
            f"{model_path} is not the network it was exported from: boxes differ by up to {box_px:.3g} px "
            f"(allowed {MAX_BOX_DIFFERENCE_PX}), scores by {score:.3g} (allowed {MAX_SCORE_DIFFERENCE}); "
            "does the network branch on its data? Tracing keeps one branch"
        )
    labelled = any(not sample.ignore.all() for sample in chosen.samples)
    aps = [average_precision(chosen, detections).ap if labelled else None for detections in found]
    return Parity(len(chosen.samples), box_px, score, *aps)
