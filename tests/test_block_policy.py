"""A planner of block lengths: its probabilities against enumeration, its blocks against fixed ones, what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cachetoys
import pytest
import shortrun
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.planner import FEATURES, Planner, PlannerSpec, load_planner, new_planner
from unmask.policies.planner_blocks import block_ends, ends
from unmask.policies.planner_distributions import Distribution, Draw
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl.bench_policies import Grid, bench_policies
from unmask.rollouts import planned_blocks
from unmask.rollouts.engine import denoise
from unmask.rollouts.planned import Acting
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.state import State
from unmask.rollouts.trajectory import GIVEN, Trajectory

CANVAS, ROWS, WIDTH, EOS = 16, 6, 32, 256
LENGTHS = (2, 3, 8)
SPEC = PlannerSpec(
    features=("odds", "entropy", "frontier", "masked", "time", "left", "alpha"),
    distribution="blocks",
    lengths=LENGTHS,
    past=2,
    hidden=WIDTH,
    width=16,
    mlp=32,
)
PLAIN = replace(SPEC, network="linear", past=0, hidden=0)
THRESHOLD = {"score": "confidence", "selection": {"name": "threshold", "level": 0.3}}


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return shortrun.decided_denoiser()


def acting(spec: PlannerSpec = SPEC, scale: float = 0.4) -> Acting:
    made = new_planner(spec, seed=2)
    rng = torch.Generator().manual_seed(3)
    for parameter in made.network.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=rng)
    return Acting(made, lambda state: torch.where(state.rollout_id_A % 2 == 0, 0.5, 3.0))


def sampler_of(act: Acting, temperature: float = 0.0, **parts: Any) -> Sampler:
    knobs = parts.pop("knobs", {})
    section = {"schedule": {"name": "planned", **knobs}, **THRESHOLD, **parts}
    sampler = build_sampler(section, temperature=temperature)
    schedule = partial(planned_blocks.planned, acting=act, **knobs)
    return replace(sampler, schedule=schedule, keeps_features=True)


def run(denoiser: Any, sampler: Sampler, rows: list[int] | None = None, **more: Any) -> Trajectory:
    ids = torch.tensor(list(range(ROWS)) if rows is None else rows)
    rng = torch.Generator().manual_seed(0)
    prompt_BQ = torch.randint(0, 256, (max(ROWS, int(ids.max()) + 1), 6), generator=rng)[ids]
    if more.pop("alike", False):
        prompt_BQ = prompt_BQ[:1].expand(len(ids), -1)
    mask_BQ = torch.ones_like(prompt_BQ, dtype=torch.bool)
    canvas_BL = torch.full((len(ids), more.pop("canvas", CANVAS)), denoiser.family.mask_token_id)
    for place, token in more.pop("given", {}).items():
        canvas_BL[:, place] = token
    return denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, ids, seed=5, step=2, **more)


def choices(made: Trajectory) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, step, start, end) of every block of every row."""
    assert made.end_BS is not None
    for row in range(len(made)):
        for step in range(int(made.steps_B[row])):
            end = int(made.end_BS[row, step])
            if end:
                canvas_L = made.canvas_before(torch.tensor([row]), torch.tensor([step]))[0]
                yield row, step, canvas_L.tolist().index(made.mask_token_id), end


def blocks_of(made: Trajectory, row: int) -> list[tuple[int, int]]:
    return [(start, end) for found, _, start, end in choices(made) if found == row]


def feasible(start: int, canvas: int, lengths: tuple[int, ...]) -> list[int]:
    return [start + length for length in lengths if start + length <= canvas] or [canvas]


def compositions(start: int, canvas: int, lengths: tuple[int, ...]) -> Iterator[list[tuple[int, int]]]:
    """Yield every way in which a canvas can be cut into blocks from `start` on."""
    if start == canvas:
        yield []
        return
    for end in feasible(start, canvas, lengths):
        for rest in compositions(end, canvas, lengths):
            yield [(start, end), *rest]


@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["past", "plain"])
def test_the_lengths_of_all_rollouts_sum_to_one(
    denoiser: Denoiser, spec: PlannerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sequence of blocks is forced once: their recorded probabilities add up, and are the rates of free draws."""
    canvas, act = 12, acting(spec)
    every = list(compositions(0, canvas, LENGTHS))
    end_RL = torch.zeros(len(every), canvas, dtype=torch.long)
    for row, cut in enumerate(every):
        for start, end in cut:
            end_RL[row, start] = end

    def scripted(distribution: Distribution, state: State, decide: str) -> Draw:
        first_A = torch.where(state.masked_AL, torch.arange(canvas), canvas - 1).amin(dim=1)
        wanted_A1 = end_RL[state.rollout_id_A, first_A][:, None]
        chosen_AL = distribution.candidate_BL & (torch.arange(canvas) + 1 == wanted_A1)  # type: ignore[attr-defined]
        return Draw(chosen_AL, distribution.logit_BL)

    same = replace(act, alpha=lambda state: torch.full((len(state.step_A),), 2.0))
    sampler = replace(sampler_of(same), eos_rule="none")
    with monkeypatch.context() as patch:
        patch.setattr(planned_blocks, "drawn", scripted)
        made = run(denoiser, sampler, list(range(len(every))), canvas=canvas, alike=True)
    assert [blocks_of(made, row) for row in range(len(every))] == every
    chance_R = made.choice_logprob_BS.double().sum(dim=1).exp()
    assert chance_R.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert chance_R.min() < 0.5 / len(every) and len(every) > 20
    drawn = run(denoiser, sampler, list(range(600)), canvas=canvas, alike=True)
    assert drawn.end_BS is not None
    seen: dict[tuple[int, ...], int] = {}
    for row in drawn.end_BS.tolist():
        cut = tuple(end for end in row if end)
        seen[cut] = seen.get(cut, 0) + 1
    for cut, chance in zip(every, chance_R.tolist(), strict=True):
        rate = seen.get(tuple(end for _, end in cut), 0) / len(drawn)
        assert abs(rate - chance) < 4 * (chance * (1 - chance) / len(drawn)) ** 0.5 + 1e-9


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["past", "plain"])
def test_the_recorded_log_probability_is_recomputed_from_what_was_seen(
    denoiser: Denoiser, spec: PlannerSpec, temperature: float
) -> None:
    act = acting(spec)
    made = run(denoiser, sampler_of(act, 0.7, knobs={"temperature": temperature}))
    made.validate()
    assert made.candidate_BSL is not None and made.features_BSLF is not None and made.end_BS is not None
    scored = 0
    for row, step, start, end in choices(made):
        wanted = feasible(start, CANVAS, LENGTHS)
        assert end in wanted
        candidates = (made.candidate_BSL[row, step].nonzero().squeeze(1) + 1).tolist()
        # A single end is no choice.
        assert candidates == (wanted if len(wanted) > 1 else [])
        recorded = made.choice_logprob_BS[row, step].item()
        if len(wanted) == 1:
            assert recorded == 0
            continue
        index = torch.tensor([row]), torch.tensor([step])
        distribution = act.planner.distribution(
            made.features_BSLF[index].float(),
            made.candidate_BSL[index],
            past_BMD=None if made.past_BSMD is None else made.past_BSMD[index].float(),
            temperature=temperature,
        )
        chosen_1L = (torch.arange(CANVAS) + 1 == end)[None]
        assert distribution.log_prob(chosen_1L, chosen_1L).item() == pytest.approx(recorded, abs=1e-5)
        feature_LF = made.features_BSLF[row, step].float()
        assert feature_LF[:, spec.features.index("masked")].sum() == CANVAS - start
        assert feature_LF[0, spec.features.index("alpha")] == torch.tensor(0.5 if row % 2 == 0 else 3.0).log().half()
        scored += 1
    assert scored > ROWS
    # Nowhere else is anything to learn from.
    begun_BS = made.end_BS > 0
    assert not made.candidate_BSL[~begun_BS].any() and not made.choice_logprob_BS[~begun_BS].any()
    assert not made.features_BSLF[~begun_BS].any()


@pytest.mark.parametrize("cache", [None, "dual"])
@pytest.mark.parametrize("inside", ["threshold", "top"])
@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=["past", "plain"])
def test_a_policy_of_one_length_decodes_like_fixed_blocks(
    denoiser: Denoiser, spec: PlannerSpec, size: int, inside: str, cache: str | None
) -> None:
    lengths = (2, 4, 8, 16)
    act = acting(replace(spec, lengths=lengths))
    head = act.planner.network.get_parameter("count.bias" if spec is PLAIN else "length.bias")
    head.data[lengths.index(size)] = 200.0
    pace = {"per_step": 2} if inside == "top" else {"per_step": 1}
    parts = {"selection": "top"} if inside == "top" else {}
    fixed = {"schedule": {"name": "blocks", "size": size, **pace}, **THRESHOLD, **parts, "cache": cache}
    for temperature, static in ((0.0, None), (0.8, True)):
        wanted = run(denoiser, build_sampler(fixed, temperature=temperature), static=static)
        for decide in ("sample", "mode"):
            sampler = sampler_of(act, temperature, knobs={"decide": decide, **pace}, cache=cache, **parts)
            found = run(denoiser, sampler, static=static)
            for name in ("tokens_BL", "born_BL", "rank_BL", "steps_B"):
                assert torch.equal(getattr(found, name), getattr(wanted, name)), (name, temperature, decide)
            # A block's first call is asked for more positions: the head's product rounds its last digit elsewhere.
            torch.testing.assert_close(found.logprob_BL, wanted.logprob_BL, rtol=1e-5, atol=1e-5)
    assert {end - start for _, _, start, end in choices(found)} == {size}


@pytest.mark.parametrize("eos", ["stop", "none"])
@pytest.mark.parametrize("given", [{}, {0: 7, 5: 9, 6: 9, 15: 3}], ids=["blank", "given"])
def test_blocks_tile_the_canvas(denoiser: Denoiser, eos: str, given: dict[int, int]) -> None:
    made = run(denoiser, sampler_of(acting(), 0.9, eos={"rule": eos}), given=given)
    widths = set()
    for row in range(ROWS):
        cut = blocks_of(made, row)
        born_L, held_L = made.born_BL[row], made.source_BL[row] == GIVEN
        reached = 0
        for start, end in cut:
            # What lies between two blocks was there from the start.
            assert held_L[reached:start].all() and not held_L[start]
            assert end in feasible(start, CANVAS, LENGTHS)
            widths.add(end - start)
            reached = end
        assert reached == CANVAS or eos == "stop" or held_L[reached:].all()
        steps = [step for found, step, *_ in choices(made) if found == row] + [int(made.steps_B[row])]
        for (start, end), first, last in zip(cut, steps, steps[1:], strict=False):
            here_L = (born_L >= first) & (born_L < last)
            assert here_L.any() and not here_L[:start].any() and not here_L[end:].any()
    assert len(widths) >= 3


def test_a_row_does_not_depend_on_the_batch(denoiser: Denoiser) -> None:
    sampler = sampler_of(acting(), 0.7)
    together = run(denoiser, sampler)
    assert together.end_BS is not None and together.past_BSMD is not None
    for rows in ([4], [5, 2, 0]):
        part = run(denoiser, sampler, rows)
        for name in ("tokens_BL", "born_BL", "steps_B"):
            assert torch.equal(getattr(part, name), getattr(together, name)[rows]), name
        assert part.end_BS is not None
        assert torch.equal(part.end_BS, together.end_BS[rows, : part.end_BS.shape[1]])
    fixed = run(denoiser, sampler, static=True)
    assert torch.equal(fixed.tokens_BL, together.tokens_BL) and fixed.end_BS is not None
    steps = together.end_BS.shape[1]
    assert torch.equal(fixed.end_BS[:, :steps], together.end_BS)
    joined = Trajectory.cat([together, run(denoiser, sampler, [1])])
    torch.testing.assert_close(joined.past_BSMD[:ROWS], together.past_BSMD)


def test_what_is_kept_of_the_last_blocks(denoiser: Denoiser) -> None:
    """Of each token the state of the call that decided it; the mean a block; the last two blocks, the newest last."""
    made = run(denoiser, sampler_of(acting()))
    assert made.past_BSMD is not None
    depth = 0
    for row in range(ROWS):
        means: list[Tensor] = [torch.zeros(WIDTH + 1)] * 2
        cut = [found for found in choices(made) if found[0] == row]
        for place, (_, step, _, _) in enumerate(cut):
            torch.testing.assert_close(made.past_BSMD[row, step].float(), torch.stack(means[-2:]), rtol=2e-3, atol=2e-3)
            last = cut[place + 1][1] if place + 1 < len(cut) else step
            states = []
            for at in range(step, last):
                index = torch.tensor([row]), torch.tensor([at])
                ids_1T = torch.cat([made.prompt_BQ[index[0]], made.canvas_before(*index)], dim=1)
                hidden_LD = denoiser.hidden(ids_1T)[0, -CANVAS:].detach()
                logits_LV = denoiser.head(hidden_LD).float().detach()
                logits_LV[:, made.mask_token_id] = -torch.inf
                p_LV = logits_LV.softmax(-1)
                entropy_L = -torch.where(p_LV > 0, p_LV * p_LV.log(), 0.0).sum(dim=1)
                states += [
                    torch.cat([hidden_LD[i], entropy_L[i : i + 1]])
                    for i in (made.born_BL[row] == at).nonzero().squeeze(1).tolist()
                ]
            if states:
                mean_D = torch.stack(states).mean(dim=0)
                mean_D[-1] = mean_D[-1] / (1 + mean_D[-1])
                means.append(mean_D)
        depth = max(depth, len(means) - 2)
    assert depth >= 3


def test_candidates_and_chances_by_hand() -> None:
    """Five positions left: of 2, 3 and 8 two fit; 1 left: the rest is the block, of probability 1."""
    first_B1 = torch.tensor([[3], [7], [0]])
    found = block_ends(first_B1, LENGTHS, 8)
    assert [(row.nonzero().squeeze(1) + 1).tolist() for row in found] == [[5, 6], [8], [2, 3, 8]]
    logit_BL = torch.arange(8.0).expand(3, 8)
    length_BC = torch.tensor([[1.0, -1.0, 4.0]]).expand(3, 3)
    chance_BL = ends(logit_BL, found, length_BC, LENGTHS).chance_BL
    wanted = [[(4, 4 + 1.0), (5, 5 - 1.0)], [(7, 0.0)], [(1, 1 + 1.0), (2, 2 - 1.0), (7, 7 + 4.0)]]
    for row, entries in enumerate(wanted):
        total = torch.tensor([value for _, value in entries]).logsumexp(0)
        for place, value in entries:
            assert chance_BL[row, place].item() == pytest.approx((value - total).item(), abs=1e-6)


def test_an_untrained_policy_likes_all_lengths_alike(denoiser: Denoiser) -> None:
    planner = new_planner(replace(SPEC, network="linear"))
    made = run(denoiser, sampler_of(Acting(planner, lambda state: torch.ones(len(state.step_A)))))
    for row, step, start, _ in choices(made):
        wanted = -torch.tensor(float(len(feasible(start, CANVAS, LENGTHS)))).log()
        assert made.choice_logprob_BS[row, step].item() == pytest.approx(wanted.item(), abs=1e-6)


def whims(state: State, chosen_AL: Tensor, score_AL: Tensor) -> Tensor:
    """Take back a random third of everything, for a while: also what is left of the present block."""
    return (state.uniform("whims") < 0.35) & (state.step_A < 10)[:, None]


@pytest.mark.parametrize("remasking", ["running_confidence", "backtrack", "whims"])
def test_tokens_that_are_taken_back_leave_the_choices_exact(denoiser: Denoiser, remasking: str) -> None:
    act = acting()
    parts: dict[str, Any] = {"eos": {"rule": "none"}, "knobs": {"per_step": 2}}
    if remasking == "running_confidence":
        parts["selection"] = "all"
    if remasking != "whims":
        parts["remasking"] = remasking
    sampler = sampler_of(act, 0.9, **parts)
    made = run(denoiser, replace(sampler, remasking=whims) if remasking == "whims" else sampler)
    made.validate()
    assert made.features_BSLF is not None and made.candidate_BSL is not None and made.past_BSMD is not None
    assert made.retracted is not None
    assert remasking == "running_confidence" or len(made.retracted.row_R) > 0
    for row in range(ROWS):
        cut = blocks_of(made, row)
        assert [start for start, _ in cut] == [0, *(end for _, end in cut[:-1])] and cut[-1][1] == CANVAS
    for row, step, _, end in choices(made):
        index = torch.tensor([row]), torch.tensor([step])
        if not made.candidate_BSL[index].any():
            continue
        found = act.planner.distribution(
            made.features_BSLF[index].float(), made.candidate_BSL[index], past_BMD=made.past_BSMD[index].float()
        ).chance_BL[0, end - 1]
        assert found.item() == pytest.approx(made.choice_logprob_BS[row, step].item(), abs=1e-5)


@torch.no_grad()
def test_block_causal_families_with_their_exact_cache() -> None:
    """Lengths need not keep to the family's borders: what was drawn has its probability, with and without a cache."""
    denoiser = cachetoys.load("sdar")
    act = acting(replace(SPEC, hidden=denoiser.base.config.hidden_size))
    found = [run(denoiser, sampler_of(act, 1.0, cache=cache)) for cache in (None, "block_causal")]
    assert cachetoys.same_tokens(*found) and torch.equal(found[0].end_BS, found[1].end_BS)  # type: ignore[arg-type]
    assert {end % 4 for _, _, _, end in choices(found[0])} > {0}


def test_a_saved_policy_is_used_by_its_path(denoiser: Denoiser, tmp_path: Path) -> None:
    act = acting()
    act.planner.save(tmp_path / "planner")
    assert load_planner(tmp_path).spec == SPEC
    told = Acting(act.planner, lambda state: torch.full((len(state.step_A),), 2.0))
    wanted = run(denoiser, sampler_of(told))
    knobs = {"name": "planned", "path": str(tmp_path), "alpha": 2.0}
    found = run(denoiser, build_sampler({"schedule": knobs, **THRESHOLD}, temperature=0.0))
    assert torch.equal(found.tokens_BL, wanted.tokens_BL) and torch.equal(found.born_BL, wanted.born_BL)
    assert found.features_BSLF is None and found.past_BSMD is None
    assert found.end_BS is not None and found.end_BS.tolist() == wanted.end_BS.tolist()  # type: ignore[union-attr]
    # Each kind has its place.
    with pytest.raises(RecipeError, match="chooses lengths of blocks; use schedule planned"):
        section = {"schedule": {"name": "whole"}, "score": {"name": "planner", "path": str(tmp_path)}}
        run(denoiser, build_sampler({**section, "selection": "planned"}))
    new_planner(PlannerSpec(width=16, mlp=32)).save(tmp_path / "other")
    with pytest.raises(RecipeError, match="chooses positions; use score planner"):
        run(denoiser, build_sampler({"schedule": {**knobs, "path": str(tmp_path / "other")}, **THRESHOLD}))


def test_it_is_a_row_of_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(shortrun.save_model(tmp_path / "model"))
    new_planner(SPEC).save(tmp_path / "lengths")
    grid = Grid((), planners=("lengths",), alphas=(0.3, 1.0))
    found = bench_policies(model, grid, problems=3, overrides=("task.level=easy", "rollout.canvas=16"))
    rows = [(row["kind"], row["block"], row["knob"]) for row in found["rows"]]
    assert rows == [("planner lengths", 0, 0.3), ("planner lengths", 0, 1.0)]
    assert all(0 < row["nfe"] <= 16 for row in found["rows"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (4, 2)}, "must begin with 1 or more and rise"),
        ({"lengths": ()}, "must begin with 1 or more and rise"),
        ({"lengths": (0, 2)}, "must begin with 1 or more and rise"),
        ({"past": -1}, "must be 0"),
        ({"hidden": 0}, "just where past is above 0"),
        ({"past": 0}, "just where past is above 0"),
        ({"network": "hidden"}, "use transformer"),
        ({"features": FEATURES}, "persistence, candidate tells of a step inside a block"),
    ],
)
def test_policies_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"selection": "planned"}, "a sampler has one planner"),
        ({"score": "planner"}, "a sampler has one planner"),
        ({"score": "planner", "selection": "planned"}, "a sampler has one planner"),
        ({"remasking": "planned"}, "half of what selection planned draws"),
        ({"length": {"name": "eos_density", "start": 8}}, "changes its length"),
        ({"score": "sampled_confidence", "selection": "top"}, "a trainer cannot rebuild"),
        ({"selection": "plackett_luce"}, "a trainer cannot rebuild"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "_".join(value),
)
def test_samplers_that_cannot_hold_together_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_sampler({"schedule": "planned", **THRESHOLD, **parts})


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"temperature": 0.0}, "schedule.temperature: 0.0 must be above 0"),
        ({"alpha": -1.0}, "schedule.alpha: -1.0 must be at least 0"),
        ({"per_step": 0}, "schedule.per_step: 0 must be at least 1"),
        ({}, "schedule.path: schedule 'planned' needs a trained planner"),
        ({"path": "nowhere"}, "holds no planner"),
    ],
)
def test_wrong_knobs_are_refused(denoiser: Denoiser, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(denoiser, build_sampler({"schedule": {"name": "planned", **knobs}, **THRESHOLD}))


def test_a_denoiser_without_hidden_states_serves_a_policy_that_reads_none(denoiser: Denoiser) -> None:
    class Bare:
        family = denoiser.family

        def logits(self, *inputs: Any, **options: Any) -> Tensor:
            return denoiser.logits(*inputs, **options)

    assert torch.equal(
        run(Bare(), sampler_of(acting(PLAIN))).tokens_BL, run(denoiser, sampler_of(acting(PLAIN))).tokens_BL
    )
    with pytest.raises(RecipeError, match="this denoiser gives logits alone"):
        run(Bare(), sampler_of(acting()))
    wide = Planner(replace(SPEC, hidden=8), new_planner(replace(SPEC, hidden=8)).network)
    with pytest.raises(RecipeError, match="reads hidden states of width 8"):
        run(denoiser, sampler_of(Acting(wide, lambda state: torch.ones(len(state.step_A)))))


def test_it_is_listed_with_the_schedules() -> None:
    assert set(SLOTS["schedule"].knobs("planned")) == {"path", "alpha", "temperature", "decide", "per_step"}
