"""OpenAI's completions API: what a request may say, and how errors look. Nothing here knows of a server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from rankgate.errors import RankgateError
from rankgate.hub.opening import Opened
from rankgate.serving.answer import Sampling, chat_tokens

LEGACY_TOKENS = 16  # that OpenAI's /v1/completions generates unless told otherwise
MOST_STOPS = 32  # OpenAI takes 4; lm-evaluation-harness sends more
MOST_PROMPTS = 2048  # of one request, as with OpenAI
INT64 = 1 << 63
NEUTRAL: dict[str, tuple[Any, ...]] = {  # parameters that are not supported, and the values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "annotations": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "add_special_tokens": (True,),  # from here on extensions that clients of other servers send
    "early_stopping": (False,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
}
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _whole(value: Any) -> Any:
    """A number without a fraction may be written 16.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]


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
            and not (name in NEUTRAL and name not in cls.model_fields and value in NEUTRAL[name])
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
    max_tokens: Integer | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: Integer = Field(0, ge=-1)  # -1 and 0: all
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    seed: Integer | None = Field(None, ge=-INT64, lt=INT64)
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
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
            reason = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                only = f" (other than as {json.dumps(NEUTRAL[name][0])})" if name in NEUTRAL else ""
                reason = f"not supported{only}" if len(first["loc"]) == 1 else f"{first['loc'][-1]} is not supported"
            raise ApiError(400, f"{name or 'the body'}: {reason}", code="invalid_parameter", param=name) from None

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens to report with log-probabilities; None: report nothing."""
        raise NotImplementedError

    def prompts(self, opened: Opened) -> list[list[int]]:
        """Tokens of the prompts; at least one each. Raises ApiError."""
        raise NotImplementedError

    def limit(self, room: int) -> int:
        """New tokens, of `room` that there are."""
        raise NotImplementedError

    def sampling(self, prompt_tokens: int, context: int) -> Sampling:
        """After a prompt of so many tokens. Raises ApiError if it and the answer need more than `context`."""
        new = self.limit(context - prompt_tokens)
        if prompt_tokens + new > context:
            message = f"{prompt_tokens} tokens of prompt and {new} new ones exceed a context of {context}"
            param = "messages" if self.chat else "prompt"
            raise ApiError(400, message, code="context_length_exceeded", param=param)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Sampling(
            tokens=new,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=stop,
            top=self.top,
        )


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Integer | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Integer = Field(0, ge=0, le=20)

    chat = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs: true", code="invalid_parameter", param="top_logprobs")
        return self

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def prompts(self, opened: Opened) -> list[list[int]]:
        try:
            return [chat_tokens(opened.tokenizer, [message.model_dump() for message in self.messages])]
        except RankgateError as error:
            raise ApiError(400, str(error), code="invalid_messages", param="messages") from error

    def limit(self, room: int) -> int:
        return self.max_completion_tokens or self.max_tokens or max(room, 1)


class CompletionRequest(Request):
    """`prompt`: a text, token ids, or a list of either, which are answered one after another."""

    prompt: list[str | list[Integer]]
    max_tokens: Integer = Field(LEGACY_TOKENS, ge=0)
    logprobs: Integer | None = Field(None, ge=0, le=5)
    echo: bool = False
    add_special_tokens: bool = True

    chat = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        one = isinstance(value, str) or (isinstance(value, list) and bool(value) and _is_number(value[0]))
        several = [value] if one else value
        if not isinstance(several, list) or not 0 < len(several) <= MOST_PROMPTS:
            raise ValueError(f"give a text, token ids, or a list of 1 to {MOST_PROMPTS} of either")
        return several

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value is False else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: 0 needs echo: true", code="invalid_parameter", param="max_tokens")
        return self

    @property
    def top(self) -> int | None:
        return self.logprobs

    def prompts(self, opened: Opened) -> list[list[int]]:
        vocabulary = opened.model.config.get_text_config().vocab_size
        found = [self._ids(opened, prompt) for prompt in self.prompt]
        for ids in found:
            if not ids:
                raise ApiError(400, "prompt: it is empty", code="invalid_parameter", param="prompt")
            if min(ids) < 0 or max(ids) >= vocabulary:
                message = f"prompt: token ids are from 0 to {vocabulary - 1}"
                raise ApiError(400, message, code="invalid_parameter", param="prompt")
        return found

    def _ids(self, opened: Opened, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        ids: list[int] = opened.tokenizer(prompt, add_special_tokens=self.add_special_tokens).input_ids
        return ids

    def limit(self, room: int) -> int:
        return self.max_tokens

    def sampling(self, prompt_tokens: int, context: int) -> Sampling:
        return replace(super().sampling(prompt_tokens, context), echo=self.echo)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
