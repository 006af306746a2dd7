"""What stands on a canvas before the first step: templates, infilling, drafts; through worker, sampler and recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import new_denoiser
from unmask.recipes.loading import parse_recipe
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rewards.scoring import RewardTable
from unmask.rl.estimators import trace
from unmask.rollouts.canvases import Frame
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import GIVEN, SAMPLED
from unmask.rollouts.worker import RolloutWorker

MASK, EOS, L = 257, 256, 16


def frame(length: int = L, uniform: float = 0.0, ending: tuple[int, ...] = (300, 301)) -> Frame:
    return Frame(length, 999, ending, lambda text: list(text.encode()), torch.full((length,), uniform))


def start(choice: object, row: dict[str, Any] | None = None, **options: Any) -> list[object]:
    """Return the canvas of a part: letters as text, `.` where it is open, `$` the end and `_` what pads behind it."""
    found = SLOTS["canvas"].build(choice)(row or {}, frame(**options))
    names = {999: ".", 300: "$", 301: "_"}
    return ["".join(names.get(token) or chr(token) for token in found.tokens), found.draft]


def test_templates() -> None:
    """Fields of the sizes that they say, text between them, and the rest ended or left open."""
    assert start({"name": "template", "text": "a=<mask:3>;"}) == ["a=...;$_________", None]
    assert start({"name": "template", "text": "<mask:2>x<mask:1>", "rest": "open"}) == ["..x.............", None]
    assert start({"name": "template", "text": "<mask:2>0123456789abcd"}) == ["..0123456789abcd", None]
    assert start({"name": "template", "column": "form"}, {"form": "q<mask:14>!"}) == ["q..............!", None]


def test_infilling() -> None:
    row = {"prefix": "ab", "suffix": "yz", "head": "c"}
    assert start("infill", row) == ["ab............yz", None]
    assert start({"name": "infill", "gap": 3}, row) == ["ab...yz$________", None]
    assert start({"name": "infill", "suffix": None}, row) == ["ab..............", None]
    assert start({"name": "infill", "prefix": "head", "suffix": None, "gap": 2}, row) == ["c..$____________", None]


def test_drafts() -> None:
    """Tokens whose uniform lies below the share are shown, at their own places; what exceeds the canvas is cut."""
    row = {"draft": "abc"}
    shown = [True] * 3 + [False] * 13
    assert start({"name": "draft", "share": 1.0}, row) == ["abc" + "." * 13, shown]
    assert start({"name": "draft", "share": 0.5}, row, uniform=0.6) == ["." * 16, [False] * 16]
    assert start({"name": "draft", "share": 1.0}, {"draft": "a" * 40}) == ["a" * 16, [True] * 16]
    assert start("blank") == ["." * 16, None]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "template"}, r"needs exactly one of text and column"),
        ({"name": "template", "text": "x", "column": "y"}, r"needs exactly one of text and column"),
        ({"name": "template", "text": "abc"}, r"no field; write <mask:16>"),
        ({"name": "template", "text": "<mask:20>"}, r"template needs 20 positions, rollout.canvas has 16"),
        ({"name": "template", "column": "form"}, r"no column 'form' \(it has prompt, prefix\)"),
        ({"name": "infill", "prefix": None, "suffix": None}, r"needs a prefix or a suffix"),
        ({"name": "infill", "suffix": None, "gap": -1}, r"gap of at least 0, not -1"),
        ({"name": "infill", "suffix": None, "gap": 12}, r"infill needs 17 positions"),
        ({"name": "draft", "column": "prefix", "share": 1.5}, r"draft.share 1.5 must lie in \[0, 1\]"),
    ],
)
def test_starts_that_do_not_fit_are_refused(choice: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        start(choice, {"prompt": "?", "prefix": "12345"})


def test_a_family_without_eos_cannot_end_a_canvas() -> None:
    with pytest.raises(RecipeError, match="no EOS to end the canvas with"):
        start({"name": "template", "text": "<mask:2>"}, ending=())
    assert start({"name": "template", "text": "<mask:16>"}, ending=()) == ["." * 16, None]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    made = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64, seed=1)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(20)
    return made


def worker(denoiser: Denoiser, choice: object, **section: object) -> RolloutWorker:
    sampler = {"schedule": {"name": "uniform", "steps": 4}, "eos": {"rule": "none"}, **section}

    def scorer(rows: list, prompts: list, completions: list, ids: list) -> RewardTable:
        ones_B = torch.ones(len(rows))
        return RewardTable(["one"], ones_B[:, None], torch.ones(1), ones_B, ["ok"] * len(rows))

    return RolloutWorker(
        denoiser=denoiser,
        tokenizer=denoiser.tokenizer,
        sampler=build_sampler(sampler, temperature=1.0),
        scorer=scorer,
        group=2,
        canvas=L,
        prompt_limit=64,
        seed=3,
        start=SLOTS["canvas"].build(choice),
    )


ROWS = [{"prompt": "1+1=", "draft": "two, or so", "prefix": "it is "}, {"prompt": "2+2=", "draft": "4", "prefix": ""}]


def test_given_text_stays_and_is_no_action(denoiser: Denoiser) -> None:
    made = worker(denoiser, {"name": "infill", "prefix": "prefix", "suffix": None, "gap": 4})
    t = made.rollout(ROWS, step=0)
    t.validate()
    texts = [bytes(ids).decode() if max(ids) < 256 else None for ids in t.tokens_BL[:2, :6].tolist()]
    assert texts == ["it is ", "it is "]
    assert (t.source_BL == SAMPLED).sum(1).tolist() == [4, 4, 4, 4]
    assert t.tokens_BL[0, 10:].tolist() == [EOS] * 6
    views = trace(t, rng=None, tokens="all")
    assert len(views.position_K) == 16
    assert views.state().open_A.tolist() == [4] * len(views)
    completions = made.decode(t)[1]
    assert completions[0].startswith("it is ")


def test_drafts_differ_by_rollout_and_not_by_batch(denoiser: Denoiser) -> None:
    made = worker(denoiser, {"name": "draft", "share": 0.5}, remasking={"name": "sceptical", "level": 0.05})
    whole = made.canvases([ROWS[0]] * 6, torch.arange(6), step=0)
    parts = [made.canvases([ROWS[0]] * 3, ids, step=0) for ids in (torch.arange(3), torch.arange(3, 6))]
    for table, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(table, torch.cat(pieces))
    assert len(whole[0].unique(dim=0)) > 3
    assert not torch.equal(whole[0], made.canvases([ROWS[0]] * 6, torch.arange(6), step=1)[0])
    assert torch.equal(whole[1], whole[0] != MASK)


def test_a_draft_is_taken_back_where_the_model_doubts_it(denoiser: Denoiser) -> None:
    """Sceptical remasking decides at the first step: the tokens whose probability is below the level go."""
    draft = {"name": "draft", "share": 1.0}
    first = worker(denoiser, draft).rollout(ROWS, step=0)
    first_BL = first.canvas_before(torch.arange(4), torch.zeros(4, dtype=torch.long))
    given_BL = first_BL != MASK
    with torch.no_grad():
        mask_BT = torch.cat([first.prompt_mask_BQ, torch.ones_like(given_BL)], dim=1)
        logits = denoiser.logits(torch.cat([first.prompt_BQ, first_BL], dim=1), padding_mask_BT=mask_BT)[:, -L:]
    logits[..., MASK] = -torch.inf
    p_BL = logits.softmax(dim=2).gather(2, first_BL[..., None])[..., 0]
    level = p_BL[given_BL].median().item() * 1.001
    t = worker(denoiser, draft, remasking={"name": "sceptical", "level": level}).rollout(ROWS, step=0)
    t.validate()
    past = t.retracted
    assert (past.born_R == -1).all() and (past.rank_R == -1).all()
    gone_BL = torch.zeros_like(given_BL)
    gone_BL[past.row_R[past.died_R == 0], past.position_R[past.died_R == 0]] = True
    assert torch.equal(gone_BL, given_BL & (p_BL < level))
    assert 0 < int(gone_BL.sum()) < int(given_BL.sum())
    # What stayed is given, what replaced the rest is the policy's.
    assert ((t.source_BL == GIVEN) <= given_BL).all()
    assert (t.source_BL[gone_BL] == SAMPLED).all()
    assert trace(t, rng=None, tokens="all").state().open_A.unique().tolist() == [L - 10, L - 1]


def test_groups_stay_together_where_their_rollouts_depend_on_each_other(denoiser: Denoiser) -> None:
    """Micro-batches of 3 rows, groups of 2: whole groups share a batch, and rollouts do not depend on the split."""
    split, whole = (worker(denoiser, "blank", transforms=[{"name": "odd", "strength": 4.0}]) for _ in range(2))
    split.micro_batch = 3
    same(split.rollout(ROWS, step=0).tokens_BL, whole.rollout(ROWS, step=0).tokens_BL)
    split.micro_batch = 1
    same(split.rollout(ROWS, step=0).tokens_BL, whole.rollout(ROWS, step=0).tokens_BL)


def same(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one, other)


RECIPE = """
name: filled
model: {path: "unmask:tiny"}
task: {name: arithmetic}
rewards: [{name: arithmetic}]
rollout: {prompts: 2, group: 2, canvas: 32, start: {name: template, text: "=<mask:4>"}, sampler: llada_random}
method: cj_grpo
optim: {lr: 1.0e-4, steps: 1}
"""


def test_a_recipe_names_its_start() -> None:
    assert parse_recipe(RECIPE).rollout.start == {
        "name": "template",
        "text": "=<mask:4>",
        "column": None,
        "rest": "end",
    }
    assert parse_recipe(RECIPE, ["rollout.start=blank"]).rollout.start == {"name": "blank"}
    with pytest.raises(RecipeError, match=r"rollout.start: .*'templat'.* Did you mean 'template'"):
        parse_recipe(RECIPE, ["rollout.start=templat"])
