"""Queries over stored rollouts: every form against a filter written out in Python, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from unmask.recipes.registry import RecipeError
from unmask.rl.querying import find_rollouts, show_rollouts
from unmask.rl.runfolder import RunError

ROWS: list[dict[str, Any]] = [
    {"step": 0, "outcome": "ok", "reward": 1.0, "reward/a-b": 1, "completion": "x #### 7", "extra/cause": None},
    {"step": 0, "outcome": "wrong", "reward": 0.25, "reward/a-b": 0, "completion": "x ## 8", "extra/cause": None},
    {
        "step": 1,
        "outcome": "wrong",
        "reward": None,
        "reward/a-b": -2,
        "completion": "#### [bold]",
        "extra/cause": "late",
    },
    {"step": 1, "outcome": "timeout", "reward": None, "reward/a-b": 0, "completion": "", "extra/cause": "late"},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "rollouts").mkdir()
    for step in (0, 1):
        # The column of causes is null throughout the first file and has no type there.
        rows = [{**row, "reward/a": float(row["reward/a-b"])} for row in ROWS if row["step"] == step]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rollouts" / f"step-{step}.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("query", "keeps"),
    [
        ('outcome == "wrong"', lambda r: r["outcome"] == "wrong"),
        ('"wrong" != outcome', lambda r: r["outcome"] != "wrong"),
        ("reward > 0.5", lambda r: r["reward"] is not None and r["reward"] > 0.5),
        ("0 <= reward < 1", lambda r: r["reward"] is not None and 0 <= r["reward"] < 1),
        ("reward/a >= -2 and reward/a < 0", lambda r: r["reward/a-b"] == -2),
        ('"####" in completion', lambda r: "####" in r["completion"]),
        ('"####" not in completion', lambda r: "####" not in r["completion"]),
        ('outcome in ["ok", "timeout"]', lambda r: r["outcome"] in ("ok", "timeout")),
        ('outcome not in ("ok", "timeout")', lambda r: r["outcome"] == "wrong"),
        ("reward is None", lambda r: r["reward"] is None),
        ("extra/cause is not None and not step == 0", lambda r: r["extra/cause"] is not None),
        ('matches(completion, "#+ \\\\d$")', lambda r: re.search(r"#+ \d$", r["completion"]) is not None),
        ('outcome == "ok" or step == 1 and outcome == "timeout"', lambda r: r["outcome"] in ("ok", "timeout")),
        ("step == reward", lambda r: r["step"] == r["reward"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form(run: Path, query: str, keeps: Callable[[dict[str, Any]], bool]) -> None:
    found = find_rollouts(run, query=query, columns=["completion"]).to_pylist()
    assert [row["completion"] for row in found] == [row["completion"] for row in ROWS if keeps(row)]
    assert 0 < len(found) < len(ROWS) or query == "step == reward"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ('__import__("os").system("true")', "cannot stand there"),
        ('outcome.__class__ == "x"', "cannot stand there"),
        ("step + 1 == 2", "cannot stand there"),
        ("[x for x in outcome]", "cannot stand there"),
        ("lambda: 1", "cannot stand there"),
        ('f"{outcome}" == "ok"', "cannot stand there"),
        ('reward < __import__("os")', "cannot stand there"),
        ('matches(completion, outcome, "x")', "write matches(column"),
        ("reward is 3", "take None"),
        ("3 in completion", "`in` looks for a text"),
        ("outcom == 'ok'", "there is no column 'outcom'. Did you mean 'outcome'"),
        ("outcome = 'ok'", "cannot be read"),
        ("", "cannot be read"),
        ("outcome > 3", "does not fit the columns"),
        ('matches(completion, "(")', "does not fit the columns"),
        ("(" * 300 + "step" + ")" * 300, "cannot be read"),
        ("completion", "does not fit the columns"),
    ],
)
def test_refusals(run: Path, query: str, words: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        find_rollouts(run, query=query)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_order_columns_and_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = find_rollouts(run, columns=["outcome"], sort="-reward/a")
    assert found.column_names == ["outcome"] and found["outcome"].to_pylist()[0] == "ok"
    options: dict[str, Any] = {"columns": None, "sort": None, "limit": 1}
    show_rollouts(run, query="step == 1", to=None, **options)
    printed = capsys.readouterr().out
    assert "2 rollouts, 1 shown" in printed and "[bold]" in printed, "a completion is text, not markup"
    for name in ("all.jsonl", "all.parquet"):
        show_rollouts(run, query="step == 1", to=tmp_path / name, **options)
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert lines == pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pylist() and len(lines) == 2
    for bad, words in (({"columns": "nothing"}, "no column 'nothing'"), ({"sort": "-nothing"}, "no column 'nothing'")):
        with pytest.raises(RecipeError, match=words):
            show_rollouts(run, query=None, to=None, **{**options, **bad})
    with pytest.raises(RecipeError, match="must end in"):
        show_rollouts(run, query=None, to=tmp_path / "all.csv", **options)
    with pytest.raises(RunError, match="there are no rollouts"):
        find_rollouts(tmp_path / "none")
