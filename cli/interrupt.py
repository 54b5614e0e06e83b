"""Ctrl-C, or SIGTERM, at a safe point.

Python raises KeyboardInterrupt between any two instructions, also inside callbacks of C++ code (autograd, weak
references), where it is swallowed or aborts the process. While PyTorch works, ctrl-C is therefore only noted and raised
at the next report of progress; pressed again, it is raised at once.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class _State:
    noted = False
    postponed = False
    instead: Callable[[], None] | None = None


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _State.instead:
        action, _State.instead = _State.instead, None
        action()
        return
    if _State.postponed and not _State.noted:
        _State.noted = True
        return
    raise KeyboardInterrupt


@contextmanager
def handled() -> Iterator[None]:
    """Handle ctrl-C and SIGTERM so until the end of the command."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.noted = _State.postponed = False
    _State.instead = None
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def instead(action: Callable[[], None]) -> Iterator[None]:
    """Have ctrl-C call `action` and nothing else; pressed again, it interrupts."""
    _State.instead = action
    try:
        yield
    finally:
        _State.instead = None


@contextmanager
def postponed() -> Iterator[None]:
    """PyTorch is at work: wait for `check`, or for the end."""
    _State.postponed = True
    try:
        yield
    finally:
        _State.postponed = False
    check()


def check() -> None:
    """A safe point.

    Raises:
        KeyboardInterrupt: If ctrl-C was pressed meanwhile.
    """
    if _State.noted:
        raise KeyboardInterrupt
