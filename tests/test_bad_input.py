"""Bad input, case by case: one line that names the value, the rule and the way out; exit code 2; nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.policies.loading import load_denoiser
from unmask.recipes.crosschecks import check_data
from unmask.recipes.loading import load_recipe, parse_recipe
from unmask.recipes.registry import RecipeError
from unmask.rl import cli

RL = """
name: base
model: {path: "unmask:tiny", lora: {rank: 4}}
task: {name: arithmetic, level: easy}
rollout:
  prompts: 4
  group: 2
  canvas: 32
  sampler: {schedule: {name: blocks, size: 16, per_step: 2}, score: confidence, selection: top}
rewards: [{name: arithmetic, weight: 1.0}]
method: cj_grpo
optim: {lr: 1.0e-3, steps: 10}
"""
SFT = """
kind: sft
name: base
model: {init: {hidden_size: 32, layers: 1, heads: 2, mlp: 64}}
tasks: [{task: arithmetic, canvas: 96}]
optim: {lr: 1.0e-3, steps: 10}
"""

# (name, overrides of RL, what the line must say). The name is the rule.
Case = tuple[str, list[str], list[str]]
KEYS: list[Case] = [
    ("misspelt section", ["rolout.group=2"], ["rolout: unknown key", "Did you mean 'rollout'?"]),
    ("misspelt key", ["rollout.grup=2"], ["rollout.grup: unknown key", "Did you mean 'group'?"]),
    ("key of another section", ["optim.group=2"], ["optim.group: unknown key", "There is rollout.group"]),
    ("TRL's name", ["rollout.num_generations=8"], ["num_generations", "called rollout.group"]),
    ("transformers' name", ["optim.learning_rate=1e-4"], ["learning_rate", "called optim.lr"]),
    ("LLaDA's name", ["rollout.gen_length=128"], ["gen_length", "called rollout.canvas"]),
    ("nested key", ["model.lora.rnk=8"], ["model.lora.rnk", "Did you mean 'rank'?"]),
    ("full and lora", ["model.full=true"], ["model.full", "no lora section, trains all weights"]),
    ("sampler key", ["rollout.sampler.scor=random"], ["rollout.sampler.scor", "Did you mean 'score'?"]),
    ("eos key", ["rollout.sampler.eos.supress=true"], ["eos.supress", "Did you mean 'suppress'?"]),
    ("nothing alike", ["run.zzz=1"], ["run.zzz: unknown key 'zzz'", "Choices: directory"]),
    ("SFT key in an RL recipe", ["tasks=[]"], ["tasks: unknown key", "Did you mean 'task'?"]),
    ("kind", ["kind=sftt"], ["kind: 'sftt'", "rl, sft", "Did you mean 'sft'?"]),
]
TYPES: list[Case] = [
    ("fraction for a count", ["optim.steps=2.5"], ["optim.steps: 2.5 is not a whole number"]),
    ("text for a count", ["rollout.group=eight"], ["rollout.group: 'eight' is not a whole number"]),
    ("bool for a count", ["rollout.group=yes"], ["rollout.group: True is not a whole number"]),
    ("text for a number", ["optim.lr=small"], ["optim.lr: 'small' is not a number"]),
    ("bool for a number", ["optim.lr=true"], ["optim.lr: True is not a number"]),
    ("nan", ["optim.lr=.nan"], ["optim.lr: nan is not a finite number"]),
    ("infinity", ["objective.beta=.inf"], ["objective.beta: inf is not a finite number"]),
    ("number for a bool", ["rollout.sampler.eos.suppress=1"], ["suppress: 1 is not true or false"]),
    ("number for text", ["model.path=7"], ["model.path: 7 is not text"]),
    ("value for a section", ["optim=3"], ["optim: 3 is not a section", "below it"]),
    ("list for a section", ["rollout=[1]"], ["rollout: [1] is not a section"]),
    ("mapping for a list", ["rewards={name: arithmetic}"], ["rewards:", "is not a list"]),
    ("null for a required section", ["optim=null"], ["optim: nothing is not a section"]),
    ("number for a part", ["rollout.sampler.score=3"], ["rollout.sampler.score: 3 names no part", "write `name`"]),
    ("one beta", ["optim.betas=[0.9]"], ["optim.betas.1: is missing"]),
    ("text in betas", ["optim.betas=[a, b]"], ["optim.betas.0: 'a' is not a number"]),
    (
        "choice",
        ["optim.schedule=cosin"],
        ["'cosin' is not allowed", "constant, linear, cosine", "Did you mean 'cosine'?"],
    ),
    ("dtype", ["model.dtype=float16"], ["model.dtype: 'float16'", "float32, bfloat16"]),
    ("tracker", ["run.report_to=wandbb"], ["report_to.0: 'wandbb'", "Did you mean 'wandb'?"]),
    ("device", ["model.device=gpu"], ["model.device: 'gpu' does not have the form", "cuda"]),
    ("run name", ["name=a/b"], ["name: 'a/b' does not have the form"]),
]
RANGES: list[Case] = [
    ("learning rate", ["optim.lr=0"], ["optim.lr: 0 is out of range", "> 0"]),
    ("group", ["rollout.group=0"], ["rollout.group: 0 is out of range", ">= 1"]),
    ("canvas", ["rollout.canvas=-8"], ["rollout.canvas: -8", ">= 1"]),
    ("evaluation problems", ["evaluation.problems=0"], ["evaluation.problems: 0", ">= 1"]),
    ("save every", ["run.save_every=-1"], ["run.save_every: -1", ">= 0"]),
    ("kept checkpoints", ["run.keep=0"], ["run.keep: 0", ">= 1"]),
    ("beta", ["objective.beta=-0.1"], ["objective.beta: -0.1", ">= 0"]),
    ("inner steps", ["objective.inner_steps=0"], ["objective.inner_steps: 0", ">= 1"]),
    ("rank", ["model.lora.rank=0"], ["model.lora.rank: 0", ">= 1"]),
    ("dropout", ["model.lora.dropout=1"], ["model.lora.dropout: 1", "< 1"]),
    ("no targets", ["model.lora.targets=[]"], ["model.lora.targets: is empty"]),
    ("no rewards", ["rewards=[]"], ["rewards: is empty"]),
    ("mask id", ["model.mask_token_id=-1"], ["model.mask_token_id: -1", ">= 0"]),
    ("seed", ["run.seed=-3"], ["run.seed: -3", ">= 0"]),
    ("betas", ["optim.betas=[0.9, 1.0]"], ["optim.betas.1: 1", "[0, 1)"]),
    ("score temperature", ["rollout.sampler.score_temperature=0"], ["score_temperature: 0", "> 0"]),
]
PARTS: list[Case] = [
    ("task", ["task=arithmetik"], ["task: unknown part 'arithmetik'", "Did you mean 'arithmetic'?"]),
    ("schedule", ["rollout.sampler.schedule=block"], ["rollout.sampler.schedule", "'block'", "Did you mean 'blocks'?"]),
    ("score", ["rollout.sampler.score=confidance"], ["unknown part 'confidance'", "Did you mean 'confidence'?"]),
    ("selection", ["rollout.sampler.selection=threshhold"], ["'threshhold'", "Did you mean 'threshold'?"]),
    ("reward", ["rewards.0.name=sodoku"], ["rewards.0: reward: unknown part 'sodoku'", "Did you mean 'sudoku'?"]),
    ("estimator", ["objective.estimator=trase"], ["objective.estimator", "'trase'", "Did you mean 'trace'?"]),
    ("unit", ["objective.unit=sequence"], ["objective.unit: unit: unknown part 'sequence'", "sample, step, token"]),
    ("surrogate", ["objective.surrogate=ppo"], ["objective.surrogate", "'ppo'", "Did you mean 'ppo_clip'?"]),
    ("weight", ["objective.weight=unifrom"], ["objective.weight", "Did you mean 'uniform'?"]),
    ("advantage", ["objective.advantage=group_meen"], ["objective.advantage", "Did you mean 'group_mean'?"]),
    ("divergence", ["objective.divergence=k4"], ["objective.divergence", "'k4'"]),
    ("evaluation's part", ["evaluation.sampler.score=marjin"], ["evaluation.sampler.score", "Did you mean 'margin'?"]),
    ("no name", ["task={level: easy}"], ["task: {'level': 'easy'} names no part"]),
    ("number as a name", ["task={name: 3}"], ["task", "3 is not a name"]),
    (
        "module that does not exist",
        ["rewards.0.name=nowhere_zz:f"],
        ["cannot import 'nowhere_zz:f'", "No module named"],
    ),
    ("function that does not exist", ["objective.weight=math:nothing"], ["cannot import 'math:nothing'"]),
    ("constant for a function", ["objective.weight=math:pi"], ["'math:pi' is 3.14", "not a function"]),
]
KNOBS: list[Case] = [
    ("misspelt", ["rollout.sampler.schedule.sise=8"], ["schedule 'blocks' has no knob 'sise'", "Did you mean 'size'?"]),
    ("of a part without", ["rollout.sampler.score.k=1"], ["score 'confidence' has no knob 'k'", "It has no knobs"]),
    ("of a reward", ["rewards.0.strict=true"], ["reward 'arithmetic' has no knob 'strict'", "Did you mean 'extract'?"]),
    ("type", ["rollout.sampler.schedule.size=16.5"], ["rollout.sampler.schedule.size: 16.5 is not"]),
    ("choice", ["task.level=esy"], ["task.level: 'esy' is not allowed", "Did you mean 'easy'?"]),
    ("reward choice", ["rewards.0.extract=bxed"], ["rewards.0.extract", "'bxed'", "Did you mean 'boxed'?"]),
    ("missing", ["rollout.sampler.schedule=uniform"], ["schedule 'uniform' needs the knob 'steps'"]),
    ("pair of three", ["task={name: countdown, numbers: [3, 4, 5]}"], ["task.numbers", "3 entries, 2 are needed"]),
    ("clip width", ["objective.surrogate.low=1.5"], ["objective.surrogate.low: 1.5", "(0, 1]"]),
    ("threshold level", ["rollout.sampler.selection={name: threshold, level: 2}"], ["selection.level: 2", "(0, 1]"]),
    ("level's clash", ["rewards.0={name: countdown, partial: 1.0}"], ["partial: 1.0", "[0, 1)"]),
    ("weight of a reward", ["rewards.0.weight=heavy"], ["rewards.0.weight: 'heavy' is not a number"]),
]
METHODS: list[Case] = [
    ("unknown", ["method=cj_gpro"], ["method: unknown method 'cj_gpro'", "Did you mean 'cj_grpo'?"]),
    ("no word", ["method=[cj_grpo]"], ["method: unknown method ['cj_grpo']"]),
    ("none, and no objective", ["method=null"], ["objective: is missing", "Name a method (see `unmask methods`)"]),
    ("none, and half an objective", ["method=null", "objective.unit=token"], ["is missing", "Name a method"]),
    ("idle knob", ["objective.surrogate.lo=0.1"], ["ppo_clip' has no knob 'lo'", "Did you mean 'low'?"]),
]
CONTRADICTIONS: list[Case] = [
    ("group of one", ["rollout.group=1"], ["rollout.group: 1 rollout", "'group_mean'", "use 2 or more"]),
    ("greedy rollouts", ["rollout.temperature=0"], ["rollout.temperature: 0", "no behaviour log-prob", "above 0"]),
    ("blocks", ["rollout.canvas=40"], ["blocks of 16 do not divide the canvas of 40", "use 20", "rollout.canvas: 40"]),
    (
        "per step",
        ["rollout.sampler.schedule.per_step=17"],
        ["schedule.per_step: 17", "between 1 and the block size 16"],
    ),
    ("two paces", ["rollout.sampler.schedule.steps=8"], ["exactly one of per_step", "steps"]),
    ("block size", ["rollout.sampler.schedule.size=0"], ["schedule.size: 0 must be at least 1"]),
    (
        "more steps than positions",
        ["rollout.sampler.schedule={name: uniform, steps: 33}"],
        ["rollout.sampler.schedule.steps: 33 exceeds rollout.canvas 32", "use at most 32"],
    ),
    (
        "evaluation's blocks",
        ["evaluation.sampler.schedule.size=12"],
        ["evaluation.sampler.schedule.size: blocks of 12 do not divide the canvas of 32"],
    ),
    (
        "threshold of a random score",
        ["rollout.sampler.selection=threshold", "rollout.sampler.score=random"],
        ["threshold compares a probability, score 'random' is none", "use score confidence"],
    ),
    (
        "threshold of an order",
        ["rollout.sampler.selection=threshold", "rollout.sampler.score=left_to_right"],
        ["score 'left_to_right' is none"],
    ),
    (
        "length and remasking",
        ["rollout.sampler.top_p=0"],
        ["rollout.sampler.top_p: 0", "must be > 0"],
    ),
    ("k is missing", ["objective.estimator.steps=uniform_k"], ["objective.estimator.k: None", "uniform_k needs"]),
    ("k without use", ["objective.estimator.k=4"], ["objective.estimator.k: 4 has no effect", "uniform_k"]),
    ("k of zero", ["objective.estimator={steps: uniform_k, k: 0}"], ["objective.estimator.k: 0 must be at least 1"]),
    (
        "rollout ratio of some steps",
        ["objective.estimator={steps: uniform_k, k: 2}", "objective.unit=rollout"],
        ["objective.unit: 'rollout' needs the ratio of the whole rollout", "use unit step or token"],
    ),
    (
        "beta without reference",
        ["objective.reference=none"],
        ["objective.beta 0.04", "set beta to 0, or reference to auto"],
    ),
    (
        "adapter off without adapter",
        ["objective.reference=adapter_off", "model.lora=null"],
        ["adapter_off needs an adapter", "use frozen_copy"],
    ),
    (
        "correction of the same",
        ["objective.correction=truncated"],
        ["objective.correction", "set objective.old to recompute"],
    ),
    ("ceiling without correction", ["objective.correction.ceiling=2"], ["ceiling: has no effect", "name it truncated"]),
    ("correction's ceiling", ["objective.correction={name: truncated, ceiling: -1}"], ["ceiling: -1", "> 0"]),
    ("weights of zero", ["rewards.0.weight=0"], ["rewards: every weight is 0"]),
    ("warm-up", ["optim.warmup=10"], ["optim.warmup: 10 must be smaller than optim.steps 10"]),
    ("flash attention in fp32", ["model.attention=flash_attention_2"], ["needs CUDA and bfloat16", "use sdpa"]),
    ("the task's seed", ["task.seed=3"], ["task.seed: 3 has no effect", "run.seed"]),
]
OVERRIDES: list[Case] = [
    ("no equals sign", ["optim.lr"], ["override 'optim.lr'", "write key.path=value"]),
    ("empty key", ["optim..lr=1"], ["override 'optim..lr=1'", "write key.path=value"]),
    ("below a number", ["optim.lr.x=1"], ["optim.lr is 0.001 and holds no keys"]),
    ("index out of range", ["rewards.3.weight=1"], ["'3' is no index of a list of 1"]),
    ("word for an index", ["rewards.first.weight=1"], ["'first' is no index of a list"]),
    ("broken YAML", ["optim.betas=[1, 2"], ["override 'optim.betas=[1, 2'", "not readable as YAML"]),
]
SFT_CASES: list[Case] = [
    ("path and init", ["model.path=unmask:tiny"], ["exactly one of path", "both are there"]),
    ("neither", ["model.init=null"], ["exactly one of path", "neither is there"]),
    ("heads", ["model.init.heads=3"], ["model.init.heads: 3 heads do not divide hidden_size 32"]),
    ("canvas", ["tasks.0.canvas=90"], ["blocks of 16 do not divide the canvas of 90", "tasks.0.canvas: 90"]),
    ("no tasks", ["tasks=[]"], ["tasks: is empty"]),
    ("share", ["sft.full_canvas=30"], ["sft.full_canvas: 30", "<= 1"]),
    ("weight", ["tasks.0.weight=0"], ["tasks.0.weight: 0", "> 0"]),
    ("mask", ["sft.mask=bernouli"], ["sft.mask: 'bernouli'", "Did you mean 'bernoulli'?"]),
    ("RL key", ["rewards=[arithmetic]"], ["rewards: unknown key"]),
    ("task without a reward", ["tasks.0.task={name: jsonl, path: a}"], ["tasks.0.reward", "no reward called 'jsonl'"]),
    ("no learning rate", ["optim={steps: 3}"], ["optim.lr: is missing", "peak learning rate"]),
]
# (name, the file's text, what the line must say)
TEXTS: list[tuple[str, str, list[str]]] = [
    ("empty file", "", ["the file is empty", "unmask cp"]),
    ("only comments", "# nothing\n", ["the file is empty"]),
    ("a list", "- a\n- b\n", ["holds a list", "mapping"]),
    ("a word", "quickstart\n", ["holds a str"]),
    ("broken YAML", "name: [a\nb: 1\n", [":2:2: not readable as YAML"]),
    ("a tab", "name: a\n\tb: 1\n", [":2:1: not readable as YAML", "\\t"]),
    ("a key twice", RL + "name: again\n", [":13:1", "key 'name' is written twice"]),
    ("a nested key twice", RL.replace("group: 2", "group: 2\n  group: 4"), [":8:3", "key 'group' is written twice"]),
    ("a number as a key", RL + "1: a\n", ["key 1 is not a word"]),
    ("a Python object", "a: !!python/object/apply:os.system [ls]\n", [":1:4", "could not determine a constructor"]),
    ("an unknown alias", "a: *b\n", ["undefined alias"]),
    ("two documents", RL + "---\nname: b\n", ["not readable as YAML", "another document"]),
    ("no canvas", RL.replace("  canvas: 32\n", ""), ["rollout.canvas: is missing", "completion positions"]),
    (
        "no model",
        RL.replace("model: ", "modell: "),
        ["modell: unknown key", "Did you mean 'model'?", "(1 of 2 problems)"],
    ),
]

RL_CASES = {
    "keys": KEYS,
    "types": TYPES,
    "ranges": RANGES,
    "parts": PARTS,
    "knobs": KNOBS,
    "methods": METHODS,
    "contradictions": CONTRADICTIONS,
    "overrides": OVERRIDES,
}


def named(cases: list[Case]) -> list[object]:
    return [pytest.param(overrides, says, id=name) for name, overrides, says in cases]


def one_line(error: BaseException, says: list[str]) -> None:
    message = str(error)
    assert "\n" not in message and len(message) < 500, message
    for fragment in says:
        assert fragment in message, f"{fragment!r} is not in: {message}"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [pytest.param(o, s, id=f"{group}: {name}") for group, cases in RL_CASES.items() for name, o, s in cases],
)
def test_recipe(overrides: list[str], says: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RL, overrides)
    one_line(caught.value, says)


@pytest.mark.parametrize(("overrides", "says"), named(SFT_CASES))
def test_sft_recipe(overrides: list[str], says: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(SFT, overrides)
    one_line(caught.value, says)


@pytest.mark.parametrize(("text", "says"), [pytest.param(text, says, id=name) for name, text, says in TEXTS])
def test_text(text: str, says: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    one_line(caught.value, [str(path), *says])


def test_the_recipes_of_this_table_are_right_without_the_mistake() -> None:
    parse_recipe(RL)
    parse_recipe(SFT)


def test_there_are_enough_cases() -> None:
    assert sum(map(len, RL_CASES.values())) + len(SFT_CASES) + len(TEXTS) + len(DATA) >= 60


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("quikstart", ["no file 'quikstart'", "Did you mean 'quickstart'?"]),
        ("methods", ["no shipped recipe 'methods'"]),
        (".", ["is a folder without recipe.yaml"]),
        ("latin.yaml", ["cannot read", "not UTF-8"]),
    ],
)
def test_recipe_file(name: str, says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    one_line(caught.value, says)


GOOD_ROW = json.dumps({"prompt": "1 a+1", "reference": "#### 2", "answer": "2"})
# (name, the dataset's text or None, overrides of RL, what the line must say)
DATA: list[tuple[str, str | None, list[str], list[str]]] = [
    ("missing file", None, [], ["there is no file", "rows.jsonl"]),
    ("empty dataset", "", [], ["rows.jsonl: the dataset is empty"]),
    ("blank lines only", "\n\n", [], ["the dataset is empty"]),
    ("malformed line", GOOD_ROW + "\n{'prompt': 1}\n", [], ["rows.jsonl:2: not a line of JSON"]),
    ("a row that is a list", "[1]\n", [], ["rows.jsonl:1: holds a list; a row is an object with columns"]),
    ("prompt under another name", '{"question": "a"}\n', [], ["no column 'prompt'", "task.prompt_column"]),
    ("wrong prompt column", GOOD_ROW, ["task.prompt_column=text"], ["no column 'text'"]),
    ("missing answer", '{"prompt": "a", "anser": "1"}', [], ["needs the column 'answer'", "Did you mean 'anser'?"]),
    ("another reward's columns", GOOD_ROW, ["rewards=[countdown]"], ["reward 'countdown' needs the column 'numbers'"]),
    ("second reward's column", GOOD_ROW, ["rewards=[arithmetic, sudoku]"], ["'sudoku' needs the column 'puzzle'"]),
]


@pytest.mark.parametrize(("text", "overrides", "says"), [pytest.param(t, o, s, id=n) for n, t, o, s in DATA])
def test_data(text: str | None, overrides: list[str], says: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    task = f"task={{name: jsonl, path: '{path}', heldout_path: '{path}'}}"
    recipe = parse_recipe(RL, [task, *overrides])
    with pytest.raises(RecipeError) as caught:
        check_data(recipe)
    one_line(caught.value, says)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["task={name: countdown, numbers: [4, 3]}", "rewards=[countdown]"],
            ["task.numbers: [4, 3]", "2 <= low <= high"],
        ),
        (
            ["task={name: sudoku, clues: [3, 16]}", "rewards=[sudoku]"],
            ["task.clues: [3, 16]", "0 <= low <= high <= 15"],
        ),
        (["task={name: arithmetic, operations: [0, 2]}"], ["task.operations: [0, 2]", "1 <= low"]),
        (["rewards=[sudoku]"], ["reward 'sudoku' needs the column 'puzzle'"]),
        (
            ["task={name: arithmetic, operations: [1, 1]}", "evaluation.problems=5000"],
            ["distinct held-out problems exist", "5000 were asked for", "lower evaluation.problems"],
        ),
    ],
)
def test_generated_data(overrides: list[str], says: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        check_data(parse_recipe(RL, overrides))
    one_line(caught.value, says)


def test_sft_data_needs_worked_solutions(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n')
    task = f"tasks.0={{task: {{name: jsonl, path: '{path}', heldout_path: '{path}'}}, canvas: 96, reward: arithmetic}}"
    with pytest.raises(RecipeError) as caught:
        check_data(parse_recipe(SFT, [task]))
    one_line(caught.value, ["tasks.0.task", "no column 'reference'", "worked solutions"])


# Through the real command: (arguments, what the line must say).
COMMANDS: list[tuple[list[str], list[str]]] = [
    (["train", "mine.yaml", "rollout.grup=2"], ["mine.yaml: rollout.grup: unknown key", "Did you mean 'group'?"]),
    (["train", "mine.yaml", "rollout.group=1", "--json", "out.json"], ["rollout.group: 1 rollout"]),
    (["train", "mine.yaml", "--nproc", "3"], ["rollout.prompts: 4", "multiple of 3"]),
    (["train", "mine.yaml", "task={name: jsonl, path: no.jsonl}"], ["there is no file 'no.jsonl'"]),
    (["sft", "mine.yaml"], ["kind: 'base' is a recipe of kind rl", "unmask train mine.yaml"]),
    (["check", "nothing.yaml"], ["no file 'nothing.yaml'"]),
    (["check", "mine.yaml", "--json", "no/where.json"], ["--json", "its folder must exist"]),
    (["cp", "quickstart", "mine.yaml"], ["'mine.yaml' exists", "--force"]),
    (["methods", "cj_gpro"], ["unknown method 'cj_gpro'", "Did you mean 'cj_grpo'?"]),
    (["parts", "selektion"], ["unknown slot 'selektion'", "Did you mean 'selection'?"]),
    (["trian", "mine.yaml"], ["No such command 'trian'", "train"]),
]


@pytest.mark.parametrize(("arguments", "says"), [pytest.param(a, s, id=" ".join(a)) for a, s in COMMANDS])
def test_command(
    arguments: list[str],
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.yaml").write_text(RL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["unmask", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output, errors = capsys.readouterr()
    assert (ended.value.code, output) == (2, ""), errors
    check_refusal(errors, says, tmp_path)


def test_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    arguments, says = COMMANDS[0]
    (tmp_path / "mine.yaml").write_text(RL)
    command = [sys.executable, "-m", "unmask.rl.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    check_refusal(run.stderr, says, tmp_path)


def check_refusal(errors: str, says: list[str], folder: Path) -> None:
    """Assert one line that says so, and that nothing was written."""
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    for fragment in says:
        assert fragment in errors
    assert [path.name for path in folder.iterdir()] == ["mine.yaml"]
    assert (folder / "mine.yaml").read_text() == RL


# --- What only shows at run time: weights, prompts that are too long, NaN, a full disk. -----------------------------
# (name, what provokes it in an empty folder, what the line must say); the error is a ValueError of unmask's own.
Provoke = Callable[[Path], object]


def _folder_with(name: str, text: str) -> Provoke:
    def provoke(folder: Path) -> object:
        (folder / name).write_text(text)
        return load_denoiser(str(folder))

    return provoke


RUNTIME: list[tuple[str, Provoke, list[str]]] = [
    ("no model folder", lambda folder: load_denoiser(str(folder / "none")), ["model.path", "there is no folder"]),
    ("folder without config", lambda folder: load_denoiser(str(folder)), ["holds no config.json"]),
    ("config that is no JSON", _folder_with("config.json", "{"), ["config.json", "not valid JSON"]),
    ("unknown architecture", _folder_with("config.json", '{"architectures": ["Gpt"]}'), ["['Gpt']", "model.family"]),
]


@pytest.mark.parametrize(("provoke", "says"), [pytest.param(p, s, id=name) for name, p, s in RUNTIME])
def test_runtime(provoke: Provoke, says: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        provoke(tmp_path)
    assert type(caught.value).__module__.startswith("unmask"), "the command line shows only these as one line"
    one_line(caught.value, says)
