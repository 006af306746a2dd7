"""Guards of a run: an update that is refused leaves its batch, and alarms are told once, recorded, and may stop it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import shortrun
from safetensors.torch import load_file

from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.sections import AlarmsSection
from unmask.rl import run
from unmask.rl.alarms import ALARMS, Alarms
from unmask.rl.checkpoints import load_plan
from unmask.rl.guards import AlarmError
from unmask.rl.losses import NonFiniteError, RatioError
from unmask.rl.report import report
from unmask.rl.trainer import UnmaskTrainer
from unmask.rl.viewing import view

pytestmark = pytest.mark.usefixtures("place")
METRICS = {
    *("advantage/zero_share", "rollout/empty", "train/ratio_p01", "train/ratio_p50", "train/ratio_p99"),
    *("train/ratio_max_deviation", "train/clip_fraction", "train/mismatch_mean", "train/mismatch_max"),
    *("train/mismatch_p50", "train/mismatch_p99", "train/entropy", "train/kl_old"),
}


def alarms(**changes: Any) -> Alarms:
    """Return alarms of which only those named are on."""
    return Alarms(AlarmsSection.model_validate({name: changes.get(name) for name in ALARMS}))


def heard(own: Alarms, records: list[dict[str, Any]]) -> list[int]:
    """Return the steps at which an alarm began."""
    return [record["step"] for record in records if own.hear(record)]


def updates(entropies: list[float], **more: Any) -> list[dict[str, Any]]:
    found = [{"step": i, "loss": 0.0, "train/entropy": e, "train/tokens": 5} for i, e in enumerate(entropies, start=1)]
    return [record | more for record in found]


def batches(key: str, values: list[float]) -> list[dict[str, Any]]:
    """Records of batches of two updates each."""
    found: list[dict[str, Any]] = []
    for number, value in enumerate(values):
        found.append({"step": 2 * number + 1, "loss": 0.0, "reward/total": 0.5, key: value})
        found.append({"step": 2 * number + 2, "loss": 0.0})
    return found


def test_low_entropy_is_told_once_and_again_when_it_returns() -> None:
    asked = {"below": 0.1, "updates": 3}
    low, high = 0.09, 0.11
    assert heard(alarms(entropy=asked), updates([low, low, high, low, low])) == []
    assert heard(alarms(entropy=asked), updates([low, high, low, low, low, low, high, low, low, low])) == [5, 10]
    assert heard(alarms(entropy=asked), updates([0.1] * 5)) == []
    # An update that scored nothing says nothing of the policy; a planner's counts steps.
    assert heard(alarms(entropy=asked), updates([low] * 5, **{"train/tokens": 0})) == []
    planner = [{"step": i, "loss": 0.0, "train/entropy": low, "train/steps": 4.0} for i in range(3)]
    assert heard(alarms(entropy=asked), planner) == [2]


def test_empty_completions_and_rollouts_without_signal_are_counted_by_batch() -> None:
    for name, key in (("empty", "rollout/empty"), ("silent", "advantage/zero_share")):
        asked = {name: {"above": 0.5, "batches": 2}}
        assert heard(alarms(**asked), batches(key, [0.6, 0.5, 0.6, 0.5])) == []
        assert heard(alarms(**asked), batches(key, [0.5, 0.6, 0.6, 0.6, 0.2, 0.7, 0.7])) == [5, 13]


def gamed(rewards: list[float], exact: list[float], n: int = 100, **truth: list[float]) -> list[dict[str, Any]]:
    """Records of a run that is evaluated before, after every fourth batch, and at the end."""
    records: list[dict[str, Any]] = []
    for step in range(len(rewards) + 1):
        if step:
            records.append({"step": step, "loss": 0.0, "reward/total": rewards[step - 1]})
        if step % 4 == 0:
            share = exact[step // 4]
            records.append({"step": step, "eval/exact": share, "eval/stderr": math.sqrt(share * (1 - share) / n)})
            for name, values in truth.items():
                records[-1] |= {f"eval/truth/{name}": values[step // 4], f"eval/stderr/truth/{name}": 0.03}
    return records


RISING = [0.50, 0.52, 0.51, 0.53, 0.60, 0.62, 0.61, 0.63]


def test_gaming_is_a_rise_of_rewards_and_a_fall_of_truth_beyond_their_errors() -> None:
    asked = {"gaming": {"evaluations": 3, "errors": 2.0}}
    # 0.60 -> 0.45 of 100: standard error sqrt(.24 / 100 + .2475 / 100) = 0.0698, so 0.14 is what counts.
    assert heard(alarms(**asked), gamed(RISING, [0.60, 0.55, 0.45])) == [8]
    assert heard(alarms(**asked), gamed(RISING, [0.60, 0.55, 0.47])) == []
    assert heard(alarms(**asked), gamed(RISING, [0.60, 0.55, 0.47], n=10_000)) == [8]
    # The later half's mean is 0.1 higher; with errors of 0.06 each that is no rise.
    noisy = [0.4, 0.6, 0.4, 0.6, 0.5, 0.7, 0.5, 0.7]
    assert heard(alarms(**asked), gamed(noisy, [0.60, 0.55, 0.45])) == []
    assert heard(alarms(**asked), gamed(RISING[::-1], [0.60, 0.55, 0.45])) == []
    assert heard(alarms(**asked), gamed(RISING[:4], [0.60, 0.45])) == [], "only two evaluations so far"
    assert heard(alarms(gaming={"evaluations": 2}), gamed([0.50, 0.52, 0.60, 0.62], [0.60, 0.45])) == [4]


def test_a_measure_of_truth_goes_before_the_exact_rate() -> None:
    asked = {"gaming": {"evaluations": 3, "errors": 2.0}}
    own = alarms(**asked)
    assert heard(own, gamed(RISING, [0.60, 0.7, 0.9], holds=[0.5, 0.45, 0.41])) == [8]
    assert "held-out truth/holds fell from 0.5 to 0.41 since update 0" in own.on["gaming"]
    assert heard(alarms(**asked), gamed(RISING, [0.60, 0.5, 0.3], holds=[0.5, 0.45, 0.42])) == []


def test_an_alarm_that_is_off_and_records_after_a_checkpoint_are_not_heard() -> None:
    records = updates([1e-9] * 9)
    assert heard(alarms(), records) == []
    own = alarms(entropy={"updates": 5})
    own.begin(records, 4)
    assert not own.on and heard(own, records[4:]) == [5]
    own.begin(records, 7)
    assert set(own.on) == {"entropy"} and heard(own, records[7:]) == [], "told before the checkpoint"


def lines(folder: Path) -> list[dict[str, Any]]:
    return shortrun.lines(folder / "metrics.jsonl")


def told(folder: Path) -> dict[int, set[str]]:
    """Return the alarms that a run has recorded, by step."""
    found = {r["step"]: {key.removeprefix("alarm/") for key in r if key.startswith("alarm/")} for r in lines(folder)}
    return {step: names for step, names in found.items() if names}


def test_the_batch_of_a_refused_update_is_there_to_be_read_and_computed_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(UnmaskTrainer, "training_step", shortrun.poisoned(3))
        with pytest.raises(NonFiniteError) as caught:
            run.train(shortrun.recipe(model, "run.save_every=1", "run.log_rollouts_every=0"))
    folder = Path("runs/short/failed-000003")
    text = str(caught.value)
    assert "\n" not in text and text.startswith("rollout ") and "a log-probability is nan" in text
    assert text.endswith(f"resume from the last checkpoint. The batch of update 4 is in {folder}.")
    rows = pyarrow.parquet.read_table(folder / "rollouts" / "step-000003.parquet").to_pylist()
    trainer = run.build_trainer(shortrun.recipe(model), Path("again"))
    plan = load_plan(folder / "plan-0.safetensors", trainer.sampler)
    assert plan is not None and [row["tokens"] for row in rows] == plan.trajectory.tokens_BL.tolist()
    assert int(text.split()[1].rstrip(":")) in [row["rollout_id"] for row in rows]
    assert view([folder], Path("failed.html")).is_file()
    # With the weights of the last checkpoint the update is the one that the run went on with.
    again = trainer.objective.backward(trainer.denoiser, plan)  # type: ignore[arg-type]
    assert again["tokens"] == plan.advantage_A.numel() and math.isfinite(again["loss"])
    # A run that is resumed between two inner steps has no texts at hand; the plan is what the update was made from.
    with monkeypatch.context() as patch:
        patch.setattr(UnmaskTrainer, "training_step", shortrun.poisoned(3))
        with pytest.raises(NonFiniteError):
            run.train(shortrun.recipe(model, "run.save_every=1", "run.log_rollouts_every=0"), resume=Path("runs/short"))
    assert load_file(folder / "plan-0.safetensors").keys()


def test_a_ratio_beyond_its_limit_stops_the_run(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RatioError, match=r"objective\.ratio_limit 1\.0001 .*The batch of update 2 is in runs/short/f"):
        run.train(shortrun.recipe(model, "objective.ratio_limit=1.0001", "run.save_every=1"))
    assert (Path("runs/short/failed-000001/rollouts") / "step-000001.parquet").is_file()
    assert shortrun.checkpoints(Path("runs/short")) == ["checkpoint-1"]
    assert shortrun.command("train", "short.yaml", "name=other", "objective.ratio_limit=1.0001") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: rollout ") and error.endswith("is in runs/other/failed-000001.")
    # The limit is none of what a checkpoint fixes: raised, the same run goes on.
    run.train(shortrun.recipe(model, "objective.ratio_limit=null", "run.save_every=1"), resume=Path("runs/short"))


def test_a_batch_that_cannot_be_saved_does_not_hide_the_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("runs/short").mkdir(parents=True)
    Path("runs/short/failed-000001").write_text("in the way")
    recipe = shortrun.recipe(model, "objective.ratio_limit=1.0001", "name=short")
    monkeypatch.setenv(run.WORKER, "1")  # a rank takes the folder that it is given
    with pytest.raises(RatioError, match=r"could not be saved to runs/short/failed-000001 "):
        run.train(recipe)


QUIET = ["rewards=[{name: 'toyrewards:anything'}]", "objective.inner_steps=1", "optim.steps=6"]
SILENT = "alarms.silent={above: 0.9, batches: 2}"
ONLY_EOS = [
    token for token in range(261) if token not in (byte_tokenizer().eos_token_id, byte_tokenizer().mask_token_id)
]
# (what makes a run go wrong, the alarm, the update at which it begins)
WRONG = {
    "silent": ([*QUIET, SILENT], {2: {"silent"}}),
    "empty": (
        [
            f"rollout.sampler.transforms=[{{name: suppress, ids: {ONLY_EOS}}}]",
            *("objective.inner_steps=1", "alarms.silent=null", "alarms.empty.batches=2"),
        ],
        {2: {"empty"}},
    ),
    "entropy": (["alarms.entropy={below: 100.0, updates: 3}"], {3: {"entropy"}}),
    "gaming": (
        [
            "rewards=[{name: 'toyrewards:rising'}, {name: 'toyrewards:falling', truth: true}]",
            *("objective.inner_steps=1", "optim.steps=8", "evaluation.every=4", "evaluation.problems=40"),
        ],
        {8: {"gaming"}},
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_run_that_goes_wrong_says_so(name: str, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides, expected = WRONG[name]
    summary = run.train(shortrun.recipe(model, *overrides))
    folder = Path(summary["folder"])
    assert told(folder) == expected
    (step,) = expected
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text for text in warned if text.startswith("alarm")] == [
        f"alarm at update {step}, {name}: {record[f'alarm/{name}']}"
        for record in lines(folder)
        if f"alarm/{name}" in record
    ]
    page = report(folder).read_text()
    assert f"<li>step {step}, <b>{name}</b>:" in page


def test_a_sound_run_is_silent_and_has_the_metrics(model: Path) -> None:
    run.train(shortrun.recipe(model))
    folder = Path("runs/short")
    assert told(folder) == {} and "Alarms" not in report(folder).read_text()
    records = [record for record in lines(folder) if "reward/total" in record]
    assert len(records) == 2 and all(record.keys() >= METRICS for record in records)


def test_an_alarm_stops_the_run_where_the_recipe_says_so(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shortrun.recipe(model)
    stop = [*QUIET, SILENT, "alarms.silent.stop=true", "run.save_every=1"]
    assert shortrun.command("train", "short.yaml", *stop) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: update 2: 100% of the rollouts have advantage 0")
    assert error.endswith("alarms.silent.stop ended the run. The batch of update 2 is in runs/short/failed-000001.")
    folder = Path("runs/short")
    assert told(folder) == {2: {"silent"}} and shortrun.checkpoints(folder) == ["checkpoint-1"]
    # While it holds, a resumed run is stopped again; told to warn only, it goes on.
    recipe = shortrun.recipe(model, *stop)
    with pytest.raises(AlarmError):
        run.train(recipe, resume=folder)
    run.train(shortrun.recipe(model, *stop, "alarms.silent.stop=false"), resume=folder)
    assert told(folder) == {2: {"silent"}} and json.loads((folder / "summary.json").read_text())["steps"] == 6


def test_a_resumed_run_has_heard_what_came_before(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*QUIET, "alarms.silent={above: 0.9, batches: 4}", "run.save_every=1", "run.keep=9"]
    run.train(shortrun.recipe(model, *settings, "name=whole"))
    with monkeypatch.context() as patch:
        patch.setattr(UnmaskTrainer, "training_step", shortrun.poisoned(3))
        with pytest.raises(ValueError, match="logits"):
            run.train(shortrun.recipe(model, *settings))
    run.train(shortrun.recipe(model, *settings), resume=Path("runs/short"))
    whole, cut = (Path(f"runs/{name}/metrics.jsonl").read_bytes() for name in ("whole", "short"))
    assert whole == cut and told(Path("runs/short")) == {4: {"silent"}}


@pytest.mark.slow
def test_both_ranks_stop(model: Path) -> None:
    recipe = shortrun.recipe(model, *QUIET, SILENT, "alarms.silent.stop=true")
    processes = shortrun.start_ranks(recipe, 2)
    assert [process.wait() for process in processes] == [2, 2]
    assert all("alarms.silent.stop ended the run" in process.text() for process in processes)
    stored = sorted(path.name for path in Path("runs/short/failed-000001/rollouts").iterdir())
    assert stored == ["step-000001-rank1.parquet", "step-000001.parquet"]
