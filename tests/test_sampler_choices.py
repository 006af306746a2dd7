"""The log-probability of chosen positions: by enumeration of one step's draws, and the same in rollout and trainer."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import new_denoiser
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl.objective import build_objective
from unmask.rollouts.choices import Scored, choice_logprob
from unmask.rollouts.engine import denoise
from unmask.rollouts.measures import Statistics, token_odds
from unmask.rollouts.ranking import rank
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.schedules import Quota
from unmask.rollouts.state import State
from unmask.rollouts.trajectory import Trajectory

V, L, EOS = 4, 6, 2
MASK = V
OPEN = [0, 1, 3, 4]  # a gap splits the runs
SELECTIONS = {
    "top": {"name": "top"},
    "all": {"name": "all"},
    "threshold": {"name": "threshold", "level": 0.5},
    "confident": {"name": "confident", "level": 0.5},
    "factor": {"name": "factor", "f": 1.4},
    "frechet": {"name": "frechet", "f": 1.4},
    "local_leap": {"name": "local_leap", "level": 0.5, "relaxed": 0.25, "radius": 1},
    "hierarchical": {"name": "hierarchical", "level": 0.6, "low": 0.3},
}


def sampler_of(selection: object, score: object = "sampled_confidence", **more: object) -> Sampler:
    temperature = more.pop("temperature", 1.0)
    schedule = more.pop("schedule", {"name": "whole", "per_step": 2})
    return build_sampler(
        {"schedule": schedule, "score": score, "selection": selection, **more}, temperature=temperature
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("score", ["sampled_confidence", "sampled_eoser"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_steps_outcomes_have_the_probability_of_their_draws(name: str, score: str, count: int, ties: bool) -> None:
    """All 256 draws of 4 positions x 4 tokens go through the selection; P(positions, tokens) is the sum of their mass.

    q at temperature 0.9, scores at 1.2. With `ties` positions have equal logits, so that bars are met exactly.
    """
    logits_LV = 1.3 * torch.randn(L, V, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    if ties:
        logits_LV[4] = logits_LV[3] = logits_LV[1] = logits_LV[0]
        logits_LV[:, 1] = logits_LV[:, 0]
    knobs = {} if score == "sampled_confidence" else {"low": 0.3, "steps": 5}
    sampler = sampler_of(SELECTIONS[name], {"name": score, **knobs}, temperature=0.9, score_temperature=1.2)
    draw_BK = torch.tensor(list(itertools.product(range(V), repeat=len(OPEN))))
    rows = len(draw_BK)
    token_BL = torch.full((rows, L), MASK).index_copy(1, torch.tensor(OPEN), draw_BK)
    window_BL = token_BL != MASK
    state = State.of(torch.where(window_BL, MASK, 0), MASK, step=1, eos_token_ids=(EOS,))
    odds_LV = token_odds(logits_LV, temperature=1.2)
    odds_BL = torch.zeros(rows, L, dtype=torch.float64).index_copy(1, torch.tensor(OPEN), odds_LV[OPEN, draw_BK])
    state.statistics = Statistics.blank(rows, L)._replace(token=token_BL, drawn=odds_BL)
    state.window_AL = window_BL
    score_BL = sampler.scores(state)
    chosen_BL = sampler.choose(state, score_BL, Quota(window_BL, torch.full((rows,), count)))
    q_LV = (logits_LV / 0.9).softmax(dim=1)
    mass_B = q_LV[OPEN, draw_BK].prod(dim=1)
    # The draws that agree in positions and tokens are one outcome.
    outcome_BL = torch.full((rows, L), -1).index_copy(1, torch.tensor(OPEN), draw_BK).masked_fill(~chosen_BL, -1)
    _, index_B = torch.unique(outcome_BL, dim=0, return_inverse=True)
    expected_B = torch.zeros(rows, dtype=torch.float64).index_add(0, index_B, mass_B)[index_B]

    # What a replay knows: the scores of the chosen positions alone.
    scored = Scored(score_BL.masked_fill(~chosen_BL, -torch.inf), chosen_BL, rank(score_BL), window_BL)
    logits_WV = logits_LV[OPEN].repeat(rows, 1)
    choice_B = choice_logprob(sampler, logits_WV, scored, state, ())
    token_B = torch.where(chosen_BL[:, OPEN], q_LV[OPEN, draw_BK].log(), 0.0).sum(dim=1)
    torch.testing.assert_close((choice_B + token_B).exp(), expected_B, rtol=1e-9, atol=0)
    one_each = {outcome: b for b, outcome in enumerate(index_B.tolist())}
    assert sum((choice_B + token_B)[b].exp().item() for b in one_each.values()) == pytest.approx(1, abs=1e-12)
    if name != "all":
        assert choice_B.min() < -0.1


@pytest.mark.parametrize("name", ["threshold", "confident", "local_leap", "hierarchical"])
def test_a_draw_exactly_at_a_level_passes(name: str) -> None:
    """Two tokens of probability 1/2 at every position, level 1/2: all positions are taken, with certainty."""
    knobs = {"relaxed": 0.4} if name == "local_leap" else {"low": 0.5} if name == "hierarchical" else {}
    sampler = sampler_of({"name": name, "level": 0.5, **knobs})
    window_BL = torch.ones(1, 3, dtype=torch.bool)
    score_BL = torch.nn.functional.logsigmoid(token_odds(torch.zeros(3, 2, dtype=torch.float64)))[:, :1].T
    assert sampler.choose(State.of(torch.full((1, 3), MASK), MASK), score_BL, Quota(window_BL, torch.ones(1))).all()
    # Had one been left open, no draw of its could explain it.
    chosen_BL = torch.tensor([[True, True, False]])
    state, scored = State.of(torch.full((1, 3), MASK), MASK), Scored(score_BL, chosen_BL, chosen_BL.long(), window_BL)
    assert choice_logprob(sampler, torch.zeros(3, 2, dtype=torch.float64), scored, state, ()) == -torch.inf


# --- A drawn order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["score", "probability"])
def test_an_order_is_drawn_as_often_as_its_log_probability_says(of: str) -> None:
    """40,000 draws of 2 of 4 positions: all 12 orders within 4 standard errors, and their probabilities sum to 1."""
    rows, chance_L = 40_000, torch.tensor([0.9, 0.2, 0.0, 0.5, 0.6], dtype=torch.float64)
    window_BL = torch.tensor([True, True, False, True, True]).expand(rows, -1)
    score_BL = chance_L.log().expand(rows, -1)
    part = SLOTS["selection"].build({"name": "plackett_luce", "temperature": 0.7, "of": of})
    state = State.of(torch.where(window_BL, MASK, 0), MASK)
    chosen_BL = part(score_BL, Quota(window_BL, torch.full((rows,), 2)), state=state)
    assert (chosen_BL.sum(1) == 2).all() and not chosen_BL[:, 2].any()
    place_BL = rank(part.func.keys(score_BL, state, temperature=0.7, of=of))
    rank_BL = torch.where(chosen_BL, place_BL, -1)
    first_B, second_B = ((rank_BL == n).long().argmax(dim=1) for n in (0, 1))
    logprob_B = part.func.order_logprob(score_BL, chosen_BL, rank_BL, window_BL, temperature=0.7, of=of)
    weight = {i: math.exp((c if of == "probability" else math.log(c)) / 0.7) for i, c in enumerate(chance_L) if c > 0}
    total = 0.0
    for i, j in itertools.permutations(weight, 2):
        share = weight[i] / sum(weight.values()) * weight[j] / (sum(weight.values()) - weight[i])
        drawn_B = (first_B == i) & (second_B == j)
        assert abs(drawn_B.sum().item() - rows * share) < 4 * math.sqrt(rows * share * (1 - share))
        torch.testing.assert_close(logprob_B[drawn_B].exp(), torch.full_like(logprob_B[drawn_B], share))
        total += share
    assert total == pytest.approx(1)


def test_the_gradient_of_an_order_is_finite_and_right() -> None:
    score_BL = torch.tensor([[-0.1, -2.0, -torch.inf, -0.7, -90.0]], dtype=torch.float64, requires_grad=True)
    chosen_BL = torch.tensor([[True, False, False, True, False]])
    rank_BL, window_BL = torch.tensor([[1, -1, -1, 0, -1]]), score_BL.detach() > -torch.inf
    order_logprob = SLOTS["selection"].get("plackett_luce").order_logprob
    order_logprob(score_BL, chosen_BL, rank_BL, window_BL, temperature=0.5).sum().backward()
    # d/dw of w_3 - lse(w_0, w_1, w_3, w_4) + w_0 - lse(w_0, w_1, w_4), times dw/dscore = 2.
    w = [2 * s for s in (-0.1, -2.0, -0.7, -90.0)]
    first = torch.tensor(w, dtype=torch.float64).softmax(0)
    second = torch.tensor([w[0], w[1], w[3]], dtype=torch.float64).softmax(0)
    expected = [1 - first[0] - second[0], -first[1] - second[1], 0, 1 - first[2], -first[3] - second[2]]
    torch.testing.assert_close(score_BL.grad[0], 2 * torch.tensor(expected, dtype=torch.float64))


# --- In rollout and trainer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Denoiser:
    denoiser = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64, seed=1)
    with torch.no_grad():
        denoiser.model.lm_head.weight.mul_(60)
    return denoiser


def rollouts(model: Denoiser, sampler: Sampler, static: bool = False, seed: int = 3) -> Trajectory:
    rng = torch.Generator().manual_seed(0)
    prompt_BQ = torch.randint(0, 256, (5, 6), generator=rng)
    mask_BQ = torch.arange(6) >= torch.arange(5)[:, None]
    canvas_BL = torch.full((5, 12), model.family.mask_token_id)
    canvas_BL[1, 4:6] = 65
    return denoise(model, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(5), seed=seed, static=static)


REAL = {
    "drawn order": ({"name": "plackett_luce", "temperature": 0.5}, "confidence"),
    "drawn order of margins": ({"name": "plackett_luce", "of": "probability"}, "margin"),
    "drawn order of entropies": ({"name": "plackett_luce", "temperature": 2.0}, "entropy"),
    "factor": ({"name": "factor", "f": 1.4}, "sampled_confidence"),
    "frechet": ({"name": "frechet", "f": 1.8}, "sampled_confidence"),
    "leap": (SELECTIONS["local_leap"], "sampled_confidence"),
    "halves": (SELECTIONS["hierarchical"], "sampled_confidence"),
    "eoser": ({"name": "top"}, {"name": "sampled_eoser", "low": 0.1}),
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_the_first_ratio_is_one(model: Denoiser, name: str, static: bool) -> None:
    """What the rollout records is what the trainer recomputes, tokens and choices, also with static shapes."""
    selection, score = REAL[name]
    blocks = {"name": "blocks", "size": 6, "per_step": 2}
    sampler = sampler_of(selection, score, schedule=blocks, temperature=0.9, eos={"rule": "none"})
    trajectory = rollouts(model, sampler, static)
    trajectory.validate()
    section = {"estimator": {"name": "trace", "tokens": "all"}, "unit": "token", "bound": "sum", "chunk": 7}
    objective = build_objective({**section, "surrogate": "importance", "weight": "uniform"})
    plan = replace(objective, old="recompute").plan(model, None, trajectory, torch.ones(5), rng=None, sampler=sampler)
    choices = ~plan.views.actions.token_A
    assert int(choices.sum()) == int(trajectory.steps_B.sum())
    torch.testing.assert_close(plan.behaviour_A, plan.old_A, rtol=0, atol=5e-5)
    assert plan.behaviour_A[choices].min() < -0.05


@pytest.mark.parametrize("seed", range(8))
def test_static_shapes_change_no_choice(model: Denoiser, seed: int) -> None:
    """Rows of a step are then padded to the block: each tail must still be that of its own position, and counted once.

    The padding points at the very last position, so some seed must leave that one open beside padded rows.
    """
    sampler = sampler_of("top", schedule={"name": "blocks", "size": 6, "per_step": 1}, eos={"rule": "none"})
    dynamic, static = (rollouts(model, sampler, flag, seed) for flag in (False, True))
    assert torch.equal(dynamic.tokens_BL, static.tokens_BL)
    steps = dynamic.choice_logprob_BS.shape[1]
    torch.testing.assert_close(static.choice_logprob_BS[:, :steps], dynamic.choice_logprob_BS, rtol=0, atol=1e-5)


def test_the_last_allowed_step_decides_the_whole_canvas_in_static_shapes_too(model: Denoiser) -> None:
    """Two steps for three blocks of 4: the second takes all that is left, beyond its block."""
    blocks = {"schedule": {"name": "blocks", "size": 4, "per_step": 1}, "max_steps": 2, "eos": {"rule": "none"}}
    dynamic, static = (rollouts(model, sampler_of("top", "confidence", **blocks), flag) for flag in (False, True))
    assert torch.equal(dynamic.tokens_BL, static.tokens_BL)
    assert static.logprob_BL.isfinite().all()
    assert dynamic.steps_B.tolist() == static.steps_B.tolist() == [2] * 5


def test_ranks_are_the_order_of_the_draws(model: Denoiser) -> None:
    """At a high temperature the recorded order has little to do with the scores, and not all rows agree with them."""
    orders = []
    for temperature in (1e-4, 50.0):
        selection = {"name": "plackett_luce", "temperature": temperature}
        sampler = sampler_of(
            selection, "left_to_right", schedule={"name": "whole", "per_step": 12}, eos={"rule": "none"}
        )
        trajectory = rollouts(model, sampler)
        orders.append(trajectory.rank_BL[0].tolist())
    assert orders[0] == list(range(12))
    assert orders[1] != list(range(12)) and sorted(orders[1]) == list(range(12))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"score": "sampled_confidence", "selection": "slow_fast"}, "'slow_fast' has no closed form over drawn tokens"),
        ({"score": "sampled_eoser", "selection": "plackett_luce"}, "'plackett_luce' has no closed form"),
        ({"schedule": "origin", "score": "sampled_confidence"}, "sampler.schedule: .* needs what 'origin' decided"),
        ({"schedule": "origin", "selection": "plackett_luce"}, "sampler.schedule: .* needs what 'origin' decided"),
        ({"score": "random", "selection": "plackett_luce"}, "sampler.score: .* needs what 'random' decided"),
    ],
)
def test_what_no_trainer_could_rebuild_is_refused_unless_naive(section: dict, message: str) -> None:
    section = {"schedule": "whole", **section}
    with pytest.raises(RecipeError, match=message):
        build_sampler(section)
    assert build_sampler({**section, "exact": False}).status == "behaviour only"


def test_status_of_what_is_drawn_and_taken_back() -> None:
    """A remasking that drops draws of the same step leaves an order without its members: behaviour only."""
    section = {"schedule": "whole", "selection": "plackett_luce"}
    assert build_sampler(section).status == "exact with order"
    assert build_sampler({**section, "remasking": "running_confidence"}).status == "behaviour only"
    assert build_sampler({"schedule": "whole", "selection": "local_leap"}).status == "exact"
    assert build_sampler({"schedule": "whole", "score": "sampled_eoser"}).status == "exact with tail mass"
