"""Tracking: ids stay on who they were given to, on paths whose truth the test knows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.deploy.device.camera.tracking import FORGOTTEN_AFTER, Smoothed, Tracker, iou
from edgeprune.deploy.device.imaging import nms

WIDTH, HEIGHT = 40.0, 100.0


def person(x: float, y: float) -> np.ndarray:
    return np.array([x, y, x + WIDTH, y + HEIGHT], np.float32)


def walk(paths: list[tuple[float, float, float, float]], count: int, jitter: float = 0.0) -> list[np.ndarray]:
    """Boxes ``(people, 4)`` of each frame; a path is x, y, and pixels a frame along each."""
    random = np.random.default_rng(0)
    return [
        np.array(
            [
                person(x + dx * number, y + dy * number) + random.normal(0, jitter, 4)
                for x, y, dx, dy in paths
            ],
            np.float32,
        )
        for number in range(count)
    ]


def test_ids_stay_on_people_who_walk_and_start_at_one() -> None:
    """Three people with noisy boxes, in another order in every frame: one id each."""
    tracker, random = Tracker(), np.random.default_rng(1)
    for number, boxes in enumerate(walk([(0, 0, 5, 0), (300, 0, -3, 2), (100, 200, 0, -4)], 60, jitter=2.0)):
        order = random.permutation(3) if number else np.arange(3)
        ids = tracker.update(boxes[order], number)
        assert [ids[place] for place in np.argsort(order)] == [1, 2, 3]


@pytest.mark.parametrize("lane", [0.0, 15.0, 40.0])
@pytest.mark.parametrize("speed", [3.0, 6.0, 10.0])
def test_ids_do_not_swap_when_people_cross(lane: float, speed: float) -> None:
    """Two who cross keep their ids, also while NMS leaves only one of their boxes."""
    tracker = Tracker()
    merged = 0
    for number, boxes in enumerate(walk([(0, 0, speed, 0), (400, lane, -speed, 0)], int(400 / speed), 1.0)):
        kept = nms(boxes, np.array([0.9, 0.8], np.float32), 0.6)
        ids = tracker.update(boxes[kept], number)
        merged += len(kept) == 1
        if len(kept) == 2:
            assert ids == [1, 2], f"frame {number}"
    assert merged or lane > 20


def test_a_person_behind_a_pillar_keeps_the_id() -> None:
    """Ten frames without a box do not end a track; more than the limit do."""
    tracker = Tracker()
    frames = walk([(0, 0, 6, 0)], 200)
    assert [tracker.update(frames[number], number) for number in range(20)] == [[1]] * 20
    assert tracker.update(np.zeros((0, 4), np.float32), 25) == []
    assert tracker.update(frames[30], 30) == [1]
    assert tracker.update(frames[31 + FORGOTTEN_AFTER], 31 + FORGOTTEN_AFTER) == [2]


def test_dropped_frames_do_not_lose_a_quick_person() -> None:
    """With every fourth frame alone, a person moves by more than a width between two, and is followed."""
    tracker = Tracker()
    frames = walk([(0, 0, 12, 0)], 80)
    numbers = [*range(20), *range(20, 80, 4)]
    assert {tracker.update(frames[number], number)[0] for number in numbers} == {1}


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 12))
def test_every_box_has_one_id_of_its_own(seed: int, first: int, second: int) -> None:
    """However boxes lie, no two of a frame share an id, and ids are never given back."""
    random, tracker = np.random.default_rng(seed), Tracker()
    greatest = 0
    for number, count in enumerate((first, second, first)):
        corners = random.integers(0, 100, (count, 2))
        boxes = np.concatenate([corners, corners + random.integers(0, 60, (count, 2))], axis=1)
        ids = tracker.update(boxes.astype(np.float32), number)
        assert len(set(ids)) == len(ids) == count
        new = [identity for identity in ids if identity > greatest]
        assert sorted(new) == list(range(greatest + 1, greatest + 1 + len(new)))
        greatest += len(new)


def test_iou_is_that_of_counted_pixels() -> None:
    """On whole coordinates, intersection and union are numbers of pixels."""
    random = np.random.default_rng(0)
    corners = random.integers(0, 20, (12, 2))
    boxes = np.concatenate([corners, corners + random.integers(0, 15, (12, 2))], axis=1).astype(float)

    def pixels(box: np.ndarray) -> set[tuple[int, int]]:
        x1, y1, x2, y2 = box.astype(int)
        return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}

    found = iou(boxes[:5], boxes[5:])
    for row, column in np.ndindex(5, 7):
        one, other = pixels(boxes[row]), pixels(boxes[5 + column])
        assert found[row, column] == pytest.approx(len(one & other) / max(len(one | other), 1))


def test_a_flicker_does_not_change_the_number_of_people() -> None:
    """One frame that misses a person, or sees one twice, is outvoted; someone who leaves is not."""
    smoothed = Smoothed()
    counts = [2] * 10 + [1, 2, 3, 2, 2, 0, 2] + [1] * 8
    told = [smoothed.update(count) for count in counts]
    assert told[:17] == [2] * 17
    assert told[-1] == 1
