"""From a compact folder to a Service: its weights are loaded once, for whatever it can do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ... import families, sentence_layout
from ...compact import open_folder
from ...embedding import FILE, Pooling
from ..async_embedder import AsyncEmbedder
from ..async_engine import AsyncEngine
from ..embed import Embedder
from ..llm import LLM
from .limits import Limits
from .metrics import Metrics
from .service import Service


@dataclass(frozen=True)
class Wanted:
    """How a folder is loaded: the options of LLM, and `pooling`, with which a folder embeds that does not say how."""

    dtype: str | None = None
    device: str | None = None
    strict: bool = False
    int8_head: bool = False
    max_batch: int = 64
    chunk: int = 1024
    kv_cache_bytes: int | None = None
    prefix_caching: bool = True
    pooling: Pooling | None = None


def open_service(path: Path, name: str, limits: Limits, wanted: Wanted) -> Service:
    """Raises the FolderError of a folder that cannot be loaded, and BadParameter."""
    generates, embeds = abilities(path)
    llm = None
    if generates:
        llm = LLM(
            path,
            wanted.dtype,
            wanted.device,
            wanted.strict,
            int8_head=wanted.int8_head,
            max_batch=wanted.max_batch,
            chunk=wanted.chunk,
            kv_cache_bytes=wanted.kv_cache_bytes,
            prefix_caching=wanted.prefix_caching,
        )
    embedder = None
    if embeds or wanted.pooling is not None:
        decoder = None if llm is None else llm.model
        embedder = Embedder(path, wanted.dtype, wanted.device, wanted.strict, pooling=wanted.pooling, decoder=decoder)
    return service_of(llm, name, limits, embedder)


def abilities(path: Path) -> tuple[bool, bool]:
    """Whether a folder generates, and whether it says how it embeds.

    A head is what its architecture's name promises: an encoder's is that of a model without one, as LlamaModel.
    """
    with open_folder(path) as folder:
        architectures = folder.config.get("architectures") or [""]
        bare = architectures[0].endswith("Model") or (path / FILE).exists()
        causal = families.read(folder.config).causal
    return causal and not bare, sentence_layout.read(path) is not None or bare or not causal


def service_of(llm: LLM | None, name: str, limits: Limits, embedder: Embedder | None = None) -> Service:
    """A model that generates, embeds, or both, under its name."""
    metrics = Metrics()
    service = Service(name, metrics, limits)
    if embedder is not None:
        service.embedder = AsyncEmbedder(embedder, 2 * limits.texts, metrics.encoded)
        metrics.show_embedder(service.embedder)
        service.decoder = embedder.model
    if llm is not None:
        service.generator = AsyncEngine(llm, limits.waiting, metrics.step)
        metrics.show_engine(service.generator)
        service.decoder = llm.model
    if service.decoder is not None:
        metrics.show_weights(service.decoder)
    metrics.show_ffns(service.parts)
    return service
