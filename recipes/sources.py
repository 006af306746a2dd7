"""Rows from files and from the hub: what is read, how columns are named, how prompts are written, who is held out."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .registry import RecipeError
from .tasks import Row, Rows, Split, Stored, split_of, task

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (where it stands, row) for every row of a JSON-lines (also gzipped), JSON or parquet file."""
    if not path.is_file():
        raise RecipeError(f"task.path: there is no file '{path}'.")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}).") from error
    if path.suffix == ".json":
        entries = [(f"{path}[{index}]", entry) for index, entry in enumerate(_json(text, str(path)))]
    else:
        lines = enumerate(text.splitlines(), 1)
        entries = [(f"{path}:{number}", _json(line, f"{path}:{number}")) for number, line in lines if line.strip()]
    for where, row in entries:
        if not isinstance(row, dict):
            raise RecipeError(f"{where}: holds a {type(row).__name__}; a row is an object with columns.")
        yield where, row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}: not a line of JSON ({error.msg}).") from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(f"{path}: no parquet file ({str(error).splitlines()[0]}).") from error
    yield from ((f"{path}, row {index}", row) for index, row in enumerate(table.to_pylist()))


def read_dataset(path: str, name: str | None, split: str, revision: str | None) -> Iterable[tuple[str, Row]]:
    """Yield (where, row) of one split of a local file, a local folder, or a hub dataset pinned by `revision`.

    A folder holds `SPLIT.jsonl`, `.jsonl.gz`, `.json` or `.parquet`, in a folder `name` if there is one, or a dataset
    that was saved by `datasets`. A hub dataset is downloaded once and then read from datasets' cache.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return read_file(local)
    if local.is_dir():
        return _folder(local, name, split)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise RecipeError(f"task.path: there is no file or folder '{path}' (a hub id looks like OWNER/NAME).")
    if revision is None:
        raise RecipeError(
            f"task.revision: '{path}' on the hub may change; pin it by a commit of its history, or set task.path to a "
            "local copy."
        )
    from datasets import load_dataset

    try:
        rows = load_dataset(path, name, split=split, revision=revision)
    except Exception as error:  # the hub's, the network's and the builder's errors have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"task.path: '{path}' is no local file or folder, and the hub did not give split '{split}' of it "
            f"({reason:.200}); put a copy somewhere and set task.path to it."
        ) from error
    return ((f"{path}[{split}], row {index}", dict(row)) for index, row in enumerate(rows))


def _folder(folder: Path, name: str | None, split: str) -> Iterable[tuple[str, Row]]:
    inner = folder / name if name and (folder / name).is_dir() else folder
    for suffix in SUFFIXES:
        if (inner / f"{split}{suffix}").is_file():
            return read_file(inner / f"{split}{suffix}")
    sharded = sorted(inner.glob(f"{split}-*.parquet"))
    if sharded:
        return (row for shard in sharded for row in read_file(shard))
    if (inner / "dataset_dict.json").is_file() or (inner / "dataset_info.json").is_file():
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(inner))
        if isinstance(saved, DatasetDict) and split not in saved:
            raise RecipeError(f"task.path: '{inner}' has no split '{split}', it has {', '.join(saved)}.")
        rows = saved[split] if isinstance(saved, DatasetDict) else saved
        return ((f"{inner}[{split}], row {index}", dict(row)) for index, row in enumerate(rows))
    raise RecipeError(f"task.path: '{inner}' holds no {split}{SUFFIXES[0]}, .json or .parquet, and no saved dataset.")


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    r"""Return a template with `{column}` replaced by the row's values; `{{` and `}}` are braces, `{}` is itself."""

    def value(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        if found[1] not in row:
            columns = ", ".join(map(str, row))
            raise RecipeError(
                f"{where}: the template names the column '{found[1]}', the row has {columns}; write '{{{{' for a brace."
            )
        return str(row[found[1]])

    return _FIELD.sub(value, template)


def renamed(row: Row, columns: Mapping[str, str] | None, where: str) -> Row:
    """Return a row with `{ours: theirs}` applied; every column that it had stays, unless it is given another value."""
    for ours, theirs in (columns or {}).items():
        if theirs not in row:
            raise RecipeError(
                f"{where}: there is no column '{theirs}' for '{ours}'; it has {', '.join(map(str, row))}."
            )
    return {**row, **{ours: row[theirs] for ours, theirs in (columns or {}).items()}}


def prompted(row: Row, template: str | None, system: str | None, where: str) -> Row:
    """Return a row whose `prompt` is text or messages, written by `template` and opened by `system` where given."""
    if template is not None:
        row = {**row, "prompt": fill(template, row, where)}
    check_prompt(row, where)
    if system is not None:
        prompt = row["prompt"]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        row = {**row, "prompt": [{"role": "system", "content": system}, *turns]}
    return row


def check_prompt(row: Row, where: str) -> None:
    """Raise RecipeError naming row, column and expected type unless `prompt` is text or a list of messages."""
    prompt = row.get("prompt")
    expected = "text, or a list of messages {role, content}"
    if "prompt" not in row:
        columns = ", ".join(map(str, row))
        remedy = "name one (task.columns, task.prompt_column), or write a task.template"
        raise RecipeError(f"{where}: the row has no column 'prompt' (it has {columns}); {remedy}.")
    if isinstance(prompt, list) and prompt:
        for index, message in enumerate(prompt):
            text = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            if not text:
                raise RecipeError(f"{where}: column 'prompt' holds {message!r:.80} at {index}; expected {expected}.")
    elif not isinstance(prompt, str) or not prompt.strip():
        raise RecipeError(f"{where}: column 'prompt' holds {prompt!r:.80}; expected {expected}.")


def rows_of(
    split: Split,
    seed: int,
    train: Iterable[tuple[str, Row]],
    heldout: Iterable[tuple[str, Row]] | None,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    system: str | None = None,
    what: str = "task",
) -> Rows:
    """Return one split of rows; without `heldout`, every eighth of `train` is held out by a hash of its prompt."""
    source = heldout if heldout is not None and split == "heldout" else train
    rows = [prompted(renamed(row, columns, where), template, system, where) for where, row in source]
    if heldout is None:
        rows = [row for row in rows if split_of(json.dumps(row["prompt"])) == split]
    if not rows:
        raise RecipeError(f"{what}: the dataset is empty (no {split} row).")
    return Stored(rows, split, seed)


@task.register
def jsonl(
    split: Split,
    *,
    path: str,
    seed: int = 0,
    prompt_column: str = "prompt",
    heldout_path: str | None = None,
    columns: dict[str, str] | None = None,
    template: str | None = None,
    system: str | None = None,
) -> Rows:
    """Rows of a JSON-lines file; without `heldout_path` the file is split by a hash of the prompt.

    `columns` renames ({answer: solution} makes a column answer of solution), `template` writes the prompt from columns
    (`{question} Reason step by step.`), `system` is the first message.
    """
    return _files(split, seed, path, heldout_path, prompt_column, columns, template, system)


@task.register
def parquet(
    split: Split,
    *,
    path: str,
    seed: int = 0,
    prompt_column: str = "prompt",
    heldout_path: str | None = None,
    columns: dict[str, str] | None = None,
    template: str | None = None,
    system: str | None = None,
) -> Rows:
    """Rows of a parquet file; the knobs are those of `jsonl`."""
    return _files(split, seed, path, heldout_path, prompt_column, columns, template, system)


def _files(
    split: Split,
    seed: int,
    path: str,
    heldout_path: str | None,
    prompt_column: str,
    columns: dict[str, str] | None,
    template: str | None,
    system: str | None,
) -> Rows:
    if template is None and prompt_column != "prompt":
        columns = {**(columns or {}), "prompt": prompt_column}
    heldout = read_file(Path(heldout_path).expanduser()) if heldout_path else None
    train = read_file(Path(path).expanduser())
    return rows_of(split, seed, train, heldout, columns=columns, template=template, system=system, what=path)


@task.register
def hub(
    split: Split,
    *,
    path: str,
    seed: int = 0,
    subset: str | None = None,
    train_split: str = "train",
    heldout_split: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    template: str | None = None,
    system: str | None = None,
) -> Rows:
    """Rows of a dataset of the hub, pinned by `revision` (a commit), or of a local copy of it (a file or folder).

    `subset` is its configuration. Without `heldout_split`, `train_split` is split by a hash of the prompt. `columns`,
    `template` and `system` are as in `jsonl`.
    """
    train = read_dataset(path, subset, train_split, revision)
    heldout = None if heldout_split is None else read_dataset(path, subset, heldout_split, revision)
    return rows_of(split, seed, train, heldout, columns=columns, template=template, system=system, what=path)
