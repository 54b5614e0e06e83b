"""run.json: where a run came from, and what may go on with it."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from edgeprune.cli import app
from edgeprune.cli.config import BuildConfig
from edgeprune.cli.run_folder import RunError, RunFolder, RunRecord
from edgeprune.data.files import read_json
from edgeprune.detectors.registry import published_files

BUILD = get_command(app).commands["build"]  # type: ignore[attr-defined]
HASHES = {"train": "1" * 64, "val": "2" * 64}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def begun_by(monkeypatch: pytest.MonkeyPatch, *arguments: str, **hashes: Any) -> RunRecord:
    """The record of a command with the defaults of `build`."""
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/edgeprune", *arguments])
    options = {parameter.name: parameter.default for parameter in BUILD.params}
    config = BuildConfig.from_options({**options, "target": "host"})
    return RunRecord.of(config, {**HASHES, **hashes}, {})


def test_the_command_that_began_the_run_is_kept(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.json has the command as a shell takes it, and the day; going on with the run changes neither."""
    typed = ["build", "--target", "host", "--val", "my images/val.json"]
    run.start(begun_by(monkeypatch, *typed), resume=False)
    written = run.record_path.read_bytes()
    record = json.loads(written)
    assert shlex.split(record["command"]) == ["edgeprune", *typed]
    assert len(record["date"].split("-")) == 3
    found = run.start(begun_by(monkeypatch, *typed, "--resume"), resume=True)
    assert found is not None and found.command == record["command"] and found.date == record["date"]
    assert run.record_path.read_bytes() == written


def test_published_weights_have_their_hashes() -> None:
    """Each file that was checked on fetching is named; a detector without published weights has none."""
    files = published_files("nanodet-g")
    assert files is not None and set(files) == {"nanodet.json", "nanodet.bin"}
    assert all(len(sha256) == 64 for sha256 in files.values())
    assert published_files("tiny-yolov2") is None


def test_a_run_of_before_goes_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without command, date and the hashes of published weights is resumed; one of other data is not."""
    old = begun_by(monkeypatch, weights=None).to_json()
    del old["command"], old["date"]
    run.record_path.write_text(json.dumps(old))
    now = begun_by(monkeypatch, weights=published_files("nanodet-g"))
    found = run.start(now, resume=True)
    assert found is not None and found.command is None
    assert read_json(run.record_path) == old
    with pytest.raises(RunError, match="the train file has other contents"):
        run.start(begun_by(monkeypatch, weights=None, train="3" * 64), resume=True)


def test_a_latency_run_of_before_is_read(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that asked for a latency has what --per was by default, which decided nothing: it is as if not given."""
    old = begun_by(monkeypatch).to_json()
    old["config"] |= {"speedup": 1.5, "remove": None, "budget": None, "per": "params"}
    run.record_path.write_text(json.dumps(old))
    assert run.read_record().config.per is None


def test_other_weights_are_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose published weights were other files is not gone on with."""
    run.start(begun_by(monkeypatch, weights={"nanodet.bin": "4" * 64}), resume=False)
    with pytest.raises(RunError, match="the weights file has other contents"):
        run.start(begun_by(monkeypatch, weights=published_files("nanodet-g")), resume=True)
