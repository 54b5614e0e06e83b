"""One reader for each format of labels; which one a path needs is seen from the files that are there."""

from pathlib import Path

from edgeprune.data.errors import DataError
from edgeprune.data.labels import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Labels, children
from edgeprune.data.readers import coco, crowdhuman, mot, voc, yolo
from edgeprune.data.video import count_frames, frame_size

EXPECTED = (
    "expected COCO JSON, a folder with Annotations of Pascal VOC, a YOLO folder with data.yaml, "
    "CrowdHuman's .odgt, or a MOT folder with gt/gt.txt"
)


def read_labels(path: Path, images: Path | None) -> Labels:
    """Read the labels at a path, whatever their format.

    Args:
        images: folder of the images, where the reader's default does not fit.

    Raises:
        DataError: If nothing is there, the format is not known, or the reader refuses.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"no folder of images at {images}")
    file = _file_of(path)
    suffix = file.suffix.lower()
    if suffix == ".json":
        return coco.read(file, images)
    if suffix == ".odgt":
        return crowdhuman.read(file, images)
    if suffix in VIDEO_SUFFIXES:
        raise DataError(
            f"{path} is a video without labels: give COCO JSON whose file_name is "
            f'"{path.name}#000123" for frame 123, counted from 0, or a MOT folder with gt.txt; '
            "`edgeprune data autolabel` labels it, to be corrected"
        )
    if mot.sequences_of(file):
        return mot.read(file, images)
    if voc.annotations_of(file) is not None:
        return voc.read(file, images)
    if yolo.yaml_of(file) is not None:
        return yolo.read(file, images)
    raise DataError(
        f"{path} has no labels of a known format: {EXPECTED}. `edgeprune data autolabel` labels images, to be corrected"
    )


def read_images(path: Path, every: int) -> Labels:
    """The images of a folder and its folders, or every so many frames of a video, without labels.

    Raises:
        DataError: If the path is neither, or the video does not open.
    """
    if path.suffix.lower() in VIDEO_SUFFIXES:
        labels = Labels("video", path, path.parent)
        width, height = frame_size(path)
        for frame in range(0, count_frames(path), every):
            name = f"{path.name}#{frame:06d}"
            labels.add_image(name, path, f"frame {frame}", width=width, height=height)
    elif path.is_dir():
        labels = Labels("images", path, path)
        for file in children(path, IMAGE_SUFFIXES, deep=True):
            labels.add_image(file.relative_to(path).as_posix(), file, "file")
    else:
        raise DataError(f"{path} is no folder of images and no video ({', '.join(VIDEO_SUFFIXES)})")
    labels.add_class("person")
    return labels


def parts(path: Path) -> list[Path]:
    """The paths that `read_labels` takes one at a time: those of each part of a YOLO file, else the path.

    Raises:
        DataError: If a YOLO file is damaged.
    """
    file = yolo.yaml_of(path)
    if file is None or path not in (file, file.parent):
        return [path]
    return [source for sources in yolo.parts_of(file).values() for source in sources] or [path]


def _file_of(path: Path) -> Path:
    """The label file in a folder that has just one, where the format is such; else the path itself."""
    if not path.exists():
        raise DataError(f"no data set at {path}")
    if not path.is_dir() or mot.sequences_of(path) or voc.annotations_of(path) or yolo.yaml_of(path):
        return path
    files = children(path, (".json", ".odgt"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path} has {len(files)} label files: give the path of one: {names}")
    return files[0] if files else path
