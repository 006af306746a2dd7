"""Rollouts of one toy to be learnt from by another, and the objective's loss on them written out in plain loops."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from unmask.rl.replay import IMPOSSIBLE
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.trajectory import Trajectory

ROWS = 12


@dataclass
class World:
    """Rollouts of one toy (`behaviour`), to be learnt from by another (`policy`), with ragged lengths and prompts."""

    policy: object
    behaviour: object
    reference: object
    rule: object
    sampler: Sampler
    trajectory: Trajectory
    advantage_B: Tensor


def world(toys: ModuleType, name: str, *, distance: float = 0.3) -> World:
    policy, behaviour, reference, noise = toys.Toy(1), toys.Toy(1), toys.Toy(2), toys.Toy(3)
    for p, q in zip(behaviour.model.parameters(), noise.model.parameters(), strict=True):
        p.data += distance * q.data
    rule = toys.RULES[name]
    sampler = build_sampler(toys.section(rule), temperature=rule.temperature)
    rng = torch.Generator().manual_seed(0)
    prompt_BQ = torch.randint(0, 5, (ROWS, 3), generator=rng)
    mask_BQ = torch.arange(3) >= torch.randint(0, 3, (ROWS, 1), generator=rng)
    canvas_BL = torch.full((ROWS, toys.L), toys.MASK)
    canvas_BL[3, 1] = 0  # a given token
    trajectory = denoise(behaviour, sampler, prompt_BQ, mask_BQ, canvas_BL, 100 + torch.arange(ROWS), seed=4)
    advantage_B = torch.randn(ROWS, generator=rng)
    advantage_B[5], advantage_B[7] = 0.0, torch.nan
    return World(policy, behaviour, reference, rule, sampler, trajectory, advantage_B)


class OneGraph:
    """The same loss, written independently: Python loops over rollouts, steps and tokens, one graph, no chunks."""

    def __init__(self, toys: ModuleType, w: World, tokens: str = "until_eos") -> None:
        self.toys, self.w, t = toys, w, w.trajectory
        self.actions: dict[int, dict[int, list[int]]] = {}
        for b in range(len(t)):
            ids, born = t.tokens_BL[b].tolist(), t.born_BL[b].tolist()
            end = ids.index(toys.EOS) if toys.EOS in ids and tokens == "until_eos" else toys.L
            steps: dict[int, list[int]] = defaultdict(list)
            for i in range(toys.L):
                if born[i] >= 0 and i <= end:
                    steps[born[i]].append(i)
            self.actions[b] = dict(steps)

    def logits(self, denoiser, b: int, step: int) -> tuple[Tensor, list[int]]:
        t, toys = self.w.trajectory, self.toys
        born, source = t.born_BL[b].tolist(), t.source_BL[b].tolist()
        canvas = [
            t.tokens_BL[b, i].item() if source[i] == 2 or 0 <= born[i] < step else toys.MASK for i in range(toys.L)
        ]
        prompt = t.prompt_BQ[b][t.prompt_mask_BQ[b]]
        return denoiser.logits(torch.cat([prompt, torch.tensor(canvas)])[None])[0, -toys.L :, : toys.V], canvas

    def token(self, denoiser, b: int, step: int, i: int) -> Tensor:
        logits_LV, _ = self.logits(denoiser, b, step)
        return (logits_LV[i] / self.w.rule.temperature).log_softmax(-1)[self.w.trajectory.tokens_BL[b, i]]

    def choice(self, denoiser, b: int, step: int) -> Tensor:
        logits_LV, canvas = self.logits(denoiser, b, step)
        q = (logits_LV / self.w.rule.temperature).softmax(-1)
        p = (logits_LV / self.w.rule.score_temperature).softmax(-1).detach()
        ids, born = self.w.trajectory.tokens_BL[b].tolist(), self.w.trajectory.born_BL[b].tolist()
        bar, last = min((p[i, ids[i]].item(), -i) for i in range(self.toys.L) if born[i] == step)
        total = torch.zeros((), dtype=q.dtype)
        for j in range(self.toys.L):
            if canvas[j] == self.toys.MASK and born[j] != step:
                below = [q[j, v] for v in range(self.toys.V) if (p[j, v].item(), -j) < (bar, last)]
                if not below:
                    return torch.tensor(IMPOSSIBLE, dtype=q.dtype)
                total = total + sum(below).log()
        return total

    def log_probs(self, denoiser) -> dict[tuple, Tensor]:
        """Return the log-prob of every action, keyed by (rollout, step, position, or "choice")."""
        found = {}
        for b, steps in self.actions.items():
            for step, positions in steps.items():
                found |= {(b, step, i): self.token(denoiser, b, step, i) for i in positions}
                if self.w.sampler.exact_choice:
                    found[b, step, "choice"] = self.choice(denoiser, b, step)
        return found

    def recorded(self) -> dict[tuple, Tensor]:
        t = self.w.trajectory
        return {
            (b, s, i): t.choice_logprob_BS[b, s] if i == "choice" else t.logprob_BL[b, i]
            for b, s, i in self.log_probs(self.w.policy)
        }

    def loss(self, *, unit, bound, surrogate, weight, divergence, beta, ceiling=None, recompute=None) -> Tensor:
        new, behaviour = self.log_probs(self.w.policy), self.recorded()
        old = behaviour if recompute is None else {k: v.detach() for k, v in self.log_probs(recompute).items()}
        applies = {b: steps for b, steps in self.actions.items() if not self.w.advantage_B[b].isnan()}
        mass, total = 0.0, torch.zeros((), dtype=torch.float64)
        for b, steps in applies.items():
            share = {s: 1.0 if weight == "uniform" else 1 / (len(pos) * len(steps)) for s, pos in steps.items()}
            mass += sum(share[s] * len(pos) for s, pos in steps.items())
            members = defaultdict(list)
            for key in (k for k in new if k[0] == b):
                members[{"token": key, "step": key[:2], "rollout": b}[unit]].append(key)
            for keys in members.values():
                size = sum(k[2] != "choice" for k in keys)
                scale = 1 / max(size, 1) if bound == "mean" else 1.0
                w_u = sum(share[k[1]] for k in keys if k[2] != "choice" or size == 0)
                ratio = (scale * sum(new[k] - old[k] for k in keys)).exp()
                a = self.w.advantage_B[b]
                value = -ratio * a
                if surrogate == "ppo_clip":
                    value = -torch.min(ratio * a, ratio.clamp(0.9, 1.2) * a)
                if ceiling is not None:
                    value = value * (scale * sum(old[k] - behaviour[k] for k in keys)).exp().clamp(max=ceiling)
                total = total + w_u * value
            for key, logprob in new.items():
                if beta and key[0] == b and key[2] != "choice":
                    d = logprob - self.token(self.w.reference, *key).detach()
                    term = {"1": d, "2": d * d / 2, "3": (-d).exp() - 1 + d}[divergence]
                    total = total + beta * share[key[1]] * term
        return total / mass
