"""The kernel tests, and two whole models, in a process whose CPU tensors take the Triton kernels.

TRITON_INTERPRET is read when a kernel is decorated, so it needs a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
TESTED = {
    "formats": ("test_formats.py",),
    "linears": ("test_dense.py", "test_shared_basis.py", "interpreted_tiles.py", "test_peers.py"),
    "routed": ("interpreted_routed.py",),
    "others": ("test_attention.py", "test_fused.py"),
    "models": (
        "test_model.py::test_prefill_of_a_mixed_batch[mistral-window]",
        "test_model.py::test_prefill_of_a_mixed_batch[gpt2]",
        "test_embed.py::test_two_texts_packed",
    ),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("tested", TESTED.values(), ids=TESTED)
def test_every_kernel_test_passes_in_the_interpreter(tested):
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    harmless = ("Conversion of an array with ndim > 0:DeprecationWarning", "overflow encountered in exp:RuntimeWarning")
    options = [option for warning in harmless for option in ("-W", f"ignore:{warning}")]
    plugins = ["-p", "interpreter_bf16", "-p", "no:cacheprovider"]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", *plugins, *options]
    run = subprocess.run(
        [*command, *(str(TESTS / name) for name in tested)],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
