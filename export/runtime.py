"""Run an exported model on the host with ONNX Runtime, on the real images of a data set."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from edgeprune.data.dataset import Dataset
from edgeprune.data.precision import AveragePrecision, ImageDetections, average_precision
from edgeprune.deploy.device.imaging import Placement, Preprocessing, letterbox, normalise, postprocess
from edgeprune.export.errors import ExportError


def open_session(path: Path, changed: onnx.ModelProto | None = None) -> onnxruntime.InferenceSession:
    """Load a file, or the model made of it, in ONNX Runtime on the CPU.

    Raises:
        ExportError: If ONNX Runtime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves idle cores to others
    source = path.as_posix() if changed is None else changed.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no public base class
        raise ExportError(f"ONNX Runtime cannot load {path}: {error}") from error


class OnnxModel:
    """An edgeprune ONNX file in ONNX Runtime; what it needs to know of the detector is in the file.

    Args:
        path: of the file.
        changed: the file's model with outputs added, to run in its stead.

    Attributes:
        input_size: ``(H, W)``, pixels.
        preprocessing: how images become the network's input.
        uint8: whether the file takes the letterboxed BGR image itself, ``(N, H, W, 3)`` uint8.

    Raises:
        ExportError: If the file cannot be loaded or was not exported by edgeprune.
    """

    def __init__(self, path: Path, changed: onnx.ModelProto | None = None) -> None:
        self._session = open_session(path, changed)
        metadata = self._session.get_modelmeta().custom_metadata_map
        try:
            self.preprocessing = Preprocessing.from_json(json.loads(metadata["preprocessing"]))
            height, width = json.loads(metadata["input_size"])
        except (KeyError, ValueError) as error:
            raise ExportError(
                f"{path} says nothing of its preprocessing ({error}): only files of `edgeprune export` "
                "can be run on images; export the detector again"
            ) from error
        self.input_size = (int(height), int(width))
        images = self._session.get_inputs()[0]
        self.uint8 = images.type == "tensor(uint8)"
        self._batch = images.shape[0] if isinstance(images.shape[0], int) else 1

    def prepare(self, image: np.ndarray) -> tuple[np.ndarray, Placement]:
        """Turn an image ``(H, W, 3)`` uint8 BGR into this model's input for it, and where it lies in that."""
        canvas, placement = letterbox(image, self.input_size, self.preprocessing)
        images = canvas[None] if self.uint8 else normalise(canvas, self.preprocessing)
        return images.repeat(self._batch, axis=0), placement

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes ``(M, 4)``, xyxy input pixels, and scores ``(M,)`` for what `prepare` made."""
        boxes, scores = self.run_all(["boxes", "scores"], images)
        return boxes[0], scores[0]

    def run_all(self, names: Sequence[str], images: np.ndarray) -> Sequence[np.ndarray]:
        """Return the named outputs for what `prepare` made, with their batch."""
        outputs: Sequence[np.ndarray] = self._session.run(list(names), {"images": images})
        return outputs


def inputs_of(
    model: OnnxModel, dataset: Dataset, limit: int | None = None
) -> Iterator[tuple[int, Any, Placement]]:
    """Yield image id, the model's input and the image's place in it, for the first `limit` images."""
    for index, sample in enumerate(dataset.samples[:limit]):
        yield sample.image_id, *model.prepare(dataset.image(index))


def evaluate_model(
    path: Path, dataset: Dataset, prepared: Sequence[tuple[int, Any, Placement]] | None = None
) -> AveragePrecision:
    """AP of an ONNX file on the host, with the thresholds of every AP in this project.

    Args:
        prepared: what `inputs_of` gave for `dataset`, where a model like this one was evaluated before.
    """
    model = OnnxModel(path)
    found = [
        detections_of(image_id, model.run(images), placement)
        for image_id, images, placement in (inputs_of(model, dataset) if prepared is None else prepared)
    ]
    return average_precision(dataset, found)


def detections_of(image_id: int, outputs: Sequence[np.ndarray], placement: Placement) -> ImageDetections:
    """Apply threshold and NMS to the outputs of one image."""
    boxes, scores = postprocess(outputs[0], outputs[1], placement)
    return ImageDetections(image_id, boxes, scores)
