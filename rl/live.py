"""`unmask sample --live`: a group's canvases side by side in the terminal while they are being unmasked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text
from torch import Tensor

SHADES = ("grey50", "cyan", "bright_cyan", "green", "bright_green", "yellow", "bright_yellow", "magenta")
MASKED = "·"


@dataclass
class Canvas:
    """One rollout as it grows: its tokens, the step that decided each (-1: masked), and the tokens just taken back."""

    tokens: list[int] = field(default_factory=list)
    born: list[int] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)
    given: set[int] = field(default_factory=set)
    retracted: int = 0

    def advance(self, tokens: Sequence[int], step: int, mask: int) -> None:
        """Take the canvas after step `step` (counted from 0)."""
        before = self.tokens or [mask] * len(tokens)
        past = self.born or [-1] * len(tokens)
        # A canvas may have grown; what is new was masked before.
        before = [*before, *[mask] * (len(tokens) - len(before))]
        past = [*past, *[-1] * (len(tokens) - len(past))]
        self.taken = {i for i, token in enumerate(tokens) if token == mask and before[i] != mask}
        changed = [token != old and old != mask for token, old in zip(tokens, before, strict=False)]
        self.retracted += sum(changed)
        self.born = [
            -1 if token == mask else (past[i] if token == before[i] else step) for i, token in enumerate(tokens)
        ]
        self.tokens = list(tokens)


class LiveView:
    """Draws several canvases after each step, `speed` steps a second at most; without a terminal the last state alone.

    Colours run from the first decided tokens to the last, given tokens are bold, a place whose token was just taken
    back is red.
    """

    def __init__(self, tokenizer: Any, mask_token_id: int, console: Console, *, speed: float, given_BL: Tensor) -> None:
        self.tokenizer, self.mask, self.console, self.pause_s = tokenizer, mask_token_id, console, 1.0 / speed
        self.canvases = [
            Canvas(tokens=row, given={i for i, token in enumerate(row) if token != mask_token_id})
            for row in given_BL.tolist()
        ]
        self.step = 0
        self.live = Live(console=console, auto_refresh=False, screen=False) if console.is_terminal else None

    def __enter__(self) -> LiveView:
        if self.live is not None:
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*error)
        elif self.step:
            self.console.print(self.picture())

    def draw(self, tokens_BL: Tensor) -> None:
        """Take and show the canvases after one more step."""
        for canvas, tokens in zip(self.canvases, tokens_BL.tolist(), strict=True):
            canvas.advance(tokens, self.step, self.mask)
        self.step += 1
        if self.live is not None:
            self.live.update(self.picture(), refresh=True)
            time.sleep(self.pause_s)

    def picture(self) -> RenderableType:
        """Return what is shown now: a panel a canvas, and a line of sums."""
        count = len(self.canvases)
        width = max(24, self.console.width // min(count, max(1, self.console.width // 36)) - 2)
        panels = [Panel(self._text(canvas), title=self._title(canvas), width=width) for canvas in self.canvases]
        left = sum(token == self.mask for canvas in self.canvases for token in canvas.tokens)
        all_ = sum(len(canvas.tokens) for canvas in self.canvases)
        back = sum(canvas.retracted for canvas in self.canvases)
        sums = f"step {self.step}  decided {all_ - left} of {all_}" + (f"  taken back {back}" if back else "")
        return Group(Columns(panels), Text(sums, style="dim"), ProgressBar(total=all_, completed=all_ - left))

    def _title(self, canvas: Canvas) -> str:
        left = sum(token == self.mask for token in canvas.tokens)
        return f"{len(canvas.tokens) - left}/{len(canvas.tokens)}"

    def _text(self, canvas: Canvas) -> Text:
        picture = Text(overflow="fold")
        for position, (token, born) in enumerate(zip(canvas.tokens, canvas.born, strict=True)):
            if token == self.mask:
                picture.append(MASKED, style="bold red" if position in canvas.taken else "dim")
                continue
            style = SHADES[min(max(born, 0) * len(SHADES) // max(self.step, 1), len(SHADES) - 1)]
            if position in canvas.given and born < 0:
                style = "bold underline"
            text = "∎" if token == self.tokenizer.eos_token_id else self.tokenizer.decode([token])
            picture.append(text, style=style)
        return picture
