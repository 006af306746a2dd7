"""The quickstart recipe over several seeds: held-out exact rate before and after, and how long it takes.

python benchmarks/quickstart.py [--seeds 3] [--recipe quickstart.yaml] [--json FILE] [KEY.PATH=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import mean_and_error, save


def main() -> None:
    """Run the recipe once a seed, each in a process of its own, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", default="quickstart.yaml")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "summary.json"
            command = [sys.executable, "-m", "unmask.rl.cli", "train", arguments.recipe, f"run.seed={seed}"]
            command += [f"run.directory={folder}", *arguments.overrides, "--json", str(output)]
            subprocess.run(command, check=True)
            summary = json.loads(output.read_text())
        run = {"seed": seed, "wall_s": summary["wall_s"], "n": summary["n"]}
        for name in ("before", "after"):
            run[name] = {key: summary[name][key] for key in ("exact", "stderr", "reward", "nfe", "length")}
        runs.append(run)
        print(
            f"seed {seed}: {run['before']['exact']:.3f} -> {run['after']['exact']:.3f} in {run['wall_s']:.0f} s",
            flush=True,
        )
    result = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "runs": runs,
        "before": mean_and_error([run["before"]["exact"] for run in runs]),
        "after": mean_and_error([run["after"]["exact"] for run in runs]),
        "gain": mean_and_error([run["after"]["exact"] - run["before"]["exact"] for run in runs]),
        "wall_s": mean_and_error([run["wall_s"] for run in runs]),
    }
    target = save("quickstart", result, arguments.json, seeds={"first": 0, "count": arguments.seeds})
    print(json.dumps({key: result[key] for key in ("before", "after", "gain", "wall_s")}, indent=1))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
