"""`unmask data check` and `unmask reward check`: what they find, print and refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import shortrun

from unmask.recipes.loading import parse_recipe
from unmask.recipes.registry import RecipeError
from unmask.rewards import sandbox
from unmask.rewards.sandbox import SandboxError
from unmask.rl.datacheck import data_check, duplicates
from unmask.rl.rewardcheck import TRICKS, reward_check

SAMPLES = Path(__file__).parent / "samples"
RECIPE = """
name: checked
model: {path: "unmask:tiny", lora: {rank: 4}}
task: {name: arithmetic, level: easy}
rollout: {prompts: 2, group: 2, canvas: 32, sampler: {schedule: {name: blocks, size: 16, per_step: 2}}}
rewards: [arithmetic]
method: cj_grpo
optim: {lr: 1e-3, steps: 10}
"""


def recipe(*overrides: str) -> Any:
    return parse_recipe(RECIPE, overrides)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "mine.yaml").write_text(RECIPE)


def rows_file(rows: list[dict[str, Any]]) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "task={name: jsonl, path: rows.jsonl, heldout_path: rows.jsonl}"


def test_a_generated_task(capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = data_check(recipe())
    assert report.rows == {"train": 1000, "heldout": 1000} and report.duplicates["held out and trained on"] == 0
    assert report.prompt_tokens["most"] <= 40 and report.not_counted is None
    assert list(report.truncated.values()) == [0.0, 1.0]  # no trace fits a canvas of 32
    printed = capsys.readouterr().out
    assert printed.count(" tokens ─") == 3 and "<|user|>" in printed
    assert "100.00% references longer than the canvas of 32" in printed


def test_lengths_and_duplicates_of_a_file() -> None:
    rows = [{"prompt": f"p{n}", "answer": n, "reference": "x" * n} for n in range(40)]
    rows += [{"prompt": "P1 ", "answer": 1}, {"prompt": "y" * 300, "answer": 1}]
    (report,) = data_check(recipe(rows_file(rows)))
    assert report.rows == {"train": 42, "heldout": 42}
    assert report.duplicates == {"train": 1, "heldout": 1, "held out and trained on": 41}
    assert report.prompt_tokens == {"least": 4, "median": 5, "most": 302}
    assert report.truncated["prompts longer than 256 (refused)"] == pytest.approx(1 / 42)
    assert report.truncated["references longer than the canvas of 32"] == pytest.approx(8 / 40)  # 32..39 and an EOS


def test_messages_are_compared_by_their_turns() -> None:
    one = [{"role": "user", "content": "Hi  there"}]
    other = [{"role": "user", "content": "hi there"}]
    splits = {"train": [{"prompt": one}], "heldout": [{"prompt": other}, {"prompt": "hi there"}]}
    assert duplicates(splits) == {"train": 0, "heldout": 0, "held out and trained on": 1}


@pytest.mark.parametrize(
    ("row", "rewards", "message"),
    [
        ({"prompt": "p", "answer": "five"}, "[arithmetic]", "row 1: reward 'arithmetic': column 'answer' holds 'five'"),
        ({"prompt": "p"}, "[arithmetic]", "row 1: reward 'arithmetic' needs the column 'answer'"),
        (
            {"prompt": "p", "answer": [1]},
            "[math]",
            "row 1: reward 'math': column 'answer' holds [1]",
        ),
        ({"prompt": "p", "tests": 5}, "[code]", "row 1: reward 'code': column 'tests' holds 5"),
        ({"prompt": "p", "puzzle": "12"}, "[sudoku]", "row 1: reward 'sudoku': column 'puzzle' holds '12'"),
    ],
)
def test_errors_name_the_row(row: dict[str, Any], rewards: str, message: str) -> None:
    good = {"prompt": "q", "answer": "5", "tests": ["assert f() == 1"], "puzzle": "0" * 16}
    with pytest.raises(RecipeError) as error:
        data_check(recipe(rows_file([good, row]), f"rewards={rewards}", "allow_code_execution=true"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_is_not_here_leaves_tokens_uncounted(capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = data_check(recipe("model.path=someone/something"))
    assert report.not_counted == "'someone/something' is no local folder" and not report.prompt_tokens
    assert "not counted" in capsys.readouterr().out


SUPERVISED = """
kind: sft
name: supervised
model: {init: {hidden_size: 16, layers: 1, heads: 2, mlp: 16}}
tasks:
  - {task: {name: arithmetic, level: easy}, canvas: 64}
  - {task: {name: jsonl, path: rows.jsonl, heldout_path: rows.jsonl}, canvas: 16, reward: arithmetic}
optim: {lr: 1e-3, steps: 10}
"""


def test_a_supervised_recipe_is_checked_task_by_task() -> None:
    rows_file([{"prompt": "p", "answer": "5", "reference": "#### 5"}])
    reports = data_check(parse_recipe(SUPERVISED))
    assert [report.rows["train"] for report in reports] == [1000, 1]
    assert reports[1].reference_tokens == {"least": 7, "median": 7, "most": 7}


def test_a_generator_with_few_problems_shows_what_it_has() -> None:
    few = "task={name: arithmetic, operations: [1, 1], operators: '+', largest: 1}"
    (report,) = data_check(recipe(few))
    assert 0 < report.rows["heldout"] < 20 and report.rows["train"] == 1000


def test_every_row_is_read_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert shortrun.command("data", "check", "mine.yaml", "--json", "data.json") == 0
    (report,) = json.loads(Path("data.json").read_text())
    assert report["rows"]["train"] == 1000
    assert shortrun.command("data", "check", "mine.yaml", rows_file([{"prompt": 5}])) == 2
    assert "rows.jsonl:1: column 'prompt' holds 5; expected text, or a list of messages" in capsys.readouterr().err


OURS = [
    ("task={name: arithmetic}", "rewards=[arithmetic, {name: answer_format, weight: 0.25}]"),
    ("task={name: countdown}", "rewards=[{name: countdown, partial: 0.5}]"),
    ("task={name: sudoku}", "rewards=[sudoku, {name: repetition, weight: 0.1}]"),
    ("task={name: sudoku, side: 9}", "rewards=[sudoku]"),
    (
        f"task={{name: gsm8k, path: {SAMPLES}/gsm8k}}",
        "rewards=[math, {name: answer_format, style: boxed, weight: 0.2}]",
    ),
    (
        f"task={{name: gsm8k, path: {SAMPLES}/gsm8k, style: answer_tag}}",
        "rewards=[{name: math, extract: answer_tag}, tags]",
    ),
    (f"task={{name: math, path: {SAMPLES}/math}}", "rewards=[math]"),
]


@pytest.mark.parametrize(("task", "rewards"), OURS, ids=[task[11:30] for task, _ in OURS])
def test_our_rewards_cannot_be_gamed(task: str, rewards: str) -> None:
    findings = reward_check(recipe(task, rewards), 3)
    assert [finding.name for finding in findings if not finding.passed] == []
    assert len(findings) == 2 + len(TRICKS) + 2 and findings[0].mean >= 1.0


def sandboxed() -> str | None:
    """Return why there is no sandbox here."""
    try:
        sandbox.command()
    except SandboxError as error:
        return str(error)
    return None


@pytest.mark.skipif(sandboxed() is not None, reason=str(sandboxed()))
def test_the_code_reward_cannot_be_gamed() -> None:
    task = f"task={{name: mbpp, path: {SAMPLES}/mbpp}}"
    rewards = "rewards=[{name: code, score: fraction}, {name: syntax, weight: 0.1}]"
    findings = reward_check(recipe(task, rewards, "allow_code_execution=true"), 2)
    assert [finding.name for finding in findings if not finding.passed] == []


def test_a_penalty_that_pays_for_silence_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    """With a length penalty that outweighs nothing but itself, saying nothing beats a wrong attempt."""
    rewards = "rewards=[arithmetic, {name: soft_length, limit: 4, buffer: 3}]"
    found = {finding.name: finding for finding in reward_check(recipe(rewards), 4)}
    assert found["gold"].passed and not found["empty"].passed and found["empty"].excess > 0
    assert not found["end of sequence only"].passed
    assert "fails: empty" in capsys.readouterr().out


def test_a_reward_that_takes_any_box_is_caught() -> None:
    findings = reward_check(recipe("rewards=['toyrewards:anywhere']"), 4)
    failed = {finding.name for finding in findings if not finding.passed}
    assert failed == {"many answers"}


def test_the_command_ends_with_1_when_a_trick_pays(capsys: pytest.CaptureFixture[str]) -> None:
    assert shortrun.command("reward", "check", "mine.yaml", "--rows", "4", "--json", "found.json") == 0
    assert "no trick pays" in capsys.readouterr().out
    assert {row["name"] for row in json.loads(Path("found.json").read_text())} >= set(TRICKS)
    assert shortrun.command("reward", "check", "mine.yaml", "rewards=['toyrewards:anywhere']") == 1
    assert "1 of 12 kinds fail" in capsys.readouterr().out


def test_rows_without_a_gold_answer_are_refused() -> None:
    row = {"prompt": "p", "answer": "5", "numbers": [1, 2], "target": 3}
    with pytest.raises(RecipeError, match=r"row 0 has no gold answer that scores 1 .* does `extract` fit"):
        reward_check(recipe(rows_file([row] * 3), "rewards=[countdown]"))
    with pytest.raises(RecipeError, match="no other row's answer is wrong for row 0"):
        reward_check(recipe(rows_file([{"prompt": "p", "answer": "5"}] * 3)))
