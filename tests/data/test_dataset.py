import json
import math
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, image, person, write_coco
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from edgeprune.data.dataset import load_dataset
from edgeprune.data.errors import DataError, EdgePruneError

GOOD = [5, 6, 10, 12]


def test_boxes_become_xyxy_of_the_asked_class(tmp_path: Path) -> None:
    """xywh becomes xyxy; other classes go; crowd and ignore boxes stay as ignored; empty images stay."""
    annotations = [
        person(1, 1, GOOD),
        person(2, 1, [0, 0, 40, 30], iscrowd=1),
        person(3, 1, [1, 1, 2, 2], ignore=1),
        {**person(4, 1, GOOD), "category_id": 7},
    ]
    dataset = load_dataset(write_coco(tmp_path, annotations))
    first, second = dataset.samples
    assert first.boxes.dtype == np.float32
    assert first.boxes.tolist() == [[5, 6, 15, 18], [0, 0, 40, 30], [1, 1, 3, 3]]
    assert first.ignore.tolist() == [False, True, True]
    assert second.boxes.shape == (0, 4) and second.ignore.shape == (0,)
    assert dataset.problems == ()
    assert [box["iscrowd"] for box in dataset.coco["annotations"]] == [0, 1, 1]
    assert dataset.coco["categories"] == [{"id": 1, "name": "person"}]


def test_classes_are_numbered_in_the_order_asked(tmp_path: Path) -> None:
    """Category 1 of the ground truth is the first class asked for, whatever its id in the file."""
    path = write_coco(tmp_path, [person(1, 1, GOOD), {**person(2, 2, GOOD), "category_id": 7}])
    dataset = load_dataset(path, classes=("person", "dog"))
    assert [(box["image_id"], box["category_id"]) for box in dataset.coco["annotations"]] == [(1, 1), (2, 2)]


def test_a_missing_class_lists_those_there(tmp_path: Path) -> None:
    """A data set without the class says which classes it has."""
    with pytest.raises(DataError, match="has no class 'cat'; its classes are: dog, person"):
        load_dataset(write_coco(tmp_path, []), classes=("cat",))


@pytest.mark.parametrize(
    ("annotation", "what"),
    [
        (person(2, 1, [50, 5, 5, 5]), "outside"),
        (person(2, 1, [-9, 5, 9, 5]), "outside"),
        (person(2, 1, [20, 20, -5, 5]), "inverted or empty"),
        (person(2, 1, [20, 20, 5, 0]), "inverted or empty"),
        (person(2, 1, [math.nan, 5, 5, 5]), "no finite number"),
        (person(2, 1, [5, 5, math.inf, 5]), "no finite number"),
        (person(2, 1, [5, 5, "5", 5]), "no finite number"),
        (person(2, 1, [5, 5, 5]), "no list of four"),
        (person(2, 1, None), "no list of four"),
        (person(2, 1, [10**400, 5, 5, 5]), "no finite number"),
        (person(2, 3, GOOD), "no image with the id 3"),
        (person(2, "1", GOOD), "no image with the id '1'"),
        (person(2, 10**30, GOOD), "no image with the id"),
        (person(1, 1, GOOD), "belongs to another annotation"),
        (person("x", 1, GOOD), "no whole number"),
        ({**person(2, 1, GOOD), "category_id": 8}, "no category with the id 8"),
        (person(2, 1, GOOD, iscrowd="yes"), "must be 0 or 1"),
        ("box", "no whole number"),
    ],
)
def test_a_bad_box_is_dropped_and_listed(tmp_path: Path, annotation: Any, what: str) -> None:
    """Each kind of useless annotation is left out, named with file, place and reason; the good one stays."""
    path = write_coco(tmp_path, [person(1, 1, GOOD), annotation])
    dataset = load_dataset(path)
    (problem,) = dataset.problems
    assert (problem.file, problem.where) == (str(path), "annotations[1]")
    assert what in problem.what and problem.what.endswith("dropped")
    assert dataset.samples[0].boxes.tolist() == [[5, 6, 15, 18]]
    assert len(dataset.coco["annotations"]) == 1


def test_a_box_over_the_edge_is_clipped(tmp_path: Path) -> None:
    """What reaches outside is cut off; more than a pixel of it is listed."""
    dataset = load_dataset(
        write_coco(tmp_path, [person(1, 1, [-5, 2, 10, 10]), person(2, 2, [30, 20, 10.5, 10])])
    )
    assert dataset.samples[0].boxes.tolist() == [[0, 2, 5, 12]]
    assert dataset.samples[1].boxes.tolist() == [[30, 20, 40, 30]]
    (problem,) = dataset.problems
    assert problem.where == "annotations[0]" and "5 px outside the image; clipped" in problem.what


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (image(1, "b.png"), "id 1 belongs to another image"),
        (image(2, "a.png"), "'a.png' belongs to another image"),
        (image(2, "none.png"), "no image file"),
        (image(2, ""), "no image file"),
        (image(2, "x" * 5000), "no image file"),
        (image(2, "a\0.png"), "no image file"),
        (image(2, "\ud800.png"), "no image file"),
        (image(2, 5), "no file_name"),
        (image(2, "b.png", width=0), "whole numbers of pixels"),
        (image(2, "b.png", height=10**400), "whole numbers of pixels"),
        (image(2, "b.png", width=39.5), "whole numbers of pixels"),
        (image(2, "b.png", width=None), "whole numbers of pixels"),
        (image(True, "b.png"), "no whole number"),
        ([], "no whole number"),
    ],
)
def test_a_bad_image_is_dropped_and_listed(tmp_path: Path, entry: Any, what: str) -> None:
    """Each kind of useless image entry is left out once, with its boxes, and the good one stays."""
    path = write_coco(tmp_path, [person(1, 1, GOOD)], [image(1, "a.png"), entry])
    dataset = load_dataset(path)
    (problem,) = dataset.problems
    assert problem.where == "images[1]" and what in problem.what
    assert [sample.file_name for sample in dataset.samples] == ["a.png"]
    assert len(dataset.samples[0].boxes) == 1


def test_boxes_of_a_dropped_image_are_no_second_problem(tmp_path: Path) -> None:
    """An image that is missing is listed once, not once for each of its boxes."""
    path = write_coco(tmp_path, [person(1, 1, GOOD), person(2, 2, GOOD)])
    (tmp_path / "b.png").unlink()
    dataset = load_dataset(path)
    assert len(dataset.problems) == 1 and len(dataset.coco["annotations"]) == 1


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/passwd", "x/../../a.png", "..\\a.png", "C:\\a.png", "../v.avi#1"]
)
def test_names_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    """A file_name that leads out of the folder of images is an error before anything is opened."""
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match="leaves the folder of images"):
        load_dataset(write_coco(tmp_path / "set", [], [image(1, name)]))


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"images": []}', '{"images": {}, "annotations": []}']
)
def test_json_that_is_not_coco_says_so(tmp_path: Path, content: str) -> None:
    """Another JSON gives one error with what was expected."""
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"x\.json is not COCO JSON: it has no list"):
        load_dataset(path)


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    """A wrong folder of images is found at once, with the folder looked in and the first problem."""
    (tmp_path / "empty").mkdir()
    path = write_coco(tmp_path, [person(1, 1, GOOD)])
    with pytest.raises(
        DataError, match=r"none of its 2 images in .*empty can be used; .* First problem: .*a\.png"
    ):
        load_dataset(path, images=tmp_path / "empty")
    with pytest.raises(DataError, match=r"no folder of images at .*gone"):
        load_dataset(path, images=tmp_path / "gone")


def test_the_folder_of_images_is_found_by_name(tmp_path: Path) -> None:
    """person_val.json reads val/ beside it, and the given folder where one is given."""
    path = write_coco(tmp_path, [])
    for folder in ("val", "other"):
        (tmp_path / folder).mkdir()
        for name in ("a.png", "b.png"):
            shutil.copy(tmp_path / name, tmp_path / folder / name)
    labels = path.rename(tmp_path / "person_val.json")
    assert load_dataset(labels).root == tmp_path / "val"
    assert load_dataset(labels, images=tmp_path / "other").root == tmp_path / "other"
    assert load_dataset(labels.rename(tmp_path / "x.json")).root == tmp_path


def test_images_are_decoded_as_stored(tmp_path: Path) -> None:
    """image() gives the file's pixels in BGR."""
    path = write_coco(tmp_path, [])
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "b.png"), pixels)
    dataset = load_dataset(path)
    assert dataset.image_path(1) == tmp_path / "b.png"
    np.testing.assert_array_equal(dataset.image(1), pixels)


def test_an_image_that_does_not_decode_is_named_and_can_be_dropped(tmp_path: Path) -> None:
    """A broken file or a size unlike the labels' raises DataError with the file; drop() lists it."""
    path = write_coco(tmp_path, [person(1, 1, GOOD), person(2, 2, GOOD)])
    dataset = load_dataset(path)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png does not decode") as caught:
        dataset.image(0)
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((WIDTH, HEIGHT, 3), np.uint8))
    with pytest.raises(DataError, match=r"b\.png is 30x40 pixels and .* says 40x30"):
        dataset.image(1)

    kept = dataset.drop({0: str(caught.value)})
    assert [sample.image_id for sample in kept.samples] == [2]
    assert [box["image_id"] for box in kept.coco["annotations"]] == [2]
    (problem,) = kept.problems
    assert "does not decode" in problem.what and problem.file == "a.png"


def test_sha256_follows_labels_images_and_choice(tmp_path: Path) -> None:
    """The same data in another folder has the same hash; other labels, files or subsets have another."""
    path = write_coco(tmp_path, [person(1, 1, GOOD)])
    first = load_dataset(path)
    copy = Path(shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-copy"))) / path.name
    assert load_dataset(copy).sha256 == first.sha256
    assert len({first.sha256, first.subset([0]).sha256, first.subset([1]).sha256}) == 3
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes() + b"\0")
    second = load_dataset(path)
    write_coco(tmp_path, [person(1, 1, [5, 6, 10, 13])])
    assert len({first.sha256, second.sha256, load_dataset(path).sha256}) == 3


def test_hold_out_splits_by_image(tmp_path: Path) -> None:
    """Every image is in one part only; the seed decides which; the shares are as asked."""
    images = []
    for number in range(20):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        images.append(image(number, f"{number}.png"))
    dataset = load_dataset(write_coco(tmp_path, [person(n + 1, n, GOOD) for n in range(20)], images))
    train, select = dataset.hold_out(0.25, seed=3)
    ids = [{sample.image_id for sample in part.samples} for part in (train, select)]
    assert [len(part) for part in ids] == [15, 5]
    assert ids[0] | ids[1] == set(range(20))
    assert {box["image_id"] for box in select.coco["annotations"]} == ids[1]
    assert {s.image_id for s in dataset.hold_out(0.25, seed=3)[1].samples} == ids[1]
    assert {s.image_id for s in dataset.hold_out(0.25, seed=4)[1].samples} != ids[1]
    assert [len(part) for part in dataset.hold_out(0.001, seed=0)] == [19, 1]
    with pytest.raises(DataError, match="too few"):
        dataset.subset([0]).hold_out(0.5, seed=0)


NUMBERS = (
    st.floats(-60, 60)
    | st.floats()
    | st.integers()
    | st.none()
    | st.text(max_size=2)
    | st.lists(st.integers(), max_size=2)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boxes")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(boxes=st.lists(st.lists(NUMBERS, min_size=3, max_size=5) | NUMBERS, max_size=6))
def test_boxes_are_usable_or_listed(folder: Path, boxes: list[Any]) -> None:
    """Whatever `bbox` holds: kept boxes lie in the image and have an area, and each other one is listed."""
    dataset = load_dataset(write_coco(folder, [person(n, 1, box) for n, box in enumerate(boxes)]))
    kept = dataset.samples[0].boxes
    dropped = [problem for problem in dataset.problems if problem.what.endswith("dropped")]
    assert len(kept) + len(dropped) == len(boxes)
    assert np.isfinite(kept).all()
    assert (kept[:, :2] < kept[:, 2:]).all()
    assert (kept >= 0).all() and (kept <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_an_error_of_ours(folder: Path, data: st.DataObject) -> None:
    """A label file with any part replaced by something else loads or raises EdgePruneError, nothing else."""
    path = write_coco(folder, [person(1, 1, GOOD), person(2, 2, GOOD, iscrowd=1)])
    content = json.loads(path.read_text())
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )
    node = content
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[key], dict | list) and node[key]) or data.draw(st.booleans()):
            node[key] = data.draw(junk)
            break
        node = node[key]
    path.write_text(json.dumps(content))
    try:
        dataset = load_dataset(path)
    except EdgePruneError:
        return
    assert all((folder / sample.file_name).is_file() for sample in dataset.samples)


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "images"), [("train", 164), ("val", 188)])
def test_coco_person_loads_whole(shared: Path, name: str, images: int) -> None:
    """Of coco-person every image and box is read, as pycocotools reads them; images have the labels' size."""
    path = shared / "coco-person" / f"person_{name}2017.json"
    dataset, coco = load_dataset(path), COCO(str(path))
    assert len(dataset) == images and dataset.problems == ()
    for index in range(0, images, 8):
        dataset.image(index)
    for sample in dataset.samples:
        annotations = coco.imgToAnns[sample.image_id]
        expected = np.array([box["bbox"] for box in annotations]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        np.testing.assert_allclose(sample.boxes, expected, atol=1.0)
        assert sample.ignore.tolist() == [bool(box["iscrowd"]) for box in annotations]
