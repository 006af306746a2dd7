"""The body of a process that `shortrun.start` forks: `JOB` says what to run, where, and where its output goes."""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

job: dict[str, Any] = globals()["JOB"]
os.chdir(job["folder"])
os.environ.update(job["environment"])
if "largest_file" in job:
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
# The log itself must be able to grow.
handle = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(handle, 1)
os.dup2(handle, 2)

from unmask.rl import launch  # noqa: E402 (imported by the server already)

sys.exit(launch.main(job["arguments"]))
