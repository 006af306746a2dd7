"""A real small autoregressive model becomes a denoiser: loss on held-out problems before and after a short SFT.

python benchmarks/converting.py MODEL [--steps 40] [--batches 8] [--json FILE] [KEY.PATH=VALUE ...]

MODEL is a folder or .gguf file that `unmask convert` takes; docs/converting.md says where to get SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from common import mean_and_error, save

from unmask.policies.convert import convert
from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import load_denoiser
from unmask.recipes.loading import load_recipe
from unmask.recipes.registry import SLOTS
from unmask.recipes.schema import SftRecipe
from unmask.rl import run
from unmask.rl.sft import SftBatches, Source

TASK: dict[str, Any] = {"name": "arithmetic", "operations": [1, 2]}
BATCH, CANVAS, HALF_LIFE = 4, 32, 0.5
# What is converted how, and which tokens training hides.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "full, exact": ({}, "exact"),
    "full, late": ({}, "late"),
    "blocks of 8, shift kept, late": ({"attention": "block_causal", "block_length": 8, "logit_shift": 1}, "late"),
}


@torch.no_grad()
def heldout(denoiser: Denoiser, mask: str, batches: int) -> dict[str, float]:
    """Return the nats a hidden token of held-out solutions, mean over batches that are the same before and after."""
    source = Source("arithmetic", SLOTS["task"].build(TASK)("heldout", seed=0), 1.0, CANVAS)
    options = {"batch": BATCH, "steps": batches, "seed": 7, "mask": mask, "half_life": HALF_LIFE, "full_canvas": 0.0}
    data = SftBatches([source], denoiser.tokenizer, denoiser.family, **options)
    losses = []
    for index in range(len(data)):
        item = data[index]
        logits_KV = denoiser.train_logits(
            item["input_ids"], item["clean_ids"], padding_mask_BT=item["padding_mask"], positions_BT=item["scored"]
        )
        nll_K = -logits_KV.log_softmax(-1).gather(-1, item["target"][:, None])[:, 0]
        losses.append((nll_K * item["weight"]).sum().item())
    return mean_and_error(losses)


def measure(name: str, model: str, folder: Path, steps: int, batches: int, overrides: list[str]) -> dict[str, Any]:
    """Convert, train and return the losses before and after under both ways of hiding."""
    options, mask = CASES[name]
    denoiser = convert(model, folder / "converted", **options)
    before = {kind: heldout(denoiser, kind, batches) for kind in ("exact", "late")}
    recipe = {
        "kind": "sft",
        "name": "trained",
        "model": {"path": str(folder / "converted")},
        "tasks": [{"task": TASK, "canvas": CANVAS}],
        "sft": {"batch": BATCH, "mask": mask, "half_life": HALF_LIFE, "full_canvas": 0.0},
        "optim": {"lr": 1.0e-4, "steps": steps, "warmup": min(4, steps - 1)},
        "evaluation": {"problems": 1},
        "run": {"directory": str(folder), "save_every": 0},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(str(folder / "sft.yaml"), overrides)
    assert isinstance(loaded, SftRecipe)
    started = time.monotonic()
    run.sft(loaded)
    trained = load_denoiser(str(folder / "trained" / "model"))
    return {
        "case": name,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "training_and_evaluation_s": time.monotonic() - started,
        "before": before,
        "after": {kind: heldout(trained, kind, batches) for kind in ("exact", "late")},
    }


def main() -> None:
    """Measure every case and print the table of docs/converting.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batches", type=int, default=8, help="held-out batches")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", help="keys of the sft recipe")
    arguments = parser.parse_intermixed_args()
    rows = []
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            shape = (arguments.steps, arguments.batches, arguments.overrides)
            rows.append(measure(name, arguments.model, Path(folder), *shape))
    print("| converted to, masks | before: exact | after | before: late | after |")
    print("|---|---|---|---|---|")
    for row in rows:
        found = [row[when][kind] for kind in ("exact", "late") for when in ("before", "after")]
        cells = [f"{loss['mean']:.2f} ± {loss['stderr']:.2f}" for loss in found]
        print(f"| {row['case']} | {' | '.join(cells)} |")
    sizes = {"steps": arguments.steps, "batch": BATCH, "canvas": CANVAS, "heldout_batches": arguments.batches}
    result = {"model": Path(arguments.model).name, "shape": sizes, "rows": rows}
    print(f"wrote {save('converting', result, arguments.json, seeds={'run': 0, 'heldout': 7})}")


if __name__ == "__main__":
    main()
