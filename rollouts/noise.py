"""Keyed randomness: every random number is a pure function of (seed, purpose, step, ids), never of call order."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the odd constant of SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _digest(*words: object) -> int:
    """Return 63 bits of a hash of `words`."""
    text = "/".join(map(str, words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, step: int, index: int = 0) -> torch.Generator:
    """Return a CPU generator keyed by (seed, purpose, step, index)."""
    return torch.Generator().manual_seed(_digest(seed, purpose, step, index))


def derived(seed: int, purpose: str, index: int = 0) -> int:
    """Return a seed keyed by (seed, purpose, index), for rollouts that are drawn again."""
    return _digest(seed, purpose, index) >> 1


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014); int64 products wrap, as the algorithm wants."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform(seed: int, purpose: str, step: int, *keys: Tensor) -> Tensor:
    """Return fp64 uniforms in (0, 1), one for each entry of the broadcast int64 `keys`.

    A counter-based generator: the number depends on its keys alone, so batch composition, device and world size do not
    change it. Values lie at the centres of 2^52 cells; one more bit would round the last centre to 1.
    """
    state = torch.tensor(_digest(seed, purpose, step), device=keys[0].device)
    for key in keys:
        state = _mix((state ^ _mix(key.to(torch.int64) * _GAMMA + 1)) + _GAMMA)
    return (_shift(state, 12).to(torch.float64) + 0.5) * 2.0**-52
