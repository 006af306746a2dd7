"""Tiny published families that write down what they compute, and what a cache policy computes, said in plain Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import load_denoiser
from unmask.policies.tokenizers import byte_tokenizer
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

FIXTURES = Path(__file__).parent / "fixtures"
LENGTHS = (9, 6, 11, 7)
# Added to the logits of EOS, makes the rows of every sampler end at different steps.
ENDING = {"sdar": 2.5, "sdar_moe": 2.5, "llada2": 4.0}


@dataclass
class Watched(Denoiser):
    """A denoiser that lists its forwards, and likes to end: `bonus` is added to the logits of EOS.

    A forward is a list of (row, columns); columns None are all of them.
    """

    bonus: float = 0.0
    forwards: list[list[tuple[int, list[int] | None]]] = field(default_factory=list)

    def head(self, hidden: Tensor) -> Tensor:
        logits = super().head(hidden)
        logits[..., list(self.family.eos_token_ids)] += self.bonus
        return logits

    def hidden(self, input_ids_BT: Tensor, **options: Any) -> Tensor:
        store = options.get("store")
        rows = range(len(input_ids_BT)) if store is None else store.target.row_R.tolist()
        self.forwards.append([(row, None) for row in rows])
        return super().hidden(input_ids_BT, **options)

    def columns(self, input_ids_BC: Tensor, position_ids_BC: Tensor, mask_B1CK: Tensor, store: Any) -> Tensor:
        lists = [[c for c in row if c != store.dummy] for row in store.target.column_RC.tolist()]
        self.forwards.append(list(zip(store.target.row_R.tolist(), lists, strict=True)))
        return super().columns(input_ids_BC, position_ids_BC, mask_B1CK, store)


def load(name: str, ending: bool = False, **options: Any) -> Watched:
    """Return the golden tiny model of a family, one whose rows end at different steps if it is to be `ending`."""
    facts = json.loads((FIXTURES / name / "golden.json").read_text())
    given = {"mask_token_id": facts["mask_token_id"], "block_length": facts["block_length"]}
    found = load_denoiser(str(FIXTURES / name), tokenizer=byte_tokenizer(), **(given | options))
    return Watched(
        found.model, found.family, found.tokenizer, found.vendor_config, bonus=ENDING.get(name, 3.5) * ending
    )


def prompts(lengths: Sequence[int] = LENGTHS, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return prompts of these lengths, left padded; a prompt is the same whatever stands beside it."""
    width = width or max(lengths)
    prompt_BQ = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 + length)
        prompt_BQ[row, width - length :] = torch.randint(0, 200, (length,), generator=generator)
    return prompt_BQ, torch.arange(width) >= torch.tensor([[width - length] for length in lengths])


def rollouts(
    denoiser: Any,
    cache: Any,
    *,
    canvas: int = 16,
    lengths: Sequence[int] = LENGTHS,
    width: int | None = None,
    temperature: float = 1.0,
    ids: Sequence[int] | None = None,
    section: dict[str, Any] | None = None,
    **options: Any,
) -> Trajectory:
    """Return rollouts of `denoiser` under a cache; blocks of the family's length (8 without one), two tokens a step."""
    size = denoiser.family.block_length or 8
    base = {"schedule": {"name": "blocks", "size": size, "per_step": 2}, "cache": cache}
    sampler = build_sampler({**base, **(section or {})}, temperature=temperature)
    canvas_BL = torch.full((len(lengths), canvas), denoiser.family.mask_token_id)
    rollout_id_B = torch.tensor(list(ids)) if ids is not None else torch.arange(len(lengths))
    return denoise(denoiser, sampler, *prompts(lengths, width), canvas_BL, rollout_id_B, seed=1, **options)


def same_tokens(one: Trajectory, other: Trajectory) -> bool:
    """Tell whether two rollouts took the same actions at the same steps."""
    names = ("tokens_BL", "source_BL", "born_BL", "rank_BL", "steps_B")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def apart(one: Trajectory, other: Trajectory) -> float:
    """Return the largest difference of their log-probs."""
    return (one.logprob_BL - other.logprob_BL).abs().max().item()
