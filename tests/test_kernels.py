"""The Triton kernel against the definition of the statistics pass; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

CASES = [
    {"temperature": 1.0, "score_temperature": 1.0, "banned": [7], "eos": [3]},
    {"temperature": 0.7, "score_temperature": 1.3, "banned": [7, 3], "eos": [3, 11]},
    {"temperature": 0.0, "score_temperature": 1.0, "banned": [], "eos": []},
    {"temperature": 1.5, "score_temperature": 1.0, "banned": [299], "eos": [0]},
]
SCRIPT = """
import json, sys, torch
from unmask.rollouts.kernels import fused, supports
from unmask.rollouts.measures import Request, measure
case, device = json.loads(sys.argv[1]), sys.argv[2]
needs = frozenset(("drawn", "second", "entropy", "eos"))
request = Request(case["temperature"], case["score_temperature"], tuple(case["banned"]), tuple(case["eos"]), needs)
rng = torch.Generator().manual_seed(0)
logits = torch.cat([scale * torch.randn(12, 300, generator=rng) for scale in (0.1, 2.0, 8.0, 30.0)]).to(device)
logits[3, 100:] = -torch.inf                       # whole chunks without mass
logits[5, 64:128] = -torch.inf
logits[6] = 0.0                                    # everything ties
logits[40] = 0.0
logits[40, 299] = 60.0                             # p rounds to 1, in the last chunk
logits[41, 5] = torch.nan
logits[42, 9] = torch.inf
uniform = torch.rand(48, generator=rng, dtype=torch.float64).to(device)
uniform[:3] = torch.tensor([2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
current = torch.randint(0, 300, (48,), generator=rng).to(device)
assert supports(logits, request)
found = fused(logits, uniform, request, current, width=64)
wanted = measure(logits.clone(), uniform, request, current)
good = wanted.confidence.isfinite()
assert good.sum() == 46 and found.confidence.isfinite().tolist() == good.tolist()
worst = {}
for name, a, b in zip(found._fields, found, wanted):
    assert (a is None) == (b is None), name
    if a is None:
        continue
    a, b = a[good], b[good]
    if not a.is_floating_point():
        worst[name] = int((a != b).sum())
        continue
    assert torch.equal(a.isinf(), b.isinf()), name
    both = a.isfinite() & b.isfinite()
    worst[name] = float(((a - b).abs() / b.abs().clamp(min=1.0))[both].max())
print(json.dumps(worst))
"""


# The interpreter that stands in for a device takes seconds a case: two of four run every time.
@pytest.mark.parametrize(
    "case", [*CASES[:2], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[2:])], ids=str
)
def test_the_kernel_gives_the_statistics_of_the_definition(case: dict) -> None:
    """Same draws, same ids; log-probs, odds and entropy to 1e-5 of their size; NaN without a distribution.

    Chunks of 64 over 300 tokens, so that maxima, runners-up and draws lie in different chunks; scales up to p = 1.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = {**os.environ, "TRITON_INTERPRET": "0" if device == "cuda" else "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(case), device]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    worst = json.loads(done.stdout.splitlines()[-1])
    assert worst.pop("token") == 0 and worst.pop("best") == 0
    assert max(worst.values()) <= 1e-5, worst
