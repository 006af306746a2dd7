"""Samplers that take tokens back, in plain words: what each may do at a step, and its section of a recipe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from toys import MASK


@dataclass
class Step:
    """What a rule may look at: probabilities and the canvas before the step, and what the step chose."""

    canvas: tuple[int, ...]
    p: list[list[float]]
    stood: list[int]
    drafts: frozenset[int]
    region: list[int]
    chosen: list[int]
    tokens: dict[int, int]
    count: int
    memory: dict[int, float]

    @property
    def free(self) -> list[int]:
        """The open positions of the region."""
        return [i for i in self.region if self.canvas[i] == MASK]

    def best(self, i: int) -> float:
        """The probability of the likeliest token."""
        return max(self.p[i])


# A rule yields (weight, positions taken back, drawn positions dropped, memory) of everything it can do.
Outcome = tuple[float, list[int], list[int], dict[int, float]]
Rule = Callable[[Step], Iterator[Outcome]]


def running(step: Step) -> Iterator[Outcome]:
    """Keep the count of stood tokens plus the schedule's, by the best confidence that each position ever had."""
    memory = dict(step.memory)
    for i in step.free:
        memory[i] = max(memory.get(i, 0.0), step.best(i))
    pool = sorted(step.stood + step.chosen)
    stay = sorted(pool, key=lambda i: (-memory[i], i))[: len(step.stood) + step.count]
    out = [i for i in pool if i not in stay]
    yield 1.0, [i for i in out if i in step.stood], [i for i in out if i in step.chosen], memory


def rising(by: str, share: float = 0.125) -> Rule:
    """Take back the tokens whose probability rose least, unless the region is full."""

    def rule(step: Step) -> Iterator[Outcome]:
        now = {i: step.best(i) for i in step.region}
        if by == "token":
            now = {i: step.p[i][step.canvas[i]] if i in step.stood else 0.0 for i in step.region}
            now |= {i: step.p[i][step.tokens[i]] for i in step.chosen}
        k, full = len(step.chosen), set(step.free) == set(step.chosen)
        many = 0 if full else min(max(step.count // 2, math.ceil(k * share)), k - 1)
        rise = {i: now[i] - step.memory.get(i, 0.0) for i in step.stood}
        out = sorted(step.stood, key=lambda i: (rise[i], i))[:many]
        yield 1.0, out, [], {**step.memory, **now}

    return rule


def doubting(level: float) -> Rule:
    """Take back tokens where no token is likely now, fewer than were decided."""

    def rule(step: Step) -> Iterator[Outcome]:
        doubtful = sorted((i for i in step.stood if step.best(i) < level), key=lambda i: (step.best(i), i))
        yield 1.0, doubtful[: max(len(step.chosen) - 1, 0)], [], {}

    return rule


def sceptical(level: float) -> Rule:
    """Take back all unlikely draft tokens."""

    def rule(step: Step) -> Iterator[Outcome]:
        yield 1.0, [i for i in step.drafts if step.p[i][step.canvas[i]] < level], [], {}

    return rule


def renoising(eta: float) -> Rule:
    """Take each token back with probability min(eta, sigma_max) and decide as many more, from the left."""

    def rule(step: Step) -> Iterator[Outcome]:
        decided, left = len(step.stood), len(step.free) - step.count
        sigma = min(eta, left / decided if decided else 1.0, 1.0)
        for taken in itertools.product([False, True], repeat=decided):
            weight = math.prod(sigma if t else 1 - sigma for t in taken)
            out = [i for i, t in zip(step.stood, taken, strict=True) if t]
            assert len(out) <= left or not weight, "the cases are such that no more are taken back than can be decided"
            if weight:
                yield weight, out, step.chosen[step.count + len(out) :], {}

    return rule


def nothing(step: Step) -> Iterator[Outcome]:
    """Take nothing back."""
    yield 1.0, [], [], {}


@dataclass
class Case:
    """A sampler's section, and the same in plain words: how many positions a step decides, and the rule.

    `edit` is (level, post-steps): likelier tokens replace those that stand, then steps follow that do nothing else.
    """

    section: dict[str, object]
    rule: Rule
    length: int
    count: Callable[[int, int], int]
    block: int | None = None
    order: str = "confidence"
    everything: bool = False
    reopen: bool = False
    temperature: float = 1.0
    start: tuple[int, ...] | None = None
    drafts: tuple[int, ...] = ()
    edit: tuple[float, int] | None = None

    def canvas(self) -> tuple[int, ...]:
        """The canvas at the start."""
        return self.start or (MASK,) * self.length


def evenly(steps: int) -> Callable[[int, int], int]:
    return lambda step, masked: math.ceil(masked / max(steps - step, 1))


def section(schedule: dict, remasking: dict | None, **more: object) -> dict[str, object]:
    return {"schedule": schedule, "remasking": remasking, "eos": {"rule": "none"}, **more}


UNIFORM = {"name": "uniform", "steps": 4}
BLOCKS = {"name": "blocks", "size": 3, "per_step": 1}
TWO_BLOCKS = (MASK, MASK, MASK, MASK, 1, MASK)
WIDE = {"name": "blocks", "size": 5, "per_step": 2}
COSINE = {"name": "cosine", "steps": 2}  # of four masks 2 after a step, of three 1
RCR = {"name": "running_confidence"}


def cosine(step: int, masked: int) -> int:
    """Two steps over four positions: floor(4 cos(pi/4)) = 2 stay open after the first."""
    return max(masked - (2 if step == 0 else 0), 1)


CASES = {
    "rcr": Case(section(UNIFORM, RCR, selection="all"), running, 4, evenly(4), everything=True, temperature=0.8),
    "rcr_blocks": Case(
        section(BLOCKS, RCR, selection="all"),
        running,
        6,
        lambda s, m: 1,
        block=3,
        everything=True,
        start=TWO_BLOCKS,
    ),
    "rcr_reopen": Case(
        section(BLOCKS, {**RCR, "reopen": True}, selection="all"),
        running,
        6,
        lambda s, m: 1,
        block=3,
        everything=True,
        start=TWO_BLOCKS,
        reopen=True,
    ),
    "backtrack": Case(section(WIDE, {"name": "backtrack"}), rising("likeliest"), 5, lambda s, m: min(m, 2), block=5),
    "backtrack_token": Case(
        section(WIDE, {"name": "backtrack", "by": "token"}), rising("token"), 5, lambda s, m: min(m, 2), block=5
    ),
    "doubt": Case(section(COSINE, {"name": "doubt", "level": 0.6}), doubting(0.6), 4, cosine, temperature=1.2),
    "doubt_sampled": Case(
        section(COSINE, {"name": "doubt", "level": 0.6}, score="sampled_confidence"),
        doubting(0.6),
        4,
        cosine,
        order="sampled",
    ),
    "sceptical": Case(
        section({"name": "uniform", "steps": 3}, {"name": "sceptical", "level": 0.4}),
        sceptical(0.4),
        4,
        evenly(3),
        start=(0, MASK, 1, MASK),
        drafts=(0, 2),
    ),
    "remdm": Case(
        section({"name": "uniform", "steps": 3}, {"name": "remdm", "eta": 0.3}, score="left_to_right", selection="all"),
        renoising(0.3),
        3,
        evenly(3),
        order="left",
        everything=True,
    ),
    "edit": Case(
        section({**BLOCKS, "size": 2}, None, editing={"name": "token_to_token", "level": 0.5, "post_steps": 2}),
        nothing,
        4,
        lambda s, m: 1,
        block=2,
        edit=(0.5, 2),
    ),
    "edit_and_doubt": Case(
        section(
            COSINE,
            {"name": "doubt", "level": 0.6},
            editing={"name": "token_to_token", "level": 0.6, "post_steps": 4},
        ),
        doubting(0.6),
        4,
        cosine,
        edit=(0.6, 4),
        start=(0, MASK, MASK, MASK),
        drafts=(0,),
    ),
}
