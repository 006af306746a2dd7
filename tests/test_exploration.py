"""Groups that fail: hints, verified replacements, new problems, past successes; on any ranks and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import shortrun
import torch

from unmask.policies.loading import load_denoiser
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rewards import Scorer, build_rewards
from unmask.rl import filters, run
from unmask.rl.collecting import Collector, build_exploration
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import GIVEN, HINT, SAMPLED
from unmask.rollouts.worker import RolloutBatch, RolloutWorker

pytestmark = pytest.mark.usefixtures("place")
NAN = float("nan")


class OneRow:
    """A task whose every row is the same problem, so that it comes again in every batch."""

    size = 1

    def row(self, index: int) -> dict[str, Any]:
        return {"prompt": "5 a+1 b+1", "reference": "a+1=6\nb+1=7\n#### 7"}


def collector(model: Path, exploration: dict[str, Any], *, reward: str = "near", rows: Any = None) -> Collector:
    denoiser = load_denoiser(str(model))
    worker = RolloutWorker(
        denoiser=denoiser,
        tokenizer=denoiser.tokenizer,
        sampler=build_sampler({"schedule": {"name": "uniform", "steps": 8}}, temperature=1.0),
        scorer=Scorer(build_rewards([{"name": f"toyrewards:{reward}"}])),
        group=8,
        canvas=24,
        prompt_limit=64,
        seed=5,
    )
    task = SLOTS["task"].build({"name": "arithmetic", "level": "easy"})("train", seed=0)
    return Collector(worker, rows or task, prompts=6, exploration=build_exploration(exploration))


HINTS = {"hints": {"name": "inpaint_on_failure"}}


def same(one: RolloutBatch, other: RolloutBatch) -> bool:
    a, b = one.trajectory, other.trajectory
    tables = ("tokens_BL", "source_BL", "logprob_BL", "rollout_id_B", "prompt_BQ")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tables)


@pytest.fixture(scope="module")
def plain(model: Path) -> RolloutBatch:
    return collector(model, {}).collect(3)


def test_failed_groups_get_verified_rollouts_with_hints(model: Path, plain: RolloutBatch) -> None:
    batch = collector(model, HINTS).collect(3)
    batch.trajectory.validate()
    assert plain.rewards.outcome == ["wrong"] * 48 and batch.metrics["explore/failed_groups_before"] == 1.0
    hint_BL, kept_B = batch.trajectory.source_BL == HINT, torch.zeros(48, dtype=torch.bool)
    hinted_B = hint_BL.any(dim=1)
    for group in range(6):
        own = slice(8 * group, 8 * group + 8)
        assert 0 <= int(hinted_B[own].sum()) <= 4, "at most half of a group"
    # Whoever has hints is right, everyone else is the rollout it was, in its place and with its id.
    assert [code == "ok" for code in batch.rewards.outcome] == hinted_B.tolist()
    assert 4 <= int(hinted_B.sum()) <= 24
    kept_B = ~hinted_B
    assert torch.equal(batch.trajectory.tokens_BL[kept_B], plain.trajectory.tokens_BL[kept_B])
    assert torch.equal(batch.trajectory.rollout_id_B, torch.arange(48)) and torch.equal(batch.group_B, plain.group_B)
    # Hints are the solution's bytes at their places; nothing else was given, and hints are no actions.
    for row, given, tokens in zip(batch.rows, hint_BL.tolist(), batch.trajectory.tokens_BL.tolist(), strict=True):
        solution = row["reference"].encode()
        assert all(tokens[i] == solution[i] for i in range(24) if given[i])
    assert not bool((batch.trajectory.source_BL == GIVEN).any())
    assert not bool((batch.trajectory.action_BL("all") & hint_BL).any())
    assert batch.metrics["explore/leak"] == 0.0
    failed = sum(not hinted_B[8 * g : 8 * g + 8].any() for g in range(6))
    assert batch.metrics["explore/failed_groups_after"] == failed / 6 < 0.6
    assert batch.metrics["explore/hint_tokens"] == int(hint_BL.sum()) / 48
    # Places are drawn: they are not always the first of the group.
    assert len({place % 8 for place in hinted_B.nonzero().squeeze(1).tolist()}) > 4


def test_canvases_with_hints_are_rebuilt(model: Path) -> None:
    """What the first step saw are the hints; what the last one left is the canvas."""
    trajectory = collector(model, HINTS).collect(3).trajectory
    row_N = torch.arange(len(trajectory))
    first_NL = trajectory.canvas_before(row_N, torch.zeros_like(row_N))
    assert torch.equal(first_NL != trajectory.mask_token_id, trajectory.source_BL == HINT)
    assert torch.equal(trajectory.canvas_before(row_N, trajectory.steps_B), trajectory.tokens_BL)
    assert bool((trajectory.source_BL == SAMPLED).any(dim=1).all())


def test_groups_that_did_not_fail_are_left_alone(model: Path) -> None:
    batch, plain = (collector(model, section, reward="mean_id").collect(0) for section in (HINTS, {}))
    assert plain.rewards.outcome.count("ok") == 0
    right = collector(model, HINTS, reward="anything").collect(0)
    assert same(right, plain) and right.metrics["explore/tried"] == 0.0
    assert batch.metrics["explore/tried"] == 1.0


def test_a_rank_collects_its_share(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {**HINTS, "filter": {"name": "accuracy", "low": 0.45}, "refills": 2}
    whole = collector(model, section).collect(2)
    assert 0 < whole.metrics["explore/refilled"] < 1
    for rank in (0, 1, 2):
        monkeypatch.setattr("unmask.rl.collecting.world_size", lambda: 3)
        monkeypatch.setattr("unmask.rl.collecting.rank", lambda rank=rank: rank)
        part, mine = collector(model, section).collect(2), slice(16 * rank, 16 * rank + 16)
        assert torch.equal(part.trajectory.tokens_BL, whole.trajectory.tokens_BL[mine])
        assert torch.equal(part.rewards.total_B.isnan(), whole.rewards.total_B[mine].isnan())
        assert part.rows == whole.rows[mine]


def test_refused_groups_get_new_problems_a_bounded_number_of_times(model: Path) -> None:
    """One completion in twelve is right, so half of the groups are all wrong; three attempts leave an eighth."""
    plain = collector(model, {}, reward="lucky").collect(1)
    kept = filters.signal(torch.zeros(48), plain.rewards.total_B, plain.group_B)
    batch = collector(model, {"filter": {"name": "signal"}, "refills": 3}, reward="lucky").collect(1)
    task = SLOTS["task"].build({"name": "arithmetic", "level": "easy"})("train", seed=0)
    refilled = 0
    for group in range(6):
        own = slice(8 * group, 8 * group + 8)
        attempts = [attempt for attempt in range(4) if task.row((4 + attempt) * 6 + group) == batch.rows[own][0]]
        (attempt,) = attempts
        rewards = batch.rewards.total_B[own]
        if attempt:
            refilled += 1
            assert len(set(rewards.tolist())) > 1, "only what the filter keeps replaces anything"
        # A group that is refused to the end is nobody's: no reward, so no advantage and no mass.
        assert bool(rewards.isnan().all()) == (len(set(batch.rewards.value_BR[own, 0].tolist())) == 1)
    assert batch.metrics["explore/refilled"] == refilled / 6 > 0
    share = batch.rewards.total_B.isnan().double().mean().item()
    assert batch.metrics["explore/refused"] == pytest.approx(share) and share < 1 - kept.double().mean().item()
    assert torch.equal(batch.trajectory.rollout_id_B, torch.arange(48))
    assert same(batch, collector(model, {"filter": {"name": "signal"}, "refills": 3}, reward="lucky").collect(1))


def test_filters_by_hand() -> None:
    """Groups 7, 7, 7, 3, 3, 5, 5 and 9: unequal, equal, one reward that applies, none that does."""
    group_B = torch.tensor([7, 3, 7, 5, 3, 7, 5, 9])
    reward_B = torch.tensor([0.0, 1.0, 0.5, NAN, 1.0, 0.0, 0.2, NAN])
    right_B = torch.tensor([True, True, False, False, True, False, False, False])
    assert filters.signal(right_B, reward_B, group_B).tolist() == [True, False, True, False, False, True, False, False]
    third = filters.accuracy(right_B, reward_B, group_B)
    assert third.tolist() == [True, False, True, False, False, True, False, False]
    assert filters.accuracy(right_B, reward_B, group_B, low=0.0, high=0.2).tolist() == [
        False, False, False, True, False, False, True, True,
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="0 <= low <= high <= 1"):
        filters.accuracy(right_B, reward_B, group_B, low=0.9)


def test_past_successes_come_back(model: Path, tmp_path: Path) -> None:
    """One problem for ever: once a rollout was right, no later group fails; what is kept survives a checkpoint."""
    made = collector(model, {"successes": 4}, reward="lucky", rows=OneRow())
    plain = collector(model, {}, reward="lucky", rows=OneRow())
    first, number = None, 0
    while first is None or number < 12:
        batch, without = made.collect(number), plain.collect(number)
        failed = [g for g in range(6) if "ok" not in without.rewards.outcome[8 * g : 8 * g + 8]]
        if first is None:
            assert same(batch, without)
            if len(failed) < 6:
                first = number
        else:
            replaced = (batch.trajectory.tokens_BL != without.trajectory.tokens_BL).any(dim=1)
            assert [int(replaced[8 * g : 8 * g + 8].sum()) for g in range(6)] == [int(g in failed) for g in range(6)]
            assert batch.metrics["explore/failed_groups_after"] == 0.0
            assert batch.metrics["explore/replayed"] == len(failed) / 6
            batch.trajectory.validate()
            assert torch.equal(batch.trajectory.rollout_id_B, without.trajectory.rollout_id_B)
        number += 1
    assert made.successes is not None and len(made.successes.kept) == 1
    made.save(tmp_path)
    resumed = collector(model, {"successes": 4}, reward="lucky", rows=OneRow())
    resumed.load(tmp_path)
    assert same(resumed.collect(number), made.collect(number))
    resumed.load(None)
    assert not resumed.successes.kept


def test_the_oldest_problem_goes_first(model: Path) -> None:
    made = collector(model, {"successes": 2}, reward="anything")
    made.collect(0)
    prompts = [batch_row["prompt"] for batch_row in collector(model, {}).collect(0).rows[::8]]
    assert [key.strip('"') for key in made.successes.kept] == prompts[-2:]


RUNS = {
    "igpo": ["method=igpo", "objective.beta=0.01", "rewards=[{name: 'toyrewards:near'}]"],
    "refills and successes": [
        "rewards=[{name: 'toyrewards:lucky'}]",
        "exploration={filter: signal, refills: 1, successes: 8}",
    ],
}


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_resumed_and_shared_runs_are_the_same(model: Path, overrides: list[str]) -> None:
    base = ["rollout.group=8", "objective.inner_steps=2", "optim.steps=6", "run.save_every=3", "run.keep=9", *overrides]
    processes = shortrun.start_ranks(shortrun.recipe(model, "name=two", *base), 2)
    run.train(shortrun.recipe(model, "name=one", *base))
    shortrun.finish(processes)
    one, two = Path("runs/one"), Path("runs/two")
    for step in (0, 2, 4):
        shortrun.compare_rollouts(shortrun.rollouts(one, step), shortrun.rollouts(two, step))
    shortrun.compare_metrics(one, two)
    assert shortrun.distance(one, two) < 1e-6
    records = shortrun.lines(one / "metrics.jsonl")
    assert any(record.get("explore/failed_groups_before") for record in records)
    # From the middle of the second batch, with the plan in flight.
    Path("runs/cut").mkdir()
    for name in ("recipe.yaml", "before.json", "metrics.jsonl", "timing.jsonl", "checkpoint-3"):
        Path("runs/one", name).rename(Path("runs/cut", name)) if name == "checkpoint-3" else Path(
            "runs/cut", name
        ).write_bytes(Path("runs/one", name).read_bytes())
    run.train(shortrun.recipe(model, "name=one", *base), resume=Path("runs/cut/checkpoint-3"))
    assert shortrun.same_weights(one, Path("runs/cut"))
    assert (one / "metrics.jsonl").read_bytes() == Path("runs/cut/metrics.jsonl").read_bytes()


def test_hints_are_told_apart_in_stored_rollouts(model: Path) -> None:
    run.train(shortrun.recipe(model, *RUNS["igpo"], "optim.steps=1", "objective.inner_steps=1"))
    table = pyarrow.parquet.read_table("runs/short/rollouts/step-000000.parquet")
    assert HINT in {code for row in table["source"].to_pylist() for code in row}


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["exploration={hints: inpaint_on_failure}", "rollout.start=draft"], "rollout.start is 'draft'"),
        (["exploration={refills: 2}"], "no filter refuses a group"),
        (["exploration={hints: {name: inpaint_on_failure, column: trace}}"], "no column 'trace'"),
        (["exploration={hint: x}"], "hint"),
    ],
)
def test_recipes_that_are_refused(model: Path, overrides: list[str], match: str) -> None:
    from unmask.recipes.crosschecks import check_data

    with pytest.raises(RecipeError, match=match):
        check_data(shortrun.recipe(model, *overrides))
