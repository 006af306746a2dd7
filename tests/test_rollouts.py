"""Trajectories as data, by hand; and the worker: prompts, ids, decoding, the same rollouts however work is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import new_denoiser
from unmask.policies.tokenizers import byte_tokenizer, prompt_ids
from unmask.recipes.registry import RecipeError
from unmask.rewards.scoring import RewardTable
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import GIVEN, PAD, SAMPLED, Trajectory
from unmask.rollouts.worker import RolloutWorker, pad_left

MASK, EOS = 257, 256


def trajectory(choices: Tensor | None = None) -> Trajectory:
    """Two rows of 5: `a b EOS c .`, with b given, c decided behind the EOS; and `d e f g h` decided from the right."""
    born_BL = torch.tensor([[1, -1, 0, 2, -1], [4, 3, 2, 1, 0]], dtype=torch.int16)
    tokens_BL = torch.tensor([[97, 98, EOS, 99, MASK], [100, 101, 102, 103, 104]])
    source_BL = torch.tensor([[SAMPLED, GIVEN, SAMPLED, SAMPLED, PAD], [SAMPLED] * 5], dtype=torch.int8)
    return Trajectory(
        prompt_BQ=torch.tensor([[EOS, 1, 2], [3, 4, 5]]),
        prompt_mask_BQ=torch.tensor([[False, True, True], [True, True, True]]),
        tokens_BL=tokens_BL,
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=torch.where(born_BL >= 0, 0, -1).to(torch.int16),
        logprob_BL=torch.where(source_BL == SAMPLED, -0.5, 0.0),
        steps_B=torch.tensor([3, 5]),
        rollout_id_B=torch.tensor([10, 11]),
        temperature=0.8,
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        banned_token_ids=(MASK,),
        choice_logprob_BS=choices,
    )


def test_canvases_before_each_step() -> None:
    t = trajectory()
    t.validate()
    row_N, step_N = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 3, 0, 3])
    m = MASK
    assert t.canvas_before(row_N, step_N).tolist() == [
        [m, 98, m, m, m],
        [m, 98, EOS, m, m],
        [97, 98, EOS, m, m],
        [97, 98, EOS, 99, m],
        [m, m, m, m, m],
        [m, m, 102, 103, 104],
    ]


def test_length_and_actions() -> None:
    t = trajectory()
    assert t.length_B.tolist() == [3, 5]
    assert t.action_BL().tolist() == [[True, False, True, False, False], [True] * 5]
    assert t.action_BL("all").tolist() == [[True, False, True, True, False], [True] * 5]
    with pytest.raises(ValueError, match=r"'upto' is not one of until_eos, all"):
        t.action_BL("upto")


def test_several_eos_ids_and_none() -> None:
    t = trajectory()
    both = Trajectory(**{**t.__dict__, "eos_token_ids": (EOS, 101)})
    assert both.length_B.tolist() == [3, 2]
    assert Trajectory(**{**t.__dict__, "eos_token_ids": ()}).length_B.tolist() == [5, 5]


def test_an_eos_behind_undecided_tokens_ends_nothing_before_it() -> None:
    """An open position is no end: the length reaches to the EOS."""
    t = trajectory()
    assert t.select(torch.tensor([0])).length_B.tolist() == [3]
    tokens_BL = torch.tensor([[MASK, MASK, MASK, EOS, MASK], [1, 1, 1, 1, 1]])
    assert Trajectory(**{**t.__dict__, "tokens_BL": tokens_BL}).length_B.tolist() == [4, 5]


def test_select_and_cat() -> None:
    t = trajectory(torch.tensor([[-0.1, -0.2, 0.0, 0.0, 0.0], [-1.0, -2.0, -3.0, -4.0, 0.0]]))
    first, second = t.select(torch.tensor([0])), t.select(torch.tensor([False, True]))
    assert (len(first), len(second), first.canvas) == (1, 1, 5)
    again = Trajectory.cat([first, second])
    swapped = Trajectory.cat([second, first]).select(torch.tensor([1, 0]))
    for name, value in t.__dict__.items():
        for other in (again, swapped):
            same = torch.equal(getattr(other, name), value) if isinstance(value, Tensor) else None
            assert same is not False and (same or getattr(other, name) == value), name


def test_cat_pads_prompts_left_and_step_tables_right() -> None:
    t = trajectory(torch.full((2, 5), -1.0))
    short = Trajectory(
        **{
            **t.__dict__,
            "prompt_BQ": torch.tensor([[7], [8]]),
            "prompt_mask_BQ": torch.ones(2, 1, dtype=torch.bool),
            "choice_logprob_BS": torch.full((2, 2), -2.0),
        }
    )
    joined = Trajectory.cat([short, t])
    assert joined.prompt_mask_BQ[:2].tolist() == [[False, False, True]] * 2
    assert joined.prompt_BQ[:2, 2].tolist() == [7, 8]
    assert joined.choice_logprob_BS.tolist() == [[-2, -2, 0, 0, 0]] * 2 + [[-1] * 5] * 2


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("born_BL", (0, 0), -1),
        ("born_BL", (0, 3), 3),
        ("logprob_BL", (0, 1), -0.1),
        ("logprob_BL", (1, 1), 0.1),
        ("tokens_BL", (1, 1), MASK),
        ("source_BL", (0, 1), PAD),
    ],
)
def test_validate_sees_contradictions(name: str, place: tuple[int, int], value: float) -> None:
    t = trajectory()
    broken = getattr(t, name).clone()
    broken[place] = value
    with pytest.raises(AssertionError):
        Trajectory(**{**t.__dict__, name: broken}).validate()


def test_prompts_are_padded_left() -> None:
    ids_BQ, mask_BQ = pad_left([[1, 2, 3], [4]], 9)
    assert ids_BQ.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask_BQ.tolist() == [[True] * 3, [False, False, True]]


# --- The worker ------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": text, "answer": text[0]} for text in ("1+1=", "23+4=", "9=", "100-7=", "5*5=")]


@pytest.fixture(scope="module")
def model() -> Denoiser:
    denoiser = new_denoiser(hidden_size=32, layers=1, heads=2, mlp=64, seed=2)
    with torch.no_grad():
        denoiser.model.lm_head.weight.mul_(15)
    return denoiser


class Scorer:
    """Scores a completion with its length, and remembers what it was given."""

    def __call__(self, rows: list[dict], prompts: list, completions: list[str], ids: list[list[int]]) -> RewardTable:
        self.rows, self.prompts, self.completions, self.ids = rows, prompts, completions, ids
        value_B = torch.tensor([float(len(tokens)) for tokens in ids])
        return RewardTable(("length",), value_B[:, None], torch.ones(1), value_B, ["ok"] * len(rows))


def worker_of(model: Denoiser, **changes: Any) -> RolloutWorker:
    sampler = build_sampler({"schedule": {"name": "blocks", "size": 4, "per_step": 2}}, temperature=1.0)
    settings = {"group": 2, "canvas": 8, "prompt_limit": 20, "seed": 5, "micro_batch": 64, **changes}
    return RolloutWorker(model, model.tokenizer, changes.pop("sampler", sampler), Scorer(), **settings)


def same_rollouts(one: Trajectory, other: Trajectory) -> None:
    for name in ("tokens_BL", "source_BL", "born_BL", "rank_BL", "steps_B", "rollout_id_B"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.logprob_BL, other.logprob_BL, rtol=0, atol=2e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 10])
def test_micro_batches_give_the_same_rollouts(model: Denoiser, micro_batch: int) -> None:
    whole = worker_of(model).collect(ROWS, step=3)
    parts = worker_of(model, micro_batch=micro_batch).collect(ROWS, step=3)
    same_rollouts(whole.trajectory, parts.trajectory)
    assert whole.completions == parts.completions
    for name in ("prompt_BQ", "prompt_mask_BQ"):
        padding = ~whole.trajectory.prompt_mask_BQ
        one, other = (getattr(b.trajectory, name).masked_fill(padding, 0) for b in (whole, parts))
        assert torch.equal(one, other), name


def test_ranks_that_share_a_batch_give_the_same_rollouts(model: Denoiser) -> None:
    worker = worker_of(model)
    whole = worker.collect(ROWS, step=3, first_id=20)
    first, second = worker.collect(ROWS[:2], step=3, first_id=20), worker.collect(ROWS[2:], step=3, first_id=22)
    same_rollouts(whole.trajectory, Trajectory.cat([first.trajectory, second.trajectory]))
    assert whole.trajectory.rollout_id_B.tolist() == list(range(40, 50))
    assert whole.group_B.tolist() == [20, 20, 21, 21, 22, 22, 23, 23, 24, 24]
    assert torch.cat([first.group_B, second.group_B]).tolist() == whole.group_B.tolist()


def test_noise_is_keyed_by_step_and_member_of_the_group(model: Denoiser) -> None:
    worker = worker_of(model)
    tokens_BL = worker.collect(ROWS[:1], step=3).trajectory.tokens_BL
    assert not torch.equal(tokens_BL[0], tokens_BL[1])
    assert not torch.equal(tokens_BL, worker.collect(ROWS[:1], step=4).trajectory.tokens_BL)


def test_a_batch_holds_what_was_asked_and_scored(model: Denoiser) -> None:
    worker = worker_of(model)
    batch = worker.collect(ROWS, step=0)
    scorer = worker.scorer
    assert [row["answer"] for row in batch.rows] == [row["answer"] for row in ROWS for _ in range(2)]
    assert scorer.rows == batch.rows
    assert scorer.prompts == [row["prompt"] for row in batch.rows]
    assert scorer.completions == batch.completions
    assert scorer.ids == batch.completion_ids
    t = batch.trajectory
    for b, row in enumerate(batch.rows):
        ids = t.prompt_BQ[b][t.prompt_mask_BQ[b]].tolist()
        assert ids == [259, *row["prompt"].encode(), 260], "user, text, assistant"
    assert len(batch) == 10
    advantage_B = torch.arange(10.0)
    assert batch.with_advantage(advantage_B).advantage_B is advantage_B
    assert batch.advantage_B is None


class OftenEnds:
    """A denoiser that likes EOS, so that rollouts end at different steps."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.family = inner, inner.family

    def logits(self, *arguments: Any, **options: Any) -> Tensor:
        return self.inner.logits(*arguments, **options) + 4.0 * torch.nn.functional.one_hot(torch.tensor(EOS), 261)


def test_metrics_are_means_over_the_batch(model: Denoiser) -> None:
    worker = worker_of(model)
    worker.denoiser = OftenEnds(model)
    batch = worker.collect(ROWS, step=0)
    t = batch.trajectory
    assert len(set(t.steps_B.tolist())) > 1
    assert (t.source_BL == PAD).any()
    assert batch.metrics["rollout/nfe"] == pytest.approx(sum(t.steps_B.tolist()) / 10)
    assert batch.metrics["rollout/length"] == pytest.approx(sum(map(len, batch.completion_ids)) / 10)
    assert batch.metrics["rollout/ended"] == sum(EOS in row for row in t.tokens_BL.tolist()) / 10
    sampled = t.logprob_BL[t.source_BL == SAMPLED]
    assert batch.metrics["rollout/logprob"] == pytest.approx(sampled.mean().item(), rel=1e-5)


def test_decoding_ends_with_the_first_eos_and_drops_undecided_tokens(model: Denoiser) -> None:
    t = trajectory()
    ids, texts = worker_of(model).decode(t)
    assert ids == [[97, 98, EOS], [100, 101, 102, 103, 104]]
    assert texts == ["ab", "defgh"]
    tokens_BL = torch.tensor([[97, MASK, 98, MASK, EOS], [EOS, 97, 97, 97, 97]])
    ids, texts = worker_of(model).decode(Trajectory(**{**t.__dict__, "tokens_BL": tokens_BL}))
    assert ids == [[97, 98, EOS], [EOS]]
    assert texts == ["ab", ""]


def test_conversations(model: Denoiser) -> None:
    """A list of messages goes through the template; a string is one user turn."""
    worker = worker_of(model)
    text, messages = "2+2=", [{"role": "user", "content": "2+2="}]
    same_rollouts(
        worker.collect([{"prompt": text}], step=0).trajectory, worker.collect([{"prompt": messages}], step=0).trajectory
    )
    assert worker.scorer.prompts == [messages, messages]
    talk = [{"role": "system", "content": "s"}, *messages, {"role": "assistant", "content": "5"}, messages[0]]
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(prompt_ids(tokenizer, talk)) == (
        "<|system|>s<|user|>2+2=<|assistant|>5<|eos|><|user|>2+2=<|assistant|>"
    )


def test_prompts_that_are_too_long_are_refused_before_sampling(model: Denoiser) -> None:
    worker = worker_of(model, prompt_limit=6)
    with pytest.raises(RecipeError, match=r"task row 1: its prompt has 7 tokens, rollout.prompt_limit is 6; raise"):
        worker.collect(ROWS, step=0)
    assert not hasattr(worker.scorer, "rows")
    assert len(worker_of(model, prompt_limit=7).rollout(ROWS[:2], step=0)) == 4


def test_rows_without_a_prompt_are_refused(model: Denoiser) -> None:
    with pytest.raises(RecipeError, match=r"task row 1: there is no column 'prompt' \(it has question, answer\)"):
        worker_of(model).collect([ROWS[0], {"question": "1+1=", "answer": "2"}], step=0)


def test_no_rows_are_refused(model: Denoiser) -> None:
    with pytest.raises(RecipeError, match="no task rows to roll out; the dataset is empty"):
        worker_of(model).collect([], step=0)


def test_a_tokenizer_without_a_pad_token_will_do(model: Denoiser) -> None:
    worker = worker_of(model)
    padded = worker.collect(ROWS, step=0)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    worker.tokenizer = tokenizer
    same_rollouts(worker.collect(ROWS, step=0).trajectory, padded.trajectory)
