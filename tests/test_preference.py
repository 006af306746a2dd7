"""VRPO's loss and gradient against NumPy, masks shared by policy and reference, and pairs from a run's rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from unmask.policies.layout import Family
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.registry import RecipeError
from unmask.rl.likelihoods import random_mask
from unmask.rl.preference import Preference, paired, pairs_of_run, read_pairs
from unmask.rollouts.trajectory import PAD, SAMPLED, Trajectory

L, V, MASK, EOS = 5, 3, 3, 2
TOKENS = [[0, 1, 1, 2, 3], [1, 2, 3, 3, 3], [1, 0, 1, 0, 2], [0, 0, 2, 3, 3], [1, 1, 2, 3, 3], [0, 1, 0, 1, 1]]
LENGTH = [4, 2, 5, 3, 3, 5]
PROMPT = [0, 0, 3, 3, 4, 4]


@pytest.fixture
def trajectory() -> Trajectory:
    tokens_BL = torch.tensor(TOKENS)
    source_BL = torch.where(tokens_BL == MASK, PAD, SAMPLED).to(torch.int8)
    born_BL = torch.where(source_BL == SAMPLED, 0, -1).to(torch.int16)
    return Trajectory(
        prompt_BQ=torch.tensor(PROMPT)[:, None],
        prompt_mask_BQ=torch.ones(6, 1, dtype=torch.bool),
        tokens_BL=tokens_BL,
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=born_BL,
        logprob_BL=torch.zeros(6, L),
        steps_B=torch.ones(6, dtype=torch.long),
        rollout_id_B=torch.arange(6),
        temperature=1.0,
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
        banned_token_ids=(MASK,),
    )


def tables(toy: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in toy.model.named_parameters()}


def numpy_vrpo(
    now: dict[str, np.ndarray], reference: dict[str, np.ndarray], hidden: list[tuple[int, list[int]]], draws: int,
    *, beta: float, per_token: bool, sft: float,
) -> tuple[float, dict[str, np.ndarray]]:  # fmt: skip
    """Return (loss, gradient at the tables): DPO on ELBOs, each a mean over canvases of L/k sum of k log-probs."""

    def logp(table: dict[str, np.ndarray], b: int, places: list[int]) -> tuple[int, np.ndarray]:
        shown = [MASK if i in places else token for i, token in enumerate(TOKENS[b])]
        state = sum(token * (V + 1) ** i for i, token in enumerate(shown))
        logits = (table["canvas"][state] + table["prompt"][PROMPT[b] % 5])[:, :V]
        return state, logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def elbo(table: dict[str, np.ndarray], b: int) -> float:
        found = 0.0
        for row, places in hidden:
            if row == b:
                _, logp_LV = logp(table, b, places)
                found += LENGTH[b] / len(places) * sum(logp_LV[i, TOKENS[b][i]] for i in places) / draws
        return found

    bound, held = ([elbo(table, b) for b in range(6)] for table in (now, reference))
    scale = [1 / LENGTH[b] if per_token else 1.0 for b in range(6)]
    loss, at_bound = 0.0, np.zeros(6)
    for w in (0, 2, 4):
        margin = scale[w] * (bound[w] - held[w]) - scale[w + 1] * (bound[w + 1] - held[w + 1])
        loss += (np.log1p(np.exp(-beta * margin)) - sft * bound[w] / LENGTH[w]) / 3
        slope = -beta / (1 + np.exp(beta * margin)) / 3
        at_bound[w] = slope * scale[w] - sft / LENGTH[w] / 3
        at_bound[w + 1] = -slope * scale[w + 1]
    gradient = {name: np.zeros_like(table) for name, table in now.items()}
    for b, places in hidden:
        state, logp_LV = logp(now, b, places)
        for i in places:
            push = at_bound[b] * LENGTH[b] / len(places) / draws * (np.eye(V)[TOKENS[b][i]] - np.exp(logp_LV[i]))
            gradient["canvas"][state, i, :V] += push
            gradient["prompt"][PROMPT[b] % 5, :V] += push
    return loss, gradient


@pytest.mark.parametrize(
    "knobs",
    [{}, {"per_token": True}, {"sft": 0.05}, {"beta": 2.0, "sft": 0.5, "per_token": True, "draws": 3}],
    ids=["raw", "per token", "sft", "all"],
)
def test_the_update_is_the_formula(toys: ModuleType, trajectory: Trajectory, knobs: dict[str, Any]) -> None:
    policy, reference = toys.Toy(1, length=L), toys.Toy(2, length=L)
    settings = {"beta": 0.2, "draws": 4, "per_token": False, "sft": 0.0, **knobs}
    views = random_mask(trajectory, rng=torch.Generator().manual_seed(7), draws=settings["draws"])
    hidden = [(b, [i for i in range(LENGTH[b]) if views.hidden_NL[n, i]]) for n, b in enumerate(views.row_N.tolist())]
    assert len(hidden) == 6 * settings["draws"]
    loss, gradient = numpy_vrpo(
        tables(policy), tables(reference), hidden, settings["draws"],
        beta=settings["beta"], per_token=settings["per_token"], sft=settings["sft"],
    )  # fmt: skip
    preference = Preference(**settings, chunk=5)
    statistics = preference.backward(policy, reference, trajectory, rng=torch.Generator().manual_seed(7))
    assert statistics["loss"] == pytest.approx(loss, abs=1e-6)
    for name, parameter in policy.model.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), gradient[name], atol=1e-6)
    assert np.abs(gradient["canvas"]).max() > 1e-2
    assert all(parameter.grad is None for parameter in reference.model.parameters())


def test_masks_are_shared_so_an_unmoved_policy_has_no_margin(toys: ModuleType, trajectory: Trajectory) -> None:
    """With masks of their own the two estimates would differ by nats; shared ones cancel to the bit."""
    policy = toys.Toy(1, length=L)
    rng = torch.Generator().manual_seed(0)
    found = Preference(draws=1).backward(policy, toys.Toy(1, length=L), trajectory, rng=rng)
    assert found["preference/margin"] == 0.0 and found["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_estimate_is_the_elbo_of_pairs(toys: ModuleType, trajectory: Trajectory) -> None:
    """Over 400 generators the mean margin lies within 4 standard errors of the exact one, over all masks."""
    from itertools import combinations

    from unmask.rl.replay import replay_all

    policy, reference, exact = toys.Toy(1, length=L), toys.Toy(2, length=L), np.zeros(6)
    for sign, toy in ((1, policy), (-1, reference)):
        table = tables(toy)
        for b in range(6):
            for k in range(1, LENGTH[b] + 1):
                masks = list(combinations(range(LENGTH[b]), k))
                for places in masks:
                    shown = [MASK if i in places else token for i, token in enumerate(TOKENS[b])]
                    state = sum(token * (V + 1) ** i for i, token in enumerate(shown))
                    logits = (table["canvas"][state] + table["prompt"][PROMPT[b] % 5])[:, :V]
                    logp_LV = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                    part = sum(logp_LV[i, TOKENS[b][i]] for i in places)
                    exact[b] += sign * part / (k * len(masks))
    preference, margins = Preference(draws=2), []
    for seed in range(400):
        views = random_mask(trajectory, rng=torch.Generator().manual_seed(seed), draws=2)
        now_K, held_K = (replay_all(toy, views, 64).logprob_A for toy in (policy, reference))
        margins.append(preference.loss(views, now_K, held_K, 3.0)[1].numpy())
    error = np.std(margins, axis=0) / np.sqrt(len(margins))
    assert (np.abs(np.mean(margins, axis=0) - (exact[0::2] - exact[1::2])) < 4 * error).all()


def test_pairs_become_rollouts_of_their_own_ids() -> None:
    family = Family("llada", 261, 257, (256,))
    pairs = [{"prompt": "ab", "chosen": "xyz", "rejected": "q"}, {"prompt": "longer", "chosen": "", "rejected": "zz"}]
    made = paired(pairs, byte_tokenizer(), family, canvas=5, first_id=3)
    made.validate()
    assert made.tokens_BL.tolist() == [
        [120, 121, 122, 256, 257],
        [113, 256, 257, 257, 257],
        [256, 257, 257, 257, 257],
        [122, 122, 256, 257, 257],
    ]
    assert made.rollout_id_B.tolist() == [6, 7, 8, 9] and made.action_BL().sum(1).tolist() == [4, 2, 1, 3]
    assert torch.equal(made.prompt_BQ[0], made.prompt_BQ[1])
    # Bytes that are no text, as a rollout drew them: the text would be other tokens.
    drawn = {**pairs[0], "chosen": "\ufffd\ufffd", "chosen_ids": [200, 201, 257, 257], "rejected_ids": [9, 256, 7, 257]}
    assert paired([drawn], byte_tokenizer(), family, canvas=3).tokens_BL.tolist() == [[200, 201, 257], [9, 256, 257]]
    with pytest.raises(RecipeError, match="a chosen completion has 4 tokens, the canvas 3"):
        paired(pairs, byte_tokenizer(), family, canvas=3)


def test_pairs_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n')
    assert read_pairs(path) == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    for text, match in (
        ('{"prompt": "a", "chosen": "b"}', "line 1: there is no 'rejected'"),
        ("{", "line 1: .*each line is an object"),
        ("[1]", "there is no 'prompt'"),
        ("", "holds no pairs"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=match):
            read_pairs(path)


def test_pairs_of_a_run(tmp_path: Path) -> None:
    """Two groups of step 0 and one of step 4: the best against the worst, where they differ by more than the margin."""
    rows = [
        (0, 0, "p", "a", 0.2), (0, 0, "p", "b", 1.0), (0, 0, "p", "c", 0.0), (0, 0, "p", "d", None),
        (0, 1, "q", "e", 0.5), (0, 1, "q", "f", 0.5),
        (4, 0, '[{"role": "user", "content": "r"}]', "g", 0.0), (4, 0, '[{"role": "user", "content": "r"}]', "h", 0.3),
    ]  # fmt: skip
    names = ("step", "group", "prompt", "completion", "reward", "tokens")
    rows = [(*row, [ord(row[3]), 256, 257]) for row in rows]
    (tmp_path / "rollouts").mkdir()
    for step in (0, 4):
        table = pyarrow.Table.from_pylist([dict(zip(names, r, strict=True)) for r in rows if r[0] == step])
        pyarrow.parquet.write_table(table, tmp_path / "rollouts" / f"step-{step:06}.parquet")
    drawn = {letter: [ord(letter), 256, 257] for letter in "bcgh"}
    one = {"prompt": "p", "chosen": "b", "rejected": "c", "chosen_ids": drawn["b"], "rejected_ids": drawn["c"]}
    two = {"prompt": [{"role": "user", "content": "r"}], "chosen": "h", "rejected": "g"}
    two |= {"chosen_ids": drawn["h"], "rejected_ids": drawn["g"]}
    one, two = {**one, "margin": 1.0}, {**two, "margin": 0.3}
    assert pairs_of_run(tmp_path) == [one, two]
    assert pairs_of_run(tmp_path, margin=0.5) == [one]
    assert json.dumps(pairs_of_run(tmp_path, most=2)) == json.dumps([one, two])
    with pytest.raises(RecipeError, match="stored no rollouts with rewards"):
        pairs_of_run(tmp_path / "rollouts")


def test_impossible_settings_are_refused() -> None:
    for knobs, match in (({"beta": 0.0}, "beta 0.0 must be positive"), ({"draws": 0}, "draws 0")):
        with pytest.raises(RecipeError, match=match):
            Preference(**knobs)
