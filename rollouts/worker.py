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
from .trajectory import EDITED, GIVEN, HINT, Trajectory

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

    `group_B` numbers the prompts, `metrics` are means over the batch. The trainer fills `advantage_B`, and where steps
    are told apart `step_reward_BS` and `step_advantage_BS` (NaN behind a rollout's last step).
    """

    trajectory: Trajectory
    rows: list[Row]
    completions: list[str]
    completion_ids: list[list[int]]
    group_B: Tensor
    rewards: RewardTable
    advantage_B: Tensor | None = None
    step_reward_BS: Tensor | None = None
    step_advantage_BS: Tensor | None = None
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
    rollout. `prompt_limit` is the longest prompt in tokens, checked before anything is sampled. `prefill` is the text
    that every assistant's turn begins with, as the end of the prompt. `drafts` records what each step drew at every
    masked position. Raises RecipeError for a cache that the denoiser cannot keep, and for drafts of canvases that
    change their length.
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
    drafts: bool = False
    start: Callable[..., Start] | None = None
    prefill: str = ""

    def __post_init__(self) -> None:
        check_cache(self.sampler.cache, self.denoiser)
        if self.drafts and self.sampler.length is not None:
            raise RecipeError("sampler.length: drafts need a canvas of one length; drop it, or what asks for drafts.")
        check_planner(self.sampler, self.denoiser)

    def collect(
        self, rows: Sequence[Row], *, step: int, first_id: int = 0, ids: Sequence[int] | None = None
    ) -> RolloutBatch:
        """Return `len(rows) * group` scored rollouts; rollout ids count from `first_id * group`.

        `step` keys the noise together with the rollout ids; `first_id` is the global index of the first prompt, so that
        ranks which share a batch draw what one process would. `ids` are those of all prompts, where they are no range.
        """
        prompt_ids = list(range(first_id, first_id + len(rows))) if ids is None else list(ids)
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
        trajectory = self.rollout(rows, step=step, ids=prompt_ids, finished=judge)
        seconds = time.perf_counter() - started
        if isinstance(self.scorer, ChunkScorer) and scoring is not None:
            rewards = self.scorer.finish(scoring)
        else:
            rewards = self.scorer(repeated, prompts, completions, completion_ids)
        group_B = torch.tensor(prompt_ids).repeat_interleave(self.group)
        metrics = measured(trajectory, completion_ids)
        batch = RolloutBatch(trajectory, repeated, completions, completion_ids, group_B, rewards, metrics=metrics)
        batch.metrics["time/rollout_s"] = seconds
        batch.metrics["time/tokens_per_s"] = sum(map(len, completion_ids)) / max(seconds, 1e-9)
        return batch

    def rollout(
        self,
        rows: Sequence[Row],
        *,
        step: int,
        first_id: int = 0,
        ids: Sequence[int] | None = None,
        finished: Callable[[Trajectory], None] = lambda part: None,
    ) -> Trajectory:
        """Return the trajectories of `group` completions of every row, in row order.

        `finished` gets every `micro_batch` of them as soon as it is decided.
        """
        if not rows:
            raise RecipeError("rollout: there are no task rows to roll out; the dataset is empty.")
        prompts = [self.prompt(row, index) for index, row in enumerate(rows)]
        owner_B = torch.arange(len(rows)).repeat_interleave(self.group)
        first_Q = torch.arange(len(rows)) + first_id if ids is None else torch.tensor(ids)
        rollout_id_B = (first_Q[:, None] * self.group + torch.arange(self.group)).flatten()
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
            canvas_BL, draft_BL, hinted_B = self.canvases([rows[i] for i in chosen], id_B, step=step)
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
                drafts=self.drafts,
            )
            parts.append(with_hints(part.to("cpu"), hinted_B))
            finished(parts[-1])
        return Trajectory.cat(parts)

    def canvases(self, rows: Sequence[Row], rollout_id_B: Tensor, *, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (`canvas_BL`, `draft_BL`, `hinted_B`) of a rollout of each row.

        Ids at the start, which of them may be taken back, and whether they come from a worked solution.
        """
        family = self.denoiser.family
        canvas_BL = torch.full((len(rows), self.canvas), family.mask_token_id)
        draft_BL = torch.zeros_like(canvas_BL, dtype=torch.bool)
        hinted_B = torch.zeros(len(rows), dtype=torch.bool)
        if self.start is None:
            return canvas_BL, draft_BL, hinted_B

        @cache
        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        @cache
        def offsets(text: str) -> list[tuple[int, int]]:
            return token_offsets(self.tokenizer, text)

        noise_BL = uniform(self.seed, "start", step, rollout_id_B[:, None], torch.arange(self.canvas))
        ending = (family.end_id, family.eos_token_ids[0]) if family.eos_token_ids else ()
        for b, row in enumerate(rows):
            frame = Frame(self.canvas, family.mask_token_id, ending, encode, noise_BL[b], offsets)
            tokens, draft, hinted_B[b] = Start(*self.start(row, frame))
            canvas_BL[b] = torch.tensor(tokens)
            if draft is not None:
                draft_BL[b] = torch.tensor(draft)
        return canvas_BL, draft_BL, hinted_B

    def decode(self, trajectory: Trajectory) -> tuple[list[list[int]], list[str]]:
        """Return completion ids (EOS included, undecided tokens dropped) and their texts without special tokens."""
        lengths = trajectory.length_B.tolist()
        ids = [
            [token for token in tokens[:length] if token != trajectory.mask_token_id]
            for tokens, length in zip(trajectory.tokens_BL.tolist(), lengths, strict=True)
        ]
        return ids, self.texts(ids)

    def texts(self, ids: list[list[int]]) -> list[str]:
        """Return the texts of completions, without special tokens."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def prompt(self, row: Row, index: int = 0) -> list[int]:
        """Return the ids of a row's prompt; RecipeError when there is none or it exceeds `prompt_limit`."""
        if "prompt" not in row:
            raise RecipeError(f"task row {index}: there is no column 'prompt' (it has {', '.join(map(str, row))}).")
        ids = prompt_ids(self.tokenizer, row["prompt"])
        if self.prefill:
            ids = [*ids, *self.tokenizer(self.prefill, add_special_tokens=False)["input_ids"]]
        if len(ids) > self.prompt_limit:
            raise RecipeError(
                f"task row {index}: its prompt has {len(ids)} tokens, rollout.prompt_limit is {self.prompt_limit}; "
                "raise the limit or drop long prompts."
            )
        return ids


def measured(trajectory: Trajectory, completion_ids: Sequence[list[int]]) -> dict[str, float]:
    """Return what a batch's metrics say of its trajectories, as means over rollouts (`logprob`: over drawn tokens)."""
    count = max(len(trajectory), 1)
    ended_B = torch.isin(trajectory.tokens_BL, torch.tensor(trajectory.eos_token_ids)).any(dim=1)
    metrics = {
        "rollout/nfe": trajectory.steps_B.double().mean().item(),
        "rollout/length": sum(map(len, completion_ids)) / count,
        "rollout/ended": ended_B.double().mean().item(),
        "rollout/logprob": trajectory.logprob_BL.sum().item() / max(int(trajectory.action_BL("all").sum()), 1),
    }
    if trajectory.retracted is not None:
        metrics["rollout/retracted"] = len(trajectory.retracted.row_R) / count
        metrics["rollout/edited"] = int((trajectory.source_BL == EDITED).sum()) / count
    return metrics


def token_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Return the first and the last character (exclusive) of each token of `text`; RecipeError if it cannot be told."""
    if not tokenizer.is_fast:
        raise RecipeError("hints: this tokenizer cannot tell where its tokens lie in a text; hints need a fast one.")
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["offset_mapping"]


def with_hints(trajectory: Trajectory, hinted_B: Tensor) -> Trajectory:
    """Return the trajectory with the given tokens of the rollouts `hinted_B` marked as hints."""
    if not bool(hinted_B.any()):
        return trajectory
    hint_BL = hinted_B[:, None] & (trajectory.source_BL == GIVEN)
    return replace(trajectory, source_BL=torch.where(hint_BL, HINT, trajectory.source_BL).to(torch.int8))


def pad_left(sequences: Sequence[list[int]], pad_token_id: int, *, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Return `(ids_BQ, mask_BQ)`, sequences aligned at their right end, the width a multiple of `multiple`."""
    width = -(-max(map(len, sequences)) // multiple) * multiple
    ids = torch.tensor([[pad_token_id] * (width - len(s)) + s for s in sequences])
    return ids, torch.arange(width) >= torch.tensor([[width - len(s)] for s in sequences])
