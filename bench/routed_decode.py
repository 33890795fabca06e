"""`python -m pared.bench.routed_decode`: what sleeping groups are worth end to end, on the models of bench/routed.py.

Every row that has been trained, in bf16, against the dense model in our own best form, prompt and decode, in turns in
one run. Bytes are those of the weights that a decoded token of this answer really read: all but the groups that slept,
routers included. No speed is given before a routed model and the same one through transformers, every group computed
and masked, agree on the answer as end_to_end.py says.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..kernels.dispatch import FALLBACKS, set_threads
from ..terminal import print_table
from . import record, routed
from .end_to_end import check, prompt_of
from .quality import as_folder, chosen, fresh
from .routed_decisions import rounded
from .sides import Pared, Timed, Transformers, in_turns

if TYPE_CHECKING:
    from ..runtime.llm import LLM
    from ..runtime.model import FfnUse

DENSE = "dense"
BAR = 0.85
COLUMNS = (
    "model",
    "groups out",
    "MB a token",
    "promise",
    "decode",
    "decode / dense (quartiles)",
    "of the promise",
    "prefill / dense",
)


def main() -> None:
    """Measure the rows that have been trained; a table and a JSON."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help="some of the rows that have been trained, separated by commas")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    settings = chosen(routed.settings_trained(), options.rows)
    result = measure(settings, options.prompt_tokens, options.new_tokens, options.rounds)
    record.write("end_to_end_cpu_routed", result)
    print_table(title(result), COLUMNS, lines(result))


def measure(settings: Sequence[routed.Setting], prompt_tokens: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Time all of them and the dense model; returns what the JSON holds. Raises Disagreement."""
    import torch

    from ..runtime.llm import LLM

    result, agreements, sides, folders = record.circumstances(), {}, list[Pared](), list[Path]()
    with contextlib.ExitStack() as stack:

        def add(model: Any, name: str) -> Pared:
            folders.append(stack.enter_context(as_folder(model)))
            sides.append(Pared(LLM(folders[-1], device="cpu", max_batch=1), name))
            return sides[-1]

        prompt, origin = prompt_of(add(fresh(), DENSE).llm, prompt_tokens)
        for setting in settings:
            model, _ = routed.trained(setting)
            masked = Transformers(rounded(model, torch.bfloat16))
            agreements[setting.name] = check(add(model, setting.name), masked, prompt, new_tokens)
        answers = in_turns(sides, prompt, new_tokens, rounds)
        uses = [decoded(side.llm, prompt, new_tokens) for side in sides]
        reads = [bytes_read(folder, side.llm, use) for folder, side, use in zip(folders, sides, uses, strict=True)]
    return {
        **result,
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "prompt": origin,
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "fallbacks": {" ".join(key): count for key, count in FALLBACKS.items()},
        "agreement": agreements,
        "rows": {
            side.name: _summary(timed, answers[0], use, read, reads[0])
            for side, timed, use, read in zip(sides, answers, uses, reads, strict=True)
        },
    }


def _summary(
    timed: Sequence[Timed], dense: Sequence[Timed], uses: Sequence[FfnUse], read: float, dense_read: float
) -> dict[str, Any]:
    rates = [one.rate for one in timed]
    ratio = record.ratios([one.rate for one in dense], rates)
    promise = dense_read / read
    return {
        "sparsity": sum(use.sparsity for use in uses) / len(uses) if uses else 0.0,
        "layers": [use.sparsity for use in uses],
        "bytes_per_token": read,
        "bytes_promise": promise,
        "decode_tokens_per_second": record.quartiles(rates),
        "ratio": ratio,
        "of_the_promise": ratio[1] / promise,
        "prefill_ratio": record.ratios([one.first for one in timed], [one.first for one in dense]),
    }


def decoded(llm: LLM, prompt: list[int], new_tokens: int) -> list[FfnUse]:
    """What each routed FFN did for the tokens of an answer, its prompt left out; empty for a dense model."""
    from ..runtime.model import FfnUse
    from ..runtime.params import SamplingParams

    answer = llm.stream(prompt, SamplingParams(max_tokens=new_tokens, ignore_eos=True))
    next(answer)
    before = llm.core.ffn_use()
    for _ in answer:
        pass
    pairs = zip(before, llm.core.ffn_use(), strict=True)
    return [
        FfnUse(new.groups, new.rows - old.rows, new.woken - old.woken, new.read - old.read)
        for old, new in pairs
        if old and new
    ]


def bytes_read(folder: Path, llm: LLM, uses: Sequence[FfnUse]) -> float:
    """Bytes of weights that a decoded token read: those of a step with every group awake, less those that slept."""
    from ..runtime.accounting import decode_traffic
    from ..runtime.model import RoutedFfn

    ffns = [block.ffn.prepared for block in llm.model.weights.blocks if isinstance(block.ffn, RoutedFfn)]
    groups = [sum(tensor.nbytes for tensor in ffn.tensors[:2] if tensor is not None) for ffn in ffns]
    slept = sum(size * use.sparsity for size, use in zip(groups, uses, strict=True))
    return sum(decode_traffic(folder).values()) - slept


def title(result: dict[str, Any]) -> str:
    """What the numbers of `lines` are about."""
    return (
        f"LTE on SmolLM2-135M-Instruct, {result['dtype']}, {result['threads']} threads: {result['new_tokens']} tokens "
        f"after {result['prompt_tokens']} of {result['prompt']}; the bar is {100 * BAR:.0f} % of the promise"
    )


def lines(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The models as lines of a table under COLUMNS."""
    for name, row in result["rows"].items():
        low, middle, high = row["ratio"]
        yield (
            name,
            f"{100 * row['sparsity']:.1f} %",
            f"{row['bytes_per_token'] / 1e6:.1f}",
            f"{row['bytes_promise']:.2f}",
            f"{row['decode_tokens_per_second'][1]:.1f} tokens/s",
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            f"{100 * row['of_the_promise']:.0f} %",
            f"{row['prefill_ratio'][1]:.2f}",
        )


if __name__ == "__main__":
    main()
