"""The README's examples, run as they stand on a tiny model of the same names."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from pared import convert
from pared.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.+?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [
    shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines() if line.startswith("pared ")
]

ELSEWHERE = "serve"
"""Commands that serve, and that ask a server: test_serve_cli.py and test_bench_serving.py run them."""


@pytest.fixture
def here(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that holds what the README takes for granted: a checkpoint and a text."""
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (tmp_path / "book.txt").write_text("It was a plain day, and nothing much happened. " * 1000, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_in_their_order(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in COMMANDS:
        if ELSEWHERE in command[1:3]:
            continue
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        assert not left.value.code, f"{command}\n{printed.err}"
        assert printed.out.strip(), command
    assert (here / "plain" / "config.json").exists()


def test_every_command_is_shown() -> None:
    from pared.cli import app

    named = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named |= {group.name or group.typer_instance.info.name for group in app.registered_groups}
    assert {command[1] for command in COMMANDS} == named


def test_the_python_examples_run(here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_folder, here / "smollm2")
    convert("checkpoint", "encoder", methods=["l3prune:keep=1"])
    examples = blocks("python")
    for example in examples:
        exec(compile(example, "README.md", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert printed.count("->") == 2
    assert "--overwrite" in printed
    assert "(2, " in printed
    assert len(examples) == 4


def test_make_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`|&& )make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
