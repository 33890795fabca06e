"""Tables of measured rows, kept as JSON and Markdown: a stopped run goes on, another protocol begins anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import record

Line = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table under bench/results. path: without suffix. lines: the rows that are there, as text under `columns`.

    notes: what the rows say, in sentences under them.
    """

    path: Path
    title: str
    protocol: str
    columns: Line
    lines: Callable[[dict[str, Any]], list[Line]]
    notes: Callable[[dict[str, Any]], list[str]] = lambda _: []

    def load(self) -> dict[str, Any]:
        """What an earlier run with this protocol measured: {"protocol", "rows": {name: row}, ...}; or no rows."""
        path = self.path.with_suffix(".json")
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("protocol") == self.protocol else {"protocol": self.protocol, "rows": {}}

    def save(self, results: dict[str, Any], name: str, row: dict[str, Any]) -> None:
        """Add to a row, and write JSON and table."""
        results.update(record.circumstances())
        results["rows"].setdefault(name, {}).update(row)
        self.path.parent.mkdir(exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        lines = [self.columns, ("---:",) * len(self.columns), *self.lines(results)]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        notes = "".join(f"\n- {note}" for note in self.notes(results))
        page = f"# {self.title}\n\n{self.protocol}\n\n{text}\n" + (notes and f"{notes}\n")
        self.path.with_suffix(".md").write_text(page)
