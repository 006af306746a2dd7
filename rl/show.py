"""`unmask sample`: a canvas being unmasked, in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from ..recipes.registry import SLOTS
from ..rollouts.engine import denoise
from ..rollouts.trajectory import Trajectory
from ..rollouts.worker import pad_left
from .live import MASKED, SHADES, LiveView
from .settings import rewards_of
from .targets import evaluation_worker, open_target


def sample(
    target: str,
    *,
    prompt: str | None = None,
    overrides: Sequence[str] = (),
    live: bool = False,
    group: int = 1,
    speed: float = 8.0,
) -> Trajectory:
    """Denoise completions of `prompt`, or of a held-out problem, showing every step; return their trajectories.

    Colours run from the first committed tokens to the last. Without a terminal every step is one line. With `live`,
    `group` completions are side by side, `speed` steps a second at most.
    """
    recipe, denoiser = open_target(target, overrides)
    row: dict[str, Any] = {"prompt": prompt}
    rewards: Any = []
    if prompt is None:
        row = SLOTS["task"].build(recipe.task)("heldout", seed=0).row(recipe.run.seed % recipe.evaluation.problems)
        rewards = rewards_of(recipe)
    worker = evaluation_worker(recipe, denoiser, rewards)
    ids = worker.prompt(row)
    prompt_BQ, mask_BQ = pad_left([ids], denoiser.tokenizer.pad_token_id, multiple=denoiser.family.prompt_multiple)
    device, id_B = denoiser.device, torch.arange(group)
    prompt_BQ, mask_BQ = prompt_BQ.repeat(group, 1), mask_BQ.repeat(group, 1)
    canvas_BL, draft_BL, _ = worker.canvases([row] * group, id_B, step=0)
    console = Console()
    console.print(Panel(Text(str(row["prompt"])), title="prompt", title_align="left"))
    tokens, mask = denoiser.tokenizer, denoiser.family.mask_token_id
    painter: Any = _Painter(tokens, mask, console)
    if live:
        painter = LiveView(tokens, mask, console, speed=speed, given_BL=canvas_BL)
    with painter:
        trajectory = denoise(
            denoiser,
            worker.sampler,
            prompt_BQ.to(device),
            mask_BQ.to(device),
            canvas_BL.to(device),
            id_B.to(device),
            seed=recipe.run.seed,
            draft_BL=draft_BL.to(device),
            on_step=painter.draw,
        ).to("cpu")
    completion_ids, completions = worker.decode(trajectory)
    temperature = worker.sampler.temperature
    for ids, steps in zip(completion_ids, trajectory.steps_B.tolist(), strict=True):
        console.print(f"{len(ids)} tokens in {steps} steps (NFE), temperature {temperature:g}")
    if rewards:
        table = worker.scorer([row] * group, [row["prompt"]] * group, completions, completion_ids)
        for outcome, reward in zip(table.outcome, table.total_B.tolist(), strict=True):
            console.print(f"outcome: {outcome}, reward {reward:g}")
    console.print(f"next: unmask evaluate {target}", soft_wrap=True)
    return trajectory


class _Painter:
    """Draws the canvas after each step: live in a terminal, a line a step elsewhere."""

    def __init__(self, tokenizer: Any, mask_token_id: int, console: Console) -> None:
        self.tokenizer, self.mask_token_id, self.console = tokenizer, mask_token_id, console
        self.born: list[int] = []
        self.step = 0
        self.live = Live(console=console, refresh_per_second=20, transient=False) if sys.stdout.isatty() else None

    def __enter__(self) -> _Painter:
        if self.live is not None:
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*error)

    def draw(self, tokens_BL: Tensor) -> None:
        """Show the canvas of the first row."""
        tokens = tokens_BL[0].tolist()
        if not self.born:
            self.born = [-1] * len(tokens)
        self.born = [
            self.step if seen < 0 and token != self.mask_token_id else seen
            for seen, token in zip(self.born, tokens, strict=True)
        ]
        self.step += 1
        picture = self._picture(tokens)
        if self.live is None:
            line = f"{self.step:4} {picture.plain.replace(chr(10), '⏎')}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        self.live.update(Panel(picture, title=f"step {self.step}", title_align="left"))
        time.sleep(0.05)

    def _picture(self, tokens: list[int]) -> Text:
        picture = Text()
        for token, born in zip(tokens, self.born, strict=True):
            if token == self.mask_token_id:
                picture.append(MASKED, style="dim")
                continue
            shade = SHADES[min(born * len(SHADES) // max(self.step, 1), len(SHADES) - 1)]
            text = "∎" if token in (self.tokenizer.eos_token_id,) else self.tokenizer.decode([token])
            picture.append(text, style=shade)
        return picture
