"""OpenAI's completions API: what a request may say, how errors and answers look. Nothing here knows of a server."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from rankgate.errors import RankgateError
from rankgate.serving.answer import Sampling, chat_tokens

LEGACY_TOKENS = 16  # that OpenAI's /v1/completions generates unless told otherwise
INT64 = 1 << 63
NEUTRAL: dict[str, Any] = {  # parameters that are not supported, and the one value that asks for nothing
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_calls": [],
    "tool_choice": "none",
    "annotations": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "suffix": "",
    "top_k": -1,  # from here on extensions that clients of other servers send
    "min_p": 0,
    "repetition_penalty": 1,
}
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class ApiError(Exception):
    """An answer other than 200. `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_what_matters(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None
            and name not in WITHOUT_EFFECT
            and not (name in NEUTRAL and name not in cls.model_fields and value == NEUTRAL[name])
        }


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers: there is none


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("role", mode="before")
    @classmethod
    def _former_name(cls, value: Any) -> Any:
        return "system" if value == "developer" else value

    @field_validator("content", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
        texts = [text for part in parts if isinstance(text := part.get("text"), str)]
        if len(texts) != len(value):
            raise ValueError("only parts of type text are supported")
        return "\n".join(texts)


class Request(_Strict):
    """What both endpoints take. An unknown parameter, or one with an effect that is not supported, is an error."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    chat: ClassVar[bool]

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises ApiError that names the parameter."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            if first["type"] == "json_invalid":
                raise ApiError(400, f"the body is not JSON: {first['msg']}", code="invalid_json") from None
            name = str(first["loc"][0]) if first["loc"] else None
            reason = first["msg"]
            if first["type"] == "extra_forbidden":
                only = f" (other than as {json.dumps(NEUTRAL[name])})" if name in NEUTRAL else ""
                reason = f"not supported{only}" if len(first["loc"]) == 1 else f"{first['loc'][-1]} is not supported"
            raise ApiError(400, f"{name or 'the body'}: {reason}", code="invalid_parameter", param=name) from None

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Of the prompt; at least one. Raises ApiError."""
        raise NotImplementedError

    def limit(self, room: int) -> int:
        """New tokens, of `room` that there are."""
        raise NotImplementedError

    def sampling(self, prompt_tokens: int, context: int) -> Sampling:
        """Raises ApiError if prompt and answer need more than `context` tokens."""
        new = self.limit(context - prompt_tokens)
        if new < 1 or prompt_tokens + new > context:
            message = f"{prompt_tokens} tokens of prompt and {max(new, 1)} new ones exceed a context of {context}"
            param = "messages" if self.chat else "prompt"
            raise ApiError(400, message, code="context_length_exceeded", param=param)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Sampling(new, self.temperature, self.top_p, self.seed, stop)


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    chat = True

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        try:
            return chat_tokens(tokenizer, [message.model_dump() for message in self.messages])
        except RankgateError as error:
            raise ApiError(400, str(error), code="invalid_messages", param="messages") from error

    def limit(self, room: int) -> int:
        return self.max_completion_tokens or self.max_tokens or room


class CompletionRequest(Request):
    prompt: str

    chat = False

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        ids: list[int] = tokenizer(self.prompt).input_ids
        if not ids:
            raise ApiError(400, "prompt: it is empty", code="invalid_parameter", param="prompt")
        return ids

    def limit(self, room: int) -> int:
        return self.max_tokens or LEGACY_TOKENS


@dataclass(frozen=True)
class Reply:
    """The JSON of one answer, whole or in chunks."""

    model: str
    chat: bool
    prompt_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, tokens: int) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {**self._frame([self._choice(said, reason)]), "usage": self._usage(tokens)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text} if self.chat else {"text": text})

    def closing(self, reason: str, tokens: int, *, usage: bool) -> list[dict[str, Any]]:
        """Chunks after the last text."""
        last = self._chunk({} if self.chat else {"text": ""}, reason)
        return [last, {**self._frame([], chunk=True), "usage": self._usage(tokens)}] if usage else [last]

    def _chunk(self, said: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return self._frame([self._choice({"delta": said} if self.chat else said, reason)], chunk=True)

    def _frame(self, choices: list[dict[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if chunk else ''}" if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    @staticmethod
    def _choice(said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def _usage(self, tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}
