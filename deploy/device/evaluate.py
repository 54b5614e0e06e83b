"""Detections of an engine on image files; the host scores them."""

from typing import Any, Callable, Dict

import numpy as np

from .engines import load
from .errors import AgentError
from .files import verified
from .imaging import ImageError, Preprocessing, Thresholds, load_image, postprocess


def evaluate(job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Run an engine over images.

    Job: "engine" (its record), "images" (file references), "preprocessing", "thresholds". Result: "images":
    for each, "boxes" (xyxy, original pixels) and "scores", best first; "not_finite": how many candidates were
    no numbers, over all images (a float16 overflow shows here).
    """
    preprocessing = Preprocessing.from_json(job["preprocessing"])
    thresholds = Thresholds(**job["thresholds"])
    runner = load(job["engine"])
    images, not_finite = [], 0
    try:
        for index, reference in enumerate(job["images"]):
            values, placement = runner.prepare(read_image(reference), preprocessing)
            found = runner.run(values)
            not_finite += int(np.sum(~(np.isfinite(found.boxes).all(axis=1) & np.isfinite(found.scores))))
            boxes, scores = postprocess(found.boxes, found.scores, placement, thresholds)
            images.append({"boxes": [numbers(box) for box in boxes], "scores": numbers(scores)})
            report({"event": "progress", "stage": "evaluate", "done": index + 1, "total": len(job["images"])})
    finally:
        runner.close()
    return {"images": images, "not_finite": not_finite}


def read_image(reference: Dict[str, str]) -> np.ndarray:
    """Decode the image that a job refers to.

    Raises:
        AgentError: If it differs from what was sent, or does not decode; the host's name for it is said.
    """
    path = verified(reference)
    try:
        return load_image(path)
    except ImageError:
        message = "{} does not decode as an image".format(reference["name"])
        raise AgentError("image", message, "replace or remove it") from None


def numbers(values: np.ndarray) -> Any:
    """float32 as the shortest decimals that read back as the same float32."""
    return [float(str(value)) for value in values]
