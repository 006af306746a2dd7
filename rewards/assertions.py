"""Tests read without running them: asserts as `f(literals) == literal` need no process for the tests."""

from __future__ import annotations

import ast
import builtins
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from . import wire

Tree = Any  # plain data in which containers are (kind, items), as the sandbox hands it out
WRAPPERS = {"set": "S", "list": "l", "tuple": "t"}


@dataclass(frozen=True)
class Case:
    """A call of the program, and what its answer has to be: equal, true, false, or close within a tolerance."""

    name: str
    arguments: list[Any] = field(default_factory=list)
    named: Mapping[str, Any] = field(default_factory=dict)
    relation: Literal["equal", "true", "false", "close"] = "equal"
    expected: Any = None
    tolerance: float = 0.0
    wrapper: str | None = None
    loose: bool = False
    boxed: bool = False

    def request(self) -> dict[str, Any]:
        """Return what the program's process is asked."""
        return {"name": self.name, "arguments": list(self.arguments), "named": dict(self.named)}

    def holds(self, answer: Tree) -> bool:
        """Tell whether an answer (tagged data) is right.

        `loose` takes lists for tuples, as JSON knows no other; `boxed` also takes the one item of an expected list.
        """
        if self.relation == "close":
            number = isinstance(answer, int | float) and math.isfinite(answer)
            return number and abs(answer - self.expected) < self.tolerance
        if self.relation in ("true", "false"):
            return truth(answer) is (self.relation == "true")
        if self.wrapper is not None:
            if not isinstance(answer, tuple) or answer[0] not in "ltISZ":
                return False
            answer = (WRAPPERS[self.wrapper], answer[1])
        given = canonical(answer, loose=self.loose)
        boxed = self.boxed and isinstance(self.expected, list) and len(self.expected) == 1
        right = [self.expected, *(self.expected if boxed else [])]
        trees = (wire.decode(wire.encode(value), lambda *tree: tree) for value in right)
        return any(given == canonical(tree, loose=self.loose) for tree in trees)


def truth(answer: Tree) -> bool | None:
    """Return an answer's truth value; None for what is no plain data."""
    if isinstance(answer, tuple):
        kind, items = answer
        return None if kind in "hI" else any(items) if kind == "c" else bool(items)
    return bool(answer)


def canonical(tree: Tree, *, loose: bool = False) -> Any:
    """Return a form of tagged data that is equal for values that Python's `==` calls equal.

    Sets and dicts become sorted texts, so that data made to collide costs no more than any other. Objects that are no
    plain data equal nothing.
    """
    if isinstance(tree, int | float):
        number = float(tree) if isinstance(tree, float) and not tree.is_integer() else int(tree)
        return ("#", repr(number)) if number == number else object()
    if not isinstance(tree, tuple):
        return tree
    kind, items = tree
    if kind == "h":
        return object()
    if kind == "d":
        pairs = ((canonical(k, loose=loose), canonical(v, loose=loose)) for k, v in items)
        return ("d", tuple(sorted({repr(pair) for pair in pairs})))
    if kind in "SZ":
        return ("S", tuple(sorted({repr(canonical(item, loose=loose)) for item in items})))
    return ("l" if loose and kind in "tI" else kind, tuple(canonical(item, loose=loose) for item in items))


def read_cases(source: str, entry_point: str | None) -> list[Case] | None:
    """Return the cases of a test's code: bare asserts, or those of HumanEval's `check(candidate)`.

    None where any statement is of another form; such tests have to be run.
    """
    try:
        statements = list(_statements(ast.parse(source)))
        cases = [_case(node, entry_point) for node in statements if not _idle(node)]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return cases or None


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """Yield the module's statements, with those of `check` in place of it and of its call."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == "check" and len(node.args.args) == 1:
            yield from node.body
        elif not _calls_check(node):
            yield node


def _calls_check(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "check"


def _idle(node: ast.stmt) -> bool:
    """Tell whether a statement tests nothing: a docstring, pass, METADATA, `assert True`."""
    if isinstance(node, ast.Assert):
        return isinstance(node.test, ast.Constant) and bool(node.test.value)
    metadata = isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["METADATA"]
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return metadata or constant or isinstance(node, ast.Pass)


def _case(node: ast.stmt, entry_point: str | None) -> Case:
    if not isinstance(node, ast.Assert):
        raise ValueError("no assert")
    test = node.test
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _call(test.operand, entry_point, relation="false")
    if isinstance(test, ast.Call) and ast.unparse(test.func) != "math.isclose":
        return _call(test, entry_point, relation="true")
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        raise ValueError("no comparison")
    left, right, operator = test.left, test.comparators[0], test.ops[0]
    if isinstance(operator, ast.Lt) and isinstance(left, ast.Call) and ast.unparse(left.func) in ("abs", "math.fabs"):
        (difference,) = left.args
        if not isinstance(difference, ast.BinOp) or not isinstance(difference.op, ast.Sub):
            raise ValueError("no difference")
        expected, tolerance = float(ast.literal_eval(difference.right)), float(ast.literal_eval(right))
        return _call(difference.left, entry_point, relation="close", expected=expected, tolerance=tolerance)
    if isinstance(operator, ast.Is):
        constant = ast.literal_eval(right)
        if constant is not None:
            raise ValueError("identity of a value")
    elif not isinstance(operator, ast.Eq):
        raise ValueError("another comparison")
    if not any(isinstance(part, ast.Call) for part in ast.walk(left)):
        left, right = right, left
    wrapper = None
    name = left.func.id if isinstance(left, ast.Call) and isinstance(left.func, ast.Name) else None
    if isinstance(left, ast.Call) and name in WRAPPERS and len(left.args) == 1:
        (left,), wrapper = left.args, name
    return _call(left, entry_point, expected=_literal(right), wrapper=wrapper)


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal, also of set((...)), tuple([...]) and list((...)) around one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords and len(node.args) <= 1:
        kinds: dict[str, Any] = {"set": set, "list": list, "tuple": tuple}
        return kinds[node.func.id](*map(ast.literal_eval, node.args))
    return ast.literal_eval(node)


def _call(node: ast.expr, entry_point: str | None, **rest: Any) -> Case:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("no call of a name")
    name = node.func.id
    if name == "candidate" and entry_point is not None:
        name = entry_point
    if hasattr(builtins, name):
        raise ValueError("a builtin")
    arguments = [ast.literal_eval(argument) for argument in node.args]
    named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    if len(named) != len(node.keywords):
        raise ValueError("unpacked arguments")
    return Case(name, arguments, named, **rest)
