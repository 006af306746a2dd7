"""Training on rollouts whose draws are not the policy's own: what is corrected, measured, said and refused."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cachetoys
import pytest
import shortrun
import torch
from transformers import Trainer

from unmask.recipes import crosschecks
from unmask.recipes.loading import dump_recipe, load_recipe, load_samplers, parse_recipe
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.recipes.schema import Recipe
from unmask.rl import cli, cli_summary, mismatch, run
from unmask.rl.defaults import default_objective, trainable
from unmask.rl.memory import estimate
from unmask.rl.mismatch import mismatch_by_step
from unmask.rl.objective import build_objective
from unmask.rollouts.sampler import STATUSES, build_sampler, traits_named

CACHE, SAMPLER = "rollout.sampler.cache", "rollout.sampler"
UNSCORED = """
from unmask.rollouts.traits import traits

@traits(status="none", learns="the best of several candidates has no density")
def picky(statistics, position, noise):
    "The likeliest."
    return statistics.confidence
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "unscored.py").write_text(UNSCORED)
    return tmp_path


def loaded(*overrides: str) -> Recipe:
    recipe = load_recipe("cj_grpo_tiny_arithmetic", overrides)
    assert isinstance(recipe, Recipe)
    return recipe


@pytest.mark.parametrize(
    "override", [f"{CACHE}=dual", f"{SAMPLER}.guidance=0.5", f"{SAMPLER}.top_p=0.9", f"{SAMPLER}.top_k=5"]
)
def test_a_gap_is_corrected_where_the_recipe_says_nothing(override: str) -> None:
    plain, settled = loaded(), loaded(override)
    assert (plain.objective.correction.name, plain.objective.old) == ("none", "rollout")
    objective = settled.objective
    assert (objective.correction.name, objective.correction.ceiling, objective.old) == ("truncated", 2.0, "recompute")
    assert parse_recipe(dump_recipe(settled)) == settled
    (note,) = crosschecks.notes(settled)
    assert "correction truncated weighs every token" in note and "mismatch/kl_by_step" in note
    assert crosschecks.notes(plain) == []


@pytest.mark.parametrize(
    ("override", "name", "old"),
    [
        ("objective.correction=none", "none", "rollout"),
        ("objective.old=rollout", "none", "rollout"),
        ("objective.old=recompute", "truncated", "recompute"),
        ("objective={correction: {name: truncated, ceiling: 5.0}, old: recompute}", "truncated", "recompute"),
    ],
)
def test_what_the_recipe_says_stands(override: str, name: str, old: str) -> None:
    objective = loaded(f"{CACHE}=prefix", override).objective
    assert (objective.correction.name, objective.old) == (name, old)
    assert objective.correction.ceiling == {"none": None}.get(name, 5.0 if "ceiling" in override else 2.0)


def test_no_correction_is_a_note() -> None:
    (note,) = crosschecks.notes(loaded(f"{CACHE}=dual", "objective.correction=none"))
    assert note.startswith("rollout.sampler: dual: what lies outside the block has keys of an earlier canvas.")
    assert "truncated (with old: recompute) weighs them" in note


def test_a_method_of_exact_draws_is_left_alone() -> None:
    sdar = [f"model.path={cachetoys.FIXTURES / 'sdar'}", "model.mask_token_id=313", "model.block_length=4"]
    objective = loaded(f"{CACHE}=block_causal", f"{SAMPLER}.schedule.size=4", *sdar).objective
    assert (objective.correction.name, objective.old) == ("none", "rollout")


def test_what_has_no_density_is_not_trained_on() -> None:
    with pytest.raises(RecipeError, match=r"picky: the best of several candidates has no density; there is no log-p"):
        loaded(f"{SAMPLER}.score=unscored:picky")
    assert loaded("evaluation.sampler.score=unscored:picky").evaluation.sampler is not None
    section = {"schedule": {"name": "uniform", "steps": 4}}
    with pytest.raises(RecipeError, match="temperature 0 decides without a probability; there is no log-probability"):
        trainable(build_sampler(section, temperature=0.0))
    with pytest.raises(RecipeError, match="picky"):
        trainable(build_sampler({**section, "score": "unscored:picky"}))
    assert build_sampler({**section, "score": "unscored:picky"}).status == "none"


def test_the_trainers_own_objective_is_corrected_too() -> None:
    args: Any = SimpleNamespace(epsilon=0.2, epsilon_high=None, beta=0.0, chunk_size=8)
    section = {"schedule": {"name": "uniform", "steps": 4}}
    plain, corrected = (default_objective(args, build_sampler({**section, "cache": c})) for c in (None, "dual"))
    assert (plain.correction, plain.old) == (build_objective_of("none"), "rollout")
    assert (corrected.correction, corrected.old) == (build_objective_of("truncated"), "recompute")


def build_objective_of(correction: str) -> Any:
    """Return what an objective keeps of a correction."""
    section = {"estimator": "trace", "unit": "token", "surrogate": "ppo_clip", "weight": "per_step_mean"}
    return build_objective({**section, "correction": correction, "old": "recompute"}).correction


def train(model: Path, *overrides: str) -> list[dict[str, Any]]:
    summary = run.train(shortrun.recipe(model, "evaluation.problems=1", *overrides))
    folder = Path(summary["folder"])
    assert all(isinstance(v, int | float | list) for r in shortrun.lines(folder / "metrics.jsonl") for v in r.values())
    return [record for record in shortrun.lines(folder / "metrics.jsonl") if "loss" in record]


def test_a_run_measures_the_gap_by_step(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked: list[dict[str, Any]] = []
    log = Trainer.log
    monkeypatch.setattr(Trainer, "log", lambda self, logs, *rest: (tracked.append(logs), log(self, logs, *rest))[1])
    exact, cached = train(model), train(model, f"{CACHE}=dual")
    assert not [key for record in exact for key in record if key.startswith("mismatch")]
    for index, record in enumerate(cached):
        # Once a batch: two updates share it.
        assert ("mismatch/kl" in record) == (index % 2 == 0)
    first = cached[0]
    assert first["mismatch/max"] >= max(v for v in first["mismatch/max_by_step"] if v is not None) > 0.01
    assert first["train/mismatch_mean"] > 0.001 and first["mismatch/kl"] == pytest.approx(0, abs=1)
    # Blocks of 8, two tokens a step: the steps that compute everything draw from the policy itself.
    by_step = first["mismatch/max_by_step"]
    assert len(by_step) <= 8 and by_step[0] == pytest.approx(0, abs=1e-5)
    assert all(abs(v) < 1e-5 for v in by_step[4:5] if v is not None)
    assert any(v is not None and abs(v) > 0.01 for v in by_step[1:4])
    # The ratio is that of recomputed log-probs, so that the first inner step's is 1.
    assert max(r["train/ratio_max_deviation"] for r in cached[0::2]) <= 1e-5
    assert all(isinstance(value, int | float) for logs in tracked for value in logs.values()), "trackers take numbers"


def test_without_correction_the_gap_stands_in_the_ratio(model: Path) -> None:
    record = train(model, f"{CACHE}=dual", "objective.correction=none")[0]
    assert record["train/ratio_max_deviation"] > 0.01 and "mismatch/kl" not in record


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gap_by_step_is_what_it_is(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against loops over the recorded tokens; two ranks of the same rollouts have the same means."""
    denoiser = cachetoys.load("llada", ending=True)
    section = {"schedule": {"name": "blocks", "size": 8, "per_step": 3}, "cache": "dual"}
    sampler, trajectory = build_sampler(section), cachetoys.rollouts(denoiser, "dual", section=section)
    choices = {"estimator": "trace", "unit": "token", "surrogate": "ppo_clip", "weight": "per_step_mean"}
    objective = build_objective({**choices, "old": "recompute", "correction": "truncated"})
    plan = objective.plan(denoiser, None, trajectory, torch.ones(4), rng=None, sampler=sampler)
    monkeypatch.setattr(mismatch, "gather_objects", lambda value: [json.loads(json.dumps(value))] * ranks)
    found = mismatch_by_step(plan, sampler, "recompute")
    gaps: dict[int, list[float]] = defaultdict(list)
    assert plan.behaviour_A is not None and plan.old_A is not None
    for view, mu, old in zip(plan.views.view_K, plan.behaviour_A, plan.old_A, strict=True):
        gaps[int(plan.views.step_N[view])].append(float(mu) - float(old))
    everything = [gap for step in gaps.values() for gap in step]
    assert len(gaps) > 3 and max(everything) > 0.1
    assert found["mismatch/kl"] == pytest.approx(sum(everything) / len(everything), abs=1e-6)
    assert found["mismatch/max"] == pytest.approx(max(everything))
    for step in range(max(gaps) + 1):
        mean, most = found["mismatch/kl_by_step"][step], found["mismatch/max_by_step"][step]
        assert (mean is None) == (most is None) == (step not in gaps)
        if mean is not None:
            assert mean == pytest.approx(sum(gaps[step]) / len(gaps[step]), abs=1e-6)
            assert most == pytest.approx(max(gaps[step]), abs=1e-6)
    assert mismatch_by_step(plan, sampler, "rollout") == {}
    assert mismatch_by_step(plan, build_sampler({**section, "cache": None}), "recompute") == {}


def test_the_gap_estimates_a_divergence(toys: Any) -> None:
    """Under mu the mean of log mu - log pi is KL(mu || pi): 6,000 draws of one token, within 4 standard errors."""
    mu, pi = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.2, 0.3]).double()
    token_K = torch.multinomial(mu, 6000, replacement=True, generator=torch.Generator().manual_seed(0))
    plan: Any = SimpleNamespace(
        weight_K=torch.ones(6000),
        behaviour_A=mu.log()[token_K],
        old_A=pi.log()[token_K],
        views=SimpleNamespace(step_N=torch.tensor([3]), view_K=torch.zeros(6000, dtype=torch.long)),
    )
    cached = build_sampler({"schedule": {"name": "uniform", "steps": 4}, "cache": "dual"})
    found = mismatch_by_step(plan, cached, "recompute")
    gap_V = (mu / pi).log()
    divergence = float((mu * gap_V).sum())
    error = math.sqrt(float((mu * gap_V**2).sum() - divergence**2) / 6000)
    assert abs(found["mismatch/kl"] - divergence) < 4 * error
    assert found["mismatch/kl_by_step"][:3] == [None] * 3 and found["mismatch/max"] == pytest.approx(float(gap_V[0]))


def test_parts_and_samplers_show_what_log_probs_are(capsys: pytest.CaptureFixture[str]) -> None:
    for slot in cli_summary.SAMPLER_SLOTS:
        capsys.readouterr()
        cli_summary.print_parts(slot)
        text = " ".join(capsys.readouterr().out.split())
        assert "log-probs" in text
        assert all(traits_named(slot, part).status in STATUSES for part in SLOTS[slot])
    cli_summary.print_parts("surrogate")
    assert "log-probs" not in capsys.readouterr().out
    assert cli_summary._part_status("cache", "dual").startswith("behaviour only: what lies outside the block")
    assert cli_summary._part_status("cache", "block_causal") == "exact"
    cli.app(["samplers"], standalone_mode=False)
    text = capsys.readouterr().out
    assert all(name in text for name in load_samplers()) and "exact with tail mass" in " ".join(text.split())
    cli.app(["samplers", "rcr"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "running_confidence" in text and "departs:" in text and "log-probs above temperature 0: exact" in text
    with pytest.raises(RecipeError, match=r"unknown sampler 'rrcr'\. Did you mean 'rcr'"):
        cli.app(["samplers", "rrcr"], standalone_mode=False)


def test_check_says_what_the_log_probs_are() -> None:
    facts = cli_summary.summary(loaded(f"{CACHE}=dual", "evaluation.problems=1"), "recipe")
    assert facts["log_probs"].startswith("behaviour only (dual: what lies outside") and "cache dual" in facts["sampler"]
    assert cli_summary.summary(loaded("evaluation.problems=1"), "recipe")["log_probs"] == "exact"


def test_check_refuses_a_cache_that_the_model_cannot_have() -> None:
    with pytest.raises(RecipeError, match="'block_causal' is exact for block-causal families alone, and 'llada'"):
        cli_summary.summary(loaded(f"{CACHE}=block_causal", "evaluation.problems=1"), "recipe")
    with pytest.raises(RecipeError, match=r"rollout\.sampler\.cache\.refresh: -1 must be at least 0"):
        loaded(f"{CACHE}={{name: dual, refresh: -1}}")


def test_the_store_is_part_of_the_memory() -> None:
    plain, cached = (estimate(loaded(*more)) for more in ([], [f"{CACHE}=dual"]))
    doubled = estimate(loaded(f"{CACHE}=dual", f"{SAMPLER}.guidance=0.5"))
    assert plain is not None and cached is not None and doubled is not None
    recipe = loaded()
    vendor = json.loads((Path(cli_summary.__file__).parents[1] / "recipes" / "tiny" / "config.json").read_text())
    tokens = recipe.rollout.prompt_limit + recipe.rollout.canvas + 1
    wanted = recipe.rollout.micro_batch * tokens * vendor["n_layers"] * 2 * vendor["d_model"] * 4
    assert cached.rollout - plain.rollout == wanted
    assert doubled.rollout - plain.rollout == 2 * wanted
