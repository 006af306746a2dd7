"""A denoiser small enough to enumerate: every completion, every set of masks, and the exact numbers they give."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ..policies.layout import Family
from ..rollouts.trajectory import SAMPLED, Trajectory


class Tabular(nn.Module):
    """Logits in float64 of every canvas of `length` positions over `vocabulary` tokens, drawn with `scale`.

    The interface is that of `LogitSource`; the mask is one more token, and there is no EOS. `table` has
    `(vocabulary + 1) ** length` canvases.
    """

    def __init__(self, *, vocabulary: int, length: int, scale: float, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        shape = ((vocabulary + 1) ** length, length, vocabulary + 1)
        self.table = nn.Parameter(scale * torch.randn(*shape, generator=rng, dtype=torch.float64))
        self.length, self.vocabulary = length, vocabulary
        self.family = Family("tabular", vocab_size=vocabulary + 1, mask_token_id=vocabulary, eos_token_ids=())

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Return logits `[B, T, V]`, or `[K, V]` at `positions_BT`; what precedes the canvas is not looked at."""
        digit_L = (self.vocabulary + 1) ** torch.arange(self.length)
        logits_BLV = self.table[(input_ids_BT[:, -self.length :] * digit_L).sum(1)]
        if positions_BT is None:
            return nn.functional.pad(logits_BLV, (0, 0, input_ids_BT.shape[1] - self.length, 0))
        return logits_BLV[positions_BT[:, -self.length :]]

    def log_probs(self, canvas_NL: Tensor) -> Tensor:
        """Return log softmax `[N, L, V]` of some canvases, the mask left out."""
        return self.logits(canvas_NL)[..., : self.vocabulary].log_softmax(-1)

    def completions(self) -> Tensor:
        """Return all `vocabulary ** length` completions `[C, L]`."""
        return torch.tensor(list(itertools.product(range(self.vocabulary), repeat=self.length)))

    def left_to_right(self, tokens_CL: Tensor) -> Tensor:
        """Return log p `[C, L]` of each token behind those before it: the sampler of one token a step, in order."""
        found = []
        for i in range(self.length):
            canvas_CL = tokens_CL.clone()
            canvas_CL[:, i:] = self.vocabulary
            found.append(self.log_probs(canvas_CL)[:, i].gather(1, tokens_CL[:, i : i + 1]))
        return torch.cat(found, dim=1)

    def elbo(self, tokens_CL: Tensor) -> Tensor:
        """Return E_{k ~ U(1..L)} E_{|S| = k} L/k sum_S log p `[C]`, by enumeration (likelihood_rl.md, A0.1)."""
        total_C = torch.zeros(len(tokens_CL), dtype=torch.float64)
        for count in range(1, self.length + 1):
            subsets = list(itertools.combinations(range(self.length), count))
            for subset in subsets:
                canvas_CL, chosen = tokens_CL.clone(), torch.tensor(subset)
                canvas_CL[:, chosen] = self.vocabulary
                logp_CLV = self.log_probs(canvas_CL)
                sum_C = logp_CLV.gather(2, tokens_CL[..., None])[:, chosen, 0].sum(1)
                total_C = total_C + sum_C / (count * len(subsets))
        return total_C

    def trajectory(self, tokens_CL: Tensor, rollout_id_B: Tensor) -> Trajectory:
        """Return `tokens_CL` as rollouts from left to right, one token a step, with their log-probs."""
        rows, length = tokens_CL.shape
        born_BL = torch.arange(length, dtype=torch.int16).expand(rows, -1)
        return Trajectory(
            prompt_BQ=torch.zeros(rows, 1, dtype=torch.long),
            prompt_mask_BQ=torch.ones(rows, 1, dtype=torch.bool),
            tokens_BL=tokens_CL,
            source_BL=torch.full((rows, length), SAMPLED, dtype=torch.int8),
            born_BL=born_BL,
            rank_BL=torch.zeros_like(born_BL),
            logprob_BL=self.left_to_right(tokens_CL).detach(),
            steps_B=torch.full((rows,), length),
            rollout_id_B=rollout_id_B,
            temperature=1.0,
            mask_token_id=self.vocabulary,
            eos_token_ids=(),
            banned_token_ids=(self.vocabulary,),
        )
