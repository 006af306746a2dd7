"""Every family against the logits of its vendor's own code, behind the cache, over [x_t ; x_0], and saved again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask.policies import loading
from unmask.policies.blocks import doubled_mask
from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import CheckpointError
from unmask.policies.loading import load_denoiser
from unmask.policies.tokenizers import byte_tokenizer

GOLDEN = Path(__file__).parent / "fixtures"
FAMILIES = ("llada", "dream", "sdar", "sdar_moe", "llada_moe", "llada2", "rnd1")
BLOCKS = ("sdar", "sdar_moe", "llada2")
TOLERANCE = 1e-4


def described(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "golden.json").read_text())


def stored(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "golden.safetensors")


def load(name: str, **options: Any) -> Denoiser:
    facts = described(name)
    given = {"mask_token_id": facts["mask_token_id"], "block_length": facts["block_length"]}
    return load_denoiser(str(GOLDEN / name), tokenizer=byte_tokenizer(), **(given | options))


def raw_difference(found_BTV: Tensor, raw_BTV: Tensor, shift: int, kept_BT: Tensor | None = None) -> float:
    """Return the largest difference between aligned rows and the vendor's raw ones, on real tokens."""
    length = raw_BTV.shape[1] - shift
    apart_BT = (found_BTV[:, shift:] - raw_BTV[:, :length]).abs().amax(dim=-1)
    return (apart_BT if kept_BT is None else apart_BT * kept_BT[:, :length]).max().item()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Denoiser]:
    return request.param, load(request.param)


@torch.no_grad()
def test_logits_are_the_vendors(family: tuple[str, Denoiser]) -> None:
    name, denoiser = family
    tensors, facts = stored(name), described(name)
    shift = denoiser.family.logit_shift
    assert (shift, denoiser.family.attention) == (facts["logit_shift"], facts["attention"])
    found = denoiser.logits(tensors["input_ids"])
    assert raw_difference(found, tensors["logits"], shift) <= TOLERANCE
    # The test has power: with the other attention the same comparison fails by far.
    denoiser.base.config.is_causal = True
    if denoiser.family.attention == "full":
        wrong = denoiser.logits(tensors["input_ids"])
    else:
        full = replace(denoiser, family=replace(denoiser.family, attention="full", block_length=None))
        wrong = full.logits(tensors["input_ids"])
    denoiser.base.config.is_causal = False
    assert raw_difference(wrong, tensors["logits"], shift) > 0.5


@torch.no_grad()
def test_selected_rows_are_rows_of_the_whole(family: tuple[str, Denoiser]) -> None:
    name, denoiser = family
    ids = stored(name)["input_ids"]
    positions_BT = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    whole, chosen = denoiser.logits(ids), denoiser.logits(ids, positions_BT=positions_BT)
    assert torch.allclose(whole[positions_BT], chosen, atol=1e-5)


@pytest.mark.parametrize("name", ["llada", "dream", "llada_moe", "rnd1"])
@torch.no_grad()
def test_padded_logits_are_the_vendors(name: str) -> None:
    denoiser, tensors = load(name), stored(name)
    mask_BT, shift = tensors["padding_mask"].bool(), denoiser.family.logit_shift
    ids, positions = tensors["padded_input_ids"], tensors.get("padded_position_ids")
    found = denoiser.logits(ids, padding_mask_BT=mask_BT, position_ids_BT=positions)
    assert raw_difference(found, tensors["padded_logits"], shift, mask_BT) <= TOLERANCE
    wrong = denoiser.logits(ids, position_ids_BT=positions)
    assert raw_difference(wrong, tensors["padded_logits"], shift, mask_BT) > 0.5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["sdar", "sdar_moe"])
@torch.no_grad()
def test_cached_block_decoding_is_the_vendors(name: str, attention: str) -> None:
    denoiser, tensors = load(name, attention=attention), stored(name)
    (case,) = [case for case in described(name)["cases"] if "steps" in case]
    cache = denoiser.new_cache()
    assert cache is not None
    for step in case["steps"]:
        first, last = step.get("columns", (0, None))
        before = len(cache)
        found = denoiser.logits(tensors[step["ids"]][:, first:last], cache=cache, commit=step["store"])
        assert (found - tensors[step["logits"]]).abs().max() <= TOLERANCE, step
        if before:  # the same block alone, without what is stored
            blind = denoiser.logits(tensors[step["ids"]][:, first:last])
            assert (blind - tensors[step["logits"]]).abs().max() > 0.5, step
        assert len(cache) - before == (found.shape[1] if step["store"] else 0)
    assert cache.next_B is not None and cache.next_B.tolist() == [12]


@torch.no_grad()
def test_the_training_pass_is_the_vendors() -> None:
    denoiser, tensors = load("sdar"), stored("sdar")
    scored_BT = tensors["train_target_mask"].bool()
    target_K = tensors["train_clean_ids"][scored_BT]
    logits = denoiser.train_logits(tensors["train_noisy_ids"], tensors["train_clean_ids"], positions_BT=scored_BT)
    nll_K = -logits.log_softmax(-1).gather(-1, target_K[:, None])[:, 0]
    assert (nll_K - tensors["train_token_nll"][scored_BT]).abs().max() <= TOLERANCE
    # Where a noisy block also sees its own clean block, it copies.
    block = torch.arange(24) // 4
    mask = doubled_mask(block[None])
    mask[:, :, :24, 24:] = block[:, None] >= block
    both = torch.cat([tensors["train_noisy_ids"], tensors["train_clean_ids"]], dim=1)
    hidden = denoiser._trunk(both, mask, torch.arange(24).repeat(2)[None])
    wrong = denoiser.head(hidden[:, :24][scored_BT])
    wrong_K = -wrong.log_softmax(-1).gather(-1, target_K[:, None])[:, 0]
    assert (wrong_K - tensors["train_token_nll"][scored_BT]).abs().max() > 0.5


@torch.no_grad()
def test_the_published_block_length_of_llada2() -> None:
    denoiser, tensors = load("llada2", block_length=32), stored("llada2")
    assert (denoiser.logits(tensors["block32_input_ids"]) - tensors["block32_logits"]).abs().max() <= TOLERANCE
    wrong = load("llada2", block_length=16).logits(tensors["block32_input_ids"])
    assert (wrong - tensors["block32_logits"]).abs().max() > 0.5


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_decoding_behind_the_cache_is_decoding_without(name: str) -> None:
    """Prompts of two lengths, neither a multiple of the block: each row has its own block borders."""
    denoiser = load(name)
    length = denoiser.family.block_length
    assert length is not None
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 300, (n,), generator=generator) for n in (2 * length + 1, 3 * length - 1)]
    tails = [
        torch.randint(0, 300, (4 * length - len(p) + (i * length),), generator=generator) for i, p in enumerate(prompts)
    ]
    rows = [torch.cat(pair) for pair in zip(prompts, tails, strict=True)]
    uncached = [denoiser.logits(row[None])[0] for row in rows]
    # Whole blocks of the prompts are stored in one left-padded forward; the rest of a prompt opens the next block.
    whole = [len(p) // length * length for p in prompts]
    width = max(whole)
    ids = torch.stack(
        [torch.cat([torch.zeros(width - n, dtype=torch.long), row[:n]]) for n, row in zip(whole, rows, strict=True)]
    )
    mask = torch.arange(width) >= torch.tensor([[width - n] for n in whole])
    cache = denoiser.new_cache()
    assert cache is not None
    denoiser.logits(ids, padding_mask_BT=mask, cache=cache, commit=True)
    blocks = torch.stack([row[n : n + length] for n, row in zip(whole, rows, strict=True)])
    following = torch.stack([row[n + length : n + 2 * length] for n, row in zip(whole, rows, strict=True)])
    wanted = torch.stack([u[n : n + length] for n, u in zip(whole, uncached, strict=True)])
    then = torch.stack([u[n + length : n + 2 * length] for n, u in zip(whole, uncached, strict=True)])
    for _ in range(2):  # a forward that stores nothing leaves the cache as it was
        assert (denoiser.logits(blocks, cache=cache) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    fused = denoiser.logits(torch.cat([blocks, following], dim=1), cache=cache, commit=length)
    assert (fused - torch.cat([wanted, then], dim=1)).abs().max() <= 1e-5 * wanted.abs().max()
    # A finished row leaves.
    cache.select(torch.tensor([1]))
    assert (denoiser.logits(following[1:], cache=cache) - then[1:]).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_the_training_pass_scores_each_block_as_decoding_does(name: str) -> None:
    denoiser, shifted = load(name), replace(load(name))
    shifted.family = replace(shifted.family, logit_shift=1)
    length = denoiser.family.block_length or 1
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(0, 300, (2, 3 * length), generator=generator)
    hidden = torch.rand(clean.shape, generator=generator) < 0.5
    noisy = clean.masked_fill(hidden, denoiser.family.mask_token_id)
    for model in (denoiser, shifted):
        found = model.train_logits(noisy, clean)
        for block in range(3):
            stop = (block + 1) * length
            seen = torch.cat([clean[:, : block * length], noisy[:, block * length : stop]], dim=1)
            wanted = model.logits(seen)[:, block * length :]
            skip = model.family.logit_shift if block == 0 else 0
            apart = (found[:, block * length : stop] - wanted)[:, skip:].abs().max()
            assert apart <= 1e-5 * wanted.abs().max(), (block, model.family.logit_shift)


def cached_logprobs(denoiser: Denoiser, clean_T: Tensor, noisy_T: Tensor, padding: int) -> Tensor:
    """Return log-probs `[T, V]` of one row decoded block by block behind the cache, each block committed when clean.

    Of the left-padded row's blocks, the first ones hold its padding and its prompt.
    """
    length, cache = denoiser.family.block_length or 1, denoiser.new_cache()
    whole = denoiser.family.alignment == "left_pad_to_block"
    # Borders are those of the padded columns, or of the row's own tokens.
    start = 0 if whole else padding
    found = []
    for first in range(start, len(clean_T), length):
        block = slice(first, min(first + length, len(clean_T)))
        mask = (torch.arange(block.start, block.stop) >= padding)[None] if block.start < padding else None
        logits = denoiser.logits(noisy_T[None, block], padding_mask_BT=mask, cache=cache)
        found.append(logits[0].log_softmax(-1))
        denoiser.logits(clean_T[None, block], padding_mask_BT=mask, cache=cache, commit=True)
    return torch.cat(found)[padding - start :]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("alignment", ["shared_block", "left_pad_to_block"])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_what_the_trainer_scores_is_what_decoding_behind_the_cache_scored(
    name: str, alignment: str, shift: int
) -> None:
    """Prompts of three lengths, none of them whole blocks but one, in one left-padded batch of [x_t ; x_0]."""
    denoiser = load(name)
    denoiser.family = replace(denoiser.family, alignment=alignment, logit_shift=shift)
    length = denoiser.family.block_length or 1
    generator = torch.Generator().manual_seed(8)
    prompts, canvas = [2 * length, length + 1, 2 * length - 1], 3 * length - 1
    width = 2 * length
    clean = torch.randint(0, 300, (3, width + canvas), generator=generator)
    column = torch.arange(width + canvas)
    hidden = (torch.rand(clean.shape, generator=generator) < 0.6) & (column >= width)
    noisy = clean.masked_fill(hidden, denoiser.family.mask_token_id)
    mask = column >= torch.tensor([[width - n] for n in prompts])
    trained = denoiser.train_logits(noisy, clean, padding_mask_BT=mask).log_softmax(-1)
    for row, prompt in enumerate(prompts):
        padding = width - prompt
        decoded = cached_logprobs(denoiser, clean[row], noisy[row], padding)
        chosen = hidden[row, padding:]
        worst = (trained[row, padding:] - decoded)[chosen].abs().max().item()
        assert worst <= 1e-5, (prompt, worst)
    # The comparison has power: with the borders of the other alignment the same tokens score otherwise.
    other = replace(denoiser.family, alignment="shared_block" if alignment != "shared_block" else "left_pad_to_block")
    wrong = replace(denoiser, family=other).train_logits(noisy, clean, padding_mask_BT=mask).log_softmax(-1)
    assert (wrong - trained)[1][hidden[1]].abs().max() > 0.1


@torch.no_grad()
def test_a_shifted_family_predicts_across_the_cache() -> None:
    denoiser = load("sdar")
    denoiser.family = replace(denoiser.family, name="fast_dllm_v2", logit_shift=1)
    ids = stored("sdar")["input_ids"]
    cache, whole = denoiser.new_cache(), denoiser.logits(ids)
    parts = [denoiser.logits(block, cache=cache, commit=True) for block in ids.split(4, dim=1)]
    assert (torch.cat(parts, dim=1) - whole)[:, 1:].abs().max() <= 1e-5 * whole.abs().max()


@torch.no_grad()
def test_blocks_counted_from_a_padded_prompt() -> None:
    """left_pad_to_block: padding up to whole blocks moves the borders, as if the prompt had been that long."""
    shared = load("sdar")
    padded = replace(shared, family=replace(shared.family, alignment="left_pad_to_block"))
    ids = stored("sdar")["input_ids"][:1, :9]
    wide = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.arange(12)[None] >= 3
    found = padded.logits(wide, padding_mask_BT=mask)[:, 3:]
    # By hand: blocks of the columns 3..11 are 0, 1, 1, 1, 1, 2, 2, 2, 2, positions 0..8.
    block = torch.arange(3, 12) // 4
    hidden = shared._trunk(ids, (block[:, None] >= block)[None, None], torch.arange(9)[None])
    assert (found - shared.head(hidden)).abs().max() <= 1e-5 * found.abs().max()
    assert (found - shared.logits(ids)).abs().max() > 0.1


@torch.no_grad()
def test_in_bfloat16_angles_are_computed_in_float32(
    family: tuple[str, Denoiser], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding RoPE's frequencies, or angles far out, is what `.to(bfloat16)` does (docs/precision.md)."""
    name, full = family
    # On CPUs the grouped kernel refuses bfloat16 rows as narrow as these mixtures'.
    monkeypatch.setattr(loading, "self_check", lambda _: None)
    half = load(name, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    own, exact = half.base.base_model.rotary_emb, full.base.base_model.rotary_emb
    assert own.inv_freq.dtype == torch.float32 and torch.equal(own.inv_freq, exact.inv_freq)
    far = torch.arange(30_000, 30_064)[None]
    for found, wanted in zip(own(torch.zeros(1, dtype=torch.bfloat16), far), exact(torch.zeros(1), far), strict=True):
        assert wanted.dtype == torch.float32 and torch.equal(found, wanted.bfloat16())
    if name == "llada2":  # what it adds to the routers' scores decides between experts
        biases = {key: value for key, value in half.model.state_dict().items() if "e_score" in key}
        assert biases and all(value.dtype == torch.float32 for value in biases.values())
        assert all(torch.equal(value, full.model.state_dict()[key]) for key, value in biases.items())


@pytest.mark.parametrize("layout", ["vendor", "stock"])
@torch.no_grad()
def test_a_saved_family_is_read_again(family: tuple[str, Denoiser], layout: str, tmp_path: Path) -> None:
    name, denoiser = family
    denoiser.save(tmp_path / "again", layout=layout)
    written = load_file(tmp_path / "again" / "model.safetensors")
    if layout == "vendor":
        published = load_file(GOLDEN / name / "model.safetensors")
        assert written.keys() == published.keys()
        assert all(torch.equal(written[key], value) for key, value in published.items())
    else:
        assert written.keys() == denoiser.model.state_dict().keys()
    again = load_denoiser(str(tmp_path / "again"), tokenizer=byte_tokenizer())
    wanted = replace(denoiser.family, name="stock") if layout == "stock" else denoiser.family
    assert again.family == wanted
    ids = stored(name)["input_ids"]
    assert torch.equal(again.logits(ids), denoiser.logits(ids))


def test_a_mask_that_nobody_names_is_asked_for() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(CheckpointError, match=r"config.json has no mask_token_id; pass mask_token_id=156895"):
        load_denoiser(str(GOLDEN / "llada_moe"), tokenizer=tokenizer)
    assert load("llada_moe", mask_token_id=None).family.mask_token_id == 257, "the tokenizer's own"


def test_a_mask_token_that_the_tokenizer_splits_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"mask_token_id 200 is '.*', which the tokenizer reads as \["):
        load("llada", mask_token_id=200)


def test_full_attention_has_no_exact_cache() -> None:
    denoiser = load("llada")
    assert denoiser.new_cache() is None
    with pytest.raises(CheckpointError, match="attends to the whole canvas; none is exact"):
        denoiser.logits(torch.tensor([[1, 2]]), commit=True)
    with pytest.raises(CheckpointError, match="there is no cache to commit to"):
        load("sdar").logits(torch.tensor([[1, 2, 3, 4]]), commit=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llada2", {"block_length": None}, r"no block length, .* 'llada2' needs; pass block_length=32"),
        ("sdar_moe", {"block_length": None}, r"no block length, .* pass block_length=4"),
        ("sdar", {"block_length": 0}, r"block_length: 0 must be a whole number"),
        ("llada", {"block_length": 4}, r"'llada' attends to the whole canvas; leave it out"),
        ("sdar", {"family": "sdra"}, r"unknown family 'sdra'.*sdar"),
        (
            "sdar",
            {"family": "llada", "block_length": None},
            r"config.json has no 'd_model', which family 'llada' needs",
        ),
        ("llada_moe", {"mask_token_id": 336}, r"mask_token_id 336 lies outside the embedding's 336 rows"),
        ("llada_moe", {"mask_token_id": 324}, r"mask_token_id 324 equals the EOS id"),
        ("sdar", {"attention": "flash_attention_2"}, r"flash_attention_2 takes no block mask"),
        ("dream", {"family": "open_dcoder"}, r"model_type 'Dream' is no known backbone"),
    ],
)
def test_what_a_checkpoint_cannot_be(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(name, **options)
