"""What is needed to read and to repeat a result: the manifest of a run or an evaluation, and a hash of the weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..policies.denoiser import Denoiser
from ..recipes.protocols import digest, protocol_of, recipe_hash
from ..recipes.schema import Recipe, SftRecipe
from .distributed import world_size
from .runfolder import manifest

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**24  # elements hashed at a time


def run_manifest(recipe: Recipe | SftRecipe, denoiser: Denoiser, /, **more: Any) -> dict[str, Any]:
    """Return the manifest of a run."""
    if isinstance(recipe, Recipe):
        protocol = protocol_of(recipe).hash
        model = recipe.model.path
        batch = {
            "prompts": recipe.rollout.prompts,
            "group": recipe.rollout.group,
            "rollout_rows": recipe.rollout.micro_batch,
            "training_views": recipe.objective.chunk,
        }
    else:
        tasks = [entry.model_dump(mode="json") for entry in recipe.tasks]
        protocol = digest([tasks, recipe.evaluation.model_dump(mode="json")])
        model = recipe.model.path or "new"
        batch = {"rows": recipe.sft.batch}
    return policy_manifest(
        denoiser,
        seeds={"run": recipe.run.seed},
        batch_size=batch,
        protocol_hash=protocol,
        recipe_hash=recipe_hash(recipe),
        ranks=world_size(),
        model=model,
        **more,
    )


def policy_manifest(denoiser: Denoiser, *, seeds: dict[str, int], **more: Any) -> dict[str, Any]:
    """Return a manifest with what the loaded weights say themselves: device, dtype, attention kernel."""
    dtype = str(next(denoiser.base.parameters()).dtype).removeprefix("torch.")
    kernel = denoiser.base.config._attn_implementation
    return manifest(device=denoiser.device, dtype=dtype, seeds=seeds, attention_kernel=kernel, **more)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return a hash of every bit of a model's weights and their names, in hexadecimal; the same on every device."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            state.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}/{_checksum(tensor)}\n".encode())
    return state.hexdigest()


def _checksum(tensor: Tensor) -> int:
    """Return the sum of all entries' bits, each times an odd number of its place, modulo 2^64: exact in any order."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start, start + len(part), device=tensor.device)
        total += (part * (place * 0x9E3779B1 | 1)).sum()
    return int(total)
