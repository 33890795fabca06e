"""What every test shares: a quiet environment set before torch is imported, and the real model.

`smollm2` is converted once and kept under .data/ between runs, keyed by everything that decides
its bytes, so that a change of a converter is never tested against yesterday's folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from pared.kernels.dispatch import set_threads

os.environ.setdefault("HF_HUB_OFFLINE", "1")
set_threads()

ROOT = Path(__file__).resolve().parents[1]
DECIDE_THE_BYTES = ("converters", "kernels/*.py", "compact*.py", "convert*.py", "families.py", "spec.py", "__init__.py")


def _key(model: Path) -> str:
    digest = hashlib.sha256(f"{model.stat().st_size} {model.stat().st_mtime_ns}".encode())
    for pattern in DECIDE_THE_BYTES:
        for path in sorted(ROOT.glob(pattern)):
            for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    from pared.bench.data import gguf_path
    from pared.errors import SourceError

    try:
        return gguf_path()
    except SourceError as missing:  # `make test` installs it; a machine without a network may not have it
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct as a dense compact folder in the source's dtype, which plain transformers opens too."""
    from filelock import FileLock

    from pared.convert import convert

    home = ROOT / ".data"
    home.mkdir(exist_ok=True)
    target = home / f"smollm2-{_key(smollm2_gguf)}"
    with FileLock(home / "smollm2.lock"):
        if not target.exists():
            for stale in home.glob("smollm2-*"):
                shutil.rmtree(stale)
            convert(smollm2_gguf, target, progress=False)
    return target


@pytest.fixture(scope="session")
def smollm2_hf(smollm2: Path):
    """The same folder in plain transformers, fp32, greedy by default."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    model.generation_config.do_sample = False
    return model


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path):
    """The tokenizer that the folder holds, as transformers reads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def real_prompts() -> list[str]:
    """Twenty real questions."""
    from pared.bench.data import TEXTS_WHEEL, boolq_questions

    if not TEXTS_WHEEL.exists():
        pytest.skip("the texts are not in .data/; `make test` fetches them")
    return boolq_questions()[:20]
