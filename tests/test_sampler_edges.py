"""`denoise` where things go wrong or are extreme; the exact selection term of `sampled_confidence` by brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from unmask.policies.layout import Family
from unmask.rollouts.engine import LogitError, denoise
from unmask.rollouts.measures import Statistics
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.schedules import Quota
from unmask.rollouts.trajectory import GIVEN, SAMPLED, Trajectory

V, L = 6, 6
MASK, EOS = V - 1, V - 2
KINDS = [("confidence", "top"), ("confidence", {"name": "threshold", "level": 0.5}), ("sampled_confidence", "top")]


@dataclass
class Fixed:
    """A denoiser with the same logits `[L, V]` on every canvas."""

    logits_LV: Tensor
    family: Family = field(default_factory=lambda: Family("fixed", V, MASK, (EOS,)))
    calls: int = 0

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        self.calls += 1
        assert self.calls <= 2 * L, "the loop does not end"
        length = len(self.logits_LV)
        return self.logits_LV.expand(len(input_ids_BT), -1, -1)[positions_BT[:, -length:]]


def run(denoiser: Fixed, sampler: Sampler, rows: int = 3, given: dict[int, int] | None = None) -> Trajectory:
    canvas_BL = torch.full((rows, len(denoiser.logits_LV)), denoiser.family.mask_token_id)
    for place, token in (given or {}).items():
        canvas_BL[:, place] = token
    prompt_BQ = torch.zeros(rows, 2, dtype=torch.long)
    ids = torch.arange(rows)
    return denoise(denoiser, sampler, prompt_BQ, torch.ones_like(prompt_BQ, dtype=torch.bool), canvas_BL, ids, seed=0)


def sampler_of(
    score: str = "confidence", selection: object = "top", *, steps: int = 6, temperature: float = 1.0, **section: object
) -> Sampler:
    schedule = {"name": "uniform", "steps": steps}
    parts = {"schedule": schedule, "score": score, "selection": selection}
    return build_sampler({**parts, **section}, temperature=temperature)


def mask_wins() -> Tensor:
    logits_LV = torch.zeros(L, V)
    logits_LV[:, MASK] = 1e4
    return logits_LV


def one_token() -> Tensor:
    logits_LV = torch.full((L, V), -torch.inf)
    logits_LV[:, 2] = -3.0
    return logits_LV


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("score", "selection"), KINDS, ids=str)
@pytest.mark.parametrize("logits", [mask_wins, one_token, lambda: torch.zeros(L, V)], ids=["mask", "one", "equal"])
def test_adversarial_logits_terminate(
    logits: Callable[[], Tensor], score: str, selection: object, temperature: float
) -> None:
    """argmax = mask everywhere; all but one token at -inf; no position or token better than another."""
    trajectory = run(Fixed(logits()), sampler_of(score, selection, temperature=temperature, eos={"rule": "none"}))
    trajectory.validate()
    assert (trajectory.source_BL == SAMPLED).all()
    assert (trajectory.tokens_BL != MASK).all()
    if logits is one_token:
        assert (trajectory.tokens_BL == 2).all()
        assert (trajectory.logprob_BL == 0).all()
    elif temperature:
        torch.testing.assert_close(trajectory.logprob_BL, torch.full((3, L), -math.log(V - 1)))
    # All scores tie, so that positions are decided in their order.
    if (score, selection) == ("confidence", "top") or logits is one_token:
        assert (trajectory.born_BL.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "only the mask"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_distribution_are_refused(bad: object, temperature: float) -> None:
    logits_LV = torch.zeros(L, V)
    if bad == "only the mask":
        logits_LV[4, :MASK] = -torch.inf
    else:
        logits_LV[4, 1] = bad
    with pytest.raises(LogitError, match=r"rollout 0, step 0: the logits at canvas position 4 are NaN, infinite or"):
        run(Fixed(logits_LV), sampler_of(temperature=temperature))
    assert issubclass(LogitError, ValueError)


def empty_window(masked_BL: Tensor, step_B: Tensor, open_B: Tensor) -> Quota:
    return Quota(torch.zeros_like(masked_BL), torch.zeros_like(step_B))


def greedy_window(masked_BL: Tensor, step_B: Tensor, open_B: Tensor) -> Quota:
    return Quota(torch.ones_like(masked_BL), torch.full_like(step_B, 2))


def nothing(score_BL: Tensor, quota: Quota) -> Tensor:
    return torch.zeros_like(quota.window_BL)


def everything(score_BL: Tensor, quota: Quota) -> Tensor:
    return torch.ones_like(quota.window_BL)


def hopeless(statistics: Statistics, position: Tensor, noise: Tensor) -> Tensor:
    return torch.full_like(statistics.confidence, -torch.inf)


@pytest.mark.parametrize(
    "parts",
    [
        {"schedule": empty_window},
        {"schedule": greedy_window},
        {"selection": nothing},
        {"selection": everything},
        {"score": hopeless},
        {"schedule": empty_window, "selection": nothing, "score": hopeless},
        {"schedule": greedy_window, "selection": everything},
    ],
    ids=lambda parts: "+".join(f.__name__ for f in parts.values()),
)
def test_the_engine_bounds_what_a_users_part_may_do(parts: dict) -> None:
    """Empty windows, windows and choices over decided tokens, empty choices, scores of -inf: it ends."""
    sampler = replace(sampler_of(eos={"rule": "none"}), **parts)
    trajectory = run(Fixed(torch.randn(L, V, generator=torch.Generator().manual_seed(0))), sampler, given={1: 3, 4: 0})
    trajectory.validate()
    assert (trajectory.tokens_BL[:, [1, 4]] == torch.tensor([3, 0])).all()
    assert (trajectory.source_BL == torch.tensor([SAMPLED, GIVEN, SAMPLED, SAMPLED, GIVEN, SAMPLED])).all()
    born_BL = trajectory.born_BL[:, [0, 2, 3, 5]]
    for t in range(int(trajectory.steps_B[0])):
        assert (born_BL == t).any(dim=1).all()


def test_a_canvas_without_masks_takes_no_step() -> None:
    for score in ("confidence", "sampled_confidence"):
        denoiser = Fixed(torch.zeros(L, V))
        trajectory = run(denoiser, sampler_of(score), given=dict.fromkeys(range(L), 1))
        assert denoiser.calls == 0
        assert trajectory.steps_B.tolist() == [0, 0, 0]
        # and it joins others that took steps
        joined = Trajectory.cat([trajectory, run(Fixed(torch.zeros(L, V)), sampler_of(score))])
        assert len(joined) == 6
        assert (joined.choice_logprob_BS is not None) == (score == "sampled_confidence")


def test_a_given_eos_ends_a_row_once_all_before_it_is_decided() -> None:
    sampler = sampler_of("left_to_right")
    logits_LV = torch.zeros(L, V)
    logits_LV[:, EOS] = -torch.inf
    trajectory = run(Fixed(logits_LV), sampler, given={2: EOS})
    assert trajectory.steps_B.tolist() == [2, 2, 2]
    assert (trajectory.tokens_BL[:, 3:] == MASK).all()
    assert trajectory.length_B.tolist() == [3, 3, 3]


def test_a_family_without_eos_fills_the_canvas() -> None:
    denoiser = Fixed(torch.zeros(L, V), family=Family("fixed", V, MASK, ()))
    trajectory = run(denoiser, sampler_of(eos={"rule": "stop", "suppress": True}))
    assert (trajectory.source_BL == SAMPLED).all()
    assert trajectory.length_B.tolist() == [L] * 3
    assert trajectory.action_BL().all()


def test_progress_is_reported_after_each_step() -> None:
    left: list[int] = []
    prompt_BQ = torch.zeros(2, 1, dtype=torch.long)
    denoise(
        Fixed(torch.zeros(L, V)),
        sampler_of(steps=3, eos={"rule": "none"}),
        prompt_BQ,
        torch.ones_like(prompt_BQ, dtype=torch.bool),
        torch.full((2, L), MASK),
        torch.arange(2),
        seed=0,
        on_step=lambda tokens_BL: left.append(int((tokens_BL == MASK).sum())),
    )
    assert left == [8, 4, 0]


# --- The choice of positions under sampled_confidence, by enumeration of every draw ----------------------------------


def choice_by_enumeration(
    logits_LV: Tensor, open_positions: list[int], taken: dict[int, int], temperature: float, score_temperature: float
) -> float:
    """Return log P(positions | tokens): the mass of all draws that commit just `taken`, over its tokens' own mass."""
    logits_LV = logits_LV.double()[:, :MASK]
    q_LV = (logits_LV / temperature).softmax(dim=1).tolist()
    p_LV = (logits_LV / score_temperature).softmax(dim=1).tolist()
    total = 0.0
    for draw in itertools.product(range(MASK), repeat=len(open_positions)):
        drawn = dict(zip(open_positions, draw, strict=True))
        order = sorted(open_positions, key=lambda i: (-round(p_LV[i][drawn[i]], 12), i))
        if {i: drawn[i] for i in order[: len(taken)]} == taken:
            total += math.prod(q_LV[i][drawn[i]] for i in open_positions)
    return math.log(total) - sum(math.log(q_LV[i][v]) for i, v in taken.items())


@pytest.mark.parametrize(("temperature", "score_temperature"), [(1.0, 1.0), (0.6, 1.2), (1.5, 0.7)])
@pytest.mark.parametrize("ties", [False, True])
def test_choices_equal_brute_force(temperature: float, score_temperature: float, ties: bool) -> None:
    """5 positions x 5 tokens in steps of 2, 2, 1; with `ties` positions share their logits, and bars are met."""
    logits_LV = 1.5 * torch.randn(5, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if ties:
        logits_LV[2] = logits_LV[3] = logits_LV[0]
    sampler = sampler_of(
        "sampled_confidence",
        steps=3,
        temperature=temperature,
        score_temperature=score_temperature,
        eos={"rule": "none"},
    )
    rows = 8
    trajectory = run(Fixed(logits_LV), sampler, rows=rows)
    assert trajectory.choice_logprob_BS.shape == (rows, 3)
    for b, t in itertools.product(range(rows), range(3)):
        born = trajectory.born_BL[b].tolist()
        still_open = [i for i in range(5) if born[i] >= t]
        taken = {i: int(trajectory.tokens_BL[b, i]) for i in range(5) if born[i] == t}
        assert len(taken) == (2, 2, 1)[t]
        expected = choice_by_enumeration(logits_LV, still_open, taken, temperature, score_temperature)
        assert trajectory.choice_logprob_BS[b, t].item() == pytest.approx(expected, abs=1e-6)
    assert (trajectory.choice_logprob_BS[:, 2] == 0).all(), "the last position is no choice"
    assert trajectory.choice_logprob_BS[:, 0].min() < -1, "and in some rows the first step's choice says much"


def test_the_naive_variant_records_the_same_tokens_and_no_choice() -> None:
    logits_LV = torch.randn(5, V, generator=torch.Generator().manual_seed(5))
    exact, naive = (run(Fixed(logits_LV), sampler_of("sampled_confidence", steps=2, exact=e)) for e in (True, False))
    assert naive.choice_logprob_BS is None
    assert exact.choice_logprob_BS is not None
    assert torch.equal(exact.tokens_BL, naive.tokens_BL)
    assert torch.equal(exact.born_BL, naive.born_BL)


def test_sampled_confidence_commits_the_likeliest_drawn_tokens() -> None:
    """The committed tokens have the largest probabilities of all drawn ones, in the order of their ranks."""
    logits_LV = torch.randn(L, V, generator=torch.Generator().manual_seed(6))
    full = run(Fixed(logits_LV), sampler_of("sampled_confidence", steps=1, eos={"rule": "none"}), rows=20)
    part = run(Fixed(logits_LV), sampler_of("sampled_confidence", steps=2, eos={"rule": "none"}), rows=20)
    p_LV = logits_LV[:, :MASK].softmax(dim=1)
    drawn_BL = p_LV.expand(20, -1, -1).gather(2, full.tokens_BL[:, :, None]).squeeze(2)
    best_BK = drawn_BL.argsort(dim=1, descending=True)[:, :3]
    for b in range(20):
        first = (part.born_BL[b] == 0).nonzero().squeeze(1)
        assert sorted(first.tolist()) == sorted(best_BK[b].tolist())
        assert first[part.rank_BL[b, first].argsort()].tolist() == best_BK[b].tolist()
        assert torch.equal(part.tokens_BL[b, first], full.tokens_BL[b, first])
