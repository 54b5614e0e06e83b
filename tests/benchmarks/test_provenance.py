"""What committed results say about where they come from."""

import hashlib
from pathlib import Path

from edgeprune.benchmarks.provenance import provenance, without_folders


def test_provenance_names_machine_versions_and_inputs(tmp_path: Path) -> None:
    """Command, date, processor, load, each asked package's version and each input's hash are there, none empty."""
    labels = tmp_path / "labels.json"
    labels.write_bytes(b"{}")
    found = provenance("experiment.py --all", ["numpy"], [labels])
    assert found["sha256"] == {"labels.json": hashlib.sha256(b"{}").hexdigest()}
    assert found["command"] == "experiment.py --all"
    assert {"edgeprune", "numpy"} == found["versions"].keys()
    assert all(value not in ("", None) for value in found.values())


def test_no_folder_is_named() -> None:
    """Absolute paths become file names at any depth and in a command; everything else stays as it was."""
    record = {
        "command": "edgeprune build --val '/my files/val.json' --seed 1",
        "config": {"val": "/me/val.json", "target": "host"},
        "files": ["/tmp/a.npz", "b/c"],
        "n": 1,
    }
    assert without_folders(record) == {
        "command": "edgeprune build --val val.json --seed 1",
        "config": {"val": "val.json", "target": "host"},
        "files": ["a.npz", "b/c"],
        "n": 1,
    }
