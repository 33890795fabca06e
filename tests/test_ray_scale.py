"""`pared deploy ray --max-replicas`: an encoder behind Ray Serve over TLS, of which a queue makes a second replica."""

from __future__ import annotations

import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import numpy as np
import trustme
import yaml

from pared import Embedder
from pared.tests import ray_cluster
from pared.tests.serving import eventually, free_port
from pared.tests.test_embed import TEXTS, encoder

pytestmark = ray_cluster.needs_ray
TESTS = Path(__file__).resolve().parent


def test_a_queue_starts_a_replica_that_gives_the_same_vectors(tmp_path: Path) -> None:
    folder, port, authority = encoder(tmp_path / "encoder"), free_port(), trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    place = ["--port", port, "--certificate", tmp_path / "certificate.pem", "--private-key", tmp_path / "key.pem"]
    scale = ["--max-replicas", 2, "--cpus", 0.5, "--max-batch", 1, "--device", "cpu", "--name", "small"]
    write = ["deploy", "ray", folder, tmp_path / "serve.yaml", *place, *scale]
    subprocess.run([sys.executable, "-m", "pared.cli", *map(str, write)], cwd=TESTS, check=True)
    told = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    told["applications"][0]["deployments"][0]["autoscaling_config"] |= {"upscale_delay_s": 1, "metrics_interval_s": 1}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(told))

    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    want = Embedder(folder, device="cpu").encode(TEXTS)
    with (
        httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusting, timeout=60) as client,
        ray_cluster.environment() as variables,
    ):

        def replicas() -> int:
            return len(ray_cluster.processes(variables, "ray::ServeReplica:small:Replica"))

        def ready() -> bool:
            try:
                return client.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        def ask(_: int) -> bool:
            reply = client.post("/v1/embeddings", json={"input": TEXTS}).json()
            return np.allclose([row["embedding"] for row in reply["data"]], want, atol=1e-6)

        with ray_cluster.serving(tmp_path / "serve.yaml", variables, ready), ThreadPoolExecutor(16) as pool:
            assert replicas() == 1

            def grown() -> bool:
                assert all(pool.map(ask, range(64)))
                return replicas() == 2

            eventually(grown, 200)
            assert all(pool.map(ask, range(64)))
