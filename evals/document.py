"""The results document: what was measured, quality against speed. These classes are its schema.

Shares are 0…1, times in seconds. A part is checked as it is made or read; fields that are not named here are kept and
ignored, and a field that was not given is not written. Everything but `TIMES` and `TIMINGS` is the same for the same
model, prompts, settings and seed.
"""

import json
import re
from typing import Annotated, Any, Literal
from warnings import warn

from docstring_parser import parse
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

SCHEMA = "hybrid-frontier/1"

# What belongs to a machine and an hour: of the document, and of a row.
TIMES = ("created", "environment")
TIMINGS = ("tokens_per_second", "time_to_first_token", "speedup", "throughput", "timing")

# Everything a reader would take for a speed. None of them may stand in a row that has no quality.
SPEEDS = (
    "tokens_per_forward", "tokens_per_draft", "tokens_per_second", "time_to_first_token", "acceptance", "timing",
    "speedup", "throughput",
)  # fmt: skip

OLD_WAY = "{0}[{1!r}] is {0}.{1} now; the old way goes with the next version."


def _lists(value: Any) -> Any:
    """Tuples as lists, which is how JSON has them."""
    if isinstance(value, list | tuple):
        return [_lists(entry) for entry in value]
    return {key: _lists(entry) for key, entry in value.items()} if isinstance(value, dict) else value


Number = Annotated[int | float, WithJsonSchema({"type": "number"})]  # a whole number stays one, and true is none
Json = Annotated[JsonValue, BeforeValidator(_lists)]
Object = dict[str, Json]


class Part(BaseModel):
    """A part of the document, which never changes: `model_copy(update=...)` makes another."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)
    __pydantic_extra__: Object = Field(init=False)

    def plain(self) -> dict[str, Any]:
        """As what JSON can hold: the fields that were given."""
        return self.model_dump(exclude_unset=True)

    def __getitem__(self, name: str) -> Any:
        """As when parts were dictionaries, and so is `get`: for one version more."""
        warn(OLD_WAY.format(type(self).__name__, name), DeprecationWarning, 2)
        if not hasattr(self, name):
            raise KeyError(name)
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        warn(OLD_WAY.format(type(self).__name__, name), DeprecationWarning, 2)
        return getattr(self, name, default)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With what the docstring says of each field."""
        found = handler.resolve_ref_schema(handler(core))
        about = parse(cls.__doc__ or "")
        found["description"] = about.short_description
        for field in about.params:
            found["properties"][field.arg_name]["description"] = field.description
        return found


class Quality(Part):
    """What a figure measures.

    Attributes:
        unit: `share` for 0…1, else what it is counted in.
        judge: the model that graded.
    """

    name: str
    unit: str
    higher_is_better: bool
    description: str | None = None
    aggregate: Literal["mean", "perplexity"] = "mean"
    """Over prompts: the weighted mean of `per_prompt.quality`, or its exponential."""
    judge: str | None = None


class Prompts(Part):
    """What was asked.

    Attributes:
        sha256: of their tokens and targets: only results of the same prompts compare.
    """

    count: int
    sha256: str
    source: str | None = None
    max_new_tokens: int | None = None
    seed: int | None = None


class Spread(Part):
    """Of the timed passes."""

    median: Number
    low: Number
    high: Number


class Call(Part):
    """A single call.

    Attributes:
        batch_size: prompts in one call, the first ones; small calls are a few, one after the other.
        same_tokens: share of tokens equal to those that were graded.
    """

    batch_size: int
    seconds: Spread | None
    tokens_per_second: Spread | None = None
    time_to_first_token: Spread | None = None
    same_tokens: Number = 1


class Timing(Part):
    """How the speeds of a row were timed.

    Attributes:
        repeats: timed passes, after one that was not.
        peak_memory_bytes: of tensors on a GPU; on a CPU of the whole process.
        same_outputs: share of the timed passes whose tokens are all those that were graded.
    """

    repeats: int | None = None
    tokens_per_second: Spread | None = None
    time_to_first_token: Spread | None = None
    peak_memory_bytes: int | None = None
    same_outputs: Number = 1
    latency: list[Call] = []


class PerPrompt(Part):
    """Lists in the order of the prompts, for paired comparisons.

    Attributes:
        quality: the grade of each output; null where there was nothing to grade.
        weight: of each grade; 1 where the list is missing.
        new_tokens: without those that prefill gave; missing where no speed was measured.
        forwards: draft and settle forwards in which the row was active.
    """

    quality: list[Number | None]
    weight: list[Number] | None = None
    new_tokens: list[int] | None = None
    forwards: list[int] | None = None

    @model_validator(mode="after")
    def _of_one_length(self) -> "PerPrompt":
        if len({len(values) for values in dict(self).values() if isinstance(values, list)}) > 1:
            raise ValueError("has lists of unequal length; measure again")
        return self


class Histograms(Part):
    """How often each number was counted.

    Attributes:
        tokens_per_step: final tokens that a forward revealed to a row -> how many did. Their mean is
            tokens_per_forward.
        acceptance: tokens gained in a speculative round -> how many rounds.
    """

    tokens_per_step: dict[str, int] = {}
    acceptance: dict[str, int] = {}


class Figure(Part):
    """A further measure of the same outputs."""

    value: Number | None = None
    standard_error: Number | None = None


class Row(Part):
    """One way of decoding. No row has a speed without a quality of the same outputs.

    Attributes:
        setting: its name, unique within the act.
        settings: options of `generate`, and the batch size.
        also: further measures by name.
        exact: share of outputs that equal the target.
        distinct_2: different token pairs over all pairs, mean over outputs.
        repetition_4: share of 4-grams that stood before in the same output, mean.
        entropy: of the tokens of an output, in nats, mean.
        ar_nats_per_token: exact -log p of the outputs by the model itself, left to right; null where it has no
            such law.
        agreement: share of tokens equal to those of greedy ar.
        lossless: whether the mode promises the law of ar.
        tokens_per_forward: new tokens that prefill did not give, over the draft and settle forwards in which
            their row was active.
        tokens_per_forward_standard_error: over prompts.
        tokens_per_draft: the same over draft forwards alone.
        acceptance: mean tokens gained in a speculative round.
        forwards: batched forwards: prefill, settle, draft.
        tokens_per_second: median of the timed passes; all rows of a batch together.
        time_to_first_token: median over batches and passes.
        speedup: times as fast as ar, one prompt a call: median of the turns; null without ar.
        throughput: times as fast as ar, in batches: median of the timed passes.
    """

    mode: str
    setting: str
    settings: Object | None = None
    quality: Number | None
    quality_standard_error: Number | None = None
    also: dict[str, Figure] | None = None
    exact: Number | None = None
    distinct_2: Number | None = None
    repetition_4: Number | None = None
    entropy: Number | None = None
    ar_nats_per_token: Number | None = None
    agreement: Number | None = None
    lossless: bool | None = None
    tokens_per_forward: Number | None
    tokens_per_forward_standard_error: Number | None = None
    tokens_per_draft: Number | None = None
    acceptance: Number | None = None
    forwards: dict[str, int] | None = None
    prompts: int | None = None
    tokens_out: int | None = None
    histograms: Histograms | None = None
    per_prompt: PerPrompt | None = None
    tokens_per_second: Number | None = None
    time_to_first_token: Number | None = None
    speedup: Number | None = None
    throughput: Number | None = None
    timing: Timing | None = None

    @model_validator(mode="after")
    def _no_speed_alone(self) -> "Row":
        if self.quality is None and (found := [name for name in SPEEDS if getattr(self, name) is not None]):
            raise ValueError(
                f"({self.setting!r}) has {found[0]} and no quality: a speed is only printed beside a quality measured "
                "on the same outputs. Measure its quality, or leave the row out"
            )
        return self


class Scored(Part):
    """How likely given text is by one law of decoding.

    Attributes:
        bound: whether it lies above the law's own number.
        standard_error: of the bits per byte, or where there are none, of the nats per token.
    """

    name: str
    law: str | None = None
    bound: bool
    bits_per_byte: Number | None
    nats_per_token: Number | None
    standard_error: Number | None = None


class Reached(Part):
    """What a reveal rule makes of the same prompts.

    Attributes:
        of_ceiling: the share of the ceiling that the rule reaches.
    """

    of_ceiling: Number | None = None


class Limit(Part):
    """The ceiling of block decoding at one block size.

    Attributes:
        rules: by reveal rule.
    """

    block_size: int
    tokens_per_forward: Number | None
    rules: dict[str, Reached] = {}


class Training(Part):
    """How a model was trained.

    Attributes:
        curves: lists of one length, null where there is nothing: "step" and the losses.
    """

    curves: dict[str, list[Number | None]] | None = None

    @field_validator("curves")
    @classmethod
    def _of_one_length(cls, curves: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
        if len({len(values) for values in (curves or {}).values()}) > 1:
            raise ValueError("has lists of unequal length; write null for gaps")
        return curves


class Sample(Part):
    """A prompt and what was made of it.

    Attributes:
        outputs: setting -> what it wrote.
    """

    prompt: str
    target: str | None = None
    outputs: dict[str, str]


class Frame(Part):
    """The canvas after a forward, told as what differs from the one before: from slot `at` on, `cells`.

    Attributes:
        cells: text, token id, probability, forward that revealed it, forward that settled it or 0 for a draft;
            null: hidden.
    """

    forward: int
    kind: str
    at: int
    cells: list[list[str | int | float] | None]


class Panel(Part):
    """How one text came about."""

    name: str
    tokens: int
    forwards: int
    tokens_per_forward: Number | None
    frames: list[Frame]


class Traced(Part):
    """How one prompt came to be continued, in several ways."""

    prompt: str
    panels: list[Panel]


class Act(Part):
    """One model on one set of prompts: a row for each decoding setting.

    Attributes:
        name: unique within the document.
        also: further measures of the same outputs; rows have them by name in their `also`.
        aup: accuracy under parallelism of the efficient rows (d3LLM), with the highest quality of this act as
            y_max; null where quality is no share.
        model: path, parameters and settings of the checkpoint.
        ceiling: the most that policies that commit the surest drafts first could reach without changing a
            token of the serial decode, by block size.
    """

    name: str
    title: str
    quality: Quality
    also: list[Quality] = []
    prompts: Prompts | None = None
    aup: Number | None = None
    rows: list[Row]
    model: Object | None = None
    training: Training | None = None
    likelihood: list[Scored] | None = None
    ceiling: list[Limit] | None = None
    notes: list[str] | None = None
    samples: list[Sample] | None = None
    trace: Traced | None = None

    @property
    def id(self) -> str:
        """Its name as a part of an element's id."""
        return slug(self.name)


class Results(Part):
    """What an evaluation found: quality against speed.

    Attributes:
        created: when, ISO 8601.
        hybrid: the version that measured.
        environment: what a speed depends on: machine, device, dtype, threads, processes, versions of the
            libraries.
    """

    schema_: Literal["hybrid-frontier/1"] = Field(alias="schema")
    created: str
    hybrid: str
    environment: Object
    acts: Annotated[list[Act], Field(min_length=1)]

    @field_validator("acts")
    @classmethod
    def _have_names_of_their_own(cls, acts: list[Act]) -> list[Act]:
        names = [act.id for act in acts]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(f"[{i}].name {acts[i].name!r} stands twice; give each act its own name")
        return acts

    def plain(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True, by_alias=True)


def slug(name: str) -> str:
    """`name` as a part of an element's id."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


class Plain(GenerateJsonSchema):
    """Without titles, and with `["number", "null"]` for what may be null."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: Any) -> Any:
        found = super().nullable_schema(schema)
        inner = found.get("anyOf", [{}])[0]
        return {**inner, "type": [inner["type"], "null"]} if isinstance(inner.get("type"), str) else found


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the document, as `results.schema.json` has it."""
    found = Results.model_json_schema(schema_generator=Plain)
    return {"$schema": GenerateJsonSchema.schema_dialect, **found, "title": SCHEMA}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1, ensure_ascii=False))
