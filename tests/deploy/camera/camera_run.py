"""A run folder as the stages leave it, as far as the camera reads it, with small models."""

import json
from dataclasses import fields
from pathlib import Path

from camera_jobs import PREPROCESSING
from small_model import SIZE, write_model

from edgeprune.cli.config import BuildConfig
from edgeprune.data.files import sha256_of
from edgeprune.data.operating_point import Calibration, OperatingPoint, Wish
from edgeprune.data.precision import Interval

WEIGHTS_SHA256 = "a" * 64


def write_run(folder: Path, steps: int = 2) -> Path:
    """Each step's model gives the same boxes, the later ones with surer scores."""
    folder.mkdir()
    config = {field.name: None for field in fields(BuildConfig)}
    config |= {"target": "host", "classes": "person", "precision": "fp32", "unlabelled": [], "protect": []}
    record = {"schema_version": 1, "config": config, "hashes": {}, "versions": {}}
    (folder / "run.json").write_text(json.dumps(record))
    spec = {"preprocessing": PREPROCESSING.to_json(), "input_size": SIZE}
    for step in range(steps):
        inside = folder / f"step-{step:02d}"
        inside.mkdir()
        model = write_model(inside / "model.onnx", weight=0.01 * (step + 1))
        (inside / "export.json").write_text(json.dumps({"sha256": sha256_of(model)}))
        (inside / "detector.json").write_text(json.dumps({"spec": spec, "weights_sha256": WEIGHTS_SHA256}))
    return folder


def calibrate(run: Path, step: int, threshold: float, weights_sha256: str = WEIGHTS_SHA256) -> None:
    """What `edgeprune calibrate` leaves in a step."""
    any_interval = Interval(0.0, 1.0)
    point = OperatingPoint(threshold, 0.9, any_interval, 0.8, any_interval, None, None, 10, 1, 12, 5)
    Calibration(Wish(precision=0.9), point, weights_sha256, "b" * 64).write(run / f"step-{step:02d}")
