"""The few collective operations unmask needs; without a process group they are the identity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
    tensor = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor)
    return tensor.item()


def anyone(value: bool) -> bool:
    """Return whether `value` is true on any rank; every rank must ask."""
    return total(float(value)) > 0


def _device() -> torch.device:
    """Return where a tensor must lie to be reduced: NCCL takes no tensor of the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def reduce_gradients(parameters: Iterable[nn.Parameter], *, average: bool) -> None:
    """Sum (or average) gradients over ranks in one flat buffer.

    The forward does not pass through DDP's wrapper, whose reducer wants one forward a step; here there are many. Those
    of sharded parameters are left alone: FSDP has summed them.
    """
    trainable = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if not active() or not trainable:
        return
    held = torch.tensor([p.grad is not None for p in trainable], dtype=torch.int32, device=_device())
    dist.all_reduce(held)
    # What has a gradient on no rank keeps none: the optimizer passes over it, as it does in one process.
    reduced = [parameter for parameter, ranks in zip(trainable, held.tolist(), strict=True) if ranks]
    if not reduced:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in reduced]
    flat: Tensor = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    if average:
        flat /= world_size()
    offset = 0
    for parameter in reduced:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()


def barrier() -> None:
    """Wait for every rank."""
    if active():
        dist.barrier()
