"""Detections of the unpruned and the last step, drawn on the same frames."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgeprune.benchmarks.records import Report, SampleDetections
from edgeprune.data.dataset import Dataset

MAX_WIDTH = 768  # pixels: enough for a figure, and a report stays small
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Sample:
    """One frame, and what was found in it before and after pruning; boxes in the frame's own pixels."""

    image_id: int
    width: int
    height: int
    jpeg: str  # base64
    before: SampleDetections
    after: SampleDetections


def sample_ids(report: Report) -> tuple[int, ...]:
    """Ids of the images whose detections the report can draw."""
    return tuple(sorted(_found(report, 0).keys() & _found(report, -1).keys()))


def sample_frames(report: Report, dataset: Dataset) -> dict[int, NDArray[np.uint8]]:
    """The images that the report can draw on, by id, from the data set that it was measured on."""
    ids = sample_ids(report)
    return {
        sample.image_id: dataset.image(index)
        for index, sample in enumerate(dataset.samples)
        if sample.image_id in ids
    }


def draw_samples(report: Report, frames: Mapping[int, NDArray[np.uint8]]) -> list[Sample]:
    """Put detections beside their frames.

    Args:
        frames: image id -> ``(H, W, 3)`` BGR; without a frame a sample is left out.
    """
    before, after = _found(report, 0), _found(report, -1)
    samples = []
    for image_id in sample_ids(report):
        if image_id in frames:
            height, width, _ = frames[image_id].shape
            jpeg = _jpeg(frames[image_id])
            samples.append(Sample(image_id, width, height, jpeg, before[image_id], after[image_id]))
    return samples


def _found(report: Report, row: int) -> dict[int, SampleDetections]:
    result = report.rows[row].result
    return {sample.image_id: sample for sample in result.samples} if result else {}


def _jpeg(frame: NDArray[np.uint8]) -> str:
    height, width, _ = frame.shape
    if width > MAX_WIDTH:
        size = (MAX_WIDTH, round(height * MAX_WIDTH / width))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    _, encoded = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return base64.b64encode(encoded.tobytes()).decode("ascii")
