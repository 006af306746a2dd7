"""What a recipe needs of a device's memory, counted on the meta device: no weights are read, nothing is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface

from ..policies.adapters import attach_adapter, lora_config
from ..policies.denoiser import Denoiser
from ..policies.layout import Family, Layout
from ..policies.loading import TINY, stock_classes, stock_config, tiny_folder
from ..policies.published import CONFIGS
from ..policies.quantization import STACKS, recompute_experts, stacked_experts
from ..policies.resolving import check_config, find_layout, read_config, resolve_family
from ..policies.rope import rescale
from ..recipes.schema import Recipe
from ..rollouts.measures import CHUNK_ENTRIES
from .settings import quiet_peft

COUNTED = "unmask_counted"
NF4_BYTES = 0.5 + 4 / 64  # half a byte a weight, and an fp32 absmax for 64 of them
GRADIENT_AND_MOMENTS = 3  # a gradient and Adam's two moments, all in the dtype of their weight


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device by what holds them.

    Sharded weights are gathered layer by layer for an update (`gathered`) and all of them for a rollout (`whole`).
    """

    weights: int
    adapter: int
    optimizer: int
    activations: int
    rollout: int
    gathered: int = 0
    whole: int = 0
    value: int = 0

    @property
    def total(self) -> int:
        """The peak of an update or of a rollout, whichever is larger, in bytes."""
        kept = self.weights + self.adapter + self.optimizer + self.value
        return kept + max(self.gathered + self.activations, self.whole + self.rollout)


def estimate(recipe: Recipe, ranks: int = 1) -> Estimate | None:
    """Return the memory a recipe needs on each of `ranks` devices, among which a sharded recipe shares its weights out.

    None for a hub model whose sizes are not known before it is downloaded.
    """
    vendor = known_config(recipe.model.path)
    if vendor is None:
        return None
    denoiser = on_meta(recipe, vendor)
    sharded = recipe.model.sharding == "fsdp"
    parameters = list(denoiser.model.parameters())
    adapted = isinstance(denoiser.model, PeftModel)
    trained = sum(p.numel() * _kept(p, sharded) for p in parameters if p.requires_grad)
    frozen = _quantized(denoiser) if recipe.model.quantization else _bytes(p for p in parameters if not p.requires_grad)
    value = _value(recipe, denoiser, frozen, trained)
    kind = recipe.objective.reference
    if recipe.objective.beta > 0 and (kind == "frozen_copy" or (kind != "old" and not adapted)):
        frozen += frozen + trained if adapted else _bytes(parameters)
    shares = ranks if sharded else 1
    rows, tokens = recipe.objective.chunk, recipe.rollout.prompt_limit + recipe.rollout.canvas
    scored = rows * _scored(recipe)
    vocabulary = denoiser.family.vocab_size
    # The statistics pass holds a chunk of logits and what it makes of them.
    chunk = min(recipe.rollout.micro_batch * _window(recipe) * vocabulary, CHUNK_ENTRIES["other"])
    return Estimate(
        weights=(frozen if adapted else frozen + trained) // shares,
        adapter=trained // shares if adapted else 0,
        optimizer=GRADIENT_AND_MOMENTS * trained // shares,
        activations=saved_bytes(denoiser, rows, tokens, scored) + 3 * scored * vocabulary * 4,
        rollout=4 * chunk * 4 + _store(denoiser, recipe),
        gathered=_gathered(denoiser) if sharded else 0,
        whole=_bytes(parameters) if sharded else 0,
        value=value,
    )


def _value(recipe: Recipe, denoiser: Denoiser, frozen: int, trained: int) -> int:
    """Return the bytes of a value model that is a copy of the policy, with its optimizer; a head alone is nothing."""
    if recipe.value is None or recipe.value.network == "head":
        return 0
    head = denoiser.base.get_output_embeddings().weight
    dropped = 0 if head is denoiser.base.get_input_embeddings().weight else _bytes([head])
    moments = GRADIENT_AND_MOMENTS * (trained - (dropped if head.requires_grad else 0))
    return frozen + trained - dropped + moments


def _kept(parameter: Any, sharded: bool) -> int:
    """Return the bytes that a trained weight is kept in: sharded ones in float32, whatever forwards run in."""
    return 4 if sharded else parameter.element_size()


def _gathered(denoiser: Denoiser) -> int:
    """Return the bytes that an update has gathered at its peak.

    The root, and two layers, since the next one comes in while one is at work; their gradients before they are shared
    out, those of a layer once more in float32 on their way.
    """
    layers = [list(layer.parameters()) for layer in denoiser.base.base_model.layers]
    inside = {id(p) for layer in layers for p in layer}
    root = [p for p in denoiser.model.parameters() if id(p) not in inside]
    largest = max(layers, key=_bytes)
    gradients = [p for p in (*root, *largest) if p.requires_grad]
    leaving = sum(4 * p.numel() for p in largest if p.requires_grad)
    return _bytes(root) + 2 * _bytes(largest) + _bytes(gradients) + leaving


def known_config(path: str) -> dict[str, Any] | None:
    """Return the config.json of a local folder, or the published one of a known hub id."""
    if path == TINY:
        return read_config(tiny_folder())
    folder = Path(path).expanduser()
    return read_config(folder) if folder.is_dir() else CONFIGS.get(path)


def on_meta(recipe: Recipe, vendor: dict[str, Any], attention: str = COUNTED) -> Denoiser:
    """Return the recipe's denoiser with its adapter on the meta device."""
    section = recipe.model
    layout = find_layout(vendor, section.family)
    check_config(vendor, layout)
    config = stock_config(layout, vendor)
    if section.context is not None:
        rescale(config, layout, vendor, section.context)
    config._attn_implementation = attention
    if attention == COUNTED:
        config._experts_implementation = COUNTED
    with torch.device("meta"):
        model = stock_classes(layout, vendor)[1](config).to(getattr(torch, section.dtype))
    if section.quantization:
        recompute_experts(model)
    denoiser = Denoiser(model, _family(layout, vendor, recipe), None)  # type: ignore[arg-type]
    if section.lora is None:
        return denoiser
    with quiet_peft():
        return attach_adapter(denoiser, lora_config(denoiser, **section.lora.model_dump()))


def _family(layout: Layout, vendor: dict[str, Any], recipe: Recipe) -> Family:
    """Return the recipe's Family; a mask id that only the tokenizer knows is stood in for, as it takes no memory."""
    section = recipe.model
    known = (section.mask_token_id, vendor.get("mask_token_id"), (vendor.get("unmask") or {}).get("mask_token_id"))
    if all(value is None for value in known):
        vendor = vendor | {"mask_token_id": 0, "eos_token_id": []}
    return resolve_family(vendor, layout, section.mask_token_id, block_length=section.block_length)


def _scored(recipe: Recipe) -> int:
    """Return how many tokens of a view are scored at most: a step's quota, where it is fixed, else the whole window."""
    schedule, selection = recipe.rollout.sampler.schedule, recipe.rollout.sampler.selection["name"]
    if recipe.objective.estimator["name"] == "trace" and selection == "top" and schedule.get("per_step"):
        return int(schedule["per_step"])
    return _window(recipe)


def _window(recipe: Recipe) -> int:
    schedule = recipe.rollout.sampler.schedule
    return int(schedule.get("size") or recipe.rollout.canvas)


def _store(denoiser: Denoiser, recipe: Recipe) -> int:
    """Return the bytes of the keys and values that a rollout's cache keeps."""
    rollout, config = recipe.rollout, denoiser.base.config
    if rollout.sampler.cache is None:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = 2 * config.num_key_value_heads * width * denoiser.base.dtype.itemsize
    places = rollout.micro_batch * (rollout.prompt_limit + rollout.canvas + 1)
    return (2 if rollout.sampler.guidance else 1) * places * config.num_hidden_layers * layer


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _quantized(denoiser: Denoiser) -> int:
    """Return the bytes of a 4-bit base: linear layers but the head and stacked experts in NF4, the rest as it is.

    Plus one layer's experts in full, which every forward and backward unpacks.
    """
    head = denoiser.base.get_output_embeddings()
    linear = [m for m in denoiser.base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    adapters = {id(m) for n, m in denoiser.base.named_modules() if "lora_" in n}
    stacks = [[getattr(m, name) for name in STACKS] for m in stacked_experts(denoiser.base)]
    small = [m.weight for m in linear if id(m) not in adapters] + [p for stack in stacks for p in stack]
    known = {id(p) for p in small}
    rest = [p for p in denoiser.model.parameters() if not p.requires_grad and id(p) not in known]
    return int(sum(p.numel() for p in small) * NF4_BYTES) + _bytes(rest) + max(map(_bytes, stacks), default=0)


class _Flash(torch.autograd.Function):
    """Attention as a fused kernel holds it: q, k, v, the mask, the output and a log-sum-exp a query; no scores.

    Only the forward exists: what it saves is counted, nothing is ever propagated back.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _counted(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    # Prompts differ in length: behind a mask, keys and values are repeated for every query's head.
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    mask = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2])
    return _Flash.apply(query, key, value, mask).transpose(1, 2).contiguous(), None


def _counted_experts(module: Any, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What the grouped kernel holds: every token once for each of its experts; all experts have one shape."""
    gate, up = F.linear(hidden_TD.repeat_interleave(expert_TK.shape[1], dim=0), module.gate_up_proj[0]).chunk(2, dim=-1)
    out = F.linear(module.act_fn(gate) * up, module.down_proj[0]) * weight_TK.reshape(-1, 1)
    return out.view(*expert_TK.shape, -1).sum(dim=1)


AttentionInterface.register(COUNTED, _counted)
ExpertsInterface.register(COUNTED, _counted_experts)  # the grouped kernel has no float32 on the meta device


def saved_bytes(denoiser: Denoiser, rows: int, tokens: int, scored: int) -> int:
    """Return the bytes that autograd holds after the forward of one chunk: `rows` views, `scored` tokens of them."""
    kept: list[Tensor] = []
    parameters = {StorageWeakRef(p.untyped_storage()).cdata for p in denoiser.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids_BT = torch.empty(rows, tokens, dtype=torch.long)
        hidden_BTD = denoiser.hidden(ids_BT)
        hidden_KD = hidden_BTD.flatten(0, 1)[torch.empty(scored, dtype=torch.long)]
        logp_KV = F.log_softmax(denoiser.head(hidden_KD), dim=-1)
        logp_KV.gather(1, torch.empty(scored, 1, dtype=torch.long)).sum()
    storages = {StorageWeakRef(t.untyped_storage()).cdata: t.untyped_storage().nbytes() for t in kept}
    return sum(size for storage, size in storages.items() if storage not in parameters)
