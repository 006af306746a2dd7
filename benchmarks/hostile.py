"""Hostile completions through every reward: outcomes, the worst row, and what is left of processes.

python benchmarks/hostile.py [--completions 10000] [--json FILE]

Completions come from tests/hostiletexts.py (hypothesis, seeded): fuzzed LaTeX, towers of powers, huge integers, deep
nesting, control characters, a megabyte of one thing, Unicode, programs. A process judges 500 of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from common import save

sys.path.append(str(Path(__file__).parents[1] / "tests"))
BATCH, PROCESS = 50, 500


def one(number: int) -> None:
    """Judge one process's share and print what became of it."""
    from test_hostile import check, survive

    found = survive(PROCESS // BATCH, BATCH, number)
    check(found)
    print(json.dumps(found))


def main() -> None:
    """Judge all completions and write the sums and the worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=10_000)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        one(arguments.one)
        return
    codes: dict[str, Counter[str]] = {}
    slowest: Counter[str] = Counter()
    total: Counter[str] = Counter()
    share = 0.0
    for number in range(-(-arguments.completions // PROCESS)):
        command = [sys.executable, __file__, "--one", str(number)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for name, outcomes in found["codes"].items():
            codes.setdefault(name, Counter()).update(outcomes)
        for name, seconds in found["slowest_in_process_s"].items():
            slowest[name] = max(slowest[name], seconds)
        total.update({key: found[key] for key in ("completions", "rows_in_the_pool", "workers_replaced")})
        share = max(share, found["worst_share_of_a_limit"])
        print(f"{total['completions']} completions, worst row {share:.2f} of its limit", flush=True)
    result = {
        **total,
        "worst_share_of_a_limit": share,
        "worst_row_of_rewards_in_process_s": dict(slowest),
        "outcomes": {name: dict(outcomes) for name, outcomes in sorted(codes.items())},
        "processes_left": 0,
    }
    print(json.dumps(result["outcomes"], indent=1))
    print(f"wrote {save('hostile', result, arguments.json, seeds={'completions': 0})}")


if __name__ == "__main__":
    main()
