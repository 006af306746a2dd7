"""`unmask bench policies`: its rows are what their names say, its best constants are the best, its figure is drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import shortrun

from unmask.policies.planner import PlannerSpec, new_planner
from unmask.recipes.registry import RecipeError
from unmask.rl import cli
from unmask.rl.bench_policies import ALPHAS, Grid, bench_policies, best_lines

OVERRIDES = ("task.level=easy", "rollout.canvas=16")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    new_planner(PlannerSpec(width=16, mlp=32)).save(tmp_path / "planner")
    return str(shortrun.save_model(tmp_path / "model"))


def test_rows_are_what_they_are_called(model: str) -> None:
    """On the shipped model, which solves some: the best and the worst of the constants differ."""
    grid = Grid(
        (8, 32), levels=(0.5,), factors=(), nats=(), random=(2,), per_step=(1, 4), planners=("planner",), alphas=(1.0,)
    )
    task = ("task={name: arithmetic, operations: [2, 2]}", "rollout.canvas=32")
    found = bench_policies("unmask:tiny", grid, problems=6, overrides=task)
    rows = {(row["kind"], row["block"], row["knob"]): row for row in found["rows"]}
    assert found["n"] == 6 and found["canvas"] == 32 and len(rows) == len(found["rows"]) == 9
    for (kind, _, knob), row in rows.items():
        assert 0 < row["nfe"] <= 32 and row["nfe_stderr"] >= 0
        if kind in ("top", "random"):
            assert row["nfe"] <= 32 / knob
        assert row["reward"]["0"] == pytest.approx(row["exact"])
        assert len(row["solved"]) == 6 and row["solved"].count("1") / 6 == pytest.approx(row["exact"])
    constants = [row for row in found["rows"] if not row["kind"].startswith("planner")]
    assert sorted(alpha for row in constants for alpha in row["best"]) == sorted(f"{alpha:g}" for alpha in ALPHAS)
    for row in constants:
        for alpha in row["best"]:
            assert row["reward"][alpha] == max(other["reward"][alpha] for other in constants)
    assert len({row["reward"]["0"] for row in constants}) > 1
    assert not rows["planner planner", 32, 1.0]["best"]
    assert all("best planner planner at 1" in line for line in best_lines(found))


def test_the_command_writes_table_and_figure(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--planner", "planner", "--alpha", "1", "--block", "16", "--level", "0.5", "--problems", "3"]
    words = ["unmask", "bench", "policies", model, *OVERRIDES, *options, "--plot", "p.png", "--json", "p.json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "best constant" in shown and "threshold" in shown
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path("p.json").read_text())["n"] == 3


def test_a_planner_that_takes_tokens_back(model: str, tmp_path: Path) -> None:
    spec = PlannerSpec(width=16, mlp=32, distribution="remasking", back_bias=2.0)
    new_planner(spec).save(tmp_path / "back")
    grid = Grid((), planners=("back", "planner"), alphas=(1.0,))
    found = bench_policies(model, grid, problems=4, overrides=OVERRIDES)
    assert [row["kind"] for row in found["rows"]] == ["planner back", "planner planner"]
    assert all(0 < row["nfe"] <= 16 for row in found["rows"])


def test_a_planner_that_is_not_there(model: str) -> None:
    with pytest.raises(RecipeError, match="holds no planner"):
        bench_policies(model, Grid((16,), planners=("nowhere",)), problems=2, overrides=OVERRIDES)
