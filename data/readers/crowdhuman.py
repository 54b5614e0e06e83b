"""CrowdHuman's odgt: one JSON object a line, ``{"ID": ..., "gtboxes": [{"tag", "fbox", "extra"}, ...]}``.

    FOLDER/annotation_val.odgt  FOLDER/Images/ID.jpg

Boxes are `fbox`, the whole body, also where it is hidden or outside the image; the benchmark scores these
(Shao et al. 2018, arXiv:1805.00123). Boxes with another tag than `person`, or marked `ignore`, are ignored.
"""

import json
from pathlib import Path
from typing import Any

from edgeprune.data.errors import DataError
from edgeprune.data.labels import Labels, check_inside, named_image

IMAGE_FOLDERS = ("Images", "images")


def read(path: Path, images: Path | None) -> Labels:
    """Read an odgt file.

    Args:
        images: folder of the images. Default: Images beside the file, or else the file's own folder.

    Raises:
        DataError: If it cannot be read or an ID leaves the folder.
    """
    beside = [path.parent / name for name in IMAGE_FOLDERS]
    root = images or next(filter(Path.is_dir, beside), path.parent)
    labels = Labels("CrowdHuman", path, root, amodal=True)
    person = labels.add_class("person")
    for number, line in labels.read_lines(path):
        where = f"line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            labels.problem(path, where, f"no valid JSON ({error}); dropped", lost="image")
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("ID"), str):
            labels.problem(path, where, "no object with an ID; dropped", lost="image")
            continue
        name = named_image(root, check_inside(entry["ID"], path, f"{where}: ID"))
        image_id = labels.add_image(name, path, where)
        boxes = entry.get("gtboxes")
        if not isinstance(boxes, list):
            labels.problem(path, where, "gtboxes is no list; its image has no boxes")
            continue
        for position, box in enumerate(boxes):
            place = f"{where}, gtboxes[{position}]"
            if not isinstance(box, dict):
                labels.problem(path, place, "no box; dropped")
                continue
            labels.add_box(image_id, person, box.get("fbox"), path, place, _ignore(box))
    if not labels.images and labels.problems:
        raise DataError(f"{path} is no odgt file of CrowdHuman; first problem: {labels.problems[0]}")
    return labels


def _ignore(box: dict[str, Any]) -> Any:
    extra = box.get("extra")
    if box.get("tag") != "person":
        return 1
    return extra.get("ignore", 0) if isinstance(extra, dict) else 0
