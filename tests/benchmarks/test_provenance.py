"""What committed results say about where they come from."""

from edgeprune.benchmarks.provenance import provenance, without_folders


def test_provenance_names_machine_and_versions() -> None:
    """Command, date, processor, load and each asked package's version are there, none of them empty."""
    found = provenance("experiment.py --all", ["numpy"])
    assert found["command"] == "experiment.py --all"
    assert {"edgeprune", "numpy"} == found["versions"].keys()
    assert all(value not in ("", None) for value in found.values())


def test_no_folder_is_named() -> None:
    """Absolute paths become file names at any depth; everything else stays as it was."""
    record = {
        "config": {"val": "/me/val.json", "target": "host"},
        "files": ["/tmp/a.npz", "b/c"],
        "n": 1,
    }
    assert without_folders(record) == {
        "config": {"val": "val.json", "target": "host"},
        "files": ["a.npz", "b/c"],
        "n": 1,
    }
