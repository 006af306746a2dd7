"""Canvases that change their length: rho-EOS and DAEDAL by plain loops, moves of positions, exact replay with RoPE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import shortrun
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl.estimators import trace
from unmask.rl.replay import replay_all
from unmask.rollouts.engine import denoise
from unmask.rollouts.lengths import Resize, eos_tail, resize
from unmask.rollouts.measures import Statistics
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.state import Record, State
from unmask.rollouts.trajectory import Trajectory

L, Q, MASK, EOS = 16, 5, 257, 256


@dataclass
class Recorder:
    """A denoiser that keeps what it is shown, with EOS as likely as the test wants."""

    inner: Denoiser
    bonus: float = 6.0
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def hidden(self, input_ids_BT: Tensor, **options: Tensor) -> Tensor:
        shown = (input_ids_BT, options["padding_mask_BT"], options["position_ids_BT"])
        self.seen.append(tuple(value.clone() for value in shown))
        return self.inner.hidden(input_ids_BT, **options)

    def head(self, hidden: Tensor) -> Tensor:
        logits = self.inner.head(hidden)
        logits[..., EOS] += self.bonus
        return logits

    def logits(self, *arguments: Any, **options: Any) -> Tensor:
        logits = self.inner.logits(*arguments, **options)
        logits[..., EOS] += self.bonus
        return logits


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return shortrun.decided_denoiser()


def sampler_of(length: object, *, temperature: float = 0.9, **more: object) -> Sampler:
    section = {"schedule": {"name": "blocks", "size": 8, "per_step": 1}, "eos": {"rule": "none"}, "length": length}
    section["selection"] = {"name": "threshold", "level": 0.9}
    return build_sampler({**section, **more}, temperature=temperature)


def run(denoiser: object, sampler: Sampler, rows: int = 6, **options: object) -> Trajectory:
    prompt_BQ = torch.randint(0, 256, (rows, Q), generator=torch.Generator().manual_seed(4))
    mask_BQ = torch.arange(Q) >= (torch.arange(rows) % 3)[:, None]
    canvas_BL = torch.full((rows, L), MASK)
    return denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(rows) + 9, seed=0, **options)


# --- The rules, by plain loops at temperature 0 ----------------------------------------------------------------------


def predicted(denoiser: Recorder, prompt: list[int], canvas: list[int]) -> Tensor:
    """Return p `[len(canvas), V]` without the mask."""
    logits_TV = denoiser.logits(torch.tensor([prompt + canvas]))[0, len(prompt) :]
    logits_TV[:, MASK] = -torch.inf
    return logits_TV.softmax(dim=1)


def committed(p_LV: Tensor, canvas: list[int]) -> list[int]:
    """Return what blocks of 8 and threshold 0.9 decide."""
    start = canvas.index(MASK) // 8 * 8
    free = [i for i in range(start, min(start + 8, len(canvas))) if canvas[i] == MASK]
    order = sorted(free, key=lambda i: (-p_LV[i].max().item(), i))
    return [i for i in order if p_LV[i].max() >= 0.9] or order[:1]


def segment(gap: float) -> int:
    """8, 16, 32, 64 units for gaps of up to 0.1, 0.2, 0.3 and more."""
    return next((2**n for n in range(3) if gap <= 0.1 * (n + 1) + 1e-9), 8)


def tail(p_LV: Tensor, check: int) -> float:
    ends = [i for i in reversed(range(len(p_LV))) if int(p_LV[i].argmax()) == EOS]
    return sum(p_LV[i, EOS].item() for i in ends[:check]) / check


@torch.no_grad()
def rho_eos(denoiser: Recorder, prompt: list[int], knobs: dict) -> tuple[list[int], list[int]]:
    """Decode one row with rho-EOS; return tokens and the length at each step."""
    canvas, lengths, step, done, by = [MASK] * knobs["start"], [], 0, False, knobs["by"]
    while MASK in canvas:
        lengths.append(len(canvas))
        p_LV = predicted(denoiser, prompt, canvas)
        masked = [i for i, token in enumerate(canvas) if token == MASK]
        rho = sum(int(p_LV[i].argmax()) == EOS for i in masked) / len(masked)
        rho = tail(p_LV, 4) if knobs is TAIL else rho
        for i in committed(p_LV, canvas):
            canvas[i] = int(p_LV[i].argmax())
        done = done or len(canvas) == L
        if rho < 0.4 and not done and step < 5:
            room = L - max([*lengths, len(canvas)])
            if EOS in canvas:
                at, many = canvas.index(EOS), min(by * segment(0.4 - rho), room)
            else:
                at, many = len(canvas), min(by * segment(0.4 - rho), L - len(canvas))
            canvas[at:at] = [MASK] * many
        elif rho > 0.6 and not done and step < 5:
            for _ in range(by * segment(rho - 0.6)):
                if canvas[-1] == MASK and len(canvas) > 1:
                    canvas.pop()
        step += 1
    return canvas, lengths


@torch.no_grad()
def daedal(denoiser: Recorder, prompt: list[int], knobs: dict) -> tuple[list[int], list[int]]:
    """Decode one row with DAEDAL; return tokens and the length at each step."""
    canvas, lengths, begun, by = [MASK] * knobs["start"], [], False, knobs["by"]
    while MASK in canvas:
        lengths.append(len(canvas))
        p_LV = predicted(denoiser, prompt, canvas)
        end = tail(p_LV, 4)
        if not begun and len(canvas) < L:
            begun = end >= 0.2
            canvas += [MASK] * min(2 if begun else by, L - len(canvas))
            continue
        start_of = canvas.index(MASK) // 8 * 8
        taken = committed(p_LV, canvas)
        free = [i for i in range(start_of, min(start_of + 8, len(canvas))) if canvas[i] == MASK and i not in taken]
        for i in taken:
            canvas[i] = int(p_LV[i].argmax())
        unsure = [i for i in free if p_LV[i].max() < 0.6]
        if begun and unsure and end < 1.0:
            at = min(unsure, key=lambda i: (p_LV[i].max().item(), i))
            canvas[at + 1 : at + 1] = [MASK] * min(by - 1, L - len(canvas))
        begun = True
    return canvas, lengths


GROWING = {"name": "eos_density", "start": 6, "by": 2, "steps": 5}
TAIL = {"name": "eos_density", "start": 6, "by": 1, "steps": 5, "density": "tail", "check": 4}
INSERTING = {"name": "insertion", "start": 5, "by": 3, "margin": 2, "enough": 0.2, "full": 1.0, "low": 0.6, "check": 4}
CASES: list[tuple[dict[str, Any], Callable[..., Any], float]] = [
    (GROWING, rho_eos, 2.0),
    (GROWING, rho_eos, 4.0),
    (TAIL, rho_eos, 3.0),
    (INSERTING, daedal, 1.0),
    (INSERTING, daedal, 2.5),
]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("knobs", "loop", "bonus"), CASES)
def test_rules_equal_plain_loops(denoiser: Denoiser, knobs: dict, loop: Callable, bonus: float, static: bool) -> None:
    recorder, rows = Recorder(denoiser, bonus), 12
    found = run(recorder, sampler_of(knobs, temperature=0.0), rows, static=static)
    found.validate()
    changes = 0
    assert (found.appeared_BL > 0).any(), "masks are inserted, too"
    for b in range(rows):
        prompt = found.prompt_BQ[b][found.prompt_mask_BQ[b]].tolist()
        tokens, lengths = loop(recorder, prompt, knobs)
        steps = int(found.steps_B[b])
        assert found.length_BS[b, :steps].tolist() == lengths
        exists_L = found.exists_before(torch.tensor([b]), torch.tensor([steps]))[0]
        assert found.tokens_BL[b][exists_L].tolist() == tokens
        assert (found.tokens_BL[b][~exists_L] == MASK).all()
        changes += len(set(lengths)) > 1
    assert changes >= rows // 3


def test_growth_is_a_factor_of_the_gap() -> None:
    """0.3, 0.2, 0.1, 0 of the masks predict EOS: gaps of 0.1, 0.2, 0.3, 0.4 below the mark add 8, 16, 32, 64."""
    part = SLOTS["length"].build({"name": "eos_density", "start": 10})
    for ends, expected in ((3, 8), (2, 16), (1, 32), (0, 64), (4, 0), (5, 0), (6, 0), (7, -8), (8, -16), (10, -64)):
        state = with_predictions(10, ends)
        assert part(state).grow_A.tolist() == [expected], ends


def with_predictions(length: int, ends: int, room: int = 5) -> State:
    """Return a blank canvas whose last `ends` positions predict EOS."""
    state = State.of(torch.full((1, length + room), MASK), MASK, eos_token_ids=(EOS,))
    exists_AL = torch.arange(length + room)[None] < length
    statistics = Statistics.blank(1, length + room)
    best_AL = torch.where(torch.arange(length + room) >= length - ends, EOS, 1)[None]
    sure_AL = torch.full((1, length + room), -0.1)
    statistics = statistics._replace(token=best_AL.clone(), best=best_AL, confidence=sure_AL, eos=sure_AL)
    chosen_AL = torch.zeros_like(exists_AL)
    return replace(state, exists_AL=exists_AL, masked_AL=exists_AL.clone(), statistics=statistics, chosen_AL=chosen_AL)


def test_the_tail_counts_the_last_positions_that_predict_eos() -> None:
    state = with_predictions(10, 6)
    for check, expected in ((2, 2 / 2), (6, 6 / 6), (32, 6 / 32)):
        assert eos_tail(state, check).item() == pytest.approx(expected * torch.tensor(-0.1).exp().item(), rel=1e-6)


def test_insertions_come_before_the_first_eos() -> None:
    """One is decided at this very step, another one stands further right."""
    part = SLOTS["length"].build({"name": "eos_density", "start": 10})
    state = with_predictions(10, 0)
    state.canvas_AL[0, 7], state.masked_AL[0, 7] = EOS, False
    state.statistics.token[0, 4], state.chosen_AL[0, 4] = EOS, True
    found = part(state)
    assert (found.grow_A.item(), found.insert_A.item(), found.after_A.item()) == (0, 64, 3)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"name": "eos_density", "start": 0}, r"length.start: 0 must be at least 1"),
        ({"name": "insertion", "by": 0}, r"length.by: 0 must be at least 1"),
        ({"name": "eos_density", "low": 0.7}, r"low 0.7 and high 0.6 must be shares in ascending order"),
    ],
)
def test_knobs_are_checked(denoiser: Denoiser, knobs: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(Recorder(denoiser), sampler_of(knobs))
    with pytest.raises(RecipeError, match="takes no tokens back"):
        sampler_of({"name": "insertion"}, remasking={"name": "doubt"})


# --- Replay ----------------------------------------------------------------------------------------------------------


def restless(state: State, *, start: int = 5) -> Resize:
    """A user's rule that grows, shrinks and inserts anywhere, at random."""
    noise_A3 = state.uniform("restless")[:, :3]
    grow_A = (noise_A3[:, 0] * 9).long() - 4
    return Resize(grow_A, (noise_A3[:, 1] * 3).long(), (noise_A3[:, 2] * (L + 1)).long() - 1)


@pytest.mark.parametrize("rule", ["stop", "none"])
@pytest.mark.parametrize("score", ["confidence", "sampled_confidence"])
@pytest.mark.parametrize("length", [GROWING, INSERTING, restless], ids=["eos_density", "insertion", "restless"])
def test_every_canvas_is_replayed_bit_for_bit(denoiser: Denoiser, length: object, score: str, rule: str) -> None:
    """Tokens, what exists, and each token's RoPE position are those of the rollout; log-probs equal to 1e-5."""
    recorder = Recorder(denoiser, 2.0)
    sampler = sampler_of(GROWING, score=score, eos={"rule": rule})
    part = length if callable(length) else SLOTS["length"].build(length)
    sampler = replace(sampler, length=part)
    found = run(recorder, sampler, rows=10)
    found.validate()
    assert (found.appeared_BL > 0).any()
    assert found.length_BS.shape[1] == len(recorder.seen) + 1
    assert found.length_BS.unique().numel() > 2
    for t, (ids_AT, mask_AT, position_AT) in enumerate(recorder.seen):
        alive_A = (found.steps_B > t).nonzero()[:, 0]
        step_A = torch.full_like(alive_A, t)
        rebuilt_AL, exists_AL = found.canvas_before(alive_A, step_A), found.exists_before(alive_A, step_A)
        real_AT = torch.cat([found.prompt_mask_BQ[alive_A], exists_AL], dim=1)
        replayed_AT = (real_AT.long().cumsum(dim=1) - 1).clamp(min=0)
        for a in range(len(alive_A)):
            shown, kept = mask_AT[a], real_AT[a]
            assert torch.equal(ids_AT[a][shown][-int(exists_AL[a].sum()) :], rebuilt_AL[a][exists_AL[a]])
            assert torch.equal(position_AT[a][shown], replayed_AT[a][kept])
    views = trace(found, rng=None, tokens="all", context=sampler)
    scores = replay_all(recorder, views, 64)
    count = len(views.view_K)
    torch.testing.assert_close(scores.logprob_A[:count], views.behaviour_K, rtol=0, atol=1e-5)
    if score == "sampled_confidence":
        recorded_C = found.choice_logprob_BS[views.row_N, views.step_N]
        torch.testing.assert_close(scores.logprob_A[count:], recorded_C, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [GROWING, INSERTING], ids=["eos_density", "insertion"])
def test_a_row_does_not_depend_on_its_batch(denoiser: Denoiser, length: dict) -> None:
    sampler, recorder = sampler_of(length), Recorder(denoiser, 2.0)
    together = run(recorder, sampler, rows=6)
    static = run(recorder, sampler, rows=6, static=True)
    for name in ("tokens_BL", "born_BL", "steps_B", "appeared_BL", "source_BL"):
        assert torch.equal(getattr(static, name), getattr(together, name)), name
    prompt_BQ = together.prompt_BQ[[0, 0, 0, 3, 3, 3]]
    mask_BQ, canvas_BL = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.full((6, L), MASK)
    shared, own = (
        denoise(recorder, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(6), seed=0, group_B=group_B)
        for group_B in (torch.arange(6) // 3, None)
    )
    assert torch.equal(shared.tokens_BL, own.tokens_BL)
    assert torch.equal(shared.length_BS, own.length_BS)
    alone = Trajectory.cat([together.select(torch.tensor([b])) for b in range(6)])
    assert torch.equal(alone.length_BS, together.length_BS)
    assert torch.equal(alone.exists_before(torch.arange(6), together.steps_B), exists_at_the_end(together))


def exists_at_the_end(found: Trajectory) -> Tensor:
    return found.exists_before(torch.arange(len(found)), found.steps_B)


# --- Moves of positions ----------------------------------------------------------------------------------------------


def test_resize_moves_every_table_of_a_position() -> None:
    """Canvas a b . c | . . . . of 8: two masks behind b push c, and what parts remember of it, two to the right."""
    tokens_BL = torch.tensor([[10, 11, MASK, 12, MASK, MASK, MASK, MASK]])
    record = Record.start(tokens_BL, None, torch.tensor([4]), MASK)
    record.born_BL[0, 3], record.logprob_BL[0, 3] = 5, -0.5
    state = record.rows(
        torch.tensor([0]),
        offset_A=torch.zeros(1),
        rollout_id_A=torch.zeros(1),
        group_A=torch.zeros(1),
        mask_token_id=MASK,
        eos_token_ids=(),
        seed=0,
        step=0,
        memory={"flat": torch.arange(8.0)[None], "deep": torch.arange(16.0).view(1, 8, 2), "row": torch.tensor([7])},
    )
    change = Resize(torch.tensor([0]), torch.tensor([2]), torch.tensor([1]))
    memory = resize(record, torch.tensor([0]), change, torch.tensor([True]), state)
    assert record.tokens_BL.tolist() == [[10, 11, MASK, MASK, MASK, 12, MASK, MASK]]
    assert record.length_B.tolist() == [6]
    assert record.born_BL[0].tolist() == [-1, -1, -1, -1, -1, 5, -1, -1]
    assert record.logprob_BL[0, 5] == -0.5
    assert record.appeared_BL[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert memory["flat"][0].tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert memory["deep"][0, 5].tolist() == [6, 7]
    assert memory["row"].tolist() == [7]


@pytest.mark.parametrize(
    ("change", "length"),
    [
        (Resize(torch.tensor([99])), 8),  # never beyond the allocated canvas
        (Resize(torch.tensor([-99])), 4),  # never over a decided token
        (Resize(torch.tensor([0]), torch.tensor([99]), torch.tensor([0])), 8),
        (Resize(torch.tensor([0]), torch.tensor([0]), torch.tensor([2])), 4),
    ],
)
def test_lengths_keep_within_bounds(change: Resize, length: int) -> None:
    tokens_BL = torch.tensor([[10, MASK, MASK, 12, MASK, MASK, MASK, MASK]])
    record = Record.start(tokens_BL, None, torch.tensor([4]), MASK)
    state = State.of(tokens_BL, MASK)
    resize(record, torch.tensor([0]), change, torch.tensor([True]), state)
    assert record.length_B.tolist() == [length]
    assert record.tokens_BL[0, : record.length_B[0]].tolist().count(MASK) == length - 2
    assert 12 in record.tokens_BL[0, : record.length_B[0]].tolist()


def test_positions_of_an_earlier_canvas_are_never_moved_into_the_middle() -> None:
    """A canvas of 8 that shrank to 4 has no unused position left: nothing can be inserted, or replay would fail."""
    tokens_BL = torch.full((1, 8), MASK)
    record, state = Record.start(tokens_BL, None, torch.tensor([8]), MASK), State.of(tokens_BL, MASK)
    allowed = torch.tensor([True])
    resize(record, torch.tensor([0]), Resize(torch.tensor([-4])), allowed, state)
    resize(record, torch.tensor([0]), Resize(torch.tensor([0]), torch.tensor([2]), torch.tensor([0])), allowed, state)
    assert (record.length_B.item(), record.longest_B.item()) == (4, 8)


def test_rows_that_may_not_change_do_not() -> None:
    tokens_BL = torch.full((2, 8), MASK)
    record, state = Record.start(tokens_BL, None, torch.tensor([4, 4]), MASK), State.of(tokens_BL, MASK)
    change = Resize(torch.tensor([1, 1]), torch.tensor([1, 1]), torch.tensor([0, 0]))
    resize(record, torch.arange(2), change, torch.tensor([True, False]), state)
    assert record.length_B.tolist() == [6, 4]
