"""What others offer, in turns with pared: kernels on a layer's matrices, and transformers on a whole model.

transformers has the same weights, eager and with a static cache under torch.compile.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from ... import families
from ...errors import KernelError
from ...kernels import dense
from ...runtime.model import Ffn, Projection
from .. import record
from . import ceilings
from .decode import Subject, _apart, _wait
from .layers import GATHER, SPARSELT, TORCH, TWICE, layer_of, sides_of
from .measuring import measure_sets
from .report import Part
from .setting import Setting

MODEL = "llama-3-8b"
ROUNDS = 3


def kernels(part: Part, setting: Setting) -> None:
    """One token through each set of a layer: cuBLAS once and twice, a gathering GEMV, 2:4 where torch has cuSPARSELt.

    What our formats make of the same sets is in the stage "kernels"; our dense is here to compare with.
    """
    ceiling = ceilings.ceiling(setting)
    sparse = torch.backends.cusparselt.is_available()
    part.note(model=MODEL, ceiling_gb_per_s=ceiling, cusparselt="here" if sparse else "absent")
    sides = sides_of((TORCH, TWICE, GATHER, *((SPARSELT,) if sparse else ())), (dense,))
    for modules in layer_of(setting.config(MODEL)):
        for row in measure_sets([modules], 1, sides, setting, ceiling):
            part.row(set="|".join(module.path.rpartition(".")[2] for module in modules), **row)


def run(part: Part, setting: Setting) -> None:
    """One row a side, dense weights; the compiled side comes last, since compiling it may outlast the budget."""
    config = setting.config(MODEL)
    subject = Subject(families.read(config), None, setting)
    checked = subject.check()
    theirs = same_weights(subject, config)
    ids = torch.tensor([subject.tokens], device=setting.device)
    logits = theirs(ids).logits[0, -1:].float()
    apart = _apart(subject.decoder(subject.step(), subject.cache), logits)
    if not apart <= checked["allowed"]:
        raise KernelError(f"logits are {apart:.3g} from transformers', rounding explains {checked['allowed']:.3g}")
    part.note(model=MODEL, logits_to_transformers=apart, context=setting.context, generated=setting.tokens)
    for side, cache in (("transformers eager", "dynamic"), ("transformers static cache, compiled", "static")):
        generate(theirs, subject, cache)
        pairs = [(subject.tokens_per_second("recorded"), generate(theirs, subject, cache)) for _ in range(ROUNDS)]
        ours, others = (list(values) for values in zip(*pairs, strict=True))
        part.row(
            side=side,
            pared_tokens_per_second=record.quartiles(ours),
            tokens_per_second=record.quartiles(others),
            ratio=record.ratios(others, ours),
        )


def same_weights(subject: Subject, config: dict[str, Any]) -> Any:
    """The transformers model whose parameters are views of the decoder's: nothing is copied."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=subject.setting.dtype)
    model.load_state_dict(_state(subject), assign=True)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=made).to(subject.setting.device)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()


def _state(subject: Subject) -> dict[str, torch.Tensor]:
    """The decoder's dense weights under their names in a checkpoint, cut apart where it holds them stacked."""
    spec, weights, dtype = subject.spec, subject.decoder.weights, subject.setting.dtype
    names = spec.names
    state = {f"{names.embed}.weight": weights.embed}
    projections: list[tuple[tuple[str, ...], Projection]] = []
    if weights.head is not None:
        projections.append(((names.head,), weights.head))
    norms = [(names.final_norm, weights.final_norm)]
    for i, block in enumerate(weights.blocks):
        assert isinstance(block.ffn, Ffn)  # the subject is dense
        of_block = (names.qkv, block.qkv), ((names.out,), block.out), (names.ffn_in, block.ffn.inputs)
        for paths, projection in (*of_block, ((names.ffn_out,), block.ffn.output)):
            projections.append((tuple(spec.path(i, path) for path in paths), projection))
        norms += [(spec.path(i, names.attn_norm), block.attn_norm), (spec.path(i, names.ffn_norm), block.ffn_norm)]
    for paths, projection in projections:
        prepared, first = projection.parts[0]
        cut = prepared.tensors[0].split(prepared.outputs[first])  # type: ignore[union-attr]
        state |= {f"{path}.weight": weight for path, weight in zip(paths, cut, strict=True)}
    return state | {f"{path}.weight": norm.weight.to(dtype) for path, norm in norms if norm}


def generate(model: Any, subject: Subject, cache: str) -> float:
    """Tokens per second after the first one, of transformers' greedy answer to the same prompt."""
    setting, times = subject.setting, list[float]()
    prompt = torch.tensor([subject.tokens[: setting.context]], device=setting.device)

    class Clock:
        """Notes when each token arrives; transformers puts the prompt first."""

        def put(self, tokens: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is held back."""

    options = {"max_new_tokens": setting.tokens + 1, "cache_implementation": cache, "streamer": Clock()}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    _wait(setting)
    return setting.tokens / (times[-1] - times[1])
