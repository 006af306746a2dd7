"""Rollouts against a textbook sampler and with caches, on a random 72 M LLaDA shape: ratios of one run.

python benchmarks/rollout.py [--batch 16] [--canvas 128] [--per-step 8] [--layers 12] [--rounds 2]
    [--only block_causal ...] [--json FILE]

The textbook sampler below is what papers print: a forward over the whole canvas, logits of every position, fp64 noise
and softmax, no early stop, a Python loop over rows. Both decode greedily, so that their tokens must be identical.
Every rollout is a whole one. All contenders take turns, `--rounds` times; what else a machine does can only lengthen
a run, so that ratios are of each one's shortest, and all seconds are written down. Beside them stand the seconds of
all cores together (`cpu_s`), which a busy machine changes little where waiting threads sleep: OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import save
from shapes import random_llama
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.worker import pad_left

VOCABULARY, HIDDEN, MLP, HEADS = 32768, 512, 1408, 8
MASK, EOS = VOCABULARY - 1, VOCABULARY - 2
CACHES: dict[str, Any] = {
    "dual": "dual",
    "dual_refreshed": {"name": "dual", "refresh": 8},  # differs from dual where a block takes more than 8 steps
    "prefix": "prefix",
    "block_causal": "block_causal",
}
USUAL = ("textbook", "dual", "prefix", "block_causal")


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
    """Return a random denoiser of this benchmark's shape."""
    return random_llama(VOCABULARY, HIDDEN, MLP, layers, HEADS, block_length=block_length)


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


def warm_up(denoiser: Denoiser, prompt_BQ: Tensor, mask_BQ: Tensor, canvas: int) -> None:
    """Call trunk and head once in the benchmark's shapes: the first call of a process allocates and plans."""
    ids_BT = torch.cat([prompt_BQ, torch.full((len(prompt_BQ), canvas), MASK)], dim=1)
    seen_BT = torch.cat([mask_BQ, torch.ones(len(mask_BQ), canvas, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        denoiser.head(denoiser.hidden(ids_BT, padding_mask_BT=seen_BT))


@dataclass
class Contender:
    """One way to fill the canvases: its tokens, its seconds, and what its last run did in trunk and head."""

    tokens_BL: Tensor
    seconds: list[float]
    cpu_seconds: list[float]
    probe: Timed | None = None

    @property
    def least_s(self) -> float:
        """The shortest run."""
        return min(self.seconds)

    def shares(self) -> dict[str, Any]:
        """Return the last run's shares of its seconds, and how much trunk and head computed."""
        assert self.probe is not None
        trunk, head = self.probe.trunk_s / self.seconds[-1], self.probe.head_s / self.seconds[-1]
        return {
            "trunk_share": trunk,
            "head_share": head,
            "everything_else_share": 1 - trunk - head,
            "trunk_tokens": self.probe.trunk_tokens,
            "head_rows": self.probe.head_rows,
        }


def timed(function: Callable[[], Tensor], probe: Timed | None = None) -> Contender:
    """Call a contender, and time it."""
    started, cpu_started = time.perf_counter(), time.process_time()
    found = function()
    return Contender(found, [time.perf_counter() - started], [time.process_time() - cpu_started], probe)


def roll(denoiser: Denoiser, arguments: argparse.Namespace, cache: Any = None) -> Contender:
    """Decode greedily in blocks, and time it."""
    prompt_BQ, mask_BQ = prompts(arguments.batch)
    blocks = {"schedule": {"name": "blocks", "size": arguments.block, "per_step": arguments.per_step}, "cache": cache}
    probe = Timed(denoiser)
    return timed(lambda: ours(probe, prompt_BQ, mask_BQ, arguments.canvas, blocks), probe)


def plainly(denoiser: Denoiser, arguments: argparse.Namespace) -> Contender:
    """Time the textbook sampler."""
    prompt_BQ, mask_BQ = prompts(arguments.batch)
    sizes = (arguments.canvas, arguments.block, arguments.per_step)
    return timed(lambda: textbook(denoiser.model, prompt_BQ, mask_BQ, *sizes))


def in_turns(contenders: dict[str, Callable[[], Contender]], rounds: int) -> dict[str, Contender]:
    """Run all contenders one after the other, `rounds` times; every time each must decide the same tokens."""
    found: dict[str, Contender] = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            made = run()
            if name in found:
                assert torch.equal(made.tokens_BL, found[name].tokens_BL), f"{name} is not reproducible"
                made.seconds = [*found[name].seconds, *made.seconds]
                made.cpu_seconds = [*found[name].cpu_seconds, *made.cpu_seconds]
            found[name] = made
            print(f"{name}: {made.seconds[-1]:.1f} s, {made.cpu_seconds[-1]:.1f} s of all cores", flush=True)
    return found


def against_textbook(fast: Contender, plain: Contender) -> dict[str, Any]:
    """Without a cache: equal tokens, seconds of both, and where ours go."""
    same = torch.equal(fast.tokens_BL, plain.tokens_BL)
    row = {
        "tokens_identical": same,
        "textbook_s": plain.seconds,
        "textbook_cpu_s": plain.cpu_seconds,
        "unmask_s": fast.seconds,
        "unmask_cpu_s": fast.cpu_seconds,
        "ratio": fast.least_s / plain.least_s,
        "ratio_cpu": min(fast.cpu_seconds) / min(plain.cpu_seconds),
    }
    return row | fast.shares()


def against_uncached(fast: Contender, none: Contender, cache: str) -> dict[str, Any]:
    """One cache against the same rollout without: seconds, columns computed, share of equal tokens."""
    assert fast.probe is not None and none.probe is not None
    row = {
        "cache": cache,
        "uncached_s": none.seconds,
        "cached_s": fast.seconds,
        "uncached_cpu_s": none.cpu_seconds,
        "cached_cpu_s": fast.cpu_seconds,
        "speedup": none.least_s / fast.least_s,
        "speedup_cpu": min(none.cpu_seconds) / min(fast.cpu_seconds),
        "columns_computed_ratio": fast.probe.trunk_tokens / none.probe.trunk_tokens,
        "agreement": (none.tokens_BL == fast.tokens_BL).double().mean().item(),
    }
    return row | fast.shares()


def show(row: dict[str, Any]) -> None:
    """Print a row's numbers."""
    print(json.dumps(json.loads(json.dumps(row), parse_float=lambda text: round(float(text), 4))), flush=True)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--canvas", type=int, default=128)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--per-step", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--only", nargs="+", choices=["textbook", *CACHES], default=list(USUAL))
    arguments = parser.parse_args()
    denoiser, causal = random_denoiser(arguments.layers), random_denoiser(arguments.layers, arguments.block)
    contenders: dict[str, Callable[[], Contender]] = {}
    if "textbook" in arguments.only:
        contenders["textbook"] = partial(plainly, denoiser, arguments)
    if set(arguments.only) - {"block_causal"}:
        contenders["none"] = partial(roll, denoiser, arguments)
    for cache in [cache for cache in CACHES if cache in arguments.only]:
        model = causal if cache == "block_causal" else denoiser
        if model is causal:
            contenders["block-causal, none"] = partial(roll, causal, arguments)
        contenders[cache] = partial(roll, model, arguments, CACHES[cache])
    for model in (denoiser, causal):
        warm_up(model, *prompts(arguments.batch), arguments.canvas)
    made = in_turns(contenders, arguments.rounds)
    found: dict[str, Any] = {}
    if "textbook" in made:
        found["textbook"] = against_textbook(made["none"], made["textbook"])
        show(found["textbook"])
    found["caches"] = [
        against_uncached(made[cache], made["block-causal, none" if cache == "block_causal" else "none"], cache)
        for cache in CACHES
        if cache in made
    ]
    for row in found["caches"]:
        show(row)
    keys = ("batch", "canvas", "block", "per_step", "layers", "rounds")
    shape = {key: getattr(arguments, key) for key in keys} | {"hidden": HIDDEN, "vocabulary": VOCABULARY}
    shape["parameters"] = sum(weight.numel() for weight in denoiser.model.parameters())
    print(f"wrote {save('rollout', {'shape': shape, **found}, arguments.json, seeds={'weights': 0, 'prompts': 0})}")


if __name__ == "__main__":
    main()
