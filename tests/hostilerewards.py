"""Rewards that hang, crash, eat memory or fail, for the pool; tests name them as `hostilerewards:NAME`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from unmask.rewards.verdicts import RewardError, isolated


def act(completions: list[str], **columns: Any) -> list[float | None]:
    """Do what the completion says; otherwise its number is its value."""
    (text,) = completions
    if text == "hang":
        while True:
            pass
    elif text == "sleep":
        time.sleep(60)
    elif text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif text == "exit":
        os._exit(3)
    elif text == "memory":
        bytearray(1 << 40)
    elif text == "hungry":
        held = []
        while True:
            held.append(bytearray(1 << 22))
    elif text == "recursion":
        act([text])
    elif text == "raise":
        raise ZeroDivisionError("by zero")
    elif text == "leave":
        sys.exit(0)
    elif text == "refuse":
        raise RewardError("reward 'act': column 'x' holds nonsense; correct the row.")
    elif text == "none":
        return [None]
    elif text == "print":
        print("x" * 10_000, flush=True)
        os.write(1, b"y" * 10_000)
    return [float(text) if text.isdigit() else 0.0]


def child(completions: list[str], note: list[str]) -> list[float]:
    """Start two processes, one in a session of its own, add all ids to the file `note`, and die."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    processes = [subprocess.Popen(command, start_new_session=apart).pid for apart in (False, True)]
    with Path(note[0]).open("a") as file:
        file.write(" ".join(map(str, [*processes, os.getpid(), ""])))
    os.kill(os.getpid(), signal.SIGKILL)
    return [0.0]


def second_time(completions: list[str], note: list[str]) -> list[float]:
    """Crash on the first attempt at a row, judge on the second."""
    path = Path(note[0])
    path.write_text(path.read_text() + "x" if path.exists() else "x")
    if path.read_text() == "x":
        os._exit(1)
    return [1.0]


def after(completions: list[str], note: list[str]) -> list[float]:
    """Answer as soon as there is a file of that name."""
    while not Path(note[0]).exists():
        time.sleep(0.001)
    return [1.0]


@isolated(limit_s=5.0)
def logs(completions: list[str], prompts: list[str], numbers: Any, log_extra: Any, log_metric: Any) -> list[float]:
    """Log what arrived."""
    log_extra("seen", [[prompts[0], completions[0], numbers[0]]])
    log_extra("outcome", ["ok" if numbers[0] else "wrong"])
    log_metric("size", float(len(completions[0])))
    return [1.0]


async def later(completions: list[str], **columns: Any) -> list[float]:
    """Judge after a pause."""
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


def short(completions: list[str], **columns: Any) -> list[float]:
    """Forget a value."""
    return []


def make(value: float) -> Any:
    """Return a constant reward."""

    def constant(completions: list[str], **columns: Any) -> list[float]:
        return [value]

    return constant


def holder() -> None:
    """Start a pool whose workers hang, print the nursery's and the workers' ids, and wait to be killed."""
    import psutil

    from unmask.rewards.pool import Job, shared_pool

    pool = shared_pool(2)
    pool.submit([Job("act", {"name": "hostilerewards:act"}, {"completions": [text]}, 60.0) for text in ("1", "1")])
    futures = pool.submit([Job("act", {"name": "hostilerewards:act"}, {"completions": ["hang"]}, 60.0)] * 2)
    while not all(f.running() for f in futures) or len(psutil.Process().children(recursive=True)) < 3:
        time.sleep(0.01)
    print(*[process.pid for process in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(60)


def sometimes(completions: list[str], **columns: Any) -> list[float]:
    """Fail on completions with an even number of characters."""
    (text,) = completions
    if len(text) % 2 == 0:
        raise ValueError("an even number of characters")
    return [len(text) / 100]
