"""The progress bar of a run: updates done, time left in updates, reward, exact rate."""

from __future__ import annotations

import logging
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """One bar over optimizer steps with an ETA; shows the latest reward, NFE and held-out exact rate."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar at the step the run starts from."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="update", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance by what was done."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest values."""
        names = {"reward/total": "reward", "rollout/nfe": "nfe", "eval/exact": "exact"}
        self.shown |= {short: f"{logs[name]:.3g}" for name, short in names.items() if name in (logs or {})}
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def warn(self, text: str) -> None:
        """Log a warning, on a line of its own; the bar is drawn again below it."""
        if self.bar is not None:
            self.bar.clear()
        logger.warning(text)

    def close(self) -> None:
        """Close the bar, if it is open; also after an error, whose message would continue the bar's line otherwise."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
