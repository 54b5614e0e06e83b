"""COCO JSON: lists of `images`, `annotations` with `bbox`, and `categories`.

A frame of a video is an image too: its `file_name` is ``"vtest.avi#000123"``, counted from 0. For frames that
are stored as images, `video_id` and `frame_id` say which belong together.
"""

import json
from pathlib import Path

from edgeprune.data.errors import DataError
from edgeprune.data.labels import Entry, Labels

LISTS = ("images", "annotations", "categories")


def read(path: Path, images: Path | None) -> Labels:
    """Read a JSON file.

    Args:
        images: folder of the images. Default: a folder beside the JSON named like its end
            (`person_val2017.json`: `val2017/`), or else the JSON's own folder.

    Raises:
        DataError: If it is no COCO JSON.
    """
    labels = Labels("COCO JSON", path, images or default_root(path), sized=True)
    try:
        content = json.loads(labels.read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    for key in LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"{path} is not COCO JSON: it has no list {key!r}; expected an object with the lists images, "
                "annotations and categories"
            )
    labels.images, labels.boxes, labels.categories = (
        [Entry(entry, str(path), f"{key}[{position}]") for position, entry in enumerate(content[key])]
        for key in LISTS
    )
    return labels


def default_root(path: Path) -> Path:
    """Folder in which the images of a JSON are looked for."""
    # instances_val2017.json: val2017 beside it; of several folders that fit, the most specific
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError as error:
        raise DataError(f"cannot list {path.parent}: {error.strerror}") from error
    fitting = [name for name in beside if f"_{path.stem}".endswith(f"_{name}")]
    return path.parent / max(fitting, key=len) if fitting else path.parent
