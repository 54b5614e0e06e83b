"""Letterbox, normalisation and NMS: one implementation for host and device."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeprune.deploy.device import imaging
from edgeprune.deploy.device.imaging import (
    ImageError,
    Placement,
    Preprocessing,
    Thresholds,
    letterbox,
    load_image,
    nms,
    normalise,
    postprocess,
)

CENTRED = Preprocessing()
WHOLE = Placement(1.0, 1.0, 0, 0, 1000, 1000)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=2).astype(np.uint8)


def one_box_at_a_time(boxes: np.ndarray, scores: np.ndarray, iou: float) -> list[int]:
    """Greedy NMS as its definition reads, in float64."""
    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda i: -scores[i]):
        x1, y1, x2, y2 = boxes[index].tolist()
        for other in kept:
            ox1, oy1, ox2, oy2 = boxes[other].tolist()
            shared = max(min(x2, ox2) - max(x1, ox1), 0) * max(min(y2, oy2) - max(y1, oy1), 0)
            if shared > iou * ((x2 - x1) * (y2 - y1) + (ox2 - ox1) * (oy2 - oy1) - shared):
                break
        else:
            kept.append(index)
    return kept


@settings(deadline=None, max_examples=200)
@given(
    # Whole-number boxes: areas are exact in float32, so the threshold decides alike in both computations.
    st.lists(st.tuples(*[st.integers(0, 30)] * 4, st.integers(0, 20)), max_size=200),
    st.sampled_from([0.25, 0.5, 0.75]),
)
def test_nms_equals_the_definition(candidates: list[tuple[int, ...]], iou: float) -> None:
    """Resolving blocks at once keeps what one box at a time keeps, ties and empty boxes included."""
    corners = np.array([c[:4] for c in candidates], np.float32).reshape(-1, 4)
    boxes = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1)
    scores = np.array([c[4] for c in candidates], np.float32) / 20
    assert nms(boxes, scores, iou).tolist() == one_box_at_a_time(boxes, scores, iou)


def one_box_at_a_time_in_float32(boxes: np.ndarray, scores: np.ndarray, iou: float, limit: int) -> list[int]:
    """Greedy NMS in the arithmetic of the device: every product and sum rounded to float32, in this order."""
    x1, y1, x2, y2 = boxes.T
    area = (x2 - x1) * (y2 - y1)
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        width = np.minimum(x2[index], x2[kept]) - np.maximum(x1[index], x1[kept])
        height = np.minimum(y2[index], y2[kept]) - np.maximum(y1[index], y1[kept])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        if not (shared > np.float32(iou) * (area[index] + area[kept] - shared)).any():
            kept.append(int(index))
    return kept[:limit]


@pytest.mark.parametrize(("count", "spread"), [(1000, 40.0), (1000, 3.0), (130, 8.0), (64, 8.0), (1, 1.0)])
def test_nms_is_the_definition_to_the_last_bit(count: int, spread: float) -> None:
    """Candidates scattered around 30 people: kept are those of one float32 box at a time, in their order.

    From crowds, where 300 are kept, to heaps, where nearly all fall; scores repeat, as a detector's do.
    """
    random = np.random.default_rng(count)
    people = random.uniform(0, 320, (30, 2))[random.integers(0, 30, count)]
    centres = people + random.normal(0, spread, (count, 2))
    sizes = random.uniform(8, 60, (count, 2))
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1).astype(np.float32)
    scores = random.uniform(0.01, 1, count).astype(np.float16).astype(np.float32)
    for iou in (0.6, 0.3):
        expected = one_box_at_a_time_in_float32(boxes, scores, iou, 300)
        assert nms(boxes, scores, iou, 300).tolist() == expected
        found, kept = postprocess(boxes, scores, WHOLE, Thresholds(iou=iou))
        assert np.array_equal(found, np.clip(boxes[expected], 0, 1000))
        assert np.array_equal(kept, scores[expected])


def test_nms_stops_at_the_limit() -> None:
    """The limit cuts the list of kept boxes, also when a block of candidates holds more."""
    boxes = np.array([[20 * i, 0, 20 * i + 10, 10] for i in range(150)], np.float32)
    scores = np.linspace(0.9, 0.1, 150, dtype=np.float32)
    assert nms(boxes, scores, 0.5, limit=70).tolist() == list(range(70))


@pytest.mark.parametrize(
    ("resize", "placement"),
    [
        ("letterbox", Placement(0.5, 0.5, 0, 15, 200, 140)),
        ("letterbox-top-left", Placement(0.5, 0.5, 0, 0, 200, 140)),
        ("stretch", Placement(0.5, 100 / 140, 0, 0, 200, 140)),
    ],
)
def test_letterbox_places_the_image(resize: str, placement: Placement) -> None:
    """A 200 x 140 image in a 100 x 100 canvas lies where arithmetic by hand puts it."""
    image = noise(140, 200)
    canvas, found = letterbox(image, (100, 100), Preprocessing(resize=resize, pad_value=7))
    assert found == placement
    height = 100 if resize == "stretch" else 70
    expected = np.full((100, 100, 3), 7, np.uint8)
    resized = cv2.resize(image, (100, height), interpolation=cv2.INTER_LINEAR)
    expected[found.top : found.top + height] = resized
    assert (canvas == expected).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 100), st.integers(1, 100))
def test_letterbox_stays_in_the_canvas(height: int, width: int, rows: int, columns: int) -> None:
    """Whatever the sizes, the canvas has the size asked for and the image's corners come back."""
    canvas, placement = letterbox(noise(height, width), (rows, columns), CENTRED)
    assert canvas.shape == (rows, columns, 3)
    corners = np.array([[0, 0, width, height]], np.float32)
    scale = np.array([placement.scale_x, placement.scale_y] * 2, np.float32)
    offset = np.array([placement.left, placement.top] * 2, np.float32)
    boxes, _ = postprocess(corners * scale + offset, np.ones(1, np.float32), placement)
    assert np.allclose(boxes, corners, atol=1e-3)


@pytest.mark.parametrize("size", [(320, 320), (97, 61), (600, 800)])
def test_pillow_resizes_like_opencv(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    """Without OpenCV the canvas differs by one grey level at most: OpenCV rounds in fixed point."""
    image = noise(240, 330)
    with_opencv, _ = letterbox(image, size, CENTRED)
    monkeypatch.setattr(imaging, "cv2", None)
    with_pillow, _ = letterbox(image, size, CENTRED)
    assert np.abs(with_opencv.astype(int) - with_pillow.astype(int)).max() <= 1


def test_normalise_is_the_formula() -> None:
    """(pixel - mean) / std by plane, in the network's channel order, contiguous float32."""
    image = noise(5, 7)
    bgr = Preprocessing(mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395))
    expected = (image.astype(np.float64) - bgr.mean) / bgr.std
    values = normalise(image, bgr)
    assert values.shape == (1, 3, 5, 7)
    assert values.dtype == np.float32
    assert values.flags["C_CONTIGUOUS"]
    assert np.allclose(values[0], expected.transpose(2, 0, 1), atol=1e-6)
    rgb = bgr._replace(color="rgb", mean=(1.0, 2.0, 3.0))
    expected = (image[:, :, ::-1].astype(np.float64) - rgb.mean) / rgb.std
    assert np.allclose(normalise(image, rgb)[0], expected.transpose(2, 0, 1), atol=1e-6)


colours = st.floats(0, 255, allow_nan=False)
deviations = st.floats(0.1, 255)


@given(
    st.sampled_from(["bgr", "rgb"]),
    st.tuples(colours, colours, colours),
    st.tuples(deviations, deviations, deviations),
    st.integers(0, 255),
    st.sampled_from(["letterbox", "letterbox-top-left", "stretch"]),
)
def test_preprocessing_reads_back(
    color: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    pad_value: int,
    resize: str,
) -> None:
    """A record survives JSON."""
    preprocessing = Preprocessing(color, mean, std, pad_value, resize)
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing


@pytest.mark.parametrize(
    "change",
    [
        {"color": "hsv"},
        {"std": [1, 0, 1]},
        {"mean": [1, 2]},
        {"pad_value": 256},
        {"resize": "crop"},
        {"gamma": 1},
    ],
)
def test_preprocessing_refuses_nonsense(change: dict[str, object]) -> None:
    """A field out of its range, or unknown, is refused when the record is read."""
    with pytest.raises(ValueError, match=r"preprocessing|color|std|pad_value|resize"):
        Preprocessing.from_json({**CENTRED.to_json(), **change})


def test_postprocess_applies_the_thresholds() -> None:
    """Score, number of candidates, overlap, number of detections: each removes what it should."""
    boxes = np.array([[100 * i, 0, 100 * i + 50, 50] for i in range(6)], np.float32)
    boxes[5] = boxes[0] + 1  # IoU with the first: 49 * 49 / (2 * 2500 - 49 * 49) = 0.92
    scores = np.array([0.9, 0.005, 0.8, 0.7, 0.6, 0.5], np.float32)

    def kept(**thresholds: float) -> list[float]:
        found = postprocess(boxes, scores, WHOLE, Thresholds()._replace(**thresholds))[1]
        return [round(float(score), 3) for score in found]

    assert kept() == [0.9, 0.8, 0.7, 0.6]
    assert kept(score=0.65) == [0.9, 0.8, 0.7]
    assert kept(candidates=2) == [0.9, 0.8]
    assert kept(iou=0.95) == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert kept(detections=3) == [0.9, 0.8, 0.7]


def test_postprocess_clips_and_drops_what_is_not_finite() -> None:
    """Boxes end at the image's edge; candidates that overflowed do not reach the score."""
    boxes = np.array(
        [[-5, -5, 2000, 10], [np.nan, 0, 10, 10], [0, 0, np.inf, 10], [20, 20, 30, 30]], np.float32
    )
    scores = np.array([0.9, 0.8, 0.7, np.nan], np.float32)
    found, kept = postprocess(boxes, scores, WHOLE)
    assert found.tolist() == [[0, 0, 1000, 10]]
    assert kept.tolist() == [np.float32(0.9)]
    nothing, none = postprocess(boxes[:0], scores[:0], WHOLE)
    assert nothing.shape == (0, 4)
    assert none.shape == (0,)


@pytest.mark.parametrize("library", ["opencv", "pillow"])
def test_load_image_gives_stored_bgr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Both libraries give stored pixels as BGR: grey becomes three channels, rotation tags are left alone."""
    if library == "pillow":
        monkeypatch.setattr(imaging, "cv2", None)
    image = noise(6, 9)
    Image.fromarray(image[:, :, ::-1]).save(tmp_path / "colour.png")
    assert (load_image(str(tmp_path / "colour.png")) == image).all()
    Image.fromarray(image[:, :, 0]).save(tmp_path / "grey.png")
    assert (load_image(str(tmp_path / "grey.png")) == image[:, :, :1]).all()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(smooth(48, 64)).save(tmp_path / "turned.jpg", exif=turned)
    assert load_image(str(tmp_path / "turned.jpg")).shape == (48, 64, 3)


@pytest.mark.parametrize("library", ["opencv", "pillow"])
def test_load_image_names_the_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """A missing file and a file that is no image are errors that name it."""
    if library == "pillow":
        monkeypatch.setattr(imaging, "cv2", None)
    with pytest.raises(ImageError, match=r"absent\.jpg"):
        load_image(str(tmp_path / "absent.jpg"))
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ImageError, match=r"text\.jpg"):
        load_image(str(tmp_path / "text.jpg"))


def test_imaging_imports_without_opencv() -> None:
    """A machine without OpenCV uses Pillow and does not need cv2 at import."""
    use = "from edgeprune.deploy.device.imaging import IMAGE_LIBRARY as found; print(found)"
    code = f"import sys; sys.modules['cv2'] = None\n{use}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "pillow"
