"""Images that must be kept apart: what trains without labels, what selects, what reports."""

import re
from collections.abc import Mapping
from pathlib import Path

from edgeprune.cli.run_folder import RunError
from edgeprune.data.dataset import Dataset, load_images
from edgeprune.data.files import sha256_of

EVERY = 5  # frames of a video are nearly the same


def unlabelled_images(source: Path) -> Dataset:
    """Images of a folder, of a video, or of its frames FIRST to LAST (``video.avi#FIRST-LAST``).

    Raises:
        RunError: If the video has no frame in the range.
        DataError: If there are no images, or the video does not open.
    """
    found = re.fullmatch(r"(.+)#(\d+)-(\d+)", source.name)
    path = source.with_name(found[1]) if found else source
    images = load_images(path, every=EVERY if path.is_file() else 1)
    if found:
        first, last = int(found[2]), int(found[3])
        numbers = [sample.frame.number if sample.frame else -1 for sample in images.samples]
        images = images.subset(index for index, number in enumerate(numbers) if first <= number <= last)
        if not len(images):
            raise RunError(f"--unlabelled {source}: the video has no frame from {first} to {last}")
    return images


def refuse_shared(name: str, images: Dataset, others: Mapping[str, Dataset]) -> None:
    """Keep images that train or select apart from those that select or report.

    Raises:
        RunError: If the images share one, by its content, or a time range of a video, with another data set.
    """
    for other, dataset in others.items():
        if shared := _shared(images, dataset):
            raise RunError(
                f"{name} shares {shared} with {other}: an AP on images that were trained on or chosen by says little"
            )


def _shared(images: Dataset, others: Dataset) -> str | None:
    """What the two have in common; frames of one video count as shared where their time ranges overlap."""
    ours, theirs = _frames(images), _frames(others)
    for video, numbers in ours.items():
        other = theirs.get(video, [])
        if other and min(numbers) <= max(other) and min(other) <= max(numbers):
            return f"frames {max(min(numbers), min(other))} to {min(max(numbers), max(other))} of a video"
    known = {
        sha256_of(others.image_path(i)) for i, sample in enumerate(others.samples) if sample.frame is None
    }
    for index, sample in enumerate(images.samples):
        if sample.frame is None and known and sha256_of(images.image_path(index)) in known:
            return f"the image {sample.file_name}"
    return None


def _frames(dataset: Dataset) -> dict[str, list[int]]:
    """Frame numbers by the video's sha256."""
    frames: dict[str, list[int]] = {}
    hashes = {name: sha256_of(path) for name, path in dataset.videos.items()}
    for sample in dataset.samples:
        if sample.frame is not None:
            frames.setdefault(hashes[sample.frame.video], []).append(sample.frame.number)
    return frames
