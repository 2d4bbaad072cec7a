"""A sweep: which modes and settings a frontier measures, from a YAML file.

    settings:                              # one entry a mode; an option with a list takes each of its values, and
      - mode: ar                           # several lists make all combinations
      - mode: speculative
        block_size: [4, 8]
        fused: [false, true]
      - mode: block
        block_size: 8
        reveal: entropy_bound
        entropy_bound: [0.1, 0.5]
        name: "blocks, entropy {entropy_bound}"    # optional; {option} stands for its value
    options:                               # optional: of `generate`, for all settings
      do_sample: false

Options are those of `generate`. One whose value is a list itself (`eos_token_id`, `stop_strings`) is written in double
brackets: [[1, 2]].
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hybrid import HybridForCausalLM
from hybrid.evals.passes.outputs import Setting
from hybrid.law import MODES, Law
from hybrid.sampling.options.checks import Options
from hybrid.sampling.options.merge import merge
from hybrid.sampling.options.settings import new_tokens, plan_of

PACKAGED = {path.stem.removesuffix("_sweep"): path for path in sorted(Path(__file__).parent.glob("*_sweep.yaml"))}

# Arguments of `generate` that the measurement sets, or that would make results depend on the machine.
OWN = (
    "max_new_tokens", "max_length", "max_time", "generator", "num_return_sequences", "return_dict_in_generate",
    "output_scores", "streamer", "past_key_values", "watchers", "tokenizer", "logits_processor", "stopping_criteria",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Settings in the order of the file, options for all, and what the model cannot run, in words."""

    settings: tuple[Setting, ...]
    options: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


class _Lined(dict[str, Any]):
    """A mapping that knows its line."""

    line = 0


class _Loader(yaml.SafeLoader):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode) -> _Lined:
    found = _Lined()
    found.line = node.start_mark.line + 1
    for key, value in node.value:
        name = loader.construct_object(key, deep=True)
        if name in found:
            raise yaml.constructor.ConstructorError(None, None, f"{name} stands twice", key.start_mark)
        found[name] = loader.construct_object(value, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_sweep(source: str | Path, model: HybridForCausalLM) -> Sweep:
    """The settings of a file, each checked against the model.

    Args:
        source: a file, or one of `PACKAGED`. Of these, modes that the model does not have are left out, which is said,
            and blocks have the size that the model's grid asks for.

    Raises:
        ValueError: the file is no sweep, or has a mode or an option that `generate` or this model does not take; the
            message names the line and the field.
    """
    packaged = str(source) in PACKAGED and not Path(source).exists()
    path = PACKAGED[str(source)] if packaged else Path(source)
    found, common = _read(path)
    law = Law.of(model.config)
    settings: list[Setting] = []
    skipped: list[str] = []
    for number, entry in enumerate(found["settings"]):
        refuse = partial(_refuse, path, getattr(entry, "line", found.line))
        place = f"settings[{number}]"
        if not isinstance(entry, _Lined):
            refuse(f"{place} is {entry!r}; an entry is a mapping such as {{mode: ar}}.")
        mode = entry.get("mode")
        if mode not in MODES:
            refuse(f"{place}.mode is {mode!r}; use one of {', '.join(MODES)}.")
        if own := [name for name in entry if name in OWN]:
            refuse(f"{place}.{own[0]}: this is not for a sweep; the measurement sets it.")
        if (problem := law.refusal(mode)) is not None:
            if not packaged:
                refuse(f"{place}: {problem}")
            skipped.append(f"left out {mode}: {problem}")
            continue
        fixed = {"block_size": law.grid} if packaged and law.grid is not None and "block_size" in entry else {}
        try:
            expanded = expand({**entry, **fixed})
            for setting in expanded:
                checked(model, setting, 1, 1, common)
        except (ValueError, TypeError) as error:
            refuse(f"{place}: {error}")
        for setting in expanded:
            if fixed and setting in settings:
                continue
            if any(setting.name == other.name for other in settings):
                refuse(f"{place}: two settings are called {setting.name!r}; tell them apart with `name`.")
            settings.append(setting)
    if not settings:
        raise ValueError(f"sweep: {path} has no setting that this model can run: {'; '.join(skipped)}")
    return Sweep(settings=tuple(settings), options=common, skipped=tuple(skipped))


def _refuse(path: Path, line: int, what: str) -> NoReturn:
    raise ValueError(f"sweep: {path}, line {line}: {what}")


def _read(path: Path) -> tuple[_Lined, dict[str, Any]]:
    """What a file has, whose settings are a list, and its options for all.

    Raises:
        ValueError: as `load_sweep`.
    """
    if not path.exists():
        raise ValueError(f"sweep: there is no file {path}; name one, or {' or '.join(PACKAGED)}.")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"sweep: {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"sweep: {path}{line} is not YAML ({getattr(error, 'problem', error)}).") from error
    if not isinstance(found, _Lined) or not isinstance(found.get("settings"), list) or not found["settings"]:
        _refuse(path, 1, "a sweep has a list `settings`, with at least one entry such as {mode: ar}.")
    if unknown := sorted(set(found) - {"settings", "options"}):
        _refuse(path, found.line, f"there is no field {unknown[0]!r} in a sweep; it has settings and options.")
    common = found.get("options") or _Lined()
    if not isinstance(common, _Lined):
        _refuse(path, found.line, "options must be a mapping of options of generate to their values.")
    for name in common:
        if name == "mode" or name in OWN:
            by = "by each entry" if name == "mode" else "elsewhere"
            _refuse(path, common.line, f"options.{name}: this is set {by}.")
    return found, dict(common)


def expand(entry: dict[str, Any]) -> list[Setting]:
    """An entry of a sweep as settings: all combinations of the values of its options, the last option changing first.

    Raises:
        ValueError: an empty list, or a `name` that speaks of an option that is not there.
    """
    options = {key: value for key, value in entry.items() if key not in ("mode", "name")}
    for key, value in options.items():
        if value == []:
            raise ValueError(f"{key} is an empty list; give at least one value, or leave it out.")
    lists = [value if isinstance(value, list) else [value] for value in options.values()]
    found = []
    for values in itertools.product(*lists):
        chosen = {key: value for key, value in zip(options, values, strict=True) if value is not None}
        name = entry.get("name")
        try:
            said = str(name).format(**chosen) if name is not None else name_of(entry["mode"], chosen)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"name is {name!r}; {{braces}} take the name of an option of the entry.") from error
        found.append(Setting(name=said, mode=entry["mode"], options=chosen))
    return found


def name_of(mode: str, options: dict[str, Any]) -> str:
    """A setting in a few words, for tables and pictures."""
    words = []
    for key, value in options.items():
        if key == "block_size":
            words.append(f"{'window' if mode == 'speculative' else 'block'} {value}")
        elif key == "fused":
            words += ["fused"] if value else []
        elif key == "confidence_threshold":
            words.append(f"threshold {value:g}" if isinstance(value, float) else f"threshold {value}")
        elif key == "reveal" and value in options:
            continue  # `entropy_bound 0.1` says which rule it is of
        elif isinstance(value, bool):
            words.append(key.replace("_", " ") if value else f"no {key.replace('_', ' ')}")
        else:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            words.append(shown if key == "reveal" else f"{key.replace('_', ' ')} {shown}")
    plain = {"ar": "one at a time", "speculative": "window as accepted", "block": "as it is", "diffusion": "as it is"}
    return ", ".join(words) or plain.get(mode, mode)


def check_settings(
    model: HybridForCausalLM, settings: Sequence[Setting], longest: int, max_new_tokens: int, options: dict[str, Any]
) -> None:
    """Raise ValueError, before anything is run, where `generate` would refuse a setting for prompts this long."""
    for setting in settings:
        try:
            checked(model, setting, longest, max_new_tokens, options)
        except ValueError as error:
            raise ValueError(f"{setting.mode}, {setting.name}: {error}") from error


def checked(
    model: HybridForCausalLM, setting: Setting, longest: int, max_new_tokens: int, options: dict[str, Any]
) -> Options:
    """The options in force for a setting.

    Raises:
        ValueError: `generate` would refuse them.
    """
    given = {**options, **setting.options}
    for name in OWN:
        if name in given:
            raise ValueError(f"{name}: the measurement sets this for each call; leave it out.")
    if "stop_strings" in given:
        given["tokenizer"] = object()  # `decode` gives the model's
    found = merge(model, {**given, "mode": setting.mode, "max_new_tokens": max_new_tokens})
    if found.theirs:
        raise ValueError(f"{', '.join(sorted(found.theirs))}: only transformers' own decoding loop has this.")
    without = {k: v for k, v in found.ours.items() if k not in ("stop_strings", "tokenizer")}
    plan_of(model.config, Options(ours=without, theirs={}, explicit=found.explicit))
    new_tokens(model.config, found, longest)
    return found


def sampled(model: HybridForCausalLM, options: dict[str, Any]) -> bool:
    """Whether these options, or the checkpoint's own, draw at random."""
    found = merge(model, {k: v for k, v in options.items() if k != "stop_strings"})
    return bool(found.get("do_sample", False)) and found.get("temperature") != 0
