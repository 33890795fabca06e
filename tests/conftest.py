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

from pared.kernels.dispatch import cpus, set_threads

pytest.register_assert_rewrite("pared.tests.client_suite")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if beside := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # workers share the machine
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus() // beside)))
set_threads()

ROOT = Path(__file__).resolve().parents[1]
DECIDE_THE_BYTES = (
    "converters",
    "kernels/*.py",
    "compact*.py",
    "durable.py",
    "convert*.py",
    "families.py",
    "spec.py",
    "__init__.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=400, help="requests that test_server_fuzz.py sends at least")


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

    from pared import convert

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


CHAT_TEMPLATE = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer and a chat template, as transformers saves it, fp32."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("tiny") / "checkpoint"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(home)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(fast), "tie_word_embeddings": False}
    ends = {"eos_token_id": fast.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends)).save_pretrained(home)
    return home


@pytest.fixture(scope="session")
def tiny_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` as a compact folder."""
    from pared import convert

    target = tmp_path_factory.mktemp("tiny-compact") / "smollm2"
    convert(tiny_checkpoint, target, progress=False)
    return target
