"""Transforms of the logits, against dense tables, autograd and plain loops."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.policies.layout import Family
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl.estimators import trace
from unmask.rl.replay import replay_all
from unmask.rollouts import measures
from unmask.rollouts.engine import denoise
from unmask.rollouts.forward import Rows
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.state import State
from unmask.rollouts.trajectory import Trajectory

V, L = 9, 6
MASK, EOS = V - 1, V - 2


@dataclass
class Moody:
    """A denoiser whose logits are random tables of the canvas before it, in float64."""

    scale: float = 2.0
    family: Family = field(default_factory=lambda: Family("moody", V, MASK, (EOS,)))
    seen: list[Tensor] = field(default_factory=list)

    def table(self, ids: list[int]) -> Tensor:
        """Return the logits `[L, V]` of one prompt and canvas."""
        rng = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
        return self.scale * torch.randn(L, V, generator=rng, dtype=torch.float64)

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        self.seen.append(input_ids_BT[:, -L:].clone())
        logits_BLV = torch.stack([self.table(ids) for ids in input_ids_BT.tolist()])
        return logits_BLV[positions_BT[:, -L:]]


def run(denoiser: Moody, sampler: Sampler, rows: int = 6, *, group: int = 1, static: bool = False) -> Trajectory:
    prompt_BQ = torch.arange(rows)[:, None] // group
    mask_BQ, canvas_BL = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.full((rows, L), MASK)
    ids_B = torch.arange(rows)
    return denoise(
        denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, ids_B, seed=0, group_B=prompt_BQ[:, 0] + 7, static=static
    )


def sampler_of(*transforms: object, temperature: float = 1.0, **more: object) -> Sampler:
    section = {"schedule": {"name": "uniform", "steps": 4}, "transforms": list(transforms), "eos": {"rule": "none"}}
    return build_sampler({**section, **more}, temperature=temperature)


# --- Suppression -----------------------------------------------------------------------------------------------------


def test_suppressed_tokens_are_never_drawn_and_training_knows() -> None:
    sampler, denoiser = sampler_of({"name": "suppress", "ids": [0, 3, 5]}), Moody()
    trajectory = run(denoiser, sampler, rows=50)
    assert set(trajectory.tokens_BL.unique().tolist()) == {1, 2, 4, 6, EOS}
    assert trajectory.banned_token_ids == (MASK, 0, 3, 5)
    assert sampler.status == "exact"
    views = trace(trajectory, rng=None, tokens="all")
    scores = replay_all(denoiser, views, 64)
    torch.testing.assert_close(scores.logprob_A.float(), views.behaviour_K.float(), rtol=0, atol=1e-5)


def test_suppressed_ids_are_in_the_vocabulary() -> None:
    with pytest.raises(RecipeError, match=r"suppress.ids \[9\] must lie between 0 and 8"):
        run(Moody(), sampler_of({"name": "suppress", "ids": [9]}))
    assert torch.equal(
        run(Moody(), sampler_of({"name": "suppress", "ids": []})).tokens_BL, run(Moody(), sampler_of()).tokens_BL
    )


# --- Credit ----------------------------------------------------------------------------------------------------------


def greedy_with_credit(denoiser: Moody, prompt: int, counts: list[int]) -> tuple[list[int], list[int]]:
    """Decode one row at temperature 0 with a dense L x V table of credits; return tokens and their steps."""
    canvas, born, credit = [MASK] * L, [-1] * L, torch.zeros(L, V, dtype=torch.float64)
    for step, count in enumerate(counts):
        logits_LV = denoiser.table([prompt, *canvas])
        logits_LV[:, MASK] = -torch.inf
        p_LV = logits_LV.softmax(dim=1)
        free = [i for i in range(L) if canvas[i] == MASK]
        for i in free:
            credit[i] *= 0.8
            credit[i, p_LV[i].argmax()] += p_LV[i].max() ** 0.2
        fused_LV = (logits_LV + 0.7 * (1 + credit).log()).softmax(dim=1)
        order = sorted(free, key=lambda i: -fused_LV[i].max().item())
        for i in order[:count]:
            canvas[i], born[i] = int(fused_LV[i].argmax()), step
    return canvas, born


@pytest.mark.parametrize("static", [False, True])
def test_credit_is_a_decaying_sum_over_the_steps(static: bool) -> None:
    """Against a dense table and a plain loop; where the credit changes nothing the test would say nothing."""
    rows, denoiser = 20, Moody(scale=0.7)
    found = run(denoiser, sampler_of("credit", temperature=0.0), rows, static=static)
    for b in range(rows):
        tokens, born = greedy_with_credit(denoiser, b, [2, 2, 1, 1])
        assert found.tokens_BL[b].tolist() == tokens
        assert found.born_BL[b].tolist() == born
    plain = run(denoiser, sampler_of(temperature=0.0), rows)
    assert not torch.equal(plain.tokens_BL, found.tokens_BL)


def state_of(canvas_AL: Tensor, **more: object) -> State:
    state = State.of(canvas_AL, MASK, eos_token_ids=(EOS,))
    return replace(state, window_AL=state.masked_AL, **more)


def test_credit_of_a_step_counts_once_however_often_it_is_asked() -> None:
    """Twice in one call (padding), twice in one step (a second pass); then decay and the next step's gain."""
    part = SLOTS["transform"].build({"name": "credit", "slots": 2})
    state = state_of(torch.tensor([[MASK, 3, MASK]]))
    logits_KV = torch.randn(2, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row_K, place_K, ids = torch.tensor([0, 0, 0]), torch.tensor([0, 2, 2]), torch.tensor([0, 1, 1])
    first = part(logits_KV[ids].clone(), state, row_K, place_K)
    again = part(logits_KV[ids].clone(), state, row_K, place_K)
    assert torch.equal(first, again)
    assert torch.equal(first[1], first[2])
    allowed_KV = logits_KV.clone()
    allowed_KV[:, MASK] = -torch.inf
    p_K, best_K = allowed_KV.softmax(dim=1).max(dim=1)
    raised = (first - logits_KV[ids])[[0, 1], best_K]
    torch.testing.assert_close(raised, 0.7 * torch.log1p(p_K**0.2), rtol=1e-6, atol=0)
    # The next step: another token is likeliest, the old one keeps 0.8 of its credit.
    other_KV = logits_KV.clone()
    other_KV[0, (best_K[0] + 1) % 7] += 20
    later = part(other_KV[ids].clone(), replace(state, step_A=state.step_A + 1), row_K, place_K)
    kept = (later - other_KV[ids])[0, best_K[0]]
    torch.testing.assert_close(kept, 0.7 * torch.log1p(0.8 * p_K[0] ** 0.2), rtol=1e-6, atol=0)


def test_credit_keeps_the_tokens_of_most_credit() -> None:
    """With one slot the next step's likeliest token takes the place of the first one."""
    part = SLOTS["transform"].build({"name": "credit", "slots": 1})
    state = state_of(torch.tensor([[MASK]]))
    place = torch.tensor([0]), torch.tensor([0])
    one_KV, other_KV = torch.zeros(1, V, dtype=torch.float64), torch.zeros(1, V, dtype=torch.float64)
    one_KV[0, 2], other_KV[0, 4] = 5.0, 5.0
    part(one_KV.clone(), state, *place)
    raised = part(other_KV.clone(), replace(state, step_A=state.step_A + 1), *place) - other_KV
    assert raised[0, :MASK].nonzero().tolist() == [[4]]


def test_credit_is_told_to_be_off_policy() -> None:
    sampler = sampler_of("credit")
    assert sampler.status == "behaviour only"
    assert sampler.mismatch.startswith("credit: the draw depends on earlier predictions")
    with pytest.raises(RecipeError, match="slots of at least 1"):
        run(Moody(), sampler_of({"name": "credit", "slots": 0}))


# --- Diversity -------------------------------------------------------------------------------------------------------


def guided(logits: dict[tuple[int, int], Tensor], canvas: list[list[int]], groups: list[int], strength: float) -> dict:
    """Return ODD's logits by autograd and plain Gram-Schmidt; `logits` by (row, place) of the open positions."""
    leaves = {key: value.clone().requires_grad_() for key, value in logits.items()}
    features, quality = [], []
    for row, tokens in enumerate(canvas):
        columns = [torch.nn.functional.one_hot(torch.tensor(t), V).double() for t in tokens if t != MASK]
        for i in range(L):
            if (row, i) in leaves:
                column = leaves[row, i].clone()
                column[MASK] = -torch.inf
                columns.append(column.softmax(dim=0))
        pooled = torch.stack(columns).amax(dim=0)
        features.append(pooled / pooled.norm())
        tops = [column.max().item() for column in columns[len([t for t in tokens if t != MASK]) :]]
        quality.append(sum(tops) / len(tops))
    loss = torch.zeros((), dtype=torch.float64)
    for group in sorted(set(groups)):
        units: list[Tensor] = []
        for row in [r for r, g in enumerate(groups) if g == group]:
            left = features[row].detach().clone()
            for unit in units:
                left = left - (left @ unit) * unit
            unit = left / left.norm() if left.norm() >= 1e-2 else torch.zeros_like(left)
            if units:
                loss = loss - quality[row] * (features[row] @ unit)
            units.append(unit)
    loss.backward()
    changed = {}
    for row in range(len(canvas)):
        keys = [key for key in leaves if key[0] == row]
        slopes = {k: torch.zeros(V).double() if leaves[k].grad is None else leaves[k].grad.clone() for k in keys}
        for slope in slopes.values():
            slope[EOS] = 0.0
        size = max(slope.norm().item() for slope in slopes.values())
        share = sum(t == MASK for t in canvas[row]) / L
        for key in keys:
            changed[key] = logits[key] - (strength * share / size * slopes[key] if size else 0.0)
    return changed


def moved(part: Any, logits_KV: Tensor, state: State, row_K: Tensor, place_K: Tensor) -> Tensor:
    """Return the logits that a transform of whole steps makes of these."""
    rows = Rows(lambda start, stop: logits_KV[start:stop].clone(), V)
    return part(rows, state, row_K, place_K).logits(0, len(row_K))


@pytest.mark.parametrize("padded", [False, True])
def test_diversity_equals_autograd(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of three rows, decided tokens, an open position outside the window; padding changes nothing."""
    rng = torch.Generator().manual_seed(1)
    canvas_AL = torch.full((6, L), MASK)
    canvas_AL[0, 1], canvas_AL[2, 3], canvas_AL[4, 0], canvas_AL[4, 5] = 2, 0, 5, 5
    groups = [0, 1, 0, 1, 1, 0]
    state = State.of(canvas_AL, MASK, eos_token_ids=(EOS,))
    window_AL = state.masked_AL.clone()
    window_AL[:, 4] = False
    state = replace(state, window_AL=window_AL, group_A=torch.tensor(groups), open_A=torch.full((6,), L))
    row_K, place_K = window_AL.nonzero(as_tuple=True)
    logits_KV = 1.5 * torch.randn(len(row_K), V, generator=rng, dtype=torch.float64)
    keys = list(zip(row_K.tolist(), place_K.tolist(), strict=True))
    expected = guided(dict(zip(keys, logits_KV, strict=True)), canvas_AL.tolist(), groups, 8.0)
    index = torch.arange(len(row_K))
    if padded:
        index = torch.cat([index[:4], index[-1:], index[4:], index[-1:]])
    part = SLOTS["transform"].build({"name": "odd", "strength": 8.0})
    # Chunks of 5 positions: what belongs together lies apart.
    monkeypatch.setitem(measures.CHUNK_ENTRIES, "cpu", 5 * V)
    found_KV = moved(part, logits_KV[index], state, row_K[index], place_K[index])
    for found_V, k in zip(found_KV, index.tolist(), strict=True):
        torch.testing.assert_close(found_V[:MASK], expected[keys[k]][:MASK], rtol=1e-5, atol=1e-6)
    firsts = [groups.index(g) for g in (0, 1)]
    unmoved = [
        row
        for row in range(6)
        if torch.equal(found_KV[row_K[index] == row, :MASK], logits_KV[index][row_K[index] == row, :MASK])
    ]
    assert unmoved == firsts


def test_equal_rollouts_are_left_alone() -> None:
    """At the first step all canvases of a group are blank and all features equal: there is no direction to go."""
    state = state_of(torch.full((4, L), MASK), group_A=torch.zeros(4, dtype=torch.long))
    row_K, place_K = state.window_AL.nonzero(as_tuple=True)
    one_KV = torch.randn(L, V, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    found_KV = moved(SLOTS["transform"].build("odd"), one_KV, state, row_K, place_K)
    assert torch.equal(found_KV[:, :MASK], one_KV[:, :MASK])


def test_diversity_needs_a_group_and_changes_what_it_says() -> None:
    guide = {"name": "odd", "strength": 16.0}
    denoiser, plain = Moody(), sampler_of(temperature=0.0)
    alone = run(denoiser, sampler_of(guide, temperature=0.0), rows=6, group=1)
    assert torch.equal(alone.tokens_BL, run(denoiser, plain, rows=6, group=1).tokens_BL)
    together = run(denoiser, sampler_of(guide, temperature=0.7), rows=8, group=4)
    static = run(denoiser, sampler_of(guide, temperature=0.7), rows=8, group=4, static=True)
    assert torch.equal(together.tokens_BL, static.tokens_BL)
    assert not torch.equal(together.tokens_BL, run(denoiser, sampler_of(temperature=0.7), rows=8, group=4).tokens_BL)
    sampler = sampler_of(guide)
    assert sampler.keeps_groups
    assert sampler.status == "behaviour only"


# --- Guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.5, 2.0])
def test_guidance_mixes_the_calls_with_and_without_the_prompt(toys: ModuleType, guidance: float) -> None:
    """l = l_without + (1 + g)(l_with - l_without) at every step; recorded log-probs are those of the mixture."""
    toy, rows = toys.Toy(0), 40
    section = {"schedule": {"name": "uniform", "steps": 3}, "guidance": guidance, "eos": {"rule": "none"}}
    sampler = build_sampler(section, temperature=0.8)
    prompt_BQ = torch.tensor([[1, 3]]).expand(rows, -1)
    mask_BQ, canvas_BL = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.full((rows, toys.L), toys.MASK)
    t = denoise(toy, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(rows), seed=0)
    assert toy.calls == [rows] * 6, "two calls a step"
    free = torch.tensor([toys.MASK, toys.MASK])
    for b in range(rows):
        for i in range(toys.L):
            canvas_L = t.canvas_before(torch.tensor([b]), t.born_BL[b, i][None].long())[0]
            held, bare = (
                toy.logits(torch.cat([p, canvas_L])[None])[0, -toys.L + i, : toys.V] for p in (prompt_BQ[b], free)
            )
            expected = ((bare + (1 + guidance) * (held - bare)) / 0.8).log_softmax(dim=0)[t.tokens_BL[b, i]]
            assert t.logprob_BL[b, i].item() == pytest.approx(expected.item(), abs=1e-5)
    assert sampler.status == "behaviour only"
    assert "guidance" in sampler.mismatch


def test_guidance_leaves_what_is_forbidden_forbidden(toys: ModuleType) -> None:
    """A token of logit -inf has no difference between the two calls: its probability stays 0, the others' are mixed."""
    toy, rows = toys.Toy(0), 200
    with torch.no_grad():
        toy.model.canvas[:, :, 1] = -torch.inf
    sampler = build_sampler({"schedule": {"name": "uniform", "steps": 3}, "guidance": 1.5, "eos": {"rule": "none"}})
    prompt_BQ = torch.tensor([[1, 3]]).expand(rows, -1)
    mask_BQ, canvas_BL = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.full((rows, toys.L), toys.MASK)
    t = denoise(toy, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(rows), seed=0)
    assert sorted(t.tokens_BL.unique().tolist()) == [0, 2]
    assert t.logprob_BL.isfinite().all()
