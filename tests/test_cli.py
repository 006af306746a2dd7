"""The command line: what it passes on, what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

import unmask.rl
from unmask.recipes.loading import load_methods, load_recipe, parse_recipe
from unmask.recipes.reading import shipped_recipes
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl import cli, cli_summary

RECIPE = """
name: mine
model: {path: "unmask:tiny", lora: {rank: 4}}
task: {name: arithmetic, level: easy}
rollout:
  prompts: 4
  group: 2
  canvas: 32
  sampler: {schedule: {name: blocks, size: 16, per_step: 2}}
rewards: [arithmetic]
method: cj_grpo
optim: {lr: 1e-3, steps: 10}
evaluation: {problems: 8}
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "mine.yaml").write_text(RECIPE)


def run(*arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    before = sys.argv
    sys.argv = ["unmask", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("main() ends the process")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Replace the modules that do the work by recorders."""
    made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def recorder(name: str) -> Any:
        def record(*arguments: Any, **keywords: Any) -> dict[str, Any]:
            made.append((name, arguments, keywords))
            return {"did": name}

        return record

    for module, names in {"run": ("train", "sft", "evaluate"), "show": ("sample",), "doctor": ("doctor",)}.items():
        fake = types.ModuleType(f"unmask.rl.{module}")
        for name in names:
            setattr(fake, name, recorder(name))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr(unmask.rl, module, fake, raising=False)
    return made


def test_help_takes_under_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "unmask.rl.cli", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",)):
        assert run(*arguments) == 0
        text = capsys.readouterr().out
        for command in ["train", "sft", "evaluate", "sample", "check", "parts", "methods", "cp", "schema", "doctor"]:
            assert f"\n  {command} " in text
        assert "..." not in text.partition("Commands:")[2], "a summary is cut off"
    assert run("--version") == 0
    assert capsys.readouterr().out == f"unmask {unmask.__version__}\n"


def test_train_passes_recipe_overrides_and_options(calls: list[Any]) -> None:
    code = run("train", "mine.yaml", "optim.lr=1e-4", "--nproc", "2", "rollout.group=4", "--json", "out.json")
    ((name, (recipe,), keywords),) = calls
    assert (code, name, keywords) == (0, "train", {"nproc": 2, "resume": None})
    assert (recipe.optim.lr, recipe.rollout.group, recipe.name) == (1e-4, 4, "mine")
    assert json.loads(Path("out.json").read_text()) == {"did": "train"}


def test_train_resumes_with_the_runs_own_recipe(calls: list[Any]) -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(RECIPE)
    assert run("train", "--resume", "run") == 0
    ((_, (recipe,), keywords),) = calls
    assert (recipe.name, keywords) == ("mine", {"nproc": 1, "resume": Path("run")})


def test_sft_evaluate_sample_and_doctor_pass_their_options(calls: list[Any]) -> None:
    assert run("sft", "tiny_sft", "evaluation.problems=4") == 0
    assert run("evaluate", "runs/mine", "evaluation.temperature=0", "--problems", "64") == 0
    assert run("sample", "unmask:tiny", "--prompt", "1 a+2") == 0
    assert run("doctor", "--json", "doctor.json") == 0
    assert calls[0][0] == "sft" and calls[0][1][0].kind == "sft" and calls[0][2] == {"nproc": 1, "resume": None}
    assert calls[1] == ("evaluate", ("runs/mine",), {"overrides": ["evaluation.temperature=0"], "problems": 64})
    shown = {"prompt": "1 a+2", "overrides": [], "live": False, "group": 1, "speed": 8.0}
    assert calls[2] == ("sample", ("unmask:tiny",), shown)
    nothing = {"model": None, "family": None, "mask_token_id": None, "block_length": None}
    assert calls[3] == ("doctor", (), nothing) and json.loads(Path("doctor.json").read_text()) == {"did": "doctor"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("train", "a=b"),
        ("train", "mine.yaml", "other.yaml"),
        ("check", "mine.yaml", "--nope"),
        ("sft", "mine.yaml"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: tuple[str, ...], calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    assert calls == []


class OwnError(RecipeError):
    """A refusal over two\nlines."""


@pytest.mark.parametrize(
    ("error", "line"),
    [(RecipeError("a\n  b"), "error: a b\n"), (OwnError("c"), "error: c\n"), (KeyboardInterrupt(), "interrupted\n")],
)
def test_refusals_become_one_line(
    error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert run() == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [ValueError("torch says no"), json.JSONDecodeError("no", "", 0), KeyError("x")])
def test_errors_of_others_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(type(error)):
        run()


def test_a_users_rewards_are_found_where_the_command_runs_and_shadow_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_rewards_for_test.py").write_text(
        "def short(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n")
    assert run("check", "mine.yaml", "rewards=['own_rewards_for_test:short']") == 0
    assert "1 x own_rewards_for_test:short" in capsys.readouterr().out
    assert sys.path[-1] == str(tmp_path)


def test_check_prints_what_a_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "mine.yaml", "run.save_every=50", "--json", "facts.json") == 0
    text, facts = capsys.readouterr().out, json.loads(Path("facts.json").read_text())
    for fragment in (
        "nfe at most",
        "cj_grpo",
        "LoRA rank 4, alpha 8",
        "note: run.save_every 50",
        "ok; next: unmask train mine.yaml",
    ):
        assert fragment in text
    assert (facts["canvas"], facts["nfe_at_most"], facts["rollouts_a_batch"]) == (32, 16, 8)


@pytest.mark.parametrize(
    ("overrides", "forwards"),
    [
        # 8 rollouts of 16 steps: 128 views. Once a batch: 128 to roll out, 128 for the reference; shared by 8 updates.
        ([], 128 + (128 + 128) / 8),
        (["objective.beta=0"], 128 + 128 / 8),
        (["objective.inner_steps=2", "objective.old=recompute"], 128 + (128 + 128 + 128) / 2),
        # The ratio of a rollout needs a pass of its own.
        (["objective.unit=rollout", "objective.beta=0"], 2 * 128 + 128 / 8),
        (["method=cj_grpo_sampled_steps", "objective.estimator.k=4", "objective.beta=0"], 8 * 4 + 128 / 8),
        # Every group may be refused twice and, in each attempt, fail and be tried again with hints.
        (
            ["objective.beta=0", "exploration={hints: inpaint_on_failure, filter: signal, refills: 2}"],
            128 + 2 * 3 * 128 / 8,
        ),
        (["objective.beta=0", "exploration={filter: signal, refills: 1, successes: 8}"], 128 + 2 * 128 / 8),
    ],
)
def test_check_counts_forwards(overrides: list[str], forwards: float) -> None:
    facts = cli_summary.summary(parse_recipe(RECIPE, overrides), "mine.yaml")
    assert facts["forwards_an_update_at_most"] == forwards


def test_check_tells_of_exploration() -> None:
    facts = cli_summary.summary(
        parse_recipe(RECIPE, ["method=igpo", "objective.inner_steps=8", "exploration.filter=signal"]), "mine.yaml"
    )
    assert facts["exploration"].startswith("a failed group again by inpaint_on_failure(column=reference, low=0.2,")
    assert facts["exploration"].endswith("; groups kept by signal, 0 refills: at most 2 x the rollouts")
    plain = cli_summary.summary(parse_recipe(RECIPE), "mine.yaml")
    assert plain["exploration"] == "none" and facts["rollouts_at_most"] == 2 * plain["rollouts_at_most"]


def test_check_can_print_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "mine.yaml", "--resolved") == 0
    assert parse_recipe(capsys.readouterr().out) == load_recipe("mine.yaml")


def test_check_lets_data_be_fetched_later(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "mine.yaml", "task={name: jsonl, path: later.jsonl}") == 0
    text = capsys.readouterr().out
    assert "not checked: there is no file 'later.jsonl' yet" in text and "put the data at later.jsonl" in text


@pytest.mark.parametrize("name", shipped_recipes())
def test_check_takes_every_shipped_recipe(name: str) -> None:
    facts = cli_summary.summary(load_recipe(name, ["evaluation.problems=8"]), name)
    assert facts["recipe"] == name and facts["nfe_at_most"] <= facts["canvas"]


def test_parts_lists_every_slot_with_knobs_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("parts") == 0
    text = capsys.readouterr().out
    for slot in SLOTS:
        assert f"\n{slot}   " in f"\n{text}"
        assert all(part in text for part in SLOTS[slot])
    assert run("parts", "selection") == 0
    text = capsys.readouterr().out
    assert "level: float = 0.9" in text and "ppo_clip" not in text
    assert run("parts", "schedule") == 0
    assert "steps: int required" in capsys.readouterr().out


def test_methods_lists_rows_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in load_methods())
    assert run("methods", "cj_grpo") == 0
    text = capsys.readouterr().out
    assert "departs:" in text and "beta: 0.04" in text and "trace_step" not in text


def test_cp_copies_lists_and_overwrites_only_when_forced(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cp") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped_recipes()) and "methods" not in listed
    assert run("cp", "quickstart", "own.yaml") == 0
    assert load_recipe("own.yaml") == load_recipe("quickstart")
    first, second = Path("own.yaml").read_text().splitlines()[:2]
    assert first == f"# from unmask {unmask.__version__}: quickstart.yaml"
    schema = Path(second.partition("$schema=")[2])
    assert schema.is_absolute() and schema.name == "recipe.schema.json"
    Path("own.yaml").write_text("mine")
    assert run("cp", "quickstart", "own.yaml") == 2
    assert Path("own.yaml").read_text() == "mine"
    assert run("cp", "quickstart", "own.yaml", "--force") == 0
    assert load_recipe("own.yaml").name == "quickstart"
    Path("folder").mkdir()
    assert run("cp", "tiny_sft.yaml", "folder") == 0
    assert load_recipe("folder/tiny_sft.yaml").kind == "sft"
    assert run("cp", "quickstart", "nowhere/own.yaml") == 2
    assert run("cp", "quikstart") == 2


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m unmask.rl.cli methods | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert "Traceback" not in done.stderr
