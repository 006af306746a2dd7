"""Planners in rollouts: what is recorded is what was drawn, and what they see is what the formulas say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import shortrun
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import load_denoiser
from unmask.policies.planner import FEATURES, Planner, PlannerSpec, new_planner
from unmask.policies.planner_networks import Logits
from unmask.recipes.registry import RecipeError
from unmask.rollouts.engine import denoise
from unmask.rollouts.features import observe
from unmask.rollouts.measures import Statistics
from unmask.rollouts.planned import Acting, Expert, planner
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.state import State
from unmask.rollouts.trajectory import Trajectory

CANVAS, ROWS, EOS = 16, 7, 256
WHOLE = {"name": "whole", "per_step": 1}
BLOCKS = {"name": "blocks", "size": 4, "per_step": 1}
SPECS = {
    "bernoulli": PlannerSpec(width=16, mlp=32),
    "argmax": PlannerSpec(width=16, mlp=32, fallback="argmax"),
    "empty": PlannerSpec(width=16, mlp=32, fallback="none", bias=-4.0),
    "plackett_luce": PlannerSpec(width=16, mlp=32, distribution="plackett_luce"),
    "count": PlannerSpec(width=16, mlp=32, distribution="count", counts=(1, 2, 3)),
    "categorical": PlannerSpec(network="linear", distribution="categorical"),
}


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return shortrun.decided_denoiser()


def acting(spec: PlannerSpec, **more: Any) -> Acting:
    made = new_planner(spec, seed=2)
    rng = torch.Generator().manual_seed(3)
    for parameter in made.network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng)
    return Acting(made, lambda state: torch.where(state.rollout_id_A % 2 == 0, 0.5, 3.0), **more)


def sampler_of(act: Acting, schedule: dict[str, Any] = WHOLE, decide: str = "sample", **more: Any) -> Sampler:
    section = {"schedule": schedule, "score": "planner", "selection": {"name": "planned", "decide": decide}, **more}
    sampler = build_sampler(section, temperature=more.pop("temperature", 0.0))
    return replace(sampler, score=partial(planner, acting=act), keeps_features=True)


def run(denoiser: Denoiser, sampler: Sampler, rows: list[int] | None = None, **more: Any) -> Trajectory:
    ids = torch.tensor(list(range(ROWS)) if rows is None else rows)
    rng = torch.Generator().manual_seed(0)
    prompt_BQ = torch.randint(0, 256, (ROWS, 6), generator=rng)[ids]
    mask_BQ = torch.ones_like(prompt_BQ, dtype=torch.bool)
    canvas_BL = torch.full((len(ids), CANVAS), denoiser.family.mask_token_id)
    return denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, ids, seed=5, step=2, **more)


def every_step(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Return (row, step) of all steps that were taken."""
    place_S = torch.arange(int(trajectory.steps_B.max()))
    return (place_S < trajectory.steps_B[:, None]).nonzero(as_tuple=True)


@pytest.mark.parametrize("schedule", [WHOLE, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("kind", list(SPECS))
def test_the_recorded_log_probability_is_recomputed_from_what_was_seen(
    denoiser: Denoiser, kind: str, schedule: dict[str, Any]
) -> None:
    act = acting(SPECS[kind])
    trajectory = run(denoiser, sampler_of(act, schedule))
    trajectory.validate()
    row_N, step_N = every_step(trajectory)
    assert trajectory.features_BSLF is not None and trajectory.candidate_BSL is not None
    distribution = act.planner.distribution(
        trajectory.features_BSLF[row_N, step_N].float(), trajectory.candidate_BSL[row_N, step_N]
    )
    token_NL, rank_NL = trajectory.drawn_at(row_N, step_N)
    chosen_NL = token_NL != trajectory.mask_token_id
    found_N = distribution.log_prob(chosen_NL, rank_NL)
    torch.testing.assert_close(found_N, trajectory.choice_logprob_BS[row_N, step_N], rtol=0, atol=1e-5)
    assert (found_N < 0).any()
    # The last allowed step takes all that is left, and is no choice of the planner's.
    own_N = trajectory.candidate_BSL[row_N, step_N].any(dim=1)
    assert own_N.all() or kind == "empty"
    assert not (chosen_NL & ~trajectory.candidate_BSL[row_N, step_N])[own_N].any()
    empty_N = ~chosen_NL.any(dim=1)
    assert bool(empty_N.any()) == (kind == "empty")
    if kind == "categorical":
        assert (chosen_NL.sum(dim=1) == 1).all()
    # Masked as the canvases say, and the trade-off is each row's own.
    mask_NL = trajectory.canvas_before(row_N, step_N) == trajectory.mask_token_id
    feature_NLF = trajectory.features_BSLF[row_N, step_N]
    assert torch.equal(feature_NLF[..., FEATURES.index("masked")] == 1, mask_NL)
    wanted_N = torch.where(row_N % 2 == 0, 0.5, 3.0).log().half()
    assert torch.equal(feature_NLF[:, 0, FEATURES.index("alpha")], wanted_N)


@pytest.mark.parametrize("kind", ["bernoulli", "plackett_luce", "count"])
def test_a_row_does_not_depend_on_the_batch(denoiser: Denoiser, kind: str) -> None:
    sampler = sampler_of(acting(SPECS[kind]), BLOCKS, temperature=0.7)
    together = run(denoiser, sampler)
    for rows in ([4], [6, 2, 0]):
        part = run(denoiser, sampler, rows)
        for name in ("tokens_BL", "born_BL", "steps_B"):
            assert torch.equal(getattr(part, name), getattr(together, name)[rows]), name
    fixed = run(denoiser, sampler, static=True)
    assert torch.equal(fixed.tokens_BL, together.tokens_BL)
    torch.testing.assert_close(
        Trajectory.cat([together, run(denoiser, sampler, [1])]).features_BSLF[:ROWS], together.features_BSLF
    )


class Fixed(torch.nn.Module):
    """A network that reads one feature and answers with large logits of one sign: no chance is left."""

    def __init__(self, level: float, feature: str) -> None:
        super().__init__()
        self.level, self.at = level, FEATURES.index(feature)

    def forward(self, feature_BLF: Tensor) -> Logits:
        # The small slope orders what is below the level; fp16 features are too coarse for more.
        return Logits(
            torch.where(feature_BLF[..., self.at] >= self.level, 60.0, -60.0) + feature_BLF[..., self.at], None
        )


@pytest.mark.parametrize("schedule", [WHOLE, BLOCKS], ids=["whole", "blocks"])
def test_a_policy_that_is_a_threshold_decodes_like_the_threshold(schedule: dict[str, Any]) -> None:
    """s = 1[c > level], argmax otherwise: token for token Fast-dLLM, where fp16 tells confidences apart."""
    level, denoiser = 0.6, load_denoiser("unmask:tiny")
    cut = torch.logit(torch.tensor(level)).item() / 4
    spec = replace(PlannerSpec(), fallback="argmax")
    act = Acting(Planner(spec, Fixed(cut, "odds")), lambda state: torch.ones(len(state.step_A)))
    wanted = run(
        denoiser,
        build_sampler({"schedule": schedule, "selection": {"name": "threshold", "level": level}}, temperature=0.0),
    )
    for decide in ("sample", "mode"):
        found = run(denoiser, sampler_of(act, schedule, decide))
        assert torch.equal(found.tokens_BL, wanted.tokens_BL) and torch.equal(found.born_BL, wanted.born_BL)
        assert torch.equal(found.steps_B, wanted.steps_B)


def test_degenerate_policies_take_all_or_one(denoiser: Denoiser) -> None:
    spec = replace(PlannerSpec(), fallback="argmax")

    def steps(level: float, schedule: dict[str, Any]) -> list[int]:
        act = Acting(Planner(spec, Fixed(level, "odds")), lambda state: torch.ones(len(state.step_A)))
        return run(denoiser, sampler_of(act, schedule, eos={"suppress": True})).steps_B.unique().tolist()

    assert steps(-100.0, WHOLE) == [1] and steps(-100.0, BLOCKS) == [CANVAS // 4]
    assert steps(100.0, WHOLE) == steps(100.0, BLOCKS) == [CANVAS]


def test_an_expert_drives_its_rows_and_leaves_the_others(denoiser: Denoiser) -> None:
    def level(state: State) -> Tensor:
        return torch.where(state.rollout_id_A < 3, 0.3, torch.nan)

    plain, act = acting(SPECS["bernoulli"]), acting(SPECS["bernoulli"], expert=Expert(level, block=4))
    found, alone = run(denoiser, sampler_of(act)), run(denoiser, sampler_of(plain))
    rule = {"schedule": BLOCKS, "selection": {"name": "threshold", "level": 0.3}}
    expert = run(denoiser, build_sampler(rule, temperature=0.0))
    for name in ("tokens_BL", "born_BL", "steps_B"):
        value = getattr(found, name)
        assert torch.equal(value[:3], getattr(expert, name)[:3]) and torch.equal(value[3:], getattr(alone, name)[3:])
    # The policy scores the expert's choice over all masks, not over the expert's block.
    assert found.candidate_BSL is not None and found.candidate_BSL[0, 0].sum() == CANVAS


def test_features_by_hand() -> None:
    """Two steps of a canvas of four positions, the second given; -1 is the mask."""
    state = State.of(torch.tensor([[-1, 7, -1, -1]]), -1, step=2, eos_token_ids=(9,))
    state.window_AL = torch.tensor([[True, False, True, False]])
    table = Statistics.blank(1, 4)._replace(
        best=torch.tensor([[9, 0, 3, 4]]),
        confidence=torch.tensor([[0.9, 1.0, 0.5, 0.25]]).log(),
        odds=torch.logit(torch.tensor([[0.9, 0.5, 0.5, 0.25]])),
        second=torch.tensor([[0.05, 1.0, 0.3, 0.25]]).log(),
        entropy=torch.tensor([[0.5, 0.0, 1.0, 3.0]]),
    )
    state.statistics = table
    observe(state, FEATURES, torch.tensor([2.0]))
    state.statistics = table._replace(best=torch.tensor([[9, 0, 5, 4]]))
    found = dict(zip(FEATURES, observe(state, FEATURES, torch.tensor([2.0]))[0].unbind(dim=1), strict=True))
    log = torch.tensor([3.0, 4.0]).log() / 4
    wanted = {
        "odds": [torch.tensor(9.0).log() / 4, 0.0, 0.0, -torch.tensor(3.0).log() / 4],
        "margin": [0.85, 0.0, 0.2, 0.0],
        "entropy": [1 / 3, 0.0, 0.5, 0.75],
        "eos": [1.0, 0.0, 0.0, 0.0],
        "persistence": [0.5, 0.0, 0.0, 0.5],
        "frontier": [0.0, 0.0, log[0], log[1]],
        "candidate": [1.0, 0.0, 1.0, 0.0],
        "masked": [1.0, 0.0, 1.0, 1.0],
        "time": [0.5] * 4,
        "left": [0.75] * 4,
        "alpha": [torch.tensor(2.0).log()] * 4,
    }
    assert set(wanted) == set(FEATURES)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].float(), torch.tensor(value), rtol=1e-3, atol=1e-3, msg=name)


def test_a_saved_planner_is_used_in_any_sampler(denoiser: Denoiser, tmp_path: Path) -> None:
    act = acting(SPECS["bernoulli"])
    act.planner.save(tmp_path / "planner")
    told = Acting(act.planner, lambda state: torch.full((len(state.step_A),), 2.0))
    wanted = run(denoiser, sampler_of(told, BLOCKS))
    score = {"name": "planner", "path": str(tmp_path), "alpha": 2.0}
    found = run(denoiser, build_sampler({"schedule": BLOCKS, "score": score, "selection": "planned"}, temperature=0.0))
    assert torch.equal(found.tokens_BL, wanted.tokens_BL) and found.features_BSLF is None
    assert found.choice_logprob_BS is not None
    # As a score of another selection: the two likeliest to be opened, whatever they are.
    rule = {"schedule": {**BLOCKS, "per_step": 2}, "score": score, "selection": "top"}
    assert (run(denoiser, build_sampler(rule, temperature=0.0)).steps_B <= CANVAS // 2).all()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"schedule": WHOLE, "selection": "planned"}, "use score planner with it"),
        ({"schedule": WHOLE, "score": "planner", "length": {"name": "eos_density", "start": 10}}, "changes its length"),
    ],
)
def test_samplers_that_cannot_hold_together_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_sampler(section)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"temperature": 0.0}, "must be above 0"), ({"alpha": -1.0}, "at least 0"), ({}, "needs a trained planner")],
)
def test_wrong_knobs_are_refused(denoiser: Denoiser, knobs: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(denoiser, build_sampler({"schedule": WHOLE, "score": {"name": "planner", **knobs}}))
