"""What requests may say. Unknown keys are refused, and so is what OpenAI's API has and this server doesn't do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

__all__ = ["ChatRequest", "CompletionRequest", "GenerationRequest", "Message"]

#: Keys of OpenAI's API, and of servers like this, that are taken at the values that mean "off", and refused otherwise.
#: Null is "off" for every key.
OFF: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # of no tools none is chosen
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}
#: Keys that say nothing about the text; `parallel_tool_calls` is about tools, and there are none.
IGNORED = (
    "store",
    "metadata",
    "service_tier",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
)
Count = Annotated[int, Field(ge=1, le=1 << 31, strict=True)]
#: Wrong values are told of one by one: a long list of them must not become a long list of errors.
Ids = Annotated[list[Annotated[int, Field(strict=True)]], Field(fail_fast=True)]


def _given(values: Any) -> Any:
    """An object without its nulls, which mean that nothing is given."""
    return {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return _given(values)


class StreamOptions(_Strict):
    """`include_usage`: token counts in a last chunk. Padding against listeners (`include_obfuscation`) isn't made."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Message(BaseModel):
    """One turn of a conversation; `content` is text, or parts of text. Further keys are the chat template's."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=1024)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return _given(values)

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part[part["type"]] for part in self.content)
        return self.content or ""

    @model_validator(mode="after")
    def _only_text(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        for part in self.content if isinstance(self.content, list) else ():
            kind = part.get("type")
            if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
                raise ValueError("content parts must be {'type': 'text', 'text': ...}: this server reads text alone")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {**(self.model_extra or {}), "role": self.role, "content": self.text}


#: What else is taken: each of `OFF` and `IGNORED` is a key, whatever its value.
_Keys: Any = create_model("_Keys", __base__=_Strict, **dict.fromkeys((*OFF, *IGNORED), (Any, None)))  # type: ignore[call-overload]


class TextPart(_Strict):
    """A part of a content."""

    type: Literal["text"]
    text: str


class Prediction(_Strict):
    """Text that the answer is expected to repeat: it may come sooner then, and is the same."""

    type: Literal["content"] = "content"
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024)]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class GenerationRequest(_Keys):
    """What completions and chats share.

    `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `ignore_eos`, `session` and `return_context` aren't
    OpenAI's.
    """

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31, strict=True)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63, strict=True)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(max_length=128)] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=128, strict=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    session: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    return_context: bool = False
    prediction: Prediction | None = None

    best_of: Any = None
    user: Any = None

    @model_validator(mode="after")
    def _supported(self) -> GenerationRequest:
        for name, values in OFF.items():
            value = getattr(self, name)
            if value is not None and not any(
                type(value) is type(off) and value == off for off in values
            ):  # 0 is not False here
                raise ValueError(f"{name} is not supported: leave it out")
        if self.best_of is not None and (type(self.best_of) is not int or self.best_of != self.number_of_choices):
            raise ValueError("best_of is not supported: leave it out")
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
