"""What requests may say. Unknown keys are refused, and so is what OpenAI's API has and this server doesn't do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["ChatRequest", "CompletionRequest", "GenerationRequest", "Message"]

#: Keys of OpenAI's API that are taken at the values that mean "off", and refused otherwise.
OFF: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
}
#: Keys that say nothing about the text.
IGNORED = ("user", "store", "metadata", "service_tier")

Count = Annotated[int, Field(ge=1, le=1 << 31, strict=True)]
#: Wrong values are told of one by one: a long list of them must not become a long list of errors.
Ids = Annotated[list[Annotated[int, Field(strict=True)]], Field(fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """`include_usage`: a last chunk with token counts."""

    include_usage: bool = False


class Message(_Strict):
    """One turn of a conversation; `content` is text, or parts of text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[dict[str, str]], Field(fail_fast=True, max_length=1024)]

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.get("text", "") for part in self.content)

    @model_validator(mode="after")
    def _only_text(self) -> Message:
        if not isinstance(self.content, str):
            for part in self.content:
                if part.get("type") != "text" or "text" not in part:
                    raise ValueError(
                        "content parts must be {'type': 'text', 'text': ...}: this server reads text alone"
                    )
        return self


class GenerationRequest(_Strict):
    """What completions and chats share.

    `top_k`, `min_p`, `repetition_penalty`, `session` and `return_context` are this server's own.
    """

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31, strict=True)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63, strict=True)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=128, strict=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    session: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    return_context: bool = False

    best_of: Any = None
    echo: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    suffix: Any = None
    tools: Any = None
    tool_choice: Any = None
    response_format: Any = None
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None

    @model_validator(mode="after")
    def _supported(self) -> GenerationRequest:
        for name, values in OFF.items():
            value = getattr(self, name)
            if not any(type(value) is type(off) and value == off for off in values):  # 0 is not False here
                raise ValueError(f"{name} is not supported: leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.return_context and not self.stream:
            raise ValueError("return_context needs stream=true")
        if self.session is not None and self.number_of_choices > 1:
            raise ValueError("a session takes one completion at a time: leave n out")
        stops = self.stop_strings
        if len(stops) > 16 or any(not stop or len(stop) > 256 for stop in stops):
            raise ValueError("stop must be at most 16 strings of 1 to 256 characters")
        return self

    @property
    def number_of_choices(self) -> int:
        """Completions of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Where the text ends."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(GenerationRequest):
    """Text to go on with: one or several prompts, as text or as token ids."""

    prompt: str | Annotated[list[str], Field(fail_fast=True)] | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    max_tokens: Count | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class ChatRequest(GenerationRequest):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one")
        return self
