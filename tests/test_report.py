"""The report of a run: its numbers are those of the records, it is one offline file, and text in it is text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from browser import NARROW, WIDE, compare, opened
from syntheticrun import HOSTILE, write_run

from unmask.rl import report as module
from unmask.rl.curves import ETA, EXACT, SECTIONS, figures_of
from unmask.rl.figures import BINS, Curve, Figure, draw
from unmask.rl.report import read_run, report, watch
from unmask.rl.runfolder import RunError

STEPS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "seen"
    return write_run(folder, steps=STEPS, every=30, canvas=110, hostile=True)


@pytest.fixture(scope="module")
def made(run: Path) -> Path:
    return report(run)


def figure(folder: Path, title: str) -> Figure:
    """Return one of a run's figures."""
    found = read_run(folder)
    (only,) = [f for section in figures_of(found.records, found.steps) for f in section.figures if f.title == title]
    return only


def test_every_figure_is_drawn_from_the_records(run: Path, made: Path) -> None:
    page = made.read_text()
    titles = [wanted.title for section in SECTIONS for wanted in section.figures]
    assert [title for title in titles if f"<figcaption>{title}" not in page.replace("&#x27;", "'")] == []
    assert page.index("Held-out exact rate") < page.index("Total reward")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (exact,) = figure(run, EXACT).curves
    held = [record for record in records if "eval/exact" in record]
    assert exact.values == [record["eval/exact"] for record in held]
    assert exact.errors == [record["eval/stderr"] for record in held]
    rewards = {curve.name: curve.values for curve in figure(run, "Each reward").curves}
    assert rewards.keys() == {"arithmetic", "answer_format"}
    assert rewards["arithmetic"] == [r["reward/arithmetic"] for r in records if "reward/arithmetic" in r]
    assert {curve.name for curve in figure(run, "Truth against proxy").curves} == {"reward/total", "truth/exact"}
    mismatch = {curve.name for curve in figure(run, "Trainer against rollout, |log-prob| (nats)").curves}
    assert mismatch == {"mismatch_mean", "mismatch_p50", "mismatch_p99", "mismatch_max"}


def test_the_time_foreseen_is_the_mean_step_so_far() -> None:
    records: list[dict[str, Any]] = [{"step": 0, "time/eval_wall_s": 60.0}]
    records += [{"step": step, "time/step_s": seconds} for step, seconds in ((1, 60.0), (2, 120.0), (3, 180.0))]
    (section,) = figures_of(records, 4)
    (foreseen,) = [f for f in section.figures if f.title == ETA]
    assert foreseen.curves[0].steps == [1, 2, 3]
    assert foreseen.curves[0].values == [4 * 2.0, 4 * 4 / 2, 4 * 7 / 3] and foreseen.level is None
    (section,) = figures_of(records, 3)
    assert [f.level for f in section.figures if f.title == ETA] == [7.0]


def test_long_lines_are_thinned_to_means_within_their_range() -> None:
    values = [math.sin(i / 50) + (i % 2) for i in range(10 * BINS)]
    text = draw(Figure("long", [Curve("y", range(len(values)), values)]))
    paths = [path.count("L") + 1 for path in re.findall(r' d="([^"]*)"', text)]
    assert max(paths) <= 2 * BINS + 4 and len(text) < 60_000
    assert 'fill="' in text or "fill: var(--s0)" in text, "the range between least and largest"


def test_text_is_text_and_nothing_is_fetched(made: Path) -> None:
    text = made.read_text()
    assert HOSTILE not in text and "&lt;script&gt;document.title" in text
    assert not re.findall(r"(?:src|href)=\"(?!#)|@import|url\((?!#)", text)
    with opened(made, ready=False) as tab:
        assert tab.title() == "seen: report" and tab.locator("main script, main img").count() == 0
        assert tab.locator("figure svg").count() == sum(len(section.figures) for section in SECTIONS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", ["wide", "narrow"])
def test_it_looks_as_it_did(made: Path, width: str, scheme: str) -> None:
    with opened(made, size=WIDE if width == "wide" else NARROW, scheme=scheme, ready=False) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"], "nothing is cut off"
        compare(tab.screenshot(), f"report-{width}-{scheme}.png")


def test_a_run_that_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "going", steps=30, every=30)
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:20]) + lines[20][:30])  # a process is writing line 21
    (folder / "timing.jsonl").unlink()
    done = json.loads(lines[19])["step"]
    written: list[str] = []

    def pause(seconds: float) -> None:
        assert seconds == 7.0
        (folder / "summary.json").write_text(summary)
        (folder / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(module.time, "sleep", pause)
    watch(folder, None, every_s=7.0, told=lambda path: written.append(path.read_text()))
    going, ended = written
    assert f"not finished: step {done} of 30" in going and '<meta http-equiv="refresh" content="7">' in going
    assert "finished: 30 steps" in ended and 'http-equiv="refresh"' not in ended


def test_the_change_is_called_shown_only_where_zero_is_excluded(run: Path) -> None:
    def told(before: float, after: float) -> str:
        return module._difference({"exact": before, "stderr": 0.03}, {"exact": after, "stderr": 0.04})

    assert "[+0.002, +0.198]; the interval excludes zero" in told(0.5, 0.6)
    assert "[-0.008, +0.188]; the interval includes zero" in told(0.5, 0.59)


def test_a_run_without_rollouts_truth_or_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", steps=30, every=100)
    for path in (folder / "rollouts").iterdir():
        path.unlink()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in record.items() if "truth" not in k} for record in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    text = report(folder).read_text()
    assert "Without records in this run: Truth against proxy." in text and "by outcome" not in text
    with pytest.raises(RunError, match=r"holds no metrics\.jsonl"):
        report(tmp_path)
