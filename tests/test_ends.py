"""What ends a completion, family by family (reference/models.md section 0), in rollouts and in supervised targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from unmask.policies.families import LAYOUTS
from unmask.policies.layout import Family
from unmask.policies.resolving import resolve_family
from unmask.policies.tokenizers import byte_tokenizer
from unmask.rl.sft import SftBatches, Source
from unmask.rollouts.trajectory import SAMPLED, Trajectory

TEXT, IM, ROLE, SEP = "<|endoftext|>", "<|im_end|>", "<|role_end|>", "[SEP]"
# config.json's EOS and padding, then what ends a completion, plain EOS first, and what ends a turn.
PUBLISHED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "llada_moe": ({"eos_token_id": TEXT, "pad_token_id": TEXT}, [TEXT, ROLE], ROLE),
    "llada2": ({"pad_token_id": TEXT}, [TEXT, ROLE], ROLE),
    "dream": ({"eos_token_id": TEXT, "pad_token_id": TEXT}, [TEXT, IM], IM),
    "sdar": ({"eos_token_id": TEXT}, [TEXT, IM], IM),
    "sdar_moe": ({"eos_token_id": TEXT}, [TEXT, IM], IM),
    "fast_dllm_v2": ({"eos_token_id": IM}, [IM], IM),
    "a2d_mdlm": ({"eos_token_id": IM}, [TEXT, IM], IM),
    "a2d_bd3lm": ({"eos_token_id": IM}, [TEXT, IM], IM),
    "open_dcoder": ({"eos_token_id": TEXT}, [TEXT, IM], IM),
    "rnd1": ({"eos_token_id": IM, "pad_token_id": TEXT}, [IM], IM),
    "modernbert": ({"eos_token_id": None, "pad_token_id": None, "sep_token_id": SEP}, [SEP], SEP),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_completions_end_with_eos_or_the_turns_end(name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TEXT, IM, ROLE, SEP]})
    tokenizer.eos_token = SEP if name == "modernbert" else TEXT
    config, ends, turn = PUBLISHED[name]
    ids = {key: value and tokenizer.convert_tokens_to_ids(value) for key, value in config.items()}
    family = resolve_family({"vocab_size": 272, "block_size": 4, **ids}, LAYOUTS[name], 257, tokenizer=tokenizer)
    assert family.eos_token_ids == tuple(tokenizer.convert_tokens_to_ids(ends))
    assert family.end_id == tokenizer.convert_tokens_to_ids(turn)


def test_llada_ends_a_turn_by_its_published_id() -> None:
    config = {"vocab_size": 126464, "eos_token_id": 126081, "mask_token_id": 126336}
    family = resolve_family(config, LAYOUTS["llada"])
    assert (family.eos_token_ids, family.end_id) == ((126081, 126348), 126348)
    small = resolve_family({"vocab_size": 261, "eos_token_id": 256, "mask_token_id": 257}, LAYOUTS["llada"])
    assert (small.eos_token_ids, small.end_id) == ((256,), 256)


def test_every_family_is_in_the_table() -> None:
    assert PUBLISHED.keys() | {"llada", "stock"} == LAYOUTS.keys()


CHAT = Family("sdar", 272, 257, (256, 262), turn_end_id=262)


def test_a_rollout_ends_with_whichever_comes_first() -> None:
    tokens_BL = torch.tensor([[5, 262, 256, 256], [5, 256, 262, 7], [5, 6, 7, 8], [262, 5, 5, 5]])
    zeros = torch.zeros_like(tokens_BL)
    trajectory = Trajectory(
        prompt_BQ=tokens_BL[:, :1],
        prompt_mask_BQ=torch.ones(4, 1, dtype=torch.bool),
        tokens_BL=tokens_BL,
        source_BL=torch.full_like(tokens_BL, SAMPLED, dtype=torch.int8),
        born_BL=zeros.to(torch.int16),
        rank_BL=zeros.to(torch.int16),
        logprob_BL=zeros.float(),
        steps_B=torch.ones(4, dtype=torch.long),
        choice_logprob_BS=None,
        temperature=1.0,
        mask_token_id=CHAT.mask_token_id,
        eos_token_ids=CHAT.eos_token_ids,
        rollout_id_B=torch.arange(4),
    )
    assert trajectory.length_B.tolist() == [2, 2, 4, 1]


class Rows:
    size = None

    def row(self, index: int) -> dict[str, str]:
        return {"prompt": "?", "reference": "ab" * (1 + index % 2)}


def test_a_target_is_the_reply_the_turns_end_and_eos_padding() -> None:
    for family, end in ((CHAT, 262), (replace(CHAT, turn_end_id=None), 256)):
        data = SftBatches(
            [Source("t", Rows(), 1.0, 8)], byte_tokenizer(), family, batch=2, steps=1, seed=0, full_canvas=1.0
        )
        clean = data[0]["clean_ids"][:, -8:].tolist()
        assert clean == [[97, 98, end, *[256] * 5], [97, 98, 97, 98, end, *[256] * 3]]
