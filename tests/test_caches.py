"""Caches against no cache: the exact one always, the others when everything is computed at every step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cachetoys
import pytest
import torch
from cachetoys import apart, rollouts, same_tokens
from transformers import DynamicCache

from unmask.policies.blocks import additive
from unmask.policies.denoiser import CACHE
from unmask.policies.store import Store
from unmask.recipes.loading import load_samplers
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl.estimators import trace
from unmask.rl.replay import replay_all
from unmask.rollouts import columns
from unmask.rollouts.caches import check_cache
from unmask.rollouts.columns import share_out
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.worker import RolloutWorker

BLOCKS = ("sdar", "sdar_moe", "llada2")
# What makes each approximation compute everything at every step.
EVERY_STEP: dict[str, dict[str, Any]] = {
    name: {"name": name, "refresh": 1} for name in ("prefix", "dual", "dkv_decode", "dkv_greedy", "free_cache")
} | {"window_diffusion": {"name": "window_diffusion", "refresh": 1, "outer": 64}}
EAGER = {"attention": "eager"}
DRAWN = "sampled_confidence"


@pytest.fixture(autouse=True, scope="module")
def no_grad() -> Any:
    with torch.no_grad():
        yield


def test_every_cache_is_covered() -> None:
    assert {"block_causal", *EVERY_STEP} == set(SLOTS["cache"])


SAMPLERS: dict[str, dict[str, Any]] = {
    "blocks": {},
    "smaller blocks": {"schedule": {"name": "blocks", "size": 2, "per_step": 1}},
    "larger blocks": {"schedule": {"name": "blocks", "size": 16, "per_step": 3}},
    "the whole canvas": {"schedule": {"name": "uniform", "steps": 7}},
    "threshold": {"selection": {"name": "threshold", "level": 0.2}},
    "drawn": {"score": DRAWN},
    "taken back": {
        "schedule": {"name": "blocks", "size": 4, "per_step": 1},
        "selection": "all",
        "remasking": {"name": "running_confidence", "reopen": True},
    },
    "taken back anywhere": {
        "schedule": {"name": "uniform", "steps": 12},
        "selection": "all",
        "remasking": {"name": "running_confidence", "reopen": True},
    },
    "guided": {"guidance": 0.5},
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_causal_is_exact(name: str, kind: str, static: bool) -> None:
    """Tokens identical and log-probs to 1e-5, prompts that end inside a block, rows that leave at different steps."""
    denoiser = cachetoys.load(name, ending=True)
    length = denoiser.family.block_length
    assert length is not None and all(n % length for n in cachetoys.LENGTHS)
    options = {"canvas": 16 if length < 8 else 32, "section": SAMPLERS[kind], "static": static}
    plain, cached = (rollouts(denoiser, cache, **options) for cache in (None, "block_causal"))
    cached.validate()
    assert same_tokens(plain, cached) and apart(plain, cached) <= 1e-5
    assert len(set(plain.steps_B.tolist())) > 1, "rows leave at different steps"
    if plain.choice_logprob_BS is not None:
        assert cached.choice_logprob_BS is not None
        assert (plain.choice_logprob_BS - cached.choice_logprob_BS).abs().max() <= 2e-5
    if kind.startswith("taken back"):
        assert plain.retracted is not None and cached.retracted is not None
        past = plain.retracted
        assert len(past.row_R) and all(torch.equal(a, b) for a, b in zip(past[:6], cached.retracted[:6], strict=True))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", load_samplers())
def test_every_named_sampler_decides_the_same_behind_exact_caches(name: str, static: bool) -> None:
    denoiser, section = cachetoys.load("sdar", ending=True), load_samplers()[name]["sampler"]
    caches = (None, "block_causal", EVERY_STEP["dual"])
    canvas = max(32, section["schedule"].get("size", 0)) if isinstance(section["schedule"], dict) else 32
    try:
        plain, cached, fresh = (rollouts(denoiser, c, canvas=canvas, section=section, static=static) for c in caches)
    except RecipeError as error:
        pytest.skip(f"refused: {error}")
    assert same_tokens(plain, cached) and apart(plain, cached) <= 1e-5
    assert same_tokens(plain, fresh) and apart(plain, fresh) == 0.0


@pytest.mark.parametrize("kind", ["blocks", "the whole canvas", "taken back"])
@pytest.mark.parametrize(
    "changes",
    [{"logit_shift": 1}, {"alignment": "left_pad_to_block"}, {"block_length": 1}],
    ids=["shifted across blocks", "prompts padded to blocks", "blocks of one"],
)
def test_block_causal_is_exact_for_other_layouts(changes: dict[str, Any], kind: str) -> None:
    denoiser = cachetoys.load("sdar", ending=True)
    denoiser.family = replace(denoiser.family, name="other", **changes)
    section = {"schedule": {"name": "blocks", "size": 4, "per_step": 2}, **SAMPLERS[kind]}
    options = {"width": 12, "section": section}
    plain, cached = (rollouts(denoiser, cache, **options) for cache in (None, "block_causal"))
    assert same_tokens(plain, cached) and apart(plain, cached) <= 1e-5


@pytest.mark.parametrize("name", ["sdar", "dream"])
def test_eager_attention_hides_the_same(name: str) -> None:
    cache = "block_causal" if name == "sdar" else "dual"
    one, other = (rollouts(cachetoys.load(name, **options), cache) for options in ({}, EAGER))
    assert same_tokens(one, other) and apart(one, other) <= 1e-5


@pytest.mark.parametrize("name", BLOCKS)
def test_the_trainer_recomputes_what_the_cached_rollout_recorded(name: str) -> None:
    denoiser, section = cachetoys.load(name), {"schedule": {"name": "blocks", "size": 4, "per_step": 2}, "score": DRAWN}
    sampler, trajectory = build_sampler(section), rollouts(denoiser, "block_causal", section=section)
    views = trace(trajectory, rng=None, context=sampler, tokens="all")
    found = replay_all(denoiser, views, 5).logprob_A
    assert trajectory.choice_logprob_BS is not None
    recorded = torch.cat([views.behaviour_K, trajectory.choice_logprob_BS[views.row_N, views.step_N]])
    assert len(found) == len(recorded) > 40 and (found - recorded).abs().max() <= 1e-5


@pytest.mark.parametrize("policy", EVERY_STEP)
@pytest.mark.parametrize("name", ["llada", "dream", "llada_moe", "sdar"])
def test_refreshed_at_every_step_an_approximation_is_no_cache(name: str, policy: str) -> None:
    """Bit for bit: a step that computes everything is the forward that no cache takes."""
    denoiser = cachetoys.load(name, ending=True)
    plain, exact = (rollouts(denoiser, cache) for cache in (None, EVERY_STEP[policy]))
    assert same_tokens(plain, exact) and apart(plain, exact) == 0.0
    rarely = {"dkv_decode": {"warmup": 1}, "window_diffusion": {"outer": 8, "inner": 4, "refresh": 4}}
    assert apart(plain, rollouts(denoiser, {"name": policy, **rarely.get(policy, {})})) > 0.01, (
        "and otherwise it is one"
    )


@pytest.mark.parametrize("guidance", [0.0, 0.7])
@pytest.mark.parametrize("name", ["llada", "dream", "rnd1", "llada2"])
def test_columns_computed_one_by_one_make_the_whole(
    name: str, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without the short cut: every column goes through the store and its mask."""
    denoiser = cachetoys.load(name, ending=True)
    options = {"section": {"guidance": guidance}, "canvas": 32}
    plain = rollouts(denoiser, None, **options)
    monkeypatch.setattr(columns, "share_out", lambda counts, whole, **_: [(list(range(len(counts))), max(counts))])
    denoiser.forwards.clear()
    stored = rollouts(denoiser, EVERY_STEP["dual"], **options)
    assert same_tokens(plain, stored) and apart(plain, stored) <= 1e-5
    assert all(columns is not None for forward in denoiser.forwards for _, columns in forward)


@pytest.mark.parametrize("policy", ["prefix", "dual", "dkv_decode", "free_cache"])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_stale_keys_are_those_that_transformers_keeps(name: str, policy: str) -> None:
    """The second step of a rollout, by a DynamicCache that holds the first step's keys of all columns but the new."""
    denoiser = cachetoys.load(name)
    cache = {"name": policy, "warmup": 1} if policy == "dkv_decode" else policy
    trajectory = rollouts(denoiser, cache, lengths=(9,), section={"score": "left_to_right"})
    (_, forward) = denoiser.forwards[:2]
    ((_, computed),) = forward
    assert computed is not None and 0 < len(computed) < 25
    prompt, row = trajectory.prompt_BQ, torch.tensor([0])
    ids = [torch.cat([prompt, trajectory.canvas_before(row, torch.tensor([s]))], dim=1) for s in (0, 1)]
    kept, past = [c for c in range(25) if c not in computed], DynamicCache()
    first: Any = DynamicCache()
    trunk = denoiser.base.base_model
    trunk(input_ids=ids[0], use_cache=True, **{CACHE: first})
    for index, layer in enumerate(first.layers):
        past.update(layer.keys[:, :, kept], layer.values[:, :, kept], index)
    at = torch.tensor([computed])
    mask = additive(torch.ones(1, 1, len(computed), 25, dtype=torch.bool), torch.float32)
    hidden = trunk(input_ids=ids[1][:, computed], position_ids=at, attention_mask=mask, **{CACHE: past})
    shift, born = denoiser.family.logit_shift, trajectory.born_BL[0].tolist()
    for place in [i for i in range(16) if born[i] == 1]:
        logits = denoiser.head(hidden.last_hidden_state[0, computed.index(9 + place - shift)])
        logits[denoiser.family.mask_token_id] = -torch.inf
        wanted = logits.log_softmax(-1)[trajectory.tokens_BL[0, place]]
        assert (trajectory.logprob_BL[0, place] - wanted).abs() <= 1e-5


@pytest.mark.parametrize("policy", ["dual", "dkv_decode", "window_diffusion"])
def test_a_cached_rollout_does_not_depend_on_its_batch(policy: str) -> None:
    """Alone or beside others, compacted or not, rows step through their own blocks."""
    denoiser = cachetoys.load("llada", ending=True)
    cache = {"name": policy, "outer": 6, "inner": 4, "refresh": 4} if policy == "window_diffusion" else policy
    options = {"section": {"selection": {"name": "threshold", "level": 0.3}}, "canvas": 32}
    together = rollouts(denoiser, cache, **options)
    assert len(set(together.steps_B.tolist())) > 1
    for row, length in enumerate(cachetoys.LENGTHS):
        alone = rollouts(denoiser, cache, lengths=(length,), ids=[row], **options)
        assert torch.equal(alone.tokens_BL[0], together.tokens_BL[row])
        assert (alone.logprob_BL[0] - together.logprob_BL[row]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "cache"), [("llada", None), ("llada", "dual"), ("dream", "window_diffusion"), ("sdar", "block_causal")]
)
def test_a_group_shares_its_first_forward(name: str, cache: str | None) -> None:
    denoiser = cachetoys.load(name)
    options = {"lengths": (9, 9, 9, 6, 6), "section": {"eos": {"rule": "none"}}}
    alone = rollouts(denoiser, cache, **options)
    denoiser.forwards.clear()
    shared = rollouts(denoiser, cache, group_B=torch.tensor([3, 3, 3, 5, 5]), **options)
    assert same_tokens(alone, shared) and apart(alone, shared) <= 1e-5
    first, *others = ({row for row, _ in forward} for forward in denoiser.forwards)
    assert first == {0, 1} and set().union(*others) == {0, 1, 2, 3, 4}


def test_the_worker_shares_the_first_forward_of_a_group() -> None:
    """It changes no token, and micro-batches that cut a group in two share what they have."""
    denoiser = cachetoys.load("llada")
    sampler = build_sampler({"schedule": {"name": "blocks", "size": 8, "per_step": 2}, "cache": "dual"})
    rows = [{"prompt": "12+5"}, {"prompt": "two words"}]
    options = {"group": 3, "canvas": 16, "prompt_limit": 64, "seed": 0}
    worker = RolloutWorker(denoiser, denoiser.tokenizer, sampler, SimpleNamespace(), **options)  # type: ignore[arg-type]
    found = [replace(worker, micro_batch=size).rollout(rows, step=0) for size in (6, 4, 1)]
    assert len(denoiser.forwards[0]) == 2, "one row of each prompt"
    assert all(same_tokens(found[0], other) and apart(found[0], other) <= 1e-5 for other in found[1:])


@pytest.mark.parametrize("cache", ["dual", "block_causal"])
def test_in_lockstep_every_step_is_one_forward(cache: str) -> None:
    """Ranks that share weights call the denoiser equally often, whatever their rows compute, and without any."""
    denoiser = cachetoys.load("sdar", ending=True)
    free = rollouts(denoiser, cache)
    calls, steps = len(denoiser.forwards), int(free.steps_B.max())
    assert calls > steps
    denoiser.forwards.clear()
    votes: list[bool] = []

    def anyone(live: bool) -> bool:
        votes.append(live)
        return len(votes) <= steps + 2

    bound = rollouts(denoiser, cache, anyone=anyone)
    assert votes == [True] * steps + [False] * 3, "it votes at every look, also where it is live"
    assert same_tokens(free, bound) and apart(free, bound) <= 1e-5
    assert len(denoiser.forwards) == steps + 2 and denoiser.forwards[-1] == []


def test_forwards_are_shared_out_by_width() -> None:
    assert share_out([7, 7], [True, True]) == [([0, 1], None)]
    assert share_out([], []) == [([], None)]
    assert share_out([7, 0, 7], [True, False, True]) == [([0, 1, 2], None)], "as without a cache"
    assert share_out([4, 9, 4, 4], [False, True, False, False]) == [([1], None), ([0, 2, 3], 4)]
    assert share_out([4, 8, 4, 4], [False] * 4) == [([0, 2, 3], 4), ([1], 8)]
    assert share_out([7, 8, 7, 7], [False] * 4) == [([0, 1, 2, 3], 8)], "too little to spare"
    assert share_out([4, 0, 9, 5], [False, False, True, False]) == [([2], None), ([0, 3], 5)], "row 1 is finished"
    assert share_out([4, 0, 9, 5], [False, False, True, False], lockstep=True) == [([0, 1, 2, 3], 9)]
    assert share_out([0, 0], [False, False]) == [([0, 1], 1)]


def test_a_store_keeps_rows_and_places() -> None:
    store = Store(layers=1, rows=3, columns=10, device=torch.device("cpu"))
    assert (store.room, store.dummy) == (16, 10)
    assert Store(layers=1, rows=1, columns=16, device=torch.device("cpu")).room == 24, "there is room for the dummy"
    key = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 10, 4)
    store.expect(torch.arange(3), None, every_row=True)
    assert torch.equal(store.update(key, key, 0)[0], key)
    store.expect(torch.tensor([2, 0]), torch.tensor([[1, 10], [4, 5]]), every_row=False)
    keys, _ = store.update(key[:2, :, :2] + 7, key[:2, :, :2], 0)
    assert keys.shape == (2, 2, 16, 4) and keys[0, 0, :, 0].tolist() == [2, 7, *[2] * 8, 7, *[0] * 5]
    assert keys[1, 1, :10, 3].tolist() == [0] * 4 + [8, 8] + [0] * 4
    store.select(torch.tensor([2, 2]))
    layer: Any = store.layers[0]
    assert torch.equal(layer.keys[0], layer.keys[1]) and layer.keys[0, 1, 0, 0] == 7


@pytest.mark.parametrize(
    ("name", "cache", "changes", "message"),
    [
        ("llada", "block_causal", {}, "attends to the whole canvas; use cache dual"),
        ("llada", "dual", {"family": "modernbert"}, "an encoder that keeps no keys"),
        ("llada", "dual", {"attention": "flash_attention_2"}, "flash_attention_2 does not take; use sdpa"),
    ],
)
def test_caches_that_cannot_be(name: str, cache: str, changes: dict[str, str], message: str) -> None:
    denoiser: Any = cachetoys.load(name)
    if "family" in changes:
        denoiser.family = replace(denoiser.family, name=changes["family"])
    denoiser.base.config._attn_implementation = changes.get("attention", "sdpa")
    with pytest.raises(RecipeError, match=message):
        rollouts(denoiser, cache)


def test_a_source_of_logits_alone_keeps_no_keys() -> None:
    source = SimpleNamespace(family=cachetoys.load("sdar").family, logits=None)
    with pytest.raises(RecipeError, match="'dual' needs the keys and values of a Denoiser; SimpleNamespace gives"):
        check_cache(SLOTS["cache"].get("dual"), source)
    check_cache(None, source)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"name": "dual", "refresh": -1}, "cache.refresh: -1 must be at least 0"),
        ({"name": "dkv_decode", "refresh": 0}, "cache.refresh: 0 must be at least 1"),
        ({"name": "dkv_greedy", "near": -1}, "cache.near: -1"),
        ({"name": "window_diffusion", "outer": 0}, "cache.outer: 0"),
    ],
)
def test_impossible_knobs(cache: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rollouts(cachetoys.load("llada"), cache)
