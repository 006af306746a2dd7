"""What an evaluation's rollouts amount to: one row a problem, one summary, and tables that refuse to mix protocols."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from rich.table import Table
from torch import Tensor

from .evaluation import REQUEST, ROLLOUTS, Request
from .intervals import Estimate, Interval, estimate, majority, paired_interval, pass_at_k
from .runfolder import RunError, write_json

PROBLEMS, SUMMARY = "problems.parquet", "summary.json"
COLUMNS = ["problem", "seed", "prompt", "outcome", "reward", "nfe", "length", "truncated", "answer", "seconds"]
SHARES = ("truncated", "unparsable", "timeout", "error")


@dataclass(frozen=True)
class Tally:
    """The completions of an evaluation, grouped: entry p of `rows` holds those of problem p, by seed."""

    rows: list[list[dict[str, Any]]]

    @property
    def samples(self) -> int:
        """Completions a problem."""
        return len(self.rows[0])

    def right(self, problem: int) -> list[bool]:
        """Return which completions of a problem are right."""
        return [row["outcome"] == "ok" for row in self.rows[problem]]

    def per_problem(self) -> dict[str, list[Any]]:
        """Return one entry a problem of everything that is averaged later."""
        table: dict[str, list[Any]] = {"problem": list(range(len(self.rows)))}
        table["prompt"] = [rows[0]["prompt"] for rows in self.rows]
        table["samples"] = [len(rows) for rows in self.rows]
        table["right"] = [sum(self.right(p)) for p in range(len(self.rows))]
        table["exact"] = [right / self.samples for right in table["right"]]
        table["reward"] = [_mean([row["reward"] or 0.0 for row in rows]) for rows in self.rows]
        for name in ("nfe", "length", "truncated"):
            table[name] = [_mean([row[name] for row in rows]) for rows in self.rows]
        for code in SHARES[1:]:
            table[code] = [_mean([row["outcome"] == code for row in rows]) for rows in self.rows]
        answered = any(row["answer"] is not None for rows in self.rows for row in rows)
        votes = [majority([row["answer"] for row in rows], self.right(p)) for p, rows in enumerate(self.rows)]
        table["majority"] = votes if answered else [None] * len(votes)
        return table


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def read_tally(folder: Path, problems: int, samples: int) -> Tally:
    """Return the completions of a folder; RunError where some are missing."""
    found: list[dict[int, dict[str, Any]]] = [{} for _ in range(problems)]
    for path in sorted((folder / ROLLOUTS).glob("seed-*.parquet")):
        for row in pyarrow.parquet.read_table(path, columns=COLUMNS).to_pylist():
            found[row["problem"]][row["seed"]] = row
    total = problems * samples
    missing = total - sum(map(len, found))
    if missing:
        raise RunError(f"'{folder}': {missing} of {total} completions are missing; evaluate again to go on.")
    return Tally([[rows[seed] for seed in sorted(rows)] for rows in found])


def finish(folder: Path) -> dict[str, Any]:
    """Write `problems.parquet` and `summary.json` of a complete evaluation and return the summary."""
    record = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    request, facts = record["request"], record["facts"]
    tally = read_tally(folder, facts["problems"], facts["samples"])
    table = tally.per_problem()
    temporary = folder / f".{PROBLEMS}"
    pyarrow.parquet.write_table(pyarrow.table(table), temporary)
    os.replace(temporary, folder / PROBLEMS)
    summary = {
        "protocol": record["protocol"]["name"],
        "target": request["target"],
        "policy": request["policy"],
        "folder": str(folder),
        **{key: facts[key] for key in ("protocol_hash", "data_hash", "weights")},
        **summarise(tally, table),
    }
    write_json(folder / SUMMARY, summary)
    return summary


def summarise(tally: Tally, table: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the numbers of an evaluation.

    `stderr` is over problems (s / sqrt(n) of the problems' rates), `stderr_seeds` over the rates of the seeds, each on
    all problems; `tokens_per_s` is that of one device.
    """
    samples, n = tally.samples, len(tally.rows)
    exact = estimate(table["exact"])
    by_seed = [_mean([tally.right(p)[j] for p in range(n)]) for j in range(samples)]
    everything = [row for rows in tally.rows for row in rows]
    voted = table["majority"] if table["majority"][0] is not None else None
    return {
        "n": n,
        "samples": samples,
        "exact": exact.mean,
        "stderr": exact.stderr,
        "stderr_seeds": estimate(by_seed).stderr,
        "pass": {str(k): pass_rate(table["right"], samples, k)._asdict() for k in sizes(samples)},
        "majority": None if voted is None else estimate(voted)._asdict(),
        "reward": estimate(table["reward"])._asdict(),
        "nfe": _mean(table["nfe"]),
        "length": _mean(table["length"]),
        "tokens_per_s": sum(row["length"] for row in everything) / math.fsum(row["seconds"] for row in everything),
        **{name: _mean(table[name]) for name in SHARES},
        "outcomes": dict(sorted(Counter(row["outcome"] for row in everything).items())),
    }


def sizes(samples: int) -> list[int]:
    """Return the k of pass@k that are shown: powers of two, and all samples."""
    powers = [2**i for i in range(samples.bit_length())]
    return powers if powers[-1] == samples else [*powers, samples]


def pass_rate(right: Sequence[int], samples: int, k: int) -> Estimate:
    """Return pass@k over problems with its standard error."""
    return estimate([pass_at_k(count, samples, k) for count in right])


@dataclass(frozen=True)
class Finished:
    """A complete evaluation that was read from its folder."""

    folder: Path
    summary: dict[str, Any]
    exact_P: Tensor

    @staticmethod
    def read(folder: Path) -> Finished:
        """Read a folder; RunError where no evaluation lies there or it was not finished."""
        if not (folder / REQUEST).is_file():
            raise RunError(f"'{folder}' is not the folder of an evaluation; name one that `unmask evaluate` printed.")
        if not (folder / SUMMARY).is_file():
            request = Request.read(folder / REQUEST)
            raise RunError(
                f"'{folder}' was not finished; go on with `unmask evaluate {request.target} --protocol "
                f"{request.protocol}`."
            )
        table = pyarrow.parquet.read_table(folder / PROBLEMS, columns=["exact"])
        exact_P = torch.tensor(table["exact"].to_pylist(), dtype=torch.float64)
        return Finished(folder, json.loads((folder / SUMMARY).read_text(encoding="utf-8")), exact_P)

    @property
    def label(self) -> str:
        """What a table calls it."""
        policy = self.summary["policy"]
        return self.summary["target"] if policy == "model" else f"{self.summary['target']} ({policy})"


def find_evaluations(name: str) -> list[Finished]:
    """Return the evaluation in a folder, or all finished ones of a run; RunError where there is none."""
    folder = Path(name).expanduser()
    if (folder / REQUEST).is_file() or not (folder / "evaluations").is_dir():
        return [Finished.read(folder)]
    found = sorted(path.parent for path in (folder / "evaluations").glob(f"*/*/{SUMMARY}"))
    if not found:
        raise RunError(f"'{folder}': no evaluation of it was finished; run `unmask evaluate {name} --protocol NAME`.")
    return [Finished.read(path) for path in found]


def check_same(evaluations: Sequence[Finished]) -> None:
    """Raise RunError unless all evaluations had the same protocol on the same problems."""
    first = evaluations[0].summary
    for other in (evaluation.summary for evaluation in evaluations[1:]):
        for key, what in (("protocol_hash", "protocol"), ("data_hash", "problems"), ("n", "number of problems")):
            if other[key] != first[key]:
                raise RunError(
                    f"compare: '{first['folder']}' and '{other['folder']}' differ in their {what} "
                    f"({_short(first, key)} and {_short(other, key)}), so their numbers are not of one kind; evaluate "
                    f"both with --protocol {first['protocol']} --problems {first['n']}."
                )


def _short(summary: dict[str, Any], key: str) -> str:
    value = str(summary[key])[:12]
    return f"{summary['protocol']} {value}" if key == "protocol_hash" else value


def difference(one: Finished, other: Finished, *, seed: int = 0) -> Interval:
    """Return by how much `other` is right more often than `one`, problem by problem, with its interval at 95 %."""
    check_same([one, other])
    samples = min(one.summary["samples"], other.summary["samples"])
    return paired_interval(other.exact_P - one.exact_P, samples=samples, seed=seed)


def results_table(evaluations: Sequence[Finished]) -> Table:
    """Return the table of evaluations under one protocol, one a column; RunError where there are two protocols."""
    check_same(evaluations)
    summaries = [evaluation.summary for evaluation in evaluations]
    first, most = summaries[0], max(summary["samples"] for summary in summaries)
    table = Table(title=f"{first['protocol']} ({first['protocol_hash'][:12]}), n = {first['n']}")
    table.add_column("")
    for evaluation in evaluations:
        table.add_column(evaluation.label, justify="right", overflow="fold")

    def row(name: str, shown: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *map(shown, summaries))

    row("exact", lambda s: with_error(s["exact"], s["stderr"]))
    if most > 1:
        row("seeds", lambda s: str(s["samples"]))
        row("stderr over seeds", lambda s: "" if s["stderr_seeds"] is None else f"{s['stderr_seeds']:.3f}")
        for k in sizes(most)[1:]:
            table.add_row(f"pass@{k}", *(_estimated(s["pass"].get(str(k))) for s in summaries))
        row(f"majority@{most}", lambda s: _estimated(s["majority"] if s["samples"] == most else None))
    row("mean reward", lambda s: _estimated(s["reward"]))
    row("NFE", lambda s: f"{s['nfe']:.1f}")
    row("length", lambda s: f"{s['length']:.1f}")
    row("tokens/s", lambda s: f"{s['tokens_per_s']:.0f}")
    for name, what in zip(SHARES, ("truncated", "unparsable", "timed out", "not judged"), strict=True):
        table.add_row(what, *(f"{100 * s[name]:.1f} %" for s in summaries))
    return table


def _estimated(value: dict[str, Any] | None) -> str:
    return "" if value is None else with_error(value["mean"], value["stderr"])


def with_error(mean: float, stderr: float | None) -> str:
    """Return a number with its standard error, where it has one."""
    return f"{mean:.3f}" if stderr is None else f"{mean:.3f} ± {stderr:.3f}"


def verdict_line(one: Finished, other: Finished) -> str:
    """Return in a sentence whether `other` is better than `one`."""
    found = difference(one, other)
    numbers = f"{100 * found.difference:+.1f} points, 95 % interval [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{other.label} against {one.label}: {found.verdict} ({numbers})"
