"""A detector and data so small that a build takes seconds; as a program, edgeprune that knows `tiny`."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.benchmarks.measure import BenchmarkOptions, benchmark_engines
from edgeprune.cli import app
from edgeprune.deploy.device.imaging import Preprocessing
from edgeprune.detectors.protocol import Targets
from edgeprune.detectors.registry import DETECTORS, Registered

SIDE = 64
CELL = 16  # pixels; each cell proposes one box of twice its side around its centre


class TinyDetector(nn.Module):
    """Three convolutions; raw output: one logit a cell, ``(N, 1, H / 16, W / 16)``."""

    preprocessing = Preprocessing("bgr", (40.0,) * 3, (60.0,) * 3)

    def __init__(self, input_size: tuple[int, int], classes: Sequence[str] = ("person",)) -> None:
        super().__init__()
        self.input_size, self.classes = input_size, tuple(classes)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.stem = nn.Conv2d(3, 16, 3, 4, 1)
            self.middle = nn.Conv2d(16, 24, 3, 2, 1)
            self.deep = nn.Conv2d(24, 16, 3, 2, 1)
            self.head = nn.Conv2d(16, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.stem(images))
        x = functional.relu(self.deep(functional.relu(self.middle(x))))
        raw: Tensor = self.head(x)
        return raw

    def decode(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        scores = raw.flatten(1).sigmoid()  # (N, M)
        boxes = self._boxes().to(raw.device)
        return boxes.expand(raw.shape[0], -1, -1), scores

    def loss(self, raw: Tensor, targets: Sequence[Targets]) -> Tensor:
        centres = (self._boxes()[:, :2] + self._boxes()[:, 2:]) / 2  # (M, 2)
        losses = []
        for logits, target in zip(raw.flatten(1), targets, strict=True):
            middles = (target.boxes[:, :2] + target.boxes[:, 2:]) / 2  # (K, 2)
            near = torch.cdist(centres, middles.cpu()) < CELL / 2  # (M, K)
            losses.append(functional.binary_cross_entropy_with_logits(logits, near.any(1).float()))
        return torch.stack(losses)

    def _boxes(self) -> Tensor:
        rows, columns = (torch.arange(side // CELL) * CELL + CELL / 2 for side in self.input_size)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack((x - CELL, y - CELL, x + CELL, y + CELL), 2).flatten(0, 1)


def load_tiny(path: Path, input_size: tuple[int, int], classes: Sequence[str]) -> TinyDetector:
    detector = TinyDetector(input_size, classes)
    detector.load_state_dict(torch.load(path, weights_only=True))
    return detector


def write_weights(path: Path) -> None:
    torch.save(TinyDetector((SIDE, SIDE)).state_dict(), path)


def write_data(folder: Path, name: str, images: int, seed: int) -> Path:
    """Grey noise with one bright square an image, as COCO JSON with the images beside it."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    records, annotations = [], []
    for number in range(1, images + 1):
        pixels = rng.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8)
        x, y = (int(cell) * CELL - CELL // 2 for cell in rng.integers(1, SIDE // CELL - 1, 2))
        pixels[y : y + 2 * CELL, x : x + 2 * CELL] += 120
        cv2.imwrite(str(folder / name / f"{number}.png"), pixels)
        records.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        box = [x, y, 2 * CELL, 2 * CELL]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": box, "area": 1024, "iscrowd": 0}
        )
    path = folder / f"boxes_{name}.json"
    categories = [{"id": 1, "name": "person"}]
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}))
    return path


def write_inputs(folder: Path) -> Path:
    """Weights, training and validation data."""
    write_weights(folder / "tiny.pt")
    write_data(folder, "train", 16, seed=1)
    write_data(folder, "val", 8, seed=2)
    return folder


@contextlib.contextmanager
def own_surroundings(cache: Path) -> Iterator[None]:
    """A cache folder of these tests' own (the device works there), and one thread here as in the programs."""
    import pytest  # not for the program

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


DETECTORS["tiny"] = Registered(TinyDetector, load_tiny, "nanodet-g")
# Its builds are measured for as many runs as any, but no test waits for the least duration.
benchmark_engines.__kwdefaults__["options"] = BenchmarkOptions(min_seconds=0.0)


if __name__ == "__main__":
    app()
