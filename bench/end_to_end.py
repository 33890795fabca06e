"""Prefill and decode of a compact folder against transformers, llama.cpp or another folder, in turns in one run.

Both sides have the same threads and prompt, and but for another folder the same weights. No speed is given before
the two agree on the tokens: exactly in fp32; in 16 bits a first difference must lie where the two tokens are closer
together than rounding explains, for transformers than its own decode and prefill are apart.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ParedError, SourceError
from ..kernels.dispatch import FALLBACKS, set_threads
from . import record
from .cpu_linear import CEILING_BYTES, last_level_cache, reads_of, seconds_of
from .llama_cpp import KINDS, write_gguf
from .sides import LlamaCpp, Pared, Side, Timed, Transformers

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
LLAMA_CPP_NOISE = 0.25
"""Difference of log-probabilities up to which two tokens count as equally likely: llama.cpp gives no logits of two
computations of the same thing that would tell its own noise in 16 and 8 bits."""


class Disagreement(ParedError):
    """pared and transformers give different tokens, so their speeds cannot be compared."""


def compare(
    path: Path,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    rounds: int = 5,
    dtype: str | None = None,
    against: str = TRANSFORMERS,
) -> dict[str, Any]:
    """Measure both sides `rounds` times in turn; returns what `--out` writes.

    against: "transformers", "llama.cpp" (bf16) or "llama.cpp:q8_0", a GGUF file, or another compact folder. Raises
    Disagreement, and SourceError for something else.
    """
    import torch

    from ..runtime.llm import LLM

    llm = LLM(path, dtype=dtype)
    ours = Pared(llm, "pared")
    prompt, origin = prompt_of(llm, prompt_tokens)
    with contextlib.ExitStack() as stack:
        theirs = stack.enter_context(_opened(against, path, llm, prompt_tokens + new_tokens))
        agreement = check(ours, theirs, prompt, new_tokens)
        pairs = [(ours.once(prompt, new_tokens), theirs.once(prompt, new_tokens)) for _ in range(rounds)]
    promise = _bytes_per_token(theirs.llm, against) / _bytes_per_token(llm, path) if isinstance(theirs, Pared) else None
    return {
        **record.circumstances(),
        "last_level_cache_bytes": last_level_cache(),
        "folder": Path(path).name,
        "against": theirs.name,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "device": str(llm.model.device),
        "threads": torch.get_num_threads(),
        "prompt": origin,
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "agreement": agreement,
        "fallbacks": {" ".join(key): count for key, count in FALLBACKS.items()},
        "bytes_promise": promise,
        "prefill_tokens_per_second": _sides(theirs.name, pairs, lambda timed: len(prompt) / timed.first),
        **_decode(llm, path, _sides(theirs.name, pairs, lambda timed: timed.rate)),
    }


def _decode(llm: Any, path: Path, sides: dict[str, list[float]]) -> dict[str, Any]:
    """Decode rates, and what they mean in bytes against what memory gives at this moment."""
    weight_bytes, ceiling = _bytes_per_token(llm, path), _ceiling(llm.model.device)
    rate = weight_bytes * sides["pared"][1] / 1e9
    return {
        "decode_tokens_per_second": sides,
        "bytes_per_token": weight_bytes,
        "gb_per_s": rate,
        "percent_of_ceiling": None if ceiling is None else 100 * rate / ceiling,
    }


def title(result: dict[str, Any]) -> str:
    """What the numbers of `rows` are about."""
    ceiling, promise = result["percent_of_ceiling"], result["bytes_promise"]
    text = f"{result['folder']}, {result['dtype']}: decode reads {result['gb_per_s']:.1f} GB/s of weights"
    if ceiling is not None:
        text += f", {ceiling:.0f} % of what memory gives"
    if promise is not None:
        reached = 100 * result["decode_tokens_per_second"]["ratio"][1] / promise
        text += f"; {promise:.2f} times fewer bytes a token than {result['against']}, {reached:.0f} % of that in speed"
    return text


def columns(result: dict[str, Any]) -> tuple[str, str, str, str]:
    """The head of the table of `rows`."""
    return "what", "pared", result["against"], "ratio (quartiles)"


def rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The result as lines of a table under `columns`."""
    lines = []
    for what in ("prefill", "decode"):
        sides = result[f"{what}_tokens_per_second"]
        low, middle, high = sides["ratio"]
        pared, theirs = (f"{sides[side][1]:.1f} tokens/s" for side in ("pared", result["against"]))
        lines.append((what, pared, theirs, f"{middle:.2f} ({low:.2f} to {high:.2f})"))
    return lines


@contextlib.contextmanager
def _opened(against: str, path: Path, llm: Any, context: int) -> Iterator[Side]:
    """The side that `against` names."""
    import torch

    from ..convert import export
    from ..runtime.llm import LLM

    kind, threads = against.removeprefix(LLAMA_CPP).removeprefix(":") or "bf16", torch.get_num_threads()
    if against == TRANSFORMERS:
        yield Transformers.load(path, llm.model.dtype, llm.model.device)
    elif against.startswith(LLAMA_CPP) and kind in KINDS:
        with tempfile.TemporaryDirectory(prefix="pared-") as folder:
            write_gguf(export(path, Path(folder) / "dense", progress=False), Path(folder) / "model.gguf", kind)
            file, name = Path(folder) / "model.gguf", f"{LLAMA_CPP} {kind}"
            exact = kind == "bf16"
            # Version 0.3.36 ends in a segmentation fault where it lays Q8_0 out for AMX.
            with contextlib.closing(LlamaCpp(file, name, exact, context, threads, as_stored=not exact)) as side:
                yield side
    elif Path(against).suffix == ".gguf" and Path(against).is_file():
        with contextlib.closing(LlamaCpp(Path(against), Path(against).name, False, context, threads)) as side:
            yield side
    elif Path(against).is_dir():
        yield Pared(LLM(Path(against), dtype=llm.model.dtype), Path(against).name)
    else:
        kinds = ", ".join(f"{LLAMA_CPP}:{kind}" for kind in KINDS)
        raise SourceError(
            f"--against {against}: give {TRANSFORMERS}, {LLAMA_CPP}, {kinds}, a GGUF file or a compact folder"
        )


def check(ours: Pared, theirs: Side, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Hold the two answers against each other where they should be one. Raises Disagreement."""
    import torch

    answer, other = ours.once(prompt, new_tokens).tokens, theirs.once(prompt, new_tokens).tokens
    if not theirs.same_weights:
        return {"equal_tokens": None, "of": new_tokens}
    if answer == other:
        return {"equal_tokens": new_tokens, "of": new_tokens}
    at = next(i for i, (one, two) in enumerate(zip(answer, other, strict=True)) if one != two)
    if isinstance(theirs, Transformers):
        gap, noise = _noise(theirs.model, prompt, other, at, answer[at])
    else:
        gap, noise = _gap(ours.llm, prompt + answer[:at], answer[at], other[at]), LLAMA_CPP_NOISE
    if ours.llm.model.dtype == torch.float32 or gap > noise:
        raise Disagreement(
            f"token {at} of the answer is {answer[at]} in pared and {other[at]} in {theirs.name}, {gap:.3g} apart "
            f"where rounding explains {noise:.3g}: one of the two is wrong"
        )
    return {"equal_tokens": at, "of": new_tokens, "logit_gap": gap, "logit_noise": noise}


def _noise(model: Any, prompt: list[int], answer: list[int], at: int, other: int) -> tuple[float, float]:
    """By how much transformers prefers its token `at` to the other; and by how much its decode and prefill differ."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": len(answer), "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    steps = torch.stack([step[0].float() for step in out.logits])
    with torch.no_grad():
        whole = model(out.sequences[:, :-1]).logits[0, len(prompt) - 1 :].float()
    return float(steps[at, answer[at]] - steps[at, other]), float((steps - whole).abs().max())


def _gap(llm: Any, prompt: list[int], own: int, other: int) -> float:
    """By how much pared's log-probability of its token exceeds the other's; infinite beyond the likeliest few."""
    from ..runtime.params import SamplingParams

    choice = llm.generate([prompt], SamplingParams(max_tokens=1, logprobs=8, ignore_eos=True))[0]
    found = dict(choice.logprobs[0].top)
    return float(found[own] - found[other]) if other in found else float("inf")


def prompt_of(llm: Any, count: int) -> tuple[list[int], str]:
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


def _bytes_per_token(llm: Any, path: Path | str) -> int:
    from ..runtime.accounting import decode_traffic

    return sum(decode_traffic(Path(path), llm.model.dtype).values())


def _sides(name: str, pairs: list[tuple[Timed, Timed]], value: Callable[[Timed], float]) -> dict[str, list[float]]:
    ours, theirs = [value(one) for one, _ in pairs], [value(other) for _, other in pairs]
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    quartiles = {"pared": ours, name: theirs, "ratio": ratios}
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
        print_table(title(result), columns(result), rows(result))


if __name__ == "__main__":
    main()
