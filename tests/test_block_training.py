"""Training a planner of block lengths: the gradient by hand, a run that is resumed and evaluated, recipes refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shortrun
import torch
from torch import Tensor

from unmask.policies.planner import PlannerSpec, load_planner, new_planner
from unmask.recipes.crosschecks import step_limit
from unmask.recipes.loading import parse_recipe
from unmask.recipes.registry import RecipeError
from unmask.rl import run
from unmask.rl.planning import Planning
from unmask.rl.speed import multiplicative
from unmask.rl.surrogates import importance
from unmask.rl.targets import open_target
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

CANVAS, GROUP, ROWS, WIDTH = 12, 4, 8, 32
LENGTHS = (2, 3, 6)
FEATURES = ("odds", "frontier", "left")
THRESHOLD = {"score": "confidence", "selection": {"name": "threshold", "level": 0.3}}


def planning_of(**more: Any) -> Planning:
    spec = PlannerSpec(
        features=FEATURES, network="linear", distribution="blocks", lengths=LENGTHS, past=2, hidden=WIDTH
    )
    made = new_planner(spec, seed=2)
    rng = torch.Generator().manual_seed(3)
    for parameter in made.network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    return Planning(made, importance, multiplicative, **{"group": GROUP, "seed": 7, **more})


def roll(planning: Planning, temperature: float) -> tuple[Trajectory, Any]:
    denoiser = shortrun.decided_denoiser()
    section = {"schedule": {"name": "planned", "temperature": temperature}, **THRESHOLD}
    sampler = planning.acting(build_sampler(section, temperature=0.0))
    prompt_BQ = torch.arange(ROWS)[:, None] // GROUP + 40
    canvas_BL = torch.full((ROWS, CANVAS), denoiser.family.mask_token_id)
    planning.batch = 3
    return denoise(denoiser, sampler, prompt_BQ, prompt_BQ > 0, canvas_BL, torch.arange(ROWS), seed=7, step=3), sampler


def gradients(network: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad()
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_gradient_is_that_of_a_softmax_over_ends(temperature: float) -> None:
    """-1/N sum A log p over the blocks that had a choice, every sum of it written out, in float64."""
    planning = planning_of()
    made, sampler = roll(planning, temperature)
    advantage_B = torch.randn(ROWS, generator=torch.Generator().manual_seed(0))
    # Neither a denoiser nor a reference is there to be called.
    plan = planning.plan(None, None, made, advantage_B, rng=None, sampler=sampler)
    statistics = planning.backward(None, plan)
    assert statistics["ratio_max_deviation"] < 1e-5
    network = planning.planner.network
    found = gradients(network)
    w = {name: value.detach().double().requires_grad_(True) for name, value in network.named_parameters()}
    assert made.end_BS is not None and made.features_BSLF is not None and made.past_BSMD is not None
    terms, entropies = [], []
    for row in range(ROWS):
        start = 0
        for step in range(int(made.steps_B[row])):
            end = int(made.end_BS[row, step])
            if not end:
                continue
            fits = [length for length in LENGTHS if start + length <= CANVAS]
            if len(fits) > 1:
                feature_LF, past_MD = made.features_BSLF[row, step].double(), made.past_BSMD[row, step].double()
                own_L = feature_LF @ w["network.output.weight"][0] + w["network.output.bias"]
                count_C = w["network.count.weight"] @ feature_LF.mean(0) + w["network.count.bias"]
                pooled_D = sum(w["weight"][m] * past_MD[m] for m in range(2))
                h_D = pooled_D[:WIDTH]
                h_D = (h_D - h_D.mean()) / (h_D.var(unbiased=False) + 1e-5).sqrt()
                state_D = torch.cat([h_D * w["norm.weight"] + w["norm.bias"], pooled_D[WIDTH:]])
                count_C = count_C + w["length.weight"] @ state_D + w["length.bias"]
                logit = [own_L[start + n - 1] + count_C[LENGTHS.index(n)] for n in fits]
                logprob = (torch.stack(logit) / temperature).log_softmax(0)
                terms.append(advantage_B[row].double() * logprob[fits.index(end - start)])
                entropies.append(-(logprob.exp() * logprob).sum().item())
            start = end
    assert plan.mass == len(terms) == statistics["steps"] > ROWS
    (-torch.stack(terms).sum() / len(terms)).backward()
    for name, value in w.items():
        assert value.grad is not None
        # A number that all ends share moves no softmax.
        assert (value.grad.norm() > 1e-4) == (name != "network.output.bias"), name
        torch.testing.assert_close(found[name].double(), value.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert statistics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (0.5,)}, "lengths of blocks; drop expert"),
        ({"order": lambda odds_NL, candidate_NL: odds_NL}, "use categorical"),
    ],
    ids=["expert", "order"],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planning_of(**options)


SCHEDULE = "{name: blocks, size: 8, per_step: 2}"
RECIPE = shortrun.RECIPE.replace(", lora: {rank: 2}", "").replace("name: short", "name: lengths")
RECIPE = RECIPE.replace(SCHEDULE, "planned").replace("selection: top", "selection: {name: threshold, level: 0.1}")
RECIPE = RECIPE.replace("method: cj_grpo\nobjective: {inner_steps: 2, beta: 0.0}", "method: ctrldiff")
PLANNER = "planner: {distribution: blocks, lengths: [2, 4, 8], past: 2, width: 16, mlp: 32, alpha: [0.5, 2.0]}\n"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shortrun.save_model(tmp_path / "model")


def recipe(model: Path, *overrides: str) -> Any:
    return parse_recipe((RECIPE + PLANNER).replace("MODEL", str(model)), overrides)


def test_a_run_trains_saves_resumes_and_is_evaluated(model: Path) -> None:
    # The second inner step of a batch is resumed from its stored plan: ends and past blocks are in it.
    changes = ("run.save_every=1", "run.keep=9", "rollout.temperature=0.0")
    folder, records, planner = shortrun.planner_run(recipe(model, *changes), resume=3)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[2]["train/ratio_max_deviation"] < 1e-5 and records[2]["train/steps"] > 0
    assert planner.spec.lengths == (2, 4, 8) and planner.spec.hidden == 32 and planner.fingerprint
    opened, _ = open_target(str(folder))
    assert opened.rollout.sampler.schedule["path"] == str(folder / "planner")
    # Another run goes on from it.
    more = run.train(recipe(model, "name=more", f"planner={{path: {folder}}}", "optim.steps=1"))
    assert load_planner(more["folder"]).spec == planner.spec


def test_the_denoiser_learns_beside_it(model: Path) -> None:
    """Tokens have their probability whatever lengths were drawn: at the first inner step both ratios are 1."""
    joint = "objective.estimator={name: trace, steps: uniform_k, k: 2, tokens: all}"
    summary = run.train(recipe(model, "method=joint", joint, "planner.lr=0.003", "name=both", "optim.steps=3"))
    records = [record for record in shortrun.lines(Path(summary["folder"]) / "metrics.jsonl") if "loss" in record]
    for record in (records[0], records[2]):
        assert record["train/ratio_max_deviation"] < 1e-4 and record["train/planner_ratio_max_deviation"] < 1e-4
    assert records[0]["train/planner_steps"] > 0


def test_no_more_calls_are_promised_than_positions(model: Path) -> None:
    found = recipe(model, "rollout.sampler.schedule={name: planned, per_step: 4}")
    assert step_limit(found.rollout.sampler, found.rollout.canvas) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["planner.distribution=bernoulli"], "positions acts by score planner with selection planned"),
        ([f"rollout.sampler.schedule={SCHEDULE}"], "lengths acts by schedule planned"),
        (["rollout.sampler.schedule={name: planned, decide: mode}"], "learns from what it draws"),
        (["rollout.sampler.schedule={name: planned, temperature: 0.0}"], "must be above 0"),
        (["rollout.sampler.schedule={name: planned, per_step: 0}"], "at least 1"),
        (["rollout.sampler.selection=planned"], "a sampler has one planner"),
        (["rollout.sampler.score=sampled_confidence"], "a trainer cannot rebuild"),
        (["planner.lengths=[8, 4]"], "and rise"),
        (["planner.network=hidden"], "use transformer"),
        (["planner.features=[candidate, odds]"], "inside a block"),
        (["planner.expert={levels: [0.5]}"], "lengths of blocks; drop expert"),
        (["planner.order=max_confidence"], "use categorical"),
        (["planner.shortlist=3"], "above it with categorical"),
        (["planner.path=some", "planner.expert={levels: [0.5]}"], "lengths of blocks; drop expert"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_recipes_that_contradict_themselves(model: Path, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(model, *changes)
