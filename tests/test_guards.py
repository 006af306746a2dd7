"""Rules that no change should have to remember: direction of imports, sizes, forbidden calls, documented parts."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from unmask.recipes.registry import SLOTS

ROOT = Path(__file__).parents[1]
FOLDERS = ("policies", "recipes", "rewards", "rl", "rollouts")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]
# Runs in the sandbox only, as the interpreter's own code, and is imported by the sandbox for its reading of messages.
MAY_EXECUTE = ("rewards/inside.py",)
MAY_PRINT = ("recipes/minimal.py", "rl/cli.py")
# Which folders (or single modules) a folder's modules may import.
MAY_IMPORT = {
    "recipes": ("recipes",),
    "rewards": ("rewards", "recipes.registry"),
    "policies": ("policies", "recipes.registry"),
    "rollouts": ("rollouts", "policies", "recipes.registry"),
    "rl": FOLDERS,
}
# A rollout batch carries the reward table, so its type, and nothing of it at run time, is known to `rollouts`.
MAY_IMPORT_TYPES = {"rollouts": ("rewards.scoring",)}
LIGHT = ("unmask", "unmask.recipes.problems", "unmask.recipes.schema", "unmask.recipes.loading", "unmask.rl.cli")
HEAVY = ("torch", "transformers", "datasets")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` of an attribute chain, with `?` where the chain starts with an expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imports_of(path: Path) -> list[tuple[str, int, str]]:
    """Return (imported module, line, how: run, lazy or types), with relative names written out as `folder.module`."""
    tree, found = tree_of(path), []
    how = {id(node): "lazy" for function in functions(tree) for node in ast.walk(function)}
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and dotted(block.test).endswith("TYPE_CHECKING"):
            how |= {id(node): "types" for statement in block.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            base = [path.parent.name] if node.level == 1 else []
            prefix = base + (node.module.split(".") if node.module else [])
            # `from .. import policies` and `from . import trajectory` import modules by their names.
            names = [".".join(prefix)] if len(prefix) > 1 else [".".join([*prefix, alias.name]) for alias in node.names]
            names = ["unmask::" + name for name in names]
        else:
            continue
        found += [(name, node.lineno, how.get(id(node), "run")) for name in names]
    return found


def wrong_imports(path: Path) -> list[str]:
    """Return each import of a file that leaves the one direction."""
    folder, wrong = path.parent.name, []
    for name, line, how in imports_of(path):
        allowed = MAY_IMPORT[folder] + (MAY_IMPORT_TYPES.get(folder, ()) if how == "types" else ())
        if name.split(".")[0] == "unmask":
            wrong.append(f"{name_of(path)}:{line}: import {name}: inside the package imports are relative")
        if not name.startswith("unmask::"):
            continue
        target = name.removeprefix("unmask::")
        # recipes load the modules of a slot's parts when the slot is needed, so inside functions they may reach up.
        lazily = folder == "recipes" and how == "lazy"
        fits = any(target == a or target.startswith(a + ".") for a in allowed) or target == "__version__"
        if not fits and not lazily:
            wrong.append(f"{name_of(path)}:{line}: {folder} may import {', '.join(allowed)}, not {target}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    wrong = wrong_imports(path)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("folder", "code", "count"),
    [
        ("policies", "from ..rollouts.trajectory import Trajectory", 1),
        ("policies", "from .. import rollouts", 1),
        ("policies", "from ..recipes.loading import load_recipe", 1),
        ("policies", "from ..recipes import registry\nfrom . import families", 0),
        ("rewards", "def f():\n    from ..rl import objective", 1),
        ("rollouts", "from ..rewards.scoring import RewardTable", 1),
        ("rollouts", "if TYPE_CHECKING:\n    from ..rewards.scoring import RewardTable", 0),
        ("rollouts", "if TYPE_CHECKING:\n    from ..rl.objective import Plan", 1),
        ("recipes", "from ..rl import objective", 1),
        ("recipes", "def f():\n    from ..rl import objective", 0),
        ("rl", "from unmask.rollouts import sampler", 1),
        ("rl", "import torch\nfrom ..rollouts.sampler import Sampler", 0),
    ],
)
def test_the_guard_sees_imports(
    folder: str, code: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "part.py"
    path.write_text(code + "\n")
    assert len(wrong_imports(path)) == count


def test_registry_and_tasks_stand_alone() -> None:
    for stem, allowed in (("registry", set()), ("tasks", {"unmask::recipes.registry"})):
        names = {name for name, _, _ in imports_of(ROOT / "recipes" / f"{stem}.py")}
        outside = {n for n in names if n.split(".")[0] not in sys.stdlib_module_names and n not in allowed}
        assert not outside, f"recipes/{stem}.py imports {outside}"


@pytest.mark.parametrize("module", LIGHT)
def test_commands_that_read_no_weights_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]", f"{module} imports {run.stdout}"


@functools.cache
def foreign_names() -> frozenset[str]:
    """Return the names of standard modules and of those that dependencies install; asked once, of every package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    wanted = {re.split(r"[<>=;\[ ~!]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    taken = set(sys.stdlib_module_names) | {name.replace("-", "_") for name in wanted} | {"yaml"}
    for module, distributions in importlib.metadata.packages_distributions().items():
        if wanted & {d.lower().replace("_", "-") for d in distributions}:
            taken.add(module)
    return frozenset(taken)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_bears_a_foreign_name(path: Path) -> None:
    assert path.stem not in foreign_names()


def test_the_guard_knows_foreign_names() -> None:
    assert {"random", "torch", "yaml", "math_verify"} <= foreign_names()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    ceiling = 220 if path.name == "minimal.py" else 350
    large = [f"{name_of(path)} has {lines} lines, {ceiling} are allowed"] if lines > ceiling else []
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        lines, ceiling = lines_without_docstring(node), 200 if isinstance(node, ast.ClassDef) else 60
        if lines > ceiling:
            large.append(f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines, {ceiling} are allowed")
    assert not large, "\n".join(large)


ALWAYS_FORBIDDEN = {
    "eval": "model text and recipes are data",
    "exec": "model text and recipes are data",
    "torch.load": "pickle runs code; use safetensors",
    "pickle.load": "pickle runs code",
    "pickle.loads": "pickle runs code",
    "os.system": "a shell",
    "set_seed": "reseeds every global generator",
    "random.seed": "global generator; use random.Random(key)",
    "parse_expr": "sympy's evaluates its text",
    "sympify": "evaluates its text",
}
# Draws from a global generator, unless they are given one.
DRAWS = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal", "poisson"}
DRAWS_IN_PLACE = {"uniform_", "normal_", "exponential_", "bernoulli_", "random_", "geometric_", "cauchy_"}
RANDOM_MODULE = {"random", "randint", "randrange", "choice", "choices", "sample", "shuffle", "uniform", "gauss"}


def offence(call: ast.Call, inside_fork: bool) -> str | None:
    """Return why `call` is forbidden, or None."""
    name = dotted(call.func)
    leaf = name.rpartition(".")[2]
    keywords = {k.arg: k.value for k in call.keywords}
    remote = keywords.get("trust_remote_code")
    if remote is not None and not (isinstance(remote, ast.Constant) and remote.value is False):
        return "trust_remote_code"
    for forbidden, reason in ALWAYS_FORBIDDEN.items():
        if name == forbidden or (leaf == forbidden and "." not in forbidden and forbidden not in ("eval", "exec")):
            return reason
    if name.startswith(("np.random.", "numpy.random.")) and leaf not in ("default_rng", "Generator", "Philox"):
        return "numpy's global generator"
    if name.startswith("torch.") and "manual_seed" in leaf and not inside_fork:
        return "reseeds a global generator; use torch.Generator(), or fork_rng around a library that takes none"
    if inside_fork:
        return None
    if name in {f"random.{n}" for n in RANDOM_MODULE}:
        return "global generator; use random.Random(key)"
    in_place = leaf in DRAWS_IN_PLACE and "." in name and not name.startswith(("torch.nn.init.", "nn.init."))
    if (name in {f"torch.{n}" for n in DRAWS} or in_place or leaf == "multinomial") and "generator" not in keywords:
        return "draws from the global generator; pass generator="
    return None


def offences(path: Path) -> list[str]:
    """Return each forbidden call of a file, with its reason."""
    tree = tree_of(path)
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.With))
    forks = [block for block in blocks if "fork_rng" in ast.unparse(block.items[0].context_expr)]
    forked = {id(node) for fork in forks for node in ast.walk(fork)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        reason = offence(node, id(node) in forked)
        if dotted(node.func) == "exec" and name_of(path) in MAY_EXECUTE:
            reason = None
        if dotted(node.func) == "print" and name_of(path) not in MAY_PRINT:
            reason = "use logging"
        if reason is not None:
            found.append(f"{name_of(path)}:{node.lineno} {ast.unparse(node.func)}: {reason}")
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_forbidden_calls(path: Path) -> None:
    found = offences(path)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "torch.load('a')",
        "pickle.load(file)",
        "eval(text)",
        "print(1)",
        "torch.manual_seed(0)",
        "torch.cuda.manual_seed_all(0)",
        "transformers.set_seed(0)",
        "np.random.rand(3)",
        "random.shuffle(rows)",
        "torch.rand(3)",
        "probability.multinomial(1)",
        "noise.uniform_()",
        "sympy.parse_expr(text)",
    ],
)
def test_the_guard_sees_calls(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "part.py").write_text(code + "\n")
    assert offences(tmp_path / "part.py")
    (tmp_path / "part.py").write_text(
        "model.eval()\ntorch.rand(3, generator=rng)\nrandom.Random(0).shuffle(x)\nrng.random()\nratio.exp()\n"
        "torch.Generator().manual_seed(0)\nwith torch.random.fork_rng():\n    torch.manual_seed(0)\n"
    )
    assert not offences(tmp_path / "part.py")


@pytest.fixture(scope="module")
def modules() -> list[object]:
    return [importlib.import_module(f"unmask.{p.parent.name}.{p.stem}") for p in MODULES]


@pytest.mark.parametrize("slot", sorted(SLOTS))
def test_every_part_is_documented_and_typed(slot: str, modules: list[object]) -> None:
    parts = list(SLOTS[slot])
    assert parts, f"slot '{slot}' has no part"
    for name in parts:
        function = SLOTS[slot].get(name)
        assert (inspect.getdoc(function) or "").strip(), f"{slot} '{name}' has no docstring"
        for knob, parameter in SLOTS[slot].knobs(name).items():
            assert parameter.annotation is not parameter.empty, f"{slot} '{name}': knob '{knob}' has no type"
            assert parameter.annotation is not object, f"{slot} '{name}': knob '{knob}' has no useful type"


def is_public(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    bare = []
    for node in tree.body:
        if not is_public(node):
            continue
        members = node.body if isinstance(node, ast.ClassDef) and "Protocol" not in map(dotted, node.bases) else []
        for item in [node, *filter(is_public, members)]:
            if ast.get_docstring(item) is None:
                bare.append(f"{name_of(path)}:{item.lineno} {item.name}")
    assert not bare, "without a docstring:\n" + "\n".join(bare)
