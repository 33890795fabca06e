"""`pared deploy ray`, run as a user runs it: what clients get of two replicas behind Ray Serve, one of them killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import openai
import pytest

from pared.errors import EngineStopped
from pared.runtime.llm import LLM
from pared.runtime.params import SamplingParams
from pared.tests import ray_cluster
from pared.tests.client_suite import *  # noqa: F403
from pared.tests.client_suite import MODEL, complete
from pared.tests.serving import eventually, free_port

pytestmark = ray_cluster.needs_ray
TESTS = Path(__file__).resolve().parent
REPLICA = f"ray::ServeReplica:{MODEL}:Replica"
OPTIONS = "--device cpu --max-prompts 8 --max-n 4 --max-body-bytes 65536 --max-batch 4 --max-waiting 20 --chunk 64"


@dataclass(frozen=True)
class Deployed:
    address: str
    variables: dict[str, str]

    @property
    def replicas(self) -> set[int]:
        """The ids of their processes."""
        return set(ray_cluster.processes(self.variables, REPLICA))

    def lines(self, id: str) -> list[dict[str, Any]]:
        """What a replica's log says of a request."""
        logs = Path(self.variables["RAY_TMPDIR"]).glob("ray/session_latest/logs/worker-*.err")
        told = [line for log in logs for line in log.read_text().splitlines() if id in line and line.startswith("{")]
        return [json.loads(line) for line in told]


@pytest.fixture(scope="module")
def deployed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    home = tmp_path_factory.mktemp("deployed")
    (home / "keys").write_text("none\n")
    port = free_port()
    place = ["--replicas", "2", "--cpus", "0.5", "--name", MODEL, "--port", str(port)]
    write = ["deploy", "ray", str(tiny_folder), str(home / "serve.yaml"), "--api-key-file", str(home / "keys"), *place]
    subprocess.run([sys.executable, "-m", "pared.cli", *write, *OPTIONS.split()], cwd=TESTS, check=True)
    with ray_cluster.environment() as variables:
        found = Deployed(f"http://127.0.0.1:{port}", variables)
        with ray_cluster.serving(home / "serve.yaml", variables, lambda: ready(found)):
            yield found


def ready(deployed: Deployed) -> bool:
    try:
        return len(deployed.replicas) == 2 and httpx.get(f"{deployed.address}/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def address(deployed: Deployed) -> str:
    return deployed.address


def test_nobody_asks_without_a_key(address: str) -> None:
    response = httpx.post(f"{address}/v1/completions", json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_client_that_leaves_ends_its_answer(deployed: Deployed, http: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 240, "ignore_eos": True, "n": 4, "stream": True}
    with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "leaves"}) as response:
        assert next(response.iter_lines()).startswith("data: ")  # while it grows
    eventually(lambda: bool(deployed.lines("leaves")), pause=0.1)
    (line,) = deployed.lines("leaves")
    assert line["output_tokens"] < 4 * 240 and line["finish"] == []


def test_too_many_are_told_when_to_come_again(http: httpx.Client) -> None:
    body = {"prompt": ["x"] * 5, "n": 4, "max_tokens": 200, "ignore_eos": True}  # 20 answers of the 24 that one takes
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(8)]
        got = [one.result() for one in asked]
    refused = [one for one in got if one.status_code != 200]
    assert refused and len(refused) < len(got)
    assert {one.status_code for one in refused} == {429}
    assert all(int(one.headers["retry-after"]) > 0 for one in refused)


def test_a_killed_replica_comes_back_and_no_answer_is_wrong(
    deployed: Deployed, client: openai.OpenAI, http: httpx.Client, alone: LLM
) -> None:
    before = deployed.replicas
    assert len(before) == 2
    prompts = [f"prompt number {i}" for i in range(60)]
    want = [output.text for output in alone.generate(prompts, SamplingParams(max_tokens=40))]
    killed = min(before)

    def ask(number: int) -> str | None:
        if number == 20:
            os.kill(killed, signal.SIGKILL)
        try:
            return complete(client, prompts[number], max_tokens=40).choices[0].text
        except openai.InternalServerError:
            return None

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(ask, range(len(prompts))))
    assert all(text == right for text, right in zip(got, want, strict=True) if text is not None)
    assert sum(text is None for text in got) <= 4  # those that were on it
    assert got[-10:] == want[-10:]
    eventually(lambda: len(deployed.replicas - {killed}) == 2, 200, pause=0.5)
    (fresh,) = deployed.replicas - before
    eventually(lambda: any('"serving"' in line for line in log_of(deployed, fresh)), 200, pause=0.5)
    assert [complete(client, prompt, max_tokens=40).choices[0].text for prompt in prompts[:20]] == want[:20]


def log_of(deployed: Deployed, process: int) -> list[str]:
    logs = Path(deployed.variables["RAY_TMPDIR"]).glob(f"ray/session_latest/logs/worker-*-{process}.err")
    return [line for log in logs for line in log.read_text().splitlines()]


@ray_cluster.imports_ray
@pytest.mark.anyio
async def test_a_replica_is_well_as_long_as_its_engine_lives() -> None:
    from pared.ray_serve import Replica

    part = SimpleNamespace(alive=True, error=None)
    replica = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(parts=[part]))))
    check = Replica.func_or_class.check_health
    await check(replica)
    part.alive, part.error = False, EngineStopped("the engine has died: no memory")
    with pytest.raises(EngineStopped, match="no memory"):
        await check(replica)
