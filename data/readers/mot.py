"""MOTChallenge: one text file a video, ``frame, id, left, top, width, height, flag, class, visibility``.

    SEQUENCE/gt/gt.txt  SEQUENCE/img1/000001.jpg  SEQUENCE/seqinfo.ini
    SEQUENCE/gt.txt     SEQUENCE/video.avi

Frames count from 1. Boxes are of whole people, also where they are hidden. Flag 0 means ignored. MOT16 and
later have nine columns (Milan et al. 2016, arXiv:1603.00831, table 2 has the classes; those that the
benchmark neither rewards nor punishes are ignored pedestrians here); MOT15 has ten, without a class.
"""

import configparser
from pathlib import Path
from typing import NamedTuple

from edgeprune.data.errors import DataError
from edgeprune.data.labels import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Labels,
    check_inside,
    children,
    is_folder,
    subfolders,
    to_number,
)
from edgeprune.data.video import frame_size

COLUMNS_WITH_CLASS = 9
CLASSES: dict[float, str] = {
    3: "car",
    4: "bicycle",
    5: "motorbike",
    6: "non motorized vehicle",
    9: "occluder",
    10: "occluder on the ground",
    11: "occluder full",
}
IGNORED_PEDESTRIANS = {2, 7, 8, 12, 13}  # person on vehicle, static, distractor, reflection, crowd
PEDESTRIAN = 1


class Sequence(NamedTuple):
    """A label file and the folder of its video."""

    gt: Path
    folder: Path


def sequences_of(path: Path) -> list[Sequence]:
    """The sequences of a gt.txt, of a sequence's folder, or of a folder of sequences."""
    if path.name == "gt.txt":
        return [Sequence(path, path.parent.parent if path.parent.name == "gt" else path.parent)]
    if not path.is_dir():
        return []
    for gt in (path / "gt" / "gt.txt", path / "gt.txt"):
        if gt.is_file():
            return [Sequence(gt, path)]
    return [Sequence(gt, folder) for folder in subfolders(path) if (gt := folder / "gt" / "gt.txt").is_file()]


def read(path: Path, images: Path | None) -> Labels:
    """Read one sequence, or all of a folder.

    Args:
        images: folder of the frames or of the video. Default: the one that seqinfo.ini names, img1, or the
            sequence's own folder, with a video.

    Raises:
        DataError: If a text file cannot be read, or its frames or video are missing.
    """
    sequences = sequences_of(path)
    if images is not None and len(sequences) > 1:
        raise DataError(
            f"{path} has {len(sequences)} sequences: one folder of images cannot be chosen for all"
        )
    root = images or (sequences[0].folder if len(sequences) == 1 else path)
    labels = Labels("MOT", path, root, amodal=True)
    labels.add_class("pedestrian")
    for number, sequence in enumerate(sequences, 1):
        rows = _rows(labels, sequence.gt)
        image_ids = _add_frames(labels, sequence, images, number, rows)
        for row in rows:
            _add_box(labels, sequence.gt, row, image_ids)
    return labels


class _Row(NamedTuple):
    line: int
    frame: int
    bbox: list[float]
    flag: float
    kind: float


def _rows(labels: Labels, gt: Path) -> list[_Row]:
    rows = []
    for number, line in labels.read_lines(gt):
        columns = [to_number(column) for column in line.split(",")]
        numbers = [column for column in columns if column is not None]
        if len(columns) < 7 or len(numbers) < len(columns) or not 1 <= numbers[0] < 10**9:
            what = "not the numbers frame (from 1), id, left, top, width, height, flag, ...; dropped"
            labels.problem(gt, f"line {number}", what)
            continue
        kind = numbers[7] if len(columns) == COLUMNS_WITH_CLASS else PEDESTRIAN
        rows.append(_Row(number, int(numbers[0]), numbers[2:6], numbers[6], kind))
    return rows


def _add_frames(
    labels: Labels, sequence: Sequence, images: Path | None, video_id: int, rows: list[_Row]
) -> dict[int, int]:
    """Add the frames of a sequence; returns their image ids by frame number."""
    folder = images or _frame_folder(sequence)
    frames = {int(file.stem): file for file in children(folder, IMAGE_SUFFIXES) if file.stem.isdecimal()}
    found: dict[int, int] = {}
    if frames:
        for frame, file in sorted(frames.items()):
            name = file.relative_to(labels.root).as_posix()
            where = f"frame {frame}"
            found[frame] = labels.add_image(name, sequence.gt, where, video_id=video_id, frame_id=frame)
        return found
    videos = children(folder, VIDEO_SUFFIXES)
    if len(videos) != 1:
        what = "no numbered images and no video" if not videos else f"{len(videos)} videos"
        raise DataError(f"{folder} has {what} for the frames of {sequence.gt}")
    width, height = frame_size(videos[0])
    name = videos[0].relative_to(labels.root).as_posix()
    for frame in range(1, max((row.frame for row in rows), default=0) + 1):
        size = {"width": width, "height": height}
        found[frame] = labels.add_image(f"{name}#{frame - 1:06d}", sequence.gt, f"frame {frame}", **size)
    return found


def _frame_folder(sequence: Sequence) -> Path:
    ini = sequence.folder / "seqinfo.ini"
    name = "img1"
    if ini.is_file():
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(ini.read_text("utf-8"))
            name = parser.get("Sequence", "imDir", fallback=name)
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            raise DataError(f"{ini} cannot be read: {error}") from error
    folder = sequence.folder / check_inside(name, ini, "imDir")
    return folder if is_folder(folder) else sequence.folder


def _add_box(labels: Labels, gt: Path, row: _Row, image_ids: dict[int, int]) -> None:
    where = f"line {row.line}"
    if row.frame not in image_ids:
        labels.problem(gt, where, f"there is no frame {row.frame}; dropped")
        return
    if row.kind == PEDESTRIAN or row.kind in IGNORED_PEDESTRIANS:
        category, ignore = labels.add_class("pedestrian"), row.kind != PEDESTRIAN or row.flag == 0
    else:
        name = CLASSES.get(row.kind, f"class {row.kind:g}")
        category, ignore = labels.add_class(name), row.flag == 0
    labels.add_box(image_ids[row.frame], category, row.bbox, gt, where, int(ignore))
