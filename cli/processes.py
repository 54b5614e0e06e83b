"""Under `torchrun` its processes work on one run: the first writes and speaks, or whichever fails first."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer

from edgeprune.cli import EXIT_ERROR
from edgeprune.cli.progress import console
from edgeprune.detectors import distributed


@contextmanager
def together(train_device: str) -> Iterator[None]:
    """Join torchrun's processes, if there are any, for a command that trains on `train_device`.

    Raises:
        typer.Exit: Where another process failed first.
        ProcessesError: If the processes cannot work together.
    """
    on_gpus = train_device != "cpu" and torch.cuda.is_available()
    try:
        with distributed.processes("cuda" if on_gpus else "cpu"):
            if distributed.rank() > 0:
                console.quiet = True
                logging.disable(logging.WARNING)
            yield
    except distributed.FailedElsewhere:
        raise typer.Exit(EXIT_ERROR) from None
