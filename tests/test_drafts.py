"""MDPO: drafts as recorded, their rewards, credit by step, the estimator over all draws, and one update by hand."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from unmask.policies.loading import new_denoiser
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.loading import load_methods, load_recipe
from unmask.recipes.registry import RecipeError
from unmask.rewards.scoring import RewardTable
from unmask.rl.advantages import step_difference
from unmask.rl.credit import Credit
from unmask.rl.crediting import credited
from unmask.rl.drafts import drafts
from unmask.rl.objective import build_objective
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.trajectory import PAD, SAMPLED, Trajectory
from unmask.rollouts.worker import RolloutBatch, RolloutWorker

NAN = math.nan
PROMPT = torch.tensor([1, 3])
RULES = ("confidence_2", "sampled_1_stop", "sampled_2")
CASES = ("rcr", "rcr_blocks", "backtrack", "doubt_sampled", "edit_and_doubt")


def raw(rewards: list[float]) -> list[float]:
    """Return A before it is normalised: with a partner of A = 0 and a huge eps, half of it over eps is left."""
    pair = torch.tensor([rewards, [0.0] * len(rewards)], dtype=torch.float64)
    return (step_difference(pair, torch.zeros(2), eps=1e12)[0] * 2e12).tolist()


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 1, 1, 0], [2 / 3, 1.5, 0, -1]),
        ([0, 0, 0, 1], [1 / 3, 0.5, 1, 2]),
        ([0, 1, 1, 1], [1, 2, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_published_vectors(rewards: list[float], expected: list[float]) -> None:
    """trajectory_rl.md section 3.2."""
    assert raw([float(r) for r in rewards]) == pytest.approx(expected, abs=1e-9)


def test_a_step_without_a_reward_is_left_out() -> None:
    found = raw([0.0, NAN, 1.0, NAN, 1.0, 0.0])
    assert found[1] != found[1] and found[3] != found[3]
    assert [found[i] for i in (0, 2, 4, 5)] == pytest.approx([2 / 3, 1.5, 0, -1], abs=1e-9)


def by_hand(reward: list[list[float]], group: list[int], eps: float) -> list[list[float]]:
    """Advantages in plain loops; rollouts that have finished keep their answer."""
    steps = max(map(len, reward))
    score = []
    for r in reward:
        a = [
            r[s] - (r[s - 1] if s else 0) + (numpy.mean(r[s + 1 :]) if s + 1 < len(r) else r[-1]) for s in range(len(r))
        ]
        score.append(a + [r[-1]] * (steps - len(r)))
    found = []
    for b, r in enumerate(reward):
        members = [k for k in range(len(reward)) if group[k] == group[b]]
        row = []
        for s in range(len(r)):
            column = numpy.array([score[k][s] for k in members])
            std = column.std(ddof=1) if len(column) > 1 else 0.0
            row.append(0.0 if numpy.ptp(column) == 0 else (score[b][s] - column.mean()) / (std + eps))
        found.append(row)
    return found


REWARD = [[0, 1, 1, 0], [1.0], [0, 0, 1], [0.5, 0.1, 0.1], [0.1, 0.1, 0.1], [0.3, 0.9]]
GROUP = [4, 2, 4, 2, 4, 7]


def table(rows: list[list[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[NAN] * (width - len(row))] for row in rows], dtype=torch.float64)


def test_ragged_steps_by_hand() -> None:
    found = step_difference(table(REWARD), torch.tensor(GROUP))
    torch.testing.assert_close(found, table(by_hand(REWARD, GROUP, 1e-4)), equal_nan=True, rtol=1e-12, atol=1e-12)
    assert found[5, :2].tolist() == [0.0, 0.0]  # a group of one says nothing


def test_equal_rewards_give_exactly_zero_at_every_step() -> None:
    found = step_difference(torch.tensor([[0.1, 0.7, 0.3, 0.3]] * 7), torch.zeros(7))
    assert bool((found == 0).all())


def sampled(toys: ModuleType, retractions: ModuleType, name: str) -> tuple[Any, Sampler, Tensor]:
    """Return (toy, sampler, canvas of 40 rows) of a rule, or of a case that takes tokens back."""
    if name in RULES:
        rule = toys.RULES[name]
        canvas = [toys.MASK] * toys.L
        return toys.Toy(1), build_sampler(toys.section(rule), temperature=rule.temperature), torch.tensor([canvas] * 40)
    case = retractions.CASES[name]
    sampler = build_sampler(case.section, temperature=case.temperature)
    return toys.Toy(1, length=case.length), sampler, torch.tensor([case.canvas()] * 40)


def rolled(toy: Any, sampler: Sampler, canvas_BL: Tensor, **options: Any) -> Trajectory:
    prompt_BQ = PROMPT.expand(len(canvas_BL), -1)
    rows_B = torch.arange(len(canvas_BL))
    return denoise(toy, sampler, prompt_BQ, torch.ones_like(prompt_BQ).bool(), canvas_BL, rows_B, seed=3, **options)


@pytest.mark.parametrize("name", RULES + CASES)
def test_drafts_are_what_each_step_drew(toys: ModuleType, retractions: ModuleType, name: str) -> None:
    """The rollout is the same with and without; every draft is drawn on the canvas that was seen, kept tokens in it."""
    toy, sampler, canvas_BL = sampled(toys, retractions, name)
    seen = [canvas_BL]
    found = rolled(toy, sampler, canvas_BL, drafts=True, on_step=lambda tokens_BL: seen.append(tokens_BL.clone()))
    found.validate()
    plain = rolled(toy, sampler, canvas_BL)
    for field in ("tokens_BL", "born_BL", "rank_BL", "logprob_BL", "steps_B"):
        assert torch.equal(getattr(found, field), getattr(plain, field)), field
    assert plain.draft_BSL is None
    if sampler.exact_choice:
        assert torch.equal(found.choice_logprob_BS, plain.choice_logprob_BS)
    assert found.draft_BSL.dtype == torch.int32
    for step, before_BL in enumerate(seen[:-1]):
        live_B = step < found.steps_B
        prompt_BQ = PROMPT.expand(len(before_BL), -1)
        logits_BLV = toy.logits(torch.cat([prompt_BQ, before_BL], 1))[:, 2:, : toys.V]
        q_BLV = (logits_BLV / sampler.temperature).log_softmax(-1).detach()
        token_BL, open_BL = found.draft_BSL[:, step].long(), (before_BL == toys.MASK) & live_B[:, None]
        assert torch.equal(token_BL != toys.MASK, open_BL)
        expected_BL = q_BLV.gather(2, token_BL.clamp(max=toys.V - 1)[..., None])[..., 0]
        found_BL = found.draft_logprob_BSL[:, step].double()
        torch.testing.assert_close(found_BL[open_BL], expected_BL[open_BL], rtol=0, atol=1e-6)
        window_BL = found.draft_window_BSL[:, step]
        assert not bool((window_BL & ~open_BL).any())
        assert bool(window_BL[(found.born_BL == step) & (found.source_BL == SAMPLED)].all())
    again = Trajectory.cat([found.select(torch.arange(7)), found.select(torch.arange(7, 40))])
    assert all(torch.equal(getattr(again, f), getattr(found, f)) for f in ("draft_BSL", "draft_logprob_BSL"))


@pytest.mark.parametrize("name", ["sampled_1_stop", "rcr_blocks"])
def test_static_shapes_and_other_batches_draw_the_same(toys: ModuleType, retractions: ModuleType, name: str) -> None:
    toy, sampler, canvas_BL = sampled(toys, retractions, name)
    whole, static = (rolled(toy, sampler, canvas_BL, drafts=True, static=s) for s in (False, True))
    steps = whole.draft_BSL.shape[1]
    part = rolled(toy, sampler, canvas_BL[:9], drafts=True)
    for field in ("draft_BSL", "draft_logprob_BSL", "draft_window_BSL"):
        one = getattr(whole, field)
        assert torch.equal(one, getattr(static, field)[:, :steps])
        assert torch.equal(one[:9, : getattr(part, field).shape[1]], getattr(part, field))


def test_the_first_draft_has_the_frequencies_of_the_model(toys: ModuleType) -> None:
    """5,000 rows: every token at every position within 4 standard errors of its probability."""
    rule, rows = toys.RULES["confidence_1"], 5000
    sampler = build_sampler(toys.section(rule), temperature=rule.temperature)
    found = rolled(toys.Toy(1), sampler, torch.full((rows, toys.L), toys.MASK), drafts=True)
    logits_LV = toys.Toy(1).logits(torch.cat([PROMPT, torch.full((toys.L,), toys.MASK)])[None])[0, 2:, : toys.V]
    q_LV = (logits_LV / rule.temperature).softmax(-1).detach()
    share_LV = torch.stack([(found.draft_BSL[:, 0] == v).double().mean(0) for v in range(toys.V)], dim=1)
    assert bool(((share_LV - q_LV).abs() <= 4 * (q_LV * (1 - q_LV) / rows).sqrt()).all())


def augmented(toys: ModuleType, toy: Any, rule: Any) -> tuple[Trajectory, Tensor]:
    """Return every rollout together with its drafts, and the probability of each, for one position a step."""
    done: list[tuple[list[int], list[list[int]], list[list[float]], list[int], float]] = []

    def grow(canvas: list[int], draws: list, logs: list, born: list[int], chance: float) -> None:
        free = [i for i in range(toys.L) if canvas[i] == toys.MASK]
        if not free:
            done.append((canvas, draws, logs, born, chance))
            return
        logits_LV = toy.logits(torch.cat([PROMPT, torch.tensor(canvas)])[None])[0, 2:, : toys.V].detach()
        q, p = ((logits_LV / t).softmax(-1).tolist() for t in (rule.temperature, rule.score_temperature))
        for draw in itertools.product(range(toys.V), repeat=len(free)):
            tokens = dict(zip(free, draw, strict=True))
            best = max(free, key=lambda i: (p[i][tokens[i]], -i))
            grow(
                [tokens[i] if i == best else v for i, v in enumerate(canvas)],
                [*draws, [tokens.get(i, toys.MASK) for i in range(toys.L)]],
                [*logs, [math.log(q[i][tokens[i]]) if i in tokens else 0.0 for i in range(toys.L)]],
                [len(draws) if i == best else b for i, b in enumerate(born)],
                chance * math.prod(q[i][v] for i, v in tokens.items()),
            )

    grow([toys.MASK] * toys.L, [], [], [-1] * toys.L, 1.0)
    tokens, draws, logs, born, chance = zip(*done, strict=True)
    born_BL, draft_BSL = torch.tensor(born, dtype=torch.int16), torch.tensor(draws, dtype=torch.int32)
    logprob_BSL = torch.tensor(logs, dtype=torch.float64)
    trajectory = Trajectory(
        prompt_BQ=PROMPT.expand(len(done), -1),
        prompt_mask_BQ=torch.ones(len(done), 2, dtype=torch.bool),
        tokens_BL=torch.tensor(tokens),
        source_BL=torch.full(born_BL.shape, SAMPLED, dtype=torch.int8),
        born_BL=born_BL,
        rank_BL=torch.zeros_like(born_BL),
        logprob_BL=logprob_BSL.gather(1, born_BL.long()[:, None])[:, 0],
        steps_B=torch.full((len(done),), toys.L),
        rollout_id_B=torch.arange(len(done)),
        temperature=rule.temperature,
        mask_token_id=toys.MASK,
        eos_token_ids=(toys.EOS,),
        banned_token_ids=(toys.MASK,),
        choice_logprob_BS=torch.zeros(len(done), toys.L, dtype=torch.float64),
        draft_BSL=draft_BSL,
        draft_logprob_BSL=logprob_BSL,
        draft_window_BSL=draft_BSL != toys.MASK,
    )
    trajectory.validate()
    return trajectory, torch.tensor(chance, dtype=torch.float64)


PLAIN = {"unit": "token", "surrogate": "importance", "weight": "uniform", "chunk": 64}


def test_all_draws_give_the_policy_gradient(toys: ModuleType) -> None:
    """Enumerated: sum_b P_b R_b grad log P_b over 729 rollouts with drafts is the gradient of the expected reward."""
    toy, rule = toys.Toy(1), toys.RULES["sampled_1"]
    trajectory, chance_B = augmented(toys, toy, rule)
    assert len(trajectory) == 729 and chance_B.sum().item() == pytest.approx(1, abs=1e-12)
    base = torch.tensor([4**i for i in range(toys.L)])
    reward = torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    paths = toys.enumerate_paths(toy, rule, PROMPT)
    sum(path.probability * reward[(torch.tensor(path.canvas) * base).sum()] for path in paths).backward()
    exact = toy.gradient()
    sampler = build_sampler(toys.section(rule), temperature=rule.temperature)
    chosen = build_objective({"estimator": "drafts", **PLAIN})
    credit = Credit((chance_B * reward[(trajectory.tokens_BL * base).sum(1)]).float())
    plan = chosen.plan(toy, None, trajectory, credit, rng=None, sampler=sampler)
    assert plan.views.trajectory.draft_BSL is None  # nothing of the drafts is kept but what is scored
    chosen.backward(toy, plan)
    found = -toy.gradient() * plan.mass
    assert ((found - exact).norm() / exact.norm()).item() <= 1e-6


BLOCKS = {"schedule": {"name": "blocks", "size": 2, "per_step": 1}, "eos": {"rule": "stop"}}


def block_world(toys: ModuleType) -> tuple[Trajectory, Sampler, Tensor, list[list[float]], Tensor]:
    """Return rollouts of 12 rows on canvases of two blocks that end early, with random rewards of their drafts."""
    sampler = build_sampler(BLOCKS, temperature=0.9)
    trajectory = rolled(toys.Toy(4, length=4), sampler, torch.full((12, 4), toys.MASK), drafts=True)
    steps = trajectory.steps_B.tolist()
    assert len(set(steps)) >= 2
    rng = numpy.random.default_rng(0)
    rewards = [rng.integers(0, 3, size=count).astype(float).tolist() for count in steps]
    group_B = torch.arange(12) // 4
    return trajectory, sampler, step_difference(table(rewards).float(), group_B), rewards, group_B


def test_one_update_is_that_of_the_published_formula(toys: ModuleType) -> None:
    """Loss and gradient at the log-probs against NumPy loops written from trajectory_rl.md sections 3.2 to 3.4."""
    trajectory, sampler, advantage_BS, rewards, group_B = block_world(toys)
    row = load_methods()["mdpo"]["objective"]
    beta, k, clip = row["beta"], 2, row["surrogate"]["low"]
    chosen = build_objective({**row, "estimator": {**row["estimator"], "k": k}})
    credit = Credit(advantage_BS, "step")
    policy, reference = toys.Toy(4, length=4), toys.Toy(2, length=4)
    plan = chosen.plan(policy, reference, trajectory, credit, rng=None, sampler=sampler)
    noise_A = torch.randn(len(plan.old_A), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    now_A = plan.old_A.double() + 0.3 * noise_A
    views = plan.views
    place = list(zip(views.row_K.tolist(), views.step_N[views.view_K].tolist(), views.position_K.tolist(), strict=True))
    new = dict(zip(place, now_A.tolist(), strict=True))

    loss, slope, clipped, total_steps = 0.0, {}, 0, 0
    advantages = by_hand(rewards, group_B.tolist(), 1e-4)
    for b in range(12):
        born, steps = trajectory.born_BL[b].tolist(), len(rewards[b])
        ranked = sorted(range(steps), key=lambda s: (-abs(advantages[b][s]), s))[:k]
        total_steps += len(ranked)
        for s in ranked:
            canvas = [trajectory.tokens_BL[b, i].item() if 0 <= born[i] < s else toys.MASK for i in range(4)]
            masked = [i for i in range(4) if canvas[i] == toys.MASK]
            window = [i for i in masked if i // 2 == masked[0] // 2]
            logits = [
                toy.logits(torch.cat([PROMPT, torch.tensor(canvas)])[None])[0, 2:, : toys.V].detach().numpy() / 0.9
                for toy in (policy, reference)
            ]
            old, ref = (x - numpy.log(numpy.exp(x).sum(1, keepdims=True)) for x in logits)
            for i in window:
                v, a, share = (
                    trajectory.draft_BSL[b, s, i].item(),
                    advantages[b][s],
                    1 / (len(window) * len(ranked) * 12),
                )
                ratio, weight = math.exp(new[b, s, i] - old[i, v]), 4 / len(masked)
                bounded, gap = min(max(ratio, 1 - clip), 1 + clip), new[b, s, i] - ref[i, v]
                confidence = math.exp(old[i, v])
                loss += share * confidence * (-min(ratio * a, bounded * a) * weight + beta * gap**2 / 2)
                free = ratio * a <= bounded * a
                clipped += not free
                slope[b, s, i] = share * confidence * (-a * ratio * weight * free + beta * gap)
    assert set(slope) == set(place) and clipped and len(views) == total_steps < 12 * 4
    assert chosen.loss(plan, now_A).value.item() == pytest.approx(float(loss), rel=1e-5)
    found_A = chosen.loss.coefficients(plan, now_A)
    expected_A = torch.tensor([slope[p] for p in place], dtype=torch.float64)
    torch.testing.assert_close(found_A.double(), expected_A, rtol=1e-5, atol=1e-8)
    assert chosen.backward(policy, plan)["ratio_max_deviation"] <= 1e-6  # on policy


def test_which_steps_are_kept(toys: ModuleType) -> None:
    trajectory, _, advantage_BS, _, _ = block_world(toys)
    size_BS, steps_B = advantage_BS.abs().nan_to_num(-1.0), trajectory.steps_B.tolist()
    views = drafts(trajectory, rng=None, credit=Credit(advantage_BS, "step"), steps="top_k", k=2)
    for b in range(12):
        kept = views.step_N[views.row_N == b].tolist()
        left = [s for s in range(steps_B[b]) if s not in kept]
        assert len(kept) == min(2, steps_B[b]) == views.views_B[b]
        assert not left or min(size_BS[b, kept]) >= max(size_BS[b, left])
    few = drafts(trajectory, rng=torch.Generator().manual_seed(0), steps="uniform_k", k=1)
    assert few.row_N.tolist() == list(range(12)) and few.views_B.tolist() == steps_B
    torch.testing.assert_close(few.inclusion_N, 1 / torch.tensor(steps_B))
    with pytest.raises(RecipeError, match="'top_k' ranks the advantages of steps"):
        drafts(trajectory, rng=None, credit=Credit(advantage_BS[:, 0]), steps="top_k", k=2)
    with pytest.raises(RecipeError, match="needs rollouts that recorded them"):
        drafts(trajectory.without_drafts(), rng=None)


def test_draws_outside_the_window_are_left_out(toys: ModuleType) -> None:
    trajectory, *_ = block_world(toys)
    window, canvas = drafts(trajectory, rng=None), drafts(trajectory, rng=None, within="canvas")
    first = window.position_K[window.step_N[window.view_K] == 0]
    assert first.tolist() == [0, 1] * 12
    assert canvas.position_K[canvas.step_N[canvas.view_K] == 0].tolist() == [0, 1, 2, 3] * 12
    # L over the masks of the whole canvas in both.
    for views in (window, canvas):
        assert views.factor_K[views.step_N[views.view_K] == 1].unique().tolist() == pytest.approx([4 / 3])


class Counting:
    """A scorer that remembers what it was asked; the reward of a completion is the mean of its ids."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, tuple[int, ...]]]] = []

    def __call__(self, rows: list, prompts: list, completions: list, ids: list) -> RewardTable:
        self.asked.append([(row["prompt"], tuple(i)) for row, i in zip(rows, ids, strict=True)])
        value_B = torch.tensor([value(i) for i in ids])
        return RewardTable(("mean",), value_B[:, None], torch.ones(1), value_B, ["ok"] * len(ids))


def value(ids: Any) -> float:
    return sum(ids) / (261 * max(len(ids), 1))


REMASKED = {"remasking": {"name": "doubt", "level": 0.9}}


@pytest.mark.parametrize("parts", [{}, REMASKED], ids=["kept", "taken back"])
def test_rewards_of_drafts(parts: dict[str, Any]) -> None:
    """Every step's, whatever was taken back since, against loops; equal drafts of a problem are asked for once."""
    denoiser = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64)
    scorer, section = Counting(), {"schedule": {"name": "blocks", "size": 4, "per_step": 2}, **parts}
    worker = RolloutWorker(
        denoiser=denoiser,
        tokenizer=byte_tokenizer(),
        sampler=build_sampler(section, temperature=0.05),  # cold, so that drafts repeat
        scorer=scorer,
        group=3,
        canvas=8,
        prompt_limit=16,
        seed=0,
        micro_batch=2,
        drafts=True,
    )
    batch = worker.collect([{"prompt": "ab"}, {"prompt": "cd"}], step=0)
    batch, credit = credited(worker, batch, step_difference)
    trajectory = batch.trajectory
    assert credit.by == "step" and batch.step_reward_BS is not None
    if parts:
        assert len(trajectory.retracted.row_R) > 0
    told = set()
    for b in range(6):
        steps = int(trajectory.steps_B[b])
        assert batch.step_reward_BS[b, steps:].isnan().all()
        for s in range(steps):
            canvas = trajectory.canvas_before(torch.tensor([b]), torch.tensor([s]))[0].tolist()
            ids = [d if v == trajectory.mask_token_id else v
                   for v, d in zip(canvas, trajectory.draft_BSL[b, s].tolist(), strict=True)]  # fmt: skip
            ends = [i for i, v in enumerate(ids) if v in trajectory.eos_token_ids]
            ids = ids[: ends[0] + 1] if ends else ids
            told.add((batch.rows[b]["prompt"], tuple(ids)))
            assert batch.step_reward_BS[b, s].item() == pytest.approx(value(ids), abs=1e-6)
        assert batch.step_reward_BS[b, steps - 1] == batch.rewards.total_B[b]
    finals, again = scorer.asked
    assert len(set(again)) == len(again) and set(again) == told - set(finals)
    assert batch.metrics["rollout/drafts_scored"] == pytest.approx(len(again) / int(trajectory.steps_B.sum()))
    assert len(again) < int(trajectory.steps_B.sum())
    expected_BS = step_difference(batch.step_reward_BS, batch.group_B)
    torch.testing.assert_close(credit.value, expected_BS, equal_nan=True)


def test_a_reward_that_does_not_apply_to_drafts_stays_so() -> None:
    """A rollout of which nothing has a reward has no mass; step rewards may be missing one by one."""
    reward_BS = torch.tensor([[NAN, NAN], [0.0, 1.0], [1.0, NAN]])
    credit = Credit(step_difference(reward_BS, torch.zeros(3)), "step")
    assert credit.applies_B.tolist() == [False, True, True]
    assert credit.value.isnan().tolist() == [[True, True], [False, False], [False, True]]


def test_masks_never_end_up_in_the_text(toys: ModuleType) -> None:
    """Undecided positions behind an EOS are drafted like all others, and cut off."""
    trajectory, *_ = block_world(toys)
    assert bool((trajectory.source_BL == PAD).any())
    batch = RolloutBatch(
        trajectory,
        [{"prompt": "x"}] * 12,
        [""] * 12,
        [[]] * 12,
        torch.zeros(12, dtype=torch.long),
        RewardTable(("r",), torch.zeros(12, 1), torch.ones(1), torch.zeros(12), ["ok"] * 12),
    )
    asked: list[list[int]] = []

    class Worker:
        @staticmethod
        def texts(ids: list[list[int]]) -> list[str]:
            asked.extend(ids)
            return [""] * len(ids)

        @staticmethod
        def scorer(rows: list, prompts: list, texts: list, ids: list) -> RewardTable:
            total_B = torch.ones(len(ids))
            return RewardTable(("r",), total_B[:, None], torch.ones(1), total_B, ["ok"] * len(ids))

    credited(Worker(), batch, step_difference)  # type: ignore[arg-type]
    assert asked and not any(toys.MASK in ids for ids in asked)
    assert all(toys.EOS not in ids[:-1] for ids in asked)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (
            ["objective.advantage=group_mean"],
            "'top_k' ranks the advantages of steps, 'group_mean' is that of a rollout",
        ),
        (
            ["objective.estimator=fully_masked", "objective.old=recompute"],
            "'step_difference' tells steps apart, 'fully_masked' scores none",
        ),
        (["objective.estimator=trace"], "elbo: weighs by the masks of a draft's canvas, and 'trace' scores no drafts"),
        (["objective.estimator={name: drafts, steps: top_k, k: 0}"], "k: 0 must be at least 1; top_k needs"),
        (["objective.unit=rollout"], "steps 'top_k' scores a part of it"),
        (["rollout.group=1"], "1 rollout has no group to compare with"),
        (["rollout.sampler.length={name: insertion, start: 4}"], "drafts need a canvas of one length"),
        (["objective.over=unit", "objective.bound=elbo"], "divergence_weight: weighs tokens"),
    ],
)
def test_what_cannot_go_together_is_refused(overrides: list[str], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        load_recipe("mdpo_tiny_arithmetic", overrides)
