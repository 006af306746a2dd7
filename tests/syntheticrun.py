"""Folders of runs that were never run, in the real format: what the report and the viewer are tried on."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.loading import dump_recipe, load_recipe
from unmask.rewards.scoring import RewardTable
from unmask.rl.records import Records, write_rollouts
from unmask.rl.runfolder import manifest, write_atomically, write_json
from unmask.rollouts.trajectory import EDITED, GIVEN, NEVER, PAD, SAMPLED, Lifetimes, Trajectory
from unmask.rollouts.worker import RolloutBatch

TOKENIZER = byte_tokenizer()
EOS, MASK = TOKENIZER.eos_token_id, TOKENIZER.mask_token_id
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;]]>"


def trajectory(texts: Sequence[str], canvas: int, key: str, *, hard: bool = False) -> Trajectory:
    """Return rollouts that end with these texts, decided in a random order two at a time.

    With `hard`, every rollout begins with a given token, holds one written by a rule, has taken some back, and its
    canvas has grown by four positions on the way.
    """
    rows, steps, past = len(texts), math.ceil(canvas / 2) + 1, []
    tokens_BL = torch.full((rows, canvas), MASK)
    source_BL, born_BL = torch.full((rows, canvas), PAD), torch.full((rows, canvas), NEVER)
    rank_BL, logprob_BL = torch.full((rows, canvas), NEVER), torch.zeros(rows, canvas)
    appeared_BL = torch.zeros(rows, canvas, dtype=torch.long)
    length_BS = torch.full((rows, steps + 1), canvas)
    for row, text in enumerate(texts):
        rng = random.Random(f"{key}/{row}")
        ids = [*text.encode()[: canvas - 1], EOS]
        order = rng.sample(range(len(ids)), len(ids))
        for place, position in enumerate(order):
            born, rank = divmod(place, 2)
            tokens_BL[row, position], source_BL[row, position] = ids[position], SAMPLED
            born_BL[row, position], rank_BL[row, position] = born, rank
            logprob_BL[row, position] = math.log(rng.uniform(0.05, 1.0))
        if hard:
            late = [p for p in range(1, len(ids)) if born_BL[row, p] >= 3]
            for position in late[:3]:
                died = int(born_BL[row, position]) - 1
                past.append((row, position, rng.randrange(97, 123), died - 1, died, 0, math.log(0.3)))
            source_BL[row, late[-1]] = EDITED
            logprob_BL[row, late[-1]] = 0.0
            rank_BL[row, late[-1]] = NEVER
            tokens_BL[row, 0], source_BL[row, 0], born_BL[row, 0] = ids[0], GIVEN, NEVER
            rank_BL[row, 0], logprob_BL[row, 0] = NEVER, 0.0
            length_BS[row, :2] = canvas - 4
            appeared_BL[row, 4:8] = 2
            born_BL[row, 4:8] = torch.where(source_BL[row, 4:8] == PAD, NEVER, born_BL[row, 4:8].clamp(min=2))
            past = [entry for entry in past if entry[0] != row or not 4 <= entry[1] < 8]
    made = Trajectory(
        prompt_BQ=torch.zeros(rows, 1, dtype=torch.long),
        prompt_mask_BQ=torch.ones(rows, 1, dtype=torch.bool),
        tokens_BL=tokens_BL,
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=rank_BL,
        logprob_BL=logprob_BL,
        steps_B=torch.tensor([int(row.max()) + 1 for row in born_BL]),
        rollout_id_B=torch.arange(rows),
        temperature=1.0,
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
    )
    if not hard:
        return made
    columns = [torch.tensor(column) for column in zip(*past, strict=True)]
    return replace(made, retracted=Lifetimes(*columns), length_BS=length_BS, appeared_BL=appeared_BL)


def batch(texts: Sequence[str], prompts: Sequence[str], group: int, canvas: int, key: str, **how: Any) -> RolloutBatch:
    """Return scored rollouts: `group` texts a prompt; rewards, outcomes and advantages are drawn from `key`."""
    rng = random.Random(f"{key}/rewards")
    outcome = [rng.choice(("ok", "ok", "wrong", "wrong", "unparsable")) for _ in texts]
    right = torch.tensor([float(code == "ok") for code in outcome])
    form = torch.tensor([float(rng.random() < 0.7) for _ in texts])
    total_B = right + 0.1 * form
    return RolloutBatch(
        trajectory=trajectory(texts, canvas, key, **how),
        rows=[{"prompt": prompts[i // group]} for i in range(len(texts))],
        completions=list(texts),
        completion_ids=[list(text.encode()) for text in texts],
        group_B=torch.arange(len(prompts)).repeat_interleave(group),
        rewards=RewardTable(
            names=("arithmetic", "answer_format"),
            value_BR=torch.stack([right, form], dim=1),
            weight_R=torch.tensor([1.0, 0.1]),
            total_B=total_B,
            outcome=outcome,
        ),
        advantage_B=total_B - total_B.view(-1, group).mean(1).repeat_interleave(group),
    )


def chain(rng: random.Random, canvas: int) -> str:
    """Return a text that looks like the tiny model's: equations, then an answer."""
    text = "".join(
        f"{rng.choice('abcdef')}{rng.choice('+-')}{rng.randrange(10)}={rng.randrange(10)}\n" for _ in range(40)
    )
    return text[: canvas - 8] + f"#### {rng.randrange(10)}"


def write_run(
    folder: Path,
    *,
    steps: int,
    every: int,
    prompts: int = 2,
    group: int = 4,
    canvas: int = 32,
    seed: int = 0,
    hostile: bool = False,
    hard: bool = False,
) -> Path:
    """Write a whole run: recipe, manifest, metrics, timings, summary, and rollouts of every `every`-th batch."""
    recipe = load_recipe("quickstart", [f"optim.steps={steps}", "evaluation.every=25", f"run.seed={seed}"])
    write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    write_json(folder / "manifest.json", manifest(device="cpu", dtype="float32", seeds={"run": seed}, ranks=1))
    records = Records(folder)
    for step in range(steps + 1):
        for values in metrics(step, steps, seed):
            records.write(step, values)
    for step in range(0, steps, every):
        rng = random.Random(f"{seed}/{step}/texts")
        asked = [f"{rng.randrange(10)} a+{step} b-{number}" for number in range(prompts)]
        texts = [chain(rng, canvas) for _ in range(prompts * group)]
        if hostile:
            texts[0], asked[0] = HOSTILE[: canvas - 1], HOSTILE
        made = batch(texts, asked, group, canvas, f"{seed}/{step}", hard=hard)
        write_rollouts(folder, made, step, 0)
    results = {
        name: {"exact": exact, "stderr": 0.03, "reward": exact, "nfe": 23.8, "length": 46.0, "n": 256}
        for name, exact in (("before", 0.61), ("after", 0.83))
    }
    write_json(folder / "before.json", results["before"])
    write_json(
        folder / "summary.json", {"run": folder.name, "steps": steps, "n": 256, "wall_s": 3.1 * steps, **results}
    )
    return folder


def metrics(step: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """Return the records of one step as the trainer writes them: an evaluation every 25 steps, an update otherwise."""
    rng = random.Random(f"{seed}/{step}/metrics")
    found: list[dict[str, Any]] = []
    grown = 0.6 + 0.25 * step / steps
    if step:
        reward = grown + rng.gauss(0, 0.03)
        shares = {"ok": reward, "wrong": 0.9 - reward, "unparsable": 0.1, "timeout": 0.0, "error": 0.0}
        found.append(
            {
                "loss": rng.gauss(0, 1e-3),
                "grad_norm": rng.lognormvariate(-2, 0.4),
                "learning_rate": 1e-3,
                "advantage/zero_share": 0.3 + 0.1 * rng.random(),
                "reward/arithmetic": reward,
                "truth/exact": reward - 0.05,
                "reward/answer_format": 0.9 + 0.05 * rng.random(),
                "reward/total": reward + 0.09,
                **{f"outcome/{name}": value for name, value in shares.items()},
                "rollout/nfe": 23 + rng.random(),
                "rollout/length": 45 + rng.random(),
                "rollout/logprob": -0.04,
                "train/ratio_max_deviation": rng.lognormvariate(-3, 0.5),
                "train/ratio_p01": 0.97 - 0.01 * rng.random(),
                "train/ratio_p50": 1.0,
                "train/ratio_p99": 1.03 + 0.01 * rng.random(),
                "train/clip_fraction": 0.02,
                "train/kl": 0.01 * step / steps,
                "train/kl_old": 1e-4 * rng.random(),
                "train/entropy": 0.05,
                "train/mismatch_mean": 1e-6 * rng.random(),
                "train/mismatch_p50": 5e-7,
                "train/mismatch_p99": 4e-6,
                "train/mismatch_max": 1e-5 * rng.random(),
                "train/coefficient_max": 0.002,
                "train/tokens": 563,
                "time/rollout_s": 2 + rng.random(),
                "time/tokens_per_s": 2300 + 50 * rng.gauss(0, 1),
                "time/update_s": 0.5,
                "time/step_s": 2.6 + rng.random(),
                "time/memory_gb": 1.2 + 0.01 * rng.random(),
            }
        )
    if step % 25 == 0:
        found.append(
            {
                "eval/n": 256,
                "eval/exact": grown,
                "eval/stderr": math.sqrt(grown * (1 - grown) / 256),
                "eval/nfe": 23.8,
                "eval/reward": grown,
                "eval/length": 46.0,
                "eval/reward/arithmetic": grown,
                "eval/truth/exact": grown - 0.05,
                "time/eval_wall_s": 7.4,
                "time/eval_tokens_per_s": 1990.0,
            }
        )
    return found
