"""What cpu_formats.py and cpu_ffn.py share: the models, the dense sides, the command line, and the table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..kernels.dispatch import set_threads
from ..terminal import print_table
from . import record
from .cpu_linear import Ceiling, Weights, last_level_cache

if TYPE_CHECKING:
    import torch

CONFIGS: dict[str, dict[str, int]] = {  # hidden size 4096, 32 heads
    "llama-2-7b": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-3-8b": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}
DENSE, TORCH = "dense", "F.linear"
CHECKED_ROWS = 2  # of x: a format's reference computes in fp32, slowly
COLUMNS = ("M", "form", "time_us", "MB read", "GB/s", "% of ceiling", "best dense / this (quartiles)")


def header(name: str, dtype: torch.dtype, native: Any, weights: Weights, ceiling: Ceiling) -> dict[str, Any]:
    """What a result says of its run beside the circumstances and the cases."""
    import torch

    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "level": native.level,
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "rotated_bytes": weights.buffer.nbytes,
        **ceiling.as_json(),
    }


def lines(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cases as lines of a table under COLUMNS."""
    for case in result["cases"]:
        low, middle, high = case["ratio"]
        yield (
            str(case["m"]),
            case["side"],
            f"{case['time_us'][1]:.0f}",
            f"{case['bytes'] / 1e6:.1f}",
            f"{case['gb_per_s']:.1f}",
            f"{case['percent_of_ceiling']:.0f}",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
        )


def run(measure: Callable[..., dict[str, Any]], rows: Sequence[int], stem: str, what: str, about: str | None) -> None:
    """`make bench`: a table and a JSON for each model. measure(model, dtype, rows, rounds); stem: of the file names."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--models", nargs="+", choices=tuple(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(rows))
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    set_threads()
    import torch

    for name in options.models:
        result = measure(name, getattr(torch, options.dtype), options.rows, options.rounds)
        record.write(f"{stem}_{name}_{options.dtype}", result)
        reads = ", ".join(f"{how} {rate[1]:.1f}" for how, rate in result["reads_gb_per_s"].items())
        print_table(f"{name}, {what}, {options.dtype}, {result['level']}; GB/s read: {reads}", COLUMNS, lines(result))
