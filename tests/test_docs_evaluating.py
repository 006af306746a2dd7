"""docs/evaluating.md: its commands run as they stand, and its tables are the benchmarks' results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.recipes.protocols import load_protocol, shipped_protocols

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "evaluating.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]

KEYS = ("other_tokens", "other_outcome")


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["result"]


def test_the_tables_are_the_results() -> None:
    coverage = result("coverage")
    for row in coverage["rows"]:
        numbers = f"{100 * row['coverage']:.1f} % | {100 * row['without_pairs']:.1f} %"
        assert f"| {row['rates'][0]}, {row['rates'][1]} | {row['n']} | {row['samples']} | {numbers} |" in TEXT
    assert f"{coverage['repeats']:,} comparisons" in TEXT
    for dtype, sizes in result("batch_spread")["dtypes"].items():
        for size, row in sizes.items():
            shares = " | ".join(f"{100 * row[key]['mean']:.1f} ± {100 * row[key]['stderr']:.1f} %" for key in KEYS)
            exact, gap = f"{row['exact']:.3f} ± {row['stderr']:.3f}", f"{row['largest_logprob_gap']:.1e}"
            assert f"| {dtype} | {size} | {exact} | {shares} | {gap} |" in TEXT


def test_the_protocol_of_ones_own(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    mine, base = load_protocol(str(tmp_path / "mine.yaml")), load_protocol("gsm8k@d1")
    assert (mine.sampler.schedule["per_step"], mine.task, mine.hash == base.hash) == (1, base.task, False)
    names = {name for name in re.findall(r"\b\w+@\w+(?:-\w+)*", TEXT) if not name.endswith("@k")}
    assert names <= {*shipped_protocols(), "gsm8k@mine"}


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path) -> None:
    assert len(COMMANDS) == 8
    for command in COMMANDS:
        assert command.startswith("unmask ")
        # The shell's part of it: the folder that `evaluate` made is named by a pattern.
        run = subprocess.run(
            ["bash", "-c", f'unmask() {{ "{sys.executable}" -m unmask.rl.cli "$@"; }}; {command}'],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
