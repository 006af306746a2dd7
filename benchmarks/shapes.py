"""Random models of a given shape, for benchmarks of speed and memory."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import Family
from unmask.policies.tokenizers import byte_tokenizer


def random_llama(
    vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, *, block_length: int | None = None
) -> Denoiser:
    """Return a random Llama-shaped denoiser whose weights are large enough for its distributions to differ.

    The last token is the mask, the one before it EOS; with a `block_length` attention is block-causal.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    config.is_causal = False
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    attention = "full" if block_length is None else "block_causal"
    family = Family(
        "llada", vocabulary, vocabulary - 1, (vocabulary - 2,), attention=attention, block_length=block_length
    )
    return Denoiser(model, family, byte_tokenizer())
