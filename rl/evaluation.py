"""`unmask evaluate --protocol`: a policy's rollouts under a protocol, part by part, so that a killed one goes on."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from ..policies.denoiser import Denoiser
from ..recipes.protocols import Protocol, digest, load_protocol, recipe_hash
from ..recipes.registry import SLOTS, RecipeError
from ..recipes.schema import Recipe
from ..recipes.sources import prompted
from ..recipes.tasks import Row
from ..rewards import Scorer, ScoringConfig, build_rewards
from ..rewards.mathematics import parse_number
from ..rollouts.sampler import build_sampler
from ..rollouts.worker import RolloutBatch, RolloutWorker
from .evaluate import EVALUATION_STEP, heldout_rows
from .manifests import fingerprint, policy_manifest
from .records import rollout_table
from .runfolder import git_commit, write_json
from .targets import Target, open_base, open_target, target_of

logger = logging.getLogger(__name__)
REQUEST, MANIFEST, ROLLOUTS = "evaluation.json", "manifest.json", "rollouts"
PART_ROWS = 32  # rollouts of a part at least, so that small batches do not make thousands of files
# A failure is counted and stated; only where judging itself is broken the evaluation stops.
LIMITS = {"timeout": 1.0, "error": 0.05}


@dataclass(frozen=True)
class Request:
    """What is evaluated and how often: all that `unmask reproduce` needs beside the weights.

    `policy` is `trained`, `base` or `model`; `places` say where a copy of the protocol's data lies; sample j of a
    problem is drawn under seed `seed + j`.
    """

    target: str
    protocol: str
    policy: str = "model"
    overrides: tuple[str, ...] = ()
    places: dict[str, str] = field(default_factory=dict)
    samples: int = 1
    seed: int = 0
    problems: int | None = None
    allow_code_execution: bool = False

    def resolved(self) -> Protocol:
        """Return the protocol."""
        return load_protocol(self.protocol, dict(self.places))

    @staticmethod
    def read(path: Path) -> Request:
        """Return what a JSON file holds under `request`."""
        values = json.loads(path.read_text(encoding="utf-8"))["request"]
        return Request(**{**values, "overrides": tuple(values["overrides"])})


def split_overrides(overrides: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return (overrides of how the model is run, places of the data); RecipeError for one that a protocol fixes."""
    running, places = [], {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in ("task.path", "task.heldout_path"):
            places[key.removeprefix("task.")] = value
        elif key.startswith(("model.", "scoring.")) or key == "rollout.micro_batch":
            running.append(override)
        else:
            raise RecipeError(
                f"override '{override}': a protocol fixes it; write a file with `like: NAME` and pass it to --protocol "
                "(model.*, scoring.*, rollout.micro_batch, task.path and task.heldout_path may be set)."
            )
    return tuple(running), places


def protocol_rows(protocol: Protocol, problems: int | None) -> list[Row]:
    """Return the held-out rows with the prompts that a protocol writes: template, and worked examples as turns."""
    build = SLOTS["task"].build(protocol.task)
    rows = build("heldout", seed=0)
    count = problems or protocol.problems or rows.size
    if count is None:
        raise RecipeError(f"protocol '{protocol.name}': its task has no end; set problems, or pass --problems.")
    where = f"protocol '{protocol.name}'"
    examples: list[dict[str, str]] = []
    if protocol.shots:
        train = build("train", seed=0)
        for row in (prompted(train.row(index), protocol.template, None, where) for index in range(protocol.shots)):
            if "reference" not in row:
                raise RecipeError(f"{where}: shots need a column 'reference'; the task's rows have {', '.join(row)}.")
            examples += [*_turns(row["prompt"]), {"role": "assistant", "content": row["reference"]}]
    found = [prompted(row, protocol.template, None, where) for row in heldout_rows(rows, count)]
    return [{**row, "prompt": [*examples, *_turns(row["prompt"])]} if examples else row for row in found]


def _turns(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def protocol_worker(protocol: Protocol, recipe: Recipe, denoiser: Denoiser, *, allow_code: bool) -> RolloutWorker:
    """Return the worker that decodes and scores as a protocol says."""
    entries = [entry.model_dump() for entry in protocol.rewards]
    scoring = {**recipe.scoring.model_dump(), "limits": LIMITS}
    return RolloutWorker(
        denoiser=denoiser,
        tokenizer=denoiser.tokenizer,
        sampler=build_sampler(protocol.sampler.model_dump(), temperature=protocol.temperature),
        scorer=Scorer(
            build_rewards(entries, allow_code_execution=allow_code),
            ScoringConfig(**scoring, allow_code_execution=allow_code),
        ),
        group=1,
        canvas=protocol.canvas,
        prompt_limit=protocol.prompt_limit,
        seed=0,
        micro_batch=recipe.rollout.micro_batch,
        start=SLOTS["canvas"].build(protocol.start, "start"),
        prefill=protocol.prefill,
    )


@dataclass
class Evaluating:
    """A policy opened for a request: its worker, its problems, and what its results are filed under."""

    request: Request
    protocol: Protocol
    recipe: Recipe
    denoiser: Denoiser
    worker: RolloutWorker
    rows: list[Row]
    facts: dict[str, Any]

    @staticmethod
    def open(request: Request) -> Evaluating:
        """Load the weights and the problems."""
        protocol = request.resolved()
        opened = open_base if request.policy == "base" else open_target
        recipe, denoiser = opened(request.target, request.overrides)
        worker = protocol_worker(protocol, recipe, denoiser, allow_code=request.allow_code_execution)
        rows = protocol_rows(protocol, request.problems)
        facts = {
            "protocol_hash": protocol.hash,
            "data_hash": digest(rows),
            "weights": fingerprint(denoiser.model),
            "problems": len(rows),
            "samples": request.samples,
            "seed": request.seed,
            "rows": worker.micro_batch,
            "device": denoiser.device.type,
            "attention_kernel": denoiser.base.config._attn_implementation,
            "git_commit": git_commit(),
        }
        return Evaluating(request, protocol, recipe, denoiser, worker, rows, facts)

    def folder(self) -> Path:
        """Return where the results go by default: the same for the same facts, so that a killed one is continued."""
        found = target_of(self.request.target)
        root = Path(self.recipe.run.directory).expanduser() / "evaluations"
        if found.run is not None and self.request.policy == "trained":
            root = found.run / "evaluations"
        return root / _label(found, self.request, self.recipe) / f"{self.protocol.name}-{digest(self.facts)[:8]}"

    def begin(self, folder: Path) -> None:
        """Write what is asked and on what it runs."""
        resolved = self.protocol.model_dump(mode="json")
        write_json(folder / REQUEST, {"request": asdict(self.request), "protocol": resolved, "facts": self.facts})
        record = policy_manifest(
            self.denoiser,
            seeds={"first": self.request.seed, "last": self.request.seed + self.request.samples - 1},
            batch_size={"rollout_rows": self.worker.micro_batch},
            protocol=self.protocol.name,
            protocol_hash=self.facts["protocol_hash"],
            data_hash=self.facts["data_hash"],
            recipe_hash=recipe_hash(self.recipe),
            weights=self.facts["weights"],
            ranks=int(os.environ.get("WORLD_SIZE", "1")),
            model=self.recipe.model.path,
            target=self.request.target,
            policy=self.request.policy,
        )
        write_json(folder / MANIFEST, record)

    def parts(self) -> list[tuple[str, int, int, int]]:
        """Return (file name, seed, first problem, end) of every part."""
        size = self.worker.micro_batch * max(1, PART_ROWS // self.worker.micro_batch)
        return [
            (f"seed-{seed:06}-from-{start:06}.parquet", seed, start, min(start + size, len(self.rows)))
            for seed in range(self.request.seed, self.request.seed + self.request.samples)
            for start in range(0, len(self.rows), size)
        ]

    def write(self, folder: Path, *, rank: int, ranks: int, done: Callable[[int], None]) -> None:
        """Roll out and score this rank's parts that are not there yet; each file is whole or absent."""
        (folder / ROLLOUTS).mkdir(parents=True, exist_ok=True)
        for name, seed, start, end in self.parts()[rank::ranks]:
            path = folder / ROLLOUTS / name
            if not path.is_file():
                worker = replace(self.worker, seed=seed)
                batch = worker.collect(self.rows[start:end], step=EVALUATION_STEP, first_id=start)
                temporary = path.with_suffix(".tmp")
                pyarrow.parquet.write_table(pyarrow.table(part_table(batch, seed)), temporary)
                os.replace(temporary, path)
            done(end - start)


def _label(found: Target, request: Request, recipe: Recipe) -> str:
    if request.policy == "trained":
        return found.checkpoint.name if found.checkpoint is not None else "trained"
    return re.sub(r"[^A-Za-z0-9._-]+", "_", recipe.model.path).strip("_") or "model"


def part_table(batch: RolloutBatch, seed: int) -> dict[str, Any]:
    """Return a batch as columns: those of a run's rollouts, and its problems, seed, answers, ends and seconds."""
    trajectory = batch.trajectory
    ended_B = torch.isin(trajectory.tokens_BL, torch.tensor(trajectory.eos_token_ids)).any(dim=1)
    seconds = batch.metrics["time/rollout_s"] / len(batch)
    return rollout_table(batch, EVALUATION_STEP) | {
        "problem": batch.group_B.tolist(),
        "seed": [seed] * len(batch),
        "length": list(map(len, batch.completion_ids)),
        "truncated": (~ended_B).tolist(),
        "answer": list(answers_of(batch)),
        "seconds": [seconds] * len(batch),
    }


def answers_of(batch: RolloutBatch) -> Iterator[str | None]:
    """Yield the answer that the first reward found in each completion, numbers in one form; None where it has none."""
    rewards = batch.rewards
    named = f"{rewards.names[0]}/extracted"
    for answer in rewards.extra.get("extracted", rewards.extra.get(named, [None] * len(batch))):
        number = None if answer is None else parse_number(str(answer))
        yield answer if answer is None else str(answer) if number is None else str(number)
