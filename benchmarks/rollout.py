"""Rollouts against a textbook sampler and with caches, on a random 72 M LLaDA shape: ratios of one run.

python benchmarks/rollout.py [--batch 16] [--canvas 128] [--per-step 4] [--layers 12] [--json FILE]

The textbook sampler below is what papers print: a forward over the whole canvas, logits of every position, fp64 noise
and softmax, no early stop, a Python loop over rows. Both decode greedily, so that their tokens must be identical.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import Family
from unmask.policies.tokenizers import byte_tokenizer
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.worker import pad_left

VOCABULARY, HIDDEN, MLP, HEADS = 32768, 512, 1408, 8
MASK, EOS = VOCABULARY - 1, VOCABULARY - 2


@dataclass
class Timed:
    """A denoiser that adds up the seconds of its trunk and of its head, and the tokens that each saw."""

    inner: Denoiser
    trunk_s: float = 0.0
    head_s: float = 0.0
    trunk_tokens: int = 0
    head_rows: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def hidden(self, *arguments: Any, **options: Any) -> Tensor:
        """Time the trunk."""
        started = time.perf_counter()
        found = self.inner.hidden(*arguments, **options)
        self.trunk_s += time.perf_counter() - started
        self.trunk_tokens += found.shape[0] * found.shape[1]
        return found

    def columns(self, *arguments: Any) -> Tensor:
        """Time the trunk behind a cache."""
        started = time.perf_counter()
        found = self.inner.columns(*arguments)
        self.trunk_s += time.perf_counter() - started
        self.trunk_tokens += found.shape[0] * found.shape[1]
        return found

    def head(self, hidden: Tensor) -> Tensor:
        """Time the head."""
        started = time.perf_counter()
        found = self.inner.head(hidden)
        self.head_s += time.perf_counter() - started
        self.head_rows += len(hidden)
        return found


def random_denoiser(layers: int, block_length: int | None = None) -> Denoiser:
    """Return a random Llama-shaped denoiser whose weights are large enough for its distributions to differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    config.is_causal = False
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    attention = "full" if block_length is None else "block_causal"
    family = Family("llada", VOCABULARY, MASK, (EOS,), attention=attention, block_length=block_length)
    return Denoiser(model, family, byte_tokenizer())


def prompts(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return `rows` random prompts of 32 to 96 tokens, left padded."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(32, 97, (rows,), generator=rng).tolist()
    return pad_left([torch.randint(0, 32000, (n,), generator=rng).tolist() for n in lengths], EOS)


@torch.no_grad()
def textbook(
    model: Any, prompt_BQ: Tensor, mask_BQ: Tensor, canvas: int, block: int, per_step: int, temperature: float = 0.0
) -> Tensor:
    """Fill the canvas as the formulas are printed; returns its tokens."""
    rows = len(prompt_BQ)
    x = torch.cat([prompt_BQ, torch.full((rows, canvas), MASK)], dim=1)
    attention = torch.cat([mask_BQ, torch.ones(rows, canvas, dtype=torch.bool)], dim=1).long()
    start = prompt_BQ.shape[1]
    for first in range(start, start + canvas, block):
        for _ in range(block // per_step):
            logits = model(input_ids=x, attention_mask=attention).logits
            logits[:, :, MASK] = -torch.inf
            noisy = logits.double()
            if temperature > 0:
                noise = torch.rand_like(noisy)
                noisy = noisy.exp() / (-noise.log()) ** temperature
            drawn = noisy.argmax(dim=-1)
            confidence = logits.double().softmax(dim=-1).gather(-1, drawn[..., None]).squeeze(-1)
            confidence[x != MASK] = -torch.inf
            confidence[:, first + block :] = -torch.inf
            for row in range(rows):
                chosen = confidence[row].topk(per_step).indices
                x[row, chosen] = drawn[row, chosen]
    return x[:, start:]


def ours(denoiser: Any, prompt_BQ: Tensor, mask_BQ: Tensor, canvas: int, section: dict[str, Any]) -> Tensor:
    """Return the tokens of our engine."""
    sampler = build_sampler({"eos": {"rule": "none"}, **section}, temperature=0.0)
    canvas_BL = torch.full((len(prompt_BQ), canvas), MASK)
    return denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(len(prompt_BQ)), seed=0).tokens_BL


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return a call's result and its seconds."""
    started = time.perf_counter()
    found = function()
    return found, time.perf_counter() - started


def against_textbook(arguments: argparse.Namespace) -> dict[str, Any]:
    """Greedy decoding in blocks, without a cache: equal tokens, seconds of both, and where ours go."""
    denoiser = random_denoiser(arguments.layers)
    prompt_BQ, mask_BQ = prompts(arguments.batch)
    blocks = {"schedule": {"name": "blocks", "size": arguments.block, "per_step": arguments.per_step}}
    ours(denoiser, prompt_BQ[:2], mask_BQ[:2], arguments.block, blocks)
    probe = Timed(denoiser)
    fast, fast_s = timed(lambda: ours(probe, prompt_BQ, mask_BQ, arguments.canvas, blocks))
    plain, plain_s = timed(
        lambda: textbook(denoiser.model, prompt_BQ, mask_BQ, arguments.canvas, arguments.block, arguments.per_step)
    )
    return {
        "tokens_identical": bool(torch.equal(fast, plain)),
        "textbook_s": plain_s,
        "unmask_s": fast_s,
        "ratio": fast_s / plain_s,
        "trunk_share": probe.trunk_s / fast_s,
        "head_share": probe.head_s / fast_s,
        "everything_else_share": 1 - (probe.trunk_s + probe.head_s) / fast_s,
        "trunk_tokens": probe.trunk_tokens,
        "head_rows": probe.head_rows,
    }


def against_uncached(arguments: argparse.Namespace, cache: str, block_length: int | None) -> dict[str, Any]:
    """One cache against the same rollout without: seconds, tokens computed, share of equal tokens."""
    denoiser = random_denoiser(arguments.layers, block_length)
    prompt_BQ, mask_BQ = prompts(arguments.batch)
    blocks = {"schedule": {"name": "blocks", "size": arguments.block, "per_step": arguments.per_step}}
    none, cached = Timed(denoiser), Timed(denoiser)
    plain, plain_s = timed(lambda: ours(none, prompt_BQ, mask_BQ, arguments.canvas, blocks))
    fast, fast_s = timed(lambda: ours(cached, prompt_BQ, mask_BQ, arguments.canvas, {**blocks, "cache": cache}))
    return {
        "cache": cache,
        "uncached_s": plain_s,
        "cached_s": fast_s,
        "speedup": plain_s / fast_s,
        "tokens_computed_ratio": cached.trunk_tokens / none.trunk_tokens,
        "agreement": (plain == fast).double().mean().item(),
    }


def show(row: dict[str, Any]) -> None:
    """Print a row's numbers."""
    print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--canvas", type=int, default=128)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--per-step", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--no-caches", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"textbook": against_textbook(arguments)}
    show(found["textbook"])
    if not arguments.no_caches:
        found["caches"] = []
        for cache, block_length in (("block_causal", arguments.block), ("dual", None), ("prefix", None)):
            found["caches"].append(against_uncached(arguments, cache, block_length))
            show(found["caches"][-1])
    keys = ("batch", "canvas", "block", "per_step", "layers")
    shape = {key: getattr(arguments, key) for key in keys} | {"hidden": HIDDEN, "vocabulary": VOCABULARY}
    print(f"wrote {save('rollout', {'shape': shape, **found}, arguments.json, seeds={'weights': 0, 'prompts': 0})}")


if __name__ == "__main__":
    main()
