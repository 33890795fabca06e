"""What runtime/server/deploy/ holds: files of other programs, which name our options and metrics."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2 as httpx
import pytest
import typer

from pared.cli import app
from pared.kernels.dispatch import FALLBACKS
from pared.runtime.llm import LLM
from pared.runtime.server.limits import KEYS_VARIABLE, Limits
from pared.runtime.server.opening import Wanted, open_service, service_of
from pared.tests import routed
from pared.tests.serving import serving

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "runtime" / "server" / "deploy"
OURS = {KEYS_VARIABLE, "PARED_CACHE"}
"""Variables that are no option's."""


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def options() -> set[str]:
    """The variables of every option of `pared serve`."""
    command = typer.main.get_command(app).commands["serve"]
    return {parameter.envvar for parameter in command.params if parameter.envvar}


@pytest.mark.parametrize("name", ["pared.service", "pared.env", "Dockerfile", "README.md"])
def test_every_variable_is_an_option(name: str) -> None:
    named = set(re.findall(r"PARED_[A-Z0-9_]+", text(name)))
    assert named and named <= options() | OURS, named - options() - OURS


# --- the dashboard -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names of metrics with their labels, of a server that does everything: has answered, refused, embedded, let FFN
    groups sleep, and taken a slower path."""
    folder = routed.serving_folder(tiny_checkpoint, tmp_path_factory.mktemp("routed"))
    service = open_service(folder, "tiny", Limits(), Wanted(device="cpu", kv_cache_bytes=2**20, pooling="mean"))
    service.metrics.rejected("queue_full")
    with serving(service) as address, patch.dict(FALLBACKS, {("linear", "no reason"): 1}):
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "x"}, timeout=60).status_code == 200
        told = httpx.get(f"{address}/metrics").text
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^pared:(\w+?)(?:\{(.*)\})? \S+$", told, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    return found


def queries() -> Iterator[tuple[str, str]]:
    """(panel, PromQL) of everything that the dashboard asks."""
    board = json.loads(text("grafana.json"))
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]


def test_the_dashboard_asks_for_metrics_that_exist(exported: dict[str, set[str]]) -> None:
    asked = list(queries())
    assert len(asked) > 20
    everything = " ".join(query for _, query in asked)
    for name in ("ffn_groups_asleep_total", "weights_bytes", "kernel_fallback_total", "embedding_seconds_bucket"):
        assert f"pared:{name}{{" in everything
    for panel, query in asked:
        names = re.findall(r"pared:(\w+)", query)
        assert names, (panel, query)
        for name in names:
            assert name in exported, f"{panel}: pared:{name} is no metric"
        for label in [label for group in re.findall(r"by \(([\w, ]+)\)", query) for label in group.split(", ")]:
            assert label in exported[names[0]], f"{panel}: pared:{names[0]} has no label {label}"
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}"), query


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    board = json.loads(text("grafana.json"))
    ids = [panel["id"] for panel in board["panels"]]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {"${datasource}"}
    assert board["templating"]["list"][0]["name"] == "datasource"


# --- the unit ------------------------------------------------------------------------------------


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is on this machine in place of the one that it installs."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    path = tmp_path / "pared.service"
    path.write_text(text("pared.service").replace("/opt/pared/bin/pared", str(Path(sys.executable).resolve())))
    return path


def analyze(*arguments: str) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_takes_the_unit(unit: Path) -> None:
    assert "pared.service" not in analyze("verify", "--man=no", str(unit)).replace(str(unit.parent), "")


def test_systemd_rates_the_unit_as_closed(unit: Path) -> None:
    rated = analyze("security", "--offline=true", "--threshold=20", "--no-pager", str(unit))
    assert re.search(r"exposure level for pared.service: [01]\.\d OK", rated), rated[-300:]


def test_the_unit_waits_for_what_runs() -> None:
    settings = dict(re.findall(r"^(\w+)=(.*)$", text("pared.service"), re.MULTILINE))
    drain = float(re.search(r"PARED_DRAIN_SECONDS=(\d+)", text("pared.service"))[1])
    assert float(settings["TimeoutStopSec"]) > drain + 5  # uvicorn's own patience, run.py
    assert settings["DynamicUser"] == "yes" and settings["ProtectSystem"] == "strict"


# --- the image -----------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, its continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text("Dockerfile"), flags=re.MULTILINE)).splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line]


def test_the_image_runs_as_nobody_and_pins_what_is_pinned() -> None:
    found = instructions()
    assert found[-1] == ("CMD", '["serve"]') and found[-2] == ("ENTRYPOINT", '["pared"]')
    users = [rest for name, rest in found if name == "USER"]
    assert users and users[-1].isdigit() and int(users[-1]) > 0
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torch = next(rest for name, rest in found if name == "ARG" and rest.startswith("TORCH=")).removeprefix("TORCH=")
    assert torch.endswith("+cpu") and f"\n{torch.removesuffix('+cpu')}\n" in pins
    extras = re.search(r"'\.\[(.+)\]'", " ".join(rest for _, rest in found))[1].split(",")
    assert set(extras) <= set(re.findall(r'^        "(\w+)": [A-Z]+,$', (ROOT / "setup.py").read_text(), re.MULTILINE))


def test_the_image_holds_the_package_and_not_the_clone() -> None:
    left_out = text("Dockerfile.dockerignore").split()
    assert {".git", ".venv", ".data"} <= set(left_out)
    needed = {"setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "runtime", "kernels", "bench"}
    assert not needed & set(left_out) and all((ROOT / name).exists() for name in needed)


def test_the_health_check_asks_the_server(tiny_folder: Path) -> None:
    (check,) = [rest for name, rest in instructions() if name == "HEALTHCHECK"]
    command = json.loads(check[check.index("[") :])
    llm = LLM(tiny_folder, device="cpu", num_blocks=50)

    def asked(port: str) -> int:
        environment: dict[str, Any] = {**os.environ, "PARED_PORT": port}
        return subprocess.run(
            [sys.executable, *command[1:]], env=environment, capture_output=True, check=False
        ).returncode

    with serving(service_of(llm, "tiny", Limits())) as address:
        port = address.rpartition(":")[2]
        assert asked(port) == 0
    assert asked(port) != 0
    assert shlex.split(text("README.md").split("docker run ")[1].splitlines()[0])[-1] == "pared"
