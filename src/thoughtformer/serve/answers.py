"""What came of requests, in the shapes of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from thoughtformer.engine import Completion
from thoughtformer.sampling import FinishReason

__all__ = ["Shape", "finish_reason", "sse", "usage"]

#: OpenAI knows two ways to end.
REASONS: dict[FinishReason, str] = {
    "end_of_text": "stop",
    "stop_string": "stop",
    "stop_token": "stop",
    "length": "length",
}


def finish_reason(reason: FinishReason | None) -> str | None:
    """OpenAI's word for it."""
    return None if reason is None else REASONS[reason]


def usage(completions: Sequence[Completion], choices: int) -> dict[str, Any]:
    """Token counts of a request; a prompt counts once, however many completions it has."""
    used = [completion.usage for completion in completions]
    prompts = used[::choices]
    prompt_tokens = sum(one.prompt_tokens for one in prompts)
    new_tokens = sum(one.new_tokens for one in used)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(one.cached_prompt_tokens for one in prompts),
            "sentence_ends": sum(one.prompt_sentence_ends for one in prompts),
        },
        "completion_tokens_details": {
            "sentence_ends": sum(one.new_sentence_ends for one in used),
            "accepted_prediction_tokens": sum(one.accepted_draft_tokens for one in used),
            "rejected_prediction_tokens": sum(one.drafted_tokens - one.accepted_draft_tokens for one in used),
        },
    }


class Shape:
    """Completions or chats: the same facts under other keys."""

    def __init__(self, *, identity: str, created: int, model: str, is_chat: bool, counts: bool = False) -> None:
        self.is_chat = is_chat
        # Where counts come last, the chunks before say that they have none.
        self._uncounted: dict[str, Any] = {"usage": None} if counts else {}
        self._head = {"id": identity, "created": created, "model": model}

    def whole(self, completions: Sequence[Completion], choices: int) -> dict[str, Any]:
        """A response at once."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": [
                self._choice(index, completion.text, finish_reason(completion.finish_reason), is_whole=True)
                for index, completion in enumerate(completions)
            ],
            "usage": usage(completions, choices),
        }

    def chunk(self, index: int, text: str, reason: str | None, **more: Any) -> dict[str, Any]:
        """A piece of one choice."""
        return self._chunk([self._choice(index, text, reason, is_whole=False)]) | more

    def first(self, index: int) -> dict[str, Any]:
        """Who speaks, of a chat."""
        role = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": role, "logprobs": None, "finish_reason": None}])

    def last(self, counts: dict[str, Any]) -> dict[str, Any]:
        """Token counts, after all choices."""
        return self._chunk([]) | {"usage": counts}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **self._uncounted}

    def _choice(self, index: int, text: str, reason: str | None, *, is_whole: bool) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.is_chat and is_whole:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        elif self.is_chat:
            content = {"delta": {"content": text} if text else {}}
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def sse(content: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n".encode("utf-8", "replace")
