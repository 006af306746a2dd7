"""The documents' code and recipes work as they stand."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from unmask.policies import families
from unmask.policies.loading import load_denoiser, new_denoiser
from unmask.recipes.loading import load_methods, parse_recipe, resolve, slot_of
from unmask.recipes.preferences import PreferenceRecipe
from unmask.recipes.reading import shipped_recipes
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.recipes.schema import Recipe, SftRecipe
from unmask.recipes.sections import Section
from unmask.rewards.building import build_rewards
from unmask.rollouts import selection
from unmask.rollouts.schedules import Quota

ROOT = Path(__file__).parents[1]
TABLES = "<!-- written by tests/test_documents.py -->\n\n"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def fences(path: Path, language: str) -> list[str]:
    """Return the code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def fence(path: Path, language: str, word: str) -> str:
    """Return the one code block that contains `word`."""
    (found,) = [text for text in fences(path, language) if word in text]
    return found


def plain(annotation: Any) -> str:
    """Return a field's type in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return plain(args[0])
    if origin is Literal:
        return " ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        return " or ".join(plain(kind) for kind in args)
    if origin in (list, tuple):
        return f"list of {plain(args[0])}"
    words = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}
    return words.get(annotation, "section")


def sections_of(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_of(inner)


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield a table row for every key of a section and of the sections in it: name, values, default, meaning."""
    for name, info in section.model_fields.items():
        slot, values = slot_of(info), plain(info.annotation)
        if slot is not None:
            values = f"part of `{slot}`" if not values.startswith("list") else f"list of parts of `{slot}`"
        default = "required" if info.is_required() else shown(info.get_default(call_default_factory=True))
        yield f"| `{prefix}{name}` | {values} | {default} | {info.description} |"
        if prefix + name != "evaluation.sampler":  # its keys are those of rollout.sampler
            for inner in sections_of(info.annotation) if slot is None else ():
                yield from keys_of(inner, f"{prefix}{name}.")


def shown(value: object) -> str:
    """Return a default as a recipe would write it."""
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value['name'] if isinstance(value, dict) else value)}`"


def key_tables() -> str:
    """Return the tables of docs/recipes.md, made from the schema that checks recipes."""
    head = "| key | values | default | meaning |\n|---|---|---|---|\n"
    rows = list(keys_of(Recipe))
    supervised = [row for row in keys_of(SftRecipe) if row not in rows]
    pairs = [row for row in keys_of(PreferenceRecipe) if row not in rows]
    text = head + "\n".join(rows)
    for kind, own in (("Supervised", supervised), ("Preference", pairs)):
        text += f"\n\n{kind} recipes differ in:\n\n" + head + "\n".join(own)
    return text + "\n"


def test_the_table_of_keys_is_the_schema() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert text.partition(TABLES)[2] == key_tables(), "write it anew: .venv/bin/python tests/test_documents.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_compiles_and_yaml_parses(path: Path) -> None:
    for text in fences(path, "python"):
        compile(text, str(path), "exec")
    for text in fences(path, "yaml"):
        assert yaml.safe_load(text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_named_files_exist(path: Path) -> None:
    folders = "policies|recipes|rewards|rl|rollouts|tests|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./]+\.(?:py|yaml|md))`", path.read_text()):
        assert (ROOT / name).is_file(), name


def test_the_readmes_recipe_is_valid() -> None:
    recipe = parse_recipe(fence(ROOT / "README.md", "yaml", "my_first_run"), source="README.md")
    assert recipe.kind == "rl"
    assert len(fence(ROOT / "README.md", "yaml", "my_first_run").splitlines()) <= 22


def test_the_readmes_shipped_recipes_exist() -> None:
    for name in re.findall(r"unmask (?:check|train|cp) (\w+)(?=[ \n])", (ROOT / "README.md").read_text()):
        assert name in shipped_recipes(), name


def method_table() -> str:
    """Return the README's table of methods, made from methods.yaml."""
    rows = ["| method | what it is | estimator | ratio over | forwards a rollout |", "|---|---|---|---|---|"]
    for name, method in load_methods().items():
        choice = method["objective"]
        estimator, unit = (c if isinstance(c, str) else c["name"] for c in (choice["estimator"], choice["unit"]))
        summary = method["summary"].strip().rstrip(".")
        rows.append(f"| `{name}` | {summary} | `{estimator}` | {unit} | {method['cost']} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_methods_is_the_methods() -> None:
    assert method_table() in (ROOT / "README.md").read_text(), "write it anew: .venv/bin/python tests/test_documents.py"


def test_the_readmes_python_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = fence(ROOT / "README.md", "python", "UnmaskTrainer(")
    # One step of a random model says that the names fit; what the tiny model learns is measured elsewhere.
    new_denoiser(hidden_size=16, layers=1, heads=2, mlp=16).save(tmp_path / "model")
    for old, new in (("unmask:tiny", str(tmp_path / "model")), ("max_steps=20", "max_steps=1")):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    (line,) = (tmp_path / "runs" / "sevens" / "metrics.jsonl").read_text().splitlines()
    assert "loss" in json.loads(line)


def test_the_example_of_a_trajectory_prints_what_stands_below_it() -> None:
    path = ROOT / "docs" / "trajectories.md"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(fence(path, "python", "canvas_before"), str(path), "exec"), {})
    assert printed.getvalue() in fences(path, "text")


def test_the_example_of_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "docs" / "extending.md"
    (tmp_path / "my_rewards.py").write_text(fence(path, "python", "def brief"))
    monkeypatch.syspath_prepend(tmp_path)
    rewards = build_rewards(yaml.safe_load(fence(path, "yaml", "my_rewards"))["rewards"])
    assert [reward.weight for reward in rewards] == [1.0, 0.1]
    values = rewards[1].function(prompts=["?"] * 2, completions=["a" * 60, "a" * 61], completion_ids=[[], []])
    assert values == [1.0, 0.0]


def test_the_example_of_a_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "docs" / "extending.md"
    slot = SLOTS["selection"]
    monkeypatch.setattr(slot, "_parts", dict(slot._parts))
    exec(compile(fence(path, "python", "near_best"), str(path), "exec"), dict(vars(selection)))
    section = yaml.safe_load(fence(path, "yaml", "near_best"))["sampler"]
    choose = slot.build(section["selection"])
    score_BL = torch.tensor([[-0.1, -0.14, -0.2, -torch.inf]])
    window_BL = torch.tensor([[True, True, True, False]])
    assert choose(score_BL, Quota(window_BL, torch.tensor([1]))).tolist() == [[True, True, False, False]]
    assert choose(score_BL, Quota(window_BL, torch.tensor([3]))).tolist() == [[True, True, True, False]]
    with pytest.raises(RecipeError, match="width"):
        slot.build({"name": "near_best", "width": -1.0})(score_BL, Quota(window_BL, torch.tensor([1])))


def test_the_example_of_a_method() -> None:
    path = ROOT / "docs" / "extending.md"
    ((name, method),) = yaml.safe_load(fence(path, "yaml", "cj_grpo_tight")).items()
    assert name not in load_methods()
    assert method.keys() == load_methods()["cj_grpo"].keys() - {"paper"}
    assert method["objective"].keys() == load_methods()["cj_grpo"]["objective"].keys()
    data = yaml.safe_load(fence(ROOT / "README.md", "yaml", "my_first_run"))
    recipe = resolve({**data, "method": None, "objective": method["objective"]})
    assert recipe.objective.inner_steps == 4  # type: ignore[union-attr]


def test_the_example_of_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "docs" / "extending.md"
    names = dict(vars(families))
    exec(compile(fence(path, "python", "MINE"), str(path), "exec"), names)
    monkeypatch.setitem(families.LAYOUTS, "mine", names["MINE"])
    vendor = {"architectures": ["MyDiffusionLM"], "vocab_size": 261, "dim": 16, "ffn_dim": 24, "depth": 2, "heads": 2}
    vendor |= {"mask_token_id": 257, "eos_token_id": 256}
    (tmp_path / "config.json").write_text(json.dumps(vendor))
    config = LlamaConfig(**names["MINE"].stock_config(vendor), pad_token_id=None)
    state = {names["MINE"].to_vendor(k): v.contiguous() for k, v in LlamaForCausalLM(config).state_dict().items()}
    assert "backbone.layers.0.self_attn.q_proj.weight" in state and "output.weight" in state
    save_file(state, tmp_path / "model.safetensors")
    denoiser = load_denoiser(str(tmp_path))
    denoiser.save(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[k], state[k]) for k in state)


def test_the_table_of_precision_is_the_result() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "bf16.json").read_text())["result"]["rows"]
    keys = ("stock", "vendor", "stock_to_vendor", "cast")
    lines = [
        " | ".join([f"| `{row['family']}`", *("" if row[key] is None else f"{row[key]:.1e}" for key in keys)]) + " |"
        for row in rows
    ]
    text = (ROOT / "docs" / "precision.md").read_text()
    assert "\n".join(lines) in text


def test_minimal_has_as_many_lines_as_the_readme_says() -> None:
    (lines,) = re.findall(r"(\d+) lines from loading", (ROOT / "README.md").read_text())
    spec = importlib.util.find_spec("unmask.recipes.minimal")
    assert spec is not None and spec.origin is not None
    assert len(Path(spec.origin).read_text().splitlines()) == int(lines)


if __name__ == "__main__":
    document = ROOT / "docs" / "recipes.md"
    document.write_text(document.read_text().partition(TABLES)[0] + TABLES + key_tables())
    readme = ROOT / "README.md"
    old = re.search(r"(?:\| method \|.*\n)(?:\|.*\n)+", readme.read_text())
    assert old is not None
    readme.write_text(readme.read_text().replace(old[0], method_table()))


def test_the_table_of_conversions_is_the_result() -> None:
    lines = []
    for row in json.loads((ROOT / "benchmarks" / "results" / "converting.json").read_text())["result"]["rows"]:
        found = [row[when][kind] for kind in ("exact", "late") for when in ("before", "after")]
        assert row["after"]["exact"]["mean"] < 0.5 * row["before"]["exact"]["mean"]
        cells = [f"{loss['mean']:.2f} ± {loss['stderr']:.2f}" for loss in found]
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    assert "\n".join(lines) in (ROOT / "docs" / "converting.md").read_text()
