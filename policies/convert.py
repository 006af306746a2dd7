"""`unmask convert`: an autoregressive checkpoint becomes a denoiser folder, ready for `unmask sft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .denoiser import Denoiser
from .layout import LINEAR_TARGETS, CheckpointError, Family
from .loading import CLASSES, load_denoiser, may_be_hub_id
from .resolving import read_config
from .saving import whole_folder

MASK_TOKEN = "<|mask|>"
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
CONVERTIBLE = ("llama", "qwen2", "qwen3")


def convert(
    source: str,
    to: Path,
    *,
    attention: str = "full",
    block_length: int | None = None,
    logit_shift: int = 0,
    dtype: str = "float32",
) -> Denoiser:
    """Write `source` as a denoiser in the new folder `to` and return it loaded.

    `source` is a folder, hub id or .gguf file of a Llama (SmolLM2), Qwen2 or Qwen3 model. A mask token is added (its
    embedding the mean of all), attention becomes `full` or `block_causal` in blocks of `block_length`, and
    `logit_shift` 1 keeps predicting token i + 1 at position i as the autoregressive model did. The folder has the stock
    class's layout. Raises CheckpointError for other architectures and contradictory choices.
    """
    family = _choices(attention, block_length, logit_shift)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"convert: '{to}' is not empty; name a new folder.")
    model, tokenizer = _autoregressive(source, getattr(torch, dtype))
    kind = model.config.model_type
    mask = _mask_token(tokenizer)
    if mask >= model.get_input_embeddings().num_embeddings:
        # The new row is the mean of all, so that the first forward is in distribution.
        model.resize_token_embeddings(mask + 1, mean_resizing=False)
        with torch.no_grad():
            for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
                module.weight[mask] = module.weight[:mask].float().mean(dim=0).to(module.weight.dtype)
    config = CLASSES[kind][0].from_dict({k: v for k, v in model.config.to_dict().items() if k not in DROPPED})
    config.is_causal, config.use_cache, config.pad_token_id = False, False, None
    fresh = CLASSES[kind][1](config).to(getattr(torch, dtype))
    fresh.load_state_dict(model.state_dict())
    config.dtype = getattr(torch, dtype)
    vocabulary = tokenizer.get_vocab()
    turn = [vocabulary[token] for token in TURN_ENDS if token in vocabulary]
    resolved = Family(
        name="stock",
        vocab_size=model.get_input_embeddings().num_embeddings,
        mask_token_id=mask,
        eos_token_ids=tuple(dict.fromkeys([tokenizer.eos_token_id, *turn])),
        turn_end_id=turn[0] if turn else None,
        lora_targets=LINEAR_TARGETS,
        **family,
    )
    with whole_folder(to) as unfinished:
        Denoiser(fresh.eval(), resolved, tokenizer).save(unfinished, layout="stock")
        return load_denoiser(str(unfinished), dtype=dtype)


DROPPED = {"quantization_config", "architectures", "pad_token_id", "dtype", "torch_dtype", "transformers_version"}


def _choices(attention: str, block_length: int | None, logit_shift: int) -> dict[str, Any]:
    if attention not in ("full", "block_causal"):
        raise CheckpointError(f"convert: attention '{attention}' is neither full nor block_causal.")
    if (attention == "block_causal") != (block_length is not None):
        raise CheckpointError("convert: --block-length goes with --attention block_causal, and only with it.")
    if block_length is not None and block_length < 1:
        raise CheckpointError(f"convert: block length {block_length} must be at least 1.")
    if logit_shift not in (0, 1):
        raise CheckpointError(f"convert: logit shift {logit_shift} is neither 0 (this token) nor 1 (the next).")
    return {"attention": attention, "block_length": block_length, "logit_shift": logit_shift}


def _autoregressive(source: str, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) of an autoregressive folder, hub id or GGUF file; never any of its code."""
    path, options = Path(source).expanduser(), dict[str, Any]()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"convert: there is no file '{source}'.")
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise CheckpointError(
                "convert: reading GGUF needs the gguf package; pip install 'unmask[gguf]'."
            ) from error
        path, options = path.parent, {"gguf_file": path.name}
    elif path.is_dir():
        read_config(path)
        if not any(path.glob("*.safetensors")):
            raise CheckpointError(f"convert: '{source}' holds no safetensors; pickle weights are not read.")
    elif not may_be_hub_id(source):
        raise CheckpointError(f"convert: there is no folder '{source}' (a hub id looks like OWNER/NAME).")
    name = str(path) if path.is_dir() else source
    try:
        kind = AutoConfig.from_pretrained(name, **options).model_type
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"convert: '{source}' is no folder, hub id or GGUF file of a model ({reason})."
        ) from error
    if kind not in CONVERTIBLE:
        raise CheckpointError(f"convert: model_type '{kind}' is not among {', '.join(CONVERTIBLE)}.")
    safe = {} if options else {"use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options, **safe)
    return model, AutoTokenizer.from_pretrained(name, **options)


def _mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the mask id, adding a special token when the vocabulary has none."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    tokenizer.padding_side = "left"
    assert isinstance(tokenizer.mask_token_id, int)
    return tokenizer.mask_token_id
