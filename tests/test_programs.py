"""The rewards code and syntax: programs in completions, forms of tests, the gate, and the remote executor."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from unmask.recipes.loading import parse_recipe
from unmask.recipes.registry import RecipeError
from unmask.rewards import RewardError, Scorer, build_rewards, sandbox, score
from unmask.rewards.assertions import canonical, read_cases
from unmask.rewards.pool import Pool
from unmask.rewards.programs import MAX_PROGRAM, extract_program, is_program, plan_of, same_output
from unmask.rewards.sandbox import SandboxError
from unmask.rewards.wire import builder, decode, encode


def available() -> str | None:
    """Return why there is no sandbox here."""
    try:
        sandbox.command()
    except SandboxError as error:
        return str(error)
    return None


needs_sandbox = pytest.mark.skipif(available() is not None, reason=str(available()))
FENCES = [
    ("```python\nx = 1\n```", "x = 1\n"),
    ("text\n```\nx = 1\n```\nmore", "x = 1\n"),
    ("```py\nx = 1\n```\nor\n```python\nx = 2\n```", "x = 2\n"),
    ("```python\nx = 1\n```\n```bash\nls\n```", "x = 1\n"),
    ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
    ("```python\nx = 1", None),  # cut short
    ("```python\nx = 1\n```\n```python\nx = 2", "x = 1\n"),
    ("```\n\n```", None),
    ("x = 1", None),
    ("``` x = 1 ```", None),
    ("", None),
    ("```json\n{}\n```", None),
    ("```python\n" + "x" * MAX_PROGRAM + "\n```", None),
]


@pytest.mark.parametrize(("text", "program"), FENCES, ids=range(len(FENCES)))
def test_the_last_closed_block_is_the_program(text: str, program: str | None) -> None:
    assert extract_program(text, "fence") == program


def test_raw_completions_are_programs() -> None:
    assert extract_program("    return 1", "raw") == "    return 1"
    assert extract_program(" \n", "raw") is None


@pytest.mark.parametrize(
    ("text", "name", "good"),
    [
        ("def f():\n    return 1", "f", True),
        ("def f():\n    return 1", "g", False),
        ("x = 1", None, True),
        ("def f(:", None, False),
        ("", None, False),
        ("pass", None, False),
        ("import os", None, False),
        ("'''only words'''", None, False),
        ("(" * 200 + ")" * 200, None, False),
        ("x = " + "-" * 50_000 + "1", None, False),
        ("x = '\x00'", None, False),
        ("\n".join(" " * n + "if 1:" for n in range(500)), None, False),
        ("return 5", None, True),  # parses; only running it would tell
    ],
)
def test_syntax(text: str, name: str | None, good: bool) -> None:
    assert is_program(text, name) is good


def test_the_syntax_reward_needs_the_entry_point() -> None:
    [reward] = build_rewards(["syntax"])
    assert reward.isolation is not None
    text = "```python\ndef f():\n    return 1\n```"
    assert reward.function(completions=[text, text, "no"], entry_point=["f", "g", None]) == [1.0, 0.0, 0.0]
    assert reward.function(completions=[text]) == [1.0]


NO_FORM: list[Any] = [5, [], "", [""], [5], [{"input": 1}], {"inputs": [1], "outputs": []}, {"a": 1}, [None]]
NO_FORM += [["assert f() == 1", {"input": 1}]]


@pytest.mark.parametrize("tests", NO_FORM, ids=lambda tests: str(tests)[:24])
def test_tests_of_no_form_are_refused(tests: Any) -> None:
    with pytest.raises(RewardError, match="reward 'code': column 'tests' holds"):
        plan_of(tests, None, None)


READ = [
    ("assert f(1, [2], b='x') == {'a': (1,)}", 1),
    ("assert f() == 1\nassert f(2) == -2", 2),
    ("assert (5, 3) == f(1)", 1),
    ("assert not f(1)\nassert f(2)\nassert f(1) is None", 3),
    ("assert abs(f(1) - 0.5) < 1e-6\nassert math.fabs(f(1) - 0.5) < 1e-6", 2),
    ("METADATA = {'a': 1}\ndef check(candidate):\n    'doc'\n    assert True, 'x'\n    assert candidate(1) == 2\n", 1),
    ("def check(candidate):\n    assert candidate(1) == 2\ncheck(f)", 1),
    ("assert set(f(1)) == set((1, 2))", 1),
    ("import math\nassert f(1) == 1", None),
    ("x = f(1)\nassert x == 1", None),
    ("assert f(g(1)) == 1", None),
    ("assert f(1) == math.pi", None),
    ("assert f(1).a == 1", None),
    ("assert f(*[1]) == 1", None),
    ("assert f(**{'a': 1}) == 1", None),
    ("assert len(f(1)) == 1", None),
    ("assert sorted(f(1)) == [1]", None),
    ("assert 1 < f(1) < 3", None),
    ("assert f(1) != 2", None),
    ("assert f(1) is True", None),
    ("for i in range(3):\n    assert f(i) == i", None),
    ("assert f(1) == 1, g(2)", 1),
    ("assert __import__('os').getcwd() == 1", None),
    ("assert f(__import__('os')) == 1", None),
    ("assert open('x') == 1", None),
    ("assert f(", None),
    ("(" * 500, None),
    ("", None),
]


@pytest.mark.parametrize(("source", "count"), READ, ids=[source[:24] for source, _ in READ])
def test_asserts_that_can_be_read(source: str, count: int | None) -> None:
    cases = read_cases(source, "g" if "candidate" in source else None)
    assert (cases if count is None else len(cases or [])) == count


VALUES = [
    None,
    True,
    False,
    0,
    -7,
    10**50,
    0.5,
    -0.0,
    float("inf"),
    "",
    "aé\x00\ud800",
    b"\x00\xff",
    2 + 3j,
    [],
    [[1], "x"],
]
VALUES += [(1, 2), {1, "a"}, frozenset({1}), {"k": [1], (1, 2): None}, {"nested": {"deep": [(), [{}]]}}]


# Numbered: a set is written in an order of its own in every process, and xdist compares the names.
@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_plain_data_survives_the_wire(value: Any) -> None:
    again = decode(encode(value), builder(None))
    assert again == value and type(again) is type(value)
    tree = decode(encode(value), lambda *tree: tree)
    assert canonical(tree) == canonical(decode(encode(again), lambda *tree: tree))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (1, 1.0, True), (True, 1, True), (0.1, 0.1, True), (1, "1", False), ([1], (1,), False), ({1, 2}, {2, 1}, True),
        ({1}, frozenset({1}), True), ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), (float("nan"), float("nan"), False),
        ([{1: {2}}], [{1: {2}}], True), (b"a", "a", False), (2**53 + 1, float(2**53), False), ("#", ("#",), False),
        (None, False, False), ([], set(), False), (1j, 1j, True), ([1, 2], [2, 1], False),
    ],
)  # fmt: skip
def test_canonical_forms_are_equal_where_python_says_so(one: Any, other: Any, equal: bool) -> None:
    forms = [canonical(decode(encode(value), lambda *tree: tree)) for value in (one, other)]
    assert (forms[0] == forms[1]) is equal
    assert (one == other) is equal


NONSENSE = [b"", b"l", b"l5:", b"l1:l1:l1:", b"s5:ab", b"s-1:", b"i;", b"i1", b"ix;", b"z1:", b"d1:n", b"nn", b"TTT"]
NONSENSE += [b"l" + b"9" * 30 + b":", b"f" + b"1" * 30_000 + b";", b"i" + b"1" * 30_000 + b";", b"l1:" * 100_000]
NONSENSE += [b"s1:\xff", b"h1;", b"c1;", b"S1:l0:"]


@pytest.mark.parametrize("data", NONSENSE, ids=lambda data: repr(data[:8]))
def test_nonsense_on_the_wire_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, TypeError, RecursionError)):
        decode(data, builder(None))


def test_what_is_no_plain_data_has_no_bytes() -> None:
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    for value in (object(), deep, print, list):
        with pytest.raises(ValueError):
            encode(value)


def test_outputs_are_compared_by_lines() -> None:
    assert same_output("1 2 \n3\n\n", "1 2\n3") and same_output("", "\n") and not same_output("1  2", "1 2")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(workers=2)
    yield made
    made.close()


ROWS = [
    {"prompt": "p", "tests": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "double",
     "prefix": "def double(n):\n", "setup": "def double(n):\n    'Twice n.'\n"},
    {"prompt": "p", "tests": ["assert triple(1) == 3", "assert triple(2) == 6"]},
    {"prompt": "p", "tests": [{"input": "4", "output": "16"}]},
    {"prompt": "p", "tests": None},
]  # fmt: skip
GOOD = ["    return 2 * n", "def triple(n):\n    return 3 * n", "print(int(input()) ** 2)", "print()"]


def scored(pool: Pool, texts: list[str], **knobs: Any) -> Any:
    rewards = build_rewards([{"name": "code", **knobs}], allow_code_execution=True)
    fenced = [f"```python\n{text}\n```" for text in texts]
    return score(rewards, ROWS[: len(texts)], ["p"] * len(texts), fenced, [[1]] * len(texts), pool=pool)


@needs_sandbox
def test_the_reward_over_a_batch(pool: Pool) -> None:
    got = scored(pool, GOOD)
    assert (
        got.outcome == ["ok", "ok", "ok", "error"] and got.total_B[3].isnan() and got.metrics["code/time_limit"] == 0.0
    )
    half = ["    return n + 2", "def triple(n):\n    return 3", "print(5)"]
    assert scored(pool, half, score="fraction").total_B.tolist() == [1.0, 0.5, 0.0]
    got = scored(pool, [GOOD[0], "x = [", GOOD[2]])
    assert got.outcome == ["ok", "wrong", "ok"] and "SyntaxError" in got.extra["reason"][1]
    got = scored(pool, ["    while True: pass"], seconds=0.5)
    assert got.outcome == ["wrong"] and got.metrics["code/time_limit"] == 1.0 and "time limit" in got.extra["reason"][0]


def test_no_sandbox_in_a_worker_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the machine lacks becomes a score."""
    monkeypatch.setenv("PATH", "/nowhere")
    lame = Pool(workers=1)
    with pytest.raises(RewardError, match="bubblewrap"):
        scored(lame, GOOD[:1])
    lame.close()


RECIPE = """
name: programs
model: {path: "unmask:tiny", lora: {rank: 4}}
task: {name: jsonl, path: rows.jsonl}
rollout: {prompts: 2, group: 2, canvas: 32, sampler: {schedule: {name: blocks, size: 16, per_step: 2}}}
rewards: [code]
method: cj_grpo
optim: {lr: 1e-3, steps: 10}
"""


def test_code_is_off_unless_the_recipe_says_so() -> None:
    message = r"rewards\[0\]: reward 'code' runs code that the model writes .* `allow_code_execution: true`"
    with pytest.raises(RecipeError, match=message):
        parse_recipe(RECIPE)
    with pytest.raises(RecipeError, match=message):
        build_rewards(["code"])
    recipe = parse_recipe(RECIPE, ["allow_code_execution=true"])
    assert recipe.rewards[0].model_dump()["sandbox"] == "bubblewrap"
    build_rewards(["syntax"])
    with pytest.raises(RecipeError, match=r"rewards.code.seconds: 90 must be above 0 and at most 20"):
        parse_recipe(RECIPE, ["allow_code_execution=true", "rewards=[{name: code, seconds: 90}]"])


def test_no_sandbox_stops_before_the_first_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sandbox, "command", lambda: (_ for _ in ()).throw(SandboxError("sandbox: none here; install it."))
    )
    with pytest.raises(SandboxError, match="none here"):
        Scorer(build_rewards(["code"], allow_code_execution=True))


class Piston(BaseHTTPRequestHandler):
    """Answers as Piston's API does; the programs are the tests' own, so a plain subprocess runs them."""

    requests: list[dict[str, Any]] = []  # noqa: RUF012
    broken = 0
    languages = ("python",)

    def do_GET(self) -> None:
        self.reply([{"language": name, "version": "3.12.0"} for name in self.languages])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append(body)
        if type(self).broken:
            type(self).broken -= 1
            return self.send_error(429)
        command = [sys.executable, "-I", "-c", body["files"][0]["content"]]
        run: dict[str, Any]
        try:
            done = subprocess.run(
                command,
                input=body["stdin"],
                capture_output=True,
                text=True,
                timeout=body["run_timeout"] / 1000,
                check=False,
            )
            run = {"stdout": done.stdout, "stderr": done.stderr, "code": done.returncode, "signal": None}
        except subprocess.TimeoutExpired:
            run = {"stdout": "", "stderr": "", "code": None, "signal": "SIGKILL"}
        self.reply({"language": "python", "version": "3.12.0", "run": {**run, "output": run["stdout"]}})

    def reply(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Piston) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_the_remote_executor(pool: Pool, server: str) -> None:
    Piston.requests.clear()
    got = scored(pool, GOOD, sandbox="remote", url=server)
    assert got.outcome == ["ok", "ok", "ok", "error"]
    assert {request["run_timeout"] for request in Piston.requests} == {4000}
    assert not any("== 4" in json.dumps(request) or request["stdin"] == "16" for request in Piston.requests)
    got = scored(pool, ["    return 5", "def triple(n): raise KeyError(n)", "print(4)"], sandbox="remote", url=server)
    assert got.outcome == ["wrong"] * 3 and "KeyError" in got.extra["reason"][1]
    hostile = ["    import os; os._exit(0)", "import sys; sys.exit(0)", "while True: pass"]
    got = scored(pool, hostile, sandbox="remote", url=server, seconds=0.5)
    assert got.outcome == ["wrong"] * 3 and "SIGKILL" in got.extra["reason"][2]
    forged = "print('0' * 16, 'l1:d1:s5:valuei4;'.encode().hex())\ndef triple(n): return 0"
    assert scored(pool, ["    return 0", forged], sandbox="remote", url=server).outcome == ["wrong", "wrong"]


def test_a_remote_executor_that_fails_is_tried_again_and_then_left_out(pool: Pool, server: str) -> None:
    Piston.broken = 1
    assert scored(pool, GOOD[:1], sandbox="remote", url=server).outcome == ["ok"]
    Piston.broken = 2
    got = scored(pool, GOOD[:1], sandbox="remote", url=server)
    assert got.outcome == ["error"] and got.total_B.isnan().all() and "429" in got.extra["cause"][0]


def test_remote_tests_that_must_be_run_are_refused(pool: Pool, server: str) -> None:
    rows = [{"prompt": "p", "tests": ["x = f(1)\nassert x == 1"]}]
    rewards = build_rewards([{"name": "code", "sandbox": "remote", "url": server}], allow_code_execution=True)
    with pytest.raises(RewardError, match="need the sandbox's second process"):
        score(rewards, rows, ["p"], ["```\ndef f(n): return n\n```"], [[1]], pool=pool)


def test_a_remote_executor_must_be_there(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def scorer(url: str) -> Scorer:
        return Scorer(build_rewards([{"name": "code", "sandbox": "remote", "url": url}], allow_code_execution=True))

    scorer(server)
    with pytest.raises(SandboxError, match="does not answer as Piston does"):
        scorer("http://127.0.0.1:9")
    monkeypatch.setattr(Piston, "languages", ("bash",))
    with pytest.raises(SandboxError, match=r"offers no Python \(bash\)"):
        scorer(server)
