"""Saving a denoiser as a folder that the vendor's code, or plain transformers, reads."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from . import conversion
from .families import LAYOUTS
from .layout import CheckpointError, Family

if TYPE_CHECKING:
    from .denoiser import Denoiser

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
TIED = ("lm_head.weight", "decoder.weight")  # the output matrix, which is not stored where it is the embedding


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `directory` which takes its place at the end; after an error neither is left."""
    directory = directory.expanduser().absolute()
    unfinished = directory.with_name(f".{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        mode = _usual_mode(unfinished)
        for path in unfinished.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _usual_mode(folder: Path) -> int:
    """Return the mode of a new file in `folder`; safetensors writes for the owner alone, whatever the umask says."""
    file = folder / ".mode"
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    file.unlink()
    return mode


def save_denoiser(denoiser: Denoiser, directory: str | Path, *, layout: str = "vendor") -> None:
    """Write `denoiser` (no adapter on it): config, safetensors, tokenizer.

    `layout` "vendor" gives the folder its published names and config; "stock" those of the transformers class, with a
    section `unmask` in config.json that says how it attends, so that it loads again without its family.
    """
    if layout not in ("vendor", "stock"):
        raise CheckpointError(f"save: layout '{layout}' is neither vendor nor stock.")
    if denoiser.base is not denoiser.model:
        raise CheckpointError("save: the model carries an adapter; merge it first or save the adapter alone.")
    if getattr(denoiser.model, "is_quantized", False):
        raise CheckpointError("save: the weights are in 4 bits; save the adapter, or export it into the full base.")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = denoiser.model.config
    stock = denoiser.model.state_dict()
    if config.tie_word_embeddings:
        stock = {key: value for key, value in stock.items() if key not in TIED}
    named = stock if layout == "stock" else conversion.to_vendor(LAYOUTS[denoiser.family.name], config, stock)
    state = {key: value.detach().cpu().contiguous() for key, value in named.items()}
    _write_weights(state, folder)
    written = stock_json(denoiser) if layout == "stock" else dict(denoiser.vendor_config)
    written["torch_dtype"] = str(config.dtype or next(iter(state.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    denoiser.tokenizer.save_pretrained(folder)


def stock_json(denoiser: Denoiser) -> dict[str, Any]:
    """Return the config.json of the stock layout."""
    family = {key: value for key, value in asdict(denoiser.family).items() if key not in ("name", "vocab_size")}
    config = denoiser.model.config.to_dict()
    return {**config, "architectures": [type(denoiser.model).__name__], "unmask": family}


def llada_vendor_config(stock: Any, family: Family) -> dict[str, Any]:
    """Return LLaDA's config.json for a stock LlamaConfig (used for models that unmask makes itself)."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rms_norm_eps": stock.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": stock.rope_parameters["rope_theta"],
        "activation_type": stock.hidden_act,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "alibi": False,
        "d_model": stock.hidden_size,
        "n_layers": stock.num_hidden_layers,
        "n_heads": stock.num_attention_heads,
        "n_kv_heads": stock.num_key_value_heads,
        "mlp_hidden_size": stock.intermediate_size,
        "mlp_ratio": 4,
        "vocab_size": stock.vocab_size,
        "embedding_size": stock.vocab_size,
        "weight_tying": stock.tie_word_embeddings,
        "max_sequence_length": stock.max_position_embeddings,
        "mask_token_id": family.mask_token_id,
        "eos_token_id": family.eos_token_ids[0],
        "pad_token_id": family.eos_token_ids[0],
        "init_std": stock.initializer_range,
        "use_cache": False,
        "torch_dtype": str(stock.dtype or "float32").removeprefix("torch."),
    }


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
    mode = _usual_mode(folder)
    for name, shard in zip(names, shards, strict=True):
        # The folder may be the one these very tensors are mapped from.
        part = folder / f"{name}.part"
        save_file(shard, part, metadata={"format": "pt"})
        part.chmod(mode)
        part.replace(folder / name)
    (folder / INDEX).unlink(missing_ok=True)
    for path in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors"):
        if path.name not in names:
            path.unlink(missing_ok=True)
    if count > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(value.nbytes for value in state.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
