"""What bfloat16 costs each family on its stock class, and what the vendor's own rounding would change.

The folders with the vendors' logits (tests/fixtures) are loaded in float32 and in bfloat16; LLaDA's rotation and SDAR's
norms are then computed as their vendors do. KL divergences in nats from the float32 distribution, mean over positions.

python benchmarks/bf16.py [--tokens 256] [--rows 16] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import save
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from unmask.policies.loading import load_denoiser
from unmask.policies.tokenizers import byte_tokenizer
from unmask.rollouts.noise import generator

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


@contextlib.contextmanager
def rotation_in_float32() -> Iterator[None]:
    """LLaDA: cos and sin stay in float32, queries and keys are rounded after the rotation."""
    trigonometry = modeling_llama.LlamaRotaryEmbedding.forward

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return trigonometry(self, x.float(), position_ids)

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        turned = ((x.float() * cos + modeling_llama.rotate_half(x.float()) * sin).to(x.dtype) for x in (query, key))
        return tuple(turned)

    with (
        patch.object(modeling_llama.LlamaRotaryEmbedding, "forward", forward),
        patch.object(modeling_llama, "apply_rotary_pos_emb", rotate),
    ):
        yield


@contextlib.contextmanager
def norms_rounded_once() -> Iterator[None]:
    """SDAR: the normalised states are multiplied by the weight before they are rounded."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * self.weight.float()).to(hidden.dtype)

    with patch.object(modeling_qwen3.Qwen3RMSNorm, "forward", forward):
        yield


VENDOR: dict[str, tuple[str, Any]] = {
    "llada": ("rotation in float32", rotation_in_float32),
    "sdar": ("norms rounded once", norms_rounded_once),
}


def divergence(of_BTV: Tensor, to_BTV: Tensor) -> float:
    """Return KL(of || to) in nats, mean over positions."""
    p, q = (logits.double().log_softmax(-1) for logits in (of_BTV, to_BTV))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@torch.no_grad()
def measure(name: str, rows: int, tokens: int) -> dict[str, Any]:
    """Return one family's divergences from float32 and from the vendor's rounding."""
    facts = json.loads((FIXTURES / name / "golden.json").read_text())
    options = {"mask_token_id": facts["mask_token_id"], "block_length": facts["block_length"]}
    full, half = (load_denoiser(str(FIXTURES / name), tokenizer=byte_tokenizer(), **options) for _ in range(2))
    # As loading in bfloat16 does; it refuses these small mixtures, whose rows are too narrow for the grouped kernel.
    half.base.config._experts_implementation = "eager"
    for parameter in half.model.parameters():
        parameter.data = parameter.data.bfloat16()
    ids = torch.randint(0, full.family.vocab_size, (rows, tokens), generator=generator(0, "bf16", 0))
    exact, stock = full.logits(ids), half.logits(ids)
    result = {"family": name, "stock": divergence(exact, stock), "vendor": None, "stock_to_vendor": None, "flag": None}
    if name in VENDOR:
        result["flag"], rounding = VENDOR[name]
        with rounding():
            theirs = half.logits(ids)
        result |= {"vendor": divergence(exact, theirs), "stock_to_vendor": divergence(theirs, stock)}
    half.model.to(torch.bfloat16)  # also RoPE's frequencies: what the self-check refuses
    return result | {"cast": divergence(exact, half.logits(ids))}


def main() -> None:
    """Measure every family and print the table of docs/precision.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    names = sorted(path.name for path in FIXTURES.iterdir() if (path / "golden.json").is_file())
    results = [measure(name, arguments.rows, arguments.tokens) for name in names]
    print("| family | stock class | vendor's rounding | stock from vendor's | after `.to(bfloat16)` |")
    print("|---|---|---|---|---|")
    for row in results:
        cells = [
            f"{row[key]:.1e}" if row[key] is not None else "" for key in ("stock", "vendor", "stock_to_vendor", "cast")
        ]
        print(f"| `{row['family']}` | {' | '.join(cells)} |")
    shape = {"rows": arguments.rows, "tokens": arguments.tokens, "positions": arguments.rows * arguments.tokens}
    print(f"wrote {save('bf16', {'shape': shape, 'rows': results}, arguments.json, seeds={'ids': 0})}")


if __name__ == "__main__":
    main()
