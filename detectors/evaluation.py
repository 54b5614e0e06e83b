"""Detections and average precision of a PyTorch network on the host."""

import numpy as np
import torch
from torch import nn

from edgeprune.data.dataset import Dataset
from edgeprune.data.precision import AveragePrecision, ImageDetections, average_precision
from edgeprune.deploy.device.imaging import normalise, postprocess
from edgeprune.detectors.canvases import Canvases
from edgeprune.detectors.protocol import Detector, Progress


def detect(
    detector: Detector,
    network: nn.Module,
    dataset: Dataset,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    *,
    batch_size: int = 8,
    canvases: Canvases | None = None,
) -> list[ImageDetections]:
    """Run a network over a data set, in evaluation mode, with the letterbox and NMS that run on devices.

    Args:
        detector: preprocessing and decoding; on `device`.
        network: called like ``detector.forward``; on `device`, its mode is restored.
        progress: called with images done and in all.
        canvases: letterboxed images of `dataset`, where they are kept from an earlier call.

    Raises:
        DataError: If an image does not decode.
    """
    if canvases is None:
        canvases = Canvases(dataset, detector.input_size, detector.preprocessing, limit_bytes=0)
    training = network.training
    network.eval()
    found = []
    try:
        for start in range(0, len(canvases), batch_size):
            samples = dataset.samples[start : start + batch_size]
            loaded = [canvases[start + i] for i in range(len(samples))]
            images = np.concatenate([normalise(canvas, detector.preprocessing) for canvas, _ in loaded])
            with torch.no_grad():
                boxes, scores = detector.decode(network(torch.from_numpy(images).to(device)))
            for sample, (_, placement), image_boxes, image_scores in zip(
                samples, loaded, boxes.float().cpu().numpy(), scores.float().cpu().numpy(), strict=True
            ):
                found.append(
                    ImageDetections(sample.image_id, *postprocess(image_boxes, image_scores, placement))
                )
            if progress is not None:
                progress(len(found), len(canvases))
    finally:
        network.train(training)
    return found


def evaluate(
    detector: Detector,
    network: nn.Module,
    dataset: Dataset,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    *,
    batch_size: int = 8,
    canvases: Canvases | None = None,
) -> AveragePrecision:
    """Average precision of what `detect` finds; the same arguments."""
    found = detect(detector, network, dataset, device, progress, batch_size=batch_size, canvases=canvases)
    return average_precision(dataset, found)
