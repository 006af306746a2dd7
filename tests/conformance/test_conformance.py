"""The guarantees of every named sampler, with and without caches; see README.md beside this file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import Family
from unmask.recipes.registry import RecipeError
from unmask.rollouts.categorical import log_probs
from unmask.rollouts.engine import LogitError, denoise
from unmask.rollouts.forward import window_logits
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.trajectory import Trajectory

L, ROWS, EOS, MASK = 16, 6, 256, 257


@dataclass
class Recorder:
    """A denoiser that keeps the tokens it is shown; EOS is made likely, so that rows end at different steps."""

    inner: Denoiser
    eos_bonus: float = 2.5
    seen: list[Tensor] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def hidden(self, input_ids_BT: Tensor, **options: Any) -> Tensor:
        self.seen.append(input_ids_BT.clone())
        return self.inner.hidden(input_ids_BT, **options)

    def head(self, hidden: Tensor) -> Tensor:
        logits = self.inner.head(hidden)
        logits[..., EOS] += self.eos_bonus
        return logits

    def logits(self, *arguments: Any, **options: Any) -> Tensor:
        logits = self.inner.logits(*arguments, **options)
        logits[..., EOS] += self.eos_bonus
        return logits


@dataclass
class Fixed:
    """A denoiser with the same logits `[L, V]` on every canvas."""

    logits_LV: Tensor
    family: Family
    calls: int = 0

    def logits(
        self,
        input_ids_BT: Tensor,
        *,
        padding_mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        self.calls += 1
        length = len(self.logits_LV)
        assert self.calls <= 5 * length, "the loop does not end"
        assert positions_BT is not None
        return self.logits_LV.expand(len(input_ids_BT), -1, -1)[positions_BT[:, -length:]]


def build(section: dict[str, Any], *, temperature: float = 0.9, rule: str = "stop", **more: Any) -> Sampler:
    try:
        return build_sampler({**section, "eos": {"rule": rule}, **more}, temperature=temperature)
    except RecipeError as error:
        pytest.skip(f"refused: {error}")


def prompts(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Return prompts of 7, 6, 5, ... tokens, left padded."""
    prompt_BQ = torch.randint(0, 256, (rows, 7), generator=torch.Generator().manual_seed(0))
    mask_BQ = torch.arange(7) >= (torch.arange(rows) % 7)[:, None]
    return prompt_BQ.masked_fill(~mask_BQ, EOS), mask_BQ


def blank(rows: int = ROWS) -> Tensor:
    return torch.full((rows, L), MASK)


def run(denoiser: Any, sampler: Sampler, **options: Any) -> Trajectory:
    try:
        return denoise(
            denoiser, sampler, *prompts(), blank(), torch.arange(ROWS) + 40, **{"seed": 3, "step": 7, **options}
        )
    except RecipeError as error:
        pytest.skip(f"refused: {error}")


def same(a: Trajectory, b: Trajectory, *, logprob: float = 2e-5) -> None:
    """Assert that two trajectories decided the same, in the same order, with the same log-probs."""
    for name in ("tokens_BL", "source_BL", "born_BL", "rank_BL", "steps_B"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.logprob_BL, b.logprob_BL, rtol=0, atol=logprob)
    assert (a.retracted is None) == (b.retracted is None)
    if a.retracted is not None and b.retracted is not None:
        for x, y in zip(a.retracted[:-1], b.retracted[:-1], strict=True):
            assert torch.equal(x, y)


def test_it_ends_with_every_mask_decided_and_prompts_untouched(
    denoiser: Denoiser, section: dict[str, Any], cache: str | None
) -> None:
    sampler = build(section, rule="none", cache=cache)
    recorder = Recorder(denoiser)
    trajectory = run(recorder, sampler)
    trajectory.validate()
    exists = trajectory.exists_before(torch.arange(ROWS), trajectory.steps_B - 1)
    undecided_BL = (trajectory.tokens_BL == MASK) & (torch.ones(ROWS, L).bool() if exists is None else exists)
    assert not undecided_BL.any(), "no mask is left"
    assert (trajectory.steps_B <= sampler.steps_allowed(L)).all()
    assert torch.equal(trajectory.prompt_BQ, prompts()[0]), "prompts are what they were"
    assert not torch.isin(trajectory.tokens_BL[~undecided_BL & (trajectory.born_BL >= 0)], torch.tensor([MASK])).any()


def test_rollouts_of_a_group_differ_above_temperature_0_and_agree_at_0(
    denoiser: Denoiser, section: dict[str, Any], cache: str | None
) -> None:
    prompt_BQ, canvas_BL = prompts(1)[0].expand(8, -1), blank(8)
    mask_BQ, ids = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.arange(8)
    found = []
    for temperature in (1.0, 0.0):
        sampler = build(section, temperature=temperature, rule="none", cache=cache)
        try:
            made = denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, ids, seed=0, group_B=torch.zeros(8))
        except RecipeError as error:
            pytest.skip(f"refused: {error}")
        found.append(made)
    drawn, greedy = found
    assert len(drawn.tokens_BL.unique(dim=0)) >= 7
    if "odd" in str(section.get("transforms")) or (greedy.retracted is not None and len(greedy.retracted.row_R)):
        return
    # A random order decides on other canvases, and so other tokens: rollouts of one order must agree.
    order_tokens = {
        (tuple(b), tuple(t)) for b, t in zip(greedy.born_BL.tolist(), greedy.tokens_BL.tolist(), strict=True)
    }
    assert len(order_tokens) == len({born for born, _ in order_tokens})


def test_a_row_is_the_same_alone_in_another_order_and_in_any_shape(
    denoiser: Denoiser, section: dict[str, Any], cache: str | None
) -> None:
    """Alone, without padding, beside longer and shorter prompts, by buckets of rows, sharing its first call."""
    if "odd" in str(section.get("transforms")):
        pytest.skip("its rule makes rollouts of a group depend on each other")
    sampler, (prompt_BQ, mask_BQ) = build(section, cache=cache), prompts()
    together = run(Recorder(denoiser), sampler)
    same(run(Recorder(denoiser), sampler, static=True), together)
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    shuffled = denoise(
        Recorder(denoiser), sampler, prompt_BQ[order], mask_BQ[order], blank(), order + 40, seed=3, step=7
    )
    same(shuffled.select(order.argsort()), together)
    for row in (0, 4):
        kept = mask_BQ[row]
        alone = denoise(
            Recorder(denoiser),
            sampler,
            prompt_BQ[row : row + 1, kept],
            mask_BQ[row : row + 1, kept],
            blank(1),
            torch.tensor([row + 40]),
            seed=3,
            step=7,
        )
        same(alone, together.select(torch.tensor([row])))


def test_ranks_that_share_a_batch_decide_what_one_does(
    denoiser: Denoiser, section: dict[str, Any], cache: str | None
) -> None:
    """Four and two rows instead of six; under sharded weights both ranks call the model until the last row is done."""
    if "odd" in str(section.get("transforms")):
        pytest.skip("its rule makes rollouts of a group depend on each other")
    sampler, (prompt_BQ, mask_BQ) = build(section, cache=cache), prompts()
    together = run(Recorder(denoiser), sampler)
    longest, calls = int(together.steps_B.max()), []
    for rows in (torch.arange(4), torch.arange(4, ROWS)):
        recorder, looks = Recorder(denoiser), iter([True] * longest + [False])
        part = denoise(
            recorder,
            sampler,
            prompt_BQ[rows],
            mask_BQ[rows],
            blank(len(rows)),
            rows + 40,
            seed=3,
            step=7,
            anyone=lambda live, looks=looks: next(looks),
        )
        same(part, together.select(rows))
        calls.append(len(recorder.seen))
    assert cache is not None or calls[0] == calls[1], "a rank that is done goes on calling"


def test_a_shared_first_call_changes_nothing(denoiser: Denoiser, section: dict[str, Any]) -> None:
    sampler, ids = build(section), torch.arange(6)
    prompt_BQ = prompts(2)[0].repeat_interleave(3, 0)
    mask_BQ = prompts(2)[1].repeat_interleave(3, 0)
    group_B = torch.tensor([0, 0, 0, 1, 1, 1])
    recorder, alone = Recorder(denoiser), Recorder(denoiser)
    shared = denoise(recorder, sampler, prompt_BQ, mask_BQ, blank(), ids, seed=0, group_B=group_B)
    if "odd" not in str(section.get("transforms")):
        same(shared, denoise(alone, sampler, prompt_BQ, mask_BQ, blank(), ids, seed=0))
    assert len(recorder.seen[0]) == 2, "one call a group"


def test_every_canvas_is_replayed_bit_for_bit(denoiser: Denoiser, section: dict[str, Any]) -> None:
    """What the denoiser saw at each step is what `canvas_before` rebuilds, tokens taken back and lengths included."""
    sampler, recorder = build(section), Recorder(denoiser)
    trajectory = run(recorder, sampler)
    calls = len(recorder.seen) // int(trajectory.steps_B.max())
    for t in range(int(trajectory.steps_B.max())):
        alive_A = (trajectory.steps_B > t).nonzero().squeeze(1)
        step_A = torch.full_like(alive_A, t)
        rebuilt_AL = trajectory.canvas_before(alive_A, step_A)
        exists_AL = trajectory.exists_before(alive_A, step_A)
        prompt_AQ, shown_AL = recorder.seen[calls * t][:, :7], recorder.seen[calls * t][:, 7 : 7 + L]
        assert torch.equal(prompt_AQ, prompts()[0][alive_A]), "prompts are shown as they were given"
        if exists_AL is None:
            assert torch.equal(shown_AL, rebuilt_AL)
            continue
        for shown_L, rebuilt_L, exists_L in zip(shown_AL, rebuilt_AL, exists_AL, strict=True):
            assert torch.equal(shown_L[: int(exists_L.sum())], rebuilt_L[exists_L])


def test_recorded_log_probs_are_those_of_the_canvas(denoiser: Denoiser, section: dict[str, Any]) -> None:
    """Where the sampler says that a trainer recomputes the same: log softmax(logits / T) at every action, 1e-5."""
    sampler, recorder = build(section), Recorder(denoiser)
    trajectory = run(recorder, sampler)
    if sampler.mismatch is not None:
        pytest.skip(f"declared: {sampler.mismatch}")
    row_K, position_K, step_K, token_K, logprob_K = trajectory.actions("all")
    at_KL = torch.arange(L) == position_K[:, None]
    canvas_KL = trajectory.canvas_before(row_K, step_K)
    exists_KL = trajectory.exists_before(row_K, step_K)
    assert (canvas_KL[at_KL] == MASK).all(), "an action fills a mask"
    with torch.no_grad():
        logits_KV = window_logits(
            recorder, trajectory.prompt_BQ[row_K], trajectory.prompt_mask_BQ[row_K], canvas_KL, at_KL, exists_KL
        )
    wanted_KV = log_probs(logits_KV, temperature=trajectory.temperature, banned=trajectory.banned_token_ids)
    torch.testing.assert_close(logprob_K, wanted_KV.gather(1, token_K[:, None]).squeeze(1), rtol=0, atol=3e-5)


def test_recorded_probabilities_are_frequencies(toys: Any, section: dict[str, Any]) -> None:
    """On 3 positions and 3 tokens: among rollouts with the same positions at the same steps, each tokens' frequency is
    in proportion to its recorded probability, choice of positions included (within 5 standard errors)."""
    sampler = build(
        section if "size" not in section["schedule"] else {**section, "schedule": toy_schedule(section)},
        temperature=1.3,
        rule="none",
    )
    if sampler.status in ("behaviour only", "none"):
        pytest.skip(f"declared: {sampler.status}")
    needs_a_model(sampler)
    rows, toy = 6000, toys.Toy(seed=2, scale=0.7)
    prompt_BQ = torch.ones(rows, 2, dtype=torch.long)
    canvas_BL = torch.full((rows, toys.L), toys.MASK)
    trajectory = denoise(
        toy, sampler, prompt_BQ, torch.ones_like(prompt_BQ).bool(), canvas_BL, torch.arange(rows), seed=1
    )
    trajectory.validate()
    a_step_is_a_distribution(trajectory, sampler)
    action = trajectory.actions("all")
    total_B = torch.zeros(rows, dtype=torch.float64).index_add(0, action.row_K, action.logprob_K.double())
    if trajectory.choice_logprob_BS is not None:
        total_B += trajectory.choice_logprob_BS.double().sum(1)
    words: list[list[Any]] = [[] for _ in range(rows)]
    places: list[list[Any]] = [[] for _ in range(rows)]
    ranks_BL = trajectory.rank_BL if sampler.status == "exact with order" else torch.zeros_like(trajectory.rank_BL)
    for row, position, step, token, _ in zip(*(x.tolist() for x in action), strict=True):
        words[row].append(token)
        places[row].append((step, position, int(ranks_BL[row, position])))
    keys = [(tuple(p), tuple(w)) for p, w in zip(places, words, strict=True)]
    count, probability = Counter(keys), dict(zip(keys, total_B.exp().tolist(), strict=True))
    groups = Counter(place for place, _ in keys)
    known = Counter()
    for (place, _), value in probability.items():
        known[place] += value
    checked = 0
    for key, value in probability.items():
        n = groups[key[0]]
        expected = n * value / known[key[0]]
        # What was never seen in a group weighs in its total: only groups seen often enough are complete.
        if n < 2000 or expected < 30:
            continue
        checked += 1
        assert abs(count[key] - expected) < 5 * (expected * (1 - value / known[key[0]])) ** 0.5 + 0.02 * expected
    assert checked or max(groups.values()) < 2000


def a_step_is_a_distribution(trajectory: Trajectory, sampler: Sampler) -> None:
    """Assert that the recorded probabilities of all outcomes of the first step sum to 1: of each set of positions, and
    where drawn tokens or a drawn order decide the positions of all sets together."""
    row_K, position_K, step_K, token_K, logprob_K = trajectory.actions("all")
    rank_K = trajectory.rank_BL[row_K, position_K] if sampler.status == "exact with order" else torch.zeros_like(row_K)
    first_K, total_B = step_K == 0, torch.zeros(len(trajectory), dtype=torch.float64)
    total_B.index_add_(0, row_K[first_K], logprob_K[first_K].double())
    if trajectory.choice_logprob_BS is not None:
        total_B += trajectory.choice_logprob_BS[:, 0].double()
    outcomes: list[tuple[tuple[int, int, int], ...]] = [()] * len(trajectory)
    for row, *outcome in torch.stack([row_K, position_K, rank_K, token_K], dim=1)[first_K].tolist():
        outcomes[row] = (*outcomes[row], tuple(outcome))
    one = trajectory.choice_logprob_BS is not None
    groups = [() if one else tuple(position for position, _, _ in outcome) for outcome in outcomes]
    seen, mass = Counter(groups), Counter()
    for (group, _), value in dict(zip(zip(groups, outcomes, strict=True), total_B.exp().tolist(), strict=True)).items():
        mass[group] += value
    often = [group for group, count in seen.items() if count >= 1500]
    assert often
    # What 1,500 rollouts never came to is rare.
    assert all(0.97 < mass[group] < 1 + 1e-6 for group in often), mass


def needs_a_model(sampler: Sampler) -> None:
    """Skip samplers for which a table of logits is no denoiser: they have tests of their own."""
    if sampler.shadow or sampler.length is not None:
        pytest.skip("its rule needs attention masks, or canvases of more than one length: test_shadow, test_lengths")


def toy_schedule(section: dict[str, Any]) -> dict[str, Any]:
    """Return the section's schedule with blocks of the toy's three positions."""
    schedule = {**section["schedule"], "size": 3}
    if "per_step" in schedule:
        schedule["per_step"] = min(schedule["per_step"], 2)
    return schedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_match_the_softmax(section: dict[str, Any], dtype: torch.dtype) -> None:
    """4,000 rollouts of a canvas of one position: chi-square against softmax(l / T) in the dtype of production."""
    schedule = {**section["schedule"]}
    schedule |= {key: 1 for key in ("size", "per_step") if key in schedule}
    for key in ("steps",):
        if key in schedule and "size" in schedule:
            schedule.pop(key)
        elif key in schedule:
            schedule[key] = 1
    sampler = build({**section, "schedule": schedule}, temperature=0.7, rule="none")
    if sampler.mismatch is not None or sampler.length is not None:
        pytest.skip("draws from another distribution by design")
    logits_1V = (2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(5))).to(dtype)
    family, rows = Family("fixed", 12, 11, (10,)), 4000
    prompt_BQ = torch.zeros(rows, 1, dtype=torch.long)
    try:
        found = denoise(
            Fixed(logits_1V, family), sampler, prompt_BQ, torch.ones_like(prompt_BQ).bool(), torch.full((rows, 1), 11),
            torch.arange(rows), seed=0,
        )  # fmt: skip
    except RecipeError as error:
        pytest.skip(f"refused: {error}")
    wanted_V = (logits_1V[0, :11].double() / 0.7).softmax(0)
    seen_V = torch.bincount(found.tokens_BL[:, 0], minlength=12)[:11].double()
    # 10 degrees of freedom: 29.6 is exceeded once in a thousand.
    assert ((seen_V - rows * wanted_V) ** 2 / (rows * wanted_V)).sum() < 29.6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["mask wins", "all EOS", "ties", "one token"])
def test_adversarial_logits_end(section: dict[str, Any], kind: str, temperature: float) -> None:
    length, vocabulary = 8, 6
    logits_LV = torch.zeros(length, vocabulary)
    if kind == "mask wins":
        logits_LV[:, 5] = 1e4
    elif kind == "all EOS":
        logits_LV[:, 4] = 50.0
    elif kind == "one token":
        logits_LV[:, [0, 1, 3, 4, 5]] = -torch.inf
    for rule in ("stop", "none"):
        sampler = build(section, temperature=temperature, rule=rule)
        if sampler.shadow:
            pytest.skip("its rule needs attention masks: test_shadow")
        prompt_BQ = torch.zeros(3, 2, dtype=torch.long)
        family = Family("fixed", vocabulary, 5, (4,))
        found = denoise(
            Fixed(logits_LV, family), sampler, prompt_BQ, torch.ones_like(prompt_BQ).bool(), torch.full((3, 8), 5),
            torch.arange(3), seed=0,
        )  # fmt: skip
        found.validate()
        assert rule == "stop" or sampler.length is not None or not (found.tokens_BL == 5).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_distribution_are_named(section: dict[str, Any], bad: float) -> None:
    logits_LV = torch.zeros(8, 6)
    logits_LV[:, 1] = bad
    prompt_BQ = torch.zeros(2, 2, dtype=torch.long)
    fixed = Fixed(logits_LV, Family("fixed", 6, 5, (4,)))
    if build(section).shadow:
        pytest.skip("its rule needs attention masks: test_shadow")
    with pytest.raises(LogitError, match=r"rollout \d, step 0: the logits at canvas position \d are NaN, infinite"):
        denoise(
            fixed, build(section), prompt_BQ, torch.ones_like(prompt_BQ).bool(), torch.full((2, 8), 5), torch.arange(2),
            seed=0,
        )  # fmt: skip


def test_each_step_commits_what_the_schedule_says(denoiser: Denoiser, section: dict[str, Any]) -> None:
    """For rules that commit the quota and nothing else."""
    selection = section.get("selection", "top")
    if (selection if isinstance(selection, str) else selection["name"]) != "top" or section.get("remasking"):
        pytest.skip("commits by its own rule")
    sampler = build(section, rule="none")
    if sampler.length is not None:
        pytest.skip("the canvas changes its length")
    trajectory = run(denoiser, sampler)
    schedule = section["schedule"]
    per_step = schedule.get("per_step") if isinstance(schedule, dict) else None
    if per_step is None:
        pytest.skip("its schedule has tests of its own")
    for row_L in trajectory.born_BL:
        assert (torch.bincount(row_L.long()) == per_step).all()
