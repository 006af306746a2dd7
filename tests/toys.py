"""A denoiser small enough that every trajectory can be enumerated, and an enumerator that shares no code with unmask.

Three tokens, three positions: 64 canvases, at most a few hundred trajectories. `EOS` is the last token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unmask.policies.layout import Family
from unmask.rollouts.trajectory import GIVEN, PAD, SAMPLED, Trajectory

V, L = 3, 3
MASK, EOS = V, V - 1


class Tables(nn.Module):
    """Logits of every canvas, and an offset by the prompt's sum; both are parameters."""

    def __init__(self, seed: int, scale: float, length: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        shape = ((V + 1) ** length, length, V + 1)
        self.canvas = nn.Parameter(scale * torch.randn(*shape, generator=rng, dtype=torch.float64))
        self.prompt = nn.Parameter(scale * torch.randn(5, V + 1, generator=rng, dtype=torch.float64))


class Toy:
    """A tabular denoiser in float64 with the interface of `Denoiser`."""

    def __init__(self, seed: int = 0, scale: float = 1.0, length: int = L) -> None:
        self.model, self.length = Tables(seed, scale, length), length
        self.family = Family("toy", vocab_size=V + 1, mask_token_id=MASK, eos_token_ids=(EOS,))
        self.calls: list[int] = []

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        self.calls.append(len(input_ids_BT))
        length = self.length
        prompt_BQ = input_ids_BT[:, :-length]
        if padding_mask_BT is not None:
            prompt_BQ = prompt_BQ * padding_mask_BT[:, :-length]
        state_B = (input_ids_BT[:, -length:] * torch.tensor([(V + 1) ** i for i in range(length)])).sum(1)
        logits_BLV = self.model.canvas[state_B] + self.model.prompt[prompt_BQ.sum(1) % 5][:, None]
        if positions_BT is None:
            return torch.nn.functional.pad(logits_BLV, (0, 0, input_ids_BT.shape[1] - length, 0))
        return logits_BLV[positions_BT[:, -length:]]

    def gradient(self) -> Tensor:
        """Return the gradient of all parameters as one vector, and forget it."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        vector = torch.cat([part.flatten() for part in parts]).clone()
        self.model.zero_grad()
        return vector


@dataclass
class Rule:
    """How a toy canvas is filled: `order`, `confidence` or `sampled` (draw first), `counts` positions at each step.

    `level`: every position of at least this confidence is taken besides. `stop`: finished once an EOS is decided with
    everything left of it.
    """

    kind: str
    counts: tuple[int, ...]
    section: dict[str, object]
    level: float | None = None
    stop: bool = False
    temperature: float = 1.0
    score_temperature: float = 1.0


def _uniform(steps: int) -> dict[str, object]:
    return {"name": "uniform", "steps": steps}


RULES = {
    "left_to_right": Rule("order", (1, 1, 1), {"schedule": _uniform(3), "score": "left_to_right"}),
    "left_to_right_stop": Rule("order", (1, 1, 1), {"schedule": _uniform(3), "score": "left_to_right"}, stop=True),
    "confidence_1": Rule("confidence", (1, 1, 1), {"schedule": _uniform(3)}, temperature=0.8),
    "confidence_1_stop": Rule("confidence", (1, 1, 1), {"schedule": _uniform(3)}, stop=True),
    "confidence_2": Rule("confidence", (2, 1), {"schedule": _uniform(2)}, temperature=1.3),
    "threshold": Rule(
        "confidence", (1, 1, 1), {"schedule": _uniform(3), "selection": {"name": "threshold", "level": 0.5}}, level=0.5
    ),
    "sampled_1": Rule("sampled", (1, 1, 1), {"schedule": _uniform(3), "score": "sampled_confidence"}, temperature=0.8),
    "sampled_2": Rule(
        "sampled", (2, 1), {"schedule": _uniform(2), "score": "sampled_confidence"}, score_temperature=0.7
    ),
    "sampled_1_stop": Rule("sampled", (1, 1, 1), {"schedule": _uniform(3), "score": "sampled_confidence"}, stop=True),
}


def section(rule: Rule) -> dict[str, object]:
    """Return the recipe section of a rule's sampler."""
    eos = {"rule": "stop" if rule.stop else "none"}
    return {**rule.section, "score_temperature": rule.score_temperature, "eos": eos}


@dataclass
class Path:
    """One trajectory with its exact probability (a graph on the tables) and what a recorder would have written down."""

    canvas: tuple[int, ...]
    probability: Tensor
    born: dict[int, int] = field(default_factory=dict)
    logprob: dict[int, float] = field(default_factory=dict)
    choice: tuple[float, ...] = ()


def _transitions(toy: Toy, canvas: tuple[int, ...], rule: Rule, step: int, prompt: Tensor) -> list[tuple]:
    """Return (positions, tokens, probability, log-probs of the tokens) of everything that one step can do."""
    logits_LV = toy.logits(torch.cat([prompt, torch.tensor(canvas)])[None])[0, -L:, :V]
    q = (logits_LV / rule.temperature).softmax(-1)
    p = (logits_LV / rule.score_temperature).softmax(-1).detach()
    free = [i for i in range(L) if canvas[i] == MASK]
    count = min(rule.counts[step] if step < len(rule.counts) else 1, len(free))
    if rule.kind == "sampled":
        merged: dict[tuple, Tensor] = {}
        for draw in itertools.product(range(V), repeat=len(free)):
            probability = torch.stack([q[i, v] for i, v in zip(free, draw, strict=True)]).prod()
            best = sorted(zip(free, draw, strict=True), key=lambda iv: (-p[iv[0], iv[1]].item(), iv[0]))[:count]
            key = tuple(sorted(best))
            merged[key] = merged.get(key, torch.zeros((), dtype=q.dtype)) + probability
        outcomes = list(merged.items())
    else:
        best = free if rule.kind == "order" else sorted(free, key=lambda i: (-p[i].max().item(), i))
        taken = [i for n, i in enumerate(best) if n < count or (rule.level and p[i].max() >= rule.level)]
        outcomes = []
        for draw in itertools.product(range(V), repeat=len(taken)):
            pairs = tuple(zip(taken, draw, strict=True))
            outcomes.append((pairs, torch.stack([q[i, v] for i, v in pairs]).prod()))
    return [(pairs, probability, {i: q[i, v].log().item() for i, v in pairs}) for pairs, probability in outcomes]


def _finished(canvas: tuple[int, ...], rule: Rule) -> bool:
    if MASK not in canvas:
        return True
    return rule.stop and EOS in canvas and canvas.index(EOS) < canvas.index(MASK)


def enumerate_paths(toy: Toy, rule: Rule, prompt: Tensor, start: Sequence[int] = (MASK,) * L) -> list[Path]:
    """Return every trajectory from the canvas `start`."""
    live, done, step = [Path(tuple(start), torch.ones((), dtype=torch.float64))], [], 0
    while live:
        grown = []
        for path in live:
            for pairs, probability, logprob in _transitions(toy, path.canvas, rule, step, prompt):
                canvas = list(path.canvas)
                for i, v in pairs:
                    canvas[i] = v
                choice = probability.log().item() - sum(logprob.values())
                grown.append(
                    Path(
                        tuple(canvas),
                        path.probability * probability,
                        path.born | {i: step for i, _ in pairs},
                        path.logprob | logprob,
                        (*path.choice, choice),
                    )
                )
        done += [path for path in grown if _finished(path.canvas, rule)]
        live = [path for path in grown if not _finished(path.canvas, rule)]
        step += 1
    return done


def record(paths: list[Path], rule: Rule, prompt: Tensor) -> Trajectory:
    """Return the trajectory that a recorder would have made of `paths`, one a row."""
    rows, steps = len(paths), max(len(path.choice) for path in paths)
    born_BL = torch.full((rows, L), -1, dtype=torch.int16)
    logprob_BL, choice_BS = torch.zeros(rows, L, dtype=torch.float64), torch.zeros(rows, steps, dtype=torch.float64)
    for b, path in enumerate(paths):
        for i, t in path.born.items():
            born_BL[b, i], logprob_BL[b, i] = t, path.logprob[i]
        choice_BS[b, : len(path.choice)] = torch.tensor(path.choice, dtype=torch.float64)
    tokens_BL = torch.tensor([path.canvas for path in paths])
    source_BL = torch.where(tokens_BL == MASK, PAD, torch.where(born_BL >= 0, SAMPLED, GIVEN)).to(torch.int8)
    return Trajectory(
        prompt_BQ=prompt.expand(rows, -1),
        prompt_mask_BQ=torch.ones(rows, len(prompt), dtype=torch.bool),
        tokens_BL=tokens_BL,
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=torch.where(born_BL >= 0, 0, -1).to(torch.int16),
        logprob_BL=logprob_BL,
        steps_B=torch.tensor([len(path.choice) for path in paths]),
        rollout_id_B=torch.arange(rows),
        temperature=rule.temperature,
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        banned_token_ids=(MASK,),
        choice_logprob_BS=choice_BS if rule.kind == "sampled" else None,
    )
