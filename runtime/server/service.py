"""What the endpoints of one server share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .limits import Limits
from .refusals import Refused

if TYPE_CHECKING:
    from ..async_embedder import AsyncEmbedder
    from ..async_engine import AsyncEngine
    from ..llm import LLM
    from ..model import Decoder
    from ..text import Tokenizer
    from .metrics import Metrics
    from .tracing import Spans


@dataclass
class Service:
    """A model under its name: an engine that generates, an encoder that embeds, or both.

    decoder: the model itself, for what is told of it. spans: where requests are traced, if anywhere. ready: warmed up,
    and not about to end. folder: what `pared inspect` knows of the model's folder, for the page.
    """

    name: str
    metrics: Metrics
    limits: Limits = field(default_factory=Limits)
    generator: AsyncEngine | None = None
    embedder: AsyncEmbedder | None = None
    decoder: Decoder | None = None
    spans: Spans | None = None
    ready: bool = False
    folder: dict[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> AsyncEngine:
        """The engine; Refused where this server does not generate."""
        if self.generator is None:
            raise Refused(404, f"{self.name} embeds texts; it generates none", "model_not_found", "model")
        return self.generator

    @property
    def encoder(self) -> AsyncEmbedder:
        """The encoder; Refused where this server does not embed."""
        if self.embedder is None:
            raise Refused(404, f"{self.name} generates texts; it embeds none", "model_not_found", "model")
        return self.embedder

    @property
    def llm(self) -> LLM:
        return self.engine.llm

    @property
    def parts(self) -> list[AsyncEngine | AsyncEmbedder]:
        """What runs: the engine, the encoder, or both."""
        return [part for part in (self.generator, self.embedder) if part is not None]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, to be used through `beside` of the first part."""
        return self.llm.tokenizer if self.generator is not None else self.encoder.encoder.tokenizer

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer, or a text to embed, may have."""
        return self.llm.context if self.generator is not None else self.encoder.encoder.max_length

    def check_model(self, name: str | None) -> None:
        """Raises Refused for a model that is not served here; None is the one that is."""
        if name not in (None, self.name):
            raise Refused(404, f"the model {name} is not served here, {self.name} is", "model_not_found", "model")
