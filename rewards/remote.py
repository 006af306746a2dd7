"""A remote executor of programs with Piston's HTTP interface; what is right is decided here, from what comes back."""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from . import wire
from .sandbox import Answer, Limits, SandboxError, SandboxFailure, source, tagged
from .verdicts import RewardError

if TYPE_CHECKING:
    from .programs import Plan

LAST_LINE = 'if __name__ == "__main__":\n    main()\n'
PATIENCE_S = 15.0


def ready(url: str) -> None:
    """Raise SandboxError unless the executor at `url` answers and offers Python."""
    try:
        with urllib.request.urlopen(f"{url}/api/v2/runtimes", timeout=PATIENCE_S) as reply:
            offered = {entry["language"] for entry in json.load(reply)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SandboxError(
            f"sandbox: the executor at '{url}' does not answer as Piston does ({error}); start one there, or set `url`."
        ) from error
    if "python" not in offered:
        raise SandboxError(f"sandbox: the executor at '{url}' offers no Python ({', '.join(sorted(offered))}).")


def run(plan: Plan, program: str, *, url: str, limits: Limits) -> list[Answer] | str:
    """Return the program's answers, one a test, each within `limits`; SandboxFailure where the executor fails.

    Tests that have to be run as code would lie beside the program there, so they are refused.
    """
    if plan.inputs:
        return [_printed(_execute(url, program, text, limits), limits) for text in plan.inputs]
    if not plan.cases:
        raise RewardError(
            "reward 'code': a row's tests are more than asserts of calls with literals, and need the sandbox's second "
            "process; use `sandbox: bubblewrap`, or leave such rows out."
        )
    mark = secrets.token_hex(8)
    code = source()
    assert code.endswith(LAST_LINE)
    calls = [case.request() for case in plan.cases]
    script = f"{code.removesuffix(LAST_LINE)}\nanswer_calls({program!r}, {calls!r}, {mark!r})\n"
    return _answers(_execute(url, script, "", limits), mark, len(calls), limits)


def _execute(url: str, script: str, text: str, limits: Limits) -> dict[str, Any]:
    """Run a script there once and return Piston's account of the run."""
    body = {
        "language": "python",
        "version": "*",
        "files": [{"name": "main.py", "content": script}],
        "stdin": text,
        "run_timeout": int(limits.seconds * 1000),
        "run_memory_limit": limits.memory_mb << 20,
    }
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/api/v2/execute", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=limits.seconds + PATIENCE_S) as reply:
            account = json.loads(reply.read(1 << 24))["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SandboxFailure(f"the executor at '{url}' failed ({error})") from error
    if not isinstance(account, dict) or not isinstance(account.get("stdout"), str):
        raise SandboxFailure(f"the executor at '{url}' gave no account of a run")
    return account


def _ended(account: dict[str, Any]) -> str | None:
    if account.get("signal"):
        return f"time, memory or output limit ({account['signal']})"
    return None if account.get("code") == 0 else f"ended with status {account.get('code')}"


def _printed(account: dict[str, Any], limits: Limits) -> Answer:
    output = account["stdout"]
    return Answer(output, "output limit" if len(output) > limits.output_kb << 10 else _ended(account))


def _answers(account: dict[str, Any], mark: str, count: int, limits: Limits) -> list[Answer]:
    found = account["stdout"].rpartition(mark)
    missing = [Answer(cause=_ended(account) or "no answer")] * count
    if not found[1]:
        return missing
    try:
        replies = wire.decode(bytes.fromhex(found[2].strip()), tagged)
        listed = [dict(reply[1]) for reply in replies[1]]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return missing
    if len(listed) == 1 and "failed" in listed[0]:
        return [Answer(cause=str(listed[0]["failed"])[:300])] * count
    if len(listed) != count:
        return missing
    return [Answer(r["value"]) if "value" in r else Answer(cause=str(r.get("raised"))[:300]) for r in listed]
