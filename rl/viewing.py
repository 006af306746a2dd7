"""`unmask view`: a run's stored rollouts as one offline HTML page, the order of unmasking included."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet

from ..policies.loading import read_tokenizer, resolve_path
from ..recipes.loading import load_recipe
from ..recipes.registry import SLOTS
from ..rewards import OUTCOMES
from .evaluate import EVALUATION_STEP, heldout_rows
from .pages import FOLDER, page
from .records import LIFE, rollout_table
from .runfolder import RunError, write_atomically
from .settings import rewards_of
from .targets import evaluation_worker, open_target

logger = logging.getLogger(__name__)
PART = 256  # rollouts that are inflated together; a group is never split
LIVED = tuple(name for name in LIFE if name != "rank")


@dataclass(frozen=True)
class Source:
    """Rollouts of one run or checkpoint: its name, tables of rows as `rollout_table` makes them, and its tokenizer."""

    name: str
    rows: list[dict[str, Any]]
    tokenizer: Any


@dataclass
class _Payload:
    """What the page is given, while it grows: columns of all rollouts, parts, and the texts that tokens are."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    special: list[int] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)


def view(runs: Sequence[Path], out: Path | None = None, *, limit: int = 10_000) -> Path:
    """Write the page of the stored rollouts of `runs` to `out` (the first run's `view.html`) and return its path.

    Of more than `limit` rollouts a run, those of evenly spaced batches are taken. RunError without stored rollouts.
    """
    sources, notes = [], []
    for run in runs:
        rows, note = stored_rollouts(run, limit)
        sources.append(Source(_name(run, runs), rows, tokenizer_of(run)))
        notes.append(note)
    out = out or runs[0] / "view.html"
    write_atomically(out, render(sources, title=" and ".join(s.name for s in sources), note="; ".join(notes)))
    return out


def view_heldout(targets: Sequence[str], out: Path, *, problems: int, overrides: Sequence[str] = ()) -> Path:
    """Roll out the first held-out problems with each target (run, checkpoint, model or recipe), beside each other.

    Decoded as the recipe's evaluation is; a group of the recipe's size a problem, one rollout at temperature 0.
    """
    sources = []
    for target in targets:
        recipe, denoiser = open_target(target, overrides)
        worker = evaluation_worker(recipe, denoiser, rewards_of(recipe))
        worker = replace(worker, group=recipe.rollout.group if worker.sampler.temperature else 1)
        rows = heldout_rows(SLOTS["task"].build(recipe.task)("heldout", seed=0), problems)
        table = rollout_table(worker.collect(rows, step=EVALUATION_STEP), 0)
        listed = {name: column if isinstance(column, list) else column.to_pylist() for name, column in table.items()}
        found = [dict(zip(listed, values, strict=True)) for values in zip(*listed.values(), strict=True)]
        sources.append(Source(_name(Path(target), [Path(t) for t in targets]), found, denoiser.tokenizer))
    note = f"the first {problems} held-out problems, decoded as in evaluation"
    write_atomically(out, render(sources, title=" and ".join(s.name for s in sources), note=note))
    return out


def stored_rollouts(run: Path, limit: int) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a run's parquet files, and a sentence on how many of them they are."""
    batches: dict[str, list[Path]] = {}
    for path in sorted((run / "rollouts").glob("step-*.parquet")):
        batches.setdefault(path.stem.split("-")[1], []).append(path)
    if not batches:
        raise RunError(f"view: '{run}' holds no rollouts/step-*.parquet; train with run.log_rollouts_every=1 or more.")
    sizes = [sum(pyarrow.parquet.read_metadata(p).num_rows for p in paths) for paths in batches.values()]
    kept = max(1, min(len(sizes), limit * len(sizes) // max(sum(sizes), 1)))
    chosen = sorted({round(i * (len(sizes) - 1) / max(kept - 1, 1)) for i in range(kept)})
    names = [list(batches)[i] for i in chosen]
    rows = [row for name in names for path in batches[name] for row in pyarrow.parquet.read_table(path).to_pylist()]
    whole = "all stored" if len(names) == len(sizes) else f"{len(names)} of {len(sizes)} stored"
    return rows, f"{run.name}: {len(rows)} rollouts of {whole} batches"


def tokenizer_of(run: Path) -> Any:
    """Return the tokenizer of a run's model, or None where its folder is not to be had any more."""
    saved = run / "model"
    if saved.is_dir():
        return read_tokenizer(saved)
    try:
        return read_tokenizer(resolve_path(str(load_recipe(run).model.path)))
    except ValueError as error:  # the model may have been moved since; its text is in the rollouts all the same
        logger.warning("view: no tokenizer, tokens are shown as numbers (%s)", error)
        return None


def render(sources: Sequence[Source], *, title: str, note: str) -> str:
    """Return the page of `sources`."""
    payload = _Payload()
    for number, source in enumerate(sources):
        ids = _vocabulary(payload, source)
        for group in _groups(source.rows):
            _add(payload, number, group, ids)
    index = {
        "title": title,
        "note": note,
        "runs": [source.name for source in sources],
        "outcomes": list(OUTCOMES),
        "pieces": payload.pieces,
        "special": sorted(payload.special),
        "starts": payload.starts,
        **payload.columns,
    }
    data = {"index": index} | {f"part-{number}": part for number, part in enumerate(payload.parts)}
    body = (FOLDER / "viewer.html").read_text(encoding="utf-8")
    styles, scripts = ("page.css", "viewer.css"), ("trajectories.js", "viewer.js")
    return page(f"{title}: rollouts", body, styles=styles, scripts=scripts, data=data)


def _name(path: Path, among: Sequence[Path]) -> str:
    """Return a short name of a run that tells it from the others."""
    alike = sum(other.name == path.name for other in among) > 1 or path.name.startswith("checkpoint-")
    return f"{path.absolute().parent.name}/{path.name}" if alike else path.name


def _groups(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the runs of rows that belong to one group."""
    group: list[dict[str, Any]] = []
    for row in rows:
        if group and (row["step"], row["group"]) != (group[0]["step"], group[0]["group"]):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _vocabulary(payload: _Payload, source: Source) -> dict[int, int]:
    """Return the piece of each token id that the rollouts hold, new pieces added to the payload."""
    used = {token for row in source.rows for token in row["tokens"]}
    used |= {life["token"] for row in source.rows for life in row.get("retracted") or ()}
    ids = sorted(used)
    texts = [_piece(source.tokenizer, token) for token in ids]
    special = set() if source.tokenizer is None else set(source.tokenizer.all_special_ids)
    numbers = {}
    for token, text in zip(ids, texts, strict=True):
        if text not in payload.known:
            payload.known[text] = len(payload.pieces)
            payload.pieces.append(text)
            if token in special:
                payload.special.append(payload.known[text])
        numbers[token] = payload.known[text]
    return numbers


def _piece(tokenizer: Any, token: int) -> str:
    """Return a token's text; bytes that are no character by themselves as the vocabulary writes them."""
    if tokenizer is None:
        return f"⟨{token}⟩"
    text = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if not text or "\ufffd" in text else text


def _add(payload: _Payload, run: int, group: list[dict[str, Any]], ids: dict[int, int]) -> None:
    """Add a group to the last part, or to a new one when that is full."""
    if not payload.parts or len(payload.parts[-1]["rows"]) + len(group) > PART:
        payload.starts.append(len(payload.columns.get("run", ())))
        payload.parts.append({"prompts": {}, "rows": []})
    part = payload.parts[-1]
    for row in group:
        prompt = payload.prompts.setdefault(row["prompt"], len(payload.prompts))
        part["prompts"][prompt] = _prompt_text(row["prompt"])
        part["rows"].append(_row(row, ids))
        values: dict[str, Any] = {"run": run, "prompt": prompt, "outcome": OUTCOMES.index(row["outcome"])}
        values |= {name: row[name] for name in ("step", "group", "nfe")}
        values |= {name: _finite(row[name]) for name in ("reward", "advantage")}
        for name, value in values.items():
            payload.columns.setdefault(name, []).append(value)


def _row(row: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    """Return what a card shows of a rollout; positions behind the last that was ever decided are counted as `tail`."""
    length = len(row["tokens"])
    lives = row.get("retracted") or []
    lengths = row.get("lengths")
    if lengths is None:
        decided = [p for p, source in enumerate(row["source"]) if source] + [life["position"] for life in lives]
        length = max(decided, default=-1) + 1
    shown: dict[str, Any] = {
        "completion": row["completion"],
        "tokens": [ids[token] for token in row["tokens"][:length]],
        "source": row["source"][:length],
        "born": row["born"][:length],
        "logprob": [_rounded(value) for value in row["logprob"][:length]],
        "tail": len(row["tokens"]) - length,
        "rewards": {k.removeprefix("reward/"): _finite(v) for k, v in row.items() if k.startswith("reward/")},
        "extra": {k.removeprefix("extra/"): v for k, v in row.items() if k.startswith("extra/") and v is not None},
    }
    if lives:
        told = [life | {"token": ids[life["token"]], "logprob": _rounded(life["logprob"])} for life in lives]
        shown["retracted"] = [[life[name] for name in LIVED] for life in told]
    if lengths is not None:
        shown |= {"lengths": lengths, "appeared": row["appeared"]}
    return shown


def _prompt_text(prompt: str) -> str:
    """Return a stored prompt as text: chat messages, which are stored as JSON, one a paragraph."""
    if prompt.startswith("[{"):
        try:
            return "\n\n".join(f"{message['role']}: {message['content']}" for message in json.loads(prompt))
        except (ValueError, KeyError, TypeError):
            return prompt
    return prompt


def _rounded(value: float) -> float | None:
    """Return a log-probability with what a probability in three digits needs; None where there is none."""
    value = _finite(value) if value is not None else None  # type: ignore[assignment]
    return None if value is None else round(value, 3) or 0


def _finite(value: float | None) -> float | None:
    """Return a number that JSON can hold, or None."""
    return None if value is None or value != value or abs(value) == float("inf") else value
