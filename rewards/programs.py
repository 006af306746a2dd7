"""Rewards for programs: `code` runs a model's program against tests in a sandbox, `syntax` only compiles it."""

from __future__ import annotations

import ast
import functools
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..recipes.registry import SLOTS, RecipeError
from . import remote, sandbox
from .assertions import Case, read_cases
from .sandbox import Answer, Limits
from .verdicts import LogExtra, LogMetric, RewardError, RewardFunction, Verdict, column_error, isolated, report, text_of

MAX_PROGRAM = 1 << 16
MAX_NESTING = 100
MAX_SECONDS = 20.0
LANGUAGES = ("", "python", "python3", "py")
LIMIT_S = 90.0  # of both attempts: each may start two sandboxes and use all of its seconds
CodeExtract = Literal["fence", "raw"]
Backend = Callable[["Plan", str], "list[Answer] | str"]


@dataclass(frozen=True)
class Plan:
    """A row's tests: inputs with the outputs they must give, or calls with what they must answer, or code to be run."""

    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    cases: Sequence[Case] = ()
    setup: str = ""
    tests: Sequence[str] = ()
    entry_point: str | None = None


def extract_program(text: str, rule: CodeExtract) -> str | None:
    """Return the program of a completion; None where there is none, or it exceeds MAX_PROGRAM characters.

    `fence`: the last block between lines of three backquotes, the first of which may name Python. `raw`: all of it.
    """
    program: str | None = text
    if rule == "fence":
        parts = re.split(r"^[ \t]*```", "\n" + text, flags=re.MULTILINE)
        # Between the marks the parts are text, block, text, block, ...; a block that is not closed is the last part.
        blocks = [part.partition("\n") for part in parts[1:-1:2]]
        programs = [block for first, _, block in blocks if first.strip().lower() in LANGUAGES]
        program = programs[-1] if programs else None
    return program if program and program.strip() and len(program) <= MAX_PROGRAM else None


@functools.lru_cache(maxsize=1024)
def _plan(tests: str, setup: str, entry_point: str | None, boxed: bool) -> Plan:
    """Return the plan of a row whose tests are JSON; the same row comes once for every rollout of its group."""
    listed = json.loads(tests)
    if isinstance(listed[0], dict):
        pairs = [(entry["input"], entry["output"]) for entry in listed]
        if entry_point is None:
            return Plan([_as_text(i) for i, _ in pairs], [_as_text(o) for _, o in pairs])
        cases = [Case(entry_point, _as_list(i), expected=o, loose=True, boxed=boxed) for i, o in pairs]
        return Plan(cases=cases, entry_point=entry_point)
    found = [read_cases(test, entry_point) or [] for test in listed]
    names = {case.name for cases in found for case in cases}
    one_each = all(found) and (len(listed) == 1 or all(len(cases) == 1 for cases in found))
    # What the setup defines is not the program's to answer.
    if one_each and (not setup.strip() or names == {entry_point}):
        return Plan(cases=[case for cases in found for case in cases], tests=listed, entry_point=entry_point)
    called = [f"{test}\ncheck(candidate)" if _needs_call(test, entry_point) else test for test in listed]
    return Plan(setup=setup, tests=called, entry_point=entry_point)


def _needs_call(test: str, entry_point: str | None) -> bool:
    defines = re.search(r"^def check\(\w+\):", test, re.MULTILINE)
    return bool(entry_point and defines and not re.search(r"^check\(", test, re.MULTILINE))


def _as_text(value: Any) -> str:
    return "\n".join(map(_as_text, value)) if isinstance(value, list) else str(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def plan_of(tests: Any, setup: Any, entry_point: Any) -> Plan:
    """Return a row's plan; RewardError when column `tests` is none of its forms."""
    if isinstance(tests, str):
        try:
            parsed = json.loads(tests)
        except ValueError:
            parsed = None
        tests = parsed if isinstance(parsed, dict | list) else [tests]
    named = None
    if isinstance(tests, Mapping):
        named, tests = tests.get("fn_name"), _paired(tests)
    form = isinstance(tests, list) and tests and isinstance(tests[0], str | dict)
    if not form or any(type(test) is not type(tests[0]) or not test for test in tests):
        rule = "which is neither Python asserts (text, or a list of it) nor a list of {input, output}"
        raise column_error("code", "tests", tests, rule)
    try:
        # APPS writes the result of a call alone in a list, or as it is.
        return _plan(json.dumps(tests), setup or "", named or entry_point, bool(named))
    except (KeyError, TypeError, ValueError) as error:
        raise column_error("code", "tests", tests, f"whose entries cannot be read ({error})") from error


def _paired(columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return APPS's `{inputs: [...], outputs: [...]}` as a list of pairs."""
    inputs, outputs = columns.get("inputs"), columns.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        return None
    return [{"input": one, "output": other} for one, other in zip(inputs, outputs, strict=True)]


def same_output(output: str, wanted: str) -> bool:
    """Tell whether two outputs have the same lines, blanks at their ends and empty lines at the end aside."""
    lines = [[line.rstrip() for line in text.strip("\n").rstrip().split("\n")] for text in (output, wanted)]
    return lines[0] == lines[1]


def run_locally(plan: Plan, program: str, limits: Limits) -> list[Answer] | str:
    """Return the answers of a program in the bubblewrap sandbox, one a test; text where the tests cannot run."""
    if plan.inputs:
        return sandbox.run_inputs(program, plan.inputs, limits)
    if plan.cases:
        return sandbox.run_calls(program, [case.request() for case in plan.cases], limits)
    return sandbox.run_tests(program, plan.setup, plan.tests, plan.entry_point, limits)


def judge_program(
    program: str, plan: Plan, run: Backend, score: Literal["all", "fraction"]
) -> tuple[Verdict, str | None]:
    """Return the verdict on a program, and why its first failing test failed."""
    answers = run(plan, program)
    if isinstance(answers, str):
        raise RewardError(f"reward 'code': a row's own tests cannot run ({answers:.200}); correct the row.")
    passed, causes = [], []
    for index, answer in enumerate(answers):
        if plan.inputs:
            right = answer.cause is None and same_output(answer.value, plan.outputs[index])
        elif plan.cases:
            right = answer.cause is None and plan.cases[index].holds(answer.value)
        else:
            right = answer.cause is None and answer.value is True
        passed.append(right)
        causes.append(None if right else answer.cause or "wrong answer")
    share = sum(passed) / len(passed)
    if len(plan.tests) == 1 and plan.cases:
        share = float(all(passed))  # one test of several asserts
    cause = next((f"test {index}: {cause}" for index, cause in enumerate(causes) if cause is not None), None)
    value = share if score == "fraction" else float(share == 1)
    return Verdict(value, "ok" if share == 1 else "wrong", program[:200]), cause


@SLOTS["reward"].register
@isolated(limit_s=LIMIT_S, preload=("unmask.rewards.sandbox:warm",))
def code(
    *,
    extract: CodeExtract = "fence",
    score: Literal["all", "fraction"] = "all",
    seconds: float = 4.0,
    memory_mb: int = 512,
    processes: int = 16,
    output_kb: int = 64,
    sandbox: Literal["bubblewrap", "remote"] = "bubblewrap",
    url: str = "http://localhost:2000",
) -> RewardFunction:
    """1 for a Python program that passes every test of column `tests` in a sandbox (or the share that it passes).

    `tests`: Python asserts (text or a list; HumanEval's `check(candidate)` with column `entry_point`; names they do not
    define are the program's, column `setup` is run before them), or a list of {input, output}, APPS's {inputs, outputs}
    included: standard input and output, or arguments and result where there is an `entry_point` or `fn_name` (also a
    method of a class `Solution`). Column `prefix` is put before a program that does not define the entry point.
    `seconds` are the wall clock of all tests. Runs code: needs `allow_code_execution`. Outcomes: ok, wrong (also: time,
    memory, output limit), unparsable (no program).
    """
    limits = Limits(seconds, memory_mb, processes, output_kb)
    if not 0 < seconds <= MAX_SECONDS:
        raise RecipeError(f"rewards.code.seconds: {seconds:g} must be above 0 and at most {MAX_SECONDS:g}.")
    if sandbox == "remote":
        run: Backend = functools.partial(remote.run, url=url, limits=limits)
    else:
        run = functools.partial(run_locally, limits=limits)

    def code_reward(
        completions: list[Any],
        tests: list[Any],
        entry_point: list[Any] | None = None,
        setup: list[Any] | None = None,
        prefix: list[Any] | None = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **_: Any,
    ) -> list[float | None]:
        blank: list[Any] = [None] * len(completions)
        verdicts, causes = [], []
        columns = (tests, entry_point or blank, setup or blank, prefix or blank)
        for completion, test, name, before, start in zip(completions, *columns, strict=True):
            program = extract_program(text_of(completion), extract)
            plan, cause = None if test is None else plan_of(test, before, name), None
            if plan is None:
                verdict = Verdict()
            elif program is None:
                verdict = Verdict(0.0, "unparsable")
            else:
                whole = f"{start}{program}" if start and name and not defines(program, name) else program
                verdict, cause = judge_program(whole, plan, run, score)
            verdicts.append(verdict)
            causes.append(cause)
            if log_metric is not None and verdict.outcome is not None:
                log_metric("code/time_limit", float("time limit" in (cause or "")))
        if log_extra is not None:
            log_extra("reason", causes)
        return report(verdicts, log_extra)

    code_reward.runs_code = True  # type: ignore[attr-defined]
    code_reward.ready = functools.partial(remote.ready, url) if sandbox == "remote" else _ready  # type: ignore[attr-defined]
    return code_reward


def _ready() -> None:
    sandbox.command()


def defines(program: str, name: str) -> bool:
    """Tell whether a program has a function of that name, without parsing what a model wrote."""
    return re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(name)}\b", program, re.MULTILINE) is not None


@SLOTS["reward"].register
@isolated()
def syntax(*, extract: CodeExtract = "fence") -> RewardFunction:
    """1 for a completion whose program is valid Python and more than a docstring or `pass`, 0 otherwise; runs nothing.

    With a column `entry_point`, the program has to define that name. It judges the form and reports no outcome.
    """

    def syntax_reward(completions: list[Any], entry_point: list[Any] | None = None, **_: Any) -> list[float]:
        names = entry_point or [None] * len(completions)
        texts = (extract_program(text_of(completion), extract) for completion in completions)
        return [float(is_program(text or "", name)) for text, name in zip(texts, names, strict=True)]

    return syntax_reward


def is_program(text: str, name: str | None = None) -> bool:
    """Tell whether `text` is Python that does something; text nested deeper than MAX_NESTING is not."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING or max((len(line) - len(line.lstrip()) for line in text.split("\n")), default=0) > 400:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    idle = (ast.Pass, ast.Import, ast.ImportFrom)
    busy = [
        n
        for n in body
        if not isinstance(n, idle) and not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
    ]
    return bool(busy) and (name is None or defines(text, name))
