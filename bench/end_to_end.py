"""Prefill and decode of a compact folder against transformers' generate, interleaved in one process.

Both sides have the same weights, dtype, device, threads and prompt. No speed is given before the two
agree on the tokens: exactly in fp32; in 16 bits a first difference must lie where transformers' own
logits are closer together than its decode and its prefill are apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ParedError, SourceError
from ..kernels.dispatch import FALLBACKS, set_threads
from . import record
from .cpu_linear import CEILING_BYTES, last_level_cache, reads_of, seconds_of

COLUMNS = ("what", "pared", "transformers", "ratio (quartiles)")


class Disagreement(ParedError):
    """pared and transformers give different tokens, so their speeds cannot be compared."""


@dataclass(frozen=True)
class Timed:
    """One answer: its tokens, seconds to the first one, and tokens per second after it."""

    tokens: list[int]
    first: float
    rate: float


def compare(
    path: Path, prompt_tokens: int = 512, new_tokens: int = 64, rounds: int = 5, dtype: str | None = None
) -> dict[str, Any]:
    """Measure both sides `rounds` times in turn; returns what `--out` writes. Raises Disagreement."""
    import torch

    from ..runtime.accounting import decode_traffic
    from ..runtime.llm import LLM

    llm = LLM(path, dtype=dtype)
    theirs = open_transformers(path, llm.model.dtype, llm.model.device)
    prompt, origin = _prompt(llm, prompt_tokens)
    agreement = check(llm, theirs, prompt, new_tokens)
    pairs = [(ours_once(llm, prompt, new_tokens), theirs_once(theirs, prompt, new_tokens)) for _ in range(rounds)]
    decode = _sides(pairs, lambda timed: timed.rate)
    weight_bytes, ceiling = sum(decode_traffic(path, llm.model.dtype).values()), _ceiling(llm.model.device)
    rate = weight_bytes * decode["pared"][1] / 1e9
    return {
        **record.circumstances(),
        "last_level_cache_bytes": last_level_cache(),
        "folder": Path(path).name,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "device": str(llm.model.device),
        "threads": torch.get_num_threads(),
        "prompt": origin,
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "agreement": agreement,
        "fallbacks": {" ".join(key): count for key, count in FALLBACKS.items()},
        "bytes_per_token": weight_bytes,
        "gb_per_s": rate,
        "percent_of_ceiling": None if ceiling is None else 100 * rate / ceiling,
        "prefill_tokens_per_second": _sides(pairs, lambda timed: len(prompt) / timed.first),
        "decode_tokens_per_second": decode,
    }


def title(result: dict[str, Any]) -> str:
    """What the numbers of `rows` are about."""
    ceiling = result["percent_of_ceiling"]
    share = "" if ceiling is None else f", {ceiling:.0f} % of what memory gives"
    return f"{result['folder']}, {result['dtype']}: decode reads {result['gb_per_s']:.1f} GB/s of weights{share}"


def rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The result as lines of a table under COLUMNS."""
    lines = []
    for what in ("prefill", "decode"):
        sides = result[f"{what}_tokens_per_second"]
        low, middle, high = sides["ratio"]
        pared, theirs = (f"{sides[side][1]:.1f} tokens/s" for side in ("pared", "transformers"))
        lines.append((what, pared, theirs, f"{middle:.2f} ({low:.2f} to {high:.2f})"))
    return lines


def ours_once(llm: Any, prompt: list[int], new_tokens: int) -> Timed:
    """pared's answer, streamed as a user gets it."""
    from ..runtime.params import SamplingParams

    tokens: list[int] = []
    times: list[float] = []
    start = time.perf_counter()
    for delta in llm.stream(prompt, SamplingParams(max_tokens=new_tokens, ignore_eos=True)):
        tokens += delta.token_ids
        times += [time.perf_counter()] * len(delta.token_ids)
    return _timed(tokens, start, times)


class _Clock:
    """transformers hands each token to a streamer: this one notes when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def theirs_once(model: Any, prompt: list[int], new_tokens: int) -> Timed:
    """transformers' greedy answer."""
    import torch

    clock, ids = _Clock(), torch.tensor([prompt], device=model.device)
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=clock)
    return _timed(out[0, len(prompt) :].tolist(), start, clock.times[1:])  # the first call brings the prompt


def check(llm: Any, model: Any, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Hold the two answers against each other. Raises Disagreement where more than rounding tells them apart."""
    import torch

    ours = ours_once(llm, prompt, new_tokens).tokens
    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": new_tokens, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    theirs = out.sequences[0, len(prompt) :].tolist()
    if ours == theirs:
        return {"equal_tokens": new_tokens, "of": new_tokens}
    at = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
    steps = torch.stack([step[0].float() for step in out.logits])
    with torch.no_grad():
        whole = model(out.sequences[:, :-1]).logits[0, len(prompt) - 1 :].float()
    noise, gap = float((steps - whole).abs().max()), float(steps[at, theirs[at]] - steps[at, ours[at]])
    if llm.model.dtype == torch.float32 or gap > noise:
        raise Disagreement(
            f"token {at} of the answer is {ours[at]} in pared and {theirs[at]} in transformers, whose logits are "
            f"{gap:.3g} apart; its own decode and prefill differ by {noise:.3g}: one of the two is wrong"
        )
    return {"equal_tokens": at, "of": new_tokens, "logit_gap": gap, "logit_noise": noise}


def _timed(tokens: list[int], start: float, times: list[float]) -> Timed:
    if len(times) < 2:
        raise ParedError(f"{len(times)} tokens were generated, a decode rate needs at least 2; ask for more tokens")
    return Timed(tokens, times[0] - start, (len(times) - 1) / (times[-1] - times[0]))


def open_transformers(path: Path, dtype: Any, device: Any) -> Any:
    """The same folder in transformers, greedy and without an end of text: both sides count to the end."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).to(device).eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def _prompt(llm: Any, count: int) -> tuple[list[int], str]:
    """`count` tokens: real prose where the texts are in reach, else seeded random ids."""
    import torch

    from .data import boolq_passages, corpus

    try:
        ids = llm.tokenizer.encode(corpus(boolq_passages("dev")[: 1 + count // 20]))
    except SourceError:
        ids = []
    if len(ids) >= count:
        return ids[:count], "BoolQ dev passages"
    generator = torch.Generator().manual_seed(0)
    return torch.randint(llm.model.spec.vocab, (count,), generator=generator).tolist(), "random token ids"


def _sides(pairs: list[tuple[Timed, Timed]], value: Callable[[Timed], float]) -> dict[str, list[float]]:
    ours, theirs = [value(one) for one, _ in pairs], [value(other) for _, other in pairs]
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    quartiles = {"pared": ours, "transformers": theirs, "ratio": ratios}
    return {side: record.quartiles(values) for side, values in quartiles.items()}


def _ceiling(device: Any) -> float | None:
    """GB/s at which this CPU reads its memory now; None where there is no native kernel to read it with."""
    import torch

    from ..kernels.native import library

    native = library.load()
    if device.type != "cpu" or native is None:
        return None
    reads = reads_of(torch.ones(CEILING_BYTES, dtype=torch.uint8), native).values()
    return max(CEILING_BYTES / seconds_of(read) / 1e9 for read in reads for _ in range(3))


def main() -> None:
    """`make bench`: SmolLM2 in bf16 and fp32, with JSON beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a compact folder; SmolLM2 is converted to it if it is not there")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    set_threads()
    from ..terminal import print_table
    from .data import convert_smollm2

    if not options.folder.exists():
        convert_smollm2(options.folder)
    for dtype in ("bfloat16", "float32"):
        result = compare(options.folder, rounds=options.rounds, dtype=dtype)
        kind = "gpu" if result["device"].startswith("cuda") else "cpu"
        record.write(f"end_to_end_{kind}_{dtype}", result)
        print_table(title(result), COLUMNS, rows(result))


if __name__ == "__main__":
    main()
