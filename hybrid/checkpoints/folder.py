"""A checkpoint folder: which files its weights are in, whether they fit config.json, and whether they are whole.

All of it is known from headers, before a model is made: what config.json asks for is allocated only once the files turn
out to hold it.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from hybrid.checkpoints.place import find
from hybrid.checkpoints.place import place as shipped_place
from hybrid.checkpoints.tensorfile import WEIGHTS, CheckpointError, Entry, Header, read_header, read_json, shown, verify
from hybrid.checkpoints.weights import Weights
from hybrid.common.files import cache_folder
from hybrid.config import HybridConfig
from hybrid.formats import HEAD, Format, is_tied

INDEX = ".index.json"
# A file changed again within this time of being looked at could look as it did: clocks of file systems are coarse.
SETTLED = 2.0


def weight_headers(place: str | Path, kwargs: Mapping[str, Any]) -> list[Header] | None:
    """The headers of all files that the weights are in; None where there is no safetensors file.

    Raises:
        OSError: see `find`.
        CheckpointError: a file is damaged, or the index does not say what is in the files.
    """
    variant = kwargs.get("variant")
    name = f"model.{variant}.safetensors" if variant else "model.safetensors"
    if (path := find(place, name, kwargs)) is not None:
        return [read_header(path)]
    stem = f"model.safetensors{INDEX.removesuffix('.json')}"
    index = find(place, f"{stem}.{variant}.json" if variant else f"{stem}.json", kwargs)
    if index is None:
        return None
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index}: weight_map is not the files by name of the weight. Get the file again.")
    headers = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map names {shown(file)}, which is no file of this folder.")
        path = find(place, file, kwargs)
        if path is None:
            raise CheckpointError(f"{index}: weight_map names {shown(file)}, and there is no such file. Get it too.")
        headers[file] = read_header(path)
    found = {(tensor, file) for file, header in headers.items() for tensor in header.tensors}
    if odd := sorted(found ^ set(where.items())):
        tensor, file = odd[0]
        rest = "and that file does not have it" if (tensor, file) not in found else "but it is there"
        verb = "names" if (tensor, file) not in found else "does not name"
        raise CheckpointError(f"{index}: weight_map {verb} {shown(tensor)} in {shown(file)}, {rest}.")
    return list(headers.values())


def check_sizes(place: object, found: Mapping[str, Entry], config: HybridConfig) -> None:
    """Hold the sizes in config.json against what the weights have at all.

    Raises:
        CheckpointError: no tensor is as large as config.json says; it names the field.
    """
    largest = max((entry.count for entry in found.values()), default=0)
    limits = {"num_hidden_layers": len(found)} | dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        largest,
    )
    for name, limit in limits.items():
        if getattr(config, name) > limit:
            what = f"{len(found)} tensors" if name == "num_hidden_layers" else f"{limit:,} numbers"
            raise CheckpointError(
                f"{place}: config.json has {name}={getattr(config, name):,}, and the weights have at most {what}: "
                "they are of another model, or one of the two is damaged."
            )


def is_packed(place: object, config: HybridConfig) -> bool:
    """Whether weights are stored as torchao packs them.

    Raises:
        CheckpointError: they are stored as something else packs them.
    """
    how = getattr(config, "quantization_config", None)
    if how is None:
        return False
    method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
    if method != "torchao":
        raise CheckpointError(f"{place}: config.json has quantization_config of {shown(method)}; torchao's is read.")
    return True


def check_fit(
    place: object, found: Mapping[str, Entry], config: HybridConfig, kind: Format, model: type[PreTrainedModel]
) -> list[str]:
    """Hold weights against config.json, by name, shape and dtype.

    Args:
        found: the weights under the names that they have in their files.

    Returns:
        What they are called here; a head that is the embedding is not among them.

    Raises:
        CheckpointError: they are not those of such a model; they are named, as their files name them.
    """
    names = {kind.usual_name(name): name for name in found}
    if len(names) < len(found):
        twice = next(x for x in found if names[kind.usual_name(x)] != x)
        raise CheckpointError(f"{place}: {shown(twice)} is there twice, as {shown(names[kind.usual_name(twice)])} too.")
    check_sizes(place, found, config)
    for name, entry in found.items():
        if entry.dtype not in WEIGHTS:
            raise CheckpointError(
                f"{place}: {shown(name)} has dtype {entry.dtype}; weights are {', '.join(WEIGHTS)} here. Quantised "
                "weights have to be unpacked first, or the file is damaged."
            )
    ours = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(config, model).items()}
    want = {name: entry.shape for name, entry in kind.to_theirs(Weights.of(ours), config).tensors.items()}
    apart = [name for name in ours if not is_tied(name, config)]
    needed = want if len(apart) == len(ours) else want.keys() - {kind.their_name(HEAD)}
    problems = {
        "missing": [name for name in needed if name not in names],
        # Llamas of old were saved with what RoPE's frequencies are computed to.
        "unexpected": [shown(x) for name, x in names.items() if name not in want and "rotary_emb.inv" not in name],
        "mismatched": [
            f"{shown(x)} {found[x].shape} instead of {want[name]}"
            for name, x in names.items()
            if name in want and found[x].shape != want[name]
        ],
    }
    for problem, those in problems.items():
        if those:
            raise CheckpointError(
                f"{place}: {problem} keys: {', '.join(sorted(those)[:4])}{' …' if len(those) > 4 else ''}. The "
                "weights do not fit config.json; is the folder whole, and are both from the same model?"
            )
    return apart


def checked(
    place: str | Path, headers: Sequence[Header], config: HybridConfig, kind: Format, model: type[PreTrainedModel],
    kwargs: Mapping[str, Any], verify: bool | None = None,
) -> Weights:  # fmt: skip
    """The weights of a folder by our names, once they are found to be whole and those of config.json.

    Args:
        kwargs: of `from_pretrained`; `verify` too.

    Raises:
        CheckpointError: they are not.
    """
    found = Weights.in_files(headers)
    names = check_fit(place, found.tensors, config, kind, model)
    check_settings(place, kwargs)
    verify_once(headers, verify)
    return kind.to_ours(found, names, config)


def shapes_of(config: HybridConfig, model: type[PreTrainedModel]) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of such a model, by name, from one layer that takes no memory.

    Raises:
        CheckpointError: no tensor could have such a size.
    """
    try:
        with torch.device("meta"):
            one = model(config.but(num_hidden_layers=1))
    except RuntimeError as error:
        raise CheckpointError(f"config.json speaks of sizes that no model can have ({shown(str(error))}).") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in one.named_parameters(remove_duplicate=False):
        layers = range(config.num_hidden_layers) if "layers.0." in name else range(1)
        shapes |= {name.replace("layers.0.", f"layers.{layer}."): tuple(weight.shape) for layer in layers}
    return shapes


def verify_once(headers: Sequence[Header], again: bool | None) -> None:
    """Hold files against their checksums, unless this machine has done so since they were last changed.

    Args:
        again: True for now in any case, False for never.

    Raises:
        CheckpointError: bytes are not those that were saved.
    """
    if again is False:
        return
    seen = {header.path: _mark(header.path) for header in headers if header.checksums}
    fresh = [h for h in headers if h.path in seen and (again or not seen[h.path].exists())]
    verify(fresh)
    for header in fresh:
        about = header.path.stat()
        changed = max(about.st_mtime, about.st_ctime)
        if _mark(header.path) == seen[header.path] and changed + SETTLED < time.time():
            try:
                seen[header.path].parent.mkdir(parents=True, exist_ok=True)
                seen[header.path].touch()
            except OSError:
                return  # it is hashed anew next time


def check_settings(place: str | Path, kwargs: Mapping[str, Any]) -> None:
    """Read generation_config.json, if there is one: transformers passes over one that is damaged.

    Raises:
        CheckpointError: it is no JSON object.
    """
    if (path := find(place, "generation_config.json", kwargs)) is not None:
        read_json(path)


def load_tokenizer(place: str | Path, **kwargs: Any) -> Any:
    """transformers' tokenizer of a folder, a hub name or a shipped model; no code of the checkpoint runs.

    Raises:
        OSError: there is none (transformers' own error).
        CheckpointError: its files are damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(shipped_place(place), trust_remote_code=False, **kwargs)
    except (OSError, ImportError):
        raise
    except Exception as error:  # the reader of tokenizer.json raises plain Exceptions, wrong types almost anything
        raise CheckpointError(
            f"{place}: the tokenizer cannot be read; tokenizer.json or tokenizer_config.json is damaged, or of a newer "
            f"version ({shown(str(error))}). Get them again."
        ) from error


def _mark(path: Path) -> Path:
    """The file that stands for this one having been checked as it is now."""
    about = path.stat()
    facts = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return cache_folder() / "verified" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
