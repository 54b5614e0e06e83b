"""YOLO folders: `data.yaml` names the classes and the parts, and each image has a text file.

    FOLDER/data.yaml  FOLDER/images/val/a.jpg  FOLDER/labels/val/a.txt

A line of text is ``class x y width height``: the box's centre and size, as shares of the image's. An image
without a text file has no boxes.
"""

from pathlib import Path
from typing import Any

import yaml

from edgeprune.data.errors import DataError
from edgeprune.data.labels import (
    IMAGE_SUFFIXES,
    Labels,
    check_inside,
    children,
    is_file,
    is_folder,
    to_number,
)

PARTS = ("train", "val", "test")
YAML_SUFFIXES = (".yaml", ".yml")
LEVELS = 3  # that data.yaml may stand above the images


def yaml_of(path: Path) -> Path | None:
    """The YAML file that describes a path: itself, in the folder, or above images or a list; None if none."""
    if path.suffix in YAML_SUFFIXES:
        return path
    if path.is_dir() and (files := children(path, YAML_SUFFIXES)):
        return next((file for file in files if file.stem == "data"), files[0])
    if "images" in path.parts or path.suffix == ".txt":
        for folder in path.parents[:LEVELS]:
            for name in ("data.yaml", "data.yml", "dataset.yaml"):
                if (folder / name).is_file():
                    return folder / name
    return None


def parts_of(path: Path) -> dict[str, list[Path]]:
    """Folders or lists of images of each part that a YAML file names.

    Raises:
        DataError: If it is no such file, or a part leaves its folder.
    """
    content = _load(Labels("YOLO", path, path.parent), path)
    base = path.parent / _inside(content.get("path") or "", path)
    parts = {}
    for part in PARTS:
        value = content.get(part)
        if value:
            names = value if isinstance(value, list) else [value]
            parts[part] = [base / _inside(name, path) for name in names]
    return parts


def read(path: Path, images: Path | None) -> Labels:
    """Read one part.

    Args:
        path: the YAML file or its folder, where that names one part; else the folder or list of images.
        images: not to be given: text files are found from the images' names.

    Raises:
        DataError: If there is no YAML file with the classes, it names several parts, or a path leaves the
            folder.
    """
    if images is not None:
        raise DataError(f"{path}: YOLO labels lie beside their images; a folder of images cannot be chosen")
    file = yaml_of(path)
    if file is None:
        raise DataError(f"{path} has no data.yaml, in it or above it, that names the classes of its labels")
    labels = Labels("YOLO", path, file.parent, centred_shares=True)
    names = _names(_load(labels, file), file)
    for name in names:
        labels.add_class(name)
    parts = parts_of(file)
    if path in (file, file.parent):
        if len(parts) > 1:
            choices = ", ".join(str(source) for sources in parts.values() for source in sources)
            raise DataError(f"{file} has the parts {', '.join(parts)}: give the path of one: {choices}")
        sources = next(iter(parts.values()), [file.parent])
    else:
        sources = [path]
    for source in sources:
        for image in _images(labels, source):
            _add(labels, image, names)
        _find_orphans(labels, source)
    return labels


def _load(labels: Labels, file: Path) -> dict[str, Any]:
    try:
        # The base loader makes texts, lists and mappings, nothing else: a class may be called "no"
        content = yaml.load(labels.read(file), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict):
        raise DataError(f"{file} is no data.yaml of YOLO: it has no list 'names' of classes")
    return content


def _names(content: dict[str, Any], file: Path) -> list[str]:
    names = content["names"]
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise DataError(f"{file}: names must name each class once, by numbers from 0 on")
    return list(names)


def _inside(name: Any, file: Path) -> str:
    if not isinstance(name, str):
        raise DataError(f"{file}: path, train, val and test must be names of folders or lists")
    name = name.removeprefix("./")
    if name.startswith("../") and ".." not in Path(name[3:]).parts:
        name = name[3:]  # exporters write ../train/images for a folder beside the YAML file
    return check_inside(name, file, "path")


def _images(labels: Labels, source: Path) -> list[tuple[Path, Path, str]]:
    """The images of a folder or list, each with the file and place that names it."""
    if is_folder(source):
        return [(image, image, "image") for image in children(source, IMAGE_SUFFIXES, deep=True)]
    found = []
    for number, line in labels.read_lines(source):
        name = check_inside(line.removeprefix("./"), source, f"line {number}:")
        found.append((source.parent / name, source, f"line {number}"))
    return found


def _text_of(image: Path, root: Path) -> Path:
    parts = list(image.relative_to(root).parts)
    for position in reversed(range(len(parts) - 1)):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return root.joinpath(*parts).with_suffix(".txt")


def _add(labels: Labels, found: tuple[Path, Path, str], names: list[str]) -> None:
    image, file, where = found
    image_id = labels.add_image(image.relative_to(labels.root).as_posix(), file, where)
    text = _text_of(image, labels.root)
    if not is_file(text):
        return
    try:
        lines = labels.read_lines(text)
    except DataError as error:
        labels.problem(text, "file", f"{error}; its image has no boxes")
        return
    for number, line in lines:
        where = f"line {number}"
        columns = [to_number(column) for column in line.split()]
        if len(columns) != 5 or None in columns:
            labels.problem(text, where, "not the five numbers class, x, y, width, height; dropped")
            continue
        category, *shares = (column for column in columns if column is not None)
        if category not in range(len(names)):
            labels.problem(text, where, f"there is no class {line.split()[0]}; dropped")
            continue
        labels.add_box(image_id, int(category), shares, text, where)


def _find_orphans(labels: Labels, source: Path) -> None:
    """List text files without an image."""
    if not is_folder(source):
        return
    known = {entry.content["file_name"] for entry in labels.images}
    stems = {str(_text_of(labels.root / name, labels.root)) for name in known}
    folder = _text_of(source / "any.jpg", labels.root).parent
    if folder.is_dir():
        for text in children(folder, (".txt",), deep=True):
            if str(text) not in stems and text.stem not in ("classes", *PARTS):
                labels.problem(text, "file", "a label without its image; dropped", lost="image")
