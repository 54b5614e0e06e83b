"""The command surface: help for everything, an instant start, errors a person can read."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.main import get_command
from typer.testing import CliRunner

import edgeprune.cli
from edgeprune.cli import app
from edgeprune.data.errors import EdgePruneError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_has_help_and_a_place_in_the_readme(name: str) -> None:
    """Each command and each of its options and arguments has a help text, and README.md names the command."""
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert parameter.name == "help" or parameter.help, f"{name} {parameter.name} has no help"
    assert f"`edgeprune {name}" in (ROOT / "README.md").read_text()


def leaves(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The commands that do something, also those below another one, by what is typed."""
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
    for part in below or ():
        yield from leaves(below[part], f"{name} {part}".strip())


@pytest.mark.parametrize(("name", "command"), list(leaves(get_command(app))))
def test_numbers_are_printed_for_a_program_too(name: str, command: Any) -> None:
    """Every command prints numbers, and every one has --json for them."""
    assert any("--json" in parameter.opts for parameter in command.params), name


def test_build_and_prune_take_the_same_options() -> None:
    """`prune` and then `build --resume` with the same options is one run; `build` alone writes a report."""
    build, prune, report = (
        {
            parameter.name: (parameter.opts, parameter.default, parameter.help)
            for parameter in COMMANDS[name].params
        }
        for name in ("build", "prune", "report")
    )
    assert prune.items() <= build.items()
    assert {name: build[name] for name in build.keys() - prune.keys()}.items() <= report.items()


def test_defaults_are_those_of_the_library() -> None:
    """What an option left out means is decided once: in the options of pruning and of fine-tuning."""
    from edgeprune.cli.config import BuildConfig
    from edgeprune.detectors.adaptation import AdaptOptions
    from edgeprune.detectors.training import FineTuneOptions
    from edgeprune.pruning.schedule import PruningOptions

    defaults = {parameter.name: parameter.default for parameter in COMMANDS["build"].params}
    pruning, tuning = PruningOptions(), FineTuneOptions()
    for name in ("iterations", "criterion", "seed"):
        assert defaults[name] == getattr(pruning, name), name
    assert (defaults["finetune_epochs"], defaults["learning_rate"]) == (tuning.epochs, tuning.learning_rate)
    assert defaults["mosaic"] == tuning.mosaic
    config = BuildConfig.from_options({**defaults, "target": "host"})
    assert (config.remove, config.budget, config.per) == (pruning.remove, pruning.budget, pruning.per)
    shown = {parameter.name: parameter.show_default for parameter in COMMANDS["build"].params}
    assert (shown["budget"], shown["per"]) == (pruning.budget, pruning.per)
    assert float(shown["remove"]) == pruning.remove
    adapting = {parameter.name: parameter.default for parameter in COMMANDS["adapt"].params}
    for name in ("epochs", "learning_rate", "body_share", "mosaic"):
        assert adapting[name] == getattr(AdaptOptions(), name), name


def test_help_is_instant() -> None:
    """`edgeprune --help` takes under 0.3 s of processor time, best of five: other processes do not count."""
    command = [sys.executable, "-c", "from edgeprune.cli import app; app()", "--help"]

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, cwd=os.sep)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


def test_help_imports_no_heavy_package() -> None:
    """What makes a start slow stays unimported until a command runs."""
    script = (
        "import sys\nfrom edgeprune.cli import app\n"
        "try:\n    app(['build', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'cv2', 'onnx', 'matplotlib') if name in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=os.sep
    )
    assert shown.stdout.endswith("[]\n"), shown.stdout


def command_that(action: Callable[[], None]) -> typer.Typer:
    """An app with edgeprune's way of treating errors whose only commands do `action`."""
    probe = typer.Typer(cls=edgeprune.cli._Group, pretty_exceptions_enable=False)
    probe.command("act")(action)
    probe.command("other")(lambda: None)
    return probe


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (EdgePruneError("x.json is missing:\n  give --train"), 1, "Error: x.json is missing: give --train"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 1, "runs/a: No space left"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "--train-device cpu"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_what_a_user_can_act_on_is_one_line(error: BaseException, exit_code: int, words: str) -> None:
    """One line on standard error, nothing on standard output, and the exit code that scripts rely on."""
    result = CliRunner().invoke(command_that(raising(error)), ["act"])
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_bug_keeps_its_traceback() -> None:
    """An error that is ours is not dressed up as the user's."""
    bug = RuntimeError("shapes differ")
    result = CliRunner().invoke(command_that(raising(bug)), ["act"])
    assert result.exception is bug


@pytest.mark.parametrize(
    "arguments",
    [
        ["build"],
        ["build", "--target", "host", "--per", "guess"],
        ["build", "--target", "host", "--remove", "1.5"],
        ["build", "--target", "host", "--train", "train.json"],
        ["build", "--target", "host", "--train-images", "images"],
        ["build", "--target", "host", "--unlabelled", "more", "--no-distill"],
        ["build", "--target", "host", "--unlabelled", "more", "--finetune-epochs", "0"],
        ["evaluate"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    """A missing target, a value out of range or options that clash are usage errors, before any work."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr or "Usage" in result.stdout


def test_no_arguments_shows_help() -> None:
    """`edgeprune` alone shows what there is."""
    assert "build" in CliRunner().invoke(app, []).output


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """Every command on a run folder says in one line what is missing."""
    for name in ("export", "deploy", "bench", "report", "evaluate", "camera"):
        result = CliRunner().invoke(app, [name, str(tmp_path)])
        assert result.exit_code == 1
        assert "no run folder" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
