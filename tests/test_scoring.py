"""score(): the table, TRL's calling convention, concurrency, outcomes, and every refusal."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
import time
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from unmask.rewards import Reward, RewardError, RewardTable, build_rewards, score

ROWS = [{"prompt": f"p{i}", "numbers": [3, 8], "target": target} for i, target in enumerate([11, 5, 24])]
TEXTS = ["#### 3+8", "#### 3+8", "none"]
IDS = [[1, 2], [3], [4, 5, 6]]


def table(*rewards: Any, rows: Any = ROWS, texts: Any = TEXTS, ids: Any = IDS, **kwargs: Any) -> RewardTable:
    return score(build_rewards(list(rewards)), rows, [row["prompt"] for row in rows], texts, ids, **kwargs)


def returns(*values: Any) -> Any:
    def constant(completions: list[Any]) -> list[Any]:
        return list(values)

    return constant


def test_values_weights_and_total() -> None:
    got = table("countdown", {"name": "answer_format", "weight": 0.5}, Reward("penalty", returns(-2, None, 1), -0.25))
    assert got.names == ("countdown", "answer_format", "penalty") and len(got) == 3
    assert torch.equal(got.weight_R, torch.tensor([1.0, 0.5, -0.25]))
    nan = math.nan
    expected = torch.tensor([[1.0, 1.0, -2.0], [0.0, 1.0, nan], [0.0, 0.0, 1.0]])
    assert torch.equal(got.value_BR.nan_to_num(99.0), expected.nan_to_num(99.0)) and got.value_BR.is_contiguous()
    assert torch.equal(got.total_B, torch.tensor([1.0 + 0.5 + 0.5, 0.5, -0.25]))
    assert got.value_BR.dtype == got.weight_R.dtype == got.total_B.dtype == torch.float32
    assert got.outcome == ["ok", "wrong", "unparsable"]
    assert got.extra == {"extracted": ["3+8", "3+8", None]} and got.metrics == {}


def test_none_means_does_not_apply(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        got = table(returns(None, 2.0, None), Reward("b", returns(None, None, 0.0)))
    assert got.total_B[0].isnan() and got.total_B[1:].tolist() == [2.0, 0.0]
    assert got.outcome == ["error", "ok", "wrong"]
    assert "no reward applies to 1 of 3 completions; first: 'p0'" in caplog.text


def test_functions_get_trl_arguments() -> None:
    seen: dict[str, Any] = {}

    def everything(prompts: Any, completions: Any, completion_ids: Any, **kwargs: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        return [0.0] * 3

    state = object()
    rows = [{**row, "completion": "gold", "completion_ids": [0]} for row in ROWS]
    table(everything, rows=rows, trainer_state=state)
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen.pop("trainer_state") is state
    assert seen == {
        "prompts": ["p0", "p1", "p2"],
        "completions": TEXTS,
        "completion_ids": IDS,
        "numbers": [[3, 8]] * 3,
        "target": [11, 5, 24],
    }


def test_a_function_without_kwargs_gets_only_what_it_names() -> None:
    def short(completion_ids: list[list[int]], target: list[int]) -> list[float]:
        return [float(len(ids) * goal) for ids, goal in zip(completion_ids, target, strict=True)]

    assert table(short).value_BR[:, 0].tolist() == [22.0, 5.0, 72.0]


def test_rows_may_differ_in_columns() -> None:
    rows = [{"prompt": "a", "answer": "5"}, {"prompt": "b", "numbers": [3, 8], "target": 11}]
    got = table("arithmetic", "countdown", rows=rows, texts=["#### 5", "#### 8*3"], ids=[[1], [2]])
    assert got.value_BR.nan_to_num(-1.0).tolist() == [[1.0, -1.0], [-1.0, 0.0]]
    assert got.total_B.tolist() == [1.0, 0.0] and got.outcome == ["ok", "wrong"]
    assert got.extra == {"arithmetic/extracted": ["5", None], "countdown/extracted": [None, "8*3"]}


def test_conversational_rows_get_messages() -> None:
    chat = [{"role": "user", "content": "3 8 -> 11"}]
    rows = [{"prompt": chat, "numbers": [3, 8], "target": 11}, {"prompt": "plain", "numbers": [3, 8], "target": 11}]
    seen: list[Any] = []

    def look(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.extend([prompts, completions])
        return [0.0, 0.0]

    functions = build_rewards(["countdown", "answer_format", look])
    got = score(functions, rows, ["<user>3 8 -> 11", "plain"], ["#### 3+8", "#### 8+3"], [[1], [2]])
    assert seen[0] == [chat, "plain"]  # the dataset's prompt, not the rendered text
    assert seen[1] == [[{"role": "assistant", "content": "#### 3+8"}], "#### 8+3"]
    assert got.value_BR.tolist() == [[1.0, 1.0, 0.0]] * 2
    already = score(functions[:1], rows[:1], [chat], [[{"role": "assistant", "content": "#### 3+8"}]], [[1]])
    assert already.value_BR.tolist() == [[1.0]]


def test_trl_rewards_pass_unchanged() -> None:
    rows = [{"prompt": [{"role": "user", "content": "q"}]}] * 3
    texts = ["<think>\na\n</think>\nb", "b", "<think>a"]
    ids = [[1] * 90, [1] * 80, [5] * 120]
    punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    repeat = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    got = table(think_format_reward, punish, repeat, "trl.rewards:think_format_reward", rows=rows, texts=texts, ids=ids)
    assert got.names[:2] == ("think_format_reward", "soft_overlong_punishment_reward")
    assert got.value_BR[:, 0].tolist() == got.value_BR[:, 3].tolist() == [1.0, 0.0, 0.0]
    assert got.value_BR[:, 1].tolist() == [-0.5, 0.0, -1.0]
    # n-grams: 89 pairs of which 1 differs, 79 and 1, 119 and 1
    assert torch.allclose(got.value_BR[:, 2], -torch.tensor([88 / 89, 78 / 79, 118 / 119]))


def test_async_rewards_run_together_and_beside_sync_ones() -> None:
    both, sync_started = asyncio.Event(), threading.Event()
    threads: dict[str, int] = {}

    async def first(completions: list[str], **_: Any) -> list[float]:
        threads["first"] = threading.get_ident()
        await asyncio.wait_for(both.wait(), 120)  # times out unless `second` runs meanwhile
        return [1.0] * 3

    class Second:
        async def __call__(self, completions: list[str], bonus: float = 0.0, **_: Any) -> list[float]:
            assert await asyncio.to_thread(sync_started.wait, 120)  # and fails unless `slow` runs meanwhile
            both.set()
            return [bonus] * 3

    def slow(completions: list[str]) -> list[float]:
        threads["slow"] = threading.get_ident()
        sync_started.set()
        time.sleep(0.01)
        return [3.0] * 3

    second = functools.partial(Second(), bonus=2.0)
    got = table(first, Reward("second", second), slow, Reward("lambda", lambda completions: first(completions)))
    assert got.value_BR.tolist() == [[1.0, 2.0, 3.0, 1.0]] * 3
    assert threads["slow"] == threading.get_ident() != threads["first"]


def test_one_event_loop_for_all_calls_also_inside_a_running_loop() -> None:
    loops = []

    async def remember(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * 3

    async def notebook() -> RewardTable:
        return table(remember)

    table(remember)
    assert asyncio.run(notebook()).value_BR.tolist() == [[0.0]] * 3
    assert loops[0] is loops[1]


def test_an_error_cancels_the_other_async_rewards() -> None:
    cancelled = threading.Event()
    started = threading.Event()

    async def forever(completions: list[str]) -> list[float]:
        try:
            started.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [0.0] * 3

    def fails(completions: list[str]) -> list[float]:
        started.wait(10)
        raise KeyError("numbers")

    with pytest.raises(RewardError, match=r"reward 'fails' raised KeyError: 'numbers' \(batch of 3 completions\)"):
        table(forever, fails)
    assert cancelled.wait(10)


def test_outcomes_are_reported_or_derived() -> None:
    def reports(*codes: Any) -> Any:
        def judge(completions: list[str], log_extra: Any) -> list[float]:
            log_extra("outcome", codes)
            return [0.0] * 3

        return judge

    assert table(returns(1, 0.99, 2)).outcome == ["ok", "wrong", "ok"]
    assert table(returns(None, 1, 0), returns(1, 0, 1)).outcome == ["ok", "ok", "wrong"]
    # a report beats an earlier reward's value; the first report beats the next; None falls through
    assert table(returns(1, 1, 1), reports("timeout", None, "error"), reports("ok", "unparsable", "ok")).outcome == [
        "timeout",
        "unparsable",
        "error",
    ]
    assert "outcome" not in table(reports("ok", "ok", "ok")).extra
    with pytest.raises(RewardError, match=r"reward 'judge': outcome 'rong' is not a code.*Did you mean 'wrong'\?"):
        table(reports("ok", "rong", "ok"))


def test_logged_columns_and_metrics() -> None:
    def logs(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
        for text in completions:
            log_extra("length", [len(text)])  # one call a completion adds up, as in TRL
        log_metric("mean_length", 1)
        log_metric("mean_length", numpy.float32(2.5))
        return [0.0] * 3

    def more(completions: list[str], log_metric: Any) -> list[float]:
        log_metric("mean_length", torch.tensor(4.0))
        log_metric("other", -1)
        return [0.0] * 3

    got = table(logs, more)
    assert got.extra == {"length": [8, 8, 4]}
    assert got.metrics == {"mean_length": 2.5, "other": -1.0}
    assert set(table(logs, logs).extra) == {"logs/length", "logs_2/length"}


@pytest.mark.parametrize(
    "values",
    [
        [1, 0, None],
        (1.0, 0.0, None),
        [True, False, None],
        [numpy.float32(1), numpy.int64(0), None],
        [torch.tensor(1.0), torch.tensor(0), None],
        [Fraction(1), Fraction(0), None],
        iter([1, 0, None]),
    ],
)
def test_kinds_of_numbers(values: Any) -> None:
    assert table(lambda completions: values).value_BR[:, 0].nan_to_num(-1.0).tolist() == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("values", [torch.tensor([1, 0, 2]), numpy.array([1.0, 0.0, 2.0])])
def test_arrays(values: Any) -> None:
    assert table(lambda completions: values).value_BR[:, 0].tolist() == [1.0, 0.0, 2.0]


REFUSED = [
    ([1.0, math.nan, 1.0], "returned nan for completion 1", "None where it does not apply"),
    ([1.0, 1.0, math.inf], "returned inf for completion 2", "finite"),
    ([-math.inf, 1.0, 1.0], "returned -inf for completion 0", "finite"),
    ([1e39, 1.0, 1.0], "returned 1e+39 for completion 0", "finite"),
    ([10**400, 1.0, 1.0], "for completion 0", "finite"),
    (["1.0", 1.0, 1.0], "returned '1.0' for completion 0", "finite number"),
    ([[1.0], 1.0, 1.0], "returned [1.0] for completion 0", "finite number"),
    ([1j, 1.0, 1.0], "returned 1j for completion 0", "finite number"),
    (torch.ones(3, 1), "returned [1.0] for completion 0", "finite number"),
    (torch.tensor([1.0, math.nan, 1.0]), "returned nan for completion 1", "finite number"),
    ([1.0, 1.0], "returned 2 values for 3 completions", "exactly one a completion"),
    ([1.0] * 4, "returned 4 values for 3 completions", "exactly one a completion"),
    ([], "returned 0 values for 3 completions", "exactly one a completion"),
    (1.0, "returned 1.0; return a list", "one number or None a completion"),
    (torch.tensor(1.0), "returned 1.0; return a list", "one number or None a completion"),
    (None, "returned None; return a list", "one number or None a completion"),
    ("abc", "returned 'abc'; return a list", "one number or None a completion"),
    ({0: 1.0, 1: 1.0, 2: 1.0}, "return a list", "one number or None a completion"),
    ({1.0, 2.0, 3.0}, "return a list", "one number or None a completion"),
    (think_format_reward, "return a list", "if it is a factory, register it"),
]


@pytest.mark.parametrize(("output", "value", "rule"), REFUSED)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_refused_outputs(output: Any, value: str, rule: str, kind: str) -> None:
    async def judge(completions: list[str]) -> Any:
        return output

    function = judge if kind == "async" else lambda completions: output
    with pytest.raises(RewardError) as error:
        table("countdown", Reward("mine", function))
    message = str(error.value)
    assert message.startswith("reward 'mine' ") and value in message and rule in message and "\n" not in message


def raises(completions: list[str]) -> list[float]:
    raise ZeroDivisionError("by zero")


async def araises(completions: list[str]) -> list[float]:
    raise ZeroDivisionError("by zero")


def short_column(completions: list[str], log_extra: Any) -> list[float]:
    log_extra("note", ["a"])
    return [0.0] * 3


def bad_metric(completions: list[str], log_metric: Any) -> list[float]:
    log_metric("speed", math.nan)
    return [0.0] * 3


def needs_column(completions: list[str], solution: list[str]) -> list[float]:
    return [0.0] * 3


CALLS = [
    (raises, "reward 'raises' raised ZeroDivisionError: by zero", "return None"),
    (araises, "reward 'araises' raised ZeroDivisionError: by zero", "return None"),
    (short_column, "reward 'short_column': log_extra('note', ...) got 1 values for 3", "one a completion"),
    (bad_metric, "reward 'bad_metric': log_metric('speed', nan)", "not a finite number"),
    (needs_column, "reward 'needs_column' needs the column 'solution'", "add it, or drop the reward"),
    (Reward("big", returns(1e38, 0, 0), 1e3), "overflows fp32", "scale"),
]


@pytest.mark.parametrize(("function", "value", "rule"), CALLS)
def test_refused_calls(function: Any, value: str, rule: str) -> None:
    with pytest.raises(RewardError) as error:
        table(function)
    assert value in str(error.value) and rule in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_an_exception_keeps_its_cause() -> None:
    with pytest.raises(RewardError) as error:
        table(raises)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_batches_must_agree() -> None:
    with pytest.raises(RewardError, match="3 rows, 3 prompts, 2 completions and 3 lists"):
        table("countdown", texts=TEXTS[:2])
    with pytest.raises(RewardError, match="there is no reward function"):
        score([], ROWS, ["a"] * 3, TEXTS, IDS)


def test_an_empty_batch_calls_nothing() -> None:
    got = table(raises, "countdown", rows=[], texts=[], ids=[])
    assert got.value_BR.shape == (0, 2) and got.total_B.shape == (0,) and got.outcome == [] and len(got) == 0
