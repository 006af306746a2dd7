"""Reinforcement learning of a masked diffusion language model, all of it, in one plain file.

    python recipes/minimal.py            # trains the tiny model on chains of arithmetic, on a CPU

The model sees a prompt and a canvas of mask tokens, and predicts every token of the canvas at once. A *rollout* unmasks
the canvas over several calls of the model. For each token we write down the call that decided it and the
log-probability it was drawn with. From this every canvas that the model saw can be rebuilt, so the policy gradient is
taken in exactly the states that were sampled: CJ-GRPO ("Taming Masked Diffusion Language Models"), here without its KL.

Letters in the names of tensors: B rollouts, Q prompt tokens, L canvas tokens, T = Q + L, K positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

# LLaDA is a Llama that looks both ways, stored under names of its own. The head comes first: it is called ff_out too.
NAMES = {
    "model.transformer.ff_out": "lm_head",
    "transformer.wte": "embed_tokens",
    "transformer.ln_f": "norm",
    "transformer.blocks": "layers",
    "attn_norm": "input_layernorm",
    "attn_out": "self_attn.o_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
# Tokens are bytes, and these.
EOS, MASK, USER, ASSISTANT = 256, 257, 259, 260


def load_model(folder: Path) -> LlamaForCausalLM:
    """Build the model from a folder in LLaDA's layout: config.json and model.safetensors."""
    vendor = json.loads((folder / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=vendor["embedding_size"],
        hidden_size=vendor["d_model"],
        intermediate_size=vendor["mlp_hidden_size"],
        num_hidden_layers=vendor["n_layers"],
        num_attention_heads=vendor["n_heads"],
        num_key_value_heads=vendor["n_kv_heads"],
        rms_norm_eps=vendor["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": vendor["rope_theta"]},
        pad_token_id=None,  # with an id here that token's embedding would never learn, and EOS is the padding
    )
    config.is_causal = False  # the one line that lets a Llama look both ways
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor
    if vendor["weight_tying"]:  # then the head is the embedding, and is not stored
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


def encode(prompts: list[str]) -> Tensor:
    """Return prompt_BQ: each prompt as a chat turn, padded on the left with EOS, which no prompt contains."""
    turns = [[USER, *prompt.encode(), ASSISTANT] for prompt in prompts]
    width = max(map(len, turns))
    return torch.tensor([[EOS] * (width - len(turn)) + turn for turn in turns])


def decode(tokens_L: Tensor) -> str:
    """Return the text before the first EOS."""
    ids = [*tokens_L.tolist(), EOS]
    return bytes(i for i in ids[: ids.index(EOS)] if i < 256).decode(errors="replace")


def problem(rng: random.Random) -> tuple[str, str]:
    """Return a prompt and its answer: `7 a+8 b-3` is (7 + 8) - 3 modulo 10, solved `a7+8=5`, `b5-3=2`, `#### 2`."""
    value = rng.randrange(10)
    words = [str(value)]
    for letter in "abcdefghi"[: rng.randint(7, 9)]:
        operator, operand = rng.choice("+-"), rng.randrange(10)
        words.append(f"{letter}{operator}{operand}")
        value = (value + operand if operator == "+" else value - operand) % 10
    return " ".join(words), str(value)


def reward(completion: str, answer: str) -> float:
    """Return 1 where the last line marked `####` holds the right answer, else 0."""
    _, marker, given = completion.rpartition("####")
    return float(bool(marker) and given.split("\n")[0].strip() == answer)


class Rollouts(NamedTuple):
    """What a batch of rollouts leaves behind: enough to rebuild each canvas that the model saw."""

    prompt_BQ: Tensor
    tokens_BL: Tensor  # the finished canvas
    born_BL: Tensor  # the step (call of the model) that decided the token; -1 where none did
    logprob_BL: Tensor  # the log-probability it was drawn with


def logits(model: LlamaForCausalLM, prompt_BQ: Tensor, canvas_BL: Tensor, where_BL: Tensor) -> Tensor:
    """Return logits_KV at the canvas positions `where_BL`; the mask token itself is never an answer."""
    seen_BT = torch.cat([prompt_BQ != EOS, torch.ones_like(where_BL)], dim=1)
    hidden_BTD = model.model(torch.cat([prompt_BQ, canvas_BL], dim=1), attention_mask=seen_BT.long()).last_hidden_state
    logits_KV = model.lm_head(hidden_BTD[:, prompt_BQ.shape[1] :][where_BL])
    return logits_KV.index_fill(1, torch.tensor([MASK]), -torch.inf)


@torch.no_grad()
def rollout(
    model: LlamaForCausalLM,
    prompt_BQ: Tensor,
    noise: torch.Generator,
    length: int = 80,
    block: int = 16,
    per_step: int = 4,
    temperature: float = 1.0,
) -> Rollouts:
    """Unmask canvases block by block; each call of the model decides the `per_step` positions it is surest about.

    Positions are chosen from the distribution and only then are tokens drawn there, so the log-probability of a step is
    the sum over its tokens and nothing else. (Drawing first and keeping the likeliest draws would need one more term.)
    """
    tokens_BL = torch.full((len(prompt_BQ), length), MASK)
    born_BL, logprob_BL, step = torch.full_like(tokens_BL, -1), torch.zeros(tokens_BL.shape), 0
    for start in range(0, length, block):
        for _ in range(block // per_step):
            open_BL = tokens_BL == MASK
            open_BL[:, start + block :] = False
            logits_KV = logits(model, prompt_BQ, tokens_BL, open_BL)
            surest_BL = torch.full(open_BL.shape, -torch.inf)
            surest_BL[open_BL] = logits_KV.log_softmax(dim=1).amax(dim=1)  # of probabilities, those near 1 would tie
            chosen_BL = torch.zeros_like(open_BL).scatter(1, surest_BL.topk(per_step).indices, True)
            logprob_KV = (logits_KV[chosen_BL[open_BL]] / temperature).log_softmax(dim=1)
            drawn_K1 = torch.multinomial(logprob_KV.exp(), 1, generator=noise)
            tokens_BL[chosen_BL] = drawn_K1[:, 0]
            logprob_BL[chosen_BL] = logprob_KV.gather(1, drawn_K1)[:, 0]
            born_BL[chosen_BL] = step
            step += 1
        if (tokens_BL == EOS).any(dim=1).all():
            break
    return Rollouts(prompt_BQ, tokens_BL, born_BL, logprob_BL)


def backward(
    model: LlamaForCausalLM, old: Rollouts, advantage_B: Tensor, clip: float = 0.2, temperature: float = 1.0
) -> tuple[float, float]:
    """Add the loss's gradient to the parameters' `.grad`; return the loss and the largest |ratio - 1|.

    loss = mean over rollouts of the mean over steps of the mean over a step's tokens of
    -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), with ratio = p(token | canvas of that step) now / then.
    Nothing behind the first EOS is an action. Only one step's graph is in memory at a time.
    """
    eos_BL = old.tokens_BL == EOS
    action_BL = old.born_BL.masked_fill(eos_BL.cumsum(dim=1) - eos_BL.long() > 0, -1)  # the step of each action
    steps = range(int(old.born_BL.max()) + 1)
    steps_B = torch.stack([(action_BL == step).any(dim=1) for step in steps]).sum(dim=0)
    total, deviation = 0.0, 0.0
    for step in steps:
        now_BL = action_BL == step
        rows = now_BL.any(dim=1) & (advantage_B != 0)  # the others add nothing to the gradient
        if not rows.any():
            continue
        now_BL, tokens_BL, born_BL = now_BL[rows], old.tokens_BL[rows], old.born_BL[rows]
        canvas_BL = torch.where((born_BL >= 0) & (born_BL < step), tokens_BL, MASK)  # as the model saw it
        logprob_KV = (logits(model, old.prompt_BQ[rows], canvas_BL, now_BL) / temperature).log_softmax(dim=1)
        new_K = logprob_KV.gather(1, tokens_BL[now_BL][:, None])[:, 0]
        ratio_K = (new_K - old.logprob_BL[rows][now_BL]).exp()
        advantage_K = advantage_B[rows, None].expand(now_BL.shape)[now_BL]
        loss_K = -torch.minimum(ratio_K * advantage_K, ratio_K.clamp(1 - clip, 1 + clip) * advantage_K)
        weight_BL = now_BL / (now_BL.sum(dim=1) * steps_B[rows])[:, None]
        loss = (weight_BL[now_BL] * loss_K).sum() / (steps_B > 0).sum()
        loss.backward()
        total += loss.item()
        deviation = max(deviation, (ratio_K - 1).abs().max().item())
    return total, deviation


def main() -> None:
    """Sample, score, learn, again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "tiny", help="a folder in LLaDA's layout")
    parser.add_argument("--batches", type=int, default=30, help="batches of rollouts")
    parser.add_argument("--prompts", type=int, default=8, help="problems a batch")
    parser.add_argument("--group", type=int, default=8, help="rollouts a problem")
    parser.add_argument("--seed", type=int, default=0)
    choice = parser.parse_args()
    rng, noise = random.Random(choice.seed), torch.Generator().manual_seed(choice.seed)
    model = load_model(choice.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, betas=(0.9, 0.99), weight_decay=0.0)
    for number in range(1, choice.batches + 1):
        problems = [p for p in [problem(rng) for _ in range(choice.prompts)] for _ in range(choice.group)]
        batch = rollout(model, encode([prompt for prompt, _ in problems]), noise)
        reward_B = torch.tensor([reward(decode(t), a) for t, (_, a) in zip(batch.tokens_BL, problems, strict=True)])
        # A rollout counts by how far it beats the mean of its group, the attempts at the same problem.
        advantage_B = reward_B - reward_B.view(-1, choice.group).mean(dim=1).repeat_interleave(choice.group)
        deviations = []
        for _ in range(2):  # each batch serves two updates; in the first every ratio is 1
            optimizer.zero_grad()
            deviations.append(backward(model, batch, advantage_B)[1])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        first, second = deviations
        print(f"batch {number}: solved {reward_B.mean():.1%}, max |ratio - 1| {first:.1e}, {second:.2f}", flush=True)


if __name__ == "__main__":
    main()
