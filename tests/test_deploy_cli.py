"""`pared deploy ray`: the file that it writes, and that Ray Serve and `pared serve` read it as it is meant."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pared.serve_cli import application
from pared.tests import ray_cluster
from pared.tests.test_cli import Run
from pared.tests.test_cli import pared as pared  # a fixture


@pytest.fixture
def logs() -> Iterator[None]:
    """An application writes its log to this test's stderr; the next test has another."""
    loggers = [logging.getLogger(name) for name in ("pared", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def written(pared: Run, folder: Path, out: Path, *options: object) -> dict[str, Any]:
    status, printed, err = pared("deploy", "ray", folder, out, *options)
    assert status == 0, err
    assert f"serve run {out}" in printed
    assert f"`serve run {out.name}`" in out.read_text()
    return yaml.safe_load(out.read_text())


def test_options_become_variables(
    pared: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("one\ntwo\n")
    options = ["--name", "tiny", "--device", "cpu", "--max-batch", 3, "--no-prefix-caching", "--api-key-file", "keys"]
    options += ["--allow-origin", "http://a.example", "--allow-origin", "http://b.example"]
    binding = ["--host", "0.0.0.0", "--port", 8123, "--certificate", "c.pem", "--private-key", "k.pem"]
    told = written(pared, tiny_folder, tmp_path / "serve.yaml", "--replicas", 2, "--cpus", 1.5, *options, *binding)
    http = {"host": "0.0.0.0", "port": 8123, "root_path": ""}
    files = {"ssl_certfile": str(tmp_path / "c.pem"), "ssl_keyfile": str(tmp_path / "k.pem")}
    assert told["http_options"] == {**http, **files}
    (app,) = told["applications"]
    assert (app["name"], app["import_path"]) == ("tiny", "pared.ray_serve:application")
    assert app["runtime_env"]["env_vars"] == {
        "PARED_PATH": str(tiny_folder),
        "PARED_NAME": "tiny",
        "PARED_ALLOW_ORIGIN": "http://a.example http://b.example",
        "PARED_API_KEY_FILE": str(tmp_path / "keys"),
        "PARED_DEVICE": "cpu",
        "PARED_MAX_BATCH": "3",
        "PARED_PREFIX_CACHING": "False",
    }
    (deployment,) = app["deployments"]
    assert (deployment["num_replicas"], deployment["max_ongoing_requests"]) == (2, 2 * (3 + 256))
    assert deployment["ray_actor_options"] == {"num_cpus": 1.5, "num_gpus": 0}
    for name, value in app["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    app = application()
    service = app.state.service
    (shared,) = [one.kwargs["allow_origins"] for one in app.user_middleware if "allow_origins" in one.kwargs]
    assert list(shared) == ["http://a.example", "http://b.example"]
    assert (service.name, service.llm.core.scheduler.max_batch) == ("tiny", 3)
    assert service.llm.model.device.type == "cpu" and service.limits.waiting == 256


def test_more_replicas_while_there_are_requests(pared: Run, tiny_folder: Path, tmp_path: Path) -> None:
    told = written(pared, tiny_folder, tmp_path / "a.yaml", "--max-replicas", 8, "--gpus", 1, "--drain-seconds", 90)
    (deployment,) = told["applications"][0]["deployments"]
    bounds = {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 64}
    assert deployment["autoscaling_config"] == bounds and "num_replicas" not in deployment
    assert deployment["graceful_shutdown_timeout_s"] == 90
    assert deployment["ray_actor_options"]["num_gpus"] == 1


def test_what_is_wrong_is_said(pared: Run, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "serve.yaml"
    assert "less than --replicas 3" in pared("deploy", "ray", tiny_folder, out, "--replicas", 3, "--max-replicas", 2)[2]
    assert pared("deploy", "ray", tiny_folder, out, "--socket", "s")[0] == 2
    assert not out.exists()
    written(pared, tiny_folder, out)
    assert "FolderExists" in pared("deploy", "ray", tiny_folder, out)[2]
    written(pared, tiny_folder, out, "--overwrite")


@ray_cluster.needs_ray
@ray_cluster.imports_ray
def test_ray_serve_takes_the_file(pared: Run, tiny_folder: Path, tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    for number, options in enumerate([(), ("--max-replicas", 8, "--replicas", 2)]):
        told = written(pared, tiny_folder, tmp_path / f"{number}.yaml", *options)
        read = ServeDeploySchema.model_validate(told)
        (deployment,) = read.applications[0].deployments
        known = set(told["applications"][0]["deployments"][0])
        assert known <= deployment.model_fields_set
        assert set(told["http_options"]) <= set(type(read.http_options).model_fields)
