"""kernels/tuning.py as text: one target's entry of one of its tables replaced or added, the rest left as it is."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..kernels.tuning import Tile


def with_entry(source: str, table: str, target: str, value: Tile | tuple[Tile, ...]) -> str:
    """`source` whose dict `table` says `value` for `target`. Raises ValueError where there is no such dict."""
    entries = _table(ast.parse(source), table)
    lines = source.splitlines(keepends=True)
    written = _written(value)
    for key, node in zip(entries.keys, entries.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == target:
            start, stop = _at(lines, node.lineno, node.col_offset), _at(lines, node.end_lineno, node.end_col_offset)
            return source[:start] + written + source[stop:]
    behind = _at(lines, (entries.values[0].end_lineno or 0) + 1, 0)  # the default comes first
    return f'{source[:behind]}    "{target}": {written},\n{source[behind:]}'


def _table(tree: ast.Module, name: str) -> ast.Dict:
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        named = any(isinstance(one, ast.Name) and one.id == name for one in targets)
        if named and isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            return node.value
    raise ValueError(f"kernels/tuning.py has no dict called {name}")


def _at(lines: list[str], line: int | None, column: int | None) -> int:
    """Where line (from 1) and column are in the text, which is ASCII."""
    return sum(map(len, lines[: (line or 1) - 1])) + (column or 0)


def _written(value: Tile | tuple[Tile, ...]) -> str:
    from ..kernels.tuning import Tile

    if isinstance(value, Tile):
        return f"Tile({value.m}, {value.n}, {value.k}, warps={value.warps}, stages={value.stages})"
    return "(\n" + "".join(f"        {_written(tile)},\n" for tile in value) + "    )"
