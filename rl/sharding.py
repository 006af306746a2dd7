"""FSDP2 (torch's `fully_shard`): weights, gradients and optimizer shared out among the ranks.

Every decoder layer is a unit of its own; embedding, last norm and head, tied or not, belong to a root in whose forward
trunk and head run together. An update gathers a layer at a time and sums gradients as it goes back, so that all ranks
must run equally many (`paced`). What needs no gradient runs as often as each rank likes, the weights held whole for as
long (`whole`): one gathering a rollout phase instead of one a denoising step, at the price of one whole copy of the
weights in `model.dtype` while neither activations nor gradients exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..policies.denoiser import Denoiser
from ..recipes.registry import RecipeError
from .distributed import gather_objects, rank, world_size

T = TypeVar("T")
MOMENTS = "optimizer.safetensors"  # the optimizer's tensors, whole, named PARAMETER/STATE
WEIGHTS = "model.safetensors"


class Root(nn.Module):
    """Runs a function as its own forward: FSDP's hooks around it gather what belongs to none of the layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.held = False
        self.running = False

    def forward(self, function: Callable[[], Any]) -> Any:
        """Return `function()`."""
        self.running = True
        try:
            return function()
        finally:
            self.running = False

    def units(self) -> list[Any]:
        """Return the modules that are gathered each on its own, this one first."""
        return [module for module in self.modules() if isinstance(module, FSDPModule)]


def require_shardable(denoiser: Denoiser, optimizer: str) -> None:
    """Raise RecipeError for weights or an optimizer that cannot be shared out."""
    if world_size() == 1:
        raise RecipeError(
            "model.sharding: fsdp shares the weights among processes and there is one; start several (--nproc 8), or "
            "set model.sharding to none."
        )
    if getattr(denoiser.base, "is_quantized", False):
        raise RecipeError("model.sharding: fsdp cannot share out 4-bit weights; set model.quantization to null.")
    if optimizer == "muon":
        raise RecipeError("model.sharding: fsdp keeps rows of a matrix, muon needs whole ones; use optimizer adamw.")


def shard_for_training(accelerator: Accelerator, policy: Denoiser, reference: Any) -> None:
    """Share out a policy, and its frozen copy where the reference is one, and keep accelerate from wrapping it in DDP.

    Every rank must call this with equal weights.
    """
    # In this mode accelerate wraps nothing, and what it has prepared once it leaves alone when Trainer asks again.
    accelerator.prepare_model(policy.model, evaluation_mode=True)
    for denoiser in (policy, None if reference is policy else reference):
        if isinstance(denoiser, Denoiser):
            shard(denoiser)


def shard(denoiser: Denoiser) -> None:
    """Share out the weights of `denoiser` among all ranks, in place, and set its `root`.

    Trained weights of a model in bfloat16 become float32 shards that forwards see rounded to bfloat16: steps of 1e-6
    would be lost in bfloat16 itself. An adapter is in float32 already, and a frozen base stays as it is. Gradients are
    summed over ranks in float32: the objective's denominators are global.
    """
    model, mesh = denoiser.model, init_device_mesh(denoiser.device.type, (world_size(),))
    trained_in = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32}
    precision = MixedPrecisionPolicy()
    if trained_in:
        (dtype,) = trained_in
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    root = Root(model)
    for module in (*denoiser.base.base_model.layers, root):
        if trained_in:
            # One unit after the other: a float32 copy of the whole model never exists.
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not root, mp_policy=precision)
    for unit in root.units():
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    denoiser.root = root


@contextlib.contextmanager
def whole(source: Any) -> Iterator[None]:
    """Hold the weights of a sharded policy or reference whole: inside, each rank makes as many forwards as it likes.

    Without gradient only. Every rank must enter; leaving waits for nobody. Others than sharded ones are left alone.
    """
    root: Root | None = getattr(source, "root", None)
    if root is None or root.held:
        yield
        return
    root.held = True
    for unit in root.units():
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        root.held = False
        for unit in root.units():
            unit.set_reshard_after_forward(unit is not root, recurse=False)
            unit.reshard()


def paced(source: Any, spans: Iterable[T]) -> Iterator[T]:
    """Yield `spans`, one forward and backward each; a sharded `source` then goes on until the busiest rank is done.

    The extra updates have a gradient of zero; they gather weights and sum gradients with the other ranks.
    """
    spans = list(spans)
    idle = 0
    if getattr(source, "root", None) is not None:
        idle = max(gather_objects(len(spans))) - len(spans)
    yield from spans
    for _ in range(idle):
        ids_BT = torch.full((1, source.family.block_length or 1), source.family.mask_token_id, device=source.device)
        (0.0 * source.logits(ids_BT)).sum().backward()


def gathered(denoiser: Denoiser) -> dict[str, Tensor] | None:
    """Return what is trained, whole and on the CPU of rank 0, by the model's own names; None where nothing is sharded.

    Every rank must call this; the others get an empty dictionary.
    """
    if denoiser.root is None:
        return None
    adapter = isinstance(denoiser.model, PeftModel)
    trained = {name for name, parameter in denoiser.model.named_parameters() if parameter.requires_grad}
    state = denoiser.model.state_dict()
    return _on_first_rank({name: value for name, value in state.items() if name in trained or not adapter})


def _on_first_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whole copies on the CPU of rank 0, nothing elsewhere; one tensor at a time is whole on the devices."""
    found = {}
    for name, value in tensors.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if rank() == 0:
            found[name] = value.detach().cpu().contiguous()
    return found


def save_trained(denoiser: Denoiser, folder: Path, state: dict[str, Tensor] | None) -> None:
    """Write the adapter as peft does, or all weights in the vendor's layout; `state` is what `gathered` returned.

    Sharded weights are written in the dtype of the forwards: that is the policy which rolled out and was evaluated.
    """
    if isinstance(denoiser.model, PeftModel):
        denoiser.model.save_pretrained(str(folder), state_dict=state)
    else:
        (denoiser if state is None else _rebuilt(denoiser, state)).save(folder)


def _rebuilt(denoiser: Denoiser, state: dict[str, Tensor]) -> Denoiser:
    """Return the denoiser with the gathered weights, unsharded, on the CPU."""
    config = denoiser.base.config
    parameters = {name for name, _ in denoiser.model.named_parameters()}
    dtype = config.dtype or torch.float32
    state = {name: value.to(dtype) if name in parameters else value for name, value in state.items()}
    with torch.device("meta"):
        model = type(denoiser.model)(config)
    model.load_state_dict(state, assign=True)
    return replace(denoiser, model=model, root=None)


def save_for_resuming(denoiser: Denoiser, folder: Path, state: dict[str, Tensor]) -> None:
    """Write what `Trainer` resumes from: the adapter, or all weights in the float32 they are kept in."""
    if isinstance(denoiser.model, PeftModel):
        denoiser.model.save_pretrained(str(folder), state_dict=state)
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def leave_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Keep tensors out of the optimizer's state dict, which `Trainer` asks one rank for: `save_moments` writes them."""
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "state": {}})


def save_moments(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write the optimizer's tensors, whole, into a checkpoint; every rank must call this, rank 0 writes."""
    tensors = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    found = _on_first_rank(tensors)
    if rank() == 0:
        save_file(found, folder / MOMENTS)


def load_sharded(folder: Path, denoiser: Denoiser, optimizer: Any) -> None:
    """Give the optimizer its tensors of a checkpoint and the shards their float32 weights, whatever wrote them.

    Every rank reads the files itself and keeps its rows, so the number of ranks may have changed.
    """
    parameters = dict(denoiser.model.named_parameters())
    with safe_open(folder / MOMENTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (safe_open is not iterable)
            name, _, state = key.rpartition("/")
            optimizer.state[parameters[name]][state] = _rows(file.get_tensor(key), parameters[name])
    if isinstance(denoiser.model, PeftModel):
        return  # Trainer has read the adapter, in the float32 it is kept in
    with torch.no_grad(), safe_open(folder / WEIGHTS, framework="pt") as file:
        for name, parameter in parameters.items():
            parameter.copy_(_rows(file.get_tensor(name), parameter))


def _rows(value: Tensor, parameter: Any) -> Tensor:
    """Return this rank's rows of a whole tensor of `parameter`'s shape; a step count is nobody's in particular."""
    if value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
