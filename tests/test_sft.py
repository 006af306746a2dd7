"""The supervised stage: corruption and its weights, batches by index, the loss by hand, and training itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from unmask.policies.denoiser import Denoiser
from unmask.policies.layout import Family
from unmask.policies.loading import new_denoiser
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.registry import RecipeError
from unmask.rl import sft
from unmask.rl.sft import STRIDE, Aligned, SftBatches, SftTrainer, Source, corrupt, only_item
from unmask.rollouts.noise import generator

MASK, EOS = 257, 256
FAMILY = Family("llada", 261, MASK, (EOS,))
SIZE = {"hidden_size": 32, "layers": 2, "heads": 2, "mlp": 64}


def corruption(rows: int, length: int, mask: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    canvas_BL = torch.zeros(rows, length, dtype=torch.long)
    return corrupt(canvas_BL, rng=torch.Generator().manual_seed(seed), mask=mask)


# --- Corruption ------------------------------------------------------------------------------------------------------


def test_exact_hides_k_tokens_of_weight_l_over_k() -> None:
    masked_BL, weight_BL = corruption(500, 12, "exact")
    count_B = masked_BL.sum(1)
    assert count_B.min() == 1
    assert count_B.max() == 12
    expected_BL = torch.where(masked_BL, 12 / count_B[:, None], 0.0)
    torch.testing.assert_close(weight_BL, expected_BL)


def test_bernoulli_hides_with_probability_t_of_weight_one_over_t() -> None:
    masked_BL, weight_BL = corruption(2000, 50, "bernoulli")
    assert ((weight_BL > 0) == masked_BL).all()
    some_B = masked_BL.any(1)
    level_B = 1 / weight_BL.amax(1)[some_B]
    assert torch.equal(weight_BL[some_B] > 0, masked_BL[some_B])
    assert (weight_BL[masked_BL] == (1 / level_B)[:, None].expand(-1, 50)[masked_BL[some_B]]).all(), "one t a row"
    # Standardised deviations of the counts have mean 0 and variance 1.
    z_B = (masked_BL[some_B].sum(1) - 50 * level_B) / (50 * level_B * (1 - level_B)).sqrt()
    z_B = z_B[(level_B > 0.1) & (level_B < 0.9)]
    assert abs(z_B.mean().item()) < 5 / math.sqrt(len(z_B))
    assert z_B.var().item() == pytest.approx(1, abs=0.2)


def test_levels_are_stratified_over_the_batch() -> None:
    """With as many rows as tokens every count occurs once; each row's count is uniform by itself."""
    for seed in range(20):
        masked_BL, _ = corruption(9, 9, "exact", seed)
        assert sorted(masked_BL.sum(1).tolist()) == list(range(1, 10))
    counts = [int(corruption(2, 5, "exact", seed)[0][1].sum()) for seed in range(2000)]
    expected = 2000 / 5
    statistic = sum((counts.count(k) - expected) ** 2 / expected for k in range(1, 6))
    assert statistic < 4 + 5 * math.sqrt(8)


def late_chances(length: int, count: int, half_life: float) -> dict[tuple[int, ...], float]:
    """Return the probability of every hidden set: drawn one after another with the odds of the docstring."""
    odds = [2.0 ** ((1 - count / length) * i / (half_life * length)) for i in range(length)]
    chances = dict.fromkeys(itertools.combinations(range(length), count), 0.0)
    for order in itertools.permutations(range(length), count):
        chance, left = 1.0, sum(odds)
        for i in order:
            chance, left = chance * odds[i] / left, left - odds[i]
        chances[tuple(sorted(order))] += chance
    return chances


@pytest.mark.parametrize("half_life", [0.1, 0.5])
def test_late_hides_late_tokens_with_the_odds_it_says(half_life: float) -> None:
    """All 31 hidden sets of 5 tokens against their enumerated probabilities, by a chi-square."""
    length, rows = 5, 50_000
    canvas_BL = torch.zeros(rows, length, dtype=torch.long)
    masked_BL, weight_BL = corrupt(canvas_BL, rng=generator(0, "late", 0), mask="late", half_life=half_life)
    count_B = masked_BL.sum(1)
    assert torch.equal(count_B.bincount(minlength=6)[1:], torch.full((5,), rows // 5)), "counts are stratified"
    torch.testing.assert_close(weight_BL, torch.where(masked_BL, length / count_B[:, None], 0.0))
    code_B = (masked_BL.long() << torch.arange(length)).sum(1)
    found = code_B.bincount(minlength=1 << length)
    statistic, free = 0.0, 0
    for count in range(1, length):
        for chosen, chance in late_chances(length, count, half_life).items():
            expected = chance * rows / 5
            statistic += (found[sum(1 << i for i in chosen)].item() - expected) ** 2 / expected
        free += math.comb(length, count) - 1
    # A chi-square has mean `free` and variance 2 x free.
    assert abs(statistic - free) < 4 * math.sqrt(2 * free)


@pytest.mark.parametrize("mask", ["exact", "bernoulli"])
def test_every_token_weighs_one_on_average(mask: str) -> None:
    weight_BL = corruption(40_000, 6, mask)[1].double()
    error_L = weight_BL.std(0) / math.sqrt(len(weight_BL))
    assert ((weight_BL.mean(0) - 1).abs() < 5 * error_L).all()


@pytest.mark.parametrize("mask", ["exact", "bernoulli"])
def test_both_estimate_the_same_integral(mask: str) -> None:
    """E_t[1/t sum over hidden i of f(hidden set, i)] for a random f, against its sum over all 15 sets.

    int_0^1 t^k (1-t)^(L-k) / t dt = (k-1)! (L-k)! / L!.
    """
    length, rows = 4, 60_000
    table = torch.rand(2**length, length, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    exact = 0.0
    for subset in itertools.product((0, 1), repeat=length):
        k = sum(subset)
        if k:
            index = sum(bit << i for i, bit in enumerate(subset))
            share = math.factorial(k - 1) * math.factorial(length - k) / math.factorial(length)
            exact += share * sum(table[index, i].item() for i in range(length) if subset[i])
    masked_BL, weight_BL = corruption(rows, length, mask)
    index_B = (masked_BL * torch.tensor([1, 2, 4, 8])).sum(1)
    value_B = (weight_BL * table[index_B]).sum(1)
    assert abs(value_B.mean().item() - exact) < 5 * value_B.std().item() / math.sqrt(rows)


# --- Batches ---------------------------------------------------------------------------------------------------------


class Rows:
    """Row i asks for a letter 1 to 5 times, in prompts of 2 to 4 characters."""

    size = None

    def __init__(self, letter: str) -> None:
        self.letter = letter

    def row(self, index: int) -> dict[str, str]:
        count = 1 + index % 5
        return {"prompt": f"{count}{self.letter}{' ' * (index % 3)}", "reference": self.letter * count}


def batches(**changes: Any) -> SftBatches:
    sources = [Source("a", Rows("a"), 3.0, 10), Source("b", Rows("b"), 1.0, 8)]
    settings = {"family": FAMILY, "batch": 4, "steps": 30, "seed": 0, **changes}
    return SftBatches(settings.pop("sources", sources), byte_tokenizer(), **settings)


def clean(item: dict[str, Tensor]) -> Tensor:
    """Return the uncorrupted ids of a batch."""
    ids_BT = item["input_ids"].clone()
    ids_BT[item["scored"]] = item["target"]
    return ids_BT


def test_a_batch_is_prompt_completion_and_eos_padding() -> None:
    """Prompts are left padded, unattended there and never hidden; EOS padding is attended, hidden and predicted."""
    data = batches(full_canvas=0.5)
    hidden_padding = hidden_eos = 0
    for index in range(30):
        item = data[index]
        ids_BT, scored_BT, padding_BT = clean(item), item["scored"], item["padding_mask"]
        assert torch.equal(item["input_ids"] == MASK, scored_BT)
        assert scored_BT.any(1).all()
        letter = "a" if ord("a") in ids_BT[0].tolist() else "b"
        lengths = set()
        assert not padding_BT.all(), "prompts have different lengths"
        for b in range(4):
            row = Rows(letter).row(index * 4 + b)
            prompt = [259, *row["prompt"].encode(), 260]
            ids, real = ids_BT[b].tolist(), padding_BT[b].tolist()
            start = real.index(True)
            assert all(real[start:]), "EOS padding behind the completion is attended"
            assert ids[start : start + len(prompt)] == prompt
            assert not scored_BT[b, : start + len(prompt)].any(), "the prompt is never hidden"
            completion, said = ids[start + len(prompt) :], [*row["reference"].encode(), EOS]
            assert completion == said + [EOS] * (len(completion) - len(said))
            hidden_b = scored_BT[b, start + len(prompt) :].tolist()
            hidden_eos += hidden_b[len(said) - 1]
            hidden_padding += sum(hidden_b[len(said) :])
            lengths.add(len(completion))
        assert len(lengths) == 1
        longest = max(len(Rows(letter).row(index * 4 + b)["reference"]) for b in range(4)) + 1
        assert lengths <= {longest, {"a": 10, "b": 8}[letter]}, "the longest completion or the full canvas"
    assert hidden_eos > 20
    assert hidden_padding > 50


@pytest.mark.parametrize("mask", ["exact", "bernoulli"])
def test_weights_are_those_of_the_bound(mask: str) -> None:
    """(1 / B L) times L / k on each of a row's k hidden tokens: a row's weights sum to 1 / B."""
    item = batches(mask=mask)[2]
    weight_BT = torch.zeros(item["scored"].shape).masked_scatter(item["scored"], item["weight"])
    if mask == "exact":
        torch.testing.assert_close(weight_BT.sum(1), torch.full((4,), 1 / 4))
    for b in range(4):
        assert len(set(weight_BT[b][item["scored"][b]].tolist())) <= 1


@pytest.mark.parametrize("alignment", ["shared_block", "left_pad_to_block"])
def test_late_is_late_in_its_block(alignment: str) -> None:
    """Nearly without chance, a row's hidden tokens are the last ones of the blocks in which it will be decoded."""
    family = replace(FAMILY, attention="block_causal", block_length=4, alignment=alignment)
    data, compared = batches(mask="late", half_life=1e-4, family=family, batch=16), 0
    for index in range(8):
        item = data[index]
        scored_BT, padding_BT = item["scored"], item["padding_mask"]
        width = int(scored_BT.any(0).nonzero()[0])
        for hidden, real in zip(scored_BT.tolist(), padding_BT.tolist(), strict=True):
            first = 0 if alignment == "left_pad_to_block" else real.index(True)
            place = [(column - first) % 4 for column in range(len(real))]
            inside = {p for p, h in zip(place[width:], hidden[width:], strict=True) if h}
            outside = {p for p, h in zip(place[width:], hidden[width:], strict=True) if not h}
            assert not outside or max(outside) <= min(inside)
            compared += bool(outside)
    assert compared > 60


def test_batches_depend_on_their_index_and_seed_alone() -> None:
    state = torch.get_rng_state()
    one, other = batches(), batches()
    forwards = [one[index] for index in range(6)]
    for index in reversed(range(6)):
        again = other[index]
        assert all(torch.equal(again[key], forwards[index][key]) for key in again)
    assert torch.equal(torch.get_rng_state(), state)
    different = batches(seed=1)
    assert any(
        different[i]["input_ids"].shape != forwards[i]["input_ids"].shape
        or not torch.equal(different[i]["input_ids"], forwards[i]["input_ids"])
        for i in range(6)
    )
    assert len(one) == 30


def test_each_batch_has_its_own_corruption() -> None:
    """Hidden sets of equal batches at different indices: no two alike, and an item is not a function of its rows."""
    data = batches()
    rows = [data.sources[0].rows.row(i) for i in range(4)]
    hidden = [data.collate(rows, 10, index)["scored"] for index in range(8)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(hidden, 2))


def test_tasks_join_at_their_share_of_the_steps() -> None:
    late = [Source("a", Rows("a"), 1.0, 10), Source("b", Rows("b"), 50.0, 8, start=0.4)]
    data = batches(sources=late, steps=20)
    letters = ["a" if (clean(data[index]) == ord("a")).any() else "b" for index in range(20)]
    assert letters[:8] == ["a"] * 8
    assert letters[8:].count("b") >= 10


def test_tasks_come_by_weight_and_canvases_by_share() -> None:
    data = batches(steps=300, full_canvas=0.25)
    found = [clean(data[index]) for index in range(300)]
    share = sum((ids == ord("a")).any().item() for ids in found) / 300
    assert share == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 300))
    for weight, width in ((0.0, False), (1.0, True)):
        item = batches(full_canvas=weight)[0]
        letter = "a" if (clean(item) == ord("a")).any() else "b"
        full = {"a": 10, "b": 8}[letter]
        # Prompts of up to 4 characters between 2 role tokens, then 5 tokens (4 letters and EOS) or the canvas.
        assert item["input_ids"].shape[1] == 6 + (full if width else 5)


def test_a_completion_longer_than_its_canvas_is_refused() -> None:
    data = batches(sources=[Source("a", Rows("a"), 1.0, 5)], full_canvas=1.0)
    assert data[0]["input_ids"].shape[1] == 6 + 5
    with pytest.raises(ValueError, match=r"sft: a completion has 6 tokens, the canvas 5; raise tasks\[\].canvas"):
        data[1]


# --- The loss and the trainer ----------------------------------------------------------------------------------------


def trainer(denoiser: Denoiser, folder: Path, data: SftBatches, *, optim: dict[str, Any], **options: Any) -> SftTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(data),
        per_device_train_batch_size=1,
        learning_rate=optim["lr"],
        lr_scheduler_type=options.pop("schedule", "constant"),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return SftTrainer(denoiser, optim=optim, args=arguments, train_dataset=data, **options)


def loss_by_hand(denoiser: Denoiser, item: dict[str, Tensor], length: int) -> float:
    """(1/B) sum_b (1/L) sum over hidden i of (L / k_b) (-log p(x_i)), token by token on the full logits."""
    ids_BT, scored_BT = clean(item), item["scored"]
    with torch.no_grad():
        logits_BTV = denoiser.logits(item["input_ids"], padding_mask_BT=item["padding_mask"]).double()
    total = 0.0
    for b in range(len(ids_BT)):
        k = int(scored_BT[b].sum())
        for i in scored_BT[b].nonzero().squeeze(1).tolist():
            row = logits_BTV[b, i]
            total += (row.exp().sum().log() - row[ids_BT[b, i]]).item() * (length / k) / length
    return total / len(ids_BT)


def test_the_loss_is_the_weighted_cross_entropy(tmp_path: Path) -> None:
    denoiser, data = new_denoiser(**SIZE, seed=3), batches(full_canvas=1.0)
    with torch.no_grad():
        denoiser.model.lm_head.weight.mul_(20)
    found = trainer(denoiser, tmp_path, data, optim={"lr": 1e-3})
    for index in range(4):
        item = data[index]
        length = 10 if (clean(item) == ord("a")).any() else 8
        loss, logits_KV = found.compute_loss(None, item, return_outputs=True)
        assert loss.item() == pytest.approx(loss_by_hand(denoiser, item, length), rel=1e-5)
        assert torch.equal(found.compute_loss(None, item), loss)
        assert len(logits_KV) == len(item["target"])


def mean_loss(denoiser: Denoiser, data: SftBatches, found: SftTrainer) -> float:
    with torch.no_grad():
        return sum(found.compute_loss(None, data[index]).item() for index in range(8)) / 8


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_thirty_steps_lower_the_loss(tmp_path: Path, name: str) -> None:
    """From log 261 = 5.6 nats of a new model to less than half of it, on batches that were not trained on."""
    denoiser, heldout = new_denoiser(**SIZE), batches(seed=99)
    found = trainer(denoiser, tmp_path, batches(), optim={"name": name, "lr": 5e-3})
    before = mean_loss(denoiser, heldout, found)
    assert before == pytest.approx(math.log(261), abs=0.2)
    found.train()
    assert mean_loss(denoiser, heldout, found) < before / 2


class StopAt(TrainerCallback):
    """Saves a checkpoint at a step and stops there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    """12 steps, or 5, a checkpoint and 7 more in a new process' objects: bit-equal weights, optimizer and schedule."""
    optim = {"name": name, "lr": 5e-3}
    runs = []
    for folder, parts in (("whole", [None]), ("parts", [StopAt(5), None])):
        for callback in parts:
            denoiser = new_denoiser(**SIZE)
            found = trainer(
                denoiser,
                tmp_path / folder,
                batches(steps=12),
                optim=optim,
                schedule="linear",
                callbacks=[callback] if callback else [],
            )
            resume = tmp_path / folder / "checkpoint-5"
            found.train(resume_from_checkpoint=str(resume) if resume.exists() else None)
        assert found.state.global_step == 12
        runs.append(denoiser.model.state_dict())
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_are_trained_in_order_each_by_one_rank(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = batches(steps=6), []
    monkeypatch.setattr(SftBatches, "__getitem__", lambda self, index: seen.append(int(index)) or {})
    monkeypatch.setattr(sft, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(sft, "rank", lambda rank=rank: rank)
        list(trainer(new_denoiser(**SIZE), tmp_path, data, optim={"lr": 1e-3}).get_train_dataloader())
    assert seen == [i for rank in range(ranks) for i in range(rank, 6, ranks)]


def test_an_item_is_a_batch() -> None:
    item = batches()[0]
    assert only_item([item]) is item
    with pytest.raises(ValueError, match="too many values"):
        only_item([item, item])


# --- Length-aligned solutions ----------------------------------------------------------------------------------------


class Numbered:
    """Row i has a solution of i % 7 tokens; `size` rows that come again, or rows without end."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def row(self, index: int) -> dict[str, Any]:
        number = index % self.size if self.size else index
        return {"prompt": "?", "reference": "x" * (number % 7), "number": index}


@pytest.mark.parametrize("size", [None, 10])
def test_solutions_that_are_too_long_are_left_out(size: int | None) -> None:
    rows = Aligned(Numbered(size), len, 4)
    assert rows.size == size
    if size is None:
        assert [rows.row(i)["number"] for i in (0, 3, 4)] == [0, 3, 4]
        assert all(len(rows.row(i)["reference"]) <= 4 for i in range(50))
        assert rows.row(6)["number"] % STRIDE == 6 and rows.row(6) == rows.row(6)
    else:
        with pytest.raises(RecipeError, match="1000 solutions had more than 4 tokens"):
            rows.row(5)


def test_solutions_are_rewritten_where_they_are_too_long() -> None:
    def cut(row: dict[str, Any], canvas: int) -> str:
        return "y" * (canvas if row["number"] % 7 == 5 else 9)

    rows = Aligned(Numbered(None), len, 4, cut)
    assert rows.row(3)["reference"] == "xxx" and rows.row(5)["reference"] == "yyyy"
    # Still too long: another row.
    assert rows.row(6)["number"] != 6
