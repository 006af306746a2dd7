"""NTK scaling for long contexts: the paper's factors, the stock class's own logits, and folders that remember it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import shortrun
import torch

from unmask.policies.denoiser import Denoiser
from unmask.policies.families import LLADA, LLADA2
from unmask.policies.layout import CheckpointError
from unmask.policies.loading import load_denoiser, stock_config
from unmask.policies.published import CONFIGS
from unmask.policies.resolving import read_config
from unmask.policies.rope import ntk_theta, rescale
from unmask.policies.tokenizers import byte_tokenizer
from unmask.rl import run
from unmask.rl.export import export
from unmask.rl.memory import on_meta

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("llada", "dream", "sdar", "llada2")


def load(name: str, **options: Any) -> Denoiser:
    facts = json.loads((FIXTURES / name / "golden.json").read_text())
    given = {"mask_token_id": facts["mask_token_id"], "block_length": facts["block_length"]}
    return load_denoiser(str(FIXTURES / name), tokenizer=byte_tokenizer(), **(given | options))


def test_factors_are_the_papers() -> None:
    config: Any = stock_config(LLADA, CONFIGS["GSAI-ML/LLaDA-8B-Instruct"])
    factors = [round(ntk_theta(config, k * 1024) / 500000.0) for k in (4, 8, 16, 24, 32)]
    assert factors == [1, 4, 14, 31, 55]


def test_only_rotated_dimensions_count() -> None:
    """LLaDA2 rotates 64 of a head's 128: those of them that turned once in training are stretched over the context."""
    config: Any = stock_config(LLADA2, CONFIGS["inclusionAI/LLaDA2.0-mini"])
    wavelengths = [2 * math.pi * 6e5 ** (2 * i / 64) for i in range(32)]
    turned = sum(length <= 32768 for length in wavelengths)
    exact = (131072 / (2 * math.pi)) ** (64 / (2 * turned))
    assert ntk_theta(config, 131072) == 6e5 * math.ceil(exact / 6e5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_frequencies_are_the_new_bases_and_a_saved_folder_keeps_them(name: str, tmp_path: Path) -> None:
    plain = load(name)
    context = 64 * plain.model.config.max_position_embeddings
    denoiser = load(name, context=context)
    rope = denoiser.model.config.rope_parameters
    base, turned = rope["rope_theta"], denoiser.model.model.rotary_emb.inv_freq
    assert base == ntk_theta(plain.model.config, context) > plain.model.config.rope_parameters["rope_theta"]
    powers = torch.arange(len(turned), dtype=torch.float64) / len(turned)
    torch.testing.assert_close(turned.double(), base**-powers, rtol=1e-6, atol=0)
    ids = torch.randint(0, 200, (1, 32), generator=torch.Generator().manual_seed(0))
    logits = denoiser.logits(ids)
    assert (logits - plain.logits(ids)).abs().max() > 0.1
    for layout in ("vendor", "stock"):
        denoiser.save(tmp_path / layout, layout=layout)
        for again in (None, context):  # a second scaling changes nothing
            read = load_denoiser(str(tmp_path / layout), tokenizer=byte_tokenizer(), context=again)
            assert torch.equal(read.logits(ids), logits)
    assert torch.equal(load(name, context=context // 64).logits(ids), plain.logits(ids))


def test_what_cannot_be_rescaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    several: Any = type("", (), {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}})
    with pytest.raises(CheckpointError, match="'llada' has several RoPE bases"):
        rescale(several, LLADA, {}, 100)
    vendor = read_config(FIXTURES / "sdar") | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(vendor))
    recipe = shortrun.recipe(tmp_path, "model.context=4096")
    with pytest.raises(CheckpointError, match=r"config.json scales RoPE already \(linear\); leave model.context out"):
        on_meta(recipe, vendor)


def test_an_exported_run_reads_as_far_as_it_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shortrun.save_model(tmp_path / "model")
    overrides = ["name=r", "model.lora.rank=2", "model.context=4096", "optim.steps=1", "optim.lr=0.05"]
    run.train(shortrun.recipe(tmp_path / "model", *overrides))
    report = export("runs/r", tmp_path / "out")
    assert report["written_minus_merged"] == 0.0
    assert read_config(tmp_path / "out")["max_sequence_length"] == 4096
