"""Trajectories with tokens that come and go: what was recorded against a denoiser that keeps every canvas it saw."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from unmask.policies.layout import Family
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rewards.scoring import RewardTable
from unmask.rl.records import write_rollouts
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.schedules import Quota
from unmask.rollouts.state import State
from unmask.rollouts.trajectory import EDITED, GIVEN, SAMPLED, Trajectory
from unmask.rollouts.worker import RolloutBatch

V, L, Q, ROWS = 12, 10, 3, 12
MASK, EOS = V - 1, V - 2


@dataclass
class Recorder:
    """A denoiser with random logits of each canvas, which keeps what it is shown by rollout (the prompt's number)."""

    family: Family = field(default_factory=lambda: Family("random", V, MASK, (EOS,)))
    seen: dict[int, list[list[int]]] = field(default_factory=dict)
    eos: float = 0.0

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        tables = []
        for ids in input_ids_BT.tolist():
            self.seen.setdefault(ids[0], []).append(ids[Q:])
            rng = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
            tables.append(2 * torch.randn(L, V, generator=rng, dtype=torch.float64))
        logits_BLV = torch.stack(tables)
        logits_BLV[..., EOS] += self.eos
        return logits_BLV[positions_BT[:, -L:]]


def whims(state: State, chosen_AL: Tensor, score_AL: Tensor) -> Tensor:
    """Take back a random third of everything, given tokens included: the engine must keep those."""
    return state.uniform("whims") < 0.35


def everything(state: State, chosen_AL: Tensor, score_AL: Tensor) -> Tensor:
    return torch.ones_like(chosen_AL)


def edits(state: State) -> Tensor:
    return state.uniform("edits") < 0.3


def always(state: State) -> Tensor:
    return torch.ones_like(state.masked_AL)


def sampler_of(rule: str = "none", *, temperature: float = 1.0, **parts: object) -> Sampler:
    section = {"schedule": {"name": "uniform", "steps": 4}, "eos": {"rule": rule}, "max_steps": 9}
    made = build_sampler({**section, **parts.pop("section", {})}, temperature=temperature)
    return replace(made, **parts)


def start() -> tuple[Tensor, Tensor]:
    """Return canvases and their draft tokens: row 0 has given tokens, row 1 a draft, row 2 both."""
    canvas_BL = torch.full((ROWS, L), MASK)
    canvas_BL[0, 2:5], canvas_BL[1, 4:8], canvas_BL[2, 0], canvas_BL[2, 9] = 3, 4, 5, 6
    draft_BL = torch.zeros_like(canvas_BL, dtype=torch.bool)
    draft_BL[1, 4:8] = draft_BL[2, 9] = True
    return canvas_BL, draft_BL


def run(recorder: Recorder, sampler: Sampler, **options: object) -> Trajectory:
    prompt_BQ = torch.arange(ROWS)[:, None].expand(-1, Q)
    mask_BQ, (canvas_BL, draft_BL) = torch.ones_like(prompt_BQ, dtype=torch.bool), start()
    ids_B = torch.arange(ROWS) + 5
    return denoise(recorder, sampler, prompt_BQ, mask_BQ, canvas_BL, ids_B, seed=1, draft_BL=draft_BL, **options)


PARTS = {
    "whims": {"remasking": whims},
    "edits": {"editing": edits},
    "both": {"remasking": whims, "editing": edits},
    "doubt and edits": {"section": {"remasking": {"name": "doubt", "level": 0.9}}, "editing": edits},
    "post-steps": {"section": {"editing": {"name": "token_to_token", "level": 0.3, "post_steps": 3}}},
    "rcr": {"section": {"remasking": "running_confidence", "selection": "all"}},
    "remdm": {"section": {"remasking": {"name": "remdm", "rule": "rescale", "eta": 0.9}, "selection": "all"}},
    "remdm_confidence": {"section": {"remasking": "remdm_confidence", "selection": "all"}},
    "drawn, drawn order": {
        "section": {"remasking": {"name": "backtrack", "share": 1.0}, "selection": "plackett_luce"},
    },
    "drawn": {"section": {"remasking": {"name": "doubt", "level": 0.9}, "score": "sampled_confidence"}},
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rule", ["stop", "none"])
@pytest.mark.parametrize("name", list(PARTS))
def test_every_canvas_and_every_action_is_there(name: str, rule: str, static: bool) -> None:
    """`canvas_before` is what was seen; the actions of a step are what it added to the canvas, edits left aside."""
    recorder = Recorder(eos=1.0 if rule == "stop" else 0.0)
    t = run(recorder, sampler_of(rule, **PARTS[name]), static=static)
    t.validate()
    assert len(t.retracted.row_R) > 5
    actions = t.actions("all")
    for b in range(ROWS):
        row, steps = torch.tensor([b]), int(t.steps_B[b])
        seen = recorder.seen[b][:steps]
        rebuilt = [t.canvas_before(row, torch.tensor([step]))[0].tolist() for step in range(steps + 1)]
        assert rebuilt[:-1] == seen
        assert rebuilt[-1] == t.tokens_BL[b].tolist()
        mine = actions.row_K == b
        drawn = {
            (int(step), int(i)): int(token)
            for step, i, token in zip(
                actions.step_K[mine], actions.position_K[mine], actions.token_K[mine], strict=True
            )
        }
        for step in range(steps):
            added = {
                i: new
                for i, (old, new) in enumerate(zip(rebuilt[step], rebuilt[step + 1], strict=True))
                if old == MASK != new
            }
            assert added == {i: token for (s, i), token in drawn.items() if s == step}
            token_L, rank_L = (x[0] for x in t.drawn_at(row, torch.tensor([step])))
            assert {i: token for i, token in enumerate(token_L.tolist()) if token != MASK} == added
            assert len(set(rank_L[rank_L >= 0].tolist())) == len(added)
    check_given(t)


def check_given(t: Trajectory) -> None:
    """Given tokens stand at the end as at the start; a draft's may be gone, and none is an action."""
    canvas_BL, draft_BL = start()
    fixed_BL = (canvas_BL != MASK) & ~draft_BL
    assert torch.equal(t.tokens_BL[fixed_BL], canvas_BL[fixed_BL])
    assert (t.source_BL[fixed_BL] == GIVEN).all()
    past = t.retracted
    given_R = past.born_R < 0
    assert draft_BL[past.row_R[given_R], past.position_R[given_R]].all()
    assert torch.equal(past.token_R[given_R], canvas_BL[past.row_R[given_R], past.position_R[given_R]])
    assert (past.rank_R[given_R] < 0).all() and (past.logprob_R[given_R] == 0).all()


@pytest.mark.parametrize("name", list(PARTS))
def test_select_and_cat_keep_every_canvas(name: str) -> None:
    t = run(Recorder(), sampler_of(**PARTS[name]))
    order = torch.tensor([7, 2, 2, 11, 0])
    kept_B = torch.zeros(ROWS, dtype=torch.bool)
    kept_B[[1, 3, 10]] = True
    for chosen, index in ((order, order), (kept_B, kept_B.nonzero()[:, 0])):
        part = t.select(chosen)
        part.validate()
        for step in range(int(t.steps_B.max()) + 1):
            rows, step_N = torch.arange(len(part)), torch.full((len(part),), step)
            assert torch.equal(part.canvas_before(rows, step_N), t.canvas_before(index, step_N))
        for b, source in enumerate(index.tolist()):
            mine, theirs = (
                x.actions("all") for x in (part.select(torch.tensor([b])), t.select(torch.tensor([source])))
            )
            assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    halves = [t.select(torch.arange(5)), t.select(torch.arange(5, ROWS))]
    joined = Trajectory.cat(halves)
    assert all(torch.equal(one, other) for one, other in zip(joined.retracted, t.retracted, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(joined.actions(), t.actions(), strict=True))


def test_batches_without_a_step_join_others() -> None:
    """Nothing to decide: no step, no list of what was taken back, and yet a part of the same kind."""
    sampler, ids_B = sampler_of(remasking=whims), torch.arange(2)
    prompt_BQ = torch.zeros(2, Q, dtype=torch.long)
    full_BL = torch.zeros(2, L, dtype=torch.long)
    mask_BQ = torch.ones_like(prompt_BQ, dtype=torch.bool)
    idle = denoise(Recorder(), sampler, prompt_BQ, mask_BQ, full_BL, ids_B, seed=0)
    assert idle.steps_B.tolist() == [0, 0] and len(idle.retracted.row_R) == 0
    joined = Trajectory.cat([idle, run(Recorder(), sampler)])
    joined.validate()
    assert joined.retracted.row_R.min() >= 2
    growing = sampler_of(length=SLOTS["length"].build({"name": "insertion", "start": L}))
    still = denoise(Recorder(), growing, prompt_BQ, mask_BQ, full_BL, ids_B, seed=0)
    assert still.length_BS.tolist() == [[L], [L]]


def test_actions_until_eos_leave_out_what_lies_behind_it() -> None:
    t = run(Recorder(eos=1.5), sampler_of(remasking=whims))
    whole, short = t.actions("all"), t.actions()
    inside_K = whole.position_K < t.length_B[whole.row_K]
    assert not inside_K.all()
    for one, other in zip(whole, short, strict=True):
        assert torch.equal(one[inside_K], other)


# --- Ends ------------------------------------------------------------------------------------------------------------


def flat(kind: str) -> Tensor:
    logits_LV = torch.zeros(L, V, dtype=torch.float64)
    if kind == "mask":
        logits_LV[:, MASK] = 1e4
    elif kind == "EOS":
        logits_LV[:, EOS] = 60.0
    elif kind == "sure":
        logits_LV[:, 2] = 60.0
    return logits_LV


@dataclass
class Fixed:
    """A denoiser with the same logits everywhere; more calls than a run may take are an error."""

    logits_LV: Tensor
    most: int
    family: Family = field(default_factory=lambda: Family("fixed", V, MASK, (EOS,)))
    calls: int = 0

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        self.calls += 1
        assert self.calls <= self.most, "the loop does not end"
        return self.logits_LV.expand(len(input_ids_BT), -1, -1)[positions_BT[:, -L:]]


REMASKINGS = [
    *(
        {"name": name}
        for name in ("running_confidence", "backtrack", "doubt", "sceptical", "remdm", "remdm_confidence")
    ),
    {"name": "running_confidence", "reopen": True},
    {"name": "backtrack", "share": 1.0, "by": "token"},
    {"name": "doubt", "level": 1.0},
    {"name": "doubt", "level": 1.0, "by": "token"},
    {"name": "sceptical", "level": 1.0},
    {"name": "remdm", "rule": "rescale", "eta": 1.0},
]


def test_every_remasking_is_here() -> None:
    """`verify` needs attention masks (tests/test_shadow.py), `planned` a planner (tests/test_planner_remasking.py)."""
    assert {choice["name"] for choice in REMASKINGS} | {"verify", "planned"} == set(SLOTS["remasking"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["mask", "EOS", "sure", "ties"])
@pytest.mark.parametrize("selection", ["top", "all", {"name": "threshold", "level": 0.5}])
@pytest.mark.parametrize("remasking", REMASKINGS, ids=str)
def test_no_remasking_hangs_the_loop(remasking: dict, selection: object, kind: str, temperature: float) -> None:
    """Nothing but masks, EOS, one sure token, or ties: each ends by the cap at the latest, with every mask decided."""
    section = {
        "remasking": remasking,
        "selection": selection,
        "max_steps": 7,
        "schedule": {"name": "blocks", "size": 5, "per_step": 2},
    }
    for rule in ("stop", "none"):
        t = run(Fixed(flat(kind), 7), sampler_of(rule, temperature=temperature, section=section))
        t.validate()
        assert rule == "stop" or not (t.tokens_BL == MASK).any()


@pytest.mark.parametrize(
    "parts", [{"remasking": everything}, {"editing": always}, {"remasking": everything, "editing": always}]
)
def test_a_users_parts_cannot_hang_the_loop_either(parts: dict) -> None:
    for cap in (1, 2, 9):
        t = run(
            Fixed(torch.randn(L, V, generator=torch.Generator().manual_seed(0)).double(), cap),
            sampler_of(**parts, max_steps=cap),
        )
        t.validate()
        assert not (t.tokens_BL == MASK).any()
        check_given(t)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "backtrack", "share": 0.0}, r"remasking.share: 0.0 must lie in \(0, 1\]"),
        ({"name": "doubt", "level": 1.5}, r"remasking.level: 1.5 must lie in \(0, 1\]"),
        ({"name": "sceptical", "level": 0.0}, r"remasking.level: 0.0 must lie"),
        ({"name": "remdm", "eta": -0.1}, r"remasking.eta: -0.1 must lie in \[0, 1\]"),
    ],
)
def test_remaskings_refuse(choice: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(Recorder(), sampler_of(section={"remasking": choice}))
    for wrong, text in (({"level": 0.0}, r"editing.level: 0.0"), ({"post_steps": -1}, r"editing.post_steps: -1")):
        with pytest.raises(RecipeError, match=text):
            run(Recorder(), sampler_of(section={"editing": {"name": "token_to_token", **wrong}}))


def test_what_a_log_probability_is_worth() -> None:
    """Rules that discard draws leave no closed form over drawn tokens; chances that the policy moves are unscored."""

    def status(**section: object) -> str:
        return sampler_of(section=section).status

    assert status(remasking="running_confidence", selection="all") == "exact"
    assert status(remasking="doubt", score="sampled_confidence") == "exact with tail mass"
    assert status(remasking="doubt", selection="plackett_luce") == "exact with order"
    assert status(remasking="running_confidence", selection="all", score="sampled_confidence") == "behaviour only"
    assert status(remasking="remdm", selection="all") == "exact"
    assert status(remasking="remdm_confidence", selection="all") == "behaviour only"
    assert status(editing="token_to_token") == "exact"


def test_rescaled_sigma_takes_back_its_share() -> None:
    """sigma = eta (left / decided): of the tokens decided at step 0, eta x left / decided are gone after step 1."""
    rows, length = 4000, 10

    def widely(masked_BL: Tensor, step_B: Tensor, open_B: Tensor) -> Quota:
        return Quota(masked_BL, torch.where(step_B == 0, 6, 1))

    section = {"remasking": {"name": "remdm", "rule": "rescale", "eta": 0.5}, "selection": "all", "score": "random"}
    sampler = sampler_of(schedule=widely, section=section)
    prompt_BQ = torch.zeros(rows, Q, dtype=torch.long)
    mask_BQ, canvas_BL = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.full((rows, length), MASK)
    fixed = Fixed(flat("ties"), 9)
    t = denoise(fixed, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(rows), seed=0)
    first_R = t.retracted.died_R == 1
    # 6 decided, 4 - 1 left: sigma_max 1/2, sigma 1/4, capped at the 3 that can be decided instead.
    counts_B = torch.bincount(t.retracted.row_R[first_R], minlength=rows)
    chances = [
        torch.distributions.Binomial(6, torch.tensor(0.25)).log_prob(torch.tensor(float(k))).exp() for k in range(7)
    ]
    wanted = [float(c) for c in chances[:3]] + [float(sum(chances[3:]))]
    found = torch.bincount(counts_B, minlength=4) / rows
    for k in range(4):
        assert abs(float(found[k]) - wanted[k]) < 4 * (wanted[k] * (1 - wanted[k]) / rows) ** 0.5
    two = t.canvas_before(torch.arange(rows), torch.full((rows,), 2))
    assert ((two != MASK).sum(1) == 7).all(), "the schedule's count, however many come and go"


# --- Records ---------------------------------------------------------------------------------------------------------


def test_parquet_holds_what_was_taken_back(tmp_path) -> None:
    t = run(Recorder(), sampler_of(remasking=whims, editing=edits))
    rewards = RewardTable(["r"], torch.zeros(ROWS, 1), torch.ones(1), torch.zeros(ROWS), ["ok"] * ROWS)
    rows = [{"prompt": str(b)} for b in range(ROWS)]
    batch = RolloutBatch(t, rows, [""] * ROWS, [[]] * ROWS, torch.arange(ROWS), rewards)
    table = pyarrow.parquet.read_table(write_rollouts(tmp_path, batch, 3, 0)).to_pylist()
    past = t.retracted
    for b, row in enumerate(table):
        mine = past.row_R == b
        wanted = [
            dict(zip(("position", "token", "born", "died", "rank"), map(int, entry), strict=True))
            for entry in zip(*(value[mine] for value in past[1:6]), strict=True)
        ]
        logprobs = [entry.pop("logprob") for entry in row["retracted"]]
        assert row["retracted"] == wanted
        assert logprobs == pytest.approx(past.logprob_R[mine].tolist())
        assert row["source"] == t.source_BL[b].tolist()
    assert EDITED in table[3]["source"] or any(EDITED in row["source"] for row in table)
    assert {SAMPLED, GIVEN} <= set(table[0]["source"])
    # A batch without any has the same columns and types.
    calm = replace(t, retracted=t.retracted.select(torch.zeros(0, dtype=torch.long), ROWS))
    path = write_rollouts(tmp_path, replace(batch, trajectory=calm), 4, 0)
    assert pyarrow.parquet.read_schema(path).equals(
        pyarrow.parquet.read_schema(tmp_path / "rollouts/step-000003.parquet")
    )
