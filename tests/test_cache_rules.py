"""Which columns every cache policy computes and sees, against a description in plain Python, and how many there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cachetoys
import pytest
import torch
from cachetoys import LENGTHS, Rule, Watched, rollouts

from unmask.recipes.registry import SLOTS
from unmask.rollouts.caches import Layout, dkv_greedy
from unmask.rollouts.schedules import Quota
from unmask.rollouts.state import State
from unmask.rollouts.trajectory import Trajectory

L, SIZE, WIDTH = 24, 8, 12
POLICIES: dict[str, list[dict[str, int]]] = {
    "block_causal": [{}],
    "prefix": [{}, {"refresh": 2}],
    "dual": [{}, {"refresh": 3}],
    "dkv_decode": [{}, {"refresh": 3, "warmup": 1}],
    "dkv_greedy": [{}, {"refresh": 4, "near": 2}],
    "free_cache": [{}, {"refresh": 5}],
    "window_diffusion": [{}, {"refresh": 4, "outer": 6, "inner": 2}, {"refresh": 5, "outer": 3, "inner": 9}],
}
CASES = [(name, knobs) for name, choices in POLICIES.items() for knobs in choices]
# Positions in random order, one or a few at a step.
SECTION = {
    "schedule": {"name": "blocks", "size": SIZE, "per_step": 1},
    "score": "random",
    "selection": {"name": "threshold", "level": 0.8},
    "eos": {"rule": "none"},
}


@pytest.fixture(autouse=True, scope="module")
def no_grad() -> Any:
    with torch.no_grad():
        yield


def rule(denoiser: Watched, trajectory: Trajectory, row: int, name: str, knobs: dict[str, int]) -> Rule:
    return Rule(
        name,
        trajectory.born_BL[row].tolist(),
        SIZE,
        prompt=trajectory.prompt_BQ.shape[1],
        padded=int((~trajectory.prompt_mask_BQ[row]).sum()),
        block=denoiser.family.block_length or 1,
        shift=denoiser.family.logit_shift,
        knobs=knobs,
    )


def run(family: str, name: str, knobs: dict[str, int], **options: Any) -> tuple[Watched, Trajectory]:
    # The blocks of the schedule keep to the family's.
    denoiser = cachetoys.load(family)
    found = rollouts(denoiser, {"name": name, **knobs}, canvas=L, width=WIDTH, section=SECTION, **options)
    return denoiser, found


def test_every_cache_is_described() -> None:
    assert set(POLICIES) == set(SLOTS["cache"])


@pytest.mark.parametrize(("name", "knobs"), CASES)
@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_a_policy_computes_what_it_says(family: str, name: str, knobs: dict[str, int]) -> None:
    """Row by row: the columns of every step, and one forward a step."""
    if name == "block_causal" and family != "sdar":
        pytest.skip("for block-causal families alone")
    partial = 0
    # sdar's borders depend on the prompt; the description counts blocks from the canvas's start.
    for length in (9, 6) if family != "sdar" else (12, 8):
        denoiser, trajectory = run(family, name, knobs, lengths=(length,))
        told = rule(denoiser, trajectory, 0, name, knobs)
        steps = int(trajectory.steps_B)
        assert len(denoiser.forwards) == steps > 12
        for step, forward in enumerate(denoiser.forwards):
            ((_, columns),) = forward
            computed = told.real if columns is None else set(columns)
            assert computed == told.columns(step), step
            partial += columns is not None
    assert partial > 5


def test_neighbours_are_the_nearest_masks_on_either_side() -> None:
    """Ten positions, 0 and 4 decided, 5 and 6 open to the step: one more mask on each side is 3 and 7."""
    canvas_AL = torch.full((1, 10), -1).index_fill(1, torch.tensor([0, 4]), 65)
    state = State.of(canvas_AL, -1, step=1)
    state.window_AL = torch.zeros(1, 10, dtype=torch.bool).index_fill(1, torch.tensor([5, 6]), True)
    state.quota = Quota(state.window_AL, torch.tensor([1]))
    layout = Layout.of(state)._replace(changed_AT=torch.zeros_like(state.window_AL))
    state.memory["cache"] = torch.tensor([[0, 0]])  # a step into the canvas
    for near, wanted in ((0, [5, 6]), (1, [3, 5, 6, 7]), (9, [1, 2, 3, 5, 6, 7, 8, 9])):
        columns_AT, visible_AT = dkv_greedy(state, layout, near=near)
        assert columns_AT[0].nonzero()[:, 0].tolist() == wanted and visible_AT is None


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_a_policy_sees_what_it_says(name: str, knobs: dict[str, int]) -> None:
    """Stored columns, those just computed, no padding; and of these what is visible and what attention lets through."""
    family = "sdar" if name == "block_causal" else "llada"
    denoiser, trajectory = run(family, name, knobs, lengths=(8,))
    told, stored, number = rule(denoiser, trajectory, 0, name, knobs), set[int](), 0
    for step, forward in enumerate(denoiser.forwards):
        ((_, columns),) = forward
        stored |= told.columns(step)
        if columns is None:
            continue
        (seen,) = denoiser.seen[number]
        number += 1
        visible = stored
        if name == "window_diffusion":
            limits = {"refresh": 32, "outer": 64, **knobs}
            visible = stored & told.visible(step, limits["refresh"], limits["outer"]) | set(columns)
        for column in columns:
            wanted = visible
            if name == "block_causal":
                wanted = {c for c in visible if told.block_of(c) <= told.block_of(column)}
            assert set(seen[column]) == wanted, (step, column)
    assert number == len(denoiser.seen) > 3


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_batch_computes_no_column_more(name: str) -> None:
    """Rows at different steps of their blocks: together they compute what each would alone, in a few forwards."""
    denoiser, trajectory = run("sdar", name, {})
    steps = trajectory.steps_B.tolist()
    assert len(set(steps)) > 1
    alone = 0
    for row, length in enumerate(LENGTHS):
        single, _ = run("sdar", name, {}, lengths=(length,), ids=[row])
        alone += single.computed
    tokens = trajectory.prompt_mask_BQ.sum(1) + L
    assert denoiser.computed == alone < int((trajectory.steps_B * tokens).sum())
    assert len(denoiser.forwards) <= 3 * max(steps)


def test_the_documents_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All masks and the newest tokens, and everything every fourth step."""
    text = (Path(__file__).parents[1] / "docs" / "caches.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_parts.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    denoiser, trajectory = run("llada", "my_parts:masks_only", {}, lengths=(9,))
    told = rule(denoiser, trajectory, 0, "", {})
    for step, forward in enumerate(denoiser.forwards):
        ((_, columns),) = forward
        assert (columns is None) == (step % 4 == 0)
        if columns is not None:
            assert set(columns) == told.canvas(told.masked(step)) | told.newest(step)


def test_the_exact_cache_computes_a_block_at_a_time() -> None:
    """A prompt of 9 tokens and blocks of 4, one token a step: opening a block computes the one before it as well."""
    section = {"schedule": {"name": "blocks", "size": 4, "per_step": 1}, "eos": {"rule": "none"}}
    denoiser = cachetoys.load("sdar")
    rollouts(denoiser, "block_causal", canvas=12, lengths=(9,), section=section)
    widths = [len(columns or []) for ((_, columns),) in denoiser.forwards]
    # The prompt's last token and three of the canvas share a block; blocks of four, four and one follow.
    assert widths == [12, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4, 5]
