"""Pascal VOC: one XML file an image.

    FOLDER/Annotations/*.xml  FOLDER/JPEGImages/*.jpg  FOLDER/ImageSets/Main/val.txt

Coordinates count pixels from 1, the last one included (VOC devkit, section "Annotation"): a box from pixel
xmin to pixel xmax covers ``[xmin - 1, xmax]``. `difficult` objects are ignored.
"""

import io
import xml.sax.xmlreader
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax import SAXException
from xml.sax.handler import ContentHandler

from defusedxml import sax

from edgeprune.data.errors import DataError
from edgeprune.data.labels import Labels, check_inside, children, named_image, to_number

IMAGE_FOLDERS = ("JPEGImages", "images")


def annotations_of(path: Path) -> Path | None:
    """The folder of XML files for a folder or a list in ImageSets; None if there is none."""
    if path.is_dir():
        for folder in (path / "Annotations", path / "annotations", path):
            if folder.is_dir() and children(folder, (".xml",)):
                return folder
    elif path.suffix == ".txt" and path.parent.parent.name == "ImageSets":
        return path.parent.parent.parent / "Annotations"
    return None


def read(path: Path, images: Path | None) -> Labels:
    """Read a folder.

    Args:
        path: the folder, or a list in its ImageSets/Main to read the images that this names.
        images: folder of the images. Default: JPEGImages or images beside the XML files' folder, or theirs.

    Raises:
        DataError: If there are no XML files, or the list names none or leaves the folder.
    """
    folder = annotations_of(path)
    if folder is None or not folder.is_dir():
        raise DataError(f"{path} has no XML files of Pascal VOC; expected them in a folder Annotations")
    beside = [folder.parent / name for name in IMAGE_FOLDERS]
    labels = Labels("Pascal VOC", path, images or next(filter(Path.is_dir, beside), folder), sized=True)
    if path.is_dir():
        files = children(folder, (".xml",))
    else:
        stems = [(number, line.split()[0]) for number, line in labels.read_lines(path)]
        files = [folder / f"{check_inside(stem, path, f'line {number}:')}.xml" for number, stem in stems]
    for file in files:
        _read_file(labels, file)
    return labels


@dataclass
class _Element:
    name: str
    line: int
    text: str = ""
    children: "list[_Element]" = field(default_factory=list)

    def get(self, *path: str) -> str | None:
        """Text of a descendant; None if it is not there."""
        element = self
        for name in path:
            for child in element.children:
                if child.name == name:
                    element = child
                    break
            else:
                return None
        return element.text.strip()

    def all(self, name: str) -> "Iterator[_Element]":
        return (child for child in self.children if child.name == name)


def _read_file(labels: Labels, file: Path) -> None:
    try:
        root = _parse(labels.read(file))
    except DataError as error:
        labels.problem(file, "file", f"{error}; dropped", lost="image")
        return
    except _XmlError as error:
        labels.problem(file, f"line {error.line}", f"{error}; dropped", lost="image")
        return
    name = root.get("filename") or named_image(labels.root, file.stem)
    width, height = (to_number(root.get("size", side) or "") for side in ("width", "height"))
    image_id = labels.add_image(name, file, f"line {root.line}", width=width, height=height)
    for thing in root.all("object"):
        where = f"line {thing.line}"
        class_name = thing.get("name")
        if not class_name:
            labels.problem(file, where, "an object without a name; dropped")
            continue
        corners = [to_number(thing.get("bndbox", side) or "") for side in ("xmin", "ymin", "xmax", "ymax")]
        bbox = None
        if None not in corners:
            xmin, ymin, xmax, ymax = (corner for corner in corners if corner is not None)
            bbox = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
        difficult = thing.get("difficult") or "0"
        ignore = int(difficult) if difficult in ("0", "1") else difficult
        labels.add_box(image_id, labels.add_class(class_name), bbox, file, where, ignore)


class _XmlError(Exception):
    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.line = line


class _Builder(ContentHandler):
    """Builds elements that know their line, which ElementTree's do not."""

    def __init__(self) -> None:
        super().__init__()
        self.root = _Element("", 0)
        self.open = [self.root]
        self.locator: xml.sax.xmlreader.Locator | None = None

    def setDocumentLocator(self, locator: xml.sax.xmlreader.Locator) -> None:
        self.locator = locator

    @property
    def line(self) -> int:
        return (self.locator.getLineNumber() if self.locator else None) or 1

    def startElement(self, name: str, attrs: object) -> None:
        element = _Element(name, self.line)
        self.open[-1].children.append(element)
        self.open.append(element)

    def characters(self, content: str) -> None:
        self.open[-1].text += content

    def endElement(self, name: str) -> None:
        self.open.pop()


def _parse(content: bytes) -> _Element:
    builder = _Builder()
    try:
        sax.parse(io.BytesIO(content), builder, forbid_dtd=True)
    except SAXException as error:
        raise _XmlError(f"no valid XML ({error.getMessage()})", builder.line) from error
    except (ValueError, LookupError) as error:  # defusedxml's refusals are ValueErrors; unknown encodings
        raise _XmlError(f"XML that is not read ({type(error).__name__})", builder.line) from error
    (root,) = builder.root.children
    if root.name != "annotation":
        raise _XmlError(f"no annotation of Pascal VOC but <{root.name}>", root.line)
    return root
