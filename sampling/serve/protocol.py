"""OpenAI's protocol as far as this server speaks it: what a request may say, checked by pydantic.

Every field that is here does something; every other one is refused by its name. None counts as left out.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json
from starlette.exceptions import HTTPException

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
    "guided_json": "use response_format", "guided_regex": "use response_format",
}  # fmt: skip
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer in OpenAI's shape of errors."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def expect(good: object, message: str, param: str | None = None, code: str | None = None) -> None:
    """Refuse a request unless `good`; `param`: what of it is wrong."""
    if not good:
        raise ApiError(400, message, param=param, code=code)


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


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


class Common(Part):
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
    def streamed_alike(self) -> "Common":
        for name, given in (("stream_options", self.stream_options), ("hybrid.drafts", self.hybrid.drafts)):
            expect(self.stream or not given, f"{name} goes with stream=true.", name, "invalid")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def format(self) -> Format | None:
        """What the texts have to keep to."""
        return None if self.response_format is None or self.response_format.type == "text" else self.response_format


class Completion(Common):
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

    @model_validator(mode="after")
    def goes_together(self) -> "Completion":
        mode = self.hybrid.mode
        expect(
            self.suffix is None or mode in (None, "infill"),
            f"suffix: what stands between is filled, and hybrid.mode is {mode!r}: leave one out.", "suffix",
        )  # fmt: skip
        whole = "stream: the prompt's log-probabilities come in one piece: leave stream out."
        expect(not (self.scored and self.stream), whole, "stream")
        if not self.fills:
            nothing = "max_tokens is 0: that goes with echo and logprobs, to score."
            expect(self.max_tokens != 0 or self.scored, nothing, "max_tokens")
            return self
        senseless = {
            "stop": self.stops, "echo": self.echo, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "response_format": self.format,
            "max_tokens": self.suffix is None and self.max_tokens is not None,
        }  # fmt: skip
        for name, given in senseless.items():
            expect(not given, f"{name}: gaps are filled in any order and have their length: leave it out.", name)
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given

    @property
    def fills(self) -> bool:
        """Whether gaps are filled."""
        return self.suffix is not None or self.hybrid.mode == "infill"

    @property
    def scored(self) -> bool:
        """Whether tokens of the prompt have log-probabilities, too."""
        return self.echo and self.logprobs is not None


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


class Chat(Common):
    """`POST /v1/chat/completions`."""

    suffix: ClassVar[None] = None
    fills: ClassVar[bool] = False
    scored: ClassVar[bool] = False

    messages: Annotated[list[Message], Field(min_length=1, max_length=MANY, fail_fast=True)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def goes_together(self) -> "Chat":
        log = "top_logprobs goes with logprobs=true."
        expect(self.top_logprobs is None or self.logprobs, log, "top_logprobs", "invalid")
        twice = "max_tokens and max_completion_tokens say the same: give one of them."
        expect(None in (self.max_tokens, self.max_completion_tokens), twice, "max_tokens", "invalid")
        expect(self.hybrid.mode != "infill", "hybrid.mode: gaps are filled by /v1/completions.", "hybrid.mode")
        return self


Asked = Completion | Chat


def read(kind: type[Asked], body: bytes) -> Asked:
    """What a request says.

    Raises:
        ApiError: it is no JSON, or says what is not understood here.
    """
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is no JSON: {error}.") from None
    expect(isinstance(given, dict), f"The body is a JSON {type(given).__name__}; send an object.")
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
    if len(path) > 1 and path[-1] in ("str", "int", "float"):
        path.pop()
    name = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        field = str(first["loc"][-1])
        why = NOT_HERE.get(field, "it stands under hybrid" if field in Own.model_fields and name == field else None)
        return ApiError(400, f"{name} is not supported{f': {why}' if why else ''}.", param=name, code="unsupported")
    said = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{name}: {said}." if name else f"{said}.", param=name, code="invalid")
