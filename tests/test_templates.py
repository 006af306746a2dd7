"""Chat templates against the published prompts (models.md), their generation markers and add_generation_prompt."""

from __future__ import annotations

from typing import Any

import pytest

from unmask.policies.families import LAYOUTS
from unmask.policies.templates import TEMPLATES
from unmask.policies.tokenizers import byte_tokenizer

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": "Yo"}
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
# The prompt of one user turn, what a system turn puts before it, and the assistant's own tokens.
PUBLISHED: dict[str, tuple[str, str, str]] = {
    "llada": (
        "<|startoftext|>" + HEADER.format("user") + "Hi<|eot_id|>" + HEADER.format("assistant"),
        "<|startoftext|>" + HEADER.format("system") + "Be brief.<|eot_id|>",
        "Yo<|eot_id|>",
    ),
    "role": (
        "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>",
        "<role>SYSTEM</role>Be brief.<|role_end|>",
        "Yo<|role_end|>",
    ),
    "role_system": (
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>",
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|>",
        "Yo<|role_end|>",
    ),
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n",
        "Yo<|im_end|>",
    ),
    "chatml_no_think": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n",
        "Yo<|im_end|>",
    ),
    "chatml_helpful": (
        HELPFUL + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n",
        "Yo<|im_end|>",
    ),
    "question": ("Question: Hi\nAnswer:", "Question: Be brief.\n", " Yo\n"),
    "bert": ("[Question]\nHi\n[/Question]\n\n[Answer]\n", "[SYS]\nBe brief.\n[/SYS]\n\n", "Yo\n[/Answer]"),
}


def render(name: str, messages: list[dict[str, str]], prompt: bool = False, **options: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name].jinja
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_the_published_ones(name: str) -> None:
    prompt, system, _ = PUBLISHED[name]
    assert render(name, [USER], prompt=True) == prompt
    assert render(name, [SYSTEM, USER], prompt=True).startswith(system)
    # add_generation_prompt is honoured: without it no assistant turn is opened.
    alone = render(name, [USER])
    assert prompt.startswith(alone) and len(alone) < len(prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_tokens_are_marked(name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name].jinja
    encoded: Any = tokenizer.apply_chat_template(
        [USER, REPLY], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, mine in pairs if mine]) == PUBLISHED[name][2]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "chatml_no_think"])
def test_a_conversation_continues_its_prompt(name: str) -> None:
    """What is trained on follows what rollouts are prompted with (A2D's empty thought stands in prompts only)."""
    assert render(name, [USER, REPLY]).startswith(render(name, [USER], prompt=True) + PUBLISHED[name][2])


def test_thinking_is_switched_off_as_the_family_does() -> None:
    empty = "<think>\n\n</think>\n\n"
    assert render("chatml", [USER], prompt=True, enable_thinking=False).endswith(empty)
    assert not render("chatml", [USER], prompt=True, enable_thinking=True).endswith(empty)
    assert not render("chatml_no_think", [USER], prompt=True, enable_thinking=True).endswith(empty)


def test_every_layout_names_a_template() -> None:
    assert {layout.template for layout in LAYOUTS.values()} - {None} == set(TEMPLATES)
