"""Child processes of the pool: a nursery that only forks, kills and reaps, and workers that judge one row at a time.

The nursery is a fresh interpreter without threads, so that forking it is safe whatever the trainer has loaded (torch,
CUDA, tokenizers), and a killed worker is replaced in milliseconds. It runs no reward and reads no model text.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .frames import frame, receive

_LIBC = ctypes.CDLL(None)


def serve() -> None:
    """Fork, kill and reap workers as the parent asks, until it closes its socket or dies; then leave none behind."""
    control = socket.socket(fileno=int(sys.argv[2]))
    workers: dict[int, int] = {}
    _adopt_orphans()
    try:
        while True:
            data, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
            if not data:
                return
            message = json.loads(data)
            if "fork" in message:
                workers[message["fork"]] = _fork(control, descriptors[0], message["memory"])
                os.close(descriptors[0])
                control.sendall(b"{}")
            elif "kill" in message:
                status = _kill(workers.pop(message["kill"]))
                _end_orphans(set(workers.values()))
                control.sendall(json.dumps({"status": status}).encode())
            else:
                control.sendall(json.dumps({"missing": _preload(message["preload"])}).encode())
    except ConnectionError:
        return
    finally:
        for process in workers.values():
            _kill(process)
        _end_orphans(set())


def _preload(modules: list[str]) -> str | None:
    """Import `module`, or call `module:function`, so that every fork has it ready; return why that is impossible."""
    try:
        for name in modules:
            module, _, function = name.partition(":")
            imported = importlib.import_module(module)
            if function:
                getattr(imported, function)()
    except Exception as error:  # an import runs anything
        return f"{type(error).__name__}: {error}"
    gc.collect()
    gc.freeze()  # what is shared stays shared: the collector would touch every page
    return None


def _fork(control: socket.socket, descriptor: int, memory: int) -> int:
    process = os.fork()
    if process:
        return process
    try:
        control.close()
        if sys.platform == "linux":
            _LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: it may hang, and shall not outlive us
        os.setsid()  # its own process group, so that whatever it starts is killed with it
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(2, 1)  # what a reward prints is no output of the command
        work(socket.socket(fileno=descriptor))
    finally:
        os._exit(0)


def _kill(process: int) -> int:
    """Kill a worker with everything it started, reap it, and return its exit code (negative: the signal)."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:  # it has not come as far as setsid
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _adopt_orphans() -> None:
    """Become the parent of whatever a killed worker leaves behind, also of what has left its process group (Linux)."""
    if sys.platform == "linux":
        _LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _end_orphans(workers: set[int]) -> None:
    """Kill and reap every child that is no worker, and what those leave behind in turn."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    while listing.exists() and (orphans := set(map(int, listing.read_text().split())) - workers):
        for process in orphans:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def work(connection: socket.socket) -> None:
    """Answer `prepare` (build a reward from its recipe entry) and `judge` (one row) until the parent closes."""
    from .building import build_plain
    from .calling import judge_row

    prepared: dict[str, Any] = {}
    while (message := receive(connection)) is not None:
        reply: Mapping[str, Any] = {}
        try:
            if "prepare" in message:
                sys.path[:] = message["path"]
                prepared[message["prepare"]] = build_plain(message["entry"])
            else:
                reward = prepared[message["judge"]]
                reply = judge_row(reward.name, reward.function, message["arguments"])
            answer = frame(reply)
        except BaseException as error:
            answer = frame(_refusal(error))
        connection.sendall(answer)


def _refusal(error: BaseException) -> dict[str, str]:
    """Return `refused` for what the user has to correct, `failed` for what went wrong on this row."""
    from ..recipes.registry import RecipeError

    if isinstance(error, RecipeError):
        return {"refused": str(error)}
    return {"failed": f"{type(error).__name__}: {error}"[:500]}
