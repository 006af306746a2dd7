"""`unmask bench rollout`: its numbers against an evaluation, samplers that leave each other alone, and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import shortrun

from unmask.recipes.loading import dump_recipe, load_samplers
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl import cli
from unmask.rl.bench_rollout import bench_rollout, fitting, paired, plot, sampler_of
from unmask.rl.evaluate import evaluate, heldout_rows
from unmask.rl.settings import rewards_of
from unmask.rl.targets import evaluation_worker, open_target

pytestmark = pytest.mark.usefixtures("place")
LOW = "llada_low_confidence:schedule.size=8"


@pytest.fixture
def target(model: Path, place: Path) -> str:
    path = place / "short.yaml"
    path.write_text(dump_recipe(shortrun.recipe(model)))
    return str(path)


def test_paired_differences_by_hand() -> None:
    mean, stderr = paired([True, True, False, False], [True, False, False, False])
    assert (mean, stderr) == (0.25, pytest.approx(0.25))  # differences 0, 1, 0, 0: variance 1/4, over n = 4
    assert paired([True, False], [True, False]) == (0.0, 0.0)
    assert math.isnan(paired([True], [False])[1])


def test_a_row_is_what_an_evaluation_finds(target: str) -> None:
    found = bench_rollout(target, ["recipe", f"{LOW},schedule.per_step=4"], reference=LOW, problems=12)
    assert [row["sampler"] for row in found["rows"]] == [LOW, "recipe", f"{LOW},schedule.per_step=4"]
    assert (found["n"], found["canvas"]) == (12, 16)
    recipe, denoiser = open_target(target)
    worker = evaluation_worker(recipe, denoiser, rewards_of(recipe))
    wanted = evaluate(worker, heldout_rows(SLOTS["task"].build(recipe.task)("heldout", seed=0), 12))
    row = found["rows"][1]
    assert (row["exact"], row["stderr"], row["nfe"]) == (wanted.exact, wanted.stderr, wanted.nfe)
    first = found["rows"][0]
    assert (first["agreement"], first["gain"], first["gain_stderr"]) == (1.0, 0.0, 0.0)
    for row in found["rows"]:
        assert row["tokens_per_s"] > 0 and 0 < row["overhead"] < 1 and 0 <= row["agreement"] <= 1
        assert row["calls"] > 0 and row["status"] == "none"


def test_changes_of_one_sampler_do_not_reach_the_next(target: str) -> None:
    before = json.dumps(load_samplers())
    recipe, _ = open_target(target)
    for change in ("schedule.per_step=4", "cache=dual", "schedule={name: uniform, steps: 4}"):
        sampler_of(f"{LOW},{change}", recipe)
    assert json.dumps(load_samplers()) == before
    found = bench_rollout(target, [f"{LOW},schedule.per_step=8", f"{LOW},eos.rule=none"], reference=LOW, problems=2)
    assert found["rows"][1]["nfe"] <= 2 and found["rows"][2]["nfe"] == 16


def test_a_change_may_hold_commas(target: str) -> None:
    recipe, _ = open_target(target)
    text = "llada_low_confidence:schedule={name: uniform, steps: 4},transforms=[{name: suppress, ids: [1, 2]}],top_k=3"
    sampler = sampler_of(text, recipe)
    assert (sampler.schedule.keywords, sampler.top_k, len(sampler.transforms)) == ({"steps": 4}, 3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llada_low_confidense", "unknown sampler 'llada_low_confidense'.*llada_low_confidence"),
        ("llada_low_confidence:schedule.sise=8", "sise"),
        ("llada_low_confidence:schedule.size=5", "blocks of 5 do not divide the canvas of 16"),
    ],
)
def test_samplers_that_cannot_be(target: str, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sampler_of(text, open_target(target)[0])


def test_all_samplers_are_those_that_the_canvas_takes(target: str) -> None:
    recipe, _ = open_target(target)
    names = fitting(recipe)
    # Blocks of 32 and 64 do not divide a canvas of 16; samplers of the whole canvas fit.
    assert "llada_low_confidence" not in names and "klass" not in names
    assert {"dream_entropy", "ass", "eoser_ass", "entropy_bounded", "saber"} <= set(names)
    wide, _ = open_target(target, ["rollout.canvas=64"])
    assert fitting(wide) == list(load_samplers())


def test_the_command_writes_table_and_picture(target: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--sampler", "ass", "--reference", LOW, "--problems", "3", "--plot", "pareto.png", "--json", "rows.json"]
    cli.app(["bench", "rollout", target, *options], standalone_mode=False)
    text = capsys.readouterr().out
    assert "sampler" in text and LOW in text and "wrote pareto.png" in text
    rows = json.loads((place / "rows.json").read_text())["rows"]
    assert [row["sampler"] for row in rows] == [LOW, "ass"] and rows[1]["nfe"] <= 4
    assert (place / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_front_is_what_no_other_beats(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib.axes import Axes

    lines: list[tuple[list[float], list[float]]] = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **options: lines.append((x, y)))
    points = [(8, 0.2), (4, 0.3), (16, 0.9), (32, 0.9), (64, 0.95)]
    rows = [{"sampler": "x", "nfe": nfe, "exact": exact, "stderr": 0.01} for nfe, exact in points]
    plot({"target": "t", "task": {"name": "arithmetic"}, "canvas": 8, "n": 9, "rows": rows}, place / "front.png")
    assert lines == [([4, 16, 64], [0.3, 0.9, 0.95])]
