"""Rewards of other people: TRL's unchanged, reward models, single-turn environments, reasoning-gym's scorers."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.rewards
from transformers import LlamaConfig, LlamaForSequenceClassification

from unmask.policies.tokenizers import byte_tokenizer
from unmask.rewards import RewardError, build_rewards, reasoning, sandbox, score
from unmask.rewards.judges import judge_texts, load_judge
from unmask.rewards.pool import Pool
from unmask.rewards.reasoning import is_answer
from unmask.rewards.sandbox import SandboxError


def table(
    entries: list[Any], texts: list[str], pool: Pool | None = None, chat: bool = False, **columns: list[Any]
) -> Any:
    prompts = [[{"role": "user", "content": f"p{i}"}] if chat else f"p{i}" for i in range(len(texts))]
    rows = [{"prompt": p, **{k: v[i] for k, v in columns.items()}} for i, p in enumerate(prompts)]
    return score(build_rewards(entries), rows, prompts, texts, [[1] * len(t) for t in texts], pool=pool)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(workers=1)
    yield made
    made.close()


TRL = {
    "accuracy_reward": ({}, [1.0, 0.0, 0.0]),
    "reasoning_accuracy_reward": ({}, [1.0, 0.0, 0.0]),
    "think_format_reward": ({}, [1.0, 0.0, 0.0]),
    "get_soft_overlong_punishment": ({"max_completion_len": 40, "soft_punish_cache": 10}, None),
    "get_repetition_penalty_reward": ({"ngram_size": 1, "max_penalty": -1.0}, None),
    "get_cosine_scaled_reward": ({"max_len": 1000}, None),
}
TEXTS = ["<think>\nx\n</think>\n\\boxed{\\frac{1}{2}}", "\\boxed{3}", "no"]


def test_the_table_knows_every_reward_of_trl() -> None:
    assert {name for name in trl.rewards.__all__ if not name.endswith("_rewards")} <= set(TRL)


@pytest.mark.parametrize("name", TRL)
def test_trl_rewards_unchanged_here_and_in_the_pool(name: str, pool: Pool) -> None:
    """What TRL's own call gives, and the same from a worker, where their alarms have a main thread."""
    if not hasattr(trl.rewards, name):
        pytest.skip(f"this version of TRL has no {name}")
    knobs, expected = TRL[name]
    function = getattr(trl.rewards, name)
    function = function(**knobs) if knobs else function
    said = [[{"role": "assistant", "content": text}] for text in TEXTS]
    solution = ["$\\frac{1}{2}$"] * 3
    wanted = function(completions=said, solution=solution, completion_ids=[[1] * len(text) for text in TEXTS])
    here = table([{"name": f"trl.rewards:{name}", **knobs}], TEXTS, chat=True, solution=solution)
    entry = {"name": f"trl.rewards:{name}", **knobs, "isolated": True, "limit_s": 60}
    there = table([entry], TEXTS, pool, chat=True, solution=solution)
    for got in (here, there):
        assert got.value_BR[:, 0].tolist() == pytest.approx(wanted)
    assert expected is None or wanted[0] == expected[0]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model of 20 thousand parameters over bytes."""
    folder = tmp_path_factory.mktemp("judge")
    config = LlamaConfig(
        vocab_size=261, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        pad_token_id=256, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_reward_model_scores_the_conversation(judge: Path) -> None:
    texts = ["short", "a much longer completion than the others", ""]
    got = table([{"name": "reward_model", "path": str(judge), "batch": 2, "scale": 0.5}], texts)
    model, tokenizer = load_judge(str(judge), "float32", "cpu")
    for index, text in enumerate(texts):
        turns = [{"role": "user", "content": f"p{index}"}, {"role": "assistant", "content": text}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            hidden_1TH = model.model(torch.tensor([ids])).last_hidden_state
            # pooled at the last token that is no padding; our EOS is the padding, as in the byte tokenizer
            last = max(i for i, token in enumerate(ids) if token != model.config.pad_token_id)
            wanted = model.score(hidden_1TH[0, last]).item()
        assert got.value_BR[index, 0].item() == pytest.approx(0.5 * wanted, abs=1e-5)
    assert "outcome" not in got.codes and got.value_BR[:, 0].unique().numel() == 3
    messages = table([{"name": "reward_model", "path": str(judge)}], texts, chat=True)
    assert torch.allclose(messages.value_BR, 2 * got.value_BR, atol=1e-5)


def test_a_reward_models_batch_changes_nothing_and_long_texts_lose_their_head(judge: Path) -> None:
    model, tokenizer = load_judge(str(judge), "float32", "cpu")
    texts = ["a" * n for n in (3, 50, 7, 20, 1)]
    alone = [judge_texts(model, tokenizer, [text], batch=1, max_length=99)[0] for text in texts]
    assert judge_texts(model, tokenizer, texts, batch=3, max_length=99) == pytest.approx(alone, abs=1e-5)
    cut = judge_texts(model, tokenizer, ["x" * 30 + "abc"], batch=1, max_length=3)
    assert cut == pytest.approx(judge_texts(model, tokenizer, ["abc"], batch=1, max_length=3))


def test_a_reward_model_without_template_reads_one_text(judge: Path, tmp_path: Path) -> None:
    model, tokenizer = load_judge(str(judge), "float32", "cpu")
    model.save_pretrained(tmp_path)
    bare = byte_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    got = table([{"name": "reward_model", "path": str(tmp_path)}], ["abc"])
    assert got.value_BR[0, 0].item() == pytest.approx(
        judge_texts(model, tokenizer, ["p0abc"], batch=1, max_length=9)[0]
    )


def test_what_is_no_reward_model(judge: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"'.*nowhere' cannot be loaded"):
        table([{"name": "reward_model", "path": str(tmp_path / "nowhere")}], ["a"])
    config = json.loads((judge / "config.json").read_text())
    model = LlamaForSequenceClassification(LlamaConfig(**{**config, "id2label": {0: "a", 1: "b"}, "num_labels": 2}))
    model.save_pretrained(tmp_path / "two")
    byte_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(RewardError, match="has 2 labels, a reward model has one score"):
        table([{"name": "reward_model", "path": str(tmp_path / "two")}], ["a"])


class Rubric:
    """What verifiers calls a rubric: functions with weights."""

    def __init__(self, funcs: list[Any], weights: list[float]) -> None:
        self.funcs, self.weights = funcs, weights


class OldRubric:
    """The same in its older form."""

    def __init__(self, funcs: list[Any], weights: list[float]) -> None:
        self.get_reward_funcs, self.get_reward_weights = (lambda: funcs), (lambda: weights)


async def exact(completion: list[dict[str, str]], answer: str) -> float:
    return float(completion[-1]["content"] == answer)


def polite(parser: Any, prompt: list[dict[str, str]], completion: Any, info: dict[str, Any], **kwargs: Any) -> float:
    assert prompt[0]["role"] == "user" and kwargs["state"]["completion"] == completion and parser == "a parser"
    return float(completion[-1]["content"].startswith(info.get("start", "please")))


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    made = types.ModuleType("my_environment")

    def load_environment(kind: Any = Rubric, funcs: Any = (exact, polite), weights: Any = (1.0, 0.5)) -> Any:
        return types.SimpleNamespace(rubric=kind(list(funcs), list(weights)), parser="a parser")

    made.load_environment = load_environment  # type: ignore[attr-defined]
    made.load_old = lambda: load_environment(OldRubric)  # type: ignore[attr-defined]
    made.load_bare = lambda: object()  # type: ignore[attr-defined]
    made.load_uneven = lambda: load_environment(weights=(1.0,))  # type: ignore[attr-defined]
    sys.modules["my_environment"] = made
    yield
    del sys.modules["my_environment"]


@pytest.mark.parametrize("loader", ["load_environment", "load_old"])
def test_a_single_turn_environments_rubric(loader: str) -> None:
    entry = {"name": "environment", "path": f"my_environment:{loader}"}
    info: list[Any] = [{}, {"start": "5"}, {}]
    got = table([entry], ["5", "5", "please"], answer=["5", "6", "7"], info=info, chat=True)
    assert got.value_BR[:, 0].tolist() == [1.0, 0.5, 0.5]
    assert got.metrics == {"environment/exact": pytest.approx(1 / 3), "environment/polite": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_environment", "names no function"),
        ("my_environment:load_bare", "has no `rubric`"),
        ("my_environment:load_uneven", "as many `funcs` as `weights`"),
        ("my_environment:gone", "cannot import"),
    ],
)
def test_what_is_no_environment(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_rewards([{"name": "environment", "path": path}])


SUSPICIOUS = [
    "__import__('os')",
    "import os",
    "eval('1')",
    "lambda: 1",
    "open('x')",
    "x.__class__",
    "getattr(a, 'b')",
    None,
]
SUSPICIOUS += ["9" * 5000]


@pytest.mark.parametrize("text", SUSPICIOUS, ids=lambda t: str(t)[:12])
def test_text_that_could_be_code_is_no_answer(text: str | None) -> None:
    assert not is_answer(text)


@pytest.mark.parametrize(
    "text", ["(1 + 2) * 3", "1 2 3\n4 5 6", "knight", "x = -3", "A is a knave, and B is important"]
)
def test_ordinary_answers_are_answers(text: str) -> None:
    assert is_answer(text)


def sandboxed() -> str | None:
    """Return why reasoning-gym's scorers cannot run here."""
    try:
        reasoning.ready() if importlib.util.find_spec("reasoning_gym") else sandbox.command()
    except SandboxError as error:
        return str(error)
    return None


REASON = sandboxed()
FAKE = """
import sys
class Data:
    def __init__(self, seed, size, **config):
        self.seed, self.size, self.config = seed, size, config
    def __getitem__(self, index):
        return {"question": "q", "answer": str(self.seed + index), "metadata": {}}
    def score_answer(self, answer, entry):
        if answer == "loop":
            while True:
                pass
        if answer == "crash":
            raise ValueError("crash")
        if answer == "quit":
            import os
            os._exit(0)
        if answer == "shout":
            print("1.0")
            return 0.25
        return 1.0 if answer == entry["answer"] else 0.01
def create_dataset(name, seed, size, **config):
    assert name == "fake" and config == {"level": 2}
    return Data(seed, size, **config)
"""


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_scorers_run_in_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of the package, so that this runs without it: what a scorer does stays inside, row by row."""
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        if parent != Path("/tmp"):
            parent.chmod(0o755)
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "__init__.py").write_text(FAKE)
    monkeypatch.setattr(reasoning, "libraries", lambda: (str(tmp_path),))
    gym = json.dumps({"dataset": "fake", "config": {"level": 2}, "seed": 3, "size": 9, "index": 4})
    answers = ["7", "8", "loop", "crash", "quit", "shout", "7"]
    texts = [f"<answer>{answer}</answer>" for answer in answers] + ["7", "<answer>__import__('os')</answer>"]
    entry = {"name": "reasoning_gym", "seconds": 3.0, "partial": 0.5}
    got = table([entry], texts, gym=[gym] * 9)
    assert got.outcome == ["ok", *["wrong"] * 5, "ok", "unparsable", "unparsable"]
    assert got.value_BR[:, 0].tolist() == pytest.approx([1, 0.005, 0, 0, 0, 0.125, 1, 0, 0])
    assert table([entry], ["x"], gym=[None]).total_B.isnan().all()
    with pytest.raises(RewardError, match="no row of the task reasoning_gym"):
        table([entry], ["<answer>7</answer>"], gym=["{}"])


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is not None, reason="reasoning-gym is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(SandboxError, match=r"pip install 'unmask\[reasoning-gym\]'"):
        reasoning.ready()
