"""`python -m pared.bench.one_group`: what Basis Sharing of a 7B model costs this machine in time and memory.

Measured on random weights and inputs in the shapes of Llama-2-7B: one factorisation of each kind of group, and the
Gram matrices of one window. Everything else is multiplication, and says so.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernels.dispatch import set_threads
from ..terminal import print_table

HIDDEN, FFN, LAYERS, GROUP, RATIO = 4096, 11008, 32, 2, 0.2
WINDOWS, LENGTH = 256, 2048


@dataclass(frozen=True)
class Kind:
    """A group of `members` weights [n, k]; `count` of them in a run of two layers."""

    name: str
    n: int
    k: int
    members: int
    count: int


KINDS = (
    Kind("q, k or v, shared", HIDDEN, HIDDEN, GROUP, 3),
    Kind("gate or up, shared", FFN, HIDDEN, GROUP, 2),
    Kind("o, private", HIDDEN, HIDDEN, 1, 2),
    Kind("down, private", HIDDEN, FFN, 1, 2),
)


def main() -> None:
    """Measure, project, print."""
    set_threads()
    rows = [measure(kind) for kind in KINDS]
    run = sum(row["seconds"] * row["count"] + row["root_seconds"] for row in rows)
    window, layer = timed(grams_of_a_window), timed(layer_of_a_window())
    runs = LAYERS // GROUP
    walk = WINDOWS * LAYERS * (window + layer)
    lines = [
        (r["name"], str(r["rank"]), f"{r['seconds']:.1f} s", f"x {r['count']}", f"{r['root_seconds']:.1f} s")
        for r in rows
    ]
    columns = ("group", "rank", "time", "in a run", "root of the Gram matrix, once")
    print_table("One factorisation, Llama-2-7B at 20 %, groups of 2", columns, lines)
    result = {
        "kinds": rows,
        "run_of_two_layers_seconds": run,
        "window_grams_seconds": window,
        "window_layer_seconds": layer,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "projected_factorisation_hours": runs * run / 3600,
        "projected_walk_hours": walk / 3600,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "kinds"}, indent=1))


def timed(step: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(kind: Kind) -> dict[str, Any]:
    """Seconds to factorise one group of this kind, and for the root that kinds with the same inputs share."""
    import torch

    from ..converters.low_rank import factorize, rank, square_root

    torch.manual_seed(0)
    x = torch.randn(kind.k + 1024, kind.k) * torch.logspace(0, -2, kind.k)
    gram = (x.t() @ x).double()
    weights = [torch.randn(kind.n, kind.k).double() for _ in range(kind.members)]
    r = rank(RATIO, kind.n, kind.k, kind.members)
    start = time.perf_counter()
    root = square_root(gram) if kind.n * kind.members > kind.k else None
    rooted = time.perf_counter()
    factorize(weights, gram, r, root)
    seconds, root_seconds = time.perf_counter() - rooted, rooted - start
    return {"name": kind.name, "rank": r, "seconds": seconds, "root_seconds": root_seconds, "count": kind.count}


def grams_of_a_window() -> None:
    """x^T x of the four inputs of one layer for one window, as calibration sums them."""
    import torch

    for k in (HIDDEN, HIDDEN, HIDDEN, FFN):
        x = torch.ones(LENGTH, k)
        (x.t() @ x).double()


def layer_of_a_window() -> Callable[[], Any]:
    """One window through one decoder layer in fp32."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_attention_heads=32, attn_implementation="sdpa")
    layer = LlamaDecoderLayer(config, 0).requires_grad_(False)
    x = torch.ones(1, LENGTH, HIDDEN)
    tables = LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    return lambda: layer(x, position_embeddings=tables)


if __name__ == "__main__":
    main()
