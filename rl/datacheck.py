"""`unmask data check`: every row of a recipe's task, without a model: prompts, columns, lengths, duplicates."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..policies.loading import TINY, resolve_path
from ..policies.resolving import find_layout, read_config, resolve_family
from ..policies.tokenizers import byte_tokenizer, completion_ids, load_tokenizer, prompt_ids, read_tokenizer
from ..recipes.registry import SLOTS, RecipeError
from ..recipes.schema import Recipe, SftRecipe
from ..recipes.sources import check_prompt
from ..recipes.tasks import Row, Rows
from ..rewards import Reward, RewardError, build_rewards, check_columns
from ..rewards.building import accepted_arguments
from ..rewards.calling import submit
from .cli_summary import console, words

GENERATED = 1000  # rows looked at of a split that has no end
SHOWN = 3
COSTLY = ("reward_model", "environment")  # need a model, or run whatever the environment's author wrote


@dataclass
class DataReport:
    """What `unmask data check` found in one task: rows, lengths in tokens, and what is twice there."""

    task: str
    rows: dict[str, int]
    duplicates: dict[str, int]
    prompt_tokens: dict[str, float] = field(default_factory=dict)
    reference_tokens: dict[str, float] = field(default_factory=dict)
    truncated: dict[str, float] = field(default_factory=dict)
    not_counted: str | None = None


def data_check(recipe: Recipe | SftRecipe) -> list[DataReport]:
    """Check, print and return every task of a recipe; RecipeError naming row, column and expected type."""
    reports = []
    tokenizer, reason = _tokenizer(recipe)
    for choice, rewards, canvas, limit in _tasks(recipe):
        splits = {name: _rows(choice, name, recipe.run.seed) for name in ("train", "heldout")}
        for name, rows in splits.items():
            _check_rows(rows, rewards, f"{words(choice)}, {name}")
        report = DataReport(
            words(choice), {n: len(r) for n, r in splits.items()}, duplicates(splits), not_counted=reason
        )
        if tokenizer is not None:
            _measure(report, splits, tokenizer, canvas, limit)
        _show(report, splits["train"], tokenizer)
        reports.append(report)
    return reports


def _tasks(recipe: Recipe | SftRecipe) -> Iterator[tuple[dict[str, Any], list[Reward], int, int]]:
    """Yield (task, rewards, canvas, prompt limit)."""
    if isinstance(recipe, Recipe):
        entries = [entry.model_dump() for entry in recipe.rewards]
        rewards = build_rewards(entries, allow_code_execution=recipe.allow_code_execution)
        yield recipe.task, rewards, recipe.rollout.canvas, recipe.rollout.prompt_limit
        return
    for entry in recipe.tasks:
        choice = [entry.reward or {"name": entry.task["name"]}]
        rewards = build_rewards(choice, allow_code_execution=recipe.allow_code_execution)
        yield entry.task, rewards, entry.canvas, 10**6


def _rows(choice: dict[str, Any], split: str, seed: int) -> list[Row]:
    """Return a split's rows, the first thousand of one that has no end; [] where a benchmark has none to train on."""
    try:
        rows: Rows = SLOTS["task"].build(choice, "task")(split, seed=seed)
    except RecipeError as error:
        if split == "train" and "for evaluation" in str(error):
            return []
        raise
    if rows.size is not None:
        return [rows.row(index) for index in range(rows.size)]
    found: list[Row] = []
    try:
        while len(found) < GENERATED:
            found.append(rows.row(len(found)))
    except RecipeError:
        if not found:  # else these are all there are, which a run that wants more is told
            raise
    return found


def _check_rows(rows: Sequence[Row], rewards: Sequence[Reward], where: str) -> None:
    """Raise RecipeError for the first row that has no prompt, lacks a column, or holds what a reward cannot read."""
    for index, row in enumerate(rows):
        place = f"{where}, row {index}"
        check_prompt(row, place)
        try:
            check_columns(rewards, row)
            for reward in rewards:
                name = str(reward.entry.get("name"))
                if name in SLOTS["reward"] and name not in COSTLY:
                    _read_row(reward, row)
        except RewardError as error:
            raise RecipeError(f"{place}: {error}") from error


def _read_row(reward: Reward, row: Row) -> None:
    """Let a rule-based reward judge an empty completion, which makes it read the row's columns and nothing else."""
    arguments: dict[str, Any] = {
        "prompts": [row["prompt"]],
        "completions": [""],
        "completion_ids": [[]],
        "trainer_state": None,
    }
    arguments |= {name: [value] for name, value in row.items() if name != "prompt"}
    output = reward.function(**accepted_arguments(reward.function, arguments))
    if inspect.isawaitable(output):
        submit(lambda: output).result()


def duplicates(splits: dict[str, list[Row]]) -> dict[str, int]:
    """Return how many rows of each split repeat an earlier one, and how many held-out ones stand in training too.

    Prompts that differ in case and blanks alone are the same.
    """
    keys = {name: [_key(row["prompt"]) for row in rows] for name, rows in splits.items()}
    repeated = {name: len(found) - len(set(found)) for name, found in keys.items()}
    return {**repeated, "held out and trained on": len(set(keys["train"]) & set(keys["heldout"]))}


def _key(prompt: Any) -> str:
    turns = [prompt] if isinstance(prompt, str) else [f"{m['role']}: {m['content']}" for m in prompt]
    return " ".join(" ".join(turns).split()).casefold()


def _tokenizer(recipe: Recipe | SftRecipe) -> tuple[Any, str | None]:
    """Return the model's tokenizer with its chat template, without weights; (None, why) where it is not here."""
    path = recipe.model.path
    if path is None:
        return byte_tokenizer(), None
    if path != TINY and not Path(path).expanduser().is_dir():
        return None, f"'{path}' is no local folder"
    folder = resolve_path(path)
    vendor, tokenizer = read_config(folder), read_tokenizer(folder)
    layout = find_layout(vendor, recipe.model.family)
    mask, block = recipe.model.mask_token_id, recipe.model.block_length
    family = resolve_family(vendor, layout, mask, block_length=block, tokenizer=tokenizer)
    return load_tokenizer(folder, tokenizer, family, layout.template), None


def _measure(report: DataReport, splits: dict[str, list[Row]], tokenizer: Any, canvas: int, limit: int) -> None:
    rows = [row for split in splits.values() for row in split]
    prompts = [len(prompt_ids(tokenizer, row["prompt"])) for row in rows]
    report.prompt_tokens = _spread(prompts)
    report.truncated = {f"prompts longer than {limit} (refused)": _share(prompts, limit)}
    references = [
        len(completion_ids(tokenizer, row["reference"])) for row in rows if isinstance(row.get("reference"), str)
    ]
    if references:
        report.reference_tokens = _spread(references)
        report.truncated[f"references longer than the canvas of {canvas}"] = _share(references, canvas)


def _spread(lengths: list[int]) -> dict[str, float]:
    ordered = sorted(lengths)
    return {"least": ordered[0], "median": ordered[len(ordered) // 2], "most": ordered[-1]}


def _share(lengths: list[int], limit: int) -> float:
    return sum(length > limit for length in lengths) / len(lengths)


def _show(report: DataReport, train: list[Row], tokenizer: Any) -> None:
    out = console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=report.task, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("rows", ", ".join(f"{count:,} {name}" for name, count in report.rows.items()))
    table.add_row("duplicates", ", ".join(f"{count} {name}" for name, count in report.duplicates.items()))
    for what, lengths in (("prompt tokens", report.prompt_tokens), ("reference tokens", report.reference_tokens)):
        if lengths:
            table.add_row(what, ", ".join(f"{name} {value:.0f}" for name, value in lengths.items()))
    for what, share in report.truncated.items():
        table.add_row("truncated", f"{share:.2%} {what}")
    if report.not_counted:
        table.add_row("tokens", f"not counted: {report.not_counted}")
    out.print(table)
    for row in train[:SHOWN]:
        if tokenizer is None:
            text, count = str(row["prompt"]), "?"
        else:
            ids = prompt_ids(tokenizer, row["prompt"])
            text, count = tokenizer.decode(ids), str(len(ids))
        out.print(Panel(Text(text), title=f"{count} tokens", title_align="left"))
