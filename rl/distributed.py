"""The few collective operations unmask needs; without a process group they are the identity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def active() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if active() else 1


def total(value: float) -> float:
    """Return the sum of `value` over all ranks, in fp64."""
    if not active():
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item()


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def reduce_gradients(parameters: Iterable[nn.Parameter], *, average: bool) -> None:
    """Sum (or average) gradients over ranks in one flat buffer.

    The forward does not pass through DDP's wrapper, whose reducer wants one forward a step: chunks make many.
    """
    if not active():
        return
    trainable = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    flat: Tensor = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    if average:
        flat /= world_size()
    offset = 0
    for parameter in trainable:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()


def barrier() -> None:
    """Wait for every rank."""
    if active():
        dist.barrier()
