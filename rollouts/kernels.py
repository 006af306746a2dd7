"""The statistics pass as one Triton kernel: a row of logits is read once, and one chunk of it again for the draw.

Used on CUDA where it supports the request; `measures.measure` is the definition it is tested against (in Triton's
interpreter, so also without a GPU). Importing this module needs the package `triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .measures import Request, Statistics

CHUNK = 2048
MOST_IDS = 8  # banned and EOS ids that a launch compares with


def supports(logits_KV: Tensor, request: Request) -> bool:
    """Return whether the kernel computes this request: no filter of the draw, no lists, few special ids, no float64."""
    few = len(request.banned) <= MOST_IDS and len(request.eos) <= MOST_IDS
    plain = request.top_p == 1.0 and request.top_k == 0 and "top" not in request.needs
    return plain and few and logits_KV.dtype in (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _ids_mask(column, ids_ptr, count: tl.constexpr):
    """Return which columns are among `count` ids."""
    found = column < 0
    for i in tl.static_range(count):
        found = found | (column == tl.load(ids_ptr + i))
    return found


@triton.jit
def _load(logits_ptr, offset, column, vocabulary, ids_ptr, banned: tl.constexpr):
    """Return fp32 logits of a chunk; -inf behind its end and for banned ids."""
    inside = column < vocabulary
    value = tl.load(logits_ptr + offset + column, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where(_ids_mask(column, ids_ptr, banned), -float("inf"), value)


@triton.jit
def _scan(value, place, temperature, score_temperature):
    """Return of a chunk: peak, runner-up, mass of all but the peak at both temperatures, and sum of -w ln w of those.

    Masses are multiples of the peak's. A chunk of banned tokens alone has no mass; its distances would be NaN.
    """
    peak = tl.max(value)
    first = tl.argmax(value, axis=0)
    others = tl.where(place == first, -float("inf"), value)
    safe = tl.where(peak == -float("inf"), 0.0, peak)
    gap = (others - safe) / score_temperature
    weight = tl.exp(gap)
    spread = tl.sum(tl.where(weight > 0, -weight * gap, 0.0))
    drawn = tl.sum(tl.exp((others - safe) / temperature))
    return peak, first.to(tl.int32), tl.max(others), tl.sum(weight), drawn, spread


@triton.jit
def _merge(high, rest, drawn, spread, low, low_rest, low_drawn, low_spread, temperature, score_temperature):
    """Return masses and spread of two parts of a row, the second with the lower peak, as multiples of the higher peak.

    The lower part's likeliest becomes an ordinary token, `lag` below the other's: nothing cancels where p rounds to 1.
    """
    none = low == -float("inf")
    lag = tl.where(none, 0.0, (high - low) / score_temperature)
    fall = tl.where(none, 0.0, tl.exp(-lag))
    drawn_fall = tl.where(none, 0.0, tl.exp((low - high) / temperature))
    return (
        rest + fall * (1 + low_rest),
        drawn + drawn_fall * (1 + low_drawn),
        spread + fall * (low_spread + lag * (1 + low_rest)),
    )


@triton.jit
def _draw(
    logits_ptr,
    offset,
    vocabulary,
    banned_ptr,
    peaks,
    masses,
    top,
    uniform,
    temperature,
    BANNED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_2: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the token that `uniform` decides: its chunk by the chunks' masses, then its place in the chunk."""
    number = tl.arange(0, CHUNKS_2)
    scale = tl.where(peaks == -float("inf"), 0.0, tl.exp((peaks - top) / temperature))
    reach = tl.cumsum((masses * scale).to(tl.float64), axis=0)
    target = uniform * tl.max(reach)
    chunk = tl.minimum(tl.sum(((number < CHUNKS) & (reach <= target)).to(tl.int32)), CHUNKS - 1)
    before = tl.sum(tl.where(number == chunk - 1, reach, 0.0))
    column = chunk * WIDTH + tl.arange(0, WIDTH)
    value = _load(logits_ptr, offset, column, vocabulary, banned_ptr, BANNED)
    inner = tl.cumsum(tl.exp((value - top) / temperature).to(tl.float64), axis=0)
    # Rounding may leave the target at the chunk's very end: the last token with mass takes it.
    wanted = tl.minimum(tl.maximum(target - before, 0.0), tl.max(inner) * (1 - 2.220446049250313e-16))
    return chunk * WIDTH + tl.sum((inner <= wanted).to(tl.int32))


@triton.jit
def _distance(logits_ptr, offset, column, top, banned_ptr, banned: tl.constexpr):
    """Return how far one token's logit lies below the row's largest; -inf for a banned one."""
    forbidden = tl.max(_ids_mask(column + tl.arange(0, 1), banned_ptr, banned).to(tl.int32)) > 0
    return tl.where(forbidden, -float("inf"), tl.load(logits_ptr + offset + column).to(tl.float32) - top)


@triton.jit
def _scan_row(
    logits_ptr,
    offset,
    vocabulary,
    banned_ptr,
    peaks_ptr,
    masses_ptr,
    temperature,
    score_temperature,
    BANNED: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return of a row what `_scan` returns of a chunk, and how many logits are NaN; peaks and masses are stored."""
    place = tl.arange(0, WIDTH)
    top = tl.full((), -float("inf"), tl.float32)
    second = tl.full((), -float("inf"), tl.float32)
    best = tl.full((), 0, tl.int32)
    broken = tl.full((), 0, tl.int32)
    rest = tl.full((), 0.0, tl.float32)
    drawn = tl.full((), 0.0, tl.float32)
    spread = tl.full((), 0.0, tl.float32)
    for chunk in range(CHUNKS):
        value = _load(logits_ptr, offset, chunk * WIDTH + place, vocabulary, banned_ptr, BANNED)
        broken += tl.sum((value != value).to(tl.int32))
        value = tl.where(value != value, -float("inf"), value)
        peak, first, runner, mass, drawn_mass, wide = _scan(value, place, temperature, score_temperature)
        tl.store(peaks_ptr + chunk, peak)
        tl.store(masses_ptr + chunk, drawn_mass + tl.where(peak == -float("inf"), 0.0, 1.0))
        ahead = peak > top
        second = tl.where(ahead, tl.maximum(runner, top), tl.maximum(second, peak))
        best = tl.where(ahead, chunk * WIDTH + first, best)
        rest, drawn, spread = _merge(
            tl.where(ahead, peak, top),
            tl.where(ahead, mass, rest),
            tl.where(ahead, drawn_mass, drawn),
            tl.where(ahead, wide, spread),
            tl.where(ahead, top, peak),
            tl.where(ahead, rest, mass),
            tl.where(ahead, drawn, drawn_mass),
            tl.where(ahead, spread, wide),
            temperature,
            score_temperature,
        )
        top = tl.maximum(top, peak)
    return top, best, second, rest, drawn, spread, broken


@triton.jit
def _statistics(
    logits_ptr,
    uniform_ptr,
    current_ptr,
    banned_ptr,
    eos_ptr,
    peak_ptr,
    mass_ptr,
    ids_ptr,
    floats_ptr,
    vocabulary,
    temperature,
    score_t,
    rows,
    BANNED: tl.constexpr,
    EOS: tl.constexpr,
    CURRENT: tl.constexpr,
    GREEDY: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_2: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the statistics of one row: ids `[2, rows]` and floats `[8, rows]`, in the order that `fused` reads."""
    row = tl.program_id(0)
    offset, number = row.to(tl.int64) * vocabulary, tl.arange(0, CHUNKS_2)
    peaks_ptr, masses_ptr = peak_ptr + row * CHUNKS_2, mass_ptr + row * CHUNKS_2
    top, best, second, rest, drawn_rest, spread, broken = _scan_row(
        logits_ptr, offset, vocabulary, banned_ptr, peaks_ptr, masses_ptr, temperature, score_t, BANNED, CHUNKS, WIDTH
    )
    token, logprob = best, tl.full((), 0.0, tl.float32)
    if not GREEDY:
        peaks = tl.load(peaks_ptr + number, mask=number < CHUNKS, other=-float("inf"))
        masses = tl.load(masses_ptr + number, mask=number < CHUNKS, other=0.0)
        uniform = tl.load(uniform_ptr + row)
        token = _draw(
            logits_ptr, offset, vocabulary, banned_ptr, peaks, masses, top, uniform, temperature, BANNED, CHUNKS,
            CHUNKS_2, WIDTH,
        )  # fmt: skip
        logprob = _distance(logits_ptr, offset, token, top, banned_ptr, 0) / temperature - tl.log(1 + drawn_rest)
    total = tl.log(1 + rest)
    gap = _distance(logits_ptr, offset, token, top, banned_ptr, 0) / score_t
    left = tl.where(tl.exp(gap) == 1.0, rest, 1 + rest - tl.exp(gap))
    ended = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(EOS):
        ended += tl.exp(_distance(logits_ptr, offset, tl.load(eos_ptr + i), top, banned_ptr, BANNED) / score_t)
    now = tl.full((), 0.0, tl.float32)
    if CURRENT:
        now = _distance(logits_ptr, offset, tl.load(current_ptr + row), top, banned_ptr, BANNED) / score_t - total
    broken_row = (broken > 0) | (top == -float("inf")) | (top == float("inf"))
    tl.store(ids_ptr + row, token.to(tl.int64))
    tl.store(ids_ptr + rows + row, best.to(tl.int64))
    tl.store(floats_ptr + row, logprob)
    tl.store(floats_ptr + rows + row, tl.where(broken_row, float("nan"), -total))
    tl.store(floats_ptr + 2 * rows + row, -tl.log(rest))
    tl.store(floats_ptr + 3 * rows + row, gap - tl.log(left))
    tl.store(floats_ptr + 4 * rows + row, (second - top) / score_t - total)
    tl.store(floats_ptr + 5 * rows + row, total + spread / (1 + rest))
    tl.store(floats_ptr + 6 * rows + row, tl.log(ended) - total)
    tl.store(floats_ptr + 7 * rows + row, now)


def fused(
    logits_KV: Tensor, uniform_K: Tensor, request: Request, current_K: Tensor | None = None, *, width: int = CHUNK
) -> Statistics:
    """Return what `measures.measure` returns, from one read of `logits_KV`, which stays as it is."""
    rows, vocabulary = logits_KV.shape
    device = logits_KV.device
    chunks = triton.cdiv(vocabulary, width)
    padded = triton.next_power_of_2(chunks)
    peak, mass = (torch.empty(rows, padded, device=device) for _ in range(2))
    ids = torch.empty(2, rows, dtype=torch.long, device=device)
    floats = torch.empty(8, rows, device=device)

    def listed(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values or (-1,), device=device, dtype=torch.long)

    _statistics[(rows,)](
        logits_KV.contiguous(),
        uniform_K,
        ids[0] if current_K is None else current_K,
        listed(request.banned),
        listed(request.eos),
        peak,
        mass,
        ids,
        floats,
        vocabulary,
        request.temperature or 1.0,
        request.score_temperature,
        rows,
        BANNED=len(request.banned),
        EOS=len(request.eos),
        CURRENT=current_K is not None,
        GREEDY=request.temperature == 0,
        CHUNKS=chunks,
        CHUNKS_2=padded,
        WIDTH=width,
    )
    needs = request.needs
    logprob, confidence, odds, drawn, second, entropy, eos, current = floats
    return Statistics(
        token=ids[0],
        logprob=logprob,
        best=ids[1],
        confidence=confidence,
        odds=odds,
        drawn=drawn if "drawn" in needs else None,
        second=second if "second" in needs else None,
        entropy=entropy if "entropy" in needs else None,
        eos=eos if "eos" in needs and request.eos else None,
        current=current if current_K is not None else None,
    )
