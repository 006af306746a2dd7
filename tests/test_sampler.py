"""`denoise` on a small real model: what every sampler guarantees, exact replay, and invariance to the batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
import shortrun
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rollouts.categorical import log_probs
from unmask.rollouts.engine import denoise
from unmask.rollouts.forward import window_logits
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.state import State
from unmask.rollouts.trajectory import GIVEN, PAD, SAMPLED, Trajectory

L, ROWS = 12, 5
EOS, MASK = 256, 257
# Every registered part appears here; a new one fails `test_every_part_is_covered` until it is added.
SCHEDULES = {
    "uniform": {"name": "uniform", "steps": 5},
    "cosine": {"name": "cosine", "steps": 5},
    "blocks": {"name": "blocks", "size": 4, "steps": 6},
    "whole": {"name": "whole", "per_step": 2},
    "time": {"name": "time", "steps": 6, "realign": True},
    "origin": {"name": "origin", "steps": 5},
    "ascending": {"name": "ascending", "blocks": 2},
    "dilated": {"name": "dilated", "size": 6},
    "cross_blocks": {"name": "cross_blocks", "size": 4, "ahead": 1, "per_step": 2},
}
SELECTIONS = {
    "top": {"name": "top"},
    "all": {"name": "all"},
    "threshold": {"name": "threshold", "level": 0.05},
    "confident": {"name": "confident", "level": 0.05},
    "factor": {"name": "factor", "f": 2.9},
    "frechet": {"name": "frechet", "f": 2.9},
    "entropy_budget": {"name": "entropy_budget", "nats": 3.0},
    "plackett_luce": {"name": "plackett_luce", "temperature": 0.5},
    "local_leap": {"name": "local_leap", "level": 0.06, "relaxed": 0.04, "radius": 1},
    "hierarchical": {"name": "hierarchical", "level": 0.06, "low": 0.04},
    "running_threshold": {"name": "running_threshold"},
    "drafts": {"name": "drafts", "level": 0.05, "low": 2, "high": 3},
    "explore": {"name": "explore", "level": 0.05, "probes": 2, "near": 3},
    "stable": {"name": "stable", "level": 0.03, "drift": 0.5, "steps": 1},
    "slow_fast": {"name": "slow_fast", "level": 0.05, "reach": 0.03},
}
SCORES = [
    "confidence",
    "sampled_confidence",
    "entropy",
    "margin",
    "random",
    "left_to_right",
    "eoser",
    "sampled_eoser",
    "calibrated",
]


@dataclass
class Recorder:
    """A denoiser that writes down what it is asked; EOS is made likely, so that rows end at different steps."""

    inner: Denoiser
    eos_bonus: float = 2.5
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def family(self) -> object:
        return self.inner.family

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        assert positions_BT is not None
        self.seen.append((input_ids_BT.clone(), positions_BT.clone()))
        logits = self.inner.logits(input_ids_BT, padding_mask_BT=padding_mask_BT, positions_BT=positions_BT)
        assert len(logits) == int(positions_BT.sum())
        logits[:, EOS] += self.eos_bonus
        return logits


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return shortrun.decided_denoiser()


def prompts(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Return prompts of 6, 5, 4, ... tokens, left padded."""
    rng = torch.Generator().manual_seed(0)
    prompt_BQ = torch.randint(0, 256, (rows, 6), generator=rng)
    mask_BQ = torch.arange(6) >= (torch.arange(rows) % 6)[:, None]
    return prompt_BQ.masked_fill(~mask_BQ, EOS), mask_BQ


def canvas(rows: int = ROWS, given: bool = False) -> Tensor:
    canvas_BL = torch.full((rows, L), MASK)
    if given:
        canvas_BL[0, 3] = canvas_BL[0, 4] = 65
        canvas_BL[1, :5] = 66
    return canvas_BL


def run(denoiser: object, sampler: Sampler, *, given: bool = False, seed: int = 3) -> Trajectory:
    return denoise(denoiser, sampler, *prompts(), canvas(given=given), torch.arange(ROWS) + 40, seed=seed, step=7)


def sampler_of(schedule: str, score: str = "confidence", selection: str = "top", rule: str = "stop", **more) -> Sampler:
    temperature = more.pop("temperature", 0.9)
    eos = {"rule": rule, "suppress": more.pop("suppress", False)}
    section = {"schedule": SCHEDULES[schedule], "score": score, "selection": SELECTIONS[selection], "eos": eos, **more}
    return build_sampler(section, temperature=temperature)


# Every part with every part of another slot, the third slot at its plainest.
PAIRS = {
    *itertools.product(SCHEDULES, SCORES, ["top"]),
    *itertools.product(["blocks"], SCORES, SELECTIONS),
    *itertools.product(SCHEDULES, ["confidence"], SELECTIONS),
}
EVERY = [(*parts, ("stop", "none")[n % 2]) for n, parts in enumerate(sorted(PAIRS))]
NO_CLOSED_FORM = {"entropy_budget", "plackett_luce", "running_threshold", "explore", "stable", "slow_fast", "drafts"}
KINDS = [("confidence", "top"), ("confidence", "threshold"), ("sampled_confidence", "top")]


def test_every_part_is_covered() -> None:
    assert set(SCHEDULES) == set(SLOTS["schedule"]) - {"planned"}
    # Planners need weights: tests/test_planned.py.
    assert set(SCORES) == set(SLOTS["score"]) - {"planner"}
    assert set(SELECTIONS) == set(SLOTS["selection"]) - {"planned"}


@pytest.mark.parametrize(("schedule", "score", "selection", "rule"), EVERY)
def test_every_sampler_keeps_its_promises(
    model: Denoiser, schedule: str, score: str, selection: str, rule: str
) -> None:
    """Trajectory invariants, exact replay, finished rows leave, and the head runs at the window only."""
    refusal = refused(schedule, score, selection)
    if refusal:
        with pytest.raises(RecipeError, match=refusal):
            sampler_of(schedule, score, selection, rule)
    recorder, sampler = Recorder(model), sampler_of(schedule, score, selection, rule, exact=not refusal)
    trajectory = run(recorder, sampler, given=True)
    trajectory.validate()
    check_steps(trajectory)
    check_end(trajectory, rule)
    check_calls(trajectory, sampler, recorder)


def refused(schedule: str, score: str, selection: str) -> str | None:
    """Return why no log-probability of the chosen positions could be recorded, None where it can or needs none."""
    drawn = score.startswith("sampled")
    if drawn and selection in NO_CLOSED_FORM:
        return "has no closed form over drawn tokens"
    if (drawn or selection == "plackett_luce") and schedule == "origin":
        return "needs what 'origin' decided"
    return "needs what 'random' decided" if selection == "plackett_luce" and score == "random" else None


def check_steps(trajectory: Trajectory) -> None:
    """Every live step commits; ranks count the commits of a step from 0; given tokens stay."""
    start_BL = canvas(given=True)
    given_BL = start_BL != MASK
    assert torch.equal(trajectory.source_BL == GIVEN, given_BL)
    assert torch.equal(trajectory.tokens_BL[given_BL], start_BL[given_BL])
    for b in range(ROWS):
        for t in range(int(trajectory.steps_B[b])):
            ranks = trajectory.rank_BL[b][trajectory.born_BL[b] == t].tolist()
            assert ranks, "a live row commits at every step"
            assert sorted(ranks) == list(range(len(ranks)))
    sampled_BL = trajectory.source_BL == SAMPLED
    assert (trajectory.rank_BL[~sampled_BL] == -1).all()
    assert (trajectory.born_BL[~sampled_BL] == -1).all()
    assert not torch.isin(trajectory.tokens_BL[sampled_BL], torch.tensor(trajectory.banned_token_ids)).any()


def check_end(trajectory: Trajectory, rule: str) -> None:
    for b in range(ROWS):
        tokens = trajectory.tokens_BL[b].tolist()
        prefix = tokens[: tokens.index(MASK)] if MASK in tokens else tokens
        if rule == "none":
            assert MASK not in tokens
        else:
            assert EOS in prefix or MASK not in tokens, "undecided tokens lie behind an EOS with all before it decided"
            # and not a step too many: before its last step the row was not finished
            row = torch.tensor([b])
            before = trajectory.canvas_before(row, trajectory.steps_B[row] - 1)[0].tolist()
            assert EOS not in before[: before.index(MASK)]


def check_calls(trajectory: Trajectory, sampler: Sampler, recorder: Recorder) -> None:
    prompt_BQ, _ = prompts()
    assert len(recorder.seen) == int(trajectory.steps_B.max())
    assert sum(len(ids) for ids, _ in recorder.seen) == int(trajectory.steps_B.sum()), "finished rows leave the batch"
    open_B = (trajectory.source_BL != GIVEN).sum(1)
    for t, (ids_AT, positions_AT) in enumerate(recorder.seen):
        alive_A = (trajectory.steps_B > t).nonzero().squeeze(1)
        step_A = torch.full_like(alive_A, t)
        replayed_AL = trajectory.canvas_before(alive_A, step_A)
        assert torch.equal(ids_AT[:, -L:], replayed_AL), "replay is bit-equal"
        assert torch.equal(ids_AT[:, :-L], prompt_BQ[alive_A])
        state = replace(State.of(replayed_AL, MASK), step_A=step_A, open_A=open_B[alive_A])
        # What chance opens is keyed by seed, update and rollout.
        state = replace(state, seed=3, step=7, rollout_id_A=alive_A + 40)
        window_AL = sampler.quota(state).window_BL
        assert torch.equal(positions_AT[:, -L:], window_AL), "the head runs at the window's positions"
        assert not positions_AT[:, :-L].any()
        assert (replayed_AL[window_AL] == MASK).all()
        born_AL = trajectory.born_BL[alive_A]
        assert window_AL[born_AL == t].all(), "commits lie in the window"


@pytest.mark.parametrize(("score", "selection"), KINDS)
@pytest.mark.parametrize(("temperature", "suppress"), [(0.9, False), (1.0, True), (1.4, False)])
def test_recorded_log_probs_are_those_recomputed(
    model: Denoiser, score: str, selection: str, temperature: float, suppress: bool
) -> None:
    """log softmax(logits / temperature) without the banned tokens on the canvas before the step, one row at a time."""
    sampler = sampler_of("blocks", score, selection, "none", temperature=temperature, suppress=suppress)
    recorder = Recorder(model)
    trajectory = run(recorder, sampler).select(torch.arange(3))
    assert trajectory.banned_token_ids == ((MASK, EOS) if suppress else (MASK,))
    assert trajectory.temperature == temperature
    entries = (trajectory.source_BL == SAMPLED).nonzero().tolist()
    assert len(entries) == 3 * L
    for b, i in entries:
        row = torch.tensor([b])
        at_BL = torch.zeros(1, L, dtype=torch.bool)
        at_BL[0, i] = True
        canvas_BL = trajectory.canvas_before(row, trajectory.born_BL[row, i])
        args = (trajectory.prompt_BQ[row], trajectory.prompt_mask_BQ[row], canvas_BL, at_BL)
        logits_V = window_logits(recorder, *args)[0].double()
        logits_V[list(trajectory.banned_token_ids)] = -torch.inf
        expected = (logits_V / temperature).log_softmax(0)[trajectory.tokens_BL[b, i]].item()
        assert trajectory.logprob_BL[b, i].item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("score", "selection"),
    [
        *KINDS,
        ("random", "top"),
        ("confidence", "plackett_luce"),
        ("confidence", "running_threshold"),
        ("confidence", "slow_fast"),
        ("confidence", "stable"),
        ("sampled_eoser", "hierarchical"),
    ],
)
def test_a_rollout_does_not_depend_on_its_batch(model: Denoiser, score: str, selection: str) -> None:
    """Alone and without padding, in another order, or beside longer prompts: the same tokens and log-probs."""
    sampler = sampler_of("blocks", score, selection)
    together = run(Recorder(model), sampler)
    prompt_BQ, mask_BQ = prompts()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = denoise(
        Recorder(model), sampler, prompt_BQ[order], mask_BQ[order], canvas(), order + 40, seed=3, step=7
    ).select(order.argsort())
    for b in range(ROWS):
        kept = mask_BQ[b]
        alone = denoise(
            Recorder(model),
            sampler,
            prompt_BQ[b : b + 1, kept],
            mask_BQ[b : b + 1, kept],
            canvas(1),
            torch.tensor([b + 40]),
            seed=3,
            step=7,
        )
        for other in (shuffled.select(torch.tensor([b])), alone):
            for name in ("tokens_BL", "source_BL", "born_BL", "rank_BL", "steps_B"):
                assert torch.equal(getattr(other, name)[0], getattr(together, name)[b]), name
            torch.testing.assert_close(other.logprob_BL[0], together.logprob_BL[b], rtol=0, atol=2e-5)
    other_ids = denoise(Recorder(model), sampler, prompt_BQ, mask_BQ, canvas(), torch.arange(ROWS), seed=3, step=7)
    assert not torch.equal(other_ids.tokens_BL, together.tokens_BL), "the rollout id keys the noise"


def test_seed_and_step_key_the_noise_and_nothing_else_does(model: Denoiser) -> None:
    sampler, ids = sampler_of("uniform"), torch.arange(ROWS)
    state = torch.get_rng_state()
    runs = [
        denoise(Recorder(model), sampler, *prompts(), canvas(), ids, seed=seed, step=step).tokens_BL
        for seed, step in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])


def test_suppressed_eos_is_never_drawn(model: Denoiser) -> None:
    plenty = run(Recorder(model, eos_bonus=8.0), sampler_of("uniform", rule="none"))
    assert (plenty.tokens_BL == EOS).float().mean() > 0.5
    trajectory = run(Recorder(model, eos_bonus=8.0), sampler_of("uniform", rule="stop", suppress=True))
    assert not torch.isin(trajectory.tokens_BL, torch.tensor([EOS, MASK])).any()


def test_the_canvas_that_is_given_is_not_written_to(model: Denoiser) -> None:
    canvas_BL = canvas()
    denoise(model, sampler_of("uniform"), *prompts(), canvas_BL, torch.arange(ROWS), seed=0)
    assert (canvas_BL == MASK).all()


def test_stop_leaves_undecided_what_none_decides(model: Denoiser) -> None:
    """Both rules take the same steps until the first EOS closes a row."""
    stop, none = (run(Recorder(model, 4.0), sampler_of("blocks", rule=rule)) for rule in ("stop", "none"))
    decided_BL = stop.source_BL == SAMPLED
    assert (stop.source_BL == PAD).any()
    assert torch.equal(stop.tokens_BL[decided_BL], none.tokens_BL[decided_BL])
    assert torch.equal(stop.length_B, none.length_B)
    assert int(none.steps_B.sum()) == 6 * ROWS
    assert int(stop.steps_B.sum()) < 6 * ROWS


@pytest.mark.parametrize(("score", "selection"), KINDS)
def test_temperature_zero_is_greedy(model: Denoiser, score: str, selection: str) -> None:
    """Each committed token is the likeliest on its canvas, its log-probability counts as 0, and no seed matters."""
    sampler, recorder = sampler_of("blocks", score, selection, temperature=0.0), Recorder(model)
    trajectory = run(recorder, sampler)
    trajectory.validate()
    assert torch.equal(trajectory.tokens_BL, run(recorder, sampler, seed=99).tokens_BL)
    assert (trajectory.logprob_BL == 0).all()
    if trajectory.choice_logprob_BS is not None:
        assert (trajectory.choice_logprob_BS == 0).all(), "what is certain has log-probability 0"
    for b, i in (trajectory.source_BL == SAMPLED).nonzero().tolist():
        row = torch.tensor([b])
        canvas_BL = trajectory.canvas_before(row, trajectory.born_BL[row, i])
        args = (trajectory.prompt_BQ[row], trajectory.prompt_mask_BQ[row], canvas_BL, torch.arange(L)[None] == i)
        logp_V = log_probs(window_logits(recorder, *args), banned=(MASK,))[0]
        assert logp_V[trajectory.tokens_BL[b, i]] >= logp_V.max() - 1e-5


def test_score_temperature_orders_and_temperature_draws(model: Denoiser) -> None:
    """left_to_right ignores the score's temperature; the draws, keyed by position, stay the same."""
    cold, hot = (run(Recorder(model), sampler_of("uniform", "left_to_right", score_temperature=t)) for t in (0.3, 3.0))
    assert torch.equal(cold.tokens_BL, hot.tokens_BL)
    assert torch.equal(cold.logprob_BL, hot.logprob_BL)
    assert not torch.equal(cold.tokens_BL, run(Recorder(model), sampler_of("uniform", temperature=2.0)).tokens_BL)
