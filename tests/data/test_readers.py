"""Every format says the same; what a reader cannot use is named by file and line."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from formats import BOXES, FORMATS, HEIGHT, WIDTH, coco, crowdhuman, mot, mot_video, voc, yolo

from edgeprune.data.dataset import Dataset, load_dataset, load_images
from edgeprune.data.errors import DataError
from edgeprune.data.precision import AveragePrecision, ImageDetections, average_precision
from edgeprune.data.readers import parts


def scored(dataset: Dataset) -> AveragePrecision:
    """AP of detections that are near the boxes of `formats.BOXES`, by frame number."""
    rng = np.random.default_rng(1)
    detections = []
    for sample, boxes in zip(dataset.samples, BOXES.values(), strict=True):
        near = np.array(boxes, float).reshape(-1, 4)
        near[:, 2:] += near[:, :2]
        near += rng.normal(0, 2, near.shape)
        scores = rng.uniform(0, 1, len(near)).astype(np.float32)
        detections.append(ImageDetections(sample.image_id, near.astype(np.float32), scores))
    return average_precision(dataset, detections)


@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_give_the_same_boxes_and_ap(name: str, tmp_path: Path) -> None:
    """COCO, VOC, YOLO, MOT and CrowdHuman of the same whole pixels: the same boxes, and AP to the bit."""
    dataset = load_dataset(FORMATS[name](tmp_path / "set"))
    assert (dataset.format, dataset.classes, dataset.problems) == (name, ("person",), ())
    for sample, boxes in zip(dataset.samples, BOXES.values(), strict=True):
        expected = [[x, y, x + width, y + height] for x, y, width, height in boxes]
        assert sample.boxes.tolist() == expected
        assert (sample.width, sample.height) == (WIDTH, HEIGHT)
        assert not sample.ignore.any()
    for index in range(len(dataset)):
        assert dataset.image(index).shape == (HEIGHT, WIDTH, 3)
    reference = scored(load_dataset(coco(tmp_path / "reference")))
    assert 0.2 < reference.ap < 0.95
    assert scored(dataset) == reference


def test_mot_labels_of_a_video(tmp_path: Path) -> None:
    """Without images the frames are those of the video; gt.txt counts them from 1, file names from 0."""
    dataset = load_dataset(mot_video(tmp_path / "set"))
    assert [sample.file_name for sample in dataset.samples] == [f"clip.avi#{n:06d}" for n in range(4)]
    assert [len(sample.boxes) for sample in dataset.samples] == [2, 1, 0, 3]
    assert dataset.image(3).shape == (dataset.samples[3].height, dataset.samples[3].width, 3)


def test_mot_flags_and_classes(tmp_path: Path) -> None:
    """Flag 0 and classes that MOT16 neither rewards nor punishes are ignored; vehicles are other classes."""
    path = mot(tmp_path / "set")
    lines = [
        f"1,{n},{n},5,20,30,{flag},{kind},1"
        for n, (flag, kind) in enumerate([(1, 1), (0, 1), (1, 7), (1, 3)])
    ]
    (path / "gt" / "gt.txt").write_text("\n".join(lines))
    first = load_dataset(path).samples[0]
    assert first.boxes[:, 0].tolist() == [0, 1, 2]
    assert first.ignore.tolist() == [False, True, True]
    assert len(load_dataset(path, classes=["car"]).samples[0].boxes) == 1


def test_mot15_has_no_class(tmp_path: Path) -> None:
    """Ten columns are MOT15's, where the eighth is a coordinate in the world, not a class."""
    path = mot(tmp_path / "set")
    (path / "gt" / "gt.txt").write_text("1,9,50,15,31.5,75,1,-4.15,-7.3,0\n1,10,5,15,31.5,75,0,3,-7.3,0\n")
    first = load_dataset(path).samples[0]
    assert first.boxes.tolist() == [[50, 15, 81.5, 90], [5, 15, 36.5, 90]]
    assert first.ignore.tolist() == [False, True]


def test_a_folder_of_mot_sequences(tmp_path: Path) -> None:
    """Each sequence is a video of its own, and its frames keep their order there."""
    for name in ("MOT17-02", "MOT17-04"):
        mot(tmp_path / name)
    (tmp_path / "MOT17-04" / "img1").rename(tmp_path / "MOT17-04" / "frames")
    (tmp_path / "MOT17-04" / "seqinfo.ini").write_text("[Sequence]\nname=MOT17-04\nimDir=frames\n")
    dataset = load_dataset(tmp_path)
    assert [sample.file_name for sample in dataset.samples][3:5] == [
        "MOT17-02/img1/000004.png",
        "MOT17-04/frames/000001.png",
    ]
    frames = [sample.frame for sample in dataset.samples if sample.frame]
    assert [(frame.video, frame.number) for frame in frames] == [(v, n) for v in "12" for n in range(1, 5)]


def test_difficult_objects_are_ignored(tmp_path: Path) -> None:
    """`difficult` of Pascal VOC becomes ignore, as its own evaluation has it."""
    path = voc(tmp_path / "set")
    file = path / "Annotations" / "000001.xml"
    file.write_text(file.read_text().replace("<difficult>0", "<difficult>1", 1))
    assert load_dataset(path).samples[0].ignore.tolist() == [True, False]


def test_a_list_of_voc_chooses_images(tmp_path: Path) -> None:
    """ImageSets/Main/val.txt reads the images that it names, and may not lead out of the folder."""
    path = voc(tmp_path / "set")
    (path / "ImageSets" / "Main").mkdir(parents=True)
    chosen = path / "ImageSets" / "Main" / "val.txt"
    chosen.write_text("000004\n000002\n")
    assert [sample.file_name for sample in load_dataset(chosen).samples] == ["000004.png", "000002.png"]
    chosen.write_text("../../000004\n")
    with pytest.raises(DataError, match=r"val\.txt: line 1: .* leaves the folder"):
        load_dataset(chosen)


def test_ignored_boxes_of_crowdhuman(tmp_path: Path) -> None:
    """Masks and boxes marked `ignore` are ignored; a body that reaches outside is cut without a word."""
    path = crowdhuman(tmp_path / "set")
    boxes = [
        {"tag": "person", "fbox": [-30, 10, 60, 50], "extra": {"box_id": 0, "occ": 1}},
        {"tag": "person", "fbox": [10, 10, 20, 50], "extra": {"ignore": 1}},
        {"tag": "mask", "fbox": [20, 10, 20, 50]},
    ]
    (path / "annotation_val.odgt").write_text(json.dumps({"ID": "000001", "gtboxes": boxes}))
    dataset = load_dataset(path)
    assert dataset.samples[0].boxes[0].tolist() == [0, 10, 30, 60]
    assert dataset.samples[0].ignore.tolist() == [False, True, True]
    assert dataset.problems == ()


@pytest.mark.parametrize("name", ["Person", "pedestrian", "people"])
def test_people_are_found_by_name(tmp_path: Path, name: str) -> None:
    """Whatever a data set calls people, they are the class `person`; asked for by name, the name stays."""
    path = yolo(tmp_path / "set")
    (path / "data.yaml").write_text(f"val: images/val\nnames: [no, {name}]\n")
    assert load_dataset(path).classes == ("person",)
    assert len(load_dataset(path).coco["annotations"]) == 6
    assert load_dataset(path, classes=["no"]).coco["annotations"] == []  # "no" is a name, not false
    (path / "data.yaml").write_text("val: images/val\nnames: [dog, cat]\n")
    with pytest.raises(DataError, match=r"has no class 'person', .* its classes are: cat, dog"):
        load_dataset(path)


def test_parts_of_a_yolo_file(tmp_path: Path) -> None:
    """A file with several parts must be read by the path of one; `parts` lists them; one may be a list."""
    path = yolo(tmp_path / "set")
    (path / "val.txt").write_text("./images/val/000002.png\n")
    (path / "data.yaml").write_text("train: ../images/val\nval: val.txt\nnames: [dog, person]\n")
    with pytest.raises(DataError, match=r"has the parts train, val: give the path of one: .*val, .*val\.txt"):
        load_dataset(path)
    assert parts(path) == parts(path / "data.yaml") == [path / "images" / "val", path / "val.txt"]
    assert len(load_dataset(path / "images" / "val")) == 4
    assert [sample.file_name for sample in load_dataset(path / "val.txt").samples] == [
        "images/val/000002.png"
    ]


PROBLEMS: dict[str, tuple[Callable[[Path], Path], str, str, str, str]] = {
    # format, file, what is replaced, by what, and the problem
    "a word for a number": (yolo, "labels/val/000002.txt", "1 0.5", "1 half", "line 1: not the five numbers"),
    "nan": (yolo, "labels/val/000002.txt", "1 0.5", "1 nan", "line 1: .*no finite number"),
    "an unknown class": (yolo, "labels/val/000002.txt", "1 0.5", "7 0.5", "line 1: there is no class 7"),
    "binary text": (yolo, "labels/val/000002.txt", "1 0.5", "\udcff", "file: .*UTF-8"),
    "an unclosed tag": (voc, "Annotations/000001.xml", "</object>", "", "line [67]: no valid XML"),
    "an inverted box": (voc, "Annotations/000001.xml", "<xmin>11<", "<xmin>111<", "line 4: .*inverted"),
    "a box outside": (
        voc,
        "Annotations/000001.xml",
        "<ymax>91<",
        "<ymax>991<",
        "line 4: .*outside .* clipped",
    ),
    "a wrong size": (
        voc,
        "Annotations/000001.xml",
        f"{WIDTH}<",
        "99<",
        "line 1: .*161x119 pixels, not 99x119",
    ),
    "no image": (voc, "Annotations/000001.xml", "000001.png", "gone.png", "line 1: no image file"),
    "a wrong frame": (mot, "gt/gt.txt", "2,1,0", "9,1,0", "line 3: there is no frame 9"),
    "half a line": (mot, "gt/gt.txt", "2,1,0,0,161,119,1,1,1", "2,1,0", "line 3: not the numbers"),
    "half a JSON": (crowdhuman, "annotation_val.odgt", '}], "', "", "line 1|no valid JSON"),
    "text for a box": (
        crowdhuman,
        "annotation_val.odgt",
        "[10, 20",
        '["10", 20',
        r"line 1, gtboxes\[0\]: .*finite",
    ),
}


LOSE_AN_IMAGE = ("an unclosed tag", "a wrong size", "no image", "half a JSON")


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_have_file_and_line(name: str, tmp_path: Path) -> None:
    """A damaged label is dropped and named by file and line; the rest of the data set is read."""
    write, file, old, new, expected = PROBLEMS[name]
    path = write(tmp_path / "set")
    damaged = path / file
    text = damaged.read_text()
    if name == "half a JSON":
        old, new = text.split("\n")[0], text.split("\n")[0][:-3]
    assert old in text
    damaged.write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogateescape"))
    dataset = load_dataset(path)
    (problem,) = dataset.problems
    assert problem.file == str(damaged)
    assert re.search(expected, f"{problem.where}: {problem.what}")
    assert len(dataset) >= 3
    with pytest.raises(DataError, match="1 images or boxes cannot be used"):
        dataset.refuse_problems()
    lost = "nothing" if name == "a box outside" else "image" if name in LOSE_AN_IMAGE else "box"
    contents = dataset.contents
    assert (contents.dropped_images, contents.dropped_boxes, contents.clipped_boxes) == tuple(
        int(lost == kind) for kind in ("image", "box", "nothing")
    )
    assert contents.images == len(BOXES) - contents.dropped_images
    whole = sum(map(len, BOXES.values()))
    assert contents.boxes == whole - contents.dropped_boxes or contents.dropped_images


def test_a_label_without_its_image_is_named(tmp_path: Path) -> None:
    """YOLO: text without an image is a problem; an image without text has no boxes."""
    path = yolo(tmp_path / "set")
    (path / "images" / "val" / "000004.png").unlink()
    (path / "labels" / "val" / "000001.txt").unlink()
    dataset = load_dataset(path)
    assert [len(sample.boxes) for sample in dataset.samples] == [0, 1, 0]
    (problem,) = dataset.problems
    assert problem.file.endswith("000004.txt") and "without its image" in problem.what


def test_a_file_name_that_is_no_text_is_listed(tmp_path: Path) -> None:
    """File systems allow names of any bytes: such an image is a problem that can be printed, not a crash."""
    path = yolo(tmp_path / "set")
    folder = os.fsencode(path / "images" / "val")
    os.rename(folder + b"/000001.png", folder + b"/\xff\xfe.png")  # noqa: PTH104
    dataset = load_dataset(path)
    assert [sample.file_name[-10:] for sample in dataset.samples] == [
        "000002.png",
        "000003.png",
        "000004.png",
    ]
    assert [problem.what for problem in dataset.problems] == [
        "a label without its image; dropped",
        "its name is no text in UTF-8; dropped",
    ]
    assert all(str(problem).encode() for problem in dataset.problems)


def test_entities_are_not_expanded(tmp_path: Path) -> None:
    """XML with a document type (a billion laughs, a file of the system) is refused at once, and named."""
    path = voc(tmp_path / "set")
    laughs = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    (tmp_path / "secret.txt").write_text("person")
    for number, definition in enumerate(
        (f'<!ENTITY a0 "ha">{laughs}', '<!ENTITY a9 SYSTEM "../secret.txt">'), 1
    ):
        (path / "Annotations" / f"00000{number}.xml").write_text(
            f"<!DOCTYPE annotation [{definition}]><annotation><filename>&a9;</filename></annotation>"
        )
    start = time.monotonic()
    dataset = load_dataset(path)
    assert time.monotonic() - start < 2
    assert [problem.what for problem in dataset.problems] == [
        "XML that is not read (DTDForbidden); dropped"
    ] * 2


@pytest.mark.parametrize(
    ("write", "file", "old", "new"),
    [
        (voc, "Annotations/000001.xml", "000001.png", "../../000001.png"),
        (voc, "Annotations/000001.xml", "000001.png", "/etc/passwd"),
        (yolo, "data.yaml", "images/val", "/etc"),
        (yolo, "data.yaml", "images/val", "../../etc"),
        (yolo, "data.yaml", "path: .", "path: images/../../x"),
        (crowdhuman, "annotation_val.odgt", '"000001"', '"../000001"'),
        (crowdhuman, "annotation_val.odgt", '"000001"', '"C:\\\\000001"'),
    ],
)
def test_paths_stay_in_the_folder(
    write: Callable[[Path], Path], file: str, old: str, new: str, tmp_path: Path
) -> None:
    """Absolute names and names that go up are refused before anything is opened."""
    path = write(tmp_path / "set")
    text = (path / file).read_text()
    assert old in text
    (path / file).write_text(text.replace(old, new))
    with pytest.raises(DataError, match="leaves the folder"):
        load_dataset(path)


def test_an_unknown_format_says_what_is_expected(tmp_path: Path) -> None:
    """Nothing there, images alone, two JSONs, a bare video: an error each that says how to go on."""
    with pytest.raises(DataError, match="no data set at"):
        load_dataset(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no labels of a known format: expected COCO JSON, .* Pascal VOC"):
        load_dataset(tmp_path)
    path = coco(tmp_path / "set")
    (path.parent / "more.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"2 label files: give the path of one: instances_val\.json, more\.json"
    ):
        load_dataset(path.parent)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="a video without labels"):
        load_dataset(tmp_path / "a.mp4")


def test_images_without_labels(tmp_path: Path) -> None:
    """A folder of images, or every second frame of a video, is a data set without boxes."""
    assert len(load_images(voc(tmp_path / "stills") / "JPEGImages")) == 4
    video = mot_video(tmp_path / "video") / "clip.avi"
    dataset = load_images(video, every=2)
    assert [sample.file_name for sample in dataset.samples] == ["clip.avi#000000", "clip.avi#000002"]
    with pytest.raises(DataError, match="no folder of images and no video"):
        load_images(tmp_path / "gone.txt")


@pytest.mark.shared_data
def test_pets_labels(shared: Path) -> None:
    """The PETS video's MOT15 labels: as many boxes and ignored ones in each frame as the text has lines."""
    dataset = load_dataset(shared / "pets-vtest")
    columns = np.loadtxt(shared / "pets-vtest" / "gt.txt", delimiter=",")
    assert len(dataset) == columns[:, 0].max() and dataset.problems == ()
    for number in (1, 123, 700):
        rows = columns[columns[:, 0] == number]
        sample = dataset.samples[number - 1]
        assert sample.file_name == f"vtest.avi#{number - 1:06d}"
        assert sample.ignore.tolist() == (rows[:, 6] == 0).tolist()
    assert cv2.VideoCapture(str(dataset.videos["vtest.avi"])).isOpened()
