"""Report of a long run, and the viewer on many rollouts: seconds, sizes, and first paint in headless Chromium.

python benchmarks/viewer.py [--steps 2000] [--rollouts 10000] [--repeats 5] [--json FILE]

The run is synthetic in the real format (tests/syntheticrun.py); needs playwright and a Chromium. The report's time is
that of the command, its imports included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import mean_and_error, save

sys.path.append(str(Path(__file__).parents[1] / "tests"))
GROUP, PROMPTS = 8, 32


def timed(words: list[str]) -> float:
    """Return the wall seconds of a command of unmask."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "unmask.rl.cli", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def painted(file: Path) -> dict[str, float]:
    """Return the milliseconds from navigation to first contentful paint, and to the first group's canvases."""
    from browser import opened

    with opened(file) as tab:
        ready = tab.evaluate("performance.getEntriesByName('ready')[0].startTime")
        paints = tab.evaluate("performance.getEntriesByType('paint').map(entry => [entry.name, entry.startTime])")
    return {"first_contentful_paint_ms": dict(paints)["first-contentful-paint"], "first_group_ms": ready}


def main() -> None:
    """Write the run, time the commands and the page, and save the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    from syntheticrun import write_run

    batches = -(-arguments.rollouts // (GROUP * PROMPTS))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "long"
        every = -(-arguments.steps // batches)
        write_run(run, steps=arguments.steps, every=every, prompts=PROMPTS, group=GROUP, canvas=64)
        reports = [timed(["report", str(run)]) for _ in range(arguments.repeats)]
        viewing = timed(["view", str(run), "--limit", str(2 * arguments.rollouts)])
        paints = [painted(run / "view.html") for _ in range(arguments.repeats)]
        stored = len(list((run / "rollouts").iterdir())) * GROUP * PROMPTS
        sizes = {name: (run / name).stat().st_size / 1e6 for name in ("report.html", "view.html")}
    result = {
        "steps": arguments.steps,
        "rollouts": stored,
        "report_s": mean_and_error(reports),
        "report_mb": sizes["report.html"],
        "view_s": viewing,
        "view_mb": sizes["view.html"],
        **{name: mean_and_error([paint[name] for paint in paints]) for name in paints[0]},
        "slowest": {"report_s": max(reports), "first_group_ms": max(paint["first_group_ms"] for paint in paints)},
    }
    for name, value in result.items():
        print(name, value)
    print(f"wrote {save('viewer', result, arguments.json, seeds={'run': 0})}")


if __name__ == "__main__":
    main()
