"""Keyed noise: pinned values, uniformity, independence of streams, and nothing but the keys decides a number."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from torch import Tensor

from unmask.rollouts import noise
from unmask.rollouts.noise import generator, uniform

WORD = 2**64


def keys(*values: int) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


def mix(x: int) -> int:
    """SplitMix64's finaliser on Python's whole numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def uniform_by_hand(seed: int, purpose: str, step: int, *ids: int) -> float:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    state, gamma = int.from_bytes(digest, "little") >> 1, 0x9E3779B97F4A7C15
    for key in ids:
        state = mix(((state ^ mix((key * gamma + 1) % WORD)) + gamma) % WORD)
    return ((state >> 12) + 0.5) / 2**52


# A change of any of these changes every rollout of every seed, published results and resumed runs included.
@pytest.mark.parametrize(
    ("seed", "purpose", "step", "ids", "value"),
    [
        (0, "draw", 0, (0, 0, 0), "0x1.f56a00f6b2d3ep-2"),
        (1, "draw", 5, (3, 7, 11), "0x1.eca649dcc623cp-3"),
        (1, "score", 5, (3, 7, 11), "0x1.3feb318799df7p-1"),
        (2**40, "draw", -1, (12345, 63, 255), "0x1.a7b33920ef5a8p-4"),
    ],
)
def test_pinned_values(seed: int, purpose: str, step: int, ids: tuple[int, ...], value: str) -> None:
    assert uniform(seed, purpose, step, *keys(*ids)).item() == float.fromhex(value)


def test_pinned_generator() -> None:
    drawn = torch.randint(2**31, (4,), generator=generator(1, "sft-mask", 2, 3)).tolist()
    assert drawn == [2008985922, 1757887542, 1826653999, 2102993559]


def test_equals_the_algorithm_on_whole_numbers() -> None:
    """int64 arithmetic that wraps, and its arithmetic shift, give what unsigned 64-bit words give."""
    rng = torch.Generator().manual_seed(0)
    row_K, time_K = torch.randint(2**40, (500,), generator=rng), torch.randint(512, (500,), generator=rng)
    found_K = uniform(7, "draw", 3, row_K, time_K)
    expected = [uniform_by_hand(7, "draw", 3, r, t) for r, t in zip(row_K.tolist(), time_K.tolist(), strict=True)]
    assert found_K.tolist() == expected


def grid(seed: int = 0, purpose: str = "draw", step: int = 0) -> Tensor:
    """Return the uniforms of 64 rollouts x 32 denoising steps x 256 positions."""
    axes = [torch.arange(64)[:, None, None], torch.arange(32)[None, :, None], torch.arange(256)[None, None]]
    return uniform(seed, purpose, step, *axes)


def test_values_are_uniform() -> None:
    """Half a million consecutive keys: mean, and Pearson's statistic on 256 cells, on 16 x 16 cells of neighbours."""
    u = grid()
    n = u.numel()
    assert abs(u.mean().item() - 0.5) < 5 * (12 * n) ** -0.5
    cells = torch.histc(u, 256, 0, 1)
    assert ((cells - n / 256).square() / (n / 256)).sum().item() < 255 + 5 * (2 * 255) ** 0.5
    for axis in range(3):
        here, there = u.narrow(axis, 0, u.shape[axis] - 1), u.narrow(axis, 1, u.shape[axis] - 1)
        pair = ((here * 16).long() * 16 + (there * 16).long()).flatten().bincount(minlength=256).double()
        mean = here.numel() / 256
        assert ((pair - mean).square() / mean).sum().item() < 255 + 5 * (2 * 255) ** 0.5, f"axis {axis}"


@pytest.mark.parametrize("other", [{"seed": 1}, {"purpose": "score"}, {"step": 1}])
def test_streams_are_independent(other: dict) -> None:
    here, there = grid().flatten(), grid(**other).flatten()
    correlation = torch.corrcoef(torch.stack([here, there]))[0, 1].item()
    assert abs(correlation) < 5 * len(here) ** -0.5
    assert (here == there).sum().item() == 0


def test_every_key_and_its_place_count() -> None:
    values = [uniform(0, "draw", 0, *keys(*ids)).item() for ids in itertools.product(range(4), repeat=3)]
    assert len(set(values)) == 64
    assert uniform(0, "draw", 0, *keys(1)).item() != uniform(0, "draw", 0, *keys(1, 0)).item()
    # Words are joined with a separator, so that neighbours cannot run into one another.
    assert uniform(1, "draw", 11, *keys(0)).item() != uniform(11, "draw", 1, *keys(0)).item()


def test_a_number_depends_on_its_keys_alone() -> None:
    whole = grid()
    rows = torch.tensor([5, 63, 17])
    part = uniform(0, "draw", 0, rows[:, None], torch.tensor(3), torch.arange(256)[None])
    assert torch.equal(part, whole[rows, 3])
    assert uniform(0, "draw", 0, *keys(17, 3, 200)).item() == whole[17, 3, 200].item()
    small, large = torch.arange(4, dtype=torch.int32), torch.arange(4)
    assert torch.equal(uniform(0, "draw", 0, small), uniform(0, "draw", 0, large))


@pytest.mark.parametrize(("word", "value"), [(0, 2.0**-53), (-1, 1 - 2.0**-53)])
def test_the_ends_are_never_reached(word: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of no set bit and one of 64 set bits; with 53 bits kept the latter would round to 1."""
    monkeypatch.setattr(noise, "_mix", lambda x: torch.full_like(x, word))
    u = uniform(0, "draw", 0, *keys(0)).item()
    assert u == value
    assert 0 < u < 1


def test_generators_differ_by_every_key_and_leave_the_global_one() -> None:
    before = torch.get_rng_state()
    calls = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    drawn = {tuple(torch.rand(4, generator=generator(*call)).tolist()) for call in calls}
    uniform(0, "draw", 0, torch.arange(10))
    assert len(drawn) == len(calls)
    assert torch.equal(torch.get_rng_state(), before)
