"""Several processes under `torchrun`: sums over all of them, nothing where there is only one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


@contextmanager
def processes(device: str | torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started; without it do nothing. NCCL on CUDA, gloo elsewhere."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    distributed.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    try:
        yield
        distributed.barrier()  # who leaves first must not break what the others still receive
    finally:
        distributed.destroy_process_group()


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
    distributed.broadcast_object_list(holder)
    return holder[0]


def gather(value: T) -> list[T]:
    """Return what each process holds, in the order of their ranks, to all of them."""
    if world_size() == 1:
        return [value]
    holders: list[T | None] = [None] * world_size()
    distributed.all_gather_object(holders, value)
    return [holder for holder in holders if holder is not None]
