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
    score_temperature,
    rows,
    BANNED: tl.constexpr,
    EOS: tl.constexpr,
    CURRENT: tl.constexpr,
    GREEDY: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_2: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    offset = row.to(tl.int64) * vocabulary
    top = tl.full((), -float("inf"), tl.float32)
    second = tl.full((), -float("inf"), tl.float32)
    best = tl.full((), 0, tl.int32)
    # Sums over all tokens but the likeliest so far, as multiples of its mass: nothing cancels where p rounds to 1.
    rest = tl.full((), 0.0, tl.float32)
    drawn_rest = tl.full((), 0.0, tl.float32)
    spread = tl.full((), 0.0, tl.float32)
    broken = tl.full((), 0, tl.int32)
    for chunk in range(CHUNKS):
        column = chunk * WIDTH + tl.arange(0, WIDTH)
        value = _load(logits_ptr, offset, column, vocabulary, banned_ptr, BANNED)
        broken += tl.sum((value != value).to(tl.int32))
        value = tl.where(value != value, -float("inf"), value)
        peak = tl.max(value)
        place = tl.argmax(value, axis=0).to(tl.int32) + chunk * WIDTH
        others = tl.where(column == place, -float("inf"), value)
        runner = tl.max(others)
        # A chunk of banned tokens alone has no mass; its distances would be NaN.
        safe = tl.where(peak == -float("inf"), 0.0, peak)
        gap = (others - safe) / score_temperature
        weight = tl.exp(gap)
        chunk_rest = tl.sum(weight)
        chunk_spread = tl.sum(tl.where(weight > 0, -weight * gap, 0.0))
        drawn_weight = tl.sum(tl.exp((others - safe) / temperature))
        tl.store(peak_ptr + row * CHUNKS_2 + chunk, peak)
        tl.store(mass_ptr + row * CHUNKS_2 + chunk, drawn_weight + tl.where(peak == -float("inf"), 0.0, 1.0))
        ahead = peak > top
        low = tl.where(ahead, top, peak)
        high = tl.where(ahead, peak, top)
        lag = tl.where(low == -float("inf"), 0.0, (high - low) / score_temperature)
        fall = tl.where(low == -float("inf"), 0.0, tl.exp(-lag))
        drawn_fall = tl.where(low == -float("inf"), 0.0, tl.exp((low - high) / temperature))
        low_rest = tl.where(ahead, rest, chunk_rest)
        low_spread = tl.where(ahead, spread, chunk_spread)
        low_drawn = tl.where(ahead, drawn_rest, drawn_weight)
        # Of the two parts the lower one's likeliest becomes an ordinary token, `lag` below the other's.
        rest = tl.where(ahead, chunk_rest, rest) + fall * (1 + low_rest)
        spread = tl.where(ahead, chunk_spread, spread) + fall * (low_spread + lag * (1 + low_rest))
        drawn_rest = tl.where(ahead, drawn_weight, drawn_rest) + drawn_fall * (1 + low_drawn)
        second = tl.where(ahead, tl.maximum(runner, top), tl.maximum(second, peak))
        best = tl.where(ahead, place, best)
        top = high
    total = tl.log(1 + rest)
    broken_row = (broken > 0) | (top == -float("inf")) | (top == float("inf"))
    token = best
    logprob = tl.full((), 0.0, tl.float32)
    if not GREEDY:
        number = tl.arange(0, CHUNKS_2)
        real = number < CHUNKS
        peaks = tl.load(peak_ptr + row * CHUNKS_2 + number, mask=real, other=-float("inf"))
        masses = tl.load(mass_ptr + row * CHUNKS_2 + number, mask=real, other=0.0)
        scale = tl.where(peaks == -float("inf"), 0.0, tl.exp((peaks - top) / temperature))
        reach = tl.cumsum((masses * scale).to(tl.float64), axis=0)
        whole = tl.max(reach)
        target = tl.load(uniform_ptr + row) * whole
        chunk = tl.minimum(tl.sum((real & (reach <= target)).to(tl.int32)), CHUNKS - 1)
        before = tl.sum(tl.where(number == chunk - 1, reach, 0.0))
        column = chunk * WIDTH + tl.arange(0, WIDTH)
        value = _load(logits_ptr, offset, column, vocabulary, banned_ptr, BANNED)
        inner = tl.cumsum(tl.exp((value - top) / temperature).to(tl.float64), axis=0)
        last = tl.max(inner)
        # Rounding may leave the target at the chunk's very end: the last token with mass takes it.
        wanted = tl.minimum(tl.maximum(target - before, 0.0), last * (1 - 2.220446049250313e-16))
        token = chunk * WIDTH + tl.sum((inner <= wanted).to(tl.int32))
        chosen = tl.load(logits_ptr + offset + token).to(tl.float32)
        logprob = (chosen - top) / temperature - tl.log(1 + drawn_rest)
    picked = tl.exp((tl.load(logits_ptr + offset + token).to(tl.float32) - top) / score_temperature)
    drawn = tl.log(picked) - tl.log(tl.where(picked == 1.0, rest, 1 + rest - picked))
    ended = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(EOS):
        column = tl.load(eos_ptr + i)
        forbidden = tl.max(_ids_mask(column + tl.arange(0, 1), banned_ptr, BANNED).to(tl.int32)) > 0
        value = tl.load(logits_ptr + offset + column).to(tl.float32)
        ended += tl.where(forbidden, 0.0, tl.exp((value - top) / score_temperature))
    now = tl.full((), 0.0, tl.float32)
    if CURRENT:
        column = tl.load(current_ptr + row)
        now = (tl.load(logits_ptr + offset + column).to(tl.float32) - top) / score_temperature - total
        forbidden = tl.max(_ids_mask(column + tl.arange(0, 1), banned_ptr, BANNED).to(tl.int32)) > 0
        now = tl.where(forbidden, -float("inf"), now)
    tl.store(ids_ptr + row, token.to(tl.int64))
    tl.store(ids_ptr + rows + row, best.to(tl.int64))
    tl.store(floats_ptr + row, logprob)
    tl.store(floats_ptr + rows + row, tl.where(broken_row, float("nan"), -total))
    tl.store(floats_ptr + 2 * rows + row, -tl.log(rest))
    tl.store(floats_ptr + 3 * rows + row, drawn)
    tl.store(floats_ptr + 4 * rows + row, (second - top) / score_temperature - total)
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
