"""A base in 4 bits: the logits and gradients of its own dequantised weights, its bytes, and a run with an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shortrun
import torch
from torch import Tensor, nn

from unmask.policies.adapters import adapted_modules, attach_adapter, lora_config
from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import CheckpointError
from unmask.policies.loading import load_denoiser
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.loading import load_recipe
from unmask.recipes.registry import SLOTS
from unmask.recipes.schema import Recipe
from unmask.rl import run
from unmask.rl.export import export
from unmask.rl.memory import estimate
from unmask.rl.sft import SftBatches, Source

bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes.nn.parametrize import Bnb4bitParametrization  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:Unable to fetch remote file")
IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
FIXTURES = Path(__file__).parent / "fixtures"
MODELS = ("tiny", "llada2", "sdar_moe")


def load(name: str, **options: Any) -> Denoiser:
    if name == "tiny":
        return load_denoiser("unmask:tiny", **options)
    facts = json.loads((FIXTURES / name / "golden.json").read_text())
    given = {"mask_token_id": facts["mask_token_id"], "block_length": facts["block_length"]}
    return load_denoiser(str(FIXTURES / name), tokenizer=byte_tokenizer(), **given, **options)


def dequantised(name: str) -> Denoiser:
    """Return the model with every linear layer but the head, and every stack of experts, rounded to NF4 and back."""
    denoiser = load(name)
    for path, parameter in denoiser.model.named_parameters():
        leaf, owner = path.rpartition(".")[2], denoiser.model.get_submodule(path.rpartition(".")[0])
        linear = isinstance(owner, nn.Linear) and owner is not denoiser.model.lm_head
        if linear or leaf in ("gate_up_proj", "down_proj"):
            packed, state = bnb.functional.quantize_4bit(parameter.data, quant_type="nf4")
            parameter.data = bnb.functional.dequantize_4bit(packed, state)
    return denoiser


def adapted(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser with an adapter that has moved."""
    denoiser = attach_adapter(denoiser, lora_config(denoiser, rank=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in denoiser.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05, generator=generator)
    return denoiser


def gradients(denoiser: Denoiser) -> dict[str, Tensor]:
    denoiser.logits(IDS).log_softmax(-1).gather(-1, IDS[..., None]).mean().backward()
    return {name: p.grad for name, p in denoiser.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_rounded_weights(name: str) -> None:
    """Also after a forward without gradient, on which bitsandbytes may repack the weights of a CPU."""
    four, rounded = load(name, quantization="4bit"), dequantised(name)
    with torch.no_grad():
        torch.testing.assert_close(four.logits(IDS), rounded.logits(IDS), rtol=1e-5, atol=1e-5)
    four, rounded = adapted(four), adapted(rounded)
    found_by, wanted_by = gradients(four), gradients(rounded)
    assert len(found_by) == 2 * len(adapted_modules(four.model)) and found_by.keys() == wanted_by.keys()
    for name, wanted in wanted_by.items():
        torch.testing.assert_close(found_by[name], wanted, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_it_says_what_the_full_model_says() -> None:
    """On hidden tokens of problems it knows; 128 wide, it suffers more from rounding than 4096 wide ones."""
    problems = Source("arithmetic", SLOTS["task"].build("arithmetic")("heldout", seed=0), 1.0, 48)
    full, four = load_denoiser("unmask:tiny"), load_denoiser("unmask:tiny", quantization="4bit")
    item = SftBatches([problems], full.tokenizer, full.family, batch=32, steps=1, seed=0)[0]
    p_KV, q_KV = (
        model.logits(item["input_ids"], padding_mask_BT=item["padding_mask"], positions_BT=item["scored"]).log_softmax(
            -1
        )
        for model in (full, four)
    )
    assert (p_KV.argmax(-1) == q_KV.argmax(-1)).float().mean() > 0.9
    assert 0 < (p_KV.exp() * (p_KV - q_KV)).sum(-1).median() < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_its_bytes_are_those_of_the_estimate(name: str) -> None:
    denoiser = load(name, quantization="4bit")
    states = [getattr(parameter, "quant_state", None) for parameter in denoiser.model.parameters()]
    stacks = [module for module in denoiser.model.modules() if isinstance(module, Bnb4bitParametrization)]
    states += [module.quant_state for module in stacks]
    size = sum(parameter.numel() * parameter.element_size() for parameter in denoiser.model.parameters())
    size += sum(state.absmax.numel() * state.absmax.element_size() for state in states if state is not None)
    # All layers' experts have one shape: two stacks of a layer are unpacked at a time.
    unpacked = 4 * sum(module.quant_state.shape.numel() for module in stacks[:2])
    options = {"tiny": [], "llada2": ["model.block_length=8"], "sdar_moe": ["model.block_length=4"]}[name]
    path = "unmask:tiny" if name == "tiny" else str(FIXTURES / name)
    recipe = load_recipe("cj_grpo_tiny_arithmetic.yaml", [f"model.path={path}", "model.quantization=4bit", *options])
    assert isinstance(recipe, Recipe)
    found = estimate(recipe)
    assert found is not None and found.weights == size + unpacked


@pytest.mark.parametrize("name", MODELS[1:])
def test_unpacked_experts_are_not_kept_for_the_backward(name: str) -> None:
    denoiser = adapted(load(name, quantization="4bit"))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        denoiser.logits(IDS[:, :16]).sum().backward()
    experts = next(module for module in denoiser.model.modules() if isinstance(module, Bnb4bitParametrization))
    assert kept and max(kept) < experts.quant_state.shape.numel()


def test_it_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the weights are in 4 bits; save the adapter, or export it"):
        load_denoiser("unmask:tiny", quantization="4bit").save(tmp_path / "no")
    assert not list(tmp_path.iterdir())


def test_a_run_trains_an_adapter_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["name=four", "model.quantization=4bit", "optim.steps=2", "optim.lr=0.05"]
    recipe = shortrun.recipe(shortrun.save_model(tmp_path / "model"), *overrides)
    run.train(recipe)
    weights = shortrun.weights(tmp_path / "runs" / "four")
    assert all(value.isfinite().all() for value in weights.values())
    assert all(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    updates = [r for r in shortrun.lines(tmp_path / "runs" / "four" / "metrics.jsonl") if "loss" in r]
    assert updates[0]["train/ratio_max_deviation"] < 1e-5, "rollout and update compute the same"
    report = export("runs/four", tmp_path / "out")
    assert report["merged_minus_adapter"] <= 1e-5 * report["scale"] < report["adapter_minus_base"]
