"""The rollout worker: task rows in, scored trajectories out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..policies.tokenizers import prompt_ids
from ..recipes.registry import RecipeError
from .caches import check_cache
from .canvases import Frame, Start
from .engine import denoise
from .forward import LogitSource
from .noise import uniform
from .planned import check_planner
from .sampler import Sampler
from .trajectory import EDITED, Trajectory

if TYPE_CHECKING:
    from ..rewards.scoring import RewardTable, Scoring

Row = dict[str, Any]
Scorer = Callable[[list[Row], list[Any], list[Any], list[list[int]]], "RewardTable"]


@runtime_checkable
class ChunkScorer(Protocol):
    """A scorer that takes a batch in chunks, so that slow rewards run while the next chunk is denoised."""

    def begin(self) -> Scoring: ...

    def finish(self, scoring: Scoring) -> RewardTable: ...


@dataclass
class RolloutBatch:
    """Rollouts with everything that judges them; entry i of every field belongs to rollout i.

    `group_B` numbers the prompts, `advantage_B` is filled by the trainer, `metrics` are means over the batch.
    """

    trajectory: Trajectory
    rows: list[Row]
    completions: list[str]
    completion_ids: list[list[int]]
    group_B: Tensor
    rewards: RewardTable
    advantage_B: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.trajectory)

    def with_advantage(self, advantage_B: Tensor) -> RolloutBatch:
        """Return the batch with its advantages."""
        return replace(self, advantage_B=advantage_B)


@dataclass
class RolloutWorker:
    """Denoises `group` completions a prompt on a canvas of `canvas` tokens and scores them.

    `micro_batch` rollouts share a forward, and those of a group their first; it changes speed and memory, never a
    rollout. `prompt_limit` is the longest prompt in tokens, checked before anything is sampled. Raises RecipeError for
    a cache that the denoiser cannot keep.
    """

    denoiser: LogitSource
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    scorer: Scorer
    group: int
    canvas: int
    prompt_limit: int
    seed: int
    micro_batch: int = 64
    start: Callable[..., Start] | None = None

    def __post_init__(self) -> None:
        check_cache(self.sampler.cache, self.denoiser)
        check_planner(self.sampler, self.denoiser)

    def collect(self, rows: Sequence[Row], *, step: int, first_id: int = 0) -> RolloutBatch:
        """Return `len(rows) * group` scored rollouts; rollout ids count from `first_id * group`.

        `step` keys the noise together with the rollout ids; `first_id` is the global index of the first prompt, so that
        ranks which share a batch draw what one process would.
        """
        repeated = [row for row in rows for _ in range(self.group)]
        prompts = [row.get("prompt") for row in repeated]
        scoring = self.scorer.begin() if isinstance(self.scorer, ChunkScorer) else None
        completion_ids: list[list[int]] = []
        completions: list[str] = []

        def judge(part: Trajectory) -> None:
            ids, texts = self.decode(part)
            chunk = slice(len(completions), len(completions) + len(texts))
            completion_ids.extend(ids)
            completions.extend(texts)
            if scoring is not None:
                scoring.add(repeated[chunk], prompts[chunk], texts, ids)

        started = time.perf_counter()
        trajectory = self.rollout(rows, step=step, first_id=first_id, finished=judge)
        seconds = time.perf_counter() - started
        if isinstance(self.scorer, ChunkScorer) and scoring is not None:
            rewards = self.scorer.finish(scoring)
        else:
            rewards = self.scorer(repeated, prompts, completions, completion_ids)
        group_B = torch.arange(len(rows)).repeat_interleave(self.group) + first_id
        tokens = sum(map(len, completion_ids))
        ended_B = torch.isin(trajectory.tokens_BL, torch.tensor(trajectory.eos_token_ids)).any(dim=1)
        metrics = {
            "rollout/nfe": trajectory.steps_B.double().mean().item(),
            "rollout/length": tokens / max(len(repeated), 1),
            "rollout/ended": ended_B.double().mean().item(),
            "rollout/logprob": trajectory.logprob_BL.sum().item() / max(int(trajectory.action_BL("all").sum()), 1),
        }
        if trajectory.retracted is not None:
            metrics["rollout/retracted"] = len(trajectory.retracted.row_R) / max(len(repeated), 1)
            metrics["rollout/edited"] = int((trajectory.source_BL == EDITED).sum()) / max(len(repeated), 1)
        batch = RolloutBatch(trajectory, repeated, completions, completion_ids, group_B, rewards, metrics=metrics)
        batch.metrics["time/rollout_s"] = seconds
        batch.metrics["time/tokens_per_s"] = tokens / max(seconds, 1e-9)
        return batch

    def rollout(
        self,
        rows: Sequence[Row],
        *,
        step: int,
        first_id: int = 0,
        finished: Callable[[Trajectory], None] = lambda part: None,
    ) -> Trajectory:
        """Return the trajectories of `group` completions of every row, in row order.

        `finished` gets every `micro_batch` of them as soon as it is decided.
        """
        if not rows:
            raise RecipeError("rollout: there are no task rows to roll out; the dataset is empty.")
        prompts = [self.prompt(row, index) for index, row in enumerate(rows)]
        owner_B = torch.arange(len(rows)).repeat_interleave(self.group)
        rollout_id_B = torch.arange(len(owner_B)) + first_id * self.group
        device = getattr(self.denoiser, "device", torch.device("cpu"))
        parts = []
        size = self.micro_batch
        if self.sampler.keeps_groups:
            size = max(1, size // self.group) * self.group
        for start in range(0, len(owner_B), size):
            chosen = owner_B[start : start + size].tolist()
            # Padding is never attended, so that any id will do for a tokenizer without one.
            pad, multiple = self.tokenizer.pad_token_id or 0, self.denoiser.family.prompt_multiple
            prompt_BQ, prompt_mask_BQ = pad_left([prompts[i] for i in chosen], pad, multiple=multiple)
            id_B = rollout_id_B[start : start + size]
            canvas_BL, draft_BL = self.canvases([rows[i] for i in chosen], id_B, step=step)
            part = denoise(
                self.denoiser,
                self.sampler,
                prompt_BQ.to(device),
                prompt_mask_BQ.to(device),
                canvas_BL.to(device),
                id_B.to(device),
                seed=self.seed,
                step=step,
                group_B=owner_B[start : start + size].to(device),
                draft_BL=draft_BL.to(device),
            )
            parts.append(part.to("cpu"))
            finished(parts[-1])
        return Trajectory.cat(parts)

    def canvases(self, rows: Sequence[Row], rollout_id_B: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """Return (`canvas_BL`, `draft_BL`) of a rollout of each row: ids at the start, and which may be taken back."""
        family = self.denoiser.family
        canvas_BL = torch.full((len(rows), self.canvas), family.mask_token_id)
        draft_BL = torch.zeros_like(canvas_BL, dtype=torch.bool)
        if self.start is None:
            return canvas_BL, draft_BL

        @cache
        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        noise_BL = uniform(self.seed, "start", step, rollout_id_B[:, None], torch.arange(self.canvas))
        ending = (family.end_id, family.eos_token_ids[0]) if family.eos_token_ids else ()
        for b, row in enumerate(rows):
            frame = Frame(self.canvas, family.mask_token_id, ending, encode, noise_BL[b])
            tokens, draft = self.start(row, frame)
            canvas_BL[b] = torch.tensor(tokens)
            if draft is not None:
                draft_BL[b] = torch.tensor(draft)
        return canvas_BL, draft_BL

    def decode(self, trajectory: Trajectory) -> tuple[list[list[int]], list[str]]:
        """Return completion ids (EOS included, undecided tokens dropped) and their texts without special tokens."""
        lengths = trajectory.length_B.tolist()
        ids = [
            [token for token in tokens[:length] if token != trajectory.mask_token_id]
            for tokens, length in zip(trajectory.tokens_BL.tolist(), lengths, strict=True)
        ]
        return ids, self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def prompt(self, row: Row, index: int = 0) -> list[int]:
        """Return the ids of a row's prompt; RecipeError when there is none or it exceeds `prompt_limit`."""
        if "prompt" not in row:
            raise RecipeError(f"task row {index}: there is no column 'prompt' (it has {', '.join(map(str, row))}).")
        ids = prompt_ids(self.tokenizer, row["prompt"])
        if len(ids) > self.prompt_limit:
            raise RecipeError(
                f"task row {index}: its prompt has {len(ids)} tokens, rollout.prompt_limit is {self.prompt_limit}; "
                "raise the limit or drop long prompts."
            )
        return ids


def pad_left(sequences: Sequence[list[int]], pad_token_id: int, *, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Return `(ids_BQ, mask_BQ)`, sequences aligned at their right end, the width a multiple of `multiple`."""
    width = -(-max(map(len, sequences)) // multiple) * multiple
    ids = torch.tensor([[pad_token_id] * (width - len(s)) + s for s in sequences])
    return ids, torch.arange(width) >= torch.tensor([[width - len(s)] for s in sequences])
