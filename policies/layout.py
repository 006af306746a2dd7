"""The words in which a family is described: `Layout`, a published folder's shape; `Family`, one loaded denoiser's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")
# What a config.json says about files and code, not about the model; ids go to Family, not to the stock config.
NOT_STOCK = {
    *("architectures", "model_type", "auto_map", "dtype", "torch_dtype", "transformers_version", "unmask"),
    *("pad_token_id", "mask_token_id", "_name_or_path"),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as a denoiser; the message names file, rule and remedy."""


@dataclass(frozen=True)
class Family:
    """What is particular to one loaded denoiser; ids are those of its own vocabulary.

    `attention` is full or block_causal (blocks of `block_length`, counted from a row's first token; bidirectional
    inside). `logit_shift` 1: the raw model's row i predicts token i + 1. `alignment` says how a prompt that is no
    multiple of the block is treated: its rest shares a block with the completion, or it is left-padded to a multiple.
    A completion ends with the first of `eos_token_ids` that it has. An assistant's turn is trained to end with
    `turn_end_id` (None: EOS), and behind it `eos_token_ids[0]`, the plain EOS, pads.
    """

    name: str
    vocab_size: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    turn_end_id: int | None = None
    attention: str = "full"
    block_length: int | None = None
    logit_shift: int = 0
    alignment: str = "shared_block"
    lora_targets: tuple[str, ...] = LINEAR_TARGETS
    mixture: bool = False

    @property
    def end_id(self) -> int:
        """The id that ends a reply in training."""
        return self.eos_token_ids[0] if self.turn_end_id is None else self.turn_end_id

    @property
    def prompt_multiple(self) -> int:
        """What the width of a batch of prompts is a multiple of: a block, where prompts are padded to whole blocks."""
        return (self.block_length or 1) if self.alignment == "left_pad_to_block" else 1


@dataclass(frozen=True)
class Layout:
    """How a vendor's folder is laid out: which configs it matches, and how they and the tensors translate.

    `stock` names the stock class (loading.CLASSES; empty: as the config's model_type says). `fields` holds (stock
    field, vendor fields: the first that is set counts), `optional` those that may be missing, `constants` what the
    stock config always gets, `derive` computes the rest; without `fields` the folder's config is the stock class's own.
    `names` holds (vendor's start of a tensor's name, the stock class's), `*` standing for a layer's or expert's number;
    it is read in both directions, so that a saved model is again what the vendor's code reads. `experts` are stacked
    and `fused_qkv` is split besides. `requires` lists the config values that the stock class can represent.
    `published` are ids and block length that config.json lacks: shown in the error that asks for them, never assumed.
    Besides config.json's EOS, completions end with `turn_end_ids` and `turn_end_tokens` (the first of them ends a turn)
    and with `eos_tokens` (which come before it), where the vocabulary has them.
    """

    name: str
    stock: str
    fields: tuple[tuple[str, tuple[str, ...]], ...]
    architectures: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset({"initializer_range", "tie_word_embeddings", "hidden_act", "attention_bias"})
    constants: tuple[tuple[str, Any], ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    experts: bool = False
    fused_qkv: bool = False
    requires: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    attention: str = "full"
    logit_shift: int = 0
    alignment: str = "shared_block"
    turn_end_ids: tuple[int, ...] = ()
    turn_end_tokens: tuple[str, ...] = ()
    eos_tokens: tuple[str, ...] = ()
    published: tuple[tuple[str, int], ...] = ()
    template: str | None = None
    lora_targets: tuple[str, ...] = LINEAR_TARGETS
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def to_stock(self, key: str) -> str:
        """Return the stock name of a vendor's weight (conversion.py splits and stacks what is more than a name)."""
        return _renamed(key, self.names)

    def to_vendor(self, key: str) -> str:
        """Return the vendor's name of a stock weight."""
        return _renamed(key, tuple((stock, vendor) for vendor, stock in self.names))

    def stock_config(self, vendor: Mapping[str, Any]) -> dict[str, Any]:
        """Return the stock config's fields; raises KeyError for a field that the vendor's config lacks."""
        values: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
        if not self.fields:
            return {key: value for key, value in vendor.items() if key not in NOT_STOCK} | values
        for field, sources in self.fields:
            found = [vendor[source] for source in sources if vendor.get(source) is not None]
            if found:
                values[field] = found[0]
            elif field not in self.optional:
                raise KeyError(sources[0])
        if "rope_parameters" not in dict(self.constants):
            scaling = vendor.get("rope_scaling") or {"rope_type": "default"}
            kept = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
            values["rope_parameters"] = {**kept, "rope_theta": float(vendor["rope_theta"])}
            if partial := vendor.get("partial_rotary_factor"):
                values["rope_parameters"]["partial_rotary_factor"] = partial
        return values | dict(self.constants) | (self.derive(vendor) if self.derive else {})


def _renamed(key: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Return `key` with its start replaced by the first pair that fits it up to a dot."""
    for old, new in pairs:
        found = re.match(re.escape(old).replace(r"\*", r"(\d+)") + r"(?=\.|$)", key)
        if found is not None:
            return new.replace("*", "{}").format(*found.groups()) + key[found.end() :]
    return key


def same(names: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return fields that the vendor calls as the stock class does."""
    return tuple((name, (name,)) for name in names.split())
