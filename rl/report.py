"""`unmask report`: what a run has recorded, as one offline HTML page; also while the run goes on."""

from __future__ import annotations

import html
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml

from ..rewards import OUTCOMES
from .alarms import ALARM
from .curves import SECTIONS, Section, figures_of
from .figures import draw
from .pages import page
from .runfolder import FILES, RunError, read_lines, write_atomically

logger = logging.getLogger(__name__)
SAMPLES = 3  # completions of each outcome
LONGEST = 4000  # characters of a completion that are shown


@dataclass(frozen=True)
class Run:
    """What a run's folder holds: records by step, recipe, manifest, results before and after, and rollouts to show."""

    folder: Path
    records: list[dict[str, Any]]
    recipe: str
    manifest: dict[str, Any]
    before: dict[str, Any] | None
    summary: dict[str, Any] | None
    steps: int | None
    age_s: float

    @property
    def done(self) -> int:
        """The last step that was recorded."""
        return max((record["step"] for record in self.records), default=0)


def report(run: Path, out: Path | None = None, *, refresh_s: int | None = None) -> Path:
    """Write the report of the run in folder `run` to `out` (its `report.html`) and return the path.

    With `refresh_s`, the page of an unfinished run reloads itself so often. Raises RunError where no run is.
    """
    found = read_run(run)
    out = out or run / "report.html"
    sections = figures_of(found.records, found.steps)
    body = "\n".join([_head(found), _held_out(found), _alarms(found), *map(_section, sections)])
    body += _absent(sections) + _samples(found) + _provenance(found)
    refresh = refresh_s if found.summary is None else None
    title = f"{run.absolute().name}: report"
    write_atomically(out, page(title, f"<main>{body}</main>", styles=("page.css", "report.css"), refresh_s=refresh))
    return out


def watch(run: Path, out: Path | None, *, every_s: float, told: Callable[[Path], None]) -> None:
    """Write the report anew every `every_s` seconds until the run has ended; `told` hears of each."""
    while True:
        over = (run / "summary.json").is_file()
        told(report(run, out, refresh_s=max(1, round(every_s))))
        if over:
            return
        time.sleep(every_s)


def read_run(folder: Path) -> Run:
    """Return what a run's folder holds, without the line that a process is just writing."""
    if not (folder / FILES[0]).is_file() or not (folder / "recipe.yaml").is_file():
        raise RunError(f"report: '{folder}' holds no {FILES[0]} and recipe.yaml, so it is not the folder of a run.")
    records = [record for name in FILES for record in read_lines(folder / name)]
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    return Run(
        folder=folder,
        records=sorted(records, key=lambda record: record["step"]),
        recipe=recipe,
        manifest=_json(folder / "manifest.json") or {},
        before=_json(folder / "before.json"),
        summary=_json(folder / "summary.json"),
        # The written recipe has every default in it; building its parts would import torch for this one number.
        steps=(yaml.safe_load(recipe).get("optim") or {}).get("steps"),
        age_s=time.time() - (folder / FILES[0]).stat().st_mtime,
    )


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _head(run: Run) -> str:
    """Return the title and how far the run is."""
    if run.summary is not None:
        state = f"finished: {run.done} steps in {run.summary.get('wall_s', 0.0) / 60:.1f} minutes"
    else:
        state = f"not finished: step {run.done} of {run.steps or '?'}, last record {run.age_s / 60:.0f} minutes ago"
    return (
        f"<header><h1>{html.escape(run.folder.absolute().name)}</h1><p class='soft'>{html.escape(state)}</p></header>"
    )


def _held_out(run: Run) -> str:
    """Return the table that comes first: held-out results before training and now."""
    latest = [record for record in run.records if "eval/exact" in record]
    now = (run.summary or {}).get("after")
    if now is None and latest:
        now = {name.removeprefix("eval/"): value for name, value in latest[-1].items()}
    rows = [("before training", run.before), ("after" if run.summary else f"step {run.done}", now)]
    cells = ["<tr><th></th><th>held-out exact</th><th>n</th><th>mean reward</th><th>NFE</th><th>length</th></tr>"]
    for name, result in rows:
        if result is None:
            continue
        exact = f"<b>{result['exact']:.3f}</b> ± {result['stderr']:.3f}"
        others = f"<td>{result['reward']:.3f}</td><td>{result['nfe']:.1f}</td><td>{result['length']:.1f}</td>"
        cells.append(f"<tr><th>{name}</th><td>{exact}</td><td>{result['n']}</td>{others}</tr>")
    if len(cells) == 1:
        return "<section><h2>Held-out exact rate</h2><p class='soft'>no evaluation has been recorded</p></section>"
    told = _difference(run.before, now)
    table = f"<div class='scroll'><table>{''.join(cells)}</table></div>"
    return f"<section><h2>Held-out exact rate</h2>{table}<p>{told}</p></section>"


def _difference(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Return the change of the exact rate with its 95 % interval, as if the problems were different ones."""
    if before is None or now is None:
        return ""
    change = now["exact"] - before["exact"]
    half = 1.96 * (now["stderr"] ** 2 + before["stderr"] ** 2) ** 0.5
    verdict = "the interval excludes zero" if abs(change) > half else "the interval includes zero: no difference shown"
    return (
        f"change {change:+.3f}, 95 % interval [{change - half:+.3f}, {change + half:+.3f}]; {verdict}. "
        "<span class='soft'>Wider than need be: that both rows are the same problems is not used.</span>"
    )


def _alarms(run: Run) -> str:
    """Return what the run has warned of, and when; nothing where it has not."""
    told = [
        f"<li>step {record['step']}, <b>{html.escape(name.removeprefix(ALARM))}</b>: {html.escape(text)}</li>"
        for record in run.records
        for name, text in record.items()
        if name.startswith(ALARM)
    ]
    return f"<section><h2>Alarms</h2><ul>{''.join(told)}</ul></section>" if told else ""


def _section(section: Section) -> str:
    """Return the figures of a section."""
    drawn = [
        f"<figure><figcaption>{html.escape(figure.title)}</figcaption>{draw(figure)}"
        f"<p class='soft'>{html.escape(figure.note)}</p></figure>"
        for figure in section.figures
    ]
    return f"<section><h2>{html.escape(section.title)}</h2><div class='figures'>{''.join(drawn)}</div></section>"


def _absent(sections: Sequence[Section]) -> str:
    """Return a line on the figures that this run has no records for."""
    drawn = {figure.title for section in sections for figure in section.figures}
    missing = [figure.title for section in SECTIONS for figure in section.figures if figure.title not in drawn]
    return f"<p class='soft'>Without records in this run: {html.escape(', '.join(missing))}.</p>" if missing else ""


def _samples(run: Run) -> str:
    """Return completions of the last stored batch by outcome; all text is escaped."""
    files = sorted((run.folder / "rollouts").glob("step-*.parquet"))
    if not files:
        return ""
    columns = ["step", "prompt", "completion", "outcome", "reward", "advantage", "nfe"]
    rows = pyarrow.parquet.read_table(files[-1], columns=columns).to_pylist()
    parts = []
    for outcome in OUTCOMES:
        alike = [row for row in rows if row["outcome"] == outcome]
        if not alike:
            continue
        parts.append(f"<h3><span class='badge {outcome}'>{outcome}</span> {len(alike)} of {len(rows)}</h3>")
        parts += [_sample(row) for row in alike[:SAMPLES]]
    step = rows[0]["step"] if rows else 0
    return f"<section><h2>Completions of step {step}, by outcome</h2>{''.join(parts)}</section>"


def _sample(row: dict[str, Any]) -> str:
    numbers = [f"{name} {row[name]:.3g}" for name in ("reward", "advantage", "nfe") if row[name] is not None]
    prompt, text = html.escape(row["prompt"][:LONGEST]), html.escape(row["completion"][:LONGEST])
    summary = f"<summary>{html.escape(' '.join(row['completion'].split())[:80])}</summary>"
    return f"<details>{summary}<p class='soft'>{', '.join(numbers)}</p><pre>{prompt}</pre><pre>{text}</pre></details>"


def _provenance(run: Run) -> str:
    """Return the resolved recipe and the manifest."""
    manifest = html.escape(json.dumps(run.manifest, indent=2))
    return (
        f"<section><h2>Recipe, every default written out</h2><pre>{html.escape(run.recipe)}</pre></section>"
        f"<section><h2>Manifest</h2><pre>{manifest}</pre></section>"
    )
