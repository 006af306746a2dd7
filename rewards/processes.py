"""The parent's side of the nursery: a process apart from the trainer that forks, kills and reaps workers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .frames import announced, split

# What the nursery's interpreter is given to run; its arguments are this process's sys.path and the number of a socket.
BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from unmask.rewards.nursery import serve; serve()"
MAX_REPLY = 1 << 24
START_S = 120.0  # a fresh interpreter, or the import of a large library, on a busy machine


class NurseryError(OSError):
    """The nursery cannot be started, does not answer or has died; its workers have died with it."""


class Nursery:
    """A running nursery; it and every worker end when this object is closed or this process ends, however it ends."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._numbers = itertools.count()
        self._control, theirs = socket.socketpair()
        with theirs:
            # -P: the current folder, which may not be on our path, is not put on its path either.
            command = [sys.executable, "-P", "-c", BOOT, json.dumps(sys.path), str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the trainer, which then closes the pool
            )
        self._control.settimeout(START_S)

    def preload(self, modules: Sequence[str]) -> str | None:
        """Import modules that every later worker shall have; return why one cannot be imported."""
        return self._ask({"preload": list(modules)})["missing"]

    def fork(self) -> tuple[int, socket.socket]:
        """Start a worker and return its number and our end of its socket."""
        ours, theirs = socket.socketpair()
        number = next(self._numbers)
        with theirs:
            self._ask({"fork": number, "memory": self.memory}, theirs.fileno())
        return number, ours

    def kill(self, number: int) -> int:
        """Kill and reap a worker and return its exit code (negative: the signal it died of)."""
        return self._ask({"kill": number})["status"]

    def _ask(self, message: Mapping[str, Any], *descriptors: int) -> dict[str, Any]:
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
            data = self._control.recv(1 << 16)
        except OSError as error:
            raise NurseryError(f"the nursery of workers does not answer ({error})") from error
        if not data:
            raise NurseryError("the nursery of workers has died")
        return json.loads(data)

    def close(self) -> None:
        """End the nursery, which kills its workers first."""
        self._control.close()
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """Close this process's copy of the control socket, in a forked child that is not the nursery's parent."""
        self._control.close()


@dataclass
class Worker:
    """A worker process: our end of its socket, what it has sent so far, the rewards it has built, and its work."""

    number: int
    connection: socket.socket
    data: bytearray = field(default_factory=bytearray)
    prepared: set[str] = field(default_factory=set)
    task: Any = None
    preparing: bool = False
    began: float = 0.0
    deadline: float = 0.0

    def read(self) -> Any:
        """Return a whole reply, None while it is incomplete; ConnectionError at its end, ValueError for nonsense."""
        part = self.connection.recv(1 << 18)
        if not part:
            raise ConnectionError
        self.data += part
        size = announced(self.data) or 0
        if size > MAX_REPLY:
            raise ValueError(f"a reply of {size} bytes")
        reply = split(self.data)
        if reply is not None and (self.task is None or not isinstance(reply, dict)):
            raise ValueError("a reply that nobody asked for")
        return reply


class Crew:
    """The workers of a pool by number, the nursery they come from, and the selector that hears of them."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.workers: dict[int, Worker] = {}
        self.selector = selectors.DefaultSelector()
        self.replaced = 0  # workers killed so far
        self._nursery: Nursery | None = None

    def preload(self, modules: Sequence[str]) -> str | None:
        """Import modules in the nursery, which hears nothing else meanwhile, and retire the workers without them."""
        reason = self._home().preload(modules)
        for worker in list(self.workers.values()):
            self.kill(worker)
        return reason

    def start(self) -> Worker:
        """Fork a worker from the nursery, which is started when there is none; NurseryError."""
        number, connection = self._home().fork()
        worker = self.workers[number] = Worker(number, connection)
        self.selector.register(connection, selectors.EVENT_READ, worker)
        return worker

    def _home(self) -> Nursery:
        if self._nursery is None:
            self._nursery = Nursery(self.memory)
        return self._nursery

    def kill(self, worker: Worker) -> int | None:
        """Kill and reap a worker and forget it; return its exit code if the nursery still knows it."""
        self.selector.unregister(worker.connection)
        worker.connection.close()
        del self.workers[worker.number]
        self.replaced += 1
        try:
            return self._nursery.kill(worker.number) if self._nursery is not None else None
        except NurseryError:
            return None

    def close(self) -> None:
        """End the nursery and with it every worker."""
        nursery, self._nursery = self._nursery, None
        if nursery is not None:
            nursery.close()

    def forget(self) -> None:
        """Close a forked child's copies of the sockets."""
        for worker in self.workers.values():
            worker.connection.close()
        if self._nursery is not None:
            self._nursery.forget()


def death(status: int | None) -> str:
    """Return in words how a worker ended (None: nobody knows)."""
    if status is None:
        return "a worker process was lost"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"a worker process died of {signal.Signals(-status).name}"
    return f"a worker process ended with code {status}"


def default_workers() -> int:
    """Return the number of workers of one rank: the machine's cores, shared by the ranks that run on it."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
