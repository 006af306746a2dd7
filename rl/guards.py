"""What a run does when it goes wrong: an update that is refused leaves its batch, an alarm is told and may stop it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .alarms import ALARM
from .checkpoints import plan_path, save_plan
from .distributed import gather_objects, rank
from .losses import NonFiniteError, RatioError
from .records import write_rollouts

if TYPE_CHECKING:
    from .trainer import UnmaskTrainer


class AlarmError(ValueError):
    """A run that an alarm has stopped, as its recipe asks; the message names cause and batch."""


@contextlib.contextmanager
def batch_kept(trainer: UnmaskTrainer, step: int) -> Iterator[None]:
    """Save the batch of update `step` (from 0) where a number refuses it, and name the folder in the error."""
    try:
        yield
    except (NonFiniteError, RatioError) as error:
        raise type(error)(f"{error} {save_batch(trainer, step)}") from error


def save_batch(trainer: UnmaskTrainer, step: int) -> str:
    """Write this rank's share of the batch in flight to the run's folder, and return a sentence that names the place.

    `failed-N` (N: update, from 0) gets the rollouts as `unmask view` reads them, except after a resume between two
    inner steps, and the plan of the update as a checkpoint holds it.
    """
    folder = trainer.folder / f"failed-{step:06}"
    plan = trainer.plans[step % trainer.args.num_iterations % len(trainer.plans)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_plan(plan_path(folder, rank()), plan)
        if trainer.batch is not None:
            write_rollouts(folder, trainer.batch, step, rank())
    except (OSError, SafetensorError) as error:
        return f"The batch of update {step + 1} could not be saved to {folder} ({error})."
    return f"The batch of update {step + 1} is in {folder}."


def sounded(trainer: UnmaskTrainer, record: dict[str, Any]) -> dict[str, Any]:
    """Return what the alarms say that begin with a record, under its keys, and warn; every rank must call this."""
    step, alarms = trainer.state.global_step, trainer.alarms
    new: dict[str, str] = {}
    if rank() == 0:
        new = alarms.hear({"step": step, **record})
        for name, text in new.items():
            trainer.progress.warn(f"alarm at update {step}, {name}: {text}")
    # The first rank has the history; the others follow it.
    new, alarms.on = gather_objects((new, alarms.on))[0]
    return {f"{ALARM}{name}": text for name, text in new.items()}


def stop_if_asked(trainer: UnmaskTrainer) -> None:
    """Raise AlarmError while an alarm holds that is to stop the run, and there is something left to stop."""
    step = trainer.state.global_step
    for name, text in trainer.alarms.stopping().items():
        if 0 < step < trainer.state.max_steps and trainer.plans:
            raise AlarmError(
                f"update {step}: {text}; alarms.{name}.stop ended the run. {save_batch(trainer, step - 1)}"
            )
