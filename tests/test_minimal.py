"""recipes/minimal.py computes what the library computes: rollouts, log-probabilities, loss and gradient."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import load_denoiser
from unmask.policies.tokenizers import byte_tokenizer, prompt_ids
from unmask.recipes import minimal, tasks
from unmask.rewards.mathematics import judge_arithmetic
from unmask.rl.advantages import group_mean
from unmask.rl.estimators import trace
from unmask.rl.objective import build_objective
from unmask.rl.replay import replay_all
from unmask.rollouts.engine import denoise
from unmask.rollouts.forward import window_logits
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.trajectory import PAD, SAMPLED, Trajectory

PROMPTS = ["7 a+8 b-3", "1 a-4 b+9 c+2 d-5", "0 a-3"]
LENGTH, BLOCK, PER_STEP = 16, 8, 2
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
OTHER_NAMES = {"model.embed_tokens": "model.transformer.wte", "model.norm": "model.transformer.ln_f"}


def vendor_name(name: str) -> str:
    """Return LLaDA's name of a Llama's tensor (its published model.safetensors.index.json)."""
    stem = name.removesuffix(".weight")
    if stem == "lm_head":
        return "model.transformer.ff_out.weight"
    if stem in OTHER_NAMES:
        return OTHER_NAMES[stem] + ".weight"
    _, _, number, leaf = stem.split(".", 3)
    return f"model.transformer.blocks.{number}.{BLOCK_NAMES[leaf]}.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in LLaDA's layout, scaled so that its distributions are neither flat nor peaked."""
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
    weights = {vendor_name(k): 5 * v.detach() if v.ndim == 2 else v.detach() for k, v in model.state_dict().items()}
    path = tmp_path_factory.mktemp("llada")
    save_file(weights, path / "model.safetensors")
    vendor = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "activation_type": "silu",
        "d_model": 32,
        "mlp_hidden_size": 56,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e4,
        "vocab_size": 261,
        "embedding_size": 261,
        "weight_tying": False,
        "max_sequence_length": 128,
        "mask_token_id": 257,
        "eos_token_id": 256,
    }
    (path / "config.json").write_text(json.dumps(vendor))
    return path


@pytest.fixture
def denoiser(folder: Path) -> Denoiser:
    return load_denoiser(str(folder))


@pytest.fixture
def plain(folder: Path) -> LlamaForCausalLM:
    return minimal.load_model(folder)


def sampler(temperature: float) -> Sampler:
    schedule = {"name": "blocks", "size": BLOCK, "per_step": PER_STEP}
    return build_sampler({"schedule": schedule, "score": "confidence", "selection": "top"}, temperature=temperature)


def rollouts(model: LlamaForCausalLM, temperature: float = 1.0, group: int = 6) -> minimal.Rollouts:
    """Return rollouts of which at least two, but not all, end with an EOS that stands before the last position."""
    prompt_BQ = minimal.encode([p for p in PROMPTS for _ in range(group)])
    for seed in range(100):
        noise = torch.Generator().manual_seed(seed)
        batch = minimal.rollout(model, prompt_BQ, noise, LENGTH, BLOCK, PER_STEP, temperature)
        ended_B = (batch.tokens_BL[:, :-1] == minimal.EOS).any(dim=1)
        if 2 <= int(ended_B.sum()) < len(ended_B):
            return batch
    raise AssertionError("no seed ends two rollouts")


def as_trajectory(batch: minimal.Rollouts, temperature: float) -> Trajectory:
    """Return minimal's record in the library's form."""
    sampled_BL = batch.born_BL >= 0
    rank_BL = torch.full_like(batch.born_BL, -1)
    for row in range(len(rank_BL)):
        for step in range(int(batch.born_BL.max()) + 1):
            where = (batch.born_BL[row] == step).nonzero()[:, 0]
            rank_BL[row, where] = torch.arange(len(where))
    return Trajectory(
        prompt_BQ=batch.prompt_BQ,
        prompt_mask_BQ=batch.prompt_BQ != minimal.EOS,
        tokens_BL=batch.tokens_BL,
        source_BL=torch.where(sampled_BL, SAMPLED, PAD).to(torch.int8),
        born_BL=batch.born_BL.to(torch.int16),
        rank_BL=rank_BL.to(torch.int16),
        logprob_BL=batch.logprob_BL,
        steps_B=batch.born_BL.amax(dim=1) + 1,
        rollout_id_B=torch.arange(len(rank_BL)),
        temperature=temperature,
        mask_token_id=minimal.MASK,
        eos_token_ids=(minimal.EOS,),
        banned_token_ids=(minimal.MASK,),
    )


def relative(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b| in the Euclidean norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_it_stands_alone() -> None:
    names = set()
    for node in ast.walk(ast.parse(Path(minimal.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(str(node.module).split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "transformers", "safetensors"}


def test_prompts_are_the_librarys() -> None:
    tokenizer = byte_tokenizer()
    for row, prompt in zip(minimal.encode(PROMPTS).tolist(), PROMPTS, strict=True):
        ids = prompt_ids(tokenizer, prompt)
        assert row[-len(ids) :] == ids and set(row[: -len(ids)]) <= {tokenizer.eos_token_id}
    ids = tokenizer("a7+8=5\n#### 5")["input_ids"]
    assert minimal.decode(torch.tensor([*ids, minimal.EOS, 65, minimal.MASK])) == tokenizer.decode(ids)
    assert minimal.decode(torch.tensor(ids)) == tokenizer.decode(ids)


def test_problems_are_the_librarys() -> None:
    """The library's generator, given the same numbers, writes the same prompts and solutions."""
    rows = tasks.arithmetic("train", seed=0, operations=(7, 9))
    for index in range(20):
        row = rows.row(index)
        value, *words = row["prompt"].split(" ")
        pieces = iter([int(value), *(p for w in words for p in (w[1], int(w[2:])))])
        prompt, answer = minimal.problem(Replay(pieces, len(words)))
        assert (prompt, answer) == (row["prompt"], row["answer"])
        assert minimal.reward(row["reference"], answer) == 1.0


class Replay(random.Random):
    """A random.Random that gives recorded numbers."""

    def __init__(self, pieces: Any, length: int) -> None:
        super().__init__(0)
        self.pieces, self.length = pieces, length

    def randrange(self, *_: Any, **__: Any) -> int:
        return next(self.pieces)

    def choice(self, _: Any) -> Any:
        return next(self.pieces)

    def randint(self, *_: Any) -> int:
        return self.length


@pytest.mark.parametrize(
    "text", ["a7+8=5\n#### 5", "#### 4\n#### 5", "#### 5\n#### 4", "#### 5 \nb", "####5", "#### 6", "5", "####", ""]
)
def test_reward_is_the_librarys(text: str) -> None:
    assert minimal.reward(text, "5") == judge_arithmetic(text, "5").value


def test_logits_are_the_librarys(denoiser: Denoiser, plain: LlamaForCausalLM) -> None:
    batch = rollouts(plain)
    canvas_BL = torch.where(batch.born_BL < 3, batch.tokens_BL, minimal.MASK)
    open_BL = canvas_BL == minimal.MASK
    with torch.no_grad():
        ours_KV = minimal.logits(plain, batch.prompt_BQ, canvas_BL, open_BL)
        theirs_KV = window_logits(denoiser, batch.prompt_BQ, batch.prompt_BQ != minimal.EOS, canvas_BL, open_BL)
    assert bool((ours_KV[:, minimal.MASK] == -torch.inf).all())
    others = [v for v in range(261) if v != minimal.MASK]
    assert relative(ours_KV[:, others], theirs_KV[:, others]) < 1e-6
    assert float(ours_KV[:, others].std()) > 0.5, "flat logits would compare nothing"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_librarys(denoiser: Denoiser, plain: LlamaForCausalLM, temperature: float) -> None:
    batch = rollouts(plain, temperature)
    views = trace(as_trajectory(batch, temperature), rng=None)
    theirs_K = replay_all(denoiser, views, 5).logprob_A
    ours_K = batch.logprob_BL[views.row_K, views.position_K]
    assert 150 < len(ours_K) < batch.tokens_BL.numel(), "some tokens stand behind an EOS"
    assert relative(ours_K, theirs_K) < 1e-6
    assert float((ours_K - theirs_K).abs().max()) < 1e-4


OBJECTIVE = {
    "estimator": "trace",
    "unit": "token",
    "bound": "sum",
    "surrogate": {"name": "ppo_clip", "low": 0.2, "high": 0.2},
    "weight": "per_step_mean",
    "beta": 0.0,
    "chunk": 7,
}


@torch.no_grad()
def move(model: LlamaForCausalLM) -> None:
    """Change the weights as an earlier inner step would, so that ratios differ from 1 and some are clipped."""
    noise = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=noise) * parameter.abs().mean()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("moved", [False, True], ids=["first pass", "second pass"])
def test_loss_and_gradient_are_the_librarys(
    denoiser: Denoiser, plain: LlamaForCausalLM, temperature: float, moved: bool
) -> None:
    batch = rollouts(plain, temperature)
    noise = torch.Generator().manual_seed(4)
    reward_B = torch.randint(0, 2, (len(batch.tokens_BL),), generator=noise).float()
    reward_B[:6] = 1.0  # a group that agrees has advantage 0, and still counts in the mean over rollouts
    group_B = torch.arange(len(PROMPTS)).repeat_interleave(6)
    advantage_B = reward_B - reward_B.view(-1, 6).mean(dim=1).repeat_interleave(6)
    assert torch.allclose(advantage_B, group_mean(reward_B, group_B), atol=1e-7)
    objective = build_objective(OBJECTIVE)
    trajectory = as_trajectory(batch, temperature)
    plan = objective.plan(denoiser, None, trajectory, advantage_B, rng=None, sampler=sampler(temperature))
    if moved:
        move(plain)
        move(denoiser.model)
    stats = objective.backward(denoiser, plan)
    loss, deviation = minimal.backward(plain, batch, advantage_B, clip=0.2, temperature=temperature)
    assert (stats["clip_fraction"] > 0.02) == moved, "a second pass in which nothing is clipped compares too little"
    assert loss == pytest.approx(stats["loss"], rel=1e-5, abs=1e-6)
    assert deviation == pytest.approx(stats["ratio_max_deviation"], rel=1e-4, abs=1e-5)
    assert (deviation < 1e-5) != moved
    theirs = {name: p.grad for name, p in denoiser.model.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() == {name for name, _ in plain.named_parameters()}
    for name in ours:
        assert relative(ours[name], theirs[name]) < 1e-5, name


def test_it_runs(folder: Path) -> None:
    options = ["--model", str(folder), "--batches", "2", "--prompts", "2", "--group", "2"]
    run = subprocess.run([sys.executable, minimal.__file__, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 2 and all("solved" in line for line in lines)


def test_greedy_rollouts_are_the_librarys(denoiser: Denoiser, plain: LlamaForCausalLM) -> None:
    """At a temperature near 0 the draw has one outcome: both must open the same positions in the same steps."""
    prompt_BQ = minimal.encode(PROMPTS)
    cold = 1e-4
    ours = minimal.rollout(plain, prompt_BQ, torch.Generator().manual_seed(0), LENGTH, BLOCK, PER_STEP, cold)
    canvas_BL = torch.full((len(PROMPTS), LENGTH), minimal.MASK)
    ids_B = torch.arange(len(PROMPTS))
    theirs = denoise(denoiser, sampler(cold), prompt_BQ, prompt_BQ != minimal.EOS, canvas_BL, ids_B, seed=0)
    decided_BL = theirs.source_BL == SAMPLED
    assert decided_BL.float().mean() > 0.5
    assert torch.equal(ours.tokens_BL[decided_BL], theirs.tokens_BL[decided_BL])
    assert torch.equal(ours.born_BL[decided_BL], theirs.born_BL[decided_BL].long())
    assert len(set(map(tuple, ours.born_BL.tolist()))) > 1, "the same order in every row would compare nothing"
