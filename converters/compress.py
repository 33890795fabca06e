"""Methods on a source, one after the other, in memory: search or resume, apply, and give a source again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import families
from ..errors import BadParameter
from .calibration import Calibration, tokenizer_of
from .modelling import as_source, instantiate
from .recipe import Step
from .record import Record
from .routed import routed
from .sources.source import Source


def compress(
    source: Source, steps: Sequence[Step], text: str, name: str, work: Callable[[str], Path], progress: bool
) -> tuple[Source, torch.dtype, list[dict[str, Any]]]:
    """The compressed model as a source, the dtype that the checkpoint has, and what provenance says of each step.

    text, name: of the calibration file, where a step reads one. work(step): a folder that outlives an interrupted run.
    Computes in fp32.
    """
    if source.units is not None:
        raise BadParameter(f"{source.path} is compressed already; give the dense checkpoint, or leave --method out")
    tokens = any(step.reads != "nothing" for step in steps)
    calibration = Calibration(tokenizer_of(source), text, name) if tokens else None
    read = calibration and {"name": name, "sha256": calibration.sha256}
    model = instantiate(source, torch.float32)
    done = []
    for i, step in enumerate(steps):
        if routed(model):
            raise BadParameter(f"{step.method.NAME} does not know routed FFNs; give --method lte as the last one")
        record = Record(work(f"{i}-{step.method.NAME}"))
        step.method.search(model, calibration, record, step.params, progress)
        step.method.apply(model, record)
        done.append(
            {
                "name": step.method.NAME,
                "params": asdict(step.params),
                "calibration": read if step.reads == "text" else None,
                "result": step.method.summary(record),
            }
        )
    return as_source(model, source), _stored_dtype(source), done


def _stored_dtype(source: Source) -> torch.dtype:
    """Of the embedding, which stands for the checkpoint."""
    spec = families.read(source.config)
    embed = f"{spec.names.embed}.weight"
    return next(tensor.dtype for _, tensor in source.tensors(lambda name: spec.canonical(name) != embed))
