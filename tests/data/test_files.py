import hashlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeprune.data.errors import EdgePruneError
from edgeprune.data.files import atomic_path, read_json, sha256_of, write_bytes, write_json


@pytest.fixture
def small_files_only() -> Iterator[int]:
    """The kernel refuses to let a file grow beyond 4 KiB, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_refused_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, small_files_only: int) -> None:
    """When the file system takes only a part, the error names the file, which is as it was, and alone."""
    path = tmp_path / "weights.bin"
    write_bytes(path, b"old")
    with pytest.raises(EdgePruneError, match=r"cannot write .*weights\.bin: File too large"):
        write_bytes(path, bytes(2 * small_files_only))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """ctrl-C between two writes replaces nothing and is not turned into another error."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".onnx"
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """Writing below a folder that is not there, or is a file, says which path failed and why."""
    (tmp_path / "file").write_text("")
    for folder, why in (("none", "No such file"), ("file", "Not a directory")):
        with pytest.raises(EdgePruneError, match=f"cannot write .*{folder}/x.json: {why}"):
            write_json(tmp_path / folder / "x.json", {})


def test_json_reads_back(tmp_path: Path) -> None:
    """What is written is read again, not only ASCII; what JSON cannot hold is not written at all."""
    path = tmp_path / "run.json"
    record = {"name": "Fußgänger", "ap": 0.1 + 0.2, "latency_ms": None, "boxes": [[1, 2.5]]}
    write_json(path, record)
    assert read_json(path) == record
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"ap": float("nan")})
    assert read_json(path) == record


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": 1', b"\xff\xfe\xfa", b"\x89PNG\r\n\x1a\n", b"[" * 100_000, b"1" * 5000],
    ids=["empty", "cut", "no text", "image", "nested", "huge number"],
)
def test_a_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    """Whatever a file holds that is no JSON gives one error of ours with the file's name."""
    path = tmp_path / "labels.json"
    path.write_bytes(content)
    with pytest.raises(EdgePruneError, match=r"labels\.json is not valid JSON"):
        read_json(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Reading what is not there, or is a folder, says so."""
    for read in (read_json, sha256_of):
        with pytest.raises(EdgePruneError, match=r"cannot read .*gone: No such file"):
            read(tmp_path / "gone")
        with pytest.raises(EdgePruneError, match="Is a directory"):
            read(tmp_path)


def test_sha256_covers_the_whole_file(tmp_path: Path) -> None:
    """A file of several blocks has hashlib's digest of its content."""
    content = bytes(range(256)) * 10_000  # 2.4 MiB
    (tmp_path / "x").write_bytes(content)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(content).hexdigest()
