"""Rewards that other people made: reward models through transformers, rubrics of single-turn environments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from ..recipes.registry import SLOTS
from .building import accepted_arguments
from .verdicts import LogMetric, RewardError, RewardFunction, text_of


@SLOTS["reward"].register
def reward_model(
    *,
    path: str,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    batch: int = 8,
    max_length: int = 2048,
    scale: float = 1.0,
) -> RewardFunction:
    """`scale` times the score that a sequence-classification model with one label gives to prompt and completion.

    `path` is a folder or hub id that transformers loads without remote code; it is read at the first call. With a chat
    template, prompt and completion are its turns; without one, their texts follow each other. Longer sequences are cut
    to `max_length` tokens from the left. It reports no outcome.
    """

    def reward_model_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        model, tokenizer = load_judge(path, dtype, device)
        texts = [_conversation(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
        scores = judge_texts(model, tokenizer, texts, batch=batch, max_length=max_length)
        return [scale * score for score in scores]

    return reward_model_reward


@functools.lru_cache(maxsize=4)
def load_judge(path: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a reward model in evaluation mode; RewardError for what is none."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RewardError(f"reward 'reward_model': '{path}' cannot be loaded ({reason:.200}).") from error
    if model.config.num_labels != 1:
        raise RewardError(
            f"reward 'reward_model': '{path}' has {model.config.num_labels} labels, a reward model has one score; "
            "choose another model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    return model.to(place).eval(), tokenizer


def judge_texts(model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int, max_length: int) -> list[float]:
    """Return a reward model's score of each text, in float32; the longest share a forward."""
    import torch

    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    scores = [0.0] * len(texts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        encoded = tokenizer(
            [texts[row] for row in rows],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=max_length,
            add_special_tokens=tokenizer.chat_template is None,
        )
        inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            logits_B1 = model(**inputs).logits.float()
        for row, score in zip(rows, logits_B1[:, 0].tolist(), strict=True):
            scores[row] = score
    return scores


def _conversation(tokenizer: Any, prompt: Any, completion: Any) -> str:
    said = text_of(completion)
    if tokenizer.chat_template is None:
        shown = prompt if isinstance(prompt, str) else "\n".join(text_of([message]) for message in prompt)
        return shown + said
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": said}], tokenize=False)


@SLOTS["reward"].register
def environment(*, path: str, arguments: dict[str, Any] | None = None) -> RewardFunction:
    """The weighted sum of the functions of a single-turn environment's rubric, in the style of verifiers.

    `path` is `package.module:load_environment`, which is called with `arguments` and returns an object with a `rubric`:
    its `funcs` and `weights` (or `get_reward_funcs()`, `get_reward_weights()`). Each function, plain or asynchronous,
    gets those of `prompt`, `completion` (messages), `answer`, `info`, `task`, `state`, `parser` and the row's other
    columns that it names. Every function's mean is logged. It reports no outcome. Use it with the task `environment`.
    """
    made = load_environment(path, **(arguments or {}))
    functions, weights = rubric_of(made, path)

    async def environment_reward(
        prompts: list[Any], completions: list[Any], log_metric: LogMetric | None = None, **columns: Any
    ) -> list[float]:
        totals = []
        rows = {name: values for name, values in columns.items() if isinstance(values, list)}
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: values[index] for name, values in rows.items()}
            values = await _rubric_values(made, functions, prompt, completion, row)
            totals.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            if log_metric is not None:
                for function, value in zip(functions, values, strict=True):
                    log_metric(f"environment/{function.__name__}", value)
        return totals

    return environment_reward


def load_environment(path: str, **arguments: Any) -> Any:
    """Return the environment that `package.module:function` makes."""
    if ":" not in path:
        raise RewardError(f"environment.path: '{path}' names no function; write `package.module:load_environment`.")
    return SLOTS["reward"].get(path)(**arguments)


def rubric_of(made: Any, path: str) -> tuple[list[Callable[..., Any]], list[float]]:
    """Return the functions and weights of an environment's rubric; RewardError when it has none."""
    rubric = getattr(made, "rubric", None)
    functions = getattr(rubric, "funcs", None) or _called(rubric, "get_reward_funcs")
    weights = getattr(rubric, "weights", None) or _called(rubric, "get_reward_weights")
    if not functions or not weights or len(functions) != len(weights):
        raise RewardError(
            f"environment.path: what '{path}' returns has no `rubric` with as many `funcs` as `weights`; a single-turn "
            "environment of verifiers has one."
        )
    return list(functions), [float(weight) for weight in weights]


def _called(rubric: Any, name: str) -> Any:
    method = getattr(rubric, name, None)
    return method() if callable(method) else None


async def _rubric_values(
    made: Any, functions: Sequence[Callable[..., Any]], prompt: Any, completion: Any, row: Mapping[str, Any]
) -> list[float]:
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    said = [{"role": "assistant", "content": text_of(completion)}]
    state = {"prompt": messages, "completion": said, "timing": {}, **row}
    given = {"answer": "", "info": {}, "task": "default", **row, "prompt": messages, "completion": said}
    given |= {"state": state, "parser": getattr(made, "parser", None)}
    values = []
    for function in functions:
        found: float | Awaitable[float] = function(**accepted_arguments(function, given))
        values.append(float(await found if inspect.isawaitable(found) else found))
    return values
