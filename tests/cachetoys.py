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

    A forward is a list of (row, columns); columns None are all of them. `seen` lists, for every row of a forward over
    columns, what each of its columns may attend to. `computed` counts columns, without padding.
    """

    bonus: float = 0.0
    forwards: list[list[tuple[int, list[int] | None]]] = field(default_factory=list)
    seen: list[list[dict[int, list[int]]]] = field(default_factory=list)
    computed: int = 0

    def head(self, hidden: Tensor) -> Tensor:
        logits = super().head(hidden)
        logits[..., list(self.family.eos_token_ids)] += self.bonus
        return logits

    def hidden(self, input_ids_BT: Tensor, **options: Any) -> Tensor:
        store = options.get("store")
        rows = range(len(input_ids_BT)) if store is None else store.target.row_R.tolist()
        self.forwards.append([(row, None) for row in rows])
        padding = options.get("padding_mask_BT")
        self.computed += input_ids_BT.numel() if padding is None else int(padding.sum())
        return super().hidden(input_ids_BT, **options)

    def columns(self, input_ids_BC: Tensor, position_ids_BC: Tensor, mask_B1CK: Tensor, store: Any) -> Tensor:
        lists = [[c for c in row if c != store.dummy] for row in store.target.column_RC.tolist()]
        self.forwards.append(list(zip(store.target.row_R.tolist(), lists, strict=True)))
        masks = [mask_CK[: len(row)] for row, mask_CK in zip(lists, mask_B1CK[:, 0], strict=True)]
        self.seen.append([dict(zip(row, map(_true, m), strict=True)) for row, m in zip(lists, masks, strict=True)])
        self.computed += sum(map(len, lists))
        return super().columns(input_ids_BC, position_ids_BC, mask_B1CK, store)


def _true(mask_K: Tensor) -> list[int]:
    return mask_K.nonzero()[:, 0].tolist()


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


@dataclass
class Rule:
    """A cache policy in plain Python: which columns each step of a row with `prompt` columns (`padded` first) computes.

    `born` is the step that decided each canvas position (no token is ever taken back), `size` that of the schedule's
    blocks, `block` that of a block-causal family's.
    """

    name: str
    born: list[int]
    size: int
    prompt: int
    padded: int = 0
    block: int = 1
    shift: int = 0
    knobs: dict[str, int] = field(default_factory=dict)

    @property
    def real(self) -> set[int]:
        return set(range(self.padded, self.prompt + len(self.born)))

    def masked(self, step: int) -> list[int]:
        return [i for i, born in enumerate(self.born) if born >= step]

    def start(self, step: int) -> int:
        """Return where the block of a step begins."""
        return self.masked(step)[0] // self.size * self.size

    def age(self, step: int) -> int:
        """Return the steps already spent on a step's block."""
        return sum(self.start(s) == self.start(step) for s in range(step))

    def window(self, step: int) -> list[int]:
        return [i for i in self.masked(step) if i < self.start(step) + self.size]

    def columns(self, step: int) -> set[int]:
        """Return the columns that a step computes."""
        wanted = getattr(self, self.name)(step, **self.knobs) & self.real
        return wanted | {max(self.prompt + i - self.shift, 0) for i in self.window(step)}

    def canvas(self, positions: Any) -> set[int]:
        return {self.prompt + i for i in positions}

    def behind(self, step: int) -> set[int]:
        return set(range(self.prompt + self.start(step), self.prompt + len(self.born)))

    def newest(self, step: int) -> set[int]:
        return self.canvas(i for i, born in enumerate(self.born) if born == step - 1)

    def prefix(self, step: int, refresh: int = 0) -> set[int]:
        age = self.age(step)
        return self.real if age == 0 or (refresh and age % refresh == 0) else self.behind(step)

    def dual(self, step: int, refresh: int = 0) -> set[int]:
        age, start = self.age(step), self.start(step)
        if age == 0 or (refresh and age % refresh == 0):
            return self.real
        return self.canvas(range(start, min(start + self.size, len(self.born))))

    def dkv_decode(self, step: int, refresh: int = 8, warmup: int = 2) -> set[int]:
        age = self.age(step)
        if age < warmup or age % refresh == 0:
            return self.real
        return self.canvas(self.masked(step)) | self.newest(step)

    def dkv_greedy(self, step: int, refresh: int = 2, near: int = 0) -> set[int]:
        if self.age(step) % refresh == 0:
            return self.real
        masked, window = self.masked(step), self.window(step)
        first, last = masked.index(window[0]), masked.index(window[-1])
        return self.canvas(masked[max(first - near, 0) : last + near + 1]) | self.newest(step)

    def free_cache(self, step: int, refresh: int = 0) -> set[int]:
        return self.real if step == 0 or (refresh and step % refresh == 0) else self.behind(step)

    def window_diffusion(self, step: int, refresh: int = 32, outer: int = 64, inner: int = 16) -> set[int]:
        begin = step - step % refresh
        if step == begin:
            return self.visible(step, refresh, outer)
        decided = [i for i, born in enumerate(self.born) if begin <= born < step]
        first = [i for i in self.masked(step)[:inner] if self.prompt + i in self.visible(step, refresh, outer)]
        return self.canvas(decided + first)

    def visible(self, step: int, refresh: int, outer: int) -> set[int]:
        """Return what a step of window_diffusion may see."""
        begin = step - step % refresh
        decided = [i for i, born in enumerate(self.born) if born < step]
        return self.canvas(decided + self.masked(begin)[:outer]) | {c for c in self.real if c < self.prompt}

    def block_of(self, column: int) -> int:
        return (column - self.padded) // self.block

    def block_causal(self, step: int) -> set[int]:
        asked = [i for s in range(step + 1) for i in self.window(s)]  # what was computed before is kept valid
        last = max(self.block_of(self.prompt + i - self.shift) for i in asked)
        first = 0 if step == 0 else min(map(self.block_of, self.newest(step)))
        return {c for c in self.real if first <= self.block_of(c) <= last}


def same_tokens(one: Trajectory, other: Trajectory) -> bool:
    """Tell whether two rollouts took the same actions at the same steps."""
    names = ("tokens_BL", "source_BL", "born_BL", "rank_BL", "steps_B")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def apart(one: Trajectory, other: Trajectory) -> float:
    """Return the largest difference of their log-probs."""
    return (one.logprob_BL - other.logprob_BL).abs().max().item()
