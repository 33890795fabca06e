"""`make demo`: a real checkpoint goes the whole way, as it is and compressed, and tables say what came of it."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from ..errors import ParedError
from ..evaluate import Row
from ..kernels.dispatch import set_threads
from ..reports import readable
from ..terminal import print_error, print_table, say
from . import end_to_end
from .sides import Pared, Transformers, in_turns

QUESTION = "What is photosynthesis? Answer in two sentences."
ANSWER_TOKENS = 96
TEXT_CHARACTERS = 40_000  # four windows of 2048 tokens
CALIBRATION_BYTES = 1_200_000
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 256, 48, 3
COLUMNS = ("", "disk", "bytes per token", "perplexity", "prefill", "decode")
METHODS = (
    "basis_sharing:ratio=10,group=1,ranks=pivoted,samples=128,length=512",
    "recover:tokens=32768,length=256,batch=4,lr=5e-4",
)


def main() -> None:
    """Convert SmolLM2-135M-Instruct to the folder given and compress it beside; generate with both, measure both."""
    set_threads()
    try:
        run(Path(sys.argv[1]))
    except ParedError as error:
        print_error(error)
        raise SystemExit(1) from None


def run(folder: Path) -> None:
    """The steps of the demo."""
    from .data import convert_smollm2, gguf_path

    small = folder.with_name(f"{folder.name}-compressed")
    print(f"1. pared convert {gguf_path().name} {folder} --dtype bfloat16")
    convert_smollm2(folder)
    print(f"\n2. pared generate {folder} {QUESTION!r} --chat\n")
    answer(folder)
    print("\n3. Perplexity, and speed against transformers in turns: about a minute")
    row = measured(folder)
    print_table("SmolLM2-135M-Instruct in bfloat16 on this machine", COLUMNS, rows(folder, row))
    print(f"\n4. pared convert {gguf_path().name} {small} --dtype bfloat16 --calibration {calibration(folder)}")
    print("".join(f"       --method {method}\n" for method in METHODS))
    compress(folder, small)
    print(f"\n5. pared generate {small} {QUESTION!r} --chat\n")
    answer(small)
    print("\n6. The original beside the compressed model")
    print_table("Each round in turns", COLUMNS, side_by_side([(folder, row), (small, measured(small))]))
    print(f"Perplexity on BoolQ dev passages, windows of 2048. Next: pared chat {small}")


def calibration(folder: Path) -> Path:
    """The file that the compressed model is calibrated on, beside the folder: BoolQ train passages as answers.

    In the form in which the model is asked: after plain passages it would go on and on, since none of them ends.
    """
    from ..runtime.text import Tokenizer
    from .data import boolq_train

    tokenizer, path = Tokenizer(folder), folder.with_name("boolq-train.txt")
    with path.open("w", encoding="utf-8") as file:
        for passage, question in boolq_train().items():
            messages = [{"role": "user", "content": f"{question}?"}, {"role": "assistant", "content": passage}]
            file.write(tokenizer.hf.apply_chat_template(messages, tokenize=False))
            if file.tell() > CALIBRATION_BYTES:
                break
    return path


def compress(folder: Path, small: Path) -> None:
    """The compressed folder, replacing what an earlier run left."""
    from .. import convert
    from .data import gguf_path

    convert(
        gguf_path(), small, methods=METHODS, dtype="bfloat16", calibration=calibration(folder), overwrite=small.exists()
    )


def answer(folder: Path) -> None:
    """Stream the answer to one question through the model's chat template."""
    from ..runtime.llm import LLM
    from ..runtime.params import SamplingParams

    llm = LLM(folder)
    prompt = llm.tokenizer.chat([{"role": "user", "content": QUESTION}])
    say(delta.text for delta in llm.stream(prompt, SamplingParams(max_tokens=ANSWER_TOKENS)))


def measured(folder: Path) -> Row:
    """Sizes and perplexity."""
    from ..evaluate import measure
    from .data import boolq_passages, corpus

    return measure(folder, corpus(boolq_passages("dev"))[:TEXT_CHARACTERS], progress=True)


def rows(folder: Path, row: Row) -> list[tuple[str, ...]]:
    """A line for transformers and a line for pared, under COLUMNS."""
    from .data import boolq_passages, corpus

    text = corpus(boolq_passages("dev"))[:TEXT_CHARACTERS]
    result = end_to_end.compare(folder, PROMPT_TOKENS, NEW_TOKENS, ROUNDS)
    quality = {"transformers": transformers_perplexity(folder, text), "pared": row.perplexity}
    sizes = (readable(row.disk_bytes), readable(row.bytes_per_token))

    def line(side: str) -> tuple[str, ...]:
        speeds = (result[f"{what}_tokens_per_second"][side][1] for what in ("prefill", "decode"))
        return (side, *sizes, f"{quality[side]:.2f}", *(f"{speed:.1f} tokens/s" for speed in speeds))

    ratios = (result[f"{what}_tokens_per_second"]["ratio"][1] for what in ("prefill", "decode"))
    return [line("transformers"), line("pared"), ("ratio", "", "", "", *(f"{ratio:.2f}" for ratio in ratios))]


def side_by_side(models: list[tuple[Path, Row]]) -> list[tuple[str, ...]]:
    """A line for each model, under COLUMNS; speeds are medians of rounds taken in turns."""
    from ..runtime.llm import LLM
    from .data import boolq_passages, corpus

    sides = [Pared(LLM(folder), folder.name) for folder, _ in models]
    prompt = sides[0].llm.tokenizer.encode(corpus(boolq_passages("dev")[:20]))[:PROMPT_TOKENS]
    lines: list[tuple[str, ...]] = []
    for (folder, row), timed in zip(models, in_turns(sides, prompt, NEW_TOKENS, ROUNDS), strict=True):
        prefill = statistics.median(len(prompt) / one.first for one in timed)
        decode = statistics.median(one.rate for one in timed)
        sizes = (readable(row.disk_bytes), readable(row.bytes_per_token), f"{row.perplexity:.2f}")
        lines.append((folder.name, *sizes, f"{prefill:.1f} tokens/s", f"{decode:.1f} tokens/s"))
    return lines


def transformers_perplexity(folder: Path, text: str) -> float:
    """The same measure over transformers' logits."""
    import torch

    from ..evaluate import perplexity
    from ..runtime.text import Tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformers.load(folder, torch.bfloat16, device).model

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(tokens[None].to(device)).logits[0]

    return perplexity(logits, Tokenizer(folder).encode(text), progress=True)


if __name__ == "__main__":
    main()
