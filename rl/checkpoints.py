"""Checkpoints that hold the plan in flight and count only once they are complete."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from ..rollouts.sampler import Sampler
from .distributed import barrier, rank, world_size
from .joint import POSITIONS, AnyPlan, Joint, JointPlan
from .plan import Plan
from .planning import StepPlan
from .runfolder import write_json
from .sharding import load_sharded, save_moments
from .tensorfiles import trajectory_of, trajectory_tensors

if TYPE_CHECKING:
    from .trainer import UnmaskTrainer

MARKER = "unmask.json"  # written last: a folder without it was interrupted and is not resumed from
# torch.save and torch.load report a full disk and a cut-off file as RuntimeErrors that name these classes.
TORCH_FILES = ("PytorchStreamWriter", "PytorchStreamReader", "inline_container")
FILE_ERRORS = (OSError, SafetensorError, EOFError, pickle.UnpicklingError, json.JSONDecodeError, RuntimeError)


class CheckpointWriteError(ValueError):
    """A checkpoint that could not be written (full disk, rights); earlier ones are intact."""


class CheckpointReadError(ValueError):
    """A checkpoint that is damaged, incomplete, or of another kind of run; the message names a remedy."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first."""
    found = [path for path in _checkpoints(folder) if (path / MARKER).is_file()]
    return sorted(found, key=_step)


def discard_incomplete(folder: Path) -> None:
    """Remove checkpoint folders that an interrupted process left unfinished."""
    for path in _checkpoints(folder):
        if not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]


def checkpoint_to_resume(path: Path) -> Path:
    """Return the newest complete checkpoint of a run's folder, or `path` itself when it is one.

    Raises CheckpointReadError when there is none, or when the one that is named was interrupted.
    """
    own = path.name.startswith("checkpoint-")
    folder = path.parent if own else path
    found = complete_checkpoints(folder)
    if own and path not in found:
        state = "was interrupted while it was written" if path.is_dir() else "does not exist"
        others = f"complete ones: {', '.join(p.name for p in found)}" if found else "start the run anew"
        raise CheckpointReadError(f"checkpoint: '{path}' {state}; {others}.")
    if not found:
        state = "holds no complete checkpoint" if folder.is_dir() else "is no folder"
        raise CheckpointReadError(f"checkpoint: '{folder}' {state}; set run.save_every, or start the run anew.")
    return path if own else found[-1]


def starting_point(folder: Path, resume: str | bool | None, *, sharded: bool = False) -> Path | None:
    """Return the checkpoint that a run in `folder` goes on from, None for a new run; leftovers of a resumed one go.

    `resume` is True (the newest) or a folder. Raises CheckpointReadError as `checkpoint_to_resume` does, when a new run
    would write among the checkpoints of an earlier one, and when the model that would read it is `sharded` already.
    """
    if not resume:
        if found := complete_checkpoints(folder):
            raise CheckpointReadError(
                f"{folder}: holds {found[-1].name} of an earlier run; call train(resume_from_checkpoint=True), or set "
                "another output_dir."
            )
        return None
    if sharded:
        raise CheckpointReadError(f"{folder}: this process has sharded its model already; resume in a new one.")
    checkpoint = checkpoint_to_resume(folder if resume is True else Path(resume))
    if rank() == 0:
        discard_incomplete(folder)
    return checkpoint


def plan_path(folder: Path, rank: int, inner: int = 0) -> Path:
    """Return the file of a rank's plan inside a checkpoint; `inner` counts where each inner step has one of its own."""
    return folder / (f"plan-{rank}-{inner}.safetensors" if inner else f"plan-{rank}.safetensors")


def save_plan(path: Path, plan: AnyPlan) -> None:
    """Write a rank's plan with its trajectory."""
    tensors = {f"plan.{name}": value.contiguous() for name, value in plan.tensors().items()}
    recorded, constants = trajectory_tensors(plan.trajectory)
    save_file(tensors | recorded, path, metadata={"constants": json.dumps(constants)})


def load_plan(path: Path, sampler: Sampler, device: torch.device | str = "cpu") -> AnyPlan | None:
    """Return the plan that `save_plan` wrote, or None when there is no such file; CheckpointReadError if damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            constants: dict[str, Any] = json.loads(file.metadata()["constants"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        planned = {key.removeprefix("plan."): value for key, value in tensors.items() if key.startswith("plan.")}
        joint = any(name.startswith(POSITIONS) for name in planned)
        kind: type[AnyPlan] = JointPlan if joint else Plan if "weight_K" in planned else StepPlan
        return kind.from_tensors(trajectory_of(tensors, constants), sampler, planned)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointReadError(f"{path}: damaged ({error}); resume from an earlier checkpoint.") from error


def finish_checkpoint(folder: Path, *, step: int, keep: int, records: dict[str, int] | None = None) -> None:
    """Mark a checkpoint as complete, then remove the oldest complete ones beyond `keep`.

    `records` are the lengths in bytes of the files that a run appends to.
    """
    mark = {"step": step, "ranks": world_size(), "torch": torch.__version__, "records": records or {}}
    write_json(folder / MARKER, mark)
    _remove(complete_checkpoints(folder.parent)[:-keep])


def _remove(checkpoints: Iterable[Path]) -> None:
    for path in checkpoints:
        # The marker goes first, so that a folder which is only half removed is no checkpoint any more.
        (path / MARKER).unlink()
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def file_errors(folder: Path, reading: Callable[[], Path | None]) -> Iterator[None]:
    """Turn failures of files into CheckpointReadError while `reading()` is a checkpoint, else CheckpointWriteError.

    A checkpoint that could not be written is removed from `folder`; errors of other kinds pass unchanged.
    """
    try:
        yield
    except FILE_ERRORS as error:
        if not _concerns_files(error):
            raise
        reason, checkpoint = (str(error) or type(error).__name__).splitlines()[0], reading()
        if checkpoint is not None:
            others = [path.name for path in complete_checkpoints(checkpoint.parent) if path != checkpoint]
            remedy = f"resume from {' or '.join(others)}" if others else "start the run anew"
            raise CheckpointReadError(f"{checkpoint}: could not be read ({reason}); {remedy}.") from error
        discard_incomplete(folder)
        raise CheckpointWriteError(
            f"{folder}: could not write ({reason}); free some space, then `unmask train --resume {folder}`. Complete "
            "checkpoints are intact."
        ) from error


def _concerns_files(error: BaseException) -> bool:
    """Tell whether one of FILE_ERRORS is about a file, and not about a network or a tensor."""
    if isinstance(error, RuntimeError):
        return any(name in str(error) for name in TORCH_FILES)
    return not isinstance(error, OSError) or (
        error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
    )


class PlanKeeper(TrainerCallback):
    """Keeps checkpoints whole: adds the plan in flight, marks the folder complete, drops the oldest; resumes."""

    def __init__(self, trainer: UnmaskTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the checkpoint that Trainer has just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for inner, plan in enumerate(self.trainer.plans):
            save_plan(plan_path(folder, rank(), inner), plan)
        self.trainer.collector.save(folder)
        if self.trainer.critic is not None:
            self.trainer.critic.save(folder)
        if self.trainer.planning is not None and rank() == 0:
            self.trainer.planning.save(folder / "planner", self.trainer.denoiser)
        if self.trainer.denoiser.root is not None:
            save_moments(folder, self.trainer.denoiser.model, kwargs["optimizer"])
        barrier()
        if rank() == 0:
            records = self.trainer.records.lengths()
            finish_checkpoint(folder, step=state.global_step, keep=args.keep_checkpoints, records=records)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the plan in flight and rewind the records when the run is a resumed one."""
        checkpoint, self.trainer.plans = self.trainer.checkpoint, []
        self.trainer.collector.load(checkpoint)
        if checkpoint is not None:
            mark = {"ranks": 1, "records": {}} | json.loads((checkpoint / MARKER).read_text())
            if self.trainer.denoiser.root is not None:
                load_sharded(checkpoint, self.trainer.denoiser, kwargs["optimizer"])
            if self.trainer.critic is not None:
                self.trainer.critic.load(checkpoint)
            if isinstance(self.trainer.objective, Joint):
                self.trainer.objective.restore(checkpoint / "planner")
            if state.global_step % args.num_iterations:
                self.trainer.plans = self._plans_in_flight(checkpoint, mark["ranks"])
            if rank() == 0 and checkpoint.parent.resolve() == Path(args.output_dir).resolve():
                self.trainer.records.rewind(mark["records"])
                # What lies after the step that is resumed from will be written again.
                _remove(path for path in complete_checkpoints(checkpoint.parent) if _step(path) > state.global_step)
        self.trainer.alarms.begin(self.trainer.records.read() if rank() == 0 else [], state.global_step)
        self.trainer.begun = True

    def _plans_in_flight(self, checkpoint: Path, ranks: int) -> list[AnyPlan]:
        """Return this rank's plans; CheckpointReadError when the batch was shared among another number of ranks."""
        if ranks != world_size():
            raise CheckpointReadError(
                f"{checkpoint}: only some inner steps of its batch are done, and {ranks} process(es) share it; resume "
                f"with --nproc {ranks}, not {world_size()}."
            )
        trainer, plans = self.trainer, []
        for inner in range(trainer.args.num_iterations if trainer.objective.redraw else 1):
            path = plan_path(checkpoint, rank(), inner)
            plan = load_plan(path, trainer.sampler, trainer.denoiser.device)
            if plan is None:
                raise CheckpointReadError(f"{path}: missing; resume from an earlier checkpoint.")
            plans.append(plan)
        return plans
