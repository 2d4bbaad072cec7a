"""OpenAI's protocol as far as this server speaks it: what a request may say, checked by pydantic.

Every field that is here does something; every other one is refused by its name. None counts as left out.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

WHOLE = 2**31
Whole = Annotated[int, Field(ge=0, le=WHOLE)]
Count = Annotated[int, Field(ge=1, le=WHOLE)]
# A list that is wrong throughout is no list of complaints.
Ids = Annotated[list[Whole], Field(min_length=1, max_length=200_000, fail_fast=True)]
MANY = 4096  # prompts, or messages

# What OpenAI's servers have and this one does not, and what to do instead.
NOT_HERE = {
    "best_of": "ask for n texts with logprobs, and choose",
    "functions": "this server calls no tools", "function_call": "this server calls no tools",
    "tools": "this server calls no tools", "tool_choice": "this server calls no tools",
    "parallel_tool_calls": "this server calls no tools", "audio": "models here read and write text",
    "modalities": "models here read and write text", "prediction": "mode 'speculative' drafts by itself",
    "reasoning_effort": "models here have one effort", "verbosity": "models here have one",
    "store": "nothing is stored", "metadata": "nothing is stored", "service_tier": "there is one",
    "web_search_options": "nothing is searched", "safety_identifier": "use user", "prompt_cache_key": "use user",
    "top_k": "it stands under hybrid", "min_p": "it stands under hybrid", "mode": "it stands under hybrid",
    "repetition_penalty": "it stands under hybrid", "guided_json": "use response_format",
    "guided_regex": "use response_format",
}  # fmt: skip


class ApiError(Exception):
    """An answer in OpenAI's shape of errors."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Own(Part):
    """The field `hybrid` of a request: options of `generate` that OpenAI's protocol has no word for, and what comes
    over the wire."""

    mode: Literal["ar", "block", "diffusion", "speculative", "infill"] | None = None
    block_size: Count | None = None
    sub_block_size: Count | None = None
    blocks_in_flight: Count | None = None
    block_add_threshold: float | None = None
    fused: bool | None = None
    drafts_per_round: Count | None = None
    reveal: str | None = Field(default=None, max_length=64)
    confidence_threshold: float | None = None
    confidence_factor: float | None = None
    entropy_bound: float | None = None
    steps_per_block: Annotated[int, Field(ge=1, le=2048)] | None = None  # rules plan them one by one
    noise_schedule: str | None = Field(default=None, max_length=64)
    remask: str | None = Field(default=None, max_length=64)
    remask_strength: float | None = None
    dream_eps: float | None = None
    dream_alg: str | None = Field(default=None, max_length=64)
    cache: Literal["prefix", "dual"] | None = None
    guidance_scale: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    no_repeat_ngram_size: Whole | None = None
    min_new_tokens: Whole | None = None
    drafts: bool = False
    return_token_ids: bool = False

    def options(self) -> dict[str, Any]:
        """Those of `generate`."""
        return self.model_dump(exclude_none=True, exclude={"drafts", "return_token_ids"})


class JsonSchema(Part):
    name: str | None = Field(default=None, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Literal[True] | None = None  # a schema is always kept to


class Format(Part):
    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = Field(default=None, min_length=1, max_length=4096)

    @model_validator(mode="after")
    def whole(self) -> "Format":
        for name in ("json_schema", "regex"):
            if (getattr(self, name) is not None) != (self.type == name):
                raise ValueError(f"{name} stands beside the type of that name, and nowhere else")
        return self


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Asked(Part):
    """What both ways to ask share."""

    model: str = Field(max_length=512)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Count = 1
    stop: str | Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    max_tokens: Whole | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    response_format: Format | None = None
    user: str | None = Field(default=None, max_length=256)
    hybrid: Own = Own()

    @model_validator(mode="after")
    def asked_alike(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        if self.hybrid.drafts and not self.stream:
            raise ValueError("hybrid.drafts goes with stream=true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Asked):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(max_length=MANY, fail_fast=True)]
        | Annotated[list[Ids], Field(max_length=MANY, fail_fast=True)]
        | Ids
    )
    suffix: str | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TextPart(Part):
    type: Literal["text"]
    text: str


class Message(Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def plain(self) -> dict[str, str]:
        """As a template reads it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MANY, fail_fast=True)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def chat_asked_alike(self) -> "Chat":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens say the same: give one of them")
        return self


T = TypeVar("T", bound=Asked)


def read(kind: type[T], body: bytes) -> T:
    """What a request says.

    Raises:
        ApiError: it is no JSON, or says what is not understood here.
    """
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is no JSON: {error}.") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"The body is a JSON {type(given).__name__}; send an object.")
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None


def _refusal(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a field that may be several things, the complaint that got furthest into it.
    plain = ("extra_forbidden", "too_long")
    first = next((e for e in found if e["type"] in plain), max(found, key=lambda e: len(e["loc"])))
    path = [str(x) for x in first["loc"] if not str(x).startswith(("list[", "constrained", "function-"))]
    if path and len(path) > 1 and path[-1] in ("str", "int", "float"):
        path.pop()
    name = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        why = NOT_HERE.get(str(first["loc"][-1]))
        return ApiError(400, f"{name} is not supported{f': {why}' if why else ''}.", param=name, code="unsupported")
    said = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{name}: {said}." if name else f"{said}.", param=name, code="invalid")
