"""Rollouts of block-causal families run along the model's own block borders, whatever a prompt's length."""

from __future__ import annotations

from dataclasses import replace

import cachetoys
import pytest
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import Family
from unmask.rollouts.trajectory import Trajectory

LENGTHS = (9, 6, 11, 8)  # of which only the last is whole blocks of 4


def first_column(family: Family, prompt: int) -> int:
    """Return how many columns precede a prompt's first token in a row of its own."""
    length = family.block_length or 1
    return -prompt % length if family.alignment == "left_pad_to_block" else 0


def blocks_of(family: Family, prompt: int, canvas: int) -> list[int]:
    """Return the block of every canvas position."""
    start = first_column(family, prompt) + prompt
    return [(start + i) // (family.block_length or 1) for i in range(canvas)]


def alone(denoiser: Denoiser, tokens_T: Tensor, pads: int) -> Tensor:
    """Return log-probs `[T, V]` of a row without padding, by the stock class under a mask that is written out."""
    length, shift = denoiser.family.block_length or 1, denoiser.family.logit_shift
    block_T = (torch.arange(len(tokens_T)) + pads) // length
    far = torch.finfo(torch.float32).min
    mask = torch.zeros(len(tokens_T), len(tokens_T)).masked_fill(block_T[:, None] < block_T, far)
    logits_TV = denoiser.base(input_ids=tokens_T[None], attention_mask=mask[None, None]).logits[0]
    logits_TV = torch.cat([logits_TV[:1], logits_TV[:-1]]) if shift else logits_TV
    logits_TV[:, denoiser.family.mask_token_id] = -torch.inf
    return logits_TV.log_softmax(-1)


def seen_before(trajectory: Trajectory, row: int, step: int) -> Tensor:
    """Return the tokens of a row without its padding as a step saw them."""
    canvas_1L = trajectory.canvas_before(torch.tensor([row]), torch.tensor([step]))
    return torch.cat([trajectory.prompt_BQ[row][trajectory.prompt_mask_BQ[row]], canvas_1L[0]])


@pytest.mark.parametrize("cache", [None, "block_causal"], ids=["uncached", "cached"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("alignment", ["shared_block", "left_pad_to_block"])
@torch.no_grad()
def test_blocks_are_decoded_one_after_the_other_from_nothing_behind_them(
    alignment: str, shift: int, cache: str | None
) -> None:
    """Borders fall where the family has them, and a decision's log-prob is that of the row cut off behind its block."""
    denoiser = cachetoys.load("sdar")
    denoiser.family = replace(denoiser.family, alignment=alignment, logit_shift=shift)
    found = cachetoys.rollouts(denoiser, cache, lengths=LENGTHS, width=12)
    worst, opened = 0.0, []
    for row, prompt in enumerate(LENGTHS):
        born, block = found.born_BL[row].tolist(), blocks_of(denoiser.family, prompt, 16)
        opened.append(block.count(block[0]))
        decided = [i for i in range(16) if born[i] >= 0]  # a row stops at its EOS
        assert all(born[i] < born[j] for i in decided for j in decided if block[i] < block[j])
        for i in decided:
            end = prompt + max(j for j in range(16) if block[j] == block[i]) + 1
            tokens_T = seen_before(found, row, born[i])[:end]
            logprob_TV = alone(denoiser, tokens_T, first_column(denoiser.family, prompt))
            wanted = logprob_TV[prompt + i, found.tokens_BL[row, i]]
            worst = max(worst, (wanted - found.logprob_BL[row, i]).abs().item())
    assert worst <= 1e-5
    # A prompt that ends inside a block leaves the rest of it to the completion, or is padded to whole blocks.
    assert opened == ([3, 2, 1, 4] if alignment == "shared_block" else [4, 4, 4, 4])
