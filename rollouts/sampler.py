"""The sampler's parts and `denoise`, the one loop that turns prompts into trajectories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from . import schedules, scores, selection  # noqa: F401 (importing registers the parts)
from .categorical import draw, log_odds, log_probs
from .noise import uniform
from .schedules import Quota
from .selection import rank, tail_logprob
from .trajectory import GIVEN, NEVER, PAD, SAMPLED, Trajectory

EOS_RULES = ("stop", "none")


class LogitError(ValueError):
    """Logits that are no distribution over the allowed tokens; the message names rollout, step and position."""


class LogitSource(Protocol):
    """What `denoise` needs of a denoiser."""

    family: Any

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Sampler:
    """Five choices that decide how a canvas is filled; build one from a recipe with `build_sampler`.

    `temperature` is that of the draw (0 = argmax), `score_temperature` that of the distribution the score sees.
    `eos_rule`: `stop` ends a row once an EOS is committed with everything left of it decided, `none` fills the canvas.
    `suppress_eos` forbids EOS altogether. `draws_first` marks selections that look at drawn tokens.
    """

    schedule: Callable[[Tensor, Tensor, Tensor], Quota]
    score: Callable[[Tensor, Tensor, Tensor], Tensor]
    selection: Callable[[Tensor, Quota], Tensor]
    temperature: float = 1.0
    score_temperature: float = 1.0
    eos_rule: str = "stop"
    suppress_eos: bool = False
    draws_first: bool = False
    exact_choice: bool = False

    def quota(self, canvas_NL: Tensor, step_N: Tensor, open_N: Tensor, mask_token_id: int) -> Quota:
        """Return the schedule's quota, kept to masked positions and, where a row has any, never empty."""
        masked_NL = canvas_NL == mask_token_id
        quota = self.schedule(masked_NL, step_N, open_N)
        window_NL = quota.window_BL & masked_NL
        # Whatever a schedule of the user's says, a live row commits something: the loop ends.
        window_NL = torch.where(window_NL.any(dim=1, keepdim=True), window_NL, masked_NL)
        return Quota(window_NL, quota.count_B.clamp(min=1))

    def window(self, canvas_NL: Tensor, step_N: Tensor, open_N: Tensor, mask_token_id: int) -> Tensor:
        """Return the positions that were open to the selection on recorded canvases."""
        return self.quota(canvas_NL, step_N, open_N, mask_token_id).window_BL

    def banned(self, family: Any) -> tuple[int, ...]:
        """Return the token ids that are never drawn."""
        return (family.mask_token_id, *(family.eos_token_ids if self.suppress_eos else ()))


def build_sampler(section: Mapping[str, Any], *, temperature: float = 1.0) -> Sampler:
    """Return the Sampler of a recipe's `sampler` section; RecipeError for parts, knobs or values that do not fit."""
    if temperature < 0:
        raise RecipeError(f"rollout.temperature: {temperature} must be at least 0 (0 is argmax).")
    score_temperature = section.get("score_temperature", 1.0)
    if score_temperature <= 0:
        raise RecipeError(f"sampler.score_temperature: {score_temperature} must be above 0, it divides logits.")
    eos = dict(section.get("eos") or {})
    rule = eos.get("rule", "stop")
    if rule not in EOS_RULES:
        raise RecipeError(f"sampler.eos.rule: '{rule}' is not one of {', '.join(EOS_RULES)}.")
    choose = SLOTS["selection"].build(section.get("selection", "top"), "sampler.selection")
    function = choose.func if isinstance(choose, partial) else choose
    draws_first = bool(getattr(function, "draws_first", False))
    knobs = choose.keywords if isinstance(choose, partial) else {}
    return Sampler(
        schedule=SLOTS["schedule"].build(section["schedule"], "sampler.schedule"),
        score=SLOTS["score"].build(section.get("score", "confidence"), "sampler.score"),
        selection=choose,
        temperature=temperature,
        score_temperature=score_temperature,
        eos_rule=rule,
        suppress_eos=eos.get("suppress", False),
        draws_first=draws_first,
        exact_choice=draws_first and knobs.get("exact", True),
    )


@dataclass
class _Canvas:
    """The mutable record of a running `denoise`, one row a rollout, finished or not."""

    tokens_BL: Tensor
    source_BL: Tensor
    born_BL: Tensor
    rank_BL: Tensor
    logprob_BL: Tensor
    steps_B: Tensor
    open_B: Tensor
    choice_logprobs: list[Tensor]

    @staticmethod
    def start(canvas_BL: Tensor, mask_token_id: int) -> _Canvas:
        """Return the record of a canvas on which nothing has been sampled yet."""
        masked_BL = canvas_BL == mask_token_id
        empty = torch.full_like(canvas_BL, NEVER, dtype=torch.int16)
        return _Canvas(
            tokens_BL=canvas_BL.clone(),
            source_BL=torch.where(masked_BL, PAD, GIVEN).to(torch.int8),
            born_BL=empty,
            rank_BL=empty.clone(),
            logprob_BL=torch.zeros(canvas_BL.shape, device=canvas_BL.device),
            steps_B=torch.zeros(len(canvas_BL), dtype=torch.long, device=canvas_BL.device),
            open_B=masked_BL.sum(1),
            choice_logprobs=[],
        )

    def choices(self) -> Tensor:
        """Return the log-probabilities of the choices `[B, S]`."""
        if not self.choice_logprobs:
            return self.logprob_BL[:, :0]
        return torch.stack(self.choice_logprobs, dim=1)


@torch.no_grad()
def denoise(
    denoiser: LogitSource,
    sampler: Sampler,
    prompt_BQ: Tensor,
    prompt_mask_BQ: Tensor,
    canvas_BL: Tensor,
    rollout_id_B: Tensor,
    *,
    seed: int,
    step: int = 0,
    on_step: Callable[[Tensor], None] | None = None,
) -> Trajectory:
    """Fill the masks of `canvas_BL` step by step and record how each token was decided.

    One denoiser call a step over the rows that are not finished; the LM head runs at the open positions only. Noise is
    keyed by (seed, step, rollout id, denoising step, position), so a rollout does not depend on what else is in the
    batch. Terminates: every step commits at least one position of every live row. `on_step` sees `tokens_BL` after
    each. Raises LogitError where the logits are NaN, or -inf for every allowed token.
    """
    mask_token_id = denoiser.family.mask_token_id
    eos = torch.tensor(denoiser.family.eos_token_ids, device=canvas_BL.device)
    record = _Canvas.start(canvas_BL, mask_token_id)
    alive_A = _unfinished(record.tokens_BL, mask_token_id, eos, sampler.eos_rule).nonzero().squeeze(1)
    t = 0
    while len(alive_A):
        _step(denoiser, sampler, prompt_BQ, prompt_mask_BQ, record, alive_A, rollout_id_B, t, seed=seed, step=step)
        t += 1
        unfinished_A = _unfinished(record.tokens_BL[alive_A], mask_token_id, eos, sampler.eos_rule)
        record.steps_B[alive_A] = t
        alive_A = alive_A[unfinished_A]
        if on_step is not None:
            on_step(record.tokens_BL)
    return Trajectory(
        prompt_BQ=prompt_BQ,
        prompt_mask_BQ=prompt_mask_BQ,
        tokens_BL=record.tokens_BL,
        source_BL=record.source_BL,
        born_BL=record.born_BL,
        rank_BL=record.rank_BL,
        logprob_BL=record.logprob_BL,
        steps_B=record.steps_B,
        rollout_id_B=rollout_id_B,
        temperature=sampler.temperature,
        mask_token_id=mask_token_id,
        eos_token_ids=tuple(denoiser.family.eos_token_ids),
        banned_token_ids=sampler.banned(denoiser.family),
        choice_logprob_BS=record.choices() if sampler.exact_choice else None,
    )


def _unfinished(tokens_BL: Tensor, mask_token_id: int, eos: Tensor, rule: str) -> Tensor:
    """Return the rows that still have an open position the rule wants decided."""
    masked_BL = tokens_BL == mask_token_id
    open_B = masked_BL.any(dim=1)
    if rule == "none":
        return open_B
    ends_BL = torch.isin(tokens_BL, eos)
    first_mask_B = masked_BL.to(torch.int8).argmax(dim=1)
    first_end_B = torch.where(ends_BL.any(dim=1), ends_BL.to(torch.int8).argmax(dim=1), tokens_BL.shape[1])
    return open_B & (first_mask_B < first_end_B)


def _step(
    denoiser: LogitSource,
    sampler: Sampler,
    prompt_BQ: Tensor,
    prompt_mask_BQ: Tensor,
    record: _Canvas,
    alive_A: Tensor,
    rollout_id_B: Tensor,
    t: int,
    *,
    seed: int,
    step: int,
) -> None:
    """Decide one step of the live rows `alive_A` and write it into `record`."""
    canvas_AL = record.tokens_BL[alive_A]
    step_A = torch.full_like(alive_A, t)
    quota = sampler.quota(canvas_AL, step_A, record.open_B[alive_A], denoiser.family.mask_token_id)
    window_AL = quota.window_BL
    logits_KV = window_logits(denoiser, prompt_BQ[alive_A], prompt_mask_BQ[alive_A], canvas_AL, window_AL)
    row_K, position_K = window_AL.nonzero(as_tuple=True)
    key_K = rollout_id_B[alive_A][row_K]
    banned = sampler.banned(denoiser.family)
    time_K = torch.full_like(position_K, t)
    # One uniform a (rollout, denoising step, position): draws and random scores have streams of their own.
    draw_K = uniform(seed, "draw", step, key_K, time_K, position_K)
    scored_KV = log_probs(logits_KV, temperature=sampler.score_temperature, banned=banned)
    _require_distribution(scored_KV, key_K, position_K, t)
    token_K, logprob_K = _draw(logits_KV, draw_K, sampler.temperature, banned)
    if sampler.draws_first:
        score_K = log_odds(scored_KV).gather(1, token_K[:, None]).squeeze(1)
    else:
        score_K = sampler.score(scored_KV, position_K, uniform(seed, "score", step, key_K, time_K, position_K))
    score_AL = torch.full(canvas_AL.shape, -torch.inf, device=canvas_AL.device, dtype=score_K.dtype)
    score_AL[window_AL] = score_K
    # A score of -inf inside the window must still beat the positions outside it.
    place_AL = rank(torch.where(window_AL, score_AL.clamp(min=torch.finfo(score_AL.dtype).min), -torch.inf))
    chosen_AL = sampler.selection(score_AL, quota) & window_AL
    chosen_AL |= (place_AL == 0) & window_AL & ~chosen_AL.any(dim=1, keepdim=True)
    if sampler.exact_choice:
        choice_A = choice_logprob(logits_KV, score_AL, chosen_AL, window_AL, sampler, banned)
        choice_B = torch.zeros(len(record.tokens_BL), device=canvas_AL.device, dtype=choice_A.dtype)
        record.choice_logprobs.append(choice_B.index_copy(0, alive_A, choice_A))
    _commit(record, alive_A, chosen_AL, window_AL, place_AL, token_K, logprob_K, t)


def _require_distribution(logp_KV: Tensor, rollout_K: Tensor, position_K: Tensor, t: int) -> None:
    # A log-softmax with a NaN, an infinite logit or nothing but -inf is NaN in every entry.
    broken_K = logp_KV[:, 0].isnan()
    if bool(broken_K.any()):
        k = int(broken_K.nonzero()[0])
        raise LogitError(
            f"rollout {int(rollout_K[k])}, step {t}: the logits at canvas position {int(position_K[k])} are NaN, "
            "infinite or -inf for every allowed token; check the weights, or resume from an earlier checkpoint."
        )


def _draw(logits_KV: Tensor, uniform_K: Tensor, temperature: float, banned: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return (token_K, logprob_K) drawn at `temperature`; at 0 the argmax, whose log-probability is recorded as 0."""
    if temperature == 0:
        token_K = log_probs(logits_KV, banned=banned).argmax(dim=-1)
        return token_K, torch.zeros(len(token_K), device=logits_KV.device)
    logq_KV = log_probs(logits_KV, temperature=temperature, banned=banned)
    token_K = draw(logq_KV, uniform_K)
    return token_K, logq_KV.gather(1, token_K[:, None]).squeeze(1)


def _commit(
    record: _Canvas,
    alive_A: Tensor,
    chosen_AL: Tensor,
    window_AL: Tensor,
    place_AL: Tensor,
    token_K: Tensor,
    logprob_K: Tensor,
    t: int,
) -> None:
    """Write the chosen tokens, their log-probabilities, step and order."""
    row_K, position_K = window_AL.nonzero(as_tuple=True)
    kept_K = chosen_AL[window_AL]
    rows, columns = alive_A[row_K[kept_K]], position_K[kept_K]
    record.tokens_BL[rows, columns] = token_K[kept_K]
    record.logprob_BL[rows, columns] = logprob_K[kept_K].to(record.logprob_BL.dtype)
    record.source_BL[rows, columns] = SAMPLED
    record.born_BL[rows, columns] = t
    # Ranks count the chosen positions only, in the order of their scores.
    better_AL = rank(torch.where(chosen_AL, -place_AL.double(), -torch.inf))
    record.rank_BL[rows, columns] = better_AL[chosen_AL].to(torch.int16)


def window_logits(
    denoiser: LogitSource, prompt_BQ: Tensor, prompt_mask_BQ: Tensor, canvas_BL: Tensor, positions_BL: Tensor
) -> Tensor:
    """Return logits `[K, V]` of a prompt + canvas at `positions_BL`; rollout and trainer both score through this."""
    padded = not bool(prompt_mask_BQ.all())
    mask_BT = torch.cat([prompt_mask_BQ, torch.ones_like(canvas_BL, dtype=torch.bool)], dim=1) if padded else None
    positions_BT = torch.cat([torch.zeros_like(prompt_mask_BQ), positions_BL], dim=1)
    return denoiser.logits(torch.cat([prompt_BQ, canvas_BL], dim=1), padding_mask_BT=mask_BT, positions_BT=positions_BT)


def choice_logprob(
    logits_KV: Tensor,
    score_NL: Tensor,
    chosen_NL: Tensor,
    window_NL: Tensor,
    sampler: Sampler,
    banned: tuple[int, ...],
) -> Tensor:
    """Return `choice_N`, the log-probability that exactly the other window positions stayed below the bar.

    `score_NL` holds the drawn tokens' log-odds at the chosen positions (others are ignored); `logits_KV` are those of
    the window. The bar is the lowest chosen score; a tie at it goes to the smaller index (samplers.md section 1.3). At
    temperature 0 nothing is drawn and the choice is certain.
    """
    if sampler.temperature == 0:
        return torch.zeros(len(score_NL), device=logits_KV.device)
    bar_N = torch.where(chosen_NL, score_NL, torch.inf).amin(dim=1)
    place_L = torch.arange(score_NL.shape[1], device=score_NL.device)
    at_bar_NL = chosen_NL & (score_NL == bar_N[:, None])
    last_N = torch.where(at_bar_NL, place_L, -1).amax(dim=1)
    row_K, position_K = window_NL.nonzero(as_tuple=True)
    rest_K = ~chosen_NL[window_NL]
    rows = row_K[rest_K]
    tail = tail_logprob(
        logits_KV[rest_K],
        bar_N[rows],
        position_K[rest_K] > last_N[rows],
        temperature=sampler.temperature,
        score_temperature=sampler.score_temperature,
        banned=banned,
    )
    return torch.zeros(len(bar_N), device=tail.device, dtype=tail.dtype).index_add(0, rows, tail)
