"""A pool of worker processes that can be killed: one row under one reward at a time, each with a wall-clock limit."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from .frames import frame
from .processes import START_S, Crew, Worker, death, default_workers
from .verdicts import RewardError

PREPARE_S = 120.0  # importing what a reward needs; no completion has a part in it
MAX_FAILED_STARTS = 3
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One row under one reward: the reward's entry and marks, and the arguments of its call as lists of one."""

    name: str
    entry: Mapping[str, Any]
    arguments: Mapping[str, Any]
    limit_s: float
    preload: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What became of a job: the worker's reply, or an outcome `timeout` or `error` with its cause; both attempts."""

    reply: Mapping[str, Any] | None
    outcome: str | None = None
    cause: str | None = None
    seconds: float = 0.0
    attempts: int = 1


@dataclass
class _Task:
    job: Job
    future: Future[Result]
    key: str
    message: bytes
    attempts: int = 0
    seconds: float = 0.0  # of wall clock, as it was
    charged: float = 0.0  # against its limit: no attempt costs more than it was given, however late the pool looks


class Pool:
    """`workers` processes that judge rows; a hung, crashed or memory-hungry one is killed and replaced.

    A job has `limit_s` seconds for both of its attempts together: the first may use half, the second what is left. A
    second failure gives the outcome `timeout` or `error` with its cause. Jobs may be submitted from any thread. When
    this process ends, however it ends, no worker is left. POSIX only.
    """

    def __init__(self, workers: int = 0, memory_mb: int = 2048) -> None:
        if os.name != "posix":
            raise RewardError("pool: isolated rewards need fork and Unix sockets (Linux, macOS); use WSL on Windows.")
        self.size = workers or default_workers()
        self._crew = Crew(memory_mb << 20)
        self._tasks: deque[_Task] = deque()
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._failed_starts = 0
        # Modules that the nursery has imported, or could not (and why); a dead nursery has none.
        self._loaded: dict[str, str | None] = {}
        self._closing = False
        self._crew.selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="unmask-pool", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> list[Future[Result]]:
        """Queue jobs and return their futures; RewardError, also in a future, for what the user has to correct."""
        tasks = [_task(job) for job in jobs]
        with self._lock:
            if self._closing:
                raise RewardError("pool: it is closed.")
            self._tasks.extend(tasks)
        self._wake()
        return [task.future for task in tasks]

    def close(self) -> None:
        """Kill every worker and end; jobs that have not finished raise RewardError."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake()
        self._thread.join(START_S)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the thread has enough to wake up for
            self._wake_write.send(b"x")

    def forget(self) -> None:
        """Close this process's copies of the pool's sockets; for a forked child, in which the pool's thread is gone."""
        self._crew.forget()

    @property
    def replaced(self) -> int:
        """Return how many workers have been killed so far."""
        return self._crew.replaced

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
            self._fail_all(RewardError("pool: it was closed before every verdict was in."))
        except BaseException as error:  # whoever waits for a verdict must hear of it
            self._closing = True
            self._fail_all(error)
            logger.exception("the pool's thread ended")
        finally:
            self._stop_nursery()

    def _turn(self) -> None:
        """Wait for replies, submissions or the next deadline, and act on them."""
        # Taken before looking: a reply that was there by its deadline counts, however late this thread gets to run.
        now = time.monotonic()
        ends = [worker.deadline for worker in self._crew.workers.values() if worker.task is not None]
        wait = max(0.0, min(ends) - now) if ends else None
        for key, _ in self._crew.selector.select(wait):
            if key.fileobj is self._wake_read:
                self._wake_read.recv(1 << 12)
            else:
                self._read(key.data)
        for worker in list(self._crew.workers.values()):
            if worker.task is None or worker.deadline > now:
                continue
            if worker.preparing:
                self._refuse(worker, f"it was not imported within {PREPARE_S:g} s.")
            else:
                self._failed(worker, "timeout", f"no verdict within its {worker.task.job.limit_s:g} s")
        self._assign()

    def _assign(self) -> None:
        """Give queued jobs to idle workers, starting workers while there are too few."""
        while True:
            with self._lock:
                if not self._tasks:
                    return
                idle = next((w for w in self._crew.workers.values() if w.task is None), None)
                if idle is None and len(self._crew.workers) >= self.size:
                    return
                task = self._tasks[0]
                if not self._loaded.keys() >= set(task.job.preload):
                    if any(w.task is not None for w in self._crew.workers.values()):
                        return  # importing would keep the nursery from killing whoever hangs
                    idle = None
                self._tasks.popleft()
            if not task.future.running() and not task.future.set_running_or_notify_cancel():
                continue
            try:
                if _ready(self, task):
                    self._give(idle or self._crew.start(), task)
            except OSError as error:  # the nursery has died, or the machine is out of processes: begin anew
                self._stop_nursery()
                self._failed_starts += 1
                if self._failed_starts >= MAX_FAILED_STARTS:
                    task.future.set_exception(RewardError(f"pool: no worker process can be started ({error})."))
                    continue
                with self._lock:
                    self._tasks.appendleft(task)

    def _give(self, worker: Worker, task: _Task) -> None:
        """Send a worker its next message: how to build the reward when it is new to it, else the row."""
        job, now = task.job, time.monotonic()
        worker.preparing = task.key not in worker.prepared
        if worker.preparing:
            message, limit = frame({"prepare": task.key, "entry": dict(job.entry), "path": sys.path}), PREPARE_S
        else:
            message, limit = task.message, allowance(job.limit_s, task.charged, task.attempts)
        worker.task, worker.began, worker.deadline = task, now, now + limit
        worker.connection.settimeout(limit)
        try:
            worker.connection.sendall(message)
        except OSError:
            self._failed(worker, "error", None)

    def _read(self, worker: Worker) -> None:
        """Take what a worker sent; act on a whole reply, on nonsense, and on its death."""
        try:
            reply = worker.read()
        except OSError:
            self._failed(worker, "error", None)
        except ValueError as error:
            self._failed(worker, "error", f"a worker sent {error}")
        else:
            if reply is not None:
                self._replied(worker, reply)

    def _replied(self, worker: Worker, reply: Mapping[str, Any]) -> None:
        task = worker.task
        if "refused" in reply:
            return self._refuse(worker, reply["refused"])
        if worker.preparing:
            if "failed" in reply:
                return self._refuse(worker, f"a worker process cannot build it ({reply['failed']}).")
            worker.prepared.add(task.key)
            return self._give(worker, task)
        if "failed" in reply:
            # After an exception (MemoryError, a broken cache) nothing is known of the worker's state.
            return self._failed(worker, "error", reply["failed"])
        self._failed_starts = 0
        worker.task = None
        seconds = task.seconds + time.monotonic() - worker.began
        task.future.set_result(Result(reply, seconds=seconds, attempts=task.attempts + 1))

    def _refuse(self, worker: Worker, message: str) -> None:
        """End a job that no other attempt can help, and its worker."""
        task = worker.task
        self._crew.kill(worker)
        if task is not None:
            task.future.set_exception(RewardError(_named(task.job.name, message)))

    def _failed(self, worker: Worker, outcome: str, cause: str | None) -> None:
        """Kill a worker; its job is tried once more, then it has the outcome."""
        task, preparing, spent = worker.task, worker.preparing, time.monotonic() - worker.began
        status = self._crew.kill(worker)
        if task is None:
            return
        task.attempts += 1
        if not preparing:
            task.seconds += spent
            task.charged += min(spent, allowance(task.job.limit_s, task.charged, task.attempts - 1))
        if task.attempts < 2:
            with self._lock:
                self._tasks.append(task)
            return
        if preparing:
            message = f"a worker process died while building it ({death(status)})."
            return task.future.set_exception(RewardError(_named(task.job.name, message)))
        task.future.set_result(Result(None, outcome, cause or death(status), task.seconds, task.attempts))

    def _stop_nursery(self) -> None:
        """End the nursery and forget every worker; their jobs fail as if they had crashed."""
        self._crew.close()
        self._loaded = {}
        for worker in list(self._crew.workers.values()):
            self._failed(worker, "error", None)

    def _fail_all(self, error: BaseException) -> None:
        with self._lock:
            tasks = [*self._tasks, *(w.task for w in self._crew.workers.values() if w.task is not None)]
            self._tasks.clear()
        for worker in self._crew.workers.values():
            worker.task = None
        for task in tasks:
            if not task.future.done():
                task.future.set_exception(error)


def allowance(limit_s: float, charged: float, attempts: int) -> float:
    """Return the seconds that the next of a row's two attempts may take: half of its limit, then what is left."""
    left = limit_s - charged
    return left / 2 if attempts == 0 else left


def _ready(pool: Pool, task: _Task) -> bool:
    """Import what a job's workers shall be forked with; tell whether that is possible."""
    missing = [name for name in task.job.preload if name not in pool._loaded]
    if missing:
        pool._loaded |= dict.fromkeys(missing, pool._crew.preload(missing))
    reason = next((pool._loaded[name] for name in task.job.preload if pool._loaded[name] is not None), None)
    if reason is not None:
        message = f"a library it needs cannot be imported ({reason})."
        task.future.set_exception(RewardError(_named(task.job.name, message)))
    return reason is None


def _task(job: Job) -> _Task:
    key = json.dumps(job.entry, sort_keys=True, default=str)
    try:
        return _Task(job, Future(), key, frame({"judge": key, "arguments": job.arguments}))
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(
            f"reward '{job.name}': a row is no plain data, as another process needs it ({error})."
        ) from None


def _named(name: str, message: str) -> str:
    return message if message.startswith("reward '") else f"reward '{name}': {message}"


@functools.cache
def shared_pool(workers: int = 0, memory_mb: int = 2048) -> Pool:
    """Return the process's pool of that size, which is closed when the process ends."""
    pool = Pool(workers, memory_mb)
    atexit.register(pool.close)
    _POOLS.append(pool)
    return pool


_POOLS: list[Pool] = []


def _after_fork() -> None:
    shared_pool.cache_clear()
    while _POOLS:
        _POOLS.pop().forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
