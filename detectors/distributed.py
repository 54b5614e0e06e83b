"""Several processes under `torchrun`: sums over all of them, nothing where there is only one."""

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

# Its functions keep the group of the moment of import as a default. Imported after a group is made (torch.export
# does so at its first call) they would keep it beyond its end: its threads then die with the interpreter, now and
# then with SIGABRT.
import torch.distributed.nn
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from edgeprune.data.errors import EdgePruneError

T = TypeVar("T")

# Of the others for the first, which alone evaluates, exports, builds engines and measures.
PATIENCE = datetime.timedelta(days=7)


class ProcessesError(EdgePruneError):
    """The processes cannot work together, or no longer."""


class FailedElsewhere(Exception):
    """Another process failed first, and has the reason."""


@contextmanager
def processes(device: str | torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started; without it do nothing. NCCL on CUDA, gloo elsewhere.

    On CUDA each process takes the GPU of its local rank.

    Raises:
        ProcessesError: If there is no GPU for this process, or another one ended without a word.
        FailedElsewhere: Instead of any error but the first in all processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    store, rank, size = next(rendezvous("env://"))
    try:
        backend = _backend(torch.device(device))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        try:
            yield
            with _exchange():
                distributed.barrier()  # who leaves first must not break what the others still receive
        finally:
            distributed.destroy_process_group()
    except BaseException as error:  # ctrl-C reaches all of them
        if store.add("failures", 1) > 1:
            raise FailedElsewhere from error
        raise


def _backend(device: torch.device) -> str:
    if device.type != "cuda":
        return "gloo"
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ProcessesError(
            f"torchrun started a process for GPU {local}, and there are {gpus}: lower --nproc-per-node"
        )
    torch.cuda.set_device(local)
    return "nccl"


@contextmanager
def _exchange() -> Iterator[None]:
    """A message between all processes."""
    try:
        yield
    except RuntimeError as error:  # of which torch raises no kind of its own
        raise ProcessesError(
            "another process of torchrun has ended, and this one cannot go on alone"
        ) from error


def rank() -> int:
    """Return this process' number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Add up each tensor over all processes, in place, in one message. They share type and device."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _exchange():
        distributed.all_reduce(flat)
    for tensor, summed in zip(
        tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(summed.view_as(tensor))


def from_first(value: T) -> T:
    """Return the value that the first process holds."""
    if world_size() == 1:
        return value
    holder = [value]
    with _exchange():
        distributed.broadcast_object_list(holder)
    return holder[0]


def gather(value: T) -> list[T]:
    """Return what each process holds, in the order of their ranks, to all of them."""
    if world_size() == 1:
        return [value]
    holders: list[T | None] = [None] * world_size()
    with _exchange():
        distributed.all_gather_object(holders, value)
    return [holder for holder in holders if holder is not None]
