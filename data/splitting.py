"""Splitting a data set into a part to train on and a part to score on, without leaking."""

import numpy as np

from edgeprune.data.dataset import Dataset


def split(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a share of the images.

    Neighbouring frames are almost one image: of several videos, whole ones are drawn; one alone is cut in
    time, its end split off. Stills are drawn one by one. With videos and stills, the stills count as one more
    video.

    Args:
        share: of the images that goes to the second part, between 0 and 1; with several videos as near as
            whole ones allow.

    Raises:
        DataError: If there are too few images to fill both parts.
    """
    of_video: dict[str | None, list[int]] = {}
    for index, sample in enumerate(dataset.samples):
        of_video.setdefault(sample.frame.video if sample.frame else None, []).append(index)
    if len(of_video) < 2:
        return dataset.hold_out(share, seed)
    videos = list(of_video.values())
    wanted, second = share * len(dataset), set[int]()
    for position in np.random.default_rng(seed).permutation(len(videos))[:-1]:
        frames = videos[position]
        if abs(len(second) + len(frames) - wanted) < abs(len(second) - wanted) or not second:
            second.update(frames)
    first = [index for index in range(len(dataset)) if index not in second]
    return dataset.subset(first), dataset.subset(sorted(second))
