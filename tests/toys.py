"""A denoiser small enough that every trajectory can be enumerated, and an enumerator that shares no code with unmask.

Three tokens, three positions: 64 canvases, at most a few hundred trajectories. `EOS` is the last token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
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


Pick = Callable[[dict[int, float], int], list[int]]


def by_chance(chance: dict[int, float]) -> list[int]:
    return sorted(chance, key=lambda i: (-chance[i], i))


def at_least(level: float) -> Pick:
    """Every position at the level, and the best of them all as the count asks."""
    return lambda chance, count: [i for n, i in enumerate(by_chance(chance)) if n < count or chance[i] >= level]


def prefix(holds: Callable[[list[float]], bool]) -> Pick:
    """The longest run of best positions for whose probabilities `holds`, at least the count."""

    def pick(chance: dict[int, float], count: int) -> list[int]:
        order = by_chance(chance)
        while count < len(order) and all(holds([chance[i] for i in order[:n]]) for n in range(1, count + 2)):
            count += 1
        return order[:count]

    return pick


def leaps(level: float, relaxed: float, radius: int) -> Pick:
    """LocalLeap, one position after the other."""

    def pick(chance: dict[int, float], count: int) -> list[int]:
        anchors = [i for i, c in chance.items() if c >= level]
        near = [i for i, c in chance.items() if c >= relaxed and any(abs(i - a) <= radius for a in anchors)]
        return sorted({*near, *anchors}) or by_chance(chance)[:1]

    return pick


def halves(level: float, low: float) -> Pick:
    """dInfer's hierarchical decoding, run by run."""

    def pick(chance: dict[int, float], count: int) -> list[int]:
        runs: list[list[int]] = []
        for i in sorted(chance):
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
        leads = [by_chance({i: chance[i] for i in run})[0] for run in runs]
        sure = {i for i in leads if chance[i] >= low} | {i for i, c in chance.items() if c >= level}
        return sorted(sure | {by_chance(chance)[0]})

    return pick


@dataclass
class Rule:
    """How a toy canvas is filled: by `order`, `confidence`, `entropy`, `sampled` (draw first) or `drawn_order`.

    `counts` positions at each step, and more where `pick` says so, which sees the probability of each position (exp(-H)
    for `entropy`) and how many the counts give. `early[t]` scales the probability of a drawn EOS. `stop`: finished once
    an EOS is decided with everything left of it.
    """

    kind: str
    counts: tuple[int, ...]
    section: dict[str, object]
    pick: Pick | None = None
    early: tuple[float, ...] = (1.0, 1.0, 1.0)
    stop: bool = False
    temperature: float = 1.0
    score_temperature: float = 1.0


def _uniform(steps: int) -> dict[str, object]:
    return {"name": "uniform", "steps": steps}


def _section(steps: int, **parts: object) -> dict[str, object]:
    return {"schedule": _uniform(steps), **parts}


def _drawn(**selection: dict[str, float]) -> dict[str, object]:
    (name,) = selection
    return _section(3, score="sampled_confidence", selection={"name": name, **selection[name]})


FACTOR = prefix(lambda c: (len(c) + 1) * (1 - c[-1]) <= 1.2)
FRECHET = prefix(lambda c: sum(1 - x for x in c) + (1 - c[-1]) <= 1.1)
RULES = {
    "left_to_right": Rule("order", (1, 1, 1), {"schedule": _uniform(3), "score": "left_to_right"}),
    "left_to_right_stop": Rule("order", (1, 1, 1), {"schedule": _uniform(3), "score": "left_to_right"}, stop=True),
    "confidence_1": Rule("confidence", (1, 1, 1), {"schedule": _uniform(3)}, temperature=0.8),
    "confidence_1_stop": Rule("confidence", (1, 1, 1), {"schedule": _uniform(3)}, stop=True),
    "confidence_2": Rule("confidence", (2, 1), {"schedule": _uniform(2)}, temperature=1.3),
    "threshold": Rule(
        "confidence", (1, 1, 1), _section(3, selection={"name": "threshold", "level": 0.5}), pick=at_least(0.5)
    ),
    "factor": Rule("confidence", (1, 1, 1), _section(3, selection={"name": "factor", "f": 1.2}), pick=FACTOR),
    "frechet": Rule("confidence", (1, 1, 1), _section(3, selection={"name": "frechet", "f": 1.1}), pick=FRECHET),
    "entropy_budget": Rule(
        "entropy",
        (1, 1, 1),
        _section(3, score="entropy", selection={"name": "entropy_budget", "nats": 0.9}),
        pick=prefix(lambda c: sum(-math.log(x) for x in c) - max(-math.log(x) for x in c) <= 0.9),
        score_temperature=1.2,
    ),
    "drawn_order_1": Rule(
        "drawn_order", (1, 1, 1), _section(3, selection={"name": "plackett_luce", "temperature": 0.5}), stop=True
    ),
    "drawn_order_2": Rule(
        "drawn_order", (2, 1), _section(2, selection="plackett_luce"), temperature=0.8, score_temperature=1.3
    ),
    "sampled_1": Rule("sampled", (1, 1, 1), {"schedule": _uniform(3), "score": "sampled_confidence"}, temperature=0.8),
    "sampled_2": Rule(
        "sampled", (2, 1), {"schedule": _uniform(2), "score": "sampled_confidence"}, score_temperature=0.7
    ),
    "sampled_1_stop": Rule("sampled", (1, 1, 1), {"schedule": _uniform(3), "score": "sampled_confidence"}, stop=True),
    "sampled_threshold": Rule("sampled", (1, 1, 1), _drawn(threshold={"level": 0.5}), pick=at_least(0.5)),
    "sampled_factor": Rule(
        "sampled", (1, 1, 1), _drawn(factor={"f": 1.2}), pick=FACTOR, temperature=0.8, score_temperature=1.1
    ),
    "sampled_frechet": Rule("sampled", (1, 1, 1), _drawn(frechet={"f": 1.1}), pick=FRECHET, stop=True),
    "sampled_leap": Rule(
        "sampled",
        (1, 1, 1),
        _drawn(local_leap={"level": 0.6, "relaxed": 0.3, "radius": 1}),
        pick=leaps(0.6, 0.3, 1),
    ),
    "sampled_halves": Rule(
        "sampled", (1, 1, 1), _drawn(hierarchical={"level": 0.7, "low": 0.4}), pick=halves(0.7, 0.4), temperature=1.2
    ),
    "sampled_eoser": Rule(
        "sampled",
        (1, 1, 1),
        _section(3, score={"name": "sampled_eoser", "low": 0.2, "high": 0.9}),
        early=(0.2, 0.55, 0.9),
        stop=True,
    ),
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
    rank: dict[int, int] = field(default_factory=dict)
    choice: tuple[float, ...] = ()


def _transitions(toy: Toy, canvas: tuple[int, ...], rule: Rule, step: int, prompt: Tensor) -> list[tuple]:
    """Return (positions, tokens, probability, log-probs of the tokens) of everything that one step can do."""
    logits_LV = toy.logits(torch.cat([prompt, torch.tensor(canvas)])[None])[0, -L:, :V]
    q = (logits_LV / rule.temperature).softmax(-1)
    p = (logits_LV / rule.score_temperature).softmax(-1).detach()
    free = [i for i in range(L) if canvas[i] == MASK]
    count = min(rule.counts[step] if step < len(rule.counts) else 1, len(free))
    pick = rule.pick or (lambda chance, count: by_chance(chance)[:count])
    one = torch.ones((), dtype=q.dtype)
    if rule.kind == "sampled":
        merged: dict[tuple, Tensor] = {}
        for draw in itertools.product(range(V), repeat=len(free)):
            probability = torch.stack([q[i, v] for i, v in zip(free, draw, strict=True)]).prod()
            early = rule.early[min(step, len(rule.early) - 1)]
            chance = {i: p[i, v].item() * (early if v == EOS else 1) for i, v in zip(free, draw, strict=True)}
            key = tuple(sorted((i, draw[free.index(i)]) for i in pick(chance, count)))
            merged[key] = merged.get(key, 0 * one) + probability
        outcomes = list(merged.items())
    else:
        if rule.kind == "drawn_order":
            orders = _orders(rule, (logits_LV / rule.score_temperature).softmax(-1), free, count)
        elif rule.kind == "order":
            orders = [(tuple(free[:count]), one)]
        else:
            chance = {i: p[i].max().item() for i in free}
            if rule.kind == "entropy":
                chance = {i: math.exp((p[i] * p[i].log()).sum().item()) for i in free}
            orders = [(tuple(pick(chance, count)), one)]
        outcomes = []
        for (order, share), draw in itertools.product(orders, itertools.product(range(V), repeat=L)):
            # Draws beyond the number of positions would only repeat an outcome.
            if any(draw[len(order) :]):
                continue
            pairs = tuple(zip(order, draw, strict=False))
            outcomes.append((pairs, share * torch.stack([q[i, v] for i, v in pairs]).prod()))
    return [(pairs, probability, {i: q[i, v].log().item() for i, v in pairs}) for pairs, probability in outcomes]


def _orders(rule: Rule, p: Tensor, free: list[int], count: int) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return every order of `count` positions with its probability, drawn one after the other by max p ^ (1 / T)."""
    selection = rule.section["selection"]
    temperature = selection.get("temperature", 1.0) if isinstance(selection, dict) else 1.0
    weight = {i: p[i].max() ** (1 / temperature) for i in free}
    found = []
    for order in itertools.permutations(free, count):
        left, share = list(free), torch.ones((), dtype=p.dtype)
        for i in order:
            share = share * weight[i] / sum(weight[j] for j in left)
            left.remove(i)
        found.append((order, share))
    return found


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
                        path.rank | {i: n for n, (i, _) in enumerate(pairs)},
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
    rank_BL = born_BL.clone()
    logprob_BL, choice_BS = torch.zeros(rows, L, dtype=torch.float64), torch.zeros(rows, steps, dtype=torch.float64)
    for b, path in enumerate(paths):
        for i, t in path.born.items():
            born_BL[b, i], rank_BL[b, i], logprob_BL[b, i] = t, path.rank[i], path.logprob[i]
        choice_BS[b, : len(path.choice)] = torch.tensor(path.choice, dtype=torch.float64)
    tokens_BL = torch.tensor([path.canvas for path in paths])
    source_BL = torch.where(tokens_BL == MASK, PAD, torch.where(born_BL >= 0, SAMPLED, GIVEN)).to(torch.int8)
    return Trajectory(
        prompt_BQ=prompt.expand(rows, -1),
        prompt_mask_BQ=torch.ones(rows, len(prompt), dtype=torch.bool),
        tokens_BL=tokens_BL,
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=rank_BL,
        logprob_BL=logprob_BL,
        steps_B=torch.tensor([len(path.choice) for path in paths]),
        rollout_id_B=torch.arange(rows),
        temperature=rule.temperature,
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        banned_token_ids=(MASK,),
        choice_logprob_BS=choice_BS if rule.kind in ("sampled", "drawn_order") else None,
    )
