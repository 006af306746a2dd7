"""`unmask bench estimators`: bias, variance and cost of every estimator, on a model that is enumerated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..recipes.loading import defaults, import_parts
from ..recipes.registry import SLOTS
from ..rollouts.noise import generator, uniform
from .enumerable import Tabular
from .estimators import most_canvases
from .replay import replay
from .runfolder import manifest
from .views import Views

# Every estimator, with as many canvases as come near to eight where it has a number to set.
CHOICES: tuple[dict[str, Any], ...] = (
    {"name": "trace"},
    {"name": "trace", "steps": "uniform_k", "k": 2},
    {"name": "left_to_right"},
    {"name": "left_to_right", "steps": "uniform_k", "k": 2},
    {"name": "fully_masked"},
    {"name": "random_mask", "draws": 1},
    {"name": "random_mask", "draws": 8},
    {"name": "random_mask", "draws": 8, "draw": "independent"},
    {"name": "random_mask", "draws": 8, "draw": "bernoulli"},
    {"name": "random_mask", "draws": 1, "draw": "ladder"},
    {"name": "antithetic", "draws": 4},
    {"name": "coupled"},
    {"name": "coupled", "normalised": True},
    {"name": "blockwise", "size": 2, "draws": 8, "drop": 0.0},
    {"name": "quadrature", "nodes": 2, "masks": 4},
    {"name": "quadrature", "nodes": 4, "masks": 2},
)


def bench_estimators(
    *,
    vocabulary: int = 3,
    length: int = 4,
    scale: float = 1.0,
    replicates: int = 400,
    seed: int = 0,
    choices: Sequence[dict[str, Any]] = CHOICES,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return for each estimator its error as log-likelihood and as policy gradient, over `replicates` draws.

    All `vocabulary ** length` completions are weighed by their exact probability under the sampler that draws one token
    a step from left to right; only the estimators draw. Likelihood: bias against that log p and against the ELBO, and
    the standard deviation of one estimate. Gradient: of E[r] for a random reward table, from A x the gradient of the
    estimate with A = r - E[r]: relative bias |E g - g*| / |g*| with its standard error, cosine of E g and g*, and the
    relative standard deviation of one batch in which each completion stands once, sqrt(E |g - E g|^2) / |g*|.
    """
    import_parts("estimator")
    model = Tabular(vocabulary=vocabulary, length=length, scale=scale, seed=seed)
    tokens_CL = model.completions()
    logp_C = model.left_to_right(tokens_CL).sum(1)
    chance_C = logp_C.exp().detach()
    reward_C = uniform(seed, "reward", 0, torch.arange(len(tokens_CL)))
    weight_C = chance_C * (reward_C - chance_C @ reward_C)
    exact = _gradient(model, weight_C @ logp_C)
    with torch.no_grad():
        elbo_C = model.elbo(tokens_CL)
    rows = []
    for choice in choices:
        rows.append(_row(model, choice, tokens_CL, weight_C, chance_C, (logp_C.detach(), elbo_C, exact), replicates))
        progress(f"{_words(choice)}: {rows[-1]['canvases']} canvases, gradient bias {rows[-1]['gradient_bias']:.3f}")
    return {
        "model": {"vocabulary": vocabulary, "length": length, "scale": scale, "seed": seed},
        "replicates": replicates,
        "elbo_gap": float(chance_C @ (logp_C.detach() - elbo_C)),
        "rows": rows,
        "manifest": manifest(device="cpu", dtype="float64", seeds={"model": seed}),
    }


def _gradient(model: Tabular, value: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value, model.table)
    return gradient.flatten()


def _row(
    model: Tabular,
    choice: dict[str, Any],
    tokens_CL: Tensor,
    weight_C: Tensor,
    chance_C: Tensor,
    exact: tuple[Tensor, Tensor, Tensor],
    replicates: int,
) -> dict[str, Any]:
    """Return the errors of one estimator."""
    logp_C, elbo_C, gradient = exact
    estimator, count = SLOTS["estimator"].build(choice), len(tokens_CL)
    estimates, gradients = [], []
    for number in range(replicates):
        trajectory = model.trajectory(tokens_CL, torch.arange(count) + number * count)
        views = estimator(trajectory, rng=generator(model.length, "bench", number), inner_step=(0, 1))
        estimate_C = _estimate(views, replay(model, views).logprob_A)
        gradients.append(_gradient(model, weight_C @ estimate_C))
        estimates.append(estimate_C.detach())
    estimate_RC, gradient_RP = torch.stack(estimates), torch.stack(gradients)
    mean_P, norm = gradient_RP.mean(0), gradient.norm()
    spread = (gradient_RP - mean_P).square().sum(1).mean().sqrt()
    knobs = defaults("estimator", choice["name"]) | choice
    return {
        "estimator": choice,
        "canvases": most_canvases(knobs, model.length, model.length),
        "bias_logp": float(chance_C @ (estimate_RC.mean(0) - logp_C)),
        "bias_elbo": float(chance_C @ (estimate_RC.mean(0) - elbo_C)),
        "stderr": float((estimate_RC @ chance_C).std() / replicates**0.5),
        "deviation": float((chance_C @ estimate_RC.var(0)).sqrt()),
        "gradient_bias": float((mean_P - gradient).norm() / norm),
        "gradient_stderr": float(spread / norm / replicates**0.5),
        "gradient_cosine": float(mean_P @ gradient / (mean_P.norm() * norm)),
        "gradient_deviation": float(spread / norm),
    }


def _estimate(views: Views, logprob_K: Tensor) -> Tensor:
    """Return each rollout's estimate: factor x log-prob / inclusion, a mean over draws."""
    factor_K = logprob_K.new_ones(len(logprob_K)) if views.factor_K is None else views.factor_K.double()
    value_K = logprob_K * factor_K / views.inclusion_N[views.view_K] / views.draws
    return logprob_K.new_zeros(len(views.trajectory)).index_add(0, views.row_K, value_K)


def _words(choice: dict[str, Any]) -> str:
    knobs = ", ".join(f"{key} {value}" for key, value in choice.items() if key != "name")
    return f"{choice['name']} ({knobs})" if knobs else choice["name"]


WIDTH = 140  # columns that its table fills


def summary_table(found: dict[str, Any]) -> Table:
    """Return the errors as a table to print."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("estimator", overflow="fold")
    headings = ("canvases", "- log p", "- ELBO", "deviation", "gradient bias", "cosine", "gradient deviation")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in found["rows"]:
        error = row["stderr"]
        table.add_row(
            _words(row["estimator"]),
            str(row["canvases"]),
            f"{row['bias_logp']:+.3f} ± {error:.3f}",
            f"{row['bias_elbo']:+.3f} ± {error:.3f}",
            f"{row['deviation']:.2f}",
            f"{row['gradient_bias']:.3f} ± {row['gradient_stderr']:.3f}",
            f"{row['gradient_cosine']:.3f}",
            f"{row['gradient_deviation']:.2f}",
        )
    return table


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw gradient bias against gradient deviation, a point an estimator, its size the canvases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    floor = 1e-3
    for number, row in enumerate(found["rows"]):
        x, y = max(row["gradient_deviation"], floor), max(row["gradient_bias"], floor)
        marker = "o^sDvP*X"[number % 8]
        axes.scatter(x, y, s=20 + 12 * row["canvases"], marker=marker, label=_words(row["estimator"]))
    axes.set(xscale="log", yscale="log", xlabel="deviation of a batch's gradient / its exact norm")
    axes.set_ylabel("bias of the gradient / its exact norm")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
