"""Likelihood bounds against enumeration, and denoisers as models of lm-evaluation-harness on tasks of our own."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from unmask.policies.loading import load_denoiser
from unmask.recipes.registry import RecipeError
from unmask.rl import harness
from unmask.rl.likelihood import is_greedy, likelihood_bound
from unmask.rollouts.sampler import build_sampler

NEEDS_LM_EVAL = pytest.mark.skipif(harness.LM is None, reason="the extra `eval` (lm-eval) is not installed")
CONTEXT = [1, 2]


def logprobs(toy: Any, canvas: list[int]) -> torch.Tensor:
    """Return log p of every token but the mask at every place of one canvas."""
    logits_LV = toy.logits(torch.tensor([CONTEXT + canvas]))[0, len(CONTEXT) :].detach().clone()
    logits_LV[:, -1] = -torch.inf
    return logits_LV.log_softmax(dim=-1)


def terms(toy: Any, target: list[int], mask: int) -> dict[int, list[float]]:
    """Return, for every l, the L / l sum log p of every set of l hidden places."""
    found: dict[int, list[float]] = {}
    for size in range(1, len(target) + 1):
        for hidden in itertools.combinations(range(len(target)), size):
            canvas = [mask if i in hidden else token for i, token in enumerate(target)]
            table = logprobs(toy, canvas)
            found.setdefault(size, []).append(len(target) / size * sum(table[i, target[i]].item() for i in hidden))
    return found


def exact_bound(toy: Any, target: list[int], mask: int) -> float:
    return sum(sum(values) / len(values) for values in terms(toy, target, mask).values()) / len(target)


def test_the_estimate_is_unbiased(toys: ModuleType) -> None:
    toy, target, mask = toys.Toy(seed=3), [0, 2, 1], toys.MASK
    exact = exact_bound(toy, target, mask)
    estimates = torch.tensor([likelihood_bound(toy, CONTEXT, target, draws=12, seed=seed) for seed in range(400)])
    error = estimates.std().item() / math.sqrt(len(estimates))
    assert abs(estimates.mean().item() - exact) < 4 * error < 0.2
    # What is spread over l evenly is surer than as many independent draws.
    # Every size weighs the same, however many sets it has: 3, 3 and 1 of three places.
    by_size = terms(toy, target, mask)
    values = torch.tensor([value for size in by_size.values() for value in size for _ in range(3 // len(size))])
    assert estimates.std().item() < values.std().item() / math.sqrt(12) * 1.1


def consistent(toys: ModuleType) -> tuple[Any, torch.Tensor]:
    """Return a toy whose every prediction is the conditional of one joint distribution, and that distribution."""
    toy, mask = toys.Toy(seed=1), toys.MASK
    rng = torch.Generator().manual_seed(0)
    joint = torch.rand(3, 3, 3, generator=rng, dtype=torch.float64) + 0.1
    joint /= joint.sum()
    with torch.no_grad():
        toy.model.prompt.zero_()
        for canvas in itertools.product(range(4), repeat=3):
            state = sum(token * 4**i for i, token in enumerate(canvas))
            seen = joint[tuple(slice(None) if token == mask else slice(token, token + 1) for token in canvas)]
            for place in range(3):
                others = [i for i in range(3) if i != place]
                marginal = seen.sum(dim=others)
                row = torch.full((4,), -30.0, dtype=torch.float64)
                row[:3] = marginal.log() if canvas[place] == mask else 0.0
                toy.model.canvas[state, place] = row
    return toy, joint


def test_the_bound_is_tight_for_a_consistent_denoiser(toys: ModuleType) -> None:
    toy, joint = consistent(toys)
    for target in ([0, 1, 2], [2, 2, 0]):
        log_p = joint[tuple(target)].log().item()
        assert exact_bound(toy, target, toys.MASK) == pytest.approx(log_p, abs=1e-9)
        estimate = likelihood_bound(toy, CONTEXT, target, draws=3000, batch=500)
        assert estimate == pytest.approx(log_p, abs=0.05)
    # Of an inconsistent one it lies below: the mean over all texts of exp(bound) would be 1 only if it were tight.
    rough = toys.Toy(seed=3)
    mass = sum(math.exp(exact_bound(rough, list(t), toys.MASK)) for t in itertools.product(range(3), repeat=3))
    assert mass < 1.0


def test_the_estimate_is_a_function_of_pair_and_seed(toys: ModuleType) -> None:
    toy, target = toys.Toy(seed=3), [0, 2, 1]
    values = [likelihood_bound(toy, CONTEXT, target, draws=16, batch=batch) for batch in (1, 5, 16)]
    assert values[1] == pytest.approx(values[0], rel=1e-12) and values[2] == pytest.approx(values[0], rel=1e-12)
    assert likelihood_bound(toy, CONTEXT, target, draws=16, seed=1) != values[0]
    for context, text, draws in ((CONTEXT, [], 4), ([], target, 4), (CONTEXT, target, 0)):
        with pytest.raises(RecipeError, match="must be at least 1"):
            likelihood_bound(toy, context, text, draws=draws)


def test_greedy(toys: ModuleType) -> None:
    toy, mask, canvas = toys.Toy(seed=3), toys.MASK, [toys.MASK] * 3
    while mask in canvas:
        table = logprobs(toy, canvas)
        place = max((i for i in range(3) if canvas[i] == mask), key=lambda i: table[i].max().item())
        canvas[place] = int(table[place].argmax())
    found = [list(t) for t in itertools.product(range(3), repeat=3) if is_greedy(toy, CONTEXT, list(t))]
    assert found == [canvas]


@pytest.fixture(scope="module")
def lm(model: Path) -> harness.DenoiserLM:
    sampler = build_sampler({"schedule": {"name": "blocks", "size": 8, "per_step": 4}}, temperature=0.0)
    return harness.DenoiserLM(load_denoiser(str(model)), sampler, canvas=16, draws=8, batch=2)


def run(lm: Any, task: dict[str, Any], rows: list[dict[str, Any]], folder: Path, **options: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    # Without this the thousands of tasks that come with lm-eval are read, which takes a minute.
    options["task_manager"] = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(
        model=lm, tasks=[{**data, "test_split": "test", **task}], bootstrap_iters=0, log_samples=True, **options
    )


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing but the local machine can be reached, and what is cached is the test's own."""
    import socket

    def refuse(self: Any, address: Any) -> None:
        raise AssertionError(f"the network was asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@NEEDS_LM_EVAL
def test_generation_in_the_harness(lm: Any, offline: Path) -> None:
    rows = [{"prompt": f"{i} a+1"} for i in range(5)]
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    ours = lm._complete([lm.encode(lm.apply_chat_template(turn)) for turn in turns], 0)
    for row, text in zip(rows, ours, strict=True):
        row["answer"] = text if row["prompt"] < "3" else "nothing it would write"
    task = {
        "task": "local_generation",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": []},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    before = lm.nfe
    found = run(lm, task, rows, offline, apply_chat_template=True)
    assert found["results"]["local_generation"]["exact_match,none"] == pytest.approx(3 / 5)
    assert [s["resps"][0][0] for s in found["samples"]["local_generation"]] == ours
    assert before < lm.nfe <= before + 5 * 4


@NEEDS_LM_EVAL
def test_choices_in_the_harness(lm: Any, offline: Path) -> None:
    rows = [{"prompt": f"{i} a+1 is", "choices": [" 1", " 22", " x"], "gold": i % 3} for i in range(4)]
    task = {
        "task": "local_choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    found = run(lm, task, rows, offline)
    right = 0
    for row in rows:
        scores = [
            likelihood_bound(lm.denoiser, lm.encode(row["prompt"]), lm.encode(choice), draws=8, batch=2)
            for choice in row["choices"]
        ]
        right += scores.index(max(scores)) == row["gold"]
    assert found["results"]["local_choices"]["acc,none"] == pytest.approx(right / len(rows))


@NEEDS_LM_EVAL
def test_stop_strings_pairs_and_rolling(lm: Any) -> None:
    from lm_eval.api.instance import Instance

    (whole,) = lm.generate_until([Instance("generate_until", {}, ("5 a+1", {"until": []}), 0)], disable_tqdm=True)
    stop = whole[2:3]
    (cut,) = lm.generate_until([Instance("generate_until", {}, ("5 a+1", {"until": [stop]}), 0)], disable_tqdm=True)
    assert cut == whole.partition(stop)[0]
    # A blank at the end of the context belongs to the text.
    assert lm._pair("a b ", "c") == (lm.encode("a b"), lm.encode(" c"))
    assert lm._pair("", "c") == ([lm._prefix], lm.encode("c"))
    lm.window = 4
    (rolled,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abcdef",), 0)], disable_tqdm=True)
    ids = lm.encode("abcdef")
    parts = [lm._bound([lm._prefix], ids[:4]), lm._bound(ids[1:4], ids[4:])]
    assert rolled == pytest.approx(sum(parts), rel=1e-12)


def test_what_is_said_without_the_package(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "LM", None)
    sampler = build_sampler({"schedule": {"name": "blocks", "size": 1, "per_step": 1}})
    with pytest.raises(RecipeError, match=r"pip install 'unmask\[eval\]'"):
        harness.DenoiserLM(toys.Toy(), sampler, canvas=8)


@NEEDS_LM_EVAL
def test_a_protocols_decoding(model: Path) -> None:
    found = harness.load(str(model), "sudoku@tiny", draws=2)
    assert (found.canvas, found.draws, found.sampler.temperature) == (48, 2, 0.0)
