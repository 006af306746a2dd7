"""Loading a denoiser: a folder, hub id or `unmask:tiny` onto its stock class, on the meta device first."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from . import conversion
from .denoiser import Denoiser
from .layout import CheckpointError, Family, Layout
from .quantization import check_quantization, quantized
from .resolving import check_config, find_layout, read_config, resolve_family
from .rope import rescale
from .saving import INDEX, TIED, llada_vendor_config
from .selfcheck import self_check
from .tokenizers import byte_tokenizer, check_mask_token, load_tokenizer, read_tokenizer

logger = logging.getLogger(__name__)
TINY = "unmask:tiny"
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
    "modernbert": (ModernBertConfig, ModernBertForMaskedLM),
}
ALIGNMENT = 64  # bytes, of what torch allocates on a CPU
FP32 = ("e_score_correction_bias",)  # decides between experts, whose order bfloat16 would change


def tiny_folder() -> Path:
    """Return the folder of the shipped tiny model."""
    return Path(__file__).resolve().parent.parent / "recipes" / "tiny"


def is_here(path: str) -> bool:
    """Tell whether a path names the tiny model or a folder of this machine."""
    return path == TINY or Path(path).expanduser().is_dir()


def may_be_hub_id(path: str) -> bool:
    """Tell whether a path that is no folder could be OWNER/NAME: for others the hub is not asked."""
    return not path.startswith((".", "/", "~")) and path.count("/") == 1


def resolve_path(path: str) -> Path:
    """Return the local folder of a path, `unmask:tiny` or a hub id (downloaded without code files)."""
    if path == TINY:
        folder = tiny_folder()
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"'{TINY}' is missing from this installation ({folder}); run `unmask sft tiny_sft.yaml`."
            )
        return folder
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    if not may_be_hub_id(path):
        raise CheckpointError(f"model.path: there is no folder '{path}' (a hub id looks like OWNER/NAME).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"model.path: '{path}' is no local folder and the hub did not give it ({reason})."
        ) from error


def stock_config(layout: Layout, vendor: dict[str, Any], attention: str | None = None) -> PreTrainedConfig:
    """Return the stock config: bidirectional, and without pad_token_id, which would zero that row's gradient."""
    try:
        config = stock_classes(layout, vendor)[0](**layout.stock_config(vendor), pad_token_id=None)
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error}, which family '{layout.name}' needs.") from error
    except (TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json: {' '.join(str(error).split())}") from error
    config.is_causal = False
    config.use_cache = False
    if attention is not None:
        if layout.attention == "block_causal" and attention.startswith("flash"):
            raise CheckpointError(
                f"model.attention: {attention} takes no block mask, which '{layout.name}' needs; use sdpa."
            )
        config._attn_implementation = attention
    return config


def stock_classes(layout: Layout, vendor: dict[str, Any]) -> tuple[Any, Any]:
    """Return the stock (config class, model class); raises CheckpointError for a backbone that is not among CLASSES."""
    name = layout.stock or str(vendor.get("model_type", "")).removeprefix("a2d-")
    if name not in CLASSES:
        raise CheckpointError(f"config.json: model_type '{name}' is no known backbone ({', '.join(CLASSES)}).")
    return CLASSES[name]


def load_denoiser(
    path: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    family: str | None = None,
    attention: str | None = None,
    mask_token_id: int | None = None,
    block_length: int | None = None,
    context: int | None = None,
    quantization: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Denoiser:
    """Load a checkpoint folder, hub id or `unmask:tiny` onto its stock class, then prove what it must satisfy.

    `mask_token_id` and `block_length` stand in for what a published config.json lacks. `context` rescales RoPE for
    sequences of that many tokens (`ntk_theta`). `quantization` "4bit" stores the linear layers as NF4 (extra `4bit`).
    Raises CheckpointError on unknown families, pickle weights, truncated shards, missing, extra or misshapen tensors
    and bad ids; SelfCheckError when the model does not attend as its family does.
    """
    if quantization:
        check_quantization(quantization)
    found = open_checkpoint(
        path,
        dtype=dtype,
        family=family,
        attention=attention,
        mask_token_id=mask_token_id,
        block_length=block_length,
        context=context,
        tokenizer=tokenizer,
    )
    layout, config, model, torch_dtype = found.layout, found.config, found.model, getattr(torch, dtype)
    state = read_state(found.folder, layout, config, torch_dtype, "cpu" if quantization else device)
    if quantization:
        model = quantized(type(model), config, state, torch_dtype, device)
    else:
        _fill(model, state, config, device)
    model.config.dtype = torch_dtype
    denoiser = Denoiser(model.eval(), found.family, found.tokenizer, found.vendor)
    self_check(denoiser)
    return denoiser


@dataclass(frozen=True)
class Checkpoint:
    """A folder that fits: its layout, family, tokenizer, configs, and its stock class on the meta device."""

    folder: Path
    layout: Layout
    family: Family
    tokenizer: PreTrainedTokenizerBase
    vendor: dict[str, Any]
    config: PreTrainedConfig
    model: Any


def open_checkpoint(
    path: str,
    *,
    dtype: str = "float32",
    family: str | None = None,
    attention: str | None = None,
    mask_token_id: int | None = None,
    block_length: int | None = None,
    context: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Checkpoint:
    """Return what a folder or hub id is, as `load_denoiser` would load it; names and shapes are read, no weight is.

    Raises CheckpointError for everything that is wrong with its files.
    """
    folder = resolve_path(path)
    vendor = read_config(folder)
    layout = find_layout(vendor, family)
    check_config(vendor, layout)
    tokenizer = tokenizer or read_tokenizer(folder)
    resolved = resolve_family(vendor, layout, mask_token_id, block_length=block_length, tokenizer=tokenizer)
    if not resolved.eos_token_ids:
        raise CheckpointError("neither config.json nor the tokenizer names an eos_token_id; write it into config.json.")
    tokenizer = load_tokenizer(folder, tokenizer, resolved, layout.template)
    check_mask_token(tokenizer, resolved)
    config = stock_config(layout, vendor, attention)
    if context is not None:
        vendor = rescale(config, layout, vendor, context)
    with torch.device("meta"):
        model = stock_classes(layout, vendor)[1](config).to(getattr(torch, dtype))
    _check_keys(model, read_state(folder, layout, config, getattr(torch, dtype), "meta"), layout, folder)
    vendor = {**vendor, "mask_token_id": resolved.mask_token_id}
    if resolved.block_length is not None:
        vendor.setdefault("block_size", resolved.block_length)
    return Checkpoint(folder, layout, resolved, tokenizer, vendor, config, model)


def new_denoiser(
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    mlp: int,
    max_length: int = 512,
    rope_theta: float = 1e4,
    seed: int = 0,
) -> Denoiser:
    """Return a randomly initialised denoiser in LLaDA's shape with the byte tokenizer (weights keyed by `seed`)."""
    if hidden_size % heads or (hidden_size // heads) % 2:
        raise CheckpointError(f"model.init: hidden_size {hidden_size} must be an even multiple of heads {heads}.")
    tokenizer = byte_tokenizer()
    family = Family("llada", len(tokenizer), tokenizer.mask_token_id, (tokenizer.eos_token_id,))
    config = LlamaConfig(
        vocab_size=family.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.is_causal = False
    config.use_cache = False
    # The constructor draws from the global generator what is overwritten below.
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # Residual branches shrink with depth, so that the stream's variance does not grow with it.
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, 0.02 / ((2 * layers) ** 0.5 if deep else 1.0), generator=generator)
    vendor = llada_vendor_config(model.config, family)
    return Denoiser(model.eval(), family, tokenizer, vendor)


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX}: not an index of shards; download it again.") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: shard '{missing[0]}' of {len(names)} is missing; download it again.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(f"{folder}: only pickle weights are here; unmask reads safetensors only (convert them).")
    raise CheckpointError(f"{folder}: there is no model.safetensors and no {INDEX}.")


def read_state(folder: Path, layout: Layout, config: Any, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return the stock state dict of a folder's shards, in `dtype` on `device` ("meta": names and shapes alone)."""
    meta = device == "meta"

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for shard in _shards(folder):
            try:
                with safe_open(shard, framework="pt", device="cpu" if meta else device) as file:
                    for key in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                        shape = file.get_slice(key).get_shape()
                        yield key, torch.empty(shape, device="meta") if meta else file.get_tensor(key)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{shard}: damaged or truncated safetensors ({error}); download it again."
                ) from error

    state: dict[str, Tensor] = {}
    for key, value in conversion.to_stock(layout, config, tensors()):
        if key in state:
            raise CheckpointError(f"{folder}: two tensors are '{layout.to_vendor(key)}'; is it another family?")
        state[key] = value.to(torch.float32 if key.endswith(FP32) else dtype)
    if config.tie_word_embeddings:
        for head in TIED:
            state.pop(head, None)
    return state


def _fill(model: Any, state: dict[str, Tensor], config: Any, device: str) -> None:
    """Give a model on the meta device its weights and buffers, without a second copy."""
    # Tensors mapped from a file begin anywhere in it, and a CPU's products depend on that in their last bits.
    state = {key: value if value.data_ptr() % ALIGNMENT == 0 else value.clone() for key, value in state.items()}
    # A tied head is not stored; every other name has been checked.
    model.load_state_dict(state, assign=True, strict=False)
    if config.tie_word_embeddings:
        model.tie_weights()
    # Buffers such as RoPE's inv_freq are not stored and must stay fp32: they are made anew, not cast.
    trunk = model.base_model
    with torch.device(device):
        trunk.rotary_emb = type(trunk.rotary_emb)(config)


def _check_keys(model: Any, state: dict[str, Tensor], layout: Layout, folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        for head in TIED:
            wanted.pop(head, None)
    for names, what in ((wanted.keys() - state.keys(), "missing"), (state.keys() - wanted.keys(), "too many")):
        if names:
            first, tensors = min(map(layout.to_vendor, names)), "tensor is" if len(names) == 1 else "tensors are"
            raise CheckpointError(f"{folder}: {len(names)} {tensors} {what}, first '{first}'; is it another family?")
    for name, shape in wanted.items():
        found = tuple(state[name].shape)
        if found != shape:
            raise CheckpointError(f"{folder}: '{layout.to_vendor(name)}' has shape {found}, config.json says {shape}.")
