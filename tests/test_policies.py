"""The byte tokenizer and templates, new denoisers, and frozen references."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import CheckpointError
from unmask.policies.loading import load_denoiser, new_denoiser
from unmask.policies.reference import AdapterOff, build_reference
from unmask.policies.selfcheck import self_check
from unmask.policies.templates import TEMPLATES
from unmask.policies.tokenizers import (
    BYTE_TEMPLATE,
    byte_symbols,
    byte_tokenizer,
    completion_ids,
    load_tokenizer,
    prompt_ids,
    read_tokenizer,
)
from unmask.recipes.registry import RecipeError

SIZE = {"hidden_size": 32, "layers": 2, "heads": 2, "mlp": 64}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": " and 2+2?\n"},
]


# --- The byte tokenizer ----------------------------------------------------------------------------------------------


def test_ids_are_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 261
    specials = ["<|eos|>", "<|mask|>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [256, 257, 258, 259, 260]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (256, 256, 257)
    assert tokenizer.padding_side == "left"
    assert tokenizer.convert_tokens_to_ids(byte_symbols()) == list(range(256))
    assert len(set(byte_symbols())) == 256


def test_every_text_survives() -> None:
    """Every byte that UTF-8 has, in texts of every script, white space and control characters included."""
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x3000 + 0xE000), 0x1F600, 0x10FFFF)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert set(range(256)) - set(ids) <= {0xC0, 0xC1, *range(0xF1, 0x100)}
    assert tokenizer.decode(ids) == text
    for short in ("", " ", "  a", "a  ", "\n\n", "\t1 . 2 , 3 !", " '#### 5'", "don 't", "\x00\x7f\r\n"):
        ids = tokenizer(short, add_special_tokens=False)["input_ids"]
        assert ids == list(short.encode())
        assert tokenizer.decode(ids) == short


def test_every_byte_survives_alone_and_broken_utf8_is_shown() -> None:
    tokenizer = byte_tokenizer()
    for byte in range(256):
        assert tokenizer.decode([byte]) == bytes([byte]).decode(errors="replace")
    assert tokenizer.decode([0xE2, 0x82, 65]) == b"\xe2\x82A".decode(errors="replace")


def test_special_tokens_are_one_id_and_can_be_left_out() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a<|mask|>b<|eos|>", add_special_tokens=False)["input_ids"]
    assert ids == [97, 257, 98, 256]
    assert tokenizer.decode(ids) == "a<|mask|>b<|eos|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_template_marks_what_the_assistant_says() -> None:
    tokenizer = byte_tokenizer()
    encoded = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert tokenizer.decode(ids) == ("<|system|>Be brief.<|user|>1+1=?<|assistant|>2<|eos|><|user|> and 2+2?\n"), (
        "no assistant's turn is opened unless it is asked for"
    )
    assert [i for i, m in zip(ids, mask, strict=True) if m] == [ord("2"), 256]


def test_the_generation_prompt_is_honoured() -> None:
    tokenizer = byte_tokenizer()
    without = tokenizer.apply_chat_template(TALK, tokenize=False)
    with_it = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert with_it == without + "<|assistant|>"


def test_prompts_and_completions() -> None:
    tokenizer = byte_tokenizer()
    assert prompt_ids(tokenizer, "hé") == [259, *"hé".encode(), 260]
    assert prompt_ids(tokenizer, "hé") == prompt_ids(tokenizer, [{"role": "user", "content": "hé"}])
    assert completion_ids(tokenizer, "5\n#### 5", 256) == [*b"5\n#### 5", 256]
    # A prompt and its completion are the template's rendering of the two turns.
    talk = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    assert (
        prompt_ids(tokenizer, "1+1=") + completion_ids(tokenizer, "2", 256)
        == tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    )


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    denoiser = new_denoiser(**SIZE)
    denoiser.save(tmp_path)
    loaded = load_denoiser(str(tmp_path)).tokenizer
    assert loaded.get_vocab() == byte_tokenizer().get_vocab()
    assert loaded.chat_template == BYTE_TEMPLATE
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.mask_token_id) == (256, 256, 257)
    assert loaded.padding_side == "left"
    text = "  two spaces, a tab\t and \n\n."
    assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
    assert prompt_ids(loaded, TALK) == prompt_ids(byte_tokenizer(), TALK)


def test_folders_without_tokenizer_files_get_bytes_when_the_ids_fit(tmp_path: Path) -> None:
    family = new_denoiser(**SIZE).family
    assert load_tokenizer(tmp_path, None, family, "llada").get_vocab() == byte_tokenizer().get_vocab()


def test_dreams_vocabulary_and_merges_are_read_as_qwens(tmp_path: Path) -> None:
    """Dream ships no tokenizer.json, and a tokenizer class of its own, whose code is not run."""
    words = [*byte_symbols(), "he", "ll", "hell", "12", "'ll"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n1 2\n' ll\n")
    special = {"<|endoftext|>": 261, "<|im_start|>": 262, "<|im_end|>": 263, "<|beginoftext|>": 264, "<|mask|>": 265}
    settings = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.X", None]}}
    settings |= {"mask_token": "<|mask|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings["added_tokens_decoder"] = {str(i): {"content": token, "special": True} for token, i in special.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path, read_tokenizer(tmp_path), new_denoiser(**SIZE).family, "chatml_helpful")
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (265, 261, 261)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids("hello<|mask|>") == [258, ord("o"), 265]
    assert ids("12") == [ord("1"), ord("2")], "digits are never merged"
    assert ids("he'll") == [256, 260]
    assert ids("e\u0301") == ids("\u00e9"), "NFC"
    text = prompt_ids(tokenizer, "hello")
    assert tokenizer.decode(text).endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.save_pretrained(tmp_path / "again")
    again = read_tokenizer(tmp_path / "again")
    assert again is not None and prompt_ids(again, "hello 12") == prompt_ids(tokenizer, "hello 12")


# --- LLaDA's template ------------------------------------------------------------------------------------------------

# bos, then per message header, two newlines, trimmed content, <|eot_id|> (reference/models.md section 1).
LLADA_TEXT = (
    "<|startoftext|>"
    "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n1+1=?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nand 2+2?<|eot_id|>"
)
LLADA_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.fixture
def llada_tokenizer(tmp_path: Path):
    """The byte tokenizer with LLaDA's special tokens and a foreign template, through the loader."""
    tokenizer = byte_tokenizer()
    tokens = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    return load_tokenizer(tmp_path, read_tokenizer(tmp_path), new_denoiser(**SIZE).family, "llada")


def test_llada_template(llada_tokenizer) -> None:
    assert llada_tokenizer.chat_template == TEMPLATES["llada"].jinja
    assert llada_tokenizer.apply_chat_template(TALK, tokenize=False) == LLADA_TEXT
    prompt = llada_tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert prompt == LLADA_TEXT + LLADA_HEADER
    assert llada_tokenizer.decode(prompt_ids(llada_tokenizer, TALK)) == prompt


def test_llada_template_marks_what_the_assistant_says(llada_tokenizer) -> None:
    encoded = llada_tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert llada_tokenizer.decode(said) == "2<|eot_id|>"
    untidy = [{**message, "content": f" {message['content']}\n"} for message in TALK]
    assert llada_tokenizer.apply_chat_template(untidy, tokenize=False) == LLADA_TEXT


# --- New denoisers ---------------------------------------------------------------------------------------------------


def test_new_denoisers_are_keyed_by_their_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (new_denoiser(**SIZE, seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.rand(1)
    again = new_denoiser(**SIZE, seed=3).model.state_dict()
    for key, value in one.items():
        assert torch.equal(value, same[key])
        assert torch.equal(value, again[key])
        assert value.ndim == 1 or not torch.equal(value, other[key])


def test_new_denoisers_initialise_residual_branches_by_depth() -> None:
    state = new_denoiser(hidden_size=128, layers=2, heads=2, mlp=256).model.state_dict()
    assert state["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["model.layers.1.self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["model.layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert (state["model.norm.weight"] == 1).all()


def test_new_denoisers_pass_the_self_check_and_come_back_bit_equal(tmp_path: Path) -> None:
    denoiser = new_denoiser(**SIZE, max_length=64, rope_theta=5e3)
    self_check(denoiser)
    denoiser.save(tmp_path)
    loaded = load_denoiser(str(tmp_path))
    ids = torch.randint(0, 261, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.logits(ids), denoiser.logits(ids))
    assert loaded.family == denoiser.family
    assert loaded.vendor_config == denoiser.vendor_config
    assert "model.transformer.blocks.1.ff_proj.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("size", [{"hidden_size": 33}, {"hidden_size": 6, "heads": 2}])
def test_new_denoisers_refuse_heads_that_do_not_divide(size: dict) -> None:
    with pytest.raises(CheckpointError, match=r"hidden_size \d+ must be an even multiple of heads 2"):
        new_denoiser(**{**SIZE, **size})


# --- References ------------------------------------------------------------------------------------------------------


def policy(adapter: bool) -> Denoiser:
    from unmask.policies.adapters import attach_adapter, lora_config

    denoiser = new_denoiser(**SIZE)
    if not adapter:
        return denoiser
    denoiser = attach_adapter(denoiser, lora_config(denoiser, rank=4))
    with torch.no_grad():
        for name, parameter in denoiser.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    return denoiser


IDS = torch.tensor([[1, 2, 257, 257], [5, 257, 7, 257]])


def test_the_adapter_off_is_the_base_model() -> None:
    """Also after the adapter has moved, with padding and positions, without gradient, and it is on again afterwards."""
    base, adapted = new_denoiser(**SIZE), policy(adapter=True)
    reference = build_reference(adapted, "auto", beta=0.1)
    assert isinstance(reference, AdapterOff)
    assert reference.family == adapted.family
    mask_BT = torch.tensor([[False, True, True, True], [True] * 4])
    options = {"padding_mask_BT": mask_BT, "positions_BT": IDS == 257}
    found_KV = reference.logits(IDS, **options)
    assert torch.equal(found_KV, base.logits(IDS, **options))
    assert not found_KV.requires_grad
    moved_KV = adapted.logits(IDS, **options)
    assert (moved_KV - found_KV).abs().max() > 1e-2
    assert moved_KV.requires_grad


@pytest.mark.parametrize("adapter", [False, True])
def test_a_frozen_copy_stays_where_it_was(adapter: bool) -> None:
    denoiser = policy(adapter)
    reference = build_reference(denoiser, "frozen_copy", beta=0.1)
    before = denoiser.logits(IDS).detach()
    with torch.no_grad():
        for parameter in denoiser.model.parameters():
            parameter.add_(0.1)
    assert torch.equal(reference.logits(IDS), before)
    assert not torch.equal(denoiser.logits(IDS), before)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    assert any(parameter.requires_grad for parameter in denoiser.model.parameters())


def test_which_reference() -> None:
    plain = policy(adapter=False)
    assert isinstance(build_reference(plain, "auto", beta=0.1), Denoiser)
    assert build_reference(plain, "none", beta=0.1) is None
    assert build_reference(plain, "auto", beta=0.0) is None
    with pytest.raises(RecipeError, match=r"adapter_off needs model.lora; use frozen_copy without an adapter"):
        build_reference(plain, "adapter_off", beta=0.1)
    with pytest.raises(RecipeError, match=r"'copy' is not one of auto, adapter_off, frozen_copy, old, none"):
        build_reference(plain, "copy", beta=0.1)
