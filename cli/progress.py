"""How far a run is, on standard error: a bar on a terminal, else a line now and then."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from edgeprune.cli.interrupt import check, postponed

if TYPE_CHECKING:  # it imports torch
    from edgeprune.detectors.protocol import Progress

LINE_EVERY_S = 15.0

console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """A line that stays, above any bar."""
    console.print(line, markup=False)


@contextmanager
def progress(title: str) -> Iterator["Progress"]:
    """Show PyTorch's work under `title`; call what is yielded with (done, total) as it proceeds."""
    with postponed(), _shown(title) as update:

        def proceed(done: int, total: int) -> None:
            check()
            update(done, total)

        yield proceed


@contextmanager
def _shown(title: str) -> Iterator["Progress"]:
    if console.is_terminal:
        with _bars() as bars:
            task = bars.add_task(title, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
    else:
        say(f"{title} ...")
        yield _Lines(title)


@contextmanager
def device_progress(title: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show what the agent on a device reports: takes its events."""
    with _shown(title) as update:

        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "progress":
                update(event["done"], event["total"])
            elif event["event"] == "waiting":
                say("Waiting for another job on the same device ...")

        yield on_event


def _bars() -> Bars:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Bars(*columns, TimeRemainingColumn(), console=console, transient=True)


class _Lines:
    """Progress for a log file: a line at most every LINE_EVERY_S seconds."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._start_s = self._last_s = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= LINE_EVERY_S:
            self._last_s = now_s
            left_s = (now_s - self._start_s) * (total - done) / done if done else 0.0
            left = f", about {left_s / 60:.0f} min left" if left_s >= 60 else ""
            say(f"{self._title}: {done} of {total}{left}")
