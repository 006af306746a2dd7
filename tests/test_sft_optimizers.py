"""Optimizers by name: which parameter goes where, and several behind one interface."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unmask.policies.adapters import attach_adapter, lora_config
from unmask.policies.loading import new_denoiser
from unmask.rl.optimizers import Together, build_optimizer

SIZE = {"hidden_size": 16, "layers": 1, "heads": 2, "mlp": 32}


def model(adapter: bool = False) -> nn.Module:
    denoiser = new_denoiser(**SIZE)
    return (attach_adapter(denoiser, lora_config(denoiser, rank=2)) if adapter else denoiser).model


def gradients(module: nn.Module, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=rng)


def names(module: nn.Module, group: dict) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in module.named_parameters() if id(parameter) in ids}


def test_adamw_decays_matrices_only() -> None:
    module = model()
    optimizer = build_optimizer(module.named_parameters(), lr=1e-3, weight_decay=0.1, betas=(0.8, 0.9))
    matrices, vectors = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all("norm" in name for name in names(module, vectors))
    assert not any("norm" in name for name in names(module, matrices))
    assert len(names(module, matrices)) + len(names(module, vectors)) == len(list(module.parameters()))
    assert matrices["betas"] == (0.8, 0.9)


def test_muon_takes_the_hidden_matrices() -> None:
    module = model()
    optimizer = build_optimizer(module.named_parameters(), name="muon", lr=1e-3, matrix_lr=0.05, weight_decay=0.1)
    assert isinstance(optimizer, Together)
    muon, rest = optimizer.members
    assert isinstance(muon, torch.optim.Muon)
    hidden = names(module, muon.param_groups[0])
    assert {name.rpartition(".weight")[0].rpartition(".")[2] for name in hidden} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    others = names(module, rest.param_groups[0])
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= others
    assert not hidden & others
    assert hidden | others == {name for name, _ in module.named_parameters()}
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 1e-3]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_are_left_out(name: str) -> None:
    """An adapter has matrices only, so that one of the two members would be empty."""
    module = model(adapter=True)
    optimizer = build_optimizer(module.named_parameters(), name=name, lr=1e-3)
    held = set().union(*(names(module, group) for group in optimizer.param_groups))
    assert held == {key for key, p in module.named_parameters() if p.requires_grad}
    before = {key: p.detach().clone() for key, p in module.named_parameters()}
    gradients(module, 0)
    optimizer.step()
    for key, parameter in module.named_parameters():
        assert torch.equal(parameter, before[key]) is not parameter.requires_grad, key


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optim.optimizer: 'adam' is not one of adamw, muon"):
        build_optimizer(model().named_parameters(), name="adam", lr=1e-3)


def test_together_steps_like_its_members_alone() -> None:
    module, twin = model(), model()
    together = build_optimizer(module.named_parameters(), name="muon", lr=1e-3)
    alone = build_optimizer(twin.named_parameters(), name="muon", lr=1e-3).members
    for seed in range(3):
        gradients(module, seed)
        gradients(twin, seed)
        together.step()
        for member in alone:
            member.step()
    for (key, one), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), key
    together.zero_grad()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_together_comes_back_from_its_state() -> None:
    """Three steps, saved, two more; and the same two after loading into new objects: bit-equal."""
    module = model()
    optimizer = build_optimizer(module.named_parameters(), name="muon", lr=1e-3)
    for seed in range(3):
        gradients(module, seed)
        optimizer.step()
    twin = model()
    twin.load_state_dict(module.state_dict())
    optimizer.param_groups[0]["lr"] = 0.007
    saved = copy.deepcopy(optimizer.state_dict())
    restored = build_optimizer(twin.named_parameters(), name="muon", lr=1e-3)
    restored.load_state_dict(saved)
    assert [group["lr"] for group in restored.param_groups] == [0.007, 1e-3]
    for seed in (3, 4):
        for net, chosen in ((module, optimizer), (twin, restored)):
            gradients(net, seed)
            chosen.step()
    for (key, one), other in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one, other[1]), key


def test_a_scheduler_reaches_the_members_also_after_loading() -> None:
    module = model()
    optimizer = build_optimizer(module.named_parameters(), name="muon", lr=1e-3, matrix_lr=0.02)
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    gradients(module, 0)
    optimizer.step()
    scheduler.step()
    assert [member.param_groups[0]["lr"] for member in optimizer.members] == [0.01, 5e-4]


def test_a_closure_is_called_once_with_gradients() -> None:
    module, calls = model(), []
    optimizer = build_optimizer(module.named_parameters(), name="muon", lr=1e-3)

    def closure() -> torch.Tensor:
        calls.append(1)
        loss = sum((parameter.square().sum() for parameter in module.parameters()), torch.zeros(()))
        loss.backward()
        return loss

    before = module.lm_head.weight.detach().clone()
    assert optimizer.step(closure).item() > 0
    assert len(calls) == 1
    assert not torch.equal(module.lm_head.weight, before)
