"""The built-in byte tokenizer: 256 bytes and five special tokens, made in code, no file and no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from .layout import CheckpointError, Family
from .templates import TEMPLATES

EOS, MASK, SYSTEM, USER, ASSISTANT = "<|eos|>", "<|mask|>", "<|system|>", "<|user|>", "<|assistant|>"

BYTE_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|eos|>' }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_symbols() -> list[str]:
    """Return the printable stand-in of every byte, in byte order, as the ByteLevel pre-tokenizer uses them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in symbols)
    symbols.update({byte: chr(256 + order) for order, byte in enumerate(others)})
    return [symbols[byte] for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte-level tokenizer: id = byte value, then eos 256, mask 257, system, user, assistant."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = [EOS, MASK, SYSTEM, USER, ASSISTANT]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = BYTE_TEMPLATE
    return tokenizer


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the folder's own tokenizer (its files, never its code), or None when it has none.

    Vocabulary and merges without a tokenizer.json belong to a slow tokenizer: Qwen2's, or Dream's own class, which
    computes what Qwen2's does (reference/models.md section 4).
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    slow = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    # The class itself, not AutoTokenizer, which would look for the vendor's model class in config.json.
    kind = Qwen2Tokenizer if slow and not (folder / "tokenizer.json").is_file() else PreTrainedTokenizerFast
    try:
        return kind.from_pretrained(folder)
    except Exception as error:  # the Rust library raises bare Exceptions
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"'{folder}': its tokenizer files cannot be read ({reason}).") from error


def load_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None, family: Family, template: str | None
) -> PreTrainedTokenizerBase:
    """Return `tokenizer` left-padding and with the family's template, where its vocabulary has that template's tokens.

    Folders without tokenizer files get the byte tokenizer when its special ids are the checkpoint's, so that tokens
    are never silently read with a foreign vocabulary; CheckpointError otherwise.
    """
    if tokenizer is None:
        tokenizer = byte_tokenizer()
        if tokenizer.mask_token_id != family.mask_token_id or len(tokenizer) > family.vocab_size:
            raise CheckpointError(f"'{folder}' holds no tokenizer.json; copy the checkpoint's tokenizer files there.")
        return tokenizer
    tokenizer.padding_side = "left"
    ours = None if template is None else TEMPLATES[template]
    if ours is not None and (ours.marker is None or ours.marker in tokenizer.get_vocab()):
        tokenizer.chat_template = ours.jinja
    return tokenizer


def check_mask_token(tokenizer: PreTrainedTokenizerBase, family: Family) -> None:
    """Raise CheckpointError when the text of the mask token is read as other tokens.

    An id without a text passes: LLaDA2's and converted vocabularies have rows that no text reaches.
    """
    token = tokenizer.convert_ids_to_tokens(family.mask_token_id)
    if token is None:
        return
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if ids != [family.mask_token_id]:
        raise CheckpointError(
            f"mask_token_id {family.mask_token_id} is '{token}', which the tokenizer reads as {ids}; register it as a "
            "special token, or pass the mask_token_id of the model's card."
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    """Return the ids of a prompt: a string is one user turn, the assistant's turn is opened."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return encoded["input_ids"]


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str, end_id: int) -> list[int]:
    """Return the ids of an assistant's turn, ended by `end_id` (`Family.end_id`)."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], end_id]
