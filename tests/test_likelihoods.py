"""Likelihood estimators against enumeration: of every mask, every order and every canvas of a three-token toy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import EOS, MASK, L, Toy, V

from unmask.policies.loading import load_denoiser
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.loading import defaults
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl import blockwise  # noqa: F401 (importing registers the parts)
from unmask.rl.bounds import Terms
from unmask.rl.estimators import most_canvases
from unmask.rl.replay import replay
from unmask.rl.views import Views
from unmask.rollouts.trajectory import GIVEN, PAD, SAMPLED, Trajectory

PROMPT = torch.tensor([1, 3])
COMPLETION = (0, 1, 1)


def rollouts(completions: list[tuple[int, ...]], ids: Tensor | None = None, mask: int = MASK) -> Trajectory:
    """Return rollouts that drew these completions from left to right; a token below 0 is a given one."""
    given_BL = torch.tensor(completions) < 0
    tokens_BL = torch.where(given_BL, -1 - torch.tensor(completions), torch.tensor(completions))
    rows, length = tokens_BL.shape
    source_BL = torch.where(given_BL, GIVEN, torch.where(tokens_BL == mask, PAD, SAMPLED)).to(torch.int8)
    born_BL = torch.where(source_BL == SAMPLED, torch.arange(length), -1).to(torch.int16)
    return Trajectory(
        prompt_BQ=PROMPT.expand(rows, -1),
        prompt_mask_BQ=torch.ones(rows, len(PROMPT), dtype=torch.bool),
        tokens_BL=tokens_BL,
        source_BL=source_BL,
        born_BL=born_BL,
        rank_BL=torch.zeros_like(born_BL),
        logprob_BL=torch.where(source_BL == SAMPLED, -0.5, 0.0),
        steps_B=torch.full((rows,), length),
        rollout_id_B=torch.arange(rows) if ids is None else ids,
        temperature=1.0,
        mask_token_id=mask,
        eos_token_ids=(EOS,),
        banned_token_ids=(mask,),
    )


def views_of(
    name: str, trajectory: Trajectory, *, seed: int = 0, inner: tuple[int, int] = (0, 1), **knobs: object
) -> Views:
    estimator = SLOTS["estimator"].build({"name": name, **knobs})
    return estimator(trajectory, rng=torch.Generator().manual_seed(seed), inner_step=inner)


def f(toy: Toy, hidden: tuple[int, ...]) -> dict[int, float]:
    """Return log p of each hidden token of COMPLETION on the canvas that shows the others."""
    canvas = torch.tensor([MASK if i in hidden else COMPLETION[i] for i in range(L)])
    logp_LV = toy.logits(torch.cat([PROMPT, canvas])[None])[0, -L:, :V].log_softmax(-1)
    return {i: logp_LV[i, COMPLETION[i]].item() for i in hidden}


def subsets(k: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(L), k))


def exact_elbo(toy: Toy) -> float:
    """Return E_{k~U{1..L}} E_{|S|=k} L/k sum_S f."""
    return sum(sum(sum(f(toy, s).values()) for s in subsets(k)) / len(subsets(k)) / k for k in range(1, L + 1))


def log_likelihood(toy: Toy) -> float:
    """Return log of the mean over all orders of the probability of COMPLETION drawn in that order."""
    orders = list(itertools.permutations(range(L)))
    chances = [math.exp(sum(f(toy, order[n:])[order[n]] for n in range(L))) for order in orders]
    return math.log(sum(chances) / len(orders))


def estimates(toy: Toy, views: Views) -> Tensor:
    """Return each rollout's sum of factor x log-prob, a mean over draws."""
    with torch.no_grad():
        logprob_K = replay(toy, views).logprob_A
    assert views.factor_K is not None
    total_B = torch.zeros(len(views.trajectory), dtype=torch.float64)
    return total_B.index_add(0, views.row_K, logprob_K * views.factor_K.double()) / views.draws


UNBIASED: dict[str, dict[str, object]] = {
    "stratified": {"name": "random_mask", "draws": 2},
    "independent": {"name": "random_mask", "draws": 2, "draw": "independent"},
    "antithetic": {"name": "antithetic", "draws": 1},
    "antithetic, 2 draws": {"name": "antithetic", "draws": 2},
    "quadrature, 2 nodes for 3 tokens": {"name": "quadrature", "nodes": 2},
    "quadrature, 3 nodes": {"name": "quadrature", "nodes": 3, "masks": 2},
}


@pytest.mark.parametrize("case", UNBIASED)
def test_unbiased_for_the_elbo(case: str) -> None:
    toy, rows = Toy(seed=1), 60_000
    value_B = estimates(toy, views_of(trajectory=rollouts([COMPLETION] * rows), **UNBIASED[case]))  # type: ignore[arg-type]
    exact, error = exact_elbo(toy), value_B.std().item() / math.sqrt(rows)
    assert error < 0.01 * abs(exact) / 3, "too few draws to see a bias of one per cent"
    assert abs(value_B.mean().item() - exact) < 3 * error


def test_bernoulli_counts_the_inverse_of_its_rate() -> None:
    """Its variance is infinite (E[1/t]), so that no mean tells: the share of hidden tokens does, rate by rate."""
    rows, length = 20_000, 8
    views = views_of("random_mask", rollouts([(0,) * length] * rows), draw="bernoulli")
    assert views.factor_K is not None and views.hidden_NL is not None
    rate_N = torch.zeros(len(views)).scatter(0, views.view_K, 1 / views.factor_K)
    # Rollouts that hide nothing have no view; a rate of at least 1/2 leaves one in 256 out, of known size.
    for low in (0.5, 0.7, 0.9):
        kept_N = (rate_N >= low) & (rate_N < low + 0.1)
        rate = rate_N[kept_N].double()
        expected = (rate / (1 - (1 - rate) ** length)).mean().item()
        share = views.hidden_NL[kept_N].double().mean(1)
        assert abs(share.mean().item() - expected) < 4 * share.std().item() / math.sqrt(len(share))


def test_one_node_is_biased() -> None:
    """The control of the test above: a quadrature that is not exact for this polynomial."""
    toy, rows = Toy(seed=1), 60_000
    value_B = estimates(toy, views_of("quadrature", rollouts([COMPLETION] * rows), nodes=1))
    assert abs(value_B.mean().item() - exact_elbo(toy)) > 8 * value_B.std().item() / math.sqrt(rows)


def test_exact_ones() -> None:
    toy, one = Toy(seed=2), rollouts([COMPLETION])
    for name, exact in {
        "fully_masked": sum(f(toy, (0, 1, 2)).values()),
        "left_to_right": f(toy, (0, 1, 2))[0] + f(toy, (1, 2))[1] + f(toy, (2,))[2],
    }.items():
        assert estimates(toy, views_of(name, one)).item() == pytest.approx(exact, rel=1e-6)


def test_left_to_right_is_the_trace_of_left_to_right_rollouts() -> None:
    toy, one = Toy(seed=2), rollouts([COMPLETION, (2, 1, 0)])
    trace = SLOTS["estimator"].build("trace")(one, rng=None)
    views = views_of("left_to_right", one, tokens="until_eos")
    torch.testing.assert_close(replay(toy, views).logprob_A, replay(toy, trace).logprob_A, rtol=0, atol=0)
    torch.testing.assert_close(views.canvas(), trace.canvas())


def bound_values(toy: Toy, advantage: float, **choice: object) -> float:
    """Return a bound of COMPLETION, over so many draws that noise is small against the gaps."""
    views = views_of("random_mask", rollouts([COMPLETION]), draws=4000)
    with torch.no_grad():
        logprob_K = replay(toy, views).logprob_A
    assert views.factor_K is not None
    factor_K, one = views.factor_K.double() / views.draws, torch.ones(1, dtype=torch.float64)
    index_K = torch.zeros(len(logprob_K), dtype=torch.long)
    terms = Terms(index_K, torch.ones_like(logprob_K), factor_K, views.position_K, L * one, advantage * one)
    return SLOTS["bound"].build(choice)(logprob_K, terms).item()


def test_bounds_lie_on_their_sides() -> None:
    """ELBO <= log p, ELBO <= EUBO, EUBO rises with beta; log p <= EUBO for large beta alone, which bounds.py says."""
    above = {1.0: 0, 1.5: 0, 4.0: 0}
    for seed in range(8):
        toy = Toy(seed=seed, scale=1.5)
        lower = bound_values(toy, 1.0, name="elbo", per_token=True)
        upper = {beta: bound_values(toy, 1.0, name="eubo", beta=beta) for beta in above}
        exact = log_likelihood(toy) / L
        assert lower < exact and lower < upper[1.0] < upper[1.5] < upper[4.0]
        above = {beta: count + (upper[beta] > exact) for beta, count in above.items()}
    assert above == {1.0: 0, 1.5: 6, 4.0: 8}


def test_sandwich_takes_the_side_of_the_advantage() -> None:
    toy = Toy(seed=1)
    lower, upper = bound_values(toy, 1.0, name="elbo", per_token=True), bound_values(toy, 1.0, name="eubo", beta=2.0)
    assert bound_values(toy, 0.5, name="sandwich", beta=2.0, mix=0.25) == pytest.approx(lower)
    assert bound_values(toy, -0.5, name="sandwich", beta=2.0, mix=0.25) == pytest.approx(0.25 * upper + 0.75 * lower)


@pytest.mark.parametrize(("length", "draws"), [(5, 3), (7, 4), (4, 4)])
def test_stratified_counts_are_uniform(length: int, draws: int) -> None:
    """P9: k_j is uniform on 1..L for each draw, whatever L and M; round(linspace) is not."""
    rows = 20_000
    views = views_of("random_mask", rollouts([(0,) * length] * rows), draws=draws)
    assert views.hidden_NL is not None and views.sample_N is not None
    count_N = views.hidden_NL.sum(1)
    for j in range(draws):
        seen = torch.bincount(count_N[views.sample_N == j], minlength=length + 1)[1:] / rows
        assert (seen - 1 / length).abs().max() < 5 * math.sqrt(1 / length / rows)
    # Stratified: the draws of one rollout lie in different parts of the range.
    spread_B = count_N.view(rows, draws).sort(dim=1).values
    assert ((spread_B[:, -1] - spread_B[:, 0]) >= math.floor(length * (draws - 1) / draws)).all()


def test_coupled_counts_one_and_a_half_log_probs() -> None:
    """P12, and its remedy."""
    rows = 20_000
    for normalised, total in ((False, 1.5), (True, 1.0)):
        views = views_of("coupled", rollouts([COMPLETION] * rows), normalised=normalised)
        assert views.factor_K is not None
        sum_BL = torch.zeros(rows * L).index_add(0, views.row_K * L + views.position_K, views.factor_K).view(rows, L)
        share = sum_BL.mean(0)
        assert (share - total).abs().max() < 5 * sum_BL.std().item() / math.sqrt(rows) + 1e-6
        times_BL = torch.zeros(rows * L).index_add(0, views.row_K * L + views.position_K, torch.ones(len(views.view_K)))
        assert (times_BL == 2).all(), "every token stands on the empty canvas and on one of two complements"


def test_ladder_rises_to_the_empty_canvas() -> None:
    """UniGRPO: the inner step that a plan is for sets the share of masks (P3: it is not counted in micro-steps)."""
    rows, mean = 4000, []
    for number in range(4):
        views = views_of("random_mask", rollouts([(0,) * 8] * rows), draw="ladder", start=0.2, inner=(number, 4))
        assert views.hidden_NL is not None
        mean.append(views.hidden_NL.double().mean().item())
    assert mean == pytest.approx([0.6, 0.733, 0.867, 1.0], abs=0.01)


ALL: dict[str, dict[str, object]] = {
    "fully_masked": {"prompt_drop": 0.5},
    "random_mask": {"draws": 3},
    "coupled": {},
    "antithetic": {"draws": 2},
    "blockwise": {"size": 2, "draws": 2},
    "block_elbo": {"size": 2, "draws": 2},
    "left_to_right": {},
    "quadrature": {"nodes": 2},
}
MIXED = [(0, 1, EOS, 0, 1), (1, 1, 1, 1, 1), (-1, 0, 0, -2, 0), (0, EOS, MASK, MASK, MASK)]


def test_every_likelihood_estimator_is_covered() -> None:
    recorded = {name for name in SLOTS["estimator"] if not views_like(name)}
    assert set(SLOTS["estimator"]) - recorded == set(ALL)


def views_like(name: str) -> bool:
    return SLOTS["estimator"].get(name).__module__.rpartition(".")[2] in ("likelihoods", "blockwise")


@pytest.mark.parametrize("name", ALL)
def test_contract(name: str) -> None:
    """Given tokens are shown, what lies behind an EOS is hidden, scored tokens are hidden, and nothing else happens."""
    trajectory, state = rollouts(MIXED), torch.random.get_rng_state()
    views = views_of(name, trajectory, **ALL[name])
    assert torch.equal(torch.random.get_rng_state(), state), "P1: no global generator"
    canvas_NL, actions_NL = views.canvas(), trajectory.action_BL()[views.row_N]
    assert (canvas_NL[views.scored()] == MASK).all() and actions_NL[views.scored()].all()
    behind_NL = (trajectory.source_BL == SAMPLED)[views.row_N] & ~actions_NL
    assert (canvas_NL[behind_NL] == MASK).all()
    given_NL = (trajectory.source_BL == GIVEN)[views.row_N]
    assert torch.equal(canvas_NL[given_NL], trajectory.tokens_BL[views.row_N][given_NL])
    shown_NL = canvas_NL != MASK
    assert torch.equal(canvas_NL[shown_NL], trajectory.tokens_BL[views.row_N][shown_NL])
    assert views.count_B.tolist() == trajectory.action_BL().sum(1).tolist()
    knobs = defaults("estimator", name) | ALL[name]
    assert torch.bincount(views.row_N).max() <= most_canvases({"name": name, **knobs}, 5, 5)
    assert views.estimated and (views.target_K == trajectory.tokens_BL[views.row_K, views.position_K]).all()


@pytest.mark.parametrize("name", ALL)
def test_draws_are_keyed_by_rollout(name: str) -> None:
    """P2: any order, subset or padding of a batch gives a rollout the same canvases."""
    trajectory = rollouts(MIXED, ids=torch.tensor([7, 3, 11, 5]))
    whole, some = views_of(name, trajectory, **ALL[name]), torch.tensor([2, 0])
    wide = replace(
        trajectory.select(some),
        prompt_BQ=torch.nn.functional.pad(trajectory.prompt_BQ[some], (3, 0)),
        prompt_mask_BQ=torch.nn.functional.pad(trajectory.prompt_mask_BQ[some], (3, 0)),
    )
    part = views_of(name, wide, **ALL[name])
    for new, old in enumerate(some.tolist()):
        mine, theirs = part.where(part.row_N == new), whole.where(whole.row_N == old)
        assert torch.equal(mine.canvas(), theirs.canvas())
        assert torch.equal(mine.prompts()[:, 3:], theirs.prompts())
        assert (mine.prompts()[:, :3] == 0).all(), "padding is never dropped"
    other = views_of(name, trajectory, seed=1, **ALL[name])
    if name != "left_to_right":
        same = len(other) == len(whole) and torch.equal(other.canvas(), whole.canvas())
        assert not (same and torch.equal(other.prompts(), whole.prompts())), "another seed draws anew"


def test_expected_factors_are_one() -> None:
    """What makes an ELBO: over the draws each token counts once."""
    rows = 20_000
    for name, knobs in {"block_elbo": {"size": 2}, "random_mask": {"draws": 1}, "antithetic": {"draws": 1}}.items():
        views = views_of(name, rollouts([(0,) * 5] * rows), **knobs)  # type: ignore[arg-type]
        assert views.factor_K is not None
        sum_BL = torch.zeros(rows * 5).index_add(0, views.row_K * 5 + views.position_K, views.factor_K).view(rows, 5)
        assert (sum_BL.mean(0) - 1).abs().max() < 5 * sum_BL.std().item() / math.sqrt(rows), name


def test_blockwise_by_its_rule() -> None:
    views = views_of("blockwise", rollouts([(0,) * 6] * 500), size=2, draws=3, drop=0.0)
    assert views.hidden_NL is not None and views.sample_N is not None
    hidden_NL = views.hidden_NL
    first_N = hidden_NL.to(torch.int8).argmax(1) // 2
    later_NL = torch.arange(6) // 2 > first_N[:, None]
    assert hidden_NL[later_NL].all() and not hidden_NL[torch.arange(6) // 2 < first_N[:, None]].any()
    # Three draws over three blocks take each once.
    assert (first_N.view(500, 3).sort(1).values == torch.arange(3)).all()
    only = views_of("blockwise", rollouts([(0,) * 6] * 50), size=2, draws=3, drop=0.0, score="block")
    assert not only.scored()[torch.arange(6) // 2 > (only.scored().to(torch.int8).argmax(1) // 2)[:, None]].any()
    noisy = views_of("blockwise", rollouts([(0,) * 6] * 2000), size=2, draws=1, drop=0.25)
    assert noisy.prompt_hidden_NQ is not None
    assert noisy.prompt_hidden_NQ.double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_blocks_behind_clean_blocks() -> None:
    """One pass over [x_t ; x_0] scores each block as its own forward behind the clean blocks does (block-causal)."""
    denoiser = load_denoiser(str(Path(__file__).parent / "fixtures" / "sdar"), tokenizer=byte_tokenizer())
    mask, size = denoiser.family.mask_token_id, denoiser.family.block_length
    assert size is not None
    tokens = torch.randint(0, 40, (2, 3 * size), generator=torch.Generator().manual_seed(0))
    trajectory = replace(
        rollouts([tuple(row) for row in tokens.tolist()], mask=mask),
        offset_B=torch.full((2,), len(PROMPT) % size),
        eos_token_ids=(),
    )
    views = views_of("block_elbo", trajectory, size=size, tokens="all")
    with torch.no_grad():
        got_K = replay(denoiser, views).logprob_A
        block_K = (views.position_K + len(PROMPT) % size) // size
        for n, block in set(zip(views.view_K.tolist(), block_K.tolist(), strict=True)):
            chosen_K = (views.view_K == n) & (block_K == block)
            # Later blocks are not seen, so that this block may stand alone among clean ones.
            canvas_1L = trajectory.tokens_BL[views.row_N[n]][None].clone()
            canvas_1L[0, views.position_K[chosen_K]] = mask
            ids = torch.cat([PROMPT[None], canvas_1L], dim=1)
            logits = denoiser.logits(ids)[0, len(PROMPT) + views.position_K[chosen_K]]
            logits[:, mask] = -torch.inf
            expected = logits.log_softmax(-1).gather(1, views.target_K[chosen_K][:, None])[:, 0]
            torch.testing.assert_close(got_K[chosen_K], expected, rtol=0, atol=1e-5)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: views_of("random_mask", rollouts(MIXED), draws=0), "estimator.draws: 0 must be at least 1"),
    (lambda: views_of("random_mask", rollouts(MIXED), draw="ladder", start=1.0), r"start: 1.0 must lie in \[0, 1\)"),
    (lambda: views_of("coupled", rollouts(MIXED), low=0.0), "low, high: 0.0, 0.8 must satisfy"),
    (lambda: views_of("fully_masked", rollouts(MIXED), prompt_drop=1.0), "prompt tokens, 1.0, must lie in"),
    (lambda: views_of("blockwise", rollouts(MIXED), size=0), "size, draws: 0 and 2 must be at least 1"),
    (lambda: views_of("quadrature", rollouts(MIXED), nodes=0), "nodes, masks: 0 and 1 must be at least 1"),
]


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_impossible_knobs_are_refused(index: int) -> None:
    call, message = REFUSED[index]
    with pytest.raises(RecipeError, match=message):
        call()
