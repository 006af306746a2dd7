"""The benchmark of estimators: its exact numbers by other routes, and what it must find."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from unmask.rl.bench_estimators import CHOICES, bench_estimators
from unmask.rl.cli import app
from unmask.rl.enumerable import Tabular
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler

ROWS = 4000


def test_exact_numbers() -> None:
    """Probabilities sum to 1 and are those of the engine's own rollouts; the ELBO is the mean over orders."""
    model = Tabular(vocabulary=2, length=3, scale=1.0, seed=0)
    tokens_CL = model.completions()
    chance_C = model.left_to_right(tokens_CL).sum(1).exp()
    assert chance_C.sum().item() == pytest.approx(1.0)
    sampler = build_sampler({"schedule": {"name": "blocks", "size": 1, "per_step": 1}, "eos": {"rule": "none"}})
    prompt_BQ, canvas_BL = torch.zeros(ROWS, 1, dtype=torch.long), torch.full((ROWS, 3), 2)
    drawn = denoise(model, sampler, prompt_BQ, prompt_BQ == 0, canvas_BL, torch.arange(ROWS), seed=0)
    index_B = (drawn.tokens_BL * torch.tensor([4, 2, 1])).sum(1)
    torch.testing.assert_close(drawn.logprob_BL, model.left_to_right(tokens_CL)[index_B].detach().float())
    # E over orders of the sum of log-probs is the ELBO too (likelihood_rl.md, A0.1).
    total_C = torch.zeros(len(tokens_CL), dtype=torch.float64)
    orders = list(itertools.permutations(range(3)))
    for order in orders:
        canvas_CL = torch.full_like(tokens_CL, 2)
        for place in order:
            logp_CV = model.log_probs(canvas_CL)[:, place]
            total_C += logp_CV.gather(1, tokens_CL[:, place : place + 1])[:, 0].detach() / len(orders)
            canvas_CL[:, place] = tokens_CL[:, place]
    torch.testing.assert_close(model.elbo(tokens_CL).detach(), total_C)


def test_what_is_exact_has_no_error_and_what_is_unbiased_little() -> None:
    found = bench_estimators(vocabulary=2, length=3, replicates=200, choices=[*CHOICES[:5], {"name": "antithetic"}])
    trace, sampled, ordered, _, mean_field, elbo = found["rows"]
    for row in (trace, ordered):
        assert abs(row["bias_logp"]) < 1e-6 and row["gradient_bias"] < 1e-6 and row["gradient_deviation"] < 1e-6
    assert sampled["canvases"] == 2 and sampled["gradient_bias"] < 4 * sampled["gradient_stderr"]
    assert mean_field["gradient_bias"] > 0.1 and mean_field["deviation"] == 0.0
    assert abs(elbo["bias_elbo"]) < 3 * elbo["stderr"] and elbo["bias_logp"] < -3 * elbo["stderr"]


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib (the extra `plots`)")
    plot, out = tmp_path / "plot.png", tmp_path / "out.json"
    arguments = ["--length", "2", "--vocabulary", "2", "--replicates", "2", "--plot", str(plot), "--json", str(out)]
    result = CliRunner().invoke(app, ["bench", "estimators", *arguments])
    assert result.exit_code == 0, result.output
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert len(json.loads(out.read_text())["rows"]) == len(CHOICES)
