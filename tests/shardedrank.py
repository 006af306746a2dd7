"""The body of one rank of `test_sharding`: `JOB` names a case below; it fails with a traceback in the job's output."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from unmask.policies.adapters import attach_adapter, lora_config
from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import load_denoiser, new_denoiser
from unmask.policies.reference import AdapterOff
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.loading import load_recipe
from unmask.rl.distributed import anyone, rank, reduce_gradients, world_size
from unmask.rl.finite import require_finite_gradient
from unmask.rl.memory import estimate
from unmask.rl.sharding import paced, shard, whole
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.trajectory import Trajectory

FIXTURES = Path(__file__).parent / "fixtures"
# The spans of each rank: more on one, none on the other, one each.
SHARES = ([[(0, 1), (1, 2), (2, 4)], []], [[], [(0, 4)]], [[(0, 3)], [(3, 4)]])


def seeded(seed: int) -> torch.Generator:
    """Return a generator."""
    return torch.Generator().manual_seed(seed)


def build(name: str, *, lora: bool) -> Denoiser:
    """Return a small denoiser, with an adapter that does something."""
    if name == "tiny":
        denoiser = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64)
    elif name == "tied":
        denoiser = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64)
        denoiser.model.config.tie_word_embeddings = True
        denoiser.model.tie_weights()
        assert denoiser.model.lm_head.weight is denoiser.model.model.embed_tokens.weight
    else:
        facts = json.loads((FIXTURES / name / "golden.json").read_text())
        given = {"mask_token_id": facts["mask_token_id"], "block_length": facts["block_length"]}
        denoiser = load_denoiser(str(FIXTURES / name), tokenizer=byte_tokenizer(), **given)
    if lora:
        denoiser = attach_adapter(denoiser, lora_config(denoiser, rank=2))
        with torch.no_grad():
            for key, parameter in denoiser.model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0.0, 0.1, generator=seeded(1))
    denoiser.model.train()
    return denoiser


def update(denoiser: Denoiser, ids_BT: Tensor, weight_BTV: Tensor, spans: list[tuple[int, int]]) -> None:
    """Add the gradient of a weighted sum of logits, span by span."""
    for start, stop in paced(denoiser, spans):
        (denoiser.logits(ids_BT[start:stop]) * weight_BTV[start:stop]).sum().backward()
    reduce_gradients(denoiser.model.parameters(), average=False)


def compare_gradients(one: Denoiser, other: Denoiser) -> None:
    """Assert that a sharded model has the gradient of a plain one."""
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert isinstance(b, DTensor) and b.requires_grad == a.requires_grad, name
        if a.requires_grad:
            assert a.grad is not None and b.grad is not None, name
            assert (b.grad.full_tensor() - a.grad).norm() <= 1e-5 * a.grad.norm().clamp(min=1e-3), name
    norms = [torch.nn.utils.get_total_norm([p.grad for p in d.model.parameters() if p.grad is not None])
             for d in (one, other)]  # fmt: skip
    assert abs(norms[1].full_tensor() / norms[0] - 1) < 1e-5
    require_finite_gradient(other.model.parameters(), 0)


def gradients(name: str, *, lora: bool) -> None:
    """Ranks with different numbers of spans get the gradient of one process, and the same after a step."""
    plain, sharded = build(name, lora=lora), build(name, lora=lora)
    vocabulary = plain.family.vocab_size
    ids_BT = torch.randint(0, vocabulary - 1, (4, 24), generator=seeded(0))
    weight_BTV = torch.randn(4, 24, vocabulary, generator=seeded(2))
    shard(sharded)
    optimizers = [
        torch.optim.AdamW([p for p in d.model.parameters() if p.requires_grad], lr=1e-2) for d in (plain, sharded)
    ]
    for shares in SHARES:
        (plain.logits(ids_BT) * weight_BTV).sum().backward()
        update(sharded, ids_BT, weight_BTV, shares[rank()])
        compare_gradients(plain, sharded)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad(), whole(sharded):
            assert torch.allclose(sharded.logits(ids_BT), plain.logits(ids_BT), rtol=0, atol=1e-4)


def forwards(name: str, *, lora: bool) -> None:
    """Inside `whole` the ranks run as often as they like, policy and reference; outside again, weights are shared."""
    plain, sharded = build(name, lora=lora), build(name, lora=lora)
    ids_BT = torch.randint(0, plain.family.vocab_size - 1, (4, 24), generator=seeded(0))
    shard(sharded)
    references = [AdapterOff(d, d.family) if lora else d for d in (plain, sharded)]
    with torch.no_grad():
        for source, expected in zip((sharded, references[1]), (plain, references[0]), strict=True):
            with whole(source), whole(source):
                assert not any(isinstance(p, DTensor) for p in sharded.model.parameters())
                for _ in range(5 * rank()):
                    assert torch.equal(source.logits(ids_BT), expected.logits(ids_BT))
            assert all(isinstance(p, DTensor) for p in sharded.model.parameters())
    if lora:
        assert not torch.equal(references[0].logits(ids_BT), plain.logits(ids_BT))


def rollouts(name: str, *, lora: bool) -> None:
    """Weights that every forward gathers: ranks whose rows end at different steps call as often as the last one."""
    plain, sharded = build(name, lora=lora), build(name, lora=lora)
    shard(sharded)
    length = plain.family.block_length or 8
    prompt_BQ = torch.randint(0, 200, (3, 8), generator=seeded(0))
    canvas_BL = torch.full((3, 2 * length), plain.family.mask_token_id)
    canvas_BL[1, length // 2 :] = 65  # given: this row is done long before the others
    shares = [torch.tensor([1]), torch.tensor([0, 2])]
    for cache in (None, "dual" if plain.family.attention == "full" else "block_causal"):
        schedule = {"name": "blocks", "size": length, "per_step": 1}
        sampler = build_sampler({"schedule": schedule, "eos": {"rule": "none"}, "cache": cache})

        def run(denoiser: Denoiser, row_B: Tensor, sampler: Sampler = sampler, **options: Any) -> Trajectory:
            rows, mask = prompt_BQ[row_B], torch.ones_like(prompt_BQ[row_B], dtype=torch.bool)
            return denoise(denoiser, sampler, rows, mask, canvas_BL[row_B], row_B, seed=0, **options)

        found, wanted = run(sharded, shares[rank()], anyone=anyone), run(plain, torch.arange(3)).select(shares[rank()])
        assert torch.equal(found.tokens_BL, wanted.tokens_BL) and torch.equal(found.born_BL, wanted.born_BL)
        assert int(found.steps_B.max()) == (length // 2 if rank() == 0 else 2 * length)


def bfloat16(name: str, *, lora: bool) -> None:
    """Trained bfloat16 weights are float32 shards: forwards are the plain model's, small steps are not lost."""
    plain = build(name, lora=lora)
    for parameter in plain.model.parameters():
        parameter.data = parameter.data.bfloat16()
    sharded = copy.deepcopy(plain)
    shard(sharded)
    ids_BT = torch.randint(0, plain.family.vocab_size - 1, (4, 24), generator=seeded(0))
    with torch.no_grad(), whole(sharded):
        assert torch.equal(sharded.logits(ids_BT), plain.logits(ids_BT))
    before = {key: value.full_tensor().clone() for key, value in sharded.model.named_parameters()}
    update(sharded, ids_BT, torch.randn(4, 24, plain.family.vocab_size, generator=seeded(2)), [(0, 2)])
    optimizer = torch.optim.AdamW(sharded.model.parameters(), lr=1e-6, weight_decay=0.0)
    optimizer.step()
    for key, parameter in sharded.model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        moved = (parameter.full_tensor() - before[key]).abs()
        # Adam's first step is the learning rate wherever there is a gradient; bfloat16 would round it away.
        if "proj" in key:
            assert 0.5e-6 < moved.median() < 1.5e-6, key
            assert (before[key].bfloat16() - 1e-6).eq(before[key]).float().mean() > 0.5, key


def memory(name: str, *, lora: bool) -> None:
    """Every rank holds its share, and the estimate says how much that is."""
    overrides = ["model.device=cpu", "model.sharding=fsdp", *([] if lora else ["model.lora=null"])]
    recipe: Any = load_recipe("cj_grpo_tiny_arithmetic.yaml", [*overrides, "objective.beta=0"])
    denoiser = load_denoiser(recipe.model.path)
    if lora:
        denoiser = attach_adapter(denoiser, lora_config(denoiser, **recipe.model.lora.model_dump()))
    whole_bytes = sum(p.numel() * 4 for p in denoiser.model.parameters())
    shard(denoiser)
    parameters = list(denoiser.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    update(denoiser, torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, denoiser.family.vocab_size), [(0, 2)])
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    held = sum(local(p) for p in parameters)
    moments = sum(local(value) for p in trained for value in optimizer.state[p].values() if value.ndim)
    found = estimate(recipe, world_size())
    assert found is not None and found.whole == whole_bytes
    assert abs(held - found.weights - found.adapter) <= 0.01 * held and held < 0.51 * whole_bytes
    assert abs(moments + sum(local(p.grad) for p in trained) - found.optimizer) <= 0.01 * found.optimizer


def local(tensor: Any) -> int:
    """Return the bytes of this rank's share."""
    return tensor.to_local().nbytes


if __name__ == "__main__" or "JOB" in globals():
    job: dict[str, Any] = globals()["JOB"]
    os.environ.update(job["environment"])
    handle = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case, model, lora in job["cases"]:
        globals()[case](model, lora=lora)
    dist.destroy_process_group()
    sys.exit(0)
