"""Damaged data sets: an error of ours or a clean skip, and nothing outside the folder is opened."""

import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from formats import FORMATS

from edgeprune.data import image_files
from edgeprune.data.dataset import load_dataset
from edgeprune.data.errors import EdgePruneError

CASES = 100  # of each of the five formats

WORDS = [
    b"..", b"../../../etc/passwd", b"/etc/passwd", b"C:\\x", b"\0", b"\xff\xfe", b"nan", b"-inf", b"1e400",
    b"9" * 5000, b"-1", b"0", b"null", b"[]", b"{}", b"<", b"&a;", b"#000001", b"\n", b",,,,", b"person",
    b"!!python/object/apply:os.system [id]", b"&a [*a]", b"true", b'"', b"\xf0\x9f\x9a\xb6", b"x" * 300,
]  # fmt: skip


def damage(content: bytes, rng: random.Random) -> bytes:
    """Truncate, swap bytes, insert something wrong or huge, repeat or replace a piece."""
    for _ in range(rng.randint(1, 3)):
        at, to = sorted((rng.randint(0, len(content)), rng.randint(0, len(content))))
        to = min(to, at + 20)
        kind = rng.randint(0, 5)
        if kind == 0:
            content = content[:at]
        elif kind == 1 and to > at:
            piece = bytearray(content[at:to])
            rng.shuffle(piece)
            content = content[:at] + bytes(piece) + content[to:]
        elif kind == 2:
            content = content[:at] + rng.choice(WORDS) + content[at:]
        elif kind == 3:
            content = content[:at] + rng.choice(WORDS) + content[to:]
        elif kind == 4:
            content = content[:at] + content[at:to] * rng.randint(2, 50) + content[to:]
        else:
            content = content[:at] + rng.randbytes(to - at) + content[to:]
    return content


class Watch:
    """Which files Python opens; the hook cannot be taken away, only told to rest."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.opened is not None and event in ("open", "os.listdir", "os.scandir"):
            self.opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_data_sets(name: str, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets with a damaged label or image each: they load without it, or raise EdgePruneError."""
    rng = random.Random(name)
    path = FORMATS[name](tmp_path / "whole")
    inner = path.relative_to(tmp_path / "whole")
    files = sorted(
        file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*.*") if file.is_file()
    )
    labels = [file for file in files if file.suffix != ".png"]
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    decoded: list[str] = []
    original = image_files.load_image
    monkeypatch.setattr(image_files, "load_image", lambda file: decoded.append(file) or original(file))
    outcomes = {"loaded": 0, "skipped": 0, "refused": 0}
    for case in range(CASES):
        folder = tmp_path / f"case-{case}"
        shutil.copytree(tmp_path / "whole", folder)
        victim = folder / rng.choice(labels if rng.random() < 0.7 else files)
        victim.write_bytes(damage(victim.read_bytes(), rng))
        before = sorted(tmp_path.rglob("*"))
        watch.opened = []
        decoded.clear()
        try:
            dataset = load_dataset(folder / inner).decodable()
            outcomes["skipped" if dataset.problems else "loaded"] += 1
            assert all((folder / dataset.root / sample.file_name).is_file() for sample in dataset.samples)
        except EdgePruneError:
            outcomes["refused"] += 1
        finally:
            opened, watch.opened = watch.opened, None
        allowed = (folder, cache, Path(os.__file__).parent)  # Python loads its codecs from there
        outside = [file for file in [*opened, *decoded] if not any(map(Path(file).is_relative_to, allowed))]
        assert outside == [], f"case {case}: {victim}"
        assert [file for file in before if not file.exists()] == []
        written = {file for file in tmp_path.rglob("*") if not file.is_relative_to(cache)} - set(before)
        assert written == set()
        shutil.rmtree(folder)
    assert outcomes["refused"] + outcomes["skipped"] > CASES / 5
    assert outcomes["loaded"] + outcomes["skipped"] > CASES / 5
