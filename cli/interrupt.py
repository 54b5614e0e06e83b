"""Ctrl-C at a safe point.

Python raises KeyboardInterrupt between any two instructions, also inside callbacks of C++ code (autograd, weak
references), where it is swallowed or aborts the process. While PyTorch works, ctrl-C is therefore only noted and raised
at the next report of progress; pressed again, it is raised at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _State:
    noted = False
    postponed = False


def _on_sigint(signum: int, frame: FrameType | None) -> None:
    if _State.postponed and not _State.noted:
        _State.noted = True
        return
    raise KeyboardInterrupt


@contextmanager
def handled() -> Iterator[None]:
    """Handle ctrl-C so until the end of the command."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.noted = _State.postponed = False
    before = signal.signal(signal.SIGINT, _on_sigint)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
