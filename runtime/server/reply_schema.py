"""What clients get, field by field: the OpenAPI document shows it, and tests hold every answer against it.

Answers are built as plain dictionaries (replies.py, about.py, embed.py), as an answer's many small events need not be
checked twice. Names and meanings are OpenAI's; beyond them vLLM's.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class Reply(BaseModel):
    """Nothing is converted, and nothing is there that the document does not name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CachedTokens(Reply):
    cached_tokens: int


class Usage(Reply):
    """Tokens of prompts, each counted once however many answers it gets, and of answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Choice(Reply):
    """What every answer and every piece of one has. token_ids, prompt_token_ids: where return_token_ids asks."""

    index: int
    finish_reason: FinishReason | None
    stop_reason: int | str | None = Field(description="The stop string or token that ended it; null: end of text.")
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Framed(Reply):
    """What all replies to one request have in common."""

    id: str
    created: int
    model: str


# --- completions -----------------------------------------------------------------------------------


class CompletionLogprobs(Reply):
    """Lists of one length; the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None


class Completion(Framed):
    """The answer of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Framed):
    """One event of a streamed completion. usage: of the last event, which has no choice, where it was asked for."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


# --- chats -----------------------------------------------------------------------------------------


class ChatToken(Reply):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(Reply):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatMessage(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatCompletion(Framed):
    """The answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Framed):
    """One event of a streamed chat. usage: of the last event, which has no choice, where it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


# --- vectors ---------------------------------------------------------------------------------------


class EmbeddingItem(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian fp32.")


class EmbeddingUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Reply):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


# --- about the server ------------------------------------------------------------------------------

Ability = Literal["generator", "embedder"]


class Model(Reply):
    """max_model_len: tokens that a prompt and its answer, or a text to embed, may have."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    does: list[Ability]


class ModelList(Reply):
    object: Literal["list"]
    data: list[Model]


class Health(Reply):
    status: Literal["ok"]


class Readiness(Reply):
    status: Literal["ready"]


class Kernel(Reply):
    """What an op runs as here, and why."""

    op: str
    path: str
    why: str


class Version(Reply):
    """formats: name of a stored format -> its version."""

    version: str
    torch: str
    formats: dict[str, int]
    kernels: list[Kernel] | None = None


class Stored(Reply):
    """All matrices of one kind and one format; bytes as they are stored, and as dense ones of the same dtype."""

    kind: str
    format: str
    form: str
    count: int
    groups: int
    ranks: dict[str, int]
    shapes: dict[str, int]
    weights: dict[str, int]
    compact_bytes: int
    dense_bytes: int


class Sleep(Reply):
    """What a token leaves out of routed FFNs, by the text of the conversion: share of groups by layer, and bytes."""

    text: str
    layers: dict[str, float]
    saved_bytes: int


class FolderInfo(Reply):
    """What `pared inspect` shows. provenance: source, methods and what was measured. sleep: where FFNs are routed."""

    stock: bool
    disk_bytes: int
    kinds: list[Stored]
    total: Stored
    provenance: dict[str, Any]
    sleep: Sleep | None


class ServerInfo(Reply):
    """The answer of GET /info. What concerns generating is there where the server does it."""

    model: str
    version: str
    does: list[Ability]
    context: int | None = None
    chat: bool | None = None
    device: str | None = None
    dtype: str | None = None
    family: str | None
    folder: FolderInfo | None


# --- the tokenizer ---------------------------------------------------------------------------------


class TokenList(Reply):
    """token_strs: where return_token_strs asks."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Reply):
    prompt: str


class TokenizerInfo(Reply):
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    vocab_size: int
    max_model_len: int
    chat_template: str | dict[str, str] | None
