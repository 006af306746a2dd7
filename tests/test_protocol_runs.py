"""Evaluations under a protocol: numbers recomputed from the rollouts, what they may depend on, resuming, comparing."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import shortrun
import yaml

from unmask.recipes.registry import RecipeError
from unmask.rl import evaluating, reproducing, run
from unmask.rl.evaluation import Evaluating, Request
from unmask.rl.manifests import fingerprint
from unmask.rl.results import Finished, Tally, check_same, find_evaluations, read_tally, results_table
from unmask.rl.runfolder import RunError

pytestmark = pytest.mark.usefixtures("place")
ROW = {
    "summary": "Ids of a random model.",
    "source": "this test",
    "task": {"name": "arithmetic", "level": "easy"},
    "problems": 6,
    "canvas": 16,
    "sampler": {"schedule": {"name": "blocks", "size": 8, "per_step": 4}, "eos": {"rule": "stop"}},
    "temperature": 1.0,
    "rewards": ["toyrewards:parity"],
}


def protocol(**changes: Any) -> str:
    Path("own.yaml").write_text(yaml.safe_dump({"parity@test": {**ROW, **changes}}))
    return str(Path("own.yaml").absolute())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "rollouts").glob("*.parquet"))
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    return sorted(
        ({k: v for k, v in r.items() if k != "seconds"} for r in rows), key=lambda r: (r["problem"], r["seed"])
    )


def evaluate(model: Path, *overrides: str, **options: Any) -> Path:
    result = evaluating.evaluate_under(str(model), protocol(), overrides=overrides, **options)
    return Path(result["results"][-1]["folder"])


def test_every_number_is_recomputed_from_the_rollouts(model: Path) -> None:
    folder = evaluate(model, samples=4)
    summary, rows = json.loads((folder / "summary.json").read_text()), rows_of(folder)
    assert (summary["n"], summary["samples"], len(rows)) == (6, 4, 24)
    right = [[row["outcome"] == "ok" for row in rows[4 * p : 4 * p + 4]] for p in range(6)]
    shares = [statistics.fmean(one) for one in right]
    assert 0 < summary["exact"] < 1 and summary["exact"] == pytest.approx(statistics.fmean(shares))
    assert summary["stderr"] == pytest.approx(statistics.stdev(shares) / math.sqrt(6))
    seeds = [statistics.fmean(one[j] for one in right) for j in range(4)]
    assert summary["stderr_seeds"] == pytest.approx(statistics.stdev(seeds) / 2)
    for k in (1, 2, 4):
        # The chance that all k of a problem's 4 are wrong, drawn one after the other.
        wrong = [math.prod((4 - sum(one) - i) / (4 - i) for i in range(k)) for one in right]
        values = [1 - w for w in wrong]
        assert summary["pass"][str(k)]["mean"] == pytest.approx(statistics.fmean(values))
        assert summary["pass"][str(k)]["stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(6))
    assert summary["reward"]["mean"] == pytest.approx(statistics.fmean(row["reward"] for row in rows))
    assert summary["nfe"] == pytest.approx(statistics.fmean(row["nfe"] for row in rows))
    assert summary["length"] == pytest.approx(statistics.fmean(row["length"] for row in rows))
    assert summary["truncated"] == statistics.fmean(256 not in row["tokens"] for row in rows)
    assert summary["outcomes"] == dict(Counter(row["outcome"] for row in rows))
    assert summary["unparsable"] == pytest.approx(summary["outcomes"].get("unparsable", 0) / 24)
    problems = pyarrow.parquet.read_table(folder / "problems.parquet").to_pylist()
    assert [row["right"] for row in problems] == [sum(one) for one in right]
    assert [row["prompt"] for row in problems] == [rows[4 * p]["prompt"] for p in range(6)]


def test_majority_and_failures_by_hand() -> None:
    def row(outcome: str, answer: str | None, reward: float | None, cut: bool = False) -> dict[str, Any]:
        values = {"outcome": outcome, "answer": answer, "reward": reward, "truncated": cut}
        return {**values, "prompt": "?", "nfe": 2, "length": 4, "seconds": 0.5}

    tally = Tally(
        [
            [row("ok", "4", 1.0), row("wrong", "5", 0.0), row("ok", "4", 1.0)],
            [row("unparsable", None, 0.0, cut=True), row("timeout", None, None), row("wrong", "7", 0.0)],
        ]
    )
    table = tally.per_problem()
    assert (table["majority"], table["reward"], table["timeout"]) == ([1.0, 0.0], [2 / 3, 0.0], [0.0, 1 / 3])
    assert (table["truncated"], table["unparsable"], table["exact"]) == ([0.0, 1 / 3], [0.0, 1 / 3], [2 / 3, 0.0])


def test_batch_size_does_not_matter_and_bits_are_the_same(model: Path) -> None:
    folders = [evaluate(model, f"rollout.micro_batch={size}", samples=2) for size in (1, 4, 64)]
    assert len(set(folders)) == 3, "evaluations of several batch sizes do not share a folder"
    one, *others = (rows_of(folder) for folder in folders)
    # Another padding rounds log-probs otherwise (benchmarks/batch_spread.py); tokens and what follows from them stay.
    assert len({len(row["prompt"]) for row in one}) > 1, "prompts of one length never change the padding"
    for other in others:
        assert [{**row, "logprob": None} for row in other] == [{**row, "logprob": None} for row in one]
    assert len({row["completion"] for row in one}) > 6
    request = Request.read(folders[0] / "evaluation.json")
    assert rows_of(evaluating.carry_out(request, folder=Path("again"))) == one


def test_seeds_are_samples(model: Path) -> None:
    both = rows_of(evaluate(model, samples=2))
    second = rows_of(evaluate(model, seed=1))
    assert [row for row in both if row["seed"] == 1] == second
    assert [row["tokens"] for row in second] != [row["tokens"] for row in both if row["seed"] == 0]


def test_a_killed_evaluation_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(model, samples=3)
    before = rows_of(whole)
    parts = sorted((whole / "rollouts").iterdir())
    assert len(parts) == 3
    parts[1].unlink()
    (whole / "summary.json").unlink()
    with pytest.raises(RunError, match="was not finished; go on with `unmask evaluate"):
        Finished.read(whole)
    with pytest.raises(RunError, match="6 of 18 completions are missing"):
        read_tally(whole, 6, 3)
    kept = {path.name: path.stat().st_mtime_ns for path in parts if path.exists()}
    assert evaluate(model, samples=3) == whole and rows_of(whole) == before
    assert {name: (whole / "rollouts" / name).stat().st_mtime_ns for name in kept} == kept


def test_a_problem_is_the_same_in_whatever_part_it_lies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(str(model), protocol(), overrides=("rollout.micro_batch=2",), samples=1)
    whole = rows_of(evaluating.carry_out(request, folder=Path("one")))
    monkeypatch.setattr("unmask.rl.evaluation.PART_ROWS", 2)
    assert len(Evaluating.open(request).parts()) == 3
    assert rows_of(evaluating.carry_out(request, folder=Path("three"))) == whole


def test_shares_of_two_processes_make_the_whole(model: Path) -> None:
    request = Request(str(model), protocol(), overrides=("rollout.micro_batch=32",), samples=3)
    alone = rows_of(evaluating.carry_out(request, folder=Path("one")))
    shares = [set(Evaluating.open(request).parts()[rank::2]) for rank in range(2)]
    assert shares[0] and shares[1] and not shares[0] & shares[1]
    for rank in (1, 0):
        evaluating.work(request, Path("two"), rank=rank, ranks=2)
    assert rows_of(Path("two")) == alone


@pytest.mark.slow
def test_two_real_processes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    alone, two = (rows_of(evaluate(model, samples=2, nproc=n)) for n in (1, 2))
    assert alone == two


def empty(value: object) -> bool:
    if isinstance(value, dict):
        return not value or any(map(empty, value.values()))
    return value is None or value == ""


def test_no_field_of_a_manifest_is_empty(model: Path) -> None:
    trained = Path(run.train(shortrun.recipe(model, "optim.steps=1"))["folder"])
    wanted = {"git_commit", "versions", "device", "dtype", "attention_kernel", "batch_size", "seeds", "command"}
    wanted |= {"protocol_hash", "recipe_hash"}
    for folder in (trained, evaluate(model)):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert wanted <= manifest.keys() and not {key for key, value in manifest.items() if empty(value)}
        assert len(manifest["protocol_hash"]) == len(manifest["recipe_hash"]) == 64
        assert manifest["attention_kernel"] == "sdpa" and manifest["dtype"] == "float32"


def test_a_run_stands_beside_its_base(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = run.train(shortrun.recipe(model, "optim.lr=0.3", "optim.steps=2"))["folder"]
    capsys.readouterr()
    result = evaluating.evaluate_under(trained, protocol(), samples=2)
    assert [one["policy"] for one in result["results"]] == ["base", "trained"]
    base, policy = result["results"]
    assert base["weights"] != policy["weights"] and base["protocol_hash"] == policy["protocol_hash"]
    # The base of a run is the model itself, whose evaluation would be the same.
    (alone,) = evaluating.evaluate_under(str(model), protocol(), samples=2)["results"]
    told = ("target", "policy", "folder", "tokens_per_s")
    assert {k: v for k, v in alone.items() if k not in told} == {k: v for k, v in base.items() if k not in told}
    (found,) = result["differences"]
    assert found["difference"] == pytest.approx(policy["exact"] - base["exact"])
    assert found["verdict"] in capsys.readouterr().out
    assert [one.folder for one in find_evaluations(trained)] == [Path(policy["folder"])]
    compared = evaluating.compare([base["folder"], trained])
    assert compared["differences"][0]["low"] == found["low"]
    with pytest.raises(RecipeError, match="1 evaluation is named"):
        evaluating.compare([trained])


def test_tables_refuse_to_mix(model: Path) -> None:
    one = Finished.read(evaluate(model))
    fewer = Finished.read(evaluate(model, problems=5))
    with pytest.raises(RunError, match="differ in their problems"):
        results_table([one, fewer])
    other = evaluating.evaluate_under(str(model), protocol(canvas=24))["results"][0]["folder"]
    with pytest.raises(RunError, match=r"differ in their protocol .* --problems 6"):
        evaluating.compare([str(one.folder), other])
    check_same([one, one])
    with pytest.raises(RunError, match="is not the folder of an evaluation"):
        evaluating.compare([str(one.folder), "."])


def test_reproduce_an_evaluation(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = evaluate(model, samples=2)
    result = reproducing.reproduce(folder)
    assert result["same"] and not result["surroundings"] and "bit for bit" in capsys.readouterr().out
    path = folder / "rollouts" / "seed-000000-from-000000.parquet"
    table = pyarrow.parquet.read_table(path)
    calls = pyarrow.array([7, *table["nfe"].to_pylist()[1:]])
    changed = table.set_column(table.column_names.index("nfe"), "nfe", calls)
    pyarrow.parquet.write_table(changed, path)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "exact": 0.99}))
    result = reproducing.reproduce(folder)
    found = [(entry["what"], entry["is"]) for entry in result["results"]]
    assert found == [("exact", summary["exact"]), ("rollouts, nfe", 1)]
    with pytest.raises(RunError, match="nothing to repeat"):
        reproducing.reproduce(Path("."))


def test_reproduce_a_run(model: Path) -> None:
    folder = Path(run.train(shortrun.recipe(model, "optim.steps=2"))["folder"])
    result = reproducing.reproduce(folder)
    assert result["same"] and Path(result["again"]).name == "short-again"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    record = {**json.loads(lines[1]), "loss": 5.0}
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
    (entry,) = reproducing.reproduce(folder)["results"]
    assert (entry["what"], entry["was"], entry["first_step"]) == ("metrics, loss", 5.0, record["step"])


def test_other_weights_are_another_folder(model: Path, tmp_path: Path) -> None:
    request = Request(str(model), protocol())
    one = Evaluating.open(request)
    assert one.folder() == Evaluating.open(request).folder()
    assert one.folder() != Evaluating.open(replace(request, samples=2)).folder()
    weight = one.denoiser.base.lm_head.weight
    weight.data[3, 2] += 1e-6
    assert fingerprint(one.denoiser.model) != one.facts["weights"]
    # Two entries that change places keep every sum of entries, and are other weights.
    weight.data[3, 2] -= 1e-6
    before = fingerprint(one.denoiser.model)
    weight.data[0, :2] = weight.data[0, :2].flip(0)
    assert fingerprint(one.denoiser.model) != before
