"""Chat templates by family, written anew with generation markers; each honours `add_generation_prompt`.

None of the published templates marks the assistant's tokens, so that masks of them are silently all zero; LLaDA's also
opens an assistant turn whatever `add_generation_prompt` says.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A Jinja template, and the token without which a vocabulary is not written for it (None: plain text)."""

    jinja: str
    marker: str | None = None


def _turns(opening: str, closing: str, *, before: str = "", role: str, assistant: str, filters: str = "") -> str:
    """Return a template of turns: opening, content, closing; ROLE in `opening` is the expression `role`."""
    content = f"(message['content']{filters})"
    start = opening.replace("ROLE", f"' + {role} + '")
    return (
        f"{before}{{% for message in messages %}}{{{{ '{start}' }}}}"
        "{% if message['role'] == 'assistant' %}"
        f"{{% generation %}}{{{{ {content} + '{closing}' }}}}{{% endgeneration %}}"
        f"{{% else %}}{{{{ {content} + '{closing}' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{opening.replace('ROLE', assistant)}' }}}}{{% endif %}}"
    )


THINK_OFF = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
NO_THINK = "{% if not (enable_thinking is defined and enable_thinking) %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
HELPFUL = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
)
ROLES = "{'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'}[message['role']]"
# LLaDA2 opens with a system turn of its own, into which the user's system text goes.
THINKING_OFF = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<role>SYSTEM</role>' + system + 'detailed thinking off<|role_end|>' }}"
)


def _chatml(before: str = "", after: str = "") -> str:
    # ChatML ends a turn with the marker and a line end, of which only the marker is the model's to say.
    return (
        f"{before}{{% for message in messages %}}"
        "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{after}{{% endif %}}"
    )


TEMPLATES: dict[str, Template] = {
    "llada": Template(
        _turns(
            "<|start_header_id|>ROLE<|end_header_id|>\\n\\n",
            "<|eot_id|>",
            before="{{ '<|startoftext|>' }}",
            role="message['role']",
            assistant="assistant",
            filters=" | trim",
        ),
        "<|start_header_id|>",
    ),
    "role": Template(_turns("<role>ROLE</role>", "<|role_end|>", role=ROLES, assistant="ASSISTANT"), "<role>"),
    "role_system": Template(
        _turns("<role>ROLE</role>", "<|role_end|>", before=THINKING_OFF, role=ROLES, assistant="ASSISTANT"), "<role>"
    ),
    "chatml": Template(_chatml(after=THINK_OFF), "<|im_start|>"),
    "chatml_no_think": Template(_chatml(after=NO_THINK), "<|im_start|>"),
    "chatml_helpful": Template(_chatml(before=HELPFUL), "<|im_start|>"),
    # RND1-Base is no chat model: its card asks in plain text.
    "question": Template(
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        "{{ 'Answer:' }}{% generation %}{{ ' ' + message['content'] + '\\n' }}{% endgeneration %}"
        "{% else %}{{ 'Question: ' + message['content'] + '\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
    ),
    "bert": Template(
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ '[SYS]\\n' + message['content'] | trim + '\\n[/SYS]\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[Question]\\n' + message['content'] | trim + '\\n[/Question]\\n\\n' }}"
        "{% else %}{{ '[Answer]\\n' }}{% generation %}{{ message['content'] | trim + '\\n[/Answer]' }}"
        "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[Answer]\\n' }}{% endif %}"
    ),
}
