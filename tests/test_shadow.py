"""Shadow columns and WINO's verification, against sequences without the token and against plain loops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import Family
from unmask.policies.loading import new_denoiser
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rollouts.engine import LogitError, denoise
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.schedules import Quota
from unmask.rollouts.shadow import shadowed
from unmask.rollouts.trajectory import Trajectory

L, Q, BLOCK, MASK, EOS = 12, 5, 6, 257, 256


def model(layers: int, *, shift: int = 0) -> Denoiser:
    denoiser = new_denoiser(hidden_size=32, layers=layers, heads=2, mlp=64, seed=2)
    with torch.no_grad():
        denoiser.model.lm_head.weight.mul_(25)
        for layer in denoiser.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(25)
    return replace(denoiser, family=replace(denoiser.family, logit_shift=shift))


def half_decided(rows: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, 256, (rows, L), generator=rng)
    return tokens_BL.masked_fill(torch.rand(rows, L, generator=rng) < 0.5, MASK)


def by_loops(denoiser: Denoiser, ids: list[int], real: list[bool], region: list[int]) -> dict[int, Tensor]:
    """Return the shadow's raw hidden state of every position of the region, mask and places built entry by entry."""
    shift, columns = denoiser.family.logit_shift, len(ids)
    targets = [columns - L + i for i in region]
    tokens = ids + [ids[t - 1] if shift else MASK for t in targets]
    places = list(range(columns)) + [t - shift for t in targets]
    sees = [[False] * len(tokens) for _ in tokens]
    for query in range(len(tokens)):
        for key in range(len(tokens)):
            if query < columns:
                sees[query][key] = key < columns and real[key]
                continue
            target = targets[query - columns]
            if key < columns:
                sees[query][key] = real[key] and key != target and not (shift and key == target - 1)
            else:
                sees[query][key] = key == query or not shift
    hidden = denoiser.base.base_model(
        input_ids=torch.tensor([tokens]),
        attention_mask=torch.tensor(sees)[None, None],
        position_ids=torch.tensor([places]),
        use_cache=False,
    ).last_hidden_state[0]
    return {i: hidden[columns + n] for n, i in enumerate(region)}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_shadows_equal_masks_built_by_loops(layers: int, shift: int) -> None:
    """Rows with padding and other regions; what is open, or outside the region, is predicted as without shadows."""
    denoiser, canvas_BL = model(layers, shift=shift), half_decided(3)
    prompt_BQ = torch.randint(0, 256, (3, Q), generator=torch.Generator().manual_seed(1))
    real_BT = torch.ones(3, Q + L, dtype=torch.bool)
    real_BT[1, :2] = False
    ids_BT = torch.cat([prompt_BQ, canvas_BL], dim=1)
    region_BL = torch.zeros(3, L, dtype=torch.bool)
    region_BL[0, :BLOCK], region_BL[1, BLOCK:], region_BL[2, 2:5] = True, True, True
    found_BLD = shadowed(denoiser, ids_BT, real_BT, region_BL, canvas_BL == MASK, BLOCK)
    plain_BLD = denoiser.hidden(ids_BT, padding_mask_BT=real_BT)[:, -L:]
    for b in range(3):
        shadows = by_loops(denoiser, ids_BT[b].tolist(), real_BT[b].tolist(), region_BL[b].nonzero()[:, 0].tolist())
        for i in range(L):
            own = bool(region_BL[b, i]) and canvas_BL[b, i] != MASK
            expected_D = shadows[i] if own else plain_BLD[b, i]
            torch.testing.assert_close(found_BLD[b, i], expected_D, rtol=0, atol=2e-5)
            assert not own or (found_BLD[b, i] - plain_BLD[b, i]).abs().max() > 1e-2


@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_one_layer_of_shadows_is_leave_one_out(shift: int) -> None:
    """Without the token itself, and whatever it is: the same prediction, from a sequence that never had it."""
    denoiser, canvas_BL = (
        model(1, shift=shift),
        torch.randint(0, 256, (1, L), generator=torch.Generator().manual_seed(3)),
    )
    prompt_BQ, region_BL = torch.arange(Q)[None], torch.ones(1, L, dtype=torch.bool)
    open_BL = torch.zeros_like(region_BL)
    found_BLD = shadowed(denoiser, torch.cat([prompt_BQ, canvas_BL], dim=1), None, region_BL, open_BL, L)
    for i in range(L):
        other_BL = canvas_BL.clone()
        other_BL[0, i] = 99
        again_BLD = shadowed(denoiser, torch.cat([prompt_BQ, other_BL], dim=1), None, region_BL, open_BL, L)
        torch.testing.assert_close(again_BLD[0, i], found_BLD[0, i], rtol=0, atol=1e-6)
        columns = [c for c in range(Q + L) if c != Q + i]
        ids, places = torch.cat([prompt_BQ, canvas_BL], dim=1)[0, columns].tolist(), list(columns)
        if not shift:
            ids, places = ids + [MASK] * L, places + [Q + j for j in range(L)]
        hidden = denoiser.base.base_model(
            input_ids=torch.tensor([ids]), position_ids=torch.tensor([places]), use_cache=False
        ).last_hidden_state[0]
        at = Q + i - 1 if shift else Q + L - 1 + i
        torch.testing.assert_close(found_BLD[0, i], hidden[at], rtol=0, atol=2e-5)


def wino(**knobs: object) -> dict[str, object]:
    return {
        "schedule": {"name": "blocks", "size": BLOCK, "per_step": 1},
        "selection": {"name": "drafts", "level": 0.3, "share": 0.7, "low": 2, "high": 4},
        "remasking": {"name": "verify", "level": 0.5},
        "eos": {"rule": "none"},
        **knobs,
    }


def run(denoiser: object, sampler: Sampler, rows: int = 8, **options: object) -> Trajectory:
    prompt_BQ = torch.randint(0, 256, (rows, Q), generator=torch.Generator().manual_seed(4))
    mask_BQ, canvas_BL = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.full((rows, L), MASK)
    return denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(rows), seed=0, **options)


@torch.no_grad()
def decoded_by_loops(denoiser: Denoiser, prompt: list[int]) -> tuple[list[int], list[int], set[tuple[int, ...]]]:
    """Decode one row greedily as WINO does; return tokens, their steps, and (position, token, born, died)."""
    canvas, born, retired, step = [MASK] * L, [-1] * L, set(), 0
    while MASK in canvas:
        start = canvas.index(MASK) // BLOCK * BLOCK
        region = list(range(start, start + BLOCK))
        logits_TV = denoiser.logits(torch.tensor([prompt + canvas]))[0, -L:]
        logits_TV[:, MASK] = -torch.inf
        p_LV = logits_TV.softmax(dim=1)
        free = [i for i in region if canvas[i] == MASK]
        most = min(max(int(0.7 * len(free)), 2), 4)
        order = sorted(free, key=lambda i: (-p_LV[i].max().item(), i))
        taken = [i for i in order[:most] if p_LV[i].max() >= 0.3] or order[:1]
        shadows = by_loops(denoiser, prompt + canvas, [True] * (Q + L), region)
        support = {}
        for i in region:
            if canvas[i] != MASK:
                shadow_V = denoiser.head(shadows[i])
                shadow_V[MASK] = -torch.inf
                support[i] = shadow_V.softmax(dim=0)[canvas[i]].item()
        weak = sorted((i for i, value in support.items() if value < 0.5), key=lambda i: support[i])
        for i in weak[: len(taken) - 1]:
            retired.add((i, canvas[i], born[i], step))
            canvas[i], born[i] = MASK, -1
        for i in taken:
            canvas[i], born[i] = int(p_LV[i].argmax()), step
        step += 1
    return canvas, born, retired


@pytest.mark.parametrize("layers", [1, 2])
def test_wino_equals_a_plain_loop(layers: int) -> None:
    denoiser = model(layers)
    found = run(denoiser, build_sampler(wino(), temperature=0.0))
    taken_back = 0
    for b in range(len(found)):
        tokens, born, retired = decoded_by_loops(denoiser, found.prompt_BQ[b].tolist())
        assert found.tokens_BL[b].tolist() == tokens
        assert found.born_BL[b].tolist() == born
        past = found.retracted.select(torch.tensor([b]), len(found))
        entries = zip(past.position_R, past.token_R, past.born_R, past.died_R, strict=True)
        assert {tuple(map(int, entry)) for entry in entries} == retired
        taken_back += len(retired)
    assert taken_back > 3


def test_wino_ends_shares_its_first_call_and_keeps_its_shapes() -> None:
    denoiser, group_B = model(2), torch.arange(8) // 4
    sampler = build_sampler(wino(guidance=0.5), temperature=0.9)
    plain = run(denoiser, sampler)
    for options in ({"static": True}, {"group_B": group_B}):
        prompt_BQ = plain.prompt_BQ if "static" in options else plain.prompt_BQ[group_B * 4]
        mask_BQ, canvas_BL = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.full((8, L), MASK)
        one, other = (
            denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(8), seed=0, **given)
            for given in (options, {})
        )
        assert torch.equal(one.tokens_BL, other.tokens_BL)
        assert torch.equal(one.retracted.died_R, other.retracted.died_R)


@dataclass
class Stubborn:
    """A model that predicts the same everywhere, whatever it sees."""

    inner: Denoiser
    logits_V: Tensor

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def head(self, hidden: Tensor) -> Tensor:
        return self.logits_V.expand(*hidden.shape[:-1], -1).clone()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["mask", "EOS", "ties", "nan"])
def test_wino_ends_whatever_the_model_says(kind: str, temperature: float) -> None:
    """With ties nothing is ever supported: fewer tokens go than come at each step, so that it ends before the cap."""
    logits_V = torch.zeros(261)
    if kind != "ties":
        logits_V[MASK if kind == "mask" else EOS] = torch.nan if kind == "nan" else 1e4
    for rule in ("stop", "none"):
        sampler = build_sampler(wino(eos={"rule": rule}), temperature=temperature)
        if kind == "nan":
            with pytest.raises(LogitError, match="step 0: the logits at canvas position 0 are NaN"):
                run(Stubborn(model(1), logits_V), sampler)
            continue
        t = run(Stubborn(model(1), logits_V), sampler)
        t.validate()
        assert int(t.steps_B.max()) <= L
        assert rule == "stop" or not (t.tokens_BL == MASK).any()


def test_shadows_are_refused_where_there_are_none() -> None:
    sampler, denoiser = build_sampler(wino()), model(1)
    blocks = replace(denoiser, family=replace(denoiser.family, attention="block_causal", block_length=4))
    with pytest.raises(RecipeError, match=r"shadow columns need full attention .*; family 'llada' attends to blocks"):
        run(blocks, sampler)

    class Tables:
        family = Family("tables", 261, MASK, (EOS,))

    with pytest.raises(RecipeError, match="Tables gives logits alone"):
        run(Tables(), sampler)
    with pytest.raises(RecipeError, match="no cache has the shadow columns"):
        build_sampler(wino(cache="dual"))


def test_drafts_are_capped() -> None:
    """Of 10 open positions at most floor(0.7 x 10) = 7; of 4 at most 5, so all; never fewer than the quota."""
    part = SLOTS["selection"].build({"name": "drafts", "level": 0.5, "high": 8})
    for free, sure, count, expected in ((10, 10, 1, 7), (4, 4, 1, 4), (10, 3, 1, 3), (10, 0, 1, 1), (10, 0, 2, 2)):
        score_BL = torch.full((1, 12), -torch.inf)
        score_BL[0, :free] = -1.0 - torch.arange(free) / 100
        score_BL[0, :sure] = -torch.arange(sure) / 1000
        window_BL = score_BL > -torch.inf
        chosen_BL = part(score_BL, Quota(window_BL, torch.tensor([count])))
        assert chosen_BL[0].nonzero()[:, 0].tolist() == list(range(expected))
    with pytest.raises(RecipeError, match=r"share in \(0, 1\]"):
        SLOTS["selection"].build({"name": "drafts", "share": 0.0})(
            torch.zeros(1, 2), Quota(torch.ones(1, 2).bool(), torch.ones(1))
        )
