"""`make demo`: a real checkpoint goes the whole way, and a table says what came of it."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import ParedError
from ..kernels.dispatch import set_threads
from ..reports import readable
from ..terminal import print_error, print_table, say
from . import end_to_end

QUESTION = "Why is the sky blue? Answer in two sentences."
ANSWER_TOKENS = 96
TEXT_CHARACTERS = 40_000  # four windows of 2048 tokens
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 256, 48, 3
COLUMNS = ("", "disk", "bytes per token", "perplexity", "prefill", "decode")


def main() -> None:
    """Convert SmolLM2-135M-Instruct to the folder given, generate with it, measure it."""
    set_threads()
    try:
        run(Path(sys.argv[1]))
    except ParedError as error:
        print_error(error)
        raise SystemExit(1) from None


def run(folder: Path) -> None:
    """The steps of the demo."""
    from .data import convert_smollm2, gguf_path

    print(f"1. pared convert {gguf_path().name} {folder} --dtype bfloat16")
    convert_smollm2(folder)
    print(f"\n2. pared generate {folder} {QUESTION!r} --chat\n")
    answer(folder)
    print("\n3. Perplexity, and speed against transformers in turns: about a minute")
    print_table("SmolLM2-135M-Instruct in bfloat16 on this machine", COLUMNS, rows(folder))
    print(f"Perplexity on BoolQ dev passages, windows of 2048. Next: pared chat {folder}")


def answer(folder: Path) -> None:
    """Stream the answer to one question through the model's chat template."""
    from ..runtime.llm import LLM
    from ..runtime.params import SamplingParams

    llm = LLM(folder)
    prompt = llm.tokenizer.chat([{"role": "user", "content": QUESTION}])
    say(delta.text for delta in llm.stream(prompt, SamplingParams(max_tokens=ANSWER_TOKENS)))


def rows(folder: Path) -> list[tuple[str, ...]]:
    """A line for transformers and a line for pared, under COLUMNS."""
    from ..evaluate import measure
    from .data import boolq_passages, corpus

    text = corpus(boolq_passages("dev"))[:TEXT_CHARACTERS]
    row = measure(folder, text, progress=True)
    result = end_to_end.compare(folder, PROMPT_TOKENS, NEW_TOKENS, ROUNDS)
    quality = {"transformers": transformers_perplexity(folder, text), "pared": row.perplexity}
    sizes = (readable(row.disk_bytes), readable(row.bytes_per_token))

    def line(side: str) -> tuple[str, ...]:
        speeds = (result[f"{what}_tokens_per_second"][side][1] for what in ("prefill", "decode"))
        return (side, *sizes, f"{quality[side]:.2f}", *(f"{speed:.1f} tokens/s" for speed in speeds))

    ratios = (result[f"{what}_tokens_per_second"]["ratio"][1] for what in ("prefill", "decode"))
    return [line("transformers"), line("pared"), ("ratio", "", "", "", *(f"{ratio:.2f}" for ratio in ratios))]


def transformers_perplexity(folder: Path, text: str) -> float:
    """The same measure over transformers' logits."""
    import torch

    from ..evaluate import perplexity
    from ..runtime.text import Tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = end_to_end.open_transformers(folder, torch.bfloat16, device)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens[None].to(device)).logits[0]

    return perplexity(logits, Tokenizer(folder).encode(text), progress=True)


if __name__ == "__main__":
    main()
