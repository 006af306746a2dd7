"""One pass over the vocabulary: everything that scores, selections and draws need to know of a position."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .categorical import draw_mass

KEPT = 64  # tokens of a position whose log-probabilities `top` keeps
# Logits in one chunk of rows: 16 MB in fp32 stays in a CPU's cache, a GPU wants more work a launch.
CHUNK_ENTRIES = {"cpu": 1 << 22, "other": 1 << 27}


class Statistics(NamedTuple):
    """What one pass tells of each position; fields have one shape, `[K]` or scattered to `[A, L]`.

    p = softmax(l / score temperature), q = softmax(l / temperature), both without banned tokens; nats throughout.
    `token` is the draw from q (at temperature 0 the argmax) and `logprob` its log q (then 0). `best` is the argmax,
    `confidence` its log p, `odds` its log p/(1-p), precise where p rounds to 1. Those that a sampler asks for, else
    None: `drawn` log-odds of `token` under p, `second` log p of the second best, `entropy` H(p), `eos` log p(EOS),
    `current` log p of the token that stands on the canvas, `top` (with one dimension more) log p of the `KEPT`
    likeliest tokens, whose ids are `top_token`.
    """

    token: Tensor
    logprob: Tensor
    best: Tensor
    confidence: Tensor
    odds: Tensor
    drawn: Tensor | None = None
    second: Tensor | None = None
    entropy: Tensor | None = None
    eos: Tensor | None = None
    current: Tensor | None = None
    top: Tensor | None = None
    top_token: Tensor | None = None

    def table(self, flat_K: Tensor, rows: int, columns: int) -> Statistics:
        """Return every field as `[rows, columns]`; -inf (ids: 0) where `flat_K` does not point."""

        def scatter(value_K: Tensor | None) -> Tensor | None:
            if value_K is None:
                return None
            empty = -torch.inf if value_K.is_floating_point() else 0
            # One entry more takes the padding of static shapes.
            more = value_K.shape[1:]
            table = torch.full((rows * columns + 1, *more), empty, dtype=value_K.dtype, device=value_K.device)
            return table.index_copy(0, flat_K, value_K)[:-1].view(rows, columns, *more)

        return Statistics(*map(scatter, self))  # type: ignore[arg-type]

    @staticmethod
    def blank(rows: int, columns: int) -> Statistics:
        """Return zeros in every field, for calling parts by themselves."""
        number, ids = torch.zeros(rows, columns), torch.zeros(rows, columns, dtype=torch.long)
        found = dict.fromkeys(Statistics._fields, number) | {"token": ids, "best": ids}
        return Statistics(**found | {"top": number[..., None], "top_token": ids[..., None]})


@dataclass(frozen=True)
class Request:
    """How the pass is done: temperatures of draw and score, ids that are never drawn, filter of q, optional fields.

    `top_p` keeps the smallest set of tokens whose mass under softmax(l / temperature) reaches it, `top_k` the k best.
    """

    temperature: float
    score_temperature: float
    banned: tuple[int, ...]
    eos: tuple[int, ...] = ()
    needs: frozenset[str] = frozenset()
    top_p: float = 1.0
    top_k: int = 0


def measure(logits_KV: Tensor, uniform_K: Tensor, request: Request, current_K: Tensor | None = None) -> Statistics:
    """Return the statistics of `logits_KV` (overwritten); `uniform_K` in (0, 1), fp64, decides the draw.

    Reads the logits twice (argmax; exponentials of the distance to it) and whatever `request.needs` adds.
    """
    if request.banned:
        logits_KV.index_fill_(1, torch.tensor(request.banned, device=logits_KV.device), -torch.inf)
    top_K1, best_K1 = logits_KV.max(dim=1, keepdim=True)
    gap_KV = logits_KV.sub_(top_K1)
    mass_KV = (gap_KV / request.score_temperature).exp_()
    # Without the likeliest token the sum of the others keeps its digits where p rounds to 1.
    mass_KV.scatter_(1, best_K1, 0.0)
    others_K = mass_KV.sum(dim=1)
    total_K = torch.log1p(others_K)
    best_K, odds_K = best_K1.squeeze(1), -others_K.log()
    needs = request.needs
    second_K = None
    if "second" in needs:
        second_K = gap_KV.scatter_(1, best_K1, -torch.inf).amax(dim=1) / request.score_temperature - total_K
        gap_KV.scatter_(1, best_K1, 0.0)
    # -sum p log p with log p = log m - log total, and the likeliest token's m is 1.
    entropy_K = total_K + torch.special.entr(mass_KV).sum(dim=1) / (1 + others_K) if "entropy" in needs else None
    mass_KV.scatter_(1, best_K1, 1.0)
    eos_K = mass_KV[:, list(request.eos)].sum(dim=1).log() - total_K if "eos" in needs and request.eos else None
    if current_K is not None:
        current_K = gap_KV.gather(1, current_K[:, None]).squeeze(1) / request.score_temperature - total_K
    top_KN = top_token_KN = None
    if "top" in needs:
        top_KN, top_token_KN = gap_KV.topk(min(KEPT, gap_KV.shape[1]), dim=1)
        top_KN = top_KN / request.score_temperature - total_K[:, None]
    token_K, logprob_K = _draw(gap_KV, mass_KV, best_K, others_K, uniform_K, request)
    drawn_K = None
    if "drawn" in needs:
        drawn_K = _odds(gap_KV.gather(1, token_K[:, None]) / request.score_temperature, others_K).squeeze(1)
    # An infinite logit hides in the difference to itself; NaN, and nothing but -inf, show by themselves.
    confidence_K = torch.where(top_K1.squeeze(1).isfinite(), -total_K, torch.nan)
    return Statistics(
        token=token_K,
        logprob=logprob_K,
        best=best_K,
        confidence=confidence_K,
        odds=odds_K,
        drawn=drawn_K,
        second=second_K,
        entropy=entropy_K,
        eos=eos_K,
        current=current_K,
        top=top_KN,
        top_token=top_token_KN,
    )


def token_odds(logits_KV: Tensor, *, temperature: float = 1.0, banned: tuple[int, ...] = ()) -> Tensor:
    """Return log p(v) - log(1 - p(v)) of every token, bit for bit what `measure` gives for a drawn one."""
    if banned:
        logits_KV = logits_KV.index_fill(1, torch.tensor(banned, device=logits_KV.device), -torch.inf)
    top_K1, best_K1 = logits_KV.max(dim=1, keepdim=True)
    gap_KV = (logits_KV - top_K1) / temperature
    others_K = gap_KV.exp().scatter_(1, best_K1, 0.0).sum(dim=1)
    return _odds(gap_KV, others_K)


def _odds(gap_KN: Tensor, others_K: Tensor) -> Tensor:
    """Return the log-odds of tokens from their distance to the likeliest and the mass of all but that one."""
    others_K1, mass_KN = others_K[:, None], gap_KN.exp()
    # What a token of mass 1 leaves is the others, exactly; a tie for the likeliest has others >= 1.
    return gap_KN - torch.where(mass_KN == 1, others_K1, 1 + others_K1 - mass_KN).log()


def _draw(
    gap_KV: Tensor, mass_KV: Tensor, best_K: Tensor, others_K: Tensor, uniform_K: Tensor, request: Request
) -> tuple[Tensor, Tensor]:
    """Return (token, log q(token)); `mass_KV` is exp(gap / score temperature)."""
    if request.temperature == 0:
        return best_K, torch.zeros_like(others_K)
    if request.temperature != request.score_temperature:
        mass_KV = (gap_KV / request.temperature).exp()
        others_K = mass_KV.scatter(1, best_K[:, None], 0.0).sum(dim=1)
    if request.top_k or request.top_p < 1:
        mass_KV = filtered(mass_KV, top_p=request.top_p, top_k=request.top_k)
        others_K = mass_KV.scatter(1, best_K[:, None], 0.0).sum(dim=1)
    token_K = draw_mass(mass_KV, uniform_K)
    gap_K = gap_KV.gather(1, token_K[:, None]).squeeze(1) / request.temperature
    return token_K, gap_K - torch.log1p(others_K)


def filtered(mass_KV: Tensor, *, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Return the mass with every token outside the `top_k` likeliest and outside the nucleus `top_p` set to 0.

    The nucleus holds a token if the mass of strictly likelier ones is below `top_p` (Holtzman et al. 2020).
    """
    sorted_KV = mass_KV.sort(dim=1, descending=True).values
    inside_KV = torch.ones_like(sorted_KV, dtype=torch.bool)
    if top_k:
        inside_KV[:, top_k:] = False
    if top_p < 1:
        kept_KV = sorted_KV * inside_KV
        before_KV = kept_KV.cumsum(dim=1) - kept_KV
        inside_KV &= before_KV < top_p * kept_KV.sum(dim=1, keepdim=True)
    floor_K = torch.where(inside_KV, sorted_KV, torch.inf).amin(dim=1, keepdim=True)
    return mass_KV.masked_fill(mass_KV < floor_K, 0.0)


def chunks(rows: int, vocabulary: int, device: torch.device) -> list[tuple[int, int]]:
    """Return the spans in which logits of `rows` positions are computed, at least one."""
    size = max(1, CHUNK_ENTRIES.get(device.type, CHUNK_ENTRIES["other"]) // vocabulary)
    return [(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]


def measure_rows(
    logits: Callable[[int, int], Tensor],
    rows: int,
    vocabulary: int,
    uniform_K: Tensor,
    request: Request,
    current_K: Tensor | None = None,
) -> Statistics:
    """Return the statistics of `rows` positions, whose logits `logits(start, stop)` gives a chunk at a time.

    No K x V tensor exists: a chunk's logits are freed before the next one's are computed.
    """
    parts: list[Statistics] = []
    for start, stop in chunks(rows, vocabulary, uniform_K.device):
        current = None if current_K is None else current_K[start:stop]
        parts.append(_pass(logits(start, stop), uniform_K[start:stop], request, current))
    return parts[0] if len(parts) == 1 else Statistics(*map(_cat, zip(*parts, strict=True)))  # type: ignore[arg-type]


def _pass(logits_KV: Tensor, uniform_K: Tensor, request: Request, current_K: Tensor | None) -> Statistics:
    if logits_KV.is_cuda:
        kernels = _kernels()
        if kernels is not None and kernels.supports(logits_KV, request):
            return kernels.fused(logits_KV, uniform_K, request, current_K)
    return measure(logits_KV, uniform_K, request, current_K)


@cache
def _kernels() -> Any:
    """Return the Triton kernels, or None where a GPU has no triton."""
    return importlib.import_module(".kernels", __package__) if importlib.util.find_spec("triton") else None


def _cat(values: Sequence[Tensor | None]) -> Tensor | None:
    return None if values[0] is None else torch.cat(list(values))  # type: ignore[arg-type]
