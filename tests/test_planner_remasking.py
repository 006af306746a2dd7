"""Planners that take tokens back: one distribution by enumeration, the engine's guarantees, gradient, and a gain."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import shortrun
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.planner import FEATURES, STANDING_FEATURES, PlannerSpec, new_planner
from unmask.policies.planner_distributions import Noise
from unmask.policies.planner_remasking import Remasking
from unmask.recipes.registry import RecipeError
from unmask.rl.planning import Planning
from unmask.rl.speed import multiplicative
from unmask.rl.surrogates import importance
from unmask.rollouts.engine import denoise
from unmask.rollouts.noise import uniform
from unmask.rollouts.planned import Acting, planner
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.trajectory import GIVEN, Trajectory

CANVAS, ROWS = 12, 9
WHOLE = {"name": "whole", "per_step": 1}
BLOCKS = {"name": "blocks", "size": 4, "per_step": 1}
PARTS = {"score": "planner", "selection": "planned", "remasking": "planned"}
# Open and standing candidates among seven positions; one is neither.
KINDS = {
    "three and three": ([0, 2, 5], [1, 4, 6]),
    "one and four": ([3], [0, 1, 2, 5]),
    "five and one": ([0, 1, 2, 3, 4], [6]),
    "none stands": ([1, 2, 6], []),
}


def tables(kind: str, rows: int) -> tuple[Tensor, Tensor]:
    found = torch.zeros(2, rows, 7, dtype=torch.bool)
    for table_BL, places in zip(found, KINDS[kind], strict=True):
        table_BL[:, places] = True
    return found[0], found[1]


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def enumerated(kind: str, logit_1L: Tensor, budget: int) -> tuple[Tensor, Tensor, Remasking]:
    """Return every set of candidates, its log-probability, and the distribution over as many rows."""
    places = sorted(itertools.chain(*KINDS[kind]))
    chosen_NL = torch.zeros(2 ** len(places), 7, dtype=torch.bool)
    chosen_NL[:, places] = torch.tensor(list(itertools.product([False, True], repeat=len(places))))
    distribution = Remasking(logit_1L.expand(len(chosen_NL), -1), *tables(kind, len(chosen_NL)), budget)
    return chosen_NL, distribution.log_prob(chosen_NL, chosen_NL.long()), distribution


def direct(kind: str, logit_L: Tensor, chosen_NL: Tensor, budget: int) -> Tensor:
    """Return the probabilities from the definition: independent decisions, given net progress."""
    opened, standing = KINDS[kind]
    chance_L = torch.sigmoid(logit_L)
    each_NL = torch.where(chosen_NL, chance_L, 1 - chance_L)[:, sorted(opened + standing)]
    count_N, back_N = chosen_NL[:, opened].sum(1), chosen_NL[:, standing].sum(1)
    weight_N = each_NL.prod(dim=1) * ((back_N < count_N) & (back_N <= budget))
    return weight_N / weight_N.sum()


@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("kind", list(KINDS))
def test_it_is_independent_decisions_given_net_progress(kind: str, budget: int) -> None:
    logit_1L = logits(budget)
    chosen_NL, logprob_N, distribution = enumerated(kind, logit_1L, budget)
    p_N = logprob_N.exp()
    assert abs(p_N.sum().item() - 1) < 1e-12
    torch.testing.assert_close(p_N, direct(kind, logit_1L[0], chosen_NL, budget), rtol=1e-10, atol=1e-14)
    entropy_N = distribution.entropy(chosen_NL, chosen_NL.long())
    torch.testing.assert_close(entropy_N[0], torch.special.entr(p_N).sum(), rtol=0, atol=1e-12)
    likeliest_L = distribution.mode().chosen_BL[0]
    assert torch.equal(likeliest_L, chosen_NL[p_N.argmax()])


@pytest.mark.parametrize("kind", list(KINDS))
def test_sampling_has_these_probabilities(kind: str) -> None:
    n, logit_1L = 30_000, logits(7) / 2
    chosen_NL, logprob_N, _ = enumerated(kind, logit_1L, 2)
    row_B, place_L = torch.arange(n), torch.arange(7)
    noise = Noise(*(uniform(0, name, 0, row_B[:, None], place_L) for name in "ab"), uniform(0, "c", 0, row_B))
    draw = Remasking(logit_1L.expand(n, -1), *tables(kind, n), 2).sample(noise)
    code_L = 2 ** torch.arange(7)
    found_X = torch.bincount((draw.chosen_BL * code_L).sum(dim=1), minlength=128) / n
    wanted_X = torch.zeros(128).double().index_add(0, (chosen_NL * code_L).sum(dim=1), logprob_N.exp())
    # Four and a half standard errors: a false alarm in 10^5 outcomes.
    assert ((found_X - wanted_X).abs() <= 4.5 * (wanted_X * (1 - wanted_X) / n).sqrt() + 1e-12).all()


def test_gradients_are_finite_differences() -> None:
    open_BL, standing_BL = tables("three and three", 2)
    chosen_BL = torch.tensor([[1, 0, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 1, 0]]).bool()

    def total(logit_BL: Tensor) -> Tensor:
        distribution = Remasking(logit_BL, open_BL, standing_BL, 1)
        rank_BL = chosen_BL.long()
        return distribution.log_prob(chosen_BL, rank_BL).sum() + distribution.entropy(chosen_BL, rank_BL).sum()

    assert torch.autograd.gradcheck(total, logits(3).expand(2, -1).clone().requires_grad_())


def test_extreme_logits_and_rows_without_candidates_are_finite() -> None:
    """Tokens that want to go and positions that want to stay shut; nothing to open; 37 positions, no power of 2."""
    logit_BL = torch.tensor([[60.0], [-60.0], [0.0]]).repeat(1, 37).requires_grad_()
    open_BL = torch.arange(37).expand(3, -1) % 3 == 0
    standing_BL = ~open_BL & (torch.arange(37) % 3 == 1)
    with torch.no_grad():
        logit_BL[0, open_BL[0]] = -60.0
    open_BL[2] = False
    distribution = Remasking(logit_BL, open_BL, standing_BL, 4)
    unit_BL = uniform(0, "x", 0, torch.arange(3)[:, None], torch.arange(37))
    draw = distribution.sample(Noise(unit_BL, unit_BL.flip(1), unit_BL[:, 0]))
    for chosen_BL in (draw.chosen_BL, distribution.mode().chosen_BL):
        opened_B, taken_B = (chosen_BL & open_BL).sum(1), (chosen_BL & standing_BL).sum(1)
        assert (taken_B[:2] < opened_B[:2]).all() and opened_B[1] == 1 and taken_B[1] == 0
        assert not chosen_BL[2].any()
    logprob_B, entropy_B = (measure(draw.chosen_BL, draw.chosen_BL.long()) for measure in
                            (distribution.log_prob, distribution.entropy))  # fmt: skip
    assert logprob_B[2] == 0 and entropy_B[2] == 0
    assert logprob_B.isfinite().all() and (logprob_B <= 1e-6).all() and (entropy_B >= -1e-5).all()
    (logprob_B.sum() + entropy_B.sum()).backward()
    assert logit_BL.grad is not None and logit_BL.grad.isfinite().all()


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return shortrun.decided_denoiser()


def acting(**more: Any) -> Acting:
    spec = PlannerSpec.of({"features": None, "distribution": "remasking", "width": 16, "mlp": 32, "bias": 0.0,
                           "back_bias": 0.5, "budget": 3, **more})  # fmt: skip
    made = new_planner(spec, seed=2)
    rng = torch.Generator().manual_seed(3)
    for parameter in made.network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng)
    return Acting(made, lambda state: torch.ones(len(state.step_A)))


def sampler_of(act: Acting, schedule: dict[str, Any], decide: str = "sample", temperature: float = 0.7) -> Sampler:
    section = {**PARTS, "schedule": schedule, "selection": {"name": "planned", "decide": decide}}
    sampler = build_sampler({**section, "eos": {"rule": "none"}}, temperature=temperature)
    return replace(sampler, score=partial(planner, acting=act), keeps_features=True)


def run(denoiser: Denoiser, sampler: Sampler, rows: list[int] | None = None, **more: Any) -> Trajectory:
    ids = torch.tensor(list(range(ROWS)) if rows is None else rows)
    rng = torch.Generator().manual_seed(0)
    prompt_BQ = torch.randint(0, 256, (ROWS, 6), generator=rng)[ids]
    canvas_BL = torch.full((len(ids), CANVAS), denoiser.family.mask_token_id)
    canvas_BL[:, 3] = 65  # a given token
    return denoise(denoiser, sampler, prompt_BQ, prompt_BQ >= 0, canvas_BL, ids, seed=5, step=2, **more)


def every_step(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    place_S = torch.arange(int(trajectory.steps_B.max()))
    return (place_S < trajectory.steps_B[:, None]).nonzero(as_tuple=True)


@pytest.mark.parametrize("decide", ["sample", "mode"])
@pytest.mark.parametrize("schedule", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_rollouts_make_progress_and_are_recorded(denoiser: Denoiser, schedule: dict[str, Any], decide: str) -> None:
    act, seen = acting(), []
    made = run(denoiser, sampler_of(act, schedule, decide), on_step=lambda tokens_BL: seen.append(tokens_BL.clone()))
    made.validate()
    row_N, step_N = every_step(made)
    canvas_NL, taken_NL = made.canvas_before(row_N, step_N), made.taken_at(row_N, step_N)
    assert taken_NL.any() and made.retracted is not None
    # What each step left, as the engine had it, is the canvas of the next one and the end, bit for bit.
    for row, step, canvas_L in zip(row_N.tolist(), step_N.tolist(), canvas_NL, strict=True):
        assert step == 0 or torch.equal(seen[step - 1][row], canvas_L)
    assert torch.equal(seen[-1], made.tokens_BL)
    # Given tokens stand, the masks grow fewer at every step, and so there are no more steps than positions.
    assert (made.source_BL[:, 3] == GIVEN).all() and (made.tokens_BL[:, 3] == 65).all() and not taken_NL[:, 3].any()
    masks_N = (canvas_NL == made.mask_token_id).sum(dim=1)
    same_N = row_N[1:] == row_N[:-1]
    assert (masks_N[1:] < masks_N[:-1])[same_N].all() and (made.steps_B <= CANVAS - 1).all()
    assert (made.tokens_BL != made.mask_token_id).all()
    token_NL, rank_NL = made.drawn_at(row_N, step_N)
    opened_NL = token_NL != made.mask_token_id
    assert (taken_NL.sum(1) < opened_NL.sum(1)).all() and taken_NL.sum(1).max() <= act.planner.spec.budget
    if schedule is BLOCKS:
        block_N = (canvas_NL == made.mask_token_id).to(torch.int8).argmax(dim=1) // 4
        assert (torch.arange(CANVAS) // 4 == block_N[:, None])[taken_NL].all()
    # Its log-probability is that of what was opened and taken back, from what was seen.
    assert made.features_BSLF is not None and made.candidate_BSL is not None
    feature_NLF, candidate_NL = made.features_BSLF[row_N, step_N].float(), made.candidate_BSL[row_N, step_N]
    open_NL = canvas_NL == made.mask_token_id
    distribution = act.planner.distribution(feature_NLF, candidate_NL & open_NL, candidate_NL & ~open_NL)
    found_N = distribution.log_prob(opened_NL | taken_NL, rank_NL)
    torch.testing.assert_close(found_N, made.choice_logprob_BS[row_N, step_N], rtol=0, atol=1e-5)
    assert not ((opened_NL | taken_NL) & ~candidate_NL).any()
    names = (*FEATURES, *STANDING_FEATURES)
    assert torch.equal(feature_NLF[..., names.index("standing")] == 1, candidate_NL & ~open_NL)
    if decide == "mode":
        assert torch.equal(distribution.mode().chosen_BL, opened_NL | taken_NL)


def test_what_a_standing_token_looks_like(denoiser: Denoiser) -> None:
    """`current` is the log-odds of the token itself, from a forward of its own."""
    act = acting()
    made = run(denoiser, sampler_of(act, WHOLE))
    row_N, step_N = every_step(made)
    canvas_NL = made.canvas_before(row_N, step_N)
    ids = torch.cat([made.prompt_BQ[row_N], canvas_NL], dim=1)
    logits_NLV = denoiser.logits(ids)[:, -CANVAS:]
    logits_NLV[..., denoiser.family.mask_token_id] = -torch.inf
    p_NL = logits_NLV.double().softmax(-1).gather(2, canvas_NL[..., None]).squeeze(2)
    wanted_NL = torch.logit(p_NL).clamp(-12, 12) / 4
    names = (*FEATURES, *STANDING_FEATURES)
    feature_NLF = made.features_BSLF[row_N, step_N]
    standing_NL = feature_NLF[..., names.index("standing")] == 1
    found_NL = feature_NLF[..., names.index("current")].double()
    torch.testing.assert_close(found_NL[standing_NL], wanted_NL[standing_NL], rtol=2e-3, atol=2e-3)
    assert standing_NL.any() and (found_NL[~standing_NL] == 0).all()


def test_a_row_does_not_depend_on_the_batch(denoiser: Denoiser) -> None:
    sampler = sampler_of(acting(), BLOCKS)
    together = run(denoiser, sampler)
    for part, rows in ((run(denoiser, sampler, [6, 2]), [6, 2]), (run(denoiser, sampler, static=True), range(ROWS))):
        for name in ("tokens_BL", "born_BL", "steps_B"):
            assert torch.equal(getattr(part, name), getattr(together, name)[list(rows)]), name


def planning_of(act: Acting, **more: Any) -> Planning:
    return Planning(act.planner, importance, multiplicative, **{"group": 1, "seed": 1, **more})


SEEN = ("odds", "masked", "left", "standing", "current")


def paths(toy: Any, planner: Any, prompt: Tensor) -> Iterator[tuple[tuple[int, ...], int, Tensor]]:
    """Yield (final canvas, steps, probability) of every rollout at token temperature 0, from the definitions."""
    length, mask, spec = toy.length, toy.family.mask_token_id, planner.spec
    weight_F, bias = planner.network.output.weight[0].double(), planner.network.output.bias[0].double()

    def walk(canvas: tuple[int, ...], steps: int, probability: Tensor) -> Iterator[tuple]:
        masks = [i for i in range(length) if canvas[i] == mask]
        stands = [i for i in range(length) if canvas[i] != mask]
        if not masks:
            yield canvas, steps, probability
            return
        p_LV = toy.logits(torch.cat([prompt, torch.tensor(canvas)])[None])[0, -length:, :mask].detach().softmax(-1)
        z = {}
        for i in range(length):
            odds, current = torch.logit(p_LV[i].max()) / 4, torch.zeros(()).double()
            if i in stands:
                odds, current = torch.zeros(()).double(), torch.logit(p_LV[i, canvas[i]]) / 4
            seen = [odds, float(i in masks), len(masks) / length, float(i in stands), current]
            z[i] = weight_F @ torch.tensor(seen).half().double() + bias
            z[i] = z[i] + (spec.back_bias - spec.bias) * (i in stands)
        choices = [
            (opened, taken)
            for count in range(1, len(masks) + 1)
            for opened in itertools.combinations(masks, count)
            for many in range(min(count - 1, spec.budget) + 1)
            for taken in itertools.combinations(stands, many)
        ]
        energy = torch.stack([sum(z[i] for i in opened + taken) for opened, taken in choices])
        for (opened, taken), share in zip(choices, energy.softmax(0), strict=True):
            after = list(canvas)
            for i in opened:
                after[i] = int(p_LV[i].argmax())
            for i in taken:
                after[i] = mask
            yield from walk(tuple(after), steps + 1, probability * share)

    yield from walk((mask,) * length, 0, torch.ones(()).double())


def test_the_gradient_is_that_of_the_expected_reward(toys: ModuleType) -> None:
    """All rollouts of a canvas of 4 by an enumerator that shares no code, against those that the engine has drawn."""
    toy, length, rows = toys.Toy(0, scale=2.0, length=4), 4, 20_000
    act = acting(network="linear", features=SEEN, bias=0.3, back_bias=0.2, budget=2)
    planning = planning_of(act)
    sampler = planning.acting(build_sampler({**PARTS, "schedule": WHOLE, "eos": {"rule": "none"}}, temperature=0.0))
    prompt = torch.tensor([1, 3])
    canvas_BL = torch.full((rows, length), toy.family.mask_token_id)
    prompt_BQ = prompt.expand(rows, -1)
    made = denoise(toy, sampler, prompt_BQ, prompt_BQ >= 0, canvas_BL, torch.arange(rows), seed=3)
    step_BS = torch.arange(int(made.steps_B.max())) < made.steps_B[:, None]
    # One rollout of each: told apart by what every step left.
    row_N, step_N = step_BS.nonzero(as_tuple=True)
    code_NL = made.canvas_before(row_N, step_N) * 5 ** torch.arange(length)
    identity_BS = torch.zeros(step_BS.shape, dtype=torch.long).index_put((row_N, step_N), code_NL.sum(1) + 1)
    _, path_B = torch.unique(torch.cat([identity_BS, made.tokens_BL], dim=1), dim=0, return_inverse=True)
    first_P = torch.tensor([int((path_B == p).nonzero()[0]) for p in range(int(path_B.max()) + 1)])
    made, step_PS = made.select(first_P), step_BS[first_P]
    logprob_P = torch.where(step_PS, made.choice_logprob_BS, 0.0).double().sum(dim=1)
    assert abs(logprob_P.exp().sum().item() - 1) < 1e-6
    assert made.retracted is not None and len(made.retracted.row_R) > 10
    # Frequencies of what was drawn.
    found_P = torch.bincount(path_B) / rows
    p_P = logprob_P.exp()
    assert ((found_P - p_P).abs() <= 4.5 * (p_P * (1 - p_P) / rows).sqrt()).all()

    def reward(tokens: tuple[int, ...], steps: int) -> float:
        return math.sin(1 + sum(5**i * v for i, v in enumerate(tokens))) / steps

    parameters = list(planning.learner.parameters())
    wanted = sum(p * reward(end, steps) for end, steps, p in paths(toy, act.planner, prompt))
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(wanted, parameters)])
    ends = zip(made.tokens_BL.tolist(), made.steps_B.tolist(), strict=True)
    advantage_P = torch.tensor([reward(tuple(end), steps) for end, steps in ends]) * p_P
    plan = planning.plan(None, None, made, advantage_P.float(), rng=None, sampler=sampler)
    planning.backward(None, plan)
    found = torch.cat([p.grad.flatten() for p in parameters]) * -plan.mass
    assert (found - exact).norm() <= 1e-4 * exact.norm() and exact.norm() > 1e-3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"selection": "top"}, "half of what selection planned draws"),
        ({"editing": "token_to_token"}, "and no editing"),
    ],
)
def test_samplers_that_cannot_hold_together_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_sampler({**PARTS, "schedule": WHOLE, **section})


def test_a_planner_and_a_sampler_that_do_not_fit_are_refused() -> None:
    plain = build_sampler({"schedule": WHOLE, "score": "planner", "selection": "planned"})
    with pytest.raises(RecipeError, match="set sampler"):
        planning_of(acting()).acting(plain)
    opening = Acting(new_planner(PlannerSpec(network="linear")), lambda state: torch.ones(len(state.step_A)))
    with pytest.raises(RecipeError, match="takes no tokens back"):
        planning_of(opening).acting(build_sampler({**PARTS, "schedule": WHOLE}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"features": ["odds", "standing"]}, "use distribution remasking"),
        ({"budget": 0}, "between 1 and 8"),
        ({"budget": 9, "distribution": "remasking"}, "between 1 and 8"),
    ],
)
def test_impossible_specs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PlannerSpec.of(values)


@pytest.mark.slow
def test_a_policy_that_takes_tokens_back_beats_the_best_that_does_not(policy_toys: ModuleType) -> None:
    """Where early tokens are often wrong and look so afterwards: above the exact best value of all that only open."""
    toy = policy_toys.Exchangeable(0.3)
    row = importlib.import_module("policy_remasking").regret(0)
    assert row["best_opening"] == toy.best(0.3) == pytest.approx(0.2493, abs=1e-4)
    assert row["best_with_remasking"] == pytest.approx(0.8558, abs=1e-4)
    assert row["reward"] - 4 * row["stderr"] > row["best_opening"]
    assert row["reward"] > 0.8 * row["best_with_remasking"]
