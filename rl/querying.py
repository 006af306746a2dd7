"""`unmask rollouts`: the stored rollouts of a run or an evaluation, searched by a small expression.

The expression has Python's form and is parsed, never evaluated: comparisons, `in`, `is None`, `and`, `or`, `not`, and
`matches(column, "regular expression")`, which become a filter of pyarrow.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet
from pyarrow.compute import Expression
from rich.console import Console
from rich.table import Table

from ..recipes.registry import RecipeError, nearest
from .runfolder import RunError, write_atomically

SHOWN = ("step", "problem", "seed", "group", "outcome", "reward", "nfe", "completion")
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Expression]] = {
    ast.Eq: lambda left, right: left == right,
    ast.NotEq: lambda left, right: left != right,
    ast.Lt: lambda left, right: left < right,
    ast.LtE: lambda left, right: left <= right,
    ast.Gt: lambda left, right: left > right,
    ast.GtE: lambda left, right: left >= right,
}
RULE = "write comparisons of a column with a value, joined by and, or, not"


def open_rollouts(folder: Path) -> pyarrow.dataset.Dataset:
    """Return all stored rollouts of a run or an evaluation; RunError where there are none."""
    files = sorted((folder / "rollouts").glob("*.parquet"))
    if not files:
        raise RunError(f"'{folder}': there are no rollouts/*.parquet; a run stores them by run.log_rollouts_every.")
    # Files of one run may differ: a column that is null throughout has no type, one that a sampler adds may be absent.
    schemas = [pyarrow.parquet.read_schema(file) for file in files]
    schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    return pyarrow.dataset.dataset([str(file) for file in files], schema=schema, format="parquet")


def parse_query(text: str, columns: list[str]) -> Expression:
    """Return pyarrow's filter for a query; RecipeError, one line, for what is no query or names no column.

    A column is written as it is called, `reward/arithmetic` too. `"text" in completion` looks for a part of a text,
    `outcome in ["ok", "wrong"]` for one of several values.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RecipeError(f"query: '{text:.200}' cannot be read ({type(error).__name__}); {RULE}.") from error
    try:
        return _Reader(columns).condition(tree)
    except RecursionError as error:
        raise RecipeError("query: it is nested too deeply; write it flatter.") from error


class _Reader:
    """Turns the nodes of a query into an expression of pyarrow; every node that is not named here is refused."""

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns

    def condition(self, node: ast.expr) -> Expression:
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            whole = parts[0]
            for part in parts[1:]:
                whole = whole & part if isinstance(node.op, ast.And) else whole | part
            return whole
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [self._compared(*pair) for pair in zip(sides, node.ops, sides[1:], strict=False)]
            whole = parts[0]
            for part in parts[1:]:
                whole = whole & part
            return whole
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "matches":
            return self._matched(node)
        return self._field(node)

    def _compared(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Expression:
        if isinstance(operator, ast.In | ast.NotIn):
            found = self._member(left, right)
            return found if isinstance(operator, ast.In) else ~found
        if isinstance(operator, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._refusal(right, "`is` and `is not` take None")
            found = self._field(left).is_null()
            return found if isinstance(operator, ast.Is) else ~found
        return COMPARISONS[type(operator)](self._operand(left), self._operand(right))

    def _member(self, left: ast.expr, right: ast.expr) -> Expression:
        if isinstance(right, ast.List | ast.Tuple):
            return self._field(left).isin([self._value(item) for item in right.elts])
        part = self._value(left)
        if not isinstance(part, str):
            raise self._refusal(left, '`in` looks for a text in a column (`"####" in completion`), or in a list')
        return pyarrow.compute.match_substring(self._field(right), part)

    def _matched(self, node: ast.Call) -> Expression:
        if len(node.args) != 2 or node.keywords or not isinstance(node.args[1], ast.Constant):
            raise self._refusal(node, 'write matches(column, "regular expression")')
        return pyarrow.compute.match_substring_regex(self._field(node.args[0]), str(node.args[1].value))

    def _operand(self, node: ast.expr) -> Any:
        return self._field(node) if self._name(node) is not None else pyarrow.scalar(self._value(node))

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            value = node.operand.value
            if type(value) in (int, float):
                return -value  # type: ignore[operator]
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
            return node.value
        raise self._refusal(node, "a value is a number, a text in quotes, True or False")

    def _field(self, node: ast.expr) -> Expression:
        name = self._name(node)
        if name is None:
            raise self._refusal(node, RULE)
        if name not in self.columns:
            raise RecipeError(f"query: there is no column '{name}'.{nearest(name, self.columns)}")
        return pyarrow.compute.field(name)

    def _name(self, node: ast.expr) -> str | None:
        """Return the column that a node names: `outcome`, or `reward/arithmetic`, which Python reads as a quotient."""
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            left, right = self._name(node.left), self._name(node.right)
            return None if left is None or right is None else f"{left}/{right}"
        return None

    def _refusal(self, node: ast.expr, rule: str) -> RecipeError:
        return RecipeError(f"query: '{ast.unparse(node):.80}' cannot stand there; {rule}.")


def find_rollouts(
    folder: Path, *, query: str | None = None, columns: list[str] | None = None, sort: str | None = None
) -> pyarrow.Table:
    """Return the rollouts that a query selects, as a table; `sort` is a column, descending behind a `-`."""
    data = open_rollouts(folder)
    names = data.schema.names
    for name in [*(columns or ()), *([sort.removeprefix("-")] if sort else ())]:
        if name not in names:
            raise RecipeError(f"rollouts: there is no column '{name}'.{nearest(name, names)}")
    chosen = list(columns or names)
    order = [(sort.removeprefix("-"), "descending" if sort.startswith("-") else "ascending")] if sort else []
    wanted = chosen + [name for name, _ in order if name not in chosen]
    try:
        table = data.to_table(columns=wanted, filter=None if query is None else parse_query(query, names))
    except pyarrow.ArrowException as error:
        raise RecipeError(f"query: '{query:.200}' does not fit the columns ({str(error).splitlines()[0]}).") from error
    return (table.sort_by(order) if order else table).select(chosen)


def show_rollouts(
    folder: Path, *, query: str | None, columns: str | None, sort: str | None, limit: int, to: Path | None
) -> None:
    """Print the first rollouts that a query selects and their number, or write all of them to a file."""
    console = Console()
    if to is not None and to.suffix not in (".parquet", ".jsonl"):
        raise RecipeError(f"--to: '{to}' must end in .parquet or .jsonl.")
    chosen = [name.strip() for name in columns.split(",")] if columns else None
    if chosen is None and to is None:
        chosen = [name for name in SHOWN if name in open_rollouts(folder).schema.names]
    found = find_rollouts(folder, query=query, columns=chosen, sort=sort)
    if to is not None:
        _write(found, to)
        console.print(f"wrote {found.num_rows} rollouts to {to}", soft_wrap=True, highlight=False)
        return
    table = Table(*found.column_names)
    for row in found.slice(0, limit).to_pylist():
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table, markup=False)
    console.print(f"{found.num_rows} rollouts, {min(limit, found.num_rows)} shown", highlight=False)


def _cell(value: Any) -> Any:
    from rich.text import Text

    return Text(f"{value:.4g}" if isinstance(value, float) else str(value))


def _write(table: pyarrow.Table, to: Path) -> None:
    if to.suffix == ".parquet":
        pyarrow.parquet.write_table(table, to)
    else:
        write_atomically(to, "".join(json.dumps(row) + "\n" for row in table.to_pylist()))
