"""Every trajectory of a sampler that takes tokens back, in plain loops that share no code with unmask."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from retractcases import CASES as CASES
from retractcases import Case, Step
from torch import Tensor
from toys import EOS, MASK, Toy, V

from unmask.rollouts.trajectory import EDITED, GIVEN, PAD, SAMPLED, Lifetimes, Trajectory


@dataclass
class Path:
    """One trajectory, its exact probability (a graph on the tables), and what a recorder would have written down."""

    canvas: tuple[int, ...]
    probability: Tensor
    drafts: frozenset[int]
    edited: frozenset[int] = frozenset()
    lingers: tuple[list[int], int] | None = None  # the region that the next step only edits, such steps so far
    born: dict[int, int] = field(default_factory=dict)
    logprob: dict[int, float] = field(default_factory=dict)
    choice: tuple[float, ...] = ()
    retired: tuple[tuple[int, int, int, int, float, bool], ...] = ()  # position, token, born, died, logprob, drawn
    memory: dict[int, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """What tells two trajectories apart."""
        return self.canvas, tuple(sorted(self.born.items())), frozenset(entry[:4] for entry in self.retired)


def enumerate_paths(toy: Toy, case: Case, prompt: Tensor) -> list[Path]:
    """Return every trajectory of a case."""
    live = [Path(case.canvas(), torch.ones((), dtype=torch.float64), frozenset(case.drafts))]
    done: list[Path] = []
    while live:
        grown = [after for path in live for after in _after(toy, case, path, prompt)]
        done += [path for path in grown if MASK not in path.canvas and path.lingers is None]
        live = [path for path in grown if MASK in path.canvas or path.lingers is not None]
    return done


def _after(toy: Toy, case: Case, path: Path, prompt: Tensor) -> Iterator[Path]:
    canvas, time = path.canvas, len(path.choice)
    logits_LV = toy.logits(torch.cat([prompt, torch.tensor(canvas)])[None])[0, -case.length :, :V]
    q, p = (logits_LV / case.temperature).softmax(-1), logits_LV.softmax(-1).tolist()
    masked = [i for i in range(case.length) if canvas[i] == MASK]
    region = list(range(case.length))
    if path.lingers is not None:
        region = path.lingers[0]
    elif case.block is not None:
        first = masked[0] // case.block
        region = [i for i in region if i // case.block == first]
    free = [i for i in masked if i in region]
    count = case.count(time, len(free))
    stood = [i for i in range(case.length) if canvas[i] != MASK and (i in path.born or i in path.drafts)]
    stood = stood if case.reopen else [i for i in stood if i in region]
    for chosen, tokens, probability, logprob in _draws(case, q, p, free, count):
        step = Step(canvas, p, stood, path.drafts, region, chosen, tokens, count, path.memory)
        for weight, back, dropped, memory in case.rule(step):
            # What is drawn and dropped is summed over; one of its tokens stands for all.
            if any(tokens[i] for i in dropped):
                continue
            kept = {i: v for i, v in tokens.items() if i not in dropped}
            share = torch.ones((), dtype=q.dtype)
            for i, v in kept.items():
                share = share * q[i, v]
            exact = share if case.order != "sampled" else probability
            after = _moved(path, kept, {i: logprob[i] for i in kept}, back, exact * weight, share, memory)
            yield after if case.edit is None else _edited(after, step, case.edit, len(path.choice))


def _draws(
    case: Case, q: Tensor, p: list[list[float]], free: list[int], count: int
) -> Iterator[tuple[list[int], dict[int, int], Tensor, dict[int, float]]]:
    """Yield (chosen positions, their tokens, probability of both, log-probs of the tokens)."""
    log = q.detach().log().tolist()
    if case.order == "sampled":
        merged: dict[tuple, Tensor] = {}
        for draw in itertools.product(range(V), repeat=len(free)):
            pairs = sorted(zip(free, draw, strict=True), key=lambda iv: (-p[iv[0]][iv[1]], iv[0]))[:count]
            probability = torch.stack([q[i, v] for i, v in zip(free, draw, strict=True)]).prod()
            merged[tuple(sorted(pairs))] = merged.get(tuple(sorted(pairs)), 0.0) + probability
        for pairs, probability in merged.items():
            yield [i for i, _ in pairs], dict(pairs), probability, {i: log[i][v] for i, v in pairs}
        return
    order = free if case.order == "left" else sorted(free, key=lambda i: (-max(p[i]), i))
    chosen = sorted(order if case.everything else order[:count])
    for draw in itertools.product(range(V), repeat=len(chosen)):
        pairs, probability = tuple(zip(chosen, draw, strict=True)), torch.ones((), dtype=q.dtype)
        for i, v in pairs:
            probability = probability * q[i, v]
        yield chosen, dict(pairs), probability, {i: log[i][v] for i, v in pairs}


def _edited(path: Path, step: Step, edit: tuple[float, int], time: int) -> Path:
    """Return the path with likelier tokens in the place of those that stood before the step."""
    (level, posts), canvas = edit, list(path.canvas)
    # A token that the remasking took back at this step may be replaced all the same.
    edits = [i for i in step.stood if step.best(i) > level and step.p[i].index(step.best(i)) != step.canvas[i]]
    born, logprob, retired = dict(path.born), dict(path.logprob), path.retired
    for i in edits:
        if canvas[i] != MASK:
            retired += ((i, canvas[i], born.get(i, -1), time, logprob.pop(i, 0.0), _drawn(path, i)),)
        canvas[i], born[i] = step.p[i].index(step.best(i)), time
    past = path.lingers[1] + 1 if not step.chosen else 0
    full = all(canvas[i] != MASK for i in step.region)
    lingers = (step.region, past) if full and (step.chosen or edits) and past < posts else None
    drafts, edited = path.drafts - set(edits), path.edited | set(edits)
    after = replace(path, canvas=tuple(canvas), born=born, logprob=logprob, retired=retired)
    return replace(after, lingers=lingers, drafts=drafts, edited=edited)


def _drawn(path: Path, i: int) -> bool:
    """Return whether the token that stands at a position is the policy's own."""
    return i not in path.drafts and i not in path.edited


def _moved(
    path: Path,
    kept: dict[int, int],
    logprob: dict[int, float],
    back: list[int],
    probability: Tensor,
    share: Tensor,
    memory: dict[int, float],
) -> Path:
    canvas, time = list(path.canvas), len(path.choice)
    retired = tuple((i, canvas[i], path.born.get(i, -1), time, path.logprob.get(i, 0.0), _drawn(path, i)) for i in back)
    for i in back:
        canvas[i] = MASK
    for i, v in kept.items():
        canvas[i] = v
    choice = (probability / share).log().item() if len(kept) else 0.0
    return replace(
        path,
        canvas=tuple(canvas),
        probability=path.probability * probability,
        drafts=path.drafts - set(back),
        edited=path.edited - set(back),
        born={i: t for i, t in path.born.items() if i not in back} | dict.fromkeys(kept, time),
        logprob={i: x for i, x in path.logprob.items() if i not in back} | logprob,
        choice=(*path.choice, choice),
        retired=path.retired + retired,
        memory=memory,
    )


def record(paths: list[Path], case: Case, prompt: Tensor) -> Trajectory:
    """Return the trajectory that a recorder would have made of `paths`, one a row."""
    rows, steps, length = len(paths), max(len(path.choice) for path in paths), case.length
    born_BL = torch.full((rows, length), -1, dtype=torch.int16)
    logprob_BL = torch.zeros(rows, length, dtype=torch.float64)
    choice_BS = torch.zeros(rows, steps, dtype=torch.float64)
    lives: list[tuple] = []
    for b, path in enumerate(paths):
        for i, t in path.born.items():
            born_BL[b, i], logprob_BL[b, i] = t, path.logprob.get(i, 0.0)
        choice_BS[b, : len(path.choice)] = torch.tensor(path.choice, dtype=torch.float64)
        lives += [(b, i, v, t, d, 0 if drawn else -1, x) for i, v, t, d, x, drawn in path.retired]
    tokens_BL = torch.tensor([path.canvas for path in paths])
    past = Lifetimes.none(dtype=torch.float64)
    if lives:
        *whole, logprob_R = zip(*lives, strict=True)
        past = Lifetimes(*map(torch.tensor, whole), torch.tensor(logprob_R, dtype=torch.float64))
    source_BL = torch.where(tokens_BL == MASK, PAD, torch.where(born_BL >= 0, SAMPLED, GIVEN)).to(torch.int8)
    for b, path in enumerate(paths):
        source_BL[b, list(path.edited)] = EDITED
    return Trajectory(
        prompt_BQ=prompt.expand(rows, -1),
        prompt_mask_BQ=torch.ones(rows, len(prompt), dtype=torch.bool),
        tokens_BL=tokens_BL,
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=torch.where(source_BL == SAMPLED, 0, -1).to(torch.int16),
        logprob_BL=logprob_BL,
        steps_B=torch.tensor([len(path.choice) for path in paths]),
        rollout_id_B=torch.arange(rows),
        temperature=case.temperature,
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        banned_token_ids=(MASK,),
        choice_logprob_BS=choice_BS if case.order == "sampled" else None,
        retracted=past,
    )
