"""A table of measurements that grows row by row: cached in a JSON of bench/results/, shown as markdown beside it.

A stopped run goes on with the rows that are missing; rows of another protocol are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Lines = Sequence[tuple[str, ...]]


def load(path: Path, protocol: str) -> dict[str, Any]:
    """The rows of an earlier run with this protocol, or none. path: without its suffix."""
    path = path.with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("protocol") == protocol else {"protocol": protocol, "rows": {}}


def add(results: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    """Add to a row, and say when and where."""
    from . import record

    results.update(record.circumstances())
    results["rows"].setdefault(name, {}).update(row)


def write(
    path: Path, results: dict[str, Any], title: str, columns: Sequence[str], lines: Lines, after: str = ""
) -> None:
    """The JSON and the markdown, with the protocol over the table and `after` under it."""
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    rows = [tuple(columns), ("---:",) * len(columns), *lines]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    path.with_suffix(".md").write_text(f"# {title}\n\n{results['protocol']}\n\n{text}\n" + (after and f"\n{after}\n"))
