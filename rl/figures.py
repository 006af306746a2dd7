"""The curves of a run's report: matplotlib draws them as SVG, in colours that the page's style sheet decides."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..recipes.registry import RecipeError

BINS = 300  # points of a line at most; more steps are drawn as means with the range between least and largest
COLUMNS = 3  # names of curves beside each other
# Stand-ins that no curve has by chance, replaced by the style sheet's variables: one drawing serves light and dark.
INK, SOFT, LINE = "#010203", "#010204", "#010205"
SERIES = ("#010210", "#010211", "#010212", "#010213", "#010214", "#010215")
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line"} | {colour: f"--s{i}" for i, colour in enumerate(SERIES)}


@dataclass(frozen=True)
class Curve:
    """A line: its name, steps, values and, where they are known, standard errors."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float] | None = None


@dataclass(frozen=True)
class Figure:
    """One drawing of curves that share a scale; `note` says what good looks like."""

    title: str
    curves: list[Curve] = field(default_factory=list)
    note: str = ""
    log: bool = False
    level: float | None = None


def draw(figure: Figure) -> str:
    """Return a figure as an SVG element; RecipeError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise RecipeError("report: needs matplotlib; pip install 'unmask[plots]'.") from error
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure.title,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": SOFT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "grid.color": LINE,
    }
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(4.6, 2.5))
        names = math.ceil(len(figure.curves) / COLUMNS) if len(figure.curves) > 1 else 0
        # Fixed margins: a layout that measures every label would draw each figure twice.
        axes = canvas.add_axes((0.12, 0.17, 0.865, 0.79 - 0.08 * names))
        if figure.log:
            axes.set_yscale("log")
        for number, curve in enumerate(figure.curves):
            _line(axes, curve, SERIES[number % len(SERIES)], log=figure.log)
        if figure.level is not None:
            axes.axhline(figure.level, color=SOFT, linewidth=0.8, linestyle=":")
        axes.minorticks_off()
        axes.locator_params(axis="x" if figure.log else "both", nbins=5)
        if not figure.log:
            axes.ticklabel_format(axis="y", scilimits=(-2, 5))
        axes.grid(linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step", labelpad=1)
        if names:
            place: Any = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": COLUMNS, "borderaxespad": 0.1}
            axes.legend(frameon=False, fontsize=8, labelcolor=INK, handlelength=1.2, **place)
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), figure.title)


def _line(axes: Any, curve: Curve, colour: str, *, log: bool) -> None:
    """Draw a curve, thinned to bins where it has many points, with its errors or the range of its bins."""
    points = [
        (step, value, error)
        for step, value, error in zip(curve.steps, curve.values, curve.errors or [0.0] * len(curve.steps), strict=True)
        if math.isfinite(value) and not (log and value <= 0)
    ]
    width = max(1, math.ceil(len(points) / BINS))
    bins = [points[start : start + width] for start in range(0, len(points), width)]
    steps = [sum(p[0] for p in part) / len(part) for part in bins]
    means = [sum(p[1] for p in part) / len(part) for part in bins]
    axes.plot(
        steps, means, color=colour, linewidth=1.4, label=curve.name, marker="o" if len(steps) < 30 else None, ms=3
    )
    if curve.errors is not None or width > 1:
        low = [min(p[1] - 1.96 * p[2] for p in part) for part in bins]
        high = [max(p[1] + 1.96 * p[2] for p in part) for part in bins]
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def _inline(text: str, title: str) -> str:
    """Return the svg element alone, for the inside of a page: no fixed size, colours of the page, a spoken name."""
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    # Groups are named alike in every figure, and nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
