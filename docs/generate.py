"""Writes the reference from what runs: methods.yaml, the registry, the schema, the command line and the docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

import unmask
from unmask.recipes.loading import load_methods
from unmask.recipes.registry import SLOTS
from unmask.rl.cli import app
from unmask.rl.cli_summary import import_parts

FACTS = (("source", "Source"), ("cost", "Cost"), ("bias", "Bias"), ("departs", "Where it departs from released code"))


def write(folder: Path) -> None:
    """Write every generated page below `folder`, and remove those of methods that are gone."""
    pages = {"methods/index.md": methods_index(), "parts.md": parts(), "commands.md": commands(), "python.md": python()}
    pages |= {f"methods/{name}.md": method(name, row) for name, row in load_methods().items()}
    for path in folder.rglob("*.md"):
        if str(path.relative_to(folder)) not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# Published methods that are no row, and why: nothing here is guessed.
LEFT_OUT = {
    "DACA-GRPO (arXiv 2605.16342)": "its denoising progress scores and strata are named in the abstract; the equations "
    "were not at hand, and there is no released code",
    "RSPO (arXiv 2605.10218)": "the equations were not at hand; what others restate of them leaves open whether the "
    "log-ratio to the reference is a sum or a mean over tokens, which decides what its lambda of 0.01 means",
    "d2-AnyOrder (arXiv 2509.21474)": "needs a model that was trained to decode in any order with causal masks; none "
    "of the families here is",
    "AGRPO's draw by entropy (arXiv 2510.04019)": "rollouts record no entropies; `agrpo` draws steps uniformly, which "
    "estimates the same gradient",
}


def methods_index() -> str:
    """Return the page that lists the methods."""
    rows = load_methods()
    lines = [
        "# Methods",
        "",
        "A method is a row of `recipes/methods.yaml`; a recipe's `objective` may replace any choice.",
        "",
    ]
    lines += ["| method | what it is |", "|---|---|"]
    lines += [f"| [`{name}`]({name}.md) | {escaped(row['summary'])} |" for name, row in rows.items()]
    lines += ["", "Left out:", "", "| method | why |", "|---|---|"]
    lines += [f"| {name} | {escaped(reason)} |" for name, reason in LEFT_OUT.items()]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", *rows, "```", ""])


def method(name: str, row: dict[str, Any]) -> str:
    """Return a method's page: equation, source, cost, bias, departures and choices."""
    lines = [f"# `{name}`", "", escaped(row["summary"]), ""]
    if "equation" in row:
        lines += ["## Equation", "", "```text", str(row["equation"]).strip(), "```", ""]
    for key, title in FACTS:
        if key in row:
            lines += [f"## {title}", "", escaped(str(row[key]).strip()), ""]
    lines += ["## Choices", "", "| key of `objective` | choice |", "|---|---|"]
    lines += [f"| `{key}` | {code(value)} |" for key, value in row["objective"].items()]
    others = {k: v for k, v in row.items() if k not in {"summary", "equation", "objective", *dict(FACTS)}}
    if others:
        lines += ["", "Besides:", "", *(f"* `{key}`: {code(value)}" for key, value in others.items())]
    return "\n".join([*lines, "", "In a recipe:", "", "```yaml", f"method: {name}", "```", ""])


def parts() -> str:
    """Return the page of every slot: signature, and each part with its knobs and docstring."""
    lines = ["# Parts", "", "What a slot offers. `package.module:function` names a part of your own.", ""]
    for name, slot in SLOTS.items():
        import_parts(name)
        lines += [f"## {name}", "", "```text", slot.signature, "```", ""]
        for part in slot:
            lines += [f"### {name} `{part}`", "", text_of(slot.get(part)), ""]
            knobs = slot.knobs(part).values()
            if knobs:
                lines += ["| knob | type | default |", "|---|---|---|"]
                lines += [f"| `{knob.name}` | {code(annotation(knob))} | {default(knob)} |" for knob in knobs]
                lines.append("")
    return "\n".join(lines)


def commands() -> str:
    """Return the page of the command line, from the commands themselves."""
    lines = ["# Commands", "", "Every command refuses what it cannot do in one line, with exit code 2.", ""]
    for path, command in _commands(typer.main.get_command(app), "unmask"):
        lines += [f"## {path}", "", escaped(inspect.cleandoc(command.help or "")), ""]
        named = [p for p in command.params if p.name != "help"]
        if named:
            lines += ["| argument | meaning |", "|---|---|"]
            lines += [f"| {code(_usage(p))} | {escaped(getattr(p, 'help', None) or '')} |" for p in named]
            lines.append("")
    return "\n".join(lines)


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        if getattr(inner, "commands", None):
            yield from _commands(inner, f"{path} {name}")
        else:
            yield f"{path} {name}", inner


def _usage(parameter: Any) -> str:
    """Return an argument or option as it is typed."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return " ".join(
        [parameter.opts[0], *([] if parameter.is_flag else [str(parameter.metavar or "VALUE").strip("[]")])]
    )


def python() -> str:
    """Return the page of the public Python names."""
    lines = [
        "# Python",
        "",
        "`from unmask import ...`; tensors carry their shape in their names, see the README's letters.",
        "",
    ]
    for name in unmask.__all__:
        value = getattr(unmask, name)
        if name.startswith("__"):
            continue
        lines += [f"## {name}", "", "```text", f"{name}{signature(value)}", "```", "", text_of(value), ""]
        if inspect.isclass(value):
            for inner, member in sorted(vars(value).items()):
                if not inner.startswith("_") and inspect.isfunction(member) and inspect.getdoc(member):
                    lines += [
                        f"### {name}.{inner}",
                        "",
                        "```text",
                        f"{inner}{signature(member)}",
                        "```",
                        "",
                        text_of(member),
                        "",
                    ]
    return "\n".join(lines)


def signature(value: Callable[..., Any]) -> str:
    """Return a signature on one line, without default objects that have no short form."""
    try:
        found = inspect.signature(value)
    except ValueError:  # a class without a constructor of its own
        return ""
    if len(found.parameters) > 12:  # a configuration: its fields are listed by its base class
        return "(...)"
    shown = [p.replace(default=...) if dataclasses.is_dataclass(p.default) else p for p in found.parameters.values()]
    return re.sub(r"<factory>|<[^<>]+ at 0x[0-9a-f]+>", "...", str(found.replace(parameters=shown))).replace("'", "")


def text_of(value: Any) -> str:
    """Return a docstring as Markdown; its marks are ours, so that only what Markdown would misread is escaped."""
    return escaped(inspect.getdoc(value) or "")


def annotation(parameter: inspect.Parameter) -> str:
    """Return a knob's type."""
    return inspect.formatannotation(parameter.annotation).replace("typing.", "")


def default(parameter: inspect.Parameter) -> str:
    """Return a knob's default, or that it has none."""
    return "required" if parameter.default is parameter.empty else code(parameter.default)


def code(value: Any) -> str:
    """Return a value as code for the inside of a table."""
    return "`" + str(value).replace("|", "\\|").replace("`", "'") + "`"


def escaped(text: str) -> str:
    """Return text whose characters outside `code` mean themselves, but for its paragraphs and lists."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if i % 2 else re.sub(r"([*_<>|\[\]$\\~])", r"\\\1", p) for i, p in enumerate(pieces))
