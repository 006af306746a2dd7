"""LoRA adapters: which modules, reproducible without the global generator, neutral when off, equal when merged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from unmask.policies.adapters import adapted_modules, attach_adapter, lora_config, merged
from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import CheckpointError
from unmask.policies.loading import load_denoiser, new_denoiser
from unmask.policies.selfcheck import self_check
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.registry import RecipeError

FIXTURES = Path(__file__).parent / "fixtures"
SIZE = {"hidden_size": 32, "layers": 2, "heads": 2, "mlp": 64}
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.tensor([[1, 2, 257, 257, 9], [5, 257, 7, 257, 256]])


def adapted(seed: int = 0, moved: bool = False, **knobs) -> Denoiser:
    denoiser = new_denoiser(**SIZE)
    denoiser = attach_adapter(denoiser, lora_config(denoiser, **knobs), seed=seed)
    if moved:
        rng = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in denoiser.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.1, generator=rng)
    return denoiser


def factors(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in denoiser.model.named_parameters() if "lora_" in name}


def test_all_seven_linear_layers_of_every_block_are_adapted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        denoiser = adapted(rank=4)
    blocks = (("self_attn", SEVEN[:4]), ("mlp", SEVEN[4:]))
    expected = [f"model.layers.{n}.{part}.{leaf}" for n in range(2) for part, leaves in blocks for leaf in leaves]
    assert adapted_modules(denoiser.model) == sorted(expected)
    trainable = {name: p for name, p in denoiser.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    # rank x (in + out): four 32 x 32 matrices and three 32 x 64 ones a block.
    count = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert sum(p.numel() for p in trainable.values()) == count
    line = caplog.messages[-1]
    assert f"LoRA rank 4 on 14 modules ({', '.join(sorted(SEVEN))}), {count} parameters" in line


def test_defaults() -> None:
    config = lora_config(new_denoiser(**SIZE))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.0, "none")
    assert set(config.target_modules) == set(SEVEN)


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 2.0), (8.0, 2.0), (0.5, 0.125), (6.0, 1.5)])
def test_alpha_scales_the_update(alpha: float, scale: float) -> None:
    """W + (alpha / rank) B A, with 0 for 2 x rank; half an alpha is not none."""
    denoiser = adapted(rank=4, alpha=alpha, targets=["q_proj"], moved=True)
    layer = denoiser.base.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    expected = x @ (layer.base_layer.weight + scale * b @ a).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"model.lora.targets: 'q_prj' matches no linear layer. Did you mean 'q_proj'\?"),
        (["q_proj", "attn_out"], r"'attn_out' matches no linear layer. (Did you mean|Choices)"),
        (["zzz"], r"'zzz' matches no linear layer. Choices: down_proj, .*, v_proj"),
        (["lm_head"], r"'lm_head' cannot be adapted; choose attention and MLP layers"),
        (["embed_tokens"], r"'embed_tokens' matches no linear layer"),
        (["mlp"], r"'mlp' matches no linear layer"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets: list[str], message: str) -> None:
    denoiser = new_denoiser(**SIZE)
    with pytest.raises(RecipeError, match=message):
        attach_adapter(denoiser, lora_config(denoiser, targets=targets))
    assert not any("lora" in name for name, _ in denoiser.model.named_parameters()), "nothing was attached"


MIXTURES = {"llada_moe": {}, "llada2": {"block_length": 8}, "sdar_moe": {"block_length": 4}, "rnd1": {}}
SHARED = r"would adapt the stacked experts and leave shared experts and dense layers out; list attention layers"


def mixture(name: str) -> Denoiser:
    facts = json.loads((FIXTURES / name / "golden.json").read_text())
    options = {"mask_token_id": facts["mask_token_id"], **MIXTURES[name]}
    return load_denoiser(str(FIXTURES / name), tokenizer=byte_tokenizer(), **options)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixtures_adapter_is_on_its_attention(name: str) -> None:
    denoiser = mixture(name)
    layers = denoiser.base.config.num_hidden_layers
    before = denoiser.logits(IDS)
    denoiser = attach_adapter(denoiser, lora_config(denoiser, rank=2))
    expected = [f"model.layers.{n}.self_attn.{leaf}" for n in range(layers) for leaf in SEVEN[:4]]
    assert adapted_modules(denoiser.model) == sorted(expected)
    assert all(".self_attn." in name for name, p in denoiser.model.named_parameters() if p.requires_grad)
    assert torch.equal(denoiser.logits(IDS), before)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["gate_proj"], SHARED),
        (["q_proj", "up_proj"], SHARED),
        (["down_proj"], SHARED),
        (["shared_experts.up_proj"], SHARED),
        (["layers.0.mlp.down_proj"], SHARED),
        (["mlp.gate"], SHARED),
        ("all-linear", r"'all-linear' would reach routers and stacked experts of a mixture; list attention layers"),
        (r".*\.[qk]_proj", r"would reach routers and stacked experts of a mixture; list attention layers"),
        (["lm_head"], r"'lm_head' cannot be adapted"),
        (["query_key_value"], r"'query_key_value' matches no linear layer"),
        (None, r"the peft config names no target_modules; list attention and MLP layers"),
    ],
)
def test_a_mixtures_experts_are_not_adapted_by_halves(name: str, targets: list[str] | str, message: str) -> None:
    """peft would turn these names into all stacked experts, or reach the router (reference/models.md section 13)."""
    denoiser = mixture(name)
    with pytest.raises(RecipeError, match=message):
        attach_adapter(denoiser, LoraConfig(r=2, target_modules=targets))
    assert not any("lora" in name for name, _ in denoiser.model.named_parameters()), "nothing was attached"


def test_targets_can_be_paths() -> None:
    denoiser = adapted(targets=["layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"])
    assert adapted_modules(denoiser.model) == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


def test_the_initialisation_is_keyed_and_leaves_the_global_generator() -> None:
    state = torch.get_rng_state()
    first = factors(adapted(seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    state = torch.get_rng_state()
    second, other = factors(adapted(seed=3)), factors(adapted(seed=4))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        if "lora_A" in name:
            assert value.abs().max() > 0
            assert not torch.equal(value, other[name])
        else:
            assert (value == 0).all()


def test_a_new_adapter_changes_nothing() -> None:
    denoiser = adapted()
    assert torch.equal(denoiser.logits(IDS), new_denoiser(**SIZE).logits(IDS))
    assert not denoiser.model.training
    self_check(denoiser)


def test_merging_gives_the_adapters_logits(tmp_path: Path) -> None:
    denoiser = adapted(moved=True)
    with torch.no_grad():
        on_BTV = denoiser.logits(IDS)
        assert (on_BTV - new_denoiser(**SIZE).logits(IDS)).abs().max() > 1e-2
        with pytest.raises(CheckpointError, match=r"the model carries an adapter; merge it first or save the adapter"):
            denoiser.save(tmp_path)
        assert not list(tmp_path.iterdir())
        plain = merged(denoiser)
        torch.testing.assert_close(plain.logits(IDS), on_BTV, rtol=0, atol=1e-5)
        plain.save(tmp_path)
        torch.testing.assert_close(load_denoiser(str(tmp_path)).logits(IDS), on_BTV, rtol=0, atol=1e-5)


def test_merging_nothing_is_nothing() -> None:
    denoiser = new_denoiser(**SIZE)
    assert merged(denoiser) is denoiser


def test_any_peft_config_of_linear_layers_fits() -> None:
    """A config of the user's own, and peft's word for all linear layers, which leaves out the head."""
    denoiser = new_denoiser(**SIZE)
    own = attach_adapter(denoiser, LoraConfig(r=2, target_modules=["v_proj"]))
    assert len(adapted_modules(own.model)) == 2
    denoiser = new_denoiser(**SIZE)
    every = attach_adapter(denoiser, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert len(adapted_modules(every.model)) == 14


def test_the_adapted_denoiser_is_a_new_one() -> None:
    denoiser = new_denoiser(**SIZE)
    other = attach_adapter(denoiser, lora_config(denoiser))
    assert other is not denoiser
    assert other.family is denoiser.family
    assert other.tokenizer is denoiser.tokenizer
