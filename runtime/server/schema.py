"""What clients may send, field by field and bounded. A field that is not here is refused by its name.

Names and meanings are OpenAI's; beyond them vLLM's, as its clients send them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..params import MAX_CHOICES, MAX_LOGPROBS, MAX_STOP_STRINGS, REPETITION

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Name = Annotated[str, Field(max_length=256)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
MAX_SEED = 2**63 - 1 - MAX_CHOICES


class Body(BaseModel):
    """Nothing is converted and nothing is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    name: Name
    schema_: dict[str, Any] = Field(alias="schema")
    description: Annotated[str, Field(max_length=4096)] | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's way to guide an answer: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Annotated[str, Field(max_length=2**16)] | None = None
    choice: Annotated[list[StopString], Field(min_length=1, max_length=1024)] | None = None
    grammar: Annotated[str, Field(max_length=2**16)] | None = None


class Sampled(Body):
    """What completions and chats have in common. None: the model's own default."""

    model: Name | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Count | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=REPETITION[0], le=REPETITION[1])
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = None
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(None, ge=1, lt=2**31, description="Keep so many, the last ones.")
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1)]
    max_tokens: Count | None = 16
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Conversation(Body):
    """Messages and how the chat template turns them into a prompt."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None


class ChatRequest(Sampled, Conversation):
    """POST /v1/chat/completions."""

    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class EmbeddingRequest(Body):
    """POST /v1/embeddings. normalize, prompt_name and truncate are ours: what the folder does is the default."""

    model: Name | None = None
    input: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, lt=2**20)
    user: Name | None = None
    normalize: bool = False
    prompt_name: Name | None = None
    truncate: bool = False


class TokenizeText(Body):
    """POST /tokenize for a text."""

    model: Name | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Conversation):
    """POST /tokenize for a conversation."""

    model: Name | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: list[TokenId]
