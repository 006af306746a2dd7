"""Denoiser: a stock transformers model that gives aligned logits at chosen positions, loaded from vendor folders."""

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
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from .families import (
    LAYOUTS,
    CheckpointError,
    Family,
    Layout,
    check_config,
    find_layout,
    llada_vendor_config,
    read_config,
    resolve_family,
)
from .selfcheck import self_check
from .tokenizers import byte_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)
TINY = "unmask:tiny"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30


@dataclass
class Denoiser:
    """A bidirectional model with its family, tokenizer and the config it was published with.

    `model` is a stock `LlamaForCausalLM` or a `PeftModel` around one; everything else of unmask sees only `logits`.
    """

    model: Any
    family: Family
    tokenizer: PreTrainedTokenizerBase
    vendor_config: dict[str, Any]

    @property
    def base(self) -> Any:
        """The stock model, with adapter layers in place when there are any."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def hidden(self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None) -> Tensor:
        """Return the trunk's last hidden states `[B, T, D]`; padded keys are not attended."""
        # Without padding the mask stays None, the only form in which SDPA may use its flash kernel.
        mask = None if padding_mask_BT is None else padding_mask_BT.to(torch.long)
        return self.base.get_decoder()(input_ids=input_ids_BT, attention_mask=mask, use_cache=False).last_hidden_state

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Return fp32 logits whose row i scores the token *at* position i.

        Shapes: `[B, T, V]`, or `[K, V]` for the K true entries of `positions_BT` in row-major order; the rows are
        selected before the LM head, so no B x T x V tensor exists then.
        """
        hidden = self.hidden(input_ids_BT, padding_mask_BT=padding_mask_BT)
        if positions_BT is not None:
            hidden = hidden[positions_BT]
        return self.base.get_output_embeddings()(hidden).float()

    def save(self, directory: str | Path) -> None:
        """Write config, weights and tokenizer in the vendor's layout (adapters must be merged before)."""
        save_denoiser(self, directory)


def tiny_folder() -> Path:
    """Return the folder of the shipped tiny model."""
    return Path(__file__).resolve().parent.parent / "recipes" / "tiny"


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
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
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


def stock_config(layout: Layout, vendor: dict[str, Any], attention: str | None) -> LlamaConfig:
    """Return the stock config: bidirectional, and without pad_token_id, which would zero that row's gradient."""
    try:
        config = LlamaConfig(**layout.stock_config(vendor), pad_token_id=None)
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error}, which family '{layout.name}' needs.") from error
    except (TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json: {' '.join(str(error).split())}") from error
    config.is_causal = False
    config.use_cache = False
    if attention is not None:
        config._attn_implementation = attention
    return config


def load_denoiser(
    path: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    family: str | None = None,
    attention: str | None = None,
    mask_token_id: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Denoiser:
    """Load a checkpoint folder, hub id or `unmask:tiny` onto its stock class, then prove what it must satisfy.

    Raises CheckpointError on unknown families, pickle weights, truncated shards, missing or extra or misshapen
    tensors, bad mask ids, and when the model turns out causal or sensitive to padding.
    """
    folder = resolve_path(path)
    vendor = read_config(folder)
    layout = find_layout(vendor, family)
    check_config(vendor, layout)
    resolved = resolve_family(vendor, layout, mask_token_id)
    config = stock_config(layout, vendor, attention)
    torch_dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch_dtype)
    state = dict(_read_weights(folder, layout, torch_dtype, device))
    _check_keys(model, state, layout, folder)
    # A tied head is not stored; every other name has been checked.
    model.load_state_dict(state, assign=True, strict=False)
    if config.tie_word_embeddings:
        model.tie_weights()
    # Buffers such as RoPE's inv_freq are not stored and must stay fp32: they are made anew, not cast.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.config.dtype = torch_dtype
    vendor = {**vendor, "mask_token_id": resolved.mask_token_id}
    denoiser = Denoiser(model.eval(), resolved, tokenizer or load_tokenizer(folder, resolved), vendor)
    self_check(denoiser)
    return denoiser


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


def _read_weights(folder: Path, layout: Layout, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor]]:
    for shard in _shards(folder):
        try:
            with safe_open(shard, framework="pt", device=device) as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                    yield layout.to_stock(key), file.get_tensor(key).to(dtype)
        except SafetensorError as error:
            raise CheckpointError(f"{shard}: damaged or truncated safetensors ({error}); download it again.") from error


def _check_keys(model: LlamaForCausalLM, state: dict[str, Tensor], layout: Layout, folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
        state.pop("lm_head.weight", None)
    for names, what in ((wanted.keys() - state.keys(), "are missing"), (state.keys() - wanted.keys(), "fit nothing")):
        if names:
            first = min(map(layout.to_vendor, names))
            raise CheckpointError(f"{folder}: {len(names)} tensors {what}, first '{first}'; is it another family?")
    for name, shape in wanted.items():
        found = tuple(state[name].shape)
        if found != shape:
            raise CheckpointError(f"{folder}: '{layout.to_vendor(name)}' has shape {found}, config.json says {shape}.")


def save_denoiser(denoiser: Denoiser, directory: str | Path) -> None:
    """Write `denoiser` (no adapter on it) as a folder in its vendor's layout: config, safetensors, tokenizer."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    layout = LAYOUTS[denoiser.family.name]
    if denoiser.base is not denoiser.model:
        raise CheckpointError("save: the model carries an adapter; merge it first or save the adapter alone.")
    stock = denoiser.model.state_dict()
    if denoiser.model.config.tie_word_embeddings:
        del stock["lm_head.weight"]
    state = {layout.to_vendor(key): value.detach().cpu().contiguous() for key, value in stock.items()}
    _write_weights(state, folder)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config = {**denoiser.vendor_config, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    denoiser.tokenizer.save_pretrained(folder)


def _write_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Write shards of at most `SHARD_BYTES`, and an index where there are several; remove those of an earlier save."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in state.items():
        if size + value.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        # The folder may be the one these very tensors are mapped from.
        save_file(shard, folder / f"{name}.part", metadata={"format": "pt"})
        (folder / f"{name}.part").replace(folder / name)
    (folder / INDEX).unlink(missing_ok=True)
    for path in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors"):
        if path.name not in names:
            path.unlink(missing_ok=True)
    if count > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(value.nbytes for value in state.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
