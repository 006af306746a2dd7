"""Recipe entries to rewards: factories, plain TRL functions, knobs, weights, names, and what is refused."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rewards import Reward, RewardError, build_rewards, check_columns
from unmask.rewards.building import TRL_ARGUMENTS, accepted_arguments, callable_name, is_factory


def scaled(completions: list[str], *, scale: float = 1.0, log_extra: Any = None, **kwargs: Any) -> list[float]:
    return [scale * len(completion) for completion in completions]


def near(completions: list[str], goal: list[int], width: int = 1) -> list[float]:
    return [float(abs(len(text) - wanted) <= width) for text, wanted in zip(completions, goal, strict=True)]


def make_constant(value: float) -> Any:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [value] * len(completions)

    return constant


def raising_factory(limit: int) -> Any:
    raise ValueError(f"limit {limit} is too small")


def make_environment() -> Any:
    return types.SimpleNamespace(rubric=types.SimpleNamespace(funcs=[near], weights=[1.0]))


def unresolved(completions, scale: Missing = 1.0, **kwargs):  # type: ignore  # noqa: F821
    return [scale for _ in completions]


@pytest.fixture(autouse=True)
def module() -> Iterator[str]:
    """A user's module of reward functions under the name `my_rewards`."""
    made = types.ModuleType("my_rewards")
    for part in (scaled, near, make_constant, make_environment, raising_factory, unresolved):
        setattr(made, part.__name__, part)
    vars(made).update(number=3, not_a_factory=lambda: 3)
    sys.modules["my_rewards"] = made
    yield made.__name__
    del sys.modules["my_rewards"]


def test_registered_names_are_factories_with_knobs_and_weight() -> None:
    rewards = build_rewards(["arithmetic", {"name": "countdown", "weight": 2, "partial": 0.1}])
    assert [(reward.name, reward.weight) for reward in rewards] == [("arithmetic", 1.0), ("countdown", 2.0)]
    assert rewards[1].function(completions=["#### 3-8"], numbers=[[3, 8]], target=[11]) == [0.1]
    assert rewards[0].function(completions=["#### 3"], answer=["3"]) == [1.0]


REQUIRED = {
    "soft_length": {"limit": 100},
    "reward_model": {"path": "nowhere"},  # which is not looked at before the first call
    "environment": {"path": "my_rewards:make_environment"},
}


def test_every_registered_part_is_a_factory_without_trl_arguments() -> None:
    assert {"answer_format", "arithmetic", "countdown", "sudoku"} <= set(SLOTS["reward"])
    for name in SLOTS["reward"]:
        assert not SLOTS["reward"].knobs(name).keys() & TRL_ARGUMENTS and is_factory(SLOTS["reward"].get(name))
        [reward] = build_rewards([{"name": name, **REQUIRED.get(name, {})}], allow_code_execution=True)
        assert not is_factory(reward.function)


def test_a_plain_function_gets_its_knobs_bound() -> None:
    [plain] = build_rewards(["my_rewards:scaled"])
    [bound] = build_rewards([{"name": "my_rewards:scaled", "scale": "1e-1", "weight": -1.0}])
    assert plain.function is scaled and plain.name == bound.name == "scaled" and bound.weight == -1.0
    assert bound.function(completions=["abc"]) == [pytest.approx(0.3)]
    [positional] = build_rewards([{"name": "my_rewards:near", "width": 2}])
    assert positional.function(completions=["abc"], goal=[5]) == [1.0]
    [untyped] = build_rewards([{"name": "my_rewards:unresolved", "scale": "as it is"}])
    assert untyped.function(completions=["abc"]) == ["as it is"]


def test_a_factory_by_path_is_called() -> None:
    [made] = build_rewards([{"name": "my_rewards:make_constant", "value": 0.5}])
    assert made.name == "make_constant" and made.function(completions=["a", "b"]) == [0.5, 0.5]
    [builtin] = build_rewards([{"name": "unmask.rewards.countdown:countdown", "partial": 0.25}])
    assert builtin.function(completions=["#### 3-8"], numbers=[[3, 8]], target=[11]) == [0.25]
    knobs = {"max_completion_len": 100, "soft_punish_cache": 20}
    [overlong] = build_rewards([{"name": "trl.rewards:get_soft_overlong_punishment", **knobs}])
    assert overlong.function(completion_ids=[[1] * 90, [1] * 80, [1] * 101]) == [-0.5, 0.0, -1.0]


def test_callables_and_rewards_pass_and_names_are_unique() -> None:
    ready = Reward("scaled", scaled, 3.0)
    half = functools.partial(scaled, scale=0.5)
    rewards = build_rewards([scaled, half, ready, {"name": "answer_format", "style": "boxed"}, "answer_format"])
    assert [r.name for r in rewards] == ["scaled", "scaled_2", "scaled_3", "answer_format", "answer_format_2"]
    assert rewards[1].function is half and rewards[2].weight == 3.0


def test_names_of_callables() -> None:
    class Judge:
        def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [0.0] * len(completions)

    assert callable_name(functools.partial(functools.partial(scaled, scale=1), scale=2)) == "scaled"
    assert callable_name(Judge()) == "Judge" and not is_factory(Judge())


def test_accepted_arguments_keeps_what_the_function_names_and_bound_knobs_win() -> None:
    arguments = {"completions": ["a"], "goal": [1], "width": [9], "other": [2], "trainer_state": None}
    assert set(accepted_arguments(near, arguments)) == {"completions", "goal", "width"}
    assert set(accepted_arguments(functools.partial(near, width=2), arguments)) == {"completions", "goal"}
    assert accepted_arguments(scaled, arguments) == arguments


REFUSED = [
    ([], "rewards: the list is empty", "countdown"),
    ("countdown", "rewards: 'countdown' is not a list", "write"),
    ({"name": "countdown"}, "is not a list", "write"),
    (None, "rewards: None is not a list", "write"),
    ([{"weight": 1.0}], "rewards[0]", "names no reward"),
    ([3], "rewards[0]: 3 names no reward", "write"),
    ([{"name": 3}], "rewards[0]", "3 is not a name"),
    (["countdwn"], "unknown part 'countdwn'", "Did you mean 'countdown'?"),
    ([{"name": "countdown", "partail": 0.1}], "rewards[0]: reward 'countdown' has no knob 'partail'", "'partial'"),
    ([{"name": "countdown", "partial": "much"}], "rewards[0].partial", "'much' is not a float"),
    ([{"name": "countdown", "partial": 1.5}], "rewards.countdown.partial: 1.5", "[0, 1)"),
    ([{"name": "countdown", "extract": "bxed"}], "rewards[0].extract: 'bxed'", "'boxed'"),
    ([{"name": "countdown", "extract": "last_number"}], "'last_number' is not allowed", "Choices"),
    ([{"name": "answer_format", "style": "xml"}], "rewards[0].style: 'xml'", "Choices"),
    (["sudoku", {"name": "countdown", "weight": "heavy"}], "rewards[1].weight", "'heavy' is not a float"),
    ([{"name": "countdown", "weight": True}], "rewards[0].weight", "True is not a float"),
    ([{"name": "countdown", "weight": float("nan")}], "rewards[0].weight: nan", "not a float"),
    ([{"name": "countdown", "weight": float("inf")}], "rewards.countdown.weight: inf", "finite"),
    ([{"name": "countdown", "weight": 0}, {"name": "sudoku", "weight": 0.0}], "every weight is 0", "another weight"),
    ([{"name": "countdown", "completions": 1}], "has no knob 'completions'", "extract"),
    (["no_such_module:reward"], "rewards[0]", "cannot import 'no_such_module:reward'"),
    (["my_rewards:scald"], "rewards[0]", "cannot import 'my_rewards:scald'"),
    (["my_rewards:number"], "'my_rewards:number' is 3", "not a function"),
    ([{"name": "my_rewards:scaled", "scael": 2}], "'my_rewards:scaled' has no parameter 'scael'", "'scale'"),
    ([{"name": "my_rewards:scaled", "log_extra": 2}], "has no parameter 'log_extra'", "scale"),
    ([{"name": "my_rewards:scaled", "scale": "x"}], "rewards[0].scale: 'x'", "float"),
    (["my_rewards:make_constant"], "'my_rewards:make_constant' needs the parameter 'value'", ""),
    (["my_rewards:not_a_factory"], "'my_rewards:not_a_factory' returned 3", "completions"),
    ([{"name": "my_rewards:raising_factory", "limit": 2}], "refused its knobs {'limit': 2}", "limit 2 is too small"),
]


@pytest.mark.parametrize(("section", "value", "remedy"), REFUSED)
def test_refused(section: Any, value: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as error:
        build_rewards(section)
    message = str(error.value)
    assert value in message and remedy in message and "\n" not in message


def test_a_module_that_fails_to_import(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"cannot import 'broken_rewards:f' \(ZeroDivisionError: division"):
        build_rewards(["broken_rewards:f"])


def test_a_reward_must_be_callable() -> None:
    with pytest.raises(RecipeError, match=r"rewards.x: 3 is not callable"):
        Reward("x", 3)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"rewards.x.weight: nan is not a finite number"):
        Reward("x", scaled, float("nan"))


def test_columns_are_checked_before_any_rollout() -> None:
    rewards = build_rewards(["countdown", "my_rewards:scaled", {"name": "my_rewards:near", "width": 2}])
    check_columns(rewards, {"prompt": "x", "numbers": [1], "target": 1, "goal": 3})
    with pytest.raises(RewardError, match=r"reward 'near' needs the column 'goal'.*Did you mean 'gaol'\?"):
        check_columns(rewards, {"prompt": "x", "numbers": [1], "target": 1, "gaol": 3})
    with pytest.raises(RewardError, match=r"reward 'countdown' needs the column 'target'"):
        check_columns(rewards, {"prompt": "x", "numbers": [1]})
    with pytest.raises(RewardError, match=r"needs the column 'numbers'.*no column besides the prompt"):
        check_columns(rewards, {"prompt": "x"})
    # what TRL never passes on is no column, whatever the dataset holds
    with pytest.raises(RewardError, match="needs the column 'completion'"):
        check_columns([Reward("r", lambda completions, completion: [])], {"prompt": "x", "completion": "y"})
    # a bound knob and a default need no column
    check_columns([Reward("near", functools.partial(near, goal=[1]))], {"prompt": "x"})


@pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_extra", "log_metric"])
def test_columns_named_like_arguments_are_refused(column: str) -> None:
    with pytest.raises(RewardError, match=f"column '{column}' has the name of an argument; rename"):
        check_columns(build_rewards(["answer_format"]), {"prompt": "x", column: 1})


def test_rewards_are_built_and_checked_without_torch() -> None:
    code = (
        "import sys, unmask.rewards as r, unmask.rewards.scoring\n"
        "r.check_columns(r.build_rewards(['countdown', 'sudoku']), {'numbers': [], 'target': 1, 'puzzle': ''})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
