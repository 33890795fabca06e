"""The house rules, walked by ast: who may import whom, what a file may be, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "converters", "runtime", "bench")
CONTRACT = {"errors", "compact", "families"}
# A root module that only holds a part of another lives in that one's room.
SAME_ROOM = {
    "compact_writer": "compact",
    "durable": "compact",
    "spec": "families",
    "narrow": "families",
    "harness": "evaluate",
    "embedding": "families",
    "sentence_layout": "families",
    "terminal": "cli",
    "options": "cli",
    "folders_cli": "cli",
    "running_cli": "cli",
    "measuring_cli": "cli",
    "kernels_cli": "cli",
    "serve_cli": "cli",
    "deploy_cli": "cli",
    "ray_serve": "cli",
}
MAY_IMPORT = {
    "errors": set(),
    "families": {"errors"},
    "compact": {"errors", "families"},
    "kernels": {"errors"},
    "converters": {*CONTRACT, "kernels"},
    "runtime": {*CONTRACT, "kernels"},
    "evaluate": {*CONTRACT, "runtime"},
    "hf": {*CONTRACT, "kernels", "runtime"},
    "convert": {*CONTRACT, "kernels", "converters", "runtime", "evaluate"},
    "reports": {*CONTRACT, "kernels", "runtime"},
    "cli": {*CONTRACT, "reports", "kernels", "converters", "runtime", "evaluate", "convert", "bench"},
    "bench": {*CONTRACT, "cli", "hf", "reports", "kernels", "converters", "runtime", "evaluate", "convert"},
}
# Where a package that is heavy, optional or full of its own opinions may be imported.
ONLY_IN = {
    "triton": {"kernels", "bench"},
    "transformers": {"converters", "runtime/text.py", "hf.py", "bench"},
    "gguf": {"converters", "bench/llama_cpp.py"},
    "typer": {
        "cli.py",
        "options.py",
        *(f"{part}_cli.py" for part in ("folders", "running", "measuring", "kernels", "serve", "deploy")),
    },
    "fastapi": {"runtime/server"},
    "starlette": {"runtime/server"},
    "uvicorn": {"runtime/server"},
    "pydantic": {"runtime/server"},
    "prometheus_client": {"runtime/server"},
    "h11": {"runtime/server"},
    "opentelemetry": {"runtime/server"},
    "ray": {"ray_serve.py", "runtime/spread.py"},
    "yaml": {"deploy_cli.py"},
    "llguidance": {"runtime/guided.py"},
    "rich": {"terminal.py"},
    "matplotlib": {"bench"},
    "httpx2": {"bench"},
    "lm_eval": {"harness.py"},
    "datasets": {"bench/data.py"},
    "pyarrow": {"runtime/texts.py"},
    "sentence_transformers": {"bench"},
}
LINES = {"kernels": 400}
LINES_ELSEWHERE, FUNCTION_LINES, KERNEL_LINES = 300, 40, 80


def sources() -> list[Path]:
    """Every module of the package; setup.py, the tests and bench/suites, which pytest collects as well, left out."""
    root = [path for path in ROOT.glob("*.py") if path.name != "setup.py"]
    rooms = (path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.parent.name != "suites")
    return sorted([*root, *rooms])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(parts: tuple[str, ...]) -> str:
    """The room of a module path inside the package, e.g. ("kernels", "native", "library") -> "kernels"."""
    return SAME_ROOM.get(parts[0], parts[0])


def imports(path: Path) -> list[tuple[int, tuple[str, ...], bool]]:
    """(line, module path, whether inside pared) for each import; relative ones are resolved against the root."""
    here = path.relative_to(ROOT).with_suffix("").parts
    found: list[tuple[int, tuple[str, ...], bool]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(alias.name.split(".")), False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.lineno, tuple((node.module or "").split(".")), False))
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] + tuple((node.module or "").split(".") if node.module else ())
            targets = [base] if base else [(alias.name,) for alias in node.names]
            found += [(node.lineno, target, True) for target in targets]
    return found


@pytest.mark.parametrize("path", [p for p in sources() if p.name != "__init__.py"], ids=name)
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    home = room(path.relative_to(ROOT).with_suffix("").parts)
    assert home in MAY_IMPORT, f"{name(path)}: give this module a place in MAY_IMPORT, and in ARCHITECTURE.md"
    allowed = MAY_IMPORT[home] | {home, "__version__"}
    wrong = [f"line {line}: {'.'.join(to)}" for line, to, inside in imports(path) if inside and room(to) not in allowed]
    assert not wrong, f"{name(path)} ({home}) may import {sorted(allowed)}, but imports {wrong}"


@pytest.mark.parametrize("path", sources(), ids=name)
def test_imports_from_outside_stay_in_their_rooms(path: Path) -> None:
    own = name(path)
    for line, to, inside in imports(path):
        if inside:
            continue
        assert to[0] not in ("pared", *ROOMS), f"{own} line {line}: inside the package imports are relative"
        places = ONLY_IN.get(to[0])
        if places is not None:
            fits = any(own == place or own.startswith(f"{place}/") for place in places)
            assert fits, f"{own} line {line} imports {to[0]}, which only {sorted(places)} may"


def test_only_the_root_has_an_init() -> None:
    assert (ROOT / "__init__.py").exists()
    assert [
        name(p) for p in (*(q for r in ROOMS for q in (ROOT / r).rglob("__init__.py")), *ROOT.glob("tests/__init__.py"))
    ] == []


def test_tests_import_the_package_by_its_name() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name(path)} line {node.lineno}: relative import in a test"
                assert (node.module or "").split(".")[0] not in ROOMS, f"{name(path)} line {node.lineno}"


@pytest.mark.parametrize("path", sources(), ids=name)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name(path)} starts with no docstring"
    assert "from __future__ import annotations" in path.read_text(encoding="utf-8"), name(path)


def needs_at_import(path: Path, package: str) -> bool:
    """True for a file whose own top level imports this package, as those that hold Triton kernels do."""
    tops = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    named = [(n.module or "") if isinstance(n, ast.ImportFrom) and not n.level else "" for n in tops]
    named += [alias.name for n in tops if isinstance(n, ast.Import) for alias in n.names]
    return any(module.split(".")[0] == package for module in named)


def test_without_triton_everything_but_the_triton_kernels_imports() -> None:
    modules = [
        ".".join(("pared", *path.relative_to(ROOT).with_suffix("").parts))
        for path in sources()
        if path.name != "__init__.py"
        and not needs_at_import(path, "triton")
        and not needs_at_import(path, "ray")  # which Ray alone imports
    ]
    code = (
        f"import sys\nsys.modules['triton'] = None\nimport importlib\nfor m in {modules!r}: importlib.import_module(m)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(modules) > 10


def oversize(path: Path) -> list[str]:
    """What in this file is over its size target, in words."""
    lines = path.read_text(encoding="utf-8").splitlines()
    target = LINES.get(room(path.relative_to(ROOT).parts), LINES_ELSEWHERE)
    found = [f"{name(path)}: {len(lines)} lines, target {target}"] if len(lines) > target else []
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            jitted = any("jit" in ast.unparse(d) for d in node.decorator_list)
            limit = KERNEL_LINES if jitted else FUNCTION_LINES
            if length > limit:
                found.append(f"{name(path)}:{node.lineno} {node.name}: {length} lines, target {limit}")
    return found


def test_sizes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Over a target is a matter for the reviewer; twice the target is not."""
    large = [line for path in sources() for line in oversize(path)]
    with capsys.disabled():
        print("".join(f"\n  over its size target: {line}" for line in large))
    for path in sources():
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= 2 * LINES.get(room(path.relative_to(ROOT).parts), LINES_ELSEWHERE), name(path)
