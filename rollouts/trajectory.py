"""A trajectory is data: which step decided which token, from which every canvas the denoiser saw is rebuilt exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

PAD, SAMPLED, GIVEN = 0, 1, 2
NEVER = -1


@dataclass(frozen=True)
class Trajectory:
    """How B canvases of L tokens were decided, in O(L) a rollout.

    Shapes: `B` rollouts, `Q` prompt tokens (left padded), `L` canvas, `S` steps of the longest row.
    `tokens_BL` is the final canvas with the mask id where nothing was decided (behind the first EOS, when the sampler
    stops there). `source_BL` says PAD (undecided), SAMPLED or GIVEN. `born_BL` is the step, counted from 0, that
    committed a token and `rank_BL` its place inside the step; both are -1 where nothing was sampled. `logprob_BL` is
    the behaviour log-probability in nats at `temperature`, 0 where nothing was sampled. `choice_logprob_BS` is the
    log-probability of the *positions* chosen at a step where the selection depends on drawn tokens (samplers.md 1.3).
    `banned_token_ids`, the mask and where it is suppressed EOS, had probability 0.
    """

    prompt_BQ: Tensor
    prompt_mask_BQ: Tensor
    tokens_BL: Tensor
    source_BL: Tensor
    born_BL: Tensor
    rank_BL: Tensor
    logprob_BL: Tensor
    steps_B: Tensor
    rollout_id_B: Tensor
    temperature: float
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...] = ()
    choice_logprob_BS: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens_BL.shape[0]

    @property
    def canvas(self) -> int:
        """The canvas length L."""
        return self.tokens_BL.shape[1]

    def canvas_before(self, row_N: Tensor, step_N: Tensor) -> Tensor:
        """Return `canvas_NL`, the exact canvas that the denoiser saw at step `step_N` of rollout `row_N`."""
        born_NL = self.born_BL[row_N]
        decided_NL = (self.source_BL[row_N] == GIVEN) | ((born_NL >= 0) & (born_NL < step_N[:, None]))
        return torch.where(decided_NL, self.tokens_BL[row_N], self.mask_token_id)

    @property
    def length_B(self) -> Tensor:
        """Tokens up to and including the first EOS; L without one."""
        ends_BL = torch.isin(self.tokens_BL, torch.tensor(self.eos_token_ids, device=self.tokens_BL.device))
        first_B = ends_BL.to(torch.int8).argmax(dim=1) + 1
        return torch.where(ends_BL.any(dim=1), first_B, self.canvas)

    def action_BL(self, tokens: str = "until_eos") -> Tensor:
        """Return which tokens are actions of the policy: the sampled ones, `until_eos` or `all` of them."""
        sampled_BL = self.source_BL == SAMPLED
        if tokens == "all":
            return sampled_BL
        if tokens != "until_eos":
            raise ValueError(f"tokens: '{tokens}' is not one of until_eos, all.")
        return sampled_BL & (torch.arange(self.canvas, device=self.born_BL.device) < self.length_B[:, None])

    def select(self, index_B: Tensor) -> Trajectory:
        """Return the rollouts `index_B` (indices or a bool mask)."""
        return replace(self, **{name: value[index_B] for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> Trajectory:
        """Return the trajectory on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Join trajectories along B; prompts are padded left and step tables right to the longest."""
        first = parts[0]
        width = max(part.prompt_BQ.shape[1] for part in parts)
        joined: dict[str, Any] = {}
        for name in first._tensors():
            values = [getattr(part, name) for part in parts]
            if name.startswith("prompt"):
                values = [torch.nn.functional.pad(v, (width - v.shape[1], 0)) for v in values]
            elif name == "choice_logprob_BS":
                steps = max(v.shape[1] for v in values)
                values = [torch.nn.functional.pad(v, (0, steps - v.shape[1])) for v in values]
            joined[name] = torch.cat(values)
        return replace(first, **joined)

    def _tensors(self) -> dict[str, Any]:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def validate(self) -> None:
        """Assert what every trajectory satisfies (used by tests and after loading a checkpoint)."""
        sampled = self.source_BL == SAMPLED
        assert bool(((self.born_BL >= 0) == sampled).all()), "exactly the sampled tokens have a step"
        assert bool((self.born_BL < self.steps_B[:, None]).all()), "no token is born after the last step"
        assert bool((self.logprob_BL[~sampled] == 0).all()), "only sampled tokens have a log-probability"
        assert bool((self.logprob_BL <= 0).all()), "a log-probability is at most 0"
        undecided = self.tokens_BL == self.mask_token_id
        assert bool((undecided == (self.source_BL == PAD)).all()), "undecided tokens, and only those, are masks"
