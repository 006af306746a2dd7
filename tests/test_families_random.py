"""Families whose vendors' logits are not at hand: tiny random folders in their layout, against the stock class itself.

The reference is the stock class with an explicit mask for every query and key, and the shift written out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from unmask.policies.adapters import adapted_modules, attach_adapter, lora_config
from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import CheckpointError
from unmask.policies.loading import load_denoiser, tiny_folder
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.registry import RecipeError

ROWS, END, BLOCK = 272, 261, 4
SIZES = {"vocab_size": ROWS, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 128}
QWEN3 = {**SIZES, **HEADS, "head_dim": 16}
# What transformers 4 wrote, in whose time these folders were published.
OLD = {"rope_theta": 5e4, "rope_scaling": None, "torch_dtype": "float32", "transformers_version": "4.57.0"}
ROPE = {"rope_type": "default", "rope_theta": 5e4}


@dataclass(frozen=True)
class Case:
    """A published folder in small: its config.json, the stock class that computes it, and how it attends."""

    config: dict[str, Any]
    stock: Any
    stock_config: Any
    shift: int = 0
    block: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    turn_end: str = "<|im_end|>"


def qwen2(**more: Any) -> Any:
    return Qwen2Config(**SIZES, **HEADS, rope_parameters=ROPE, pad_token_id=None, **more)


QWEN3_STOCK = Qwen3Config(**QWEN3, rope_parameters=ROPE, tie_word_embeddings=True, pad_token_id=None)
BERT = {**SIZES, "num_attention_heads": 4, "local_attention": 6, "global_attn_every_n_layers": 3}
BERT_IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
BERT_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 16e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES: dict[str, Case] = {
    "a2d_mdlm-qwen3": Case(
        {"model_type": "a2d-qwen3", **QWEN3, **OLD, "tie_word_embeddings": True, "eos_token_id": 256},
        Qwen3ForCausalLM,
        QWEN3_STOCK,
        options={"family": "a2d_mdlm"},
    ),
    "a2d_mdlm-qwen2": Case(
        {"model_type": "a2d-qwen2", **SIZES, **HEADS, **OLD, "tie_word_embeddings": True, "eos_token_id": 256},
        Qwen2ForCausalLM,
        qwen2(tie_word_embeddings=True),
        options={"family": "a2d_mdlm"},
    ),
    "a2d_mdlm-llama": Case(
        {"model_type": "a2d-llama", **SIZES, **HEADS, **OLD, "tie_word_embeddings": False, "eos_token_id": 256},
        LlamaForCausalLM,
        LlamaConfig(**SIZES, **HEADS, rope_parameters=ROPE, tie_word_embeddings=False, pad_token_id=None),
        options={"family": "a2d_mdlm"},
    ),
    "a2d_bd3lm-qwen3": Case(
        {"model_type": "a2d-qwen3", **QWEN3, **OLD, "tie_word_embeddings": True, "eos_token_id": 256},
        Qwen3ForCausalLM,
        QWEN3_STOCK,
        block=BLOCK,
        options={"family": "a2d_bd3lm", "block_length": BLOCK},
    ),
    "fast_dllm_v2": Case(
        {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": BLOCK}
        | {**SIZES, **HEADS, **OLD, "tie_word_embeddings": False, "use_sliding_window": False, "eos_token_id": 256},
        Qwen2ForCausalLM,
        qwen2(tie_word_embeddings=False),
        shift=1,
        block=BLOCK,
    ),
    "open_dcoder": Case(
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES, **HEADS, **OLD}
        | {"tie_word_embeddings": True, "eos_token_id": 256},
        Qwen2ForCausalLM,
        qwen2(tie_word_embeddings=True),
        shift=1,
        options={"family": "open_dcoder"},
    ),
    "modernbert": Case(
        {"architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", **BERT, "torch_dtype": "float32"}
        | {"global_rope_theta": 16e4, "local_rope_theta": 1e4, "sep_token_id": END},
        ModernBertForMaskedLM,
        ModernBertConfig(**BERT, rope_parameters=BERT_ROPE, **BERT_IDS),
        turn_end="[SEP]",
    ),
}


def tokenizer_of(case: Case) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [case.turn_end]})
    assert tokenizer.convert_tokens_to_ids(case.turn_end) == END
    return tokenizer


def random_model(kind: Any, config: Any) -> Any:
    """Return the stock model with weights large enough for attention to matter."""
    with torch.random.fork_rng():
        model = kind(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.normal_(around, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Path]:
    """Return the case, the stock model and the folder that a vendor would have written."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("vendor")
    model = random_model(case.stock, case.stock_config)
    state = dict(model.state_dict())
    if case.stock_config.tie_word_embeddings:
        state = {key: value for key, value in state.items() if key not in ("lm_head.weight", "decoder.weight")}
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config))
    tokenizer_of(case).save_pretrained(folder)
    return case, model, folder


@torch.no_grad()
def reference(case: Case, model: Any, ids_BT: Tensor, sees: Callable[[int, int], bool]) -> Tensor:
    """Return the stock class's logits, row i for token i + shift, where query q attends to key k if `sees(q, k)`."""
    length = ids_BT.shape[1]
    seen = torch.tensor([[sees(q, k) for k in range(length)] for q in range(length)])
    if case.stock is ModernBertForMaskedLM:
        near = (torch.arange(length)[:, None] - torch.arange(length)).abs() <= BERT["local_attention"] // 2
        mask: Any = {"full_attention": seen[None, None], "sliding_attention": (seen & near)[None, None]}
    else:
        mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    return model(input_ids=ids_BT, attention_mask=mask).logits


def visible(case: Case) -> Callable[[int, int], bool]:
    return lambda q, k: case.block is None or q // case.block >= k // case.block


def apart(found_BTV: Tensor, raw_BTV: Tensor, shift: int) -> float:
    return (found_BTV[:, shift:] - raw_BTV[:, : raw_BTV.shape[1] - shift]).abs().max().item()


def some_ids(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(0, ROWS, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_logits_are_the_stock_classes(made: tuple[Case, Any, Path]) -> None:
    case, model, folder = made
    denoiser = load_denoiser(str(folder), **case.options)
    assert type(denoiser.model) is case.stock
    family = denoiser.family
    assert (family.logit_shift, family.block_length) == (case.shift, case.block)
    assert (family.mask_token_id, family.vocab_size) == (257, ROWS)
    ids = some_ids()
    raw = reference(case, model, ids, visible(case))
    found = denoiser.logits(ids)
    assert apart(found, raw, case.shift) <= 1e-5 * raw.abs().max()
    # The comparison has power: causal attention and the other shift are far off.
    assert apart(found, reference(case, model, ids, lambda q, k: k <= q), case.shift) > 0.5
    assert apart(found, raw, 1 - case.shift) > 0.5
    # Rows of other lengths, left-padded: to whole blocks where the family counts blocks from there.
    short = ids[:1, :11]
    padding = BLOCK if family.alignment == "left_pad_to_block" else 5
    padded = torch.cat([torch.full((1, padding), 9), short], dim=1)
    mask = torch.arange(padded.shape[1])[None] >= padding
    again = denoiser.logits(padded, padding_mask_BT=mask)[:, padding:]
    assert apart(again, reference(case, model, short, visible(case)), case.shift) <= 1e-5 * raw.abs().max()


@pytest.mark.parametrize("layout", ["vendor", "stock"])
@torch.no_grad()
def test_it_is_saved_and_read_again(made: tuple[Case, Any, Path], layout: str, tmp_path: Path) -> None:
    case, _, folder = made
    denoiser = load_denoiser(str(folder), **case.options)
    denoiser.save(tmp_path, layout=layout)
    written, published = (load_file(at / "model.safetensors") for at in (tmp_path, folder))
    assert written.keys() == published.keys(), "vendor and stock names are the same in these families"
    assert all(torch.equal(written[key], published[key]) for key in published)
    again: Denoiser = load_denoiser(str(tmp_path), **(case.options if layout == "vendor" else {}))
    assert again.family == (replace(denoiser.family, name="stock") if layout == "stock" else denoiser.family)
    assert torch.equal(again.logits(some_ids()), denoiser.logits(some_ids()))


@torch.no_grad()
def test_the_shipped_model_is_a_llama_under_lladas_names() -> None:
    denoiser, weights = load_denoiser("unmask:tiny"), load_file(tiny_folder() / "model.safetensors")
    facts = json.loads((tiny_folder() / "config.json").read_text())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=facts["vocab_size"],
            hidden_size=facts["d_model"],
            intermediate_size=facts["mlp_hidden_size"],
            num_hidden_layers=facts["n_layers"],
            num_attention_heads=facts["n_heads"],
            rms_norm_eps=facts["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": facts["rope_theta"]},
            tie_word_embeddings=False,
        )
    ).eval()
    own = model.model
    for n, layer in enumerate(own.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for name, module in (
            ("attn_norm", layer.input_layernorm),
            ("q_proj", attention.q_proj),
            ("k_proj", attention.k_proj),
            ("v_proj", attention.v_proj),
            ("attn_out", attention.o_proj),
            ("ff_norm", layer.post_attention_layernorm),
            ("ff_proj", mlp.gate_proj),
            ("up_proj", mlp.up_proj),
            ("ff_out", mlp.down_proj),
        ):
            module.weight.copy_(weights.pop(f"model.transformer.blocks.{n}.{name}.weight"))
    for name, module in (("wte", own.embed_tokens), ("ln_f", own.norm), ("ff_out", model.lm_head)):
        module.weight.copy_(weights.pop(f"model.transformer.{name}.weight"))
    assert not weights
    ids = torch.randint(0, 261, (2, 24), generator=torch.Generator().manual_seed(2))
    case = Case({}, LlamaForCausalLM, model.config)
    raw = reference(case, model, ids, lambda q, k: True)
    assert apart(denoiser.logits(ids), raw, 0) <= 1e-5 * raw.abs().max()
    assert apart(denoiser.logits(ids), reference(case, model, ids, lambda q, k: k <= q), 0) > 0.5


def test_in_bfloat16_frequencies_stay_in_float32(made: tuple[Case, Any, Path]) -> None:
    case, _, folder = made
    full, half = (load_denoiser(str(folder), dtype=dtype, **case.options) for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    exact = dict(full.base.base_model.rotary_emb.named_buffers())
    found = dict(half.base.base_model.rotary_emb.named_buffers())
    assert found.keys() == exact.keys() and all(torch.equal(found[name], exact[name]) for name in exact)


def test_its_adapter_is_on_every_linear_layer_but_the_head(made: tuple[Case, Any, Path]) -> None:
    case, _, folder = made
    denoiser = load_denoiser(str(folder), **case.options)
    linear = {name for name, module in denoiser.model.named_modules() if isinstance(module, torch.nn.Linear)}
    with pytest.raises(RecipeError, match="cannot be adapted; choose attention and MLP layers"):
        attach_adapter(denoiser, lora_config(denoiser, targets=["decoder" if "decoder" in linear else "lm_head"]))
    adapted = attach_adapter(denoiser, lora_config(denoiser, rank=2))
    assert set(adapted_modules(adapted.model)) == linear - {"lm_head", "decoder", "head.dense"}


def test_what_only_the_user_can_tell(made: tuple[Case, Any, Path]) -> None:
    case, _, folder = made
    if "family" not in case.options:
        return
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(str(folder))
    if case.options["family"] == "open_dcoder":
        assert "is an autoregressive model" in str(caught.value) and "open_dcoder" in str(caught.value)
    else:
        assert "is published for several; set model.family=a2d_mdlm or a2d_bd3lm" in str(caught.value)
