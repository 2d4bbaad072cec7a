"""`mode="auto"`: the mode that was measured to be fastest for this checkpoint, on this machine, at this batch size."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.common.checks import require
from hybrid.common.files import cache_folder, write_whole
from hybrid.law import Law
from hybrid.sampling.options.checks import Options

LOSSLESS = ("ar", "speculative")
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One measured way to decode.

    Attributes:
        options: what was given to `generate`, the mode included.
        batch_size: rows.
        tokens_per_second: of all rows, median of the repeats.
    """

    options: dict[str, Any]
    batch_size: int
    tokens_per_second: float


def place_of(model: HybridForCausalLM) -> Path:
    """The calibration file of this checkpoint on this machine, in the cache folder."""
    weights = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, p in model.named_parameters():
        ends = torch.cat([p.detach().flatten()[:32], p.detach().flatten()[-32:]]).float().cpu()
        weights.update(name.encode() + ends.numpy().tobytes())
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor()
    machine = (platform.machine(), device, os.cpu_count(), torch.get_num_threads(), str(model.dtype), torch.__version__)
    name = f"{weights.hexdigest()[:16]}-{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.json"
    return cache_folder() / "calibration" / name


def keep(model: HybridForCausalLM, timings: Sequence[Timing]) -> Path:
    """Write a calibration where `choose` finds it; returns the file."""
    path = place_of(model)
    write_whole(path, json.dumps({"version": VERSION, "timings": [asdict(t) for t in timings]}, indent=1).encode())
    return path


def chosen(model: HybridForCausalLM, options: Options, rows: int) -> tuple[Options, str]:
    """The options with a mode that a calibration recommends for so many rows, and why; what the caller gave stays.

    Raises:
        ValueError: auto_allow is no list of modes, or something is given that would be chosen.
    """
    allow = options.get("auto_allow", ())
    require(
        not isinstance(allow, str) and all(mode in ("block", "diffusion") for mode in allow),
        f"auto_allow is {allow!r}; it is a list of modes that may change the text: 'block', 'diffusion'.",
    )
    fixed = sorted(options.explicit & {"block_size", "drafts_per_round", "fused", "reveal"})
    require(not fixed, f"{', '.join(fixed)}: mode='auto' chooses this; leave it out, or name the mode.")
    if options.theirs:
        return replace(options, ours={**options.ours, "mode": "ar"}), "ar: only transformers' own loop has the options"
    found, why = choose(model, rows, allow)
    return replace(options, ours={**options.ours, **found}), why


def choose(model: HybridForCausalLM, batch_size: int, allow: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """The options of `generate` to use, and why.

    Args:
        allow: modes that change the text and may be chosen all the same ("block", "diffusion").

    Raises:
        ValueError: the calibration file is damaged.
    """
    first = Law.of(model.config).modes[0]
    path = place_of(model)
    if not path.exists():
        return {"mode": first}, f"{first}: not calibrated on this machine; `hybrid bench calibrate MODEL` measures"
    try:
        found = json.loads(path.read_text())
        timings = [Timing(**t) for t in found["timings"]]
        usable = found["version"] == VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no calibration ({error}): delete it, or calibrate again.") from error
    # Left to right, a model that decodes in blocks says something else.
    same = LOSSLESS if first in LOSSLESS else (first,)
    timings = [t for t in timings if usable and t.options["mode"] in (*same, *allow)]
    if not timings:
        return {"mode": first}, f"{first}: no usable timing; `hybrid bench calibrate MODEL` measures anew"
    nearest = min({t.batch_size for t in timings}, key=lambda n: (abs(n - batch_size), n))
    at = [t for t in timings if t.batch_size == nearest]
    best = max(at, key=lambda t: (t.tokens_per_second, t.options["mode"] == first))
    words = ", ".join(f"{k} {v}" for k, v in best.options.items() if k != "mode")
    rest = [f"{t.options['mode']} {t.tokens_per_second:.0f}" for t in at if t.options["mode"] != best.options["mode"]]
    why = (
        f"{best.options['mode']}{f' ({words})' if words else ''}: {best.tokens_per_second:.0f} tokens/s measured at "
        f"batch size {nearest}{', against ' + ', '.join(rest) if rest else ''}"
    )
    return dict(best.options), why
