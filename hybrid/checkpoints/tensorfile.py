"""One safetensors file: read with suspicion, written with a checksum for every tensor.

A file is eight bytes that say how long the header is, the header (JSON: a name, dtype, shape and place for each tensor,
and free `__metadata__`), and the payload. https://huggingface.co/docs/safetensors says what is allowed. All of it is
held against the true size of the file before anything is mapped or allocated, so that a file can lie and cost nothing.

Files of ours say in `__metadata__` what the SHA-256 of each tensor's bytes is, as `sha256 NAME`. Other readers pass
over that.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# The format allows 100 MB. A header takes some thirty times its length in memory while it is read, and what models of
# ours have fits in well under a megabyte.
MAX_HEADER = 16 << 20
MAX_RANK = 8
CHUNK = 4 << 20
CHECKSUM = "sha256 "

# How many bits a number takes.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
WEIGHTS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or does not fit together. The message names the file and what is wrong in it."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: as the format spells it ("F32").
        start: its first byte, counted from the beginning of the file; `stop` is the one after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Entry":
        """What one in memory would be in a file."""
        return cls(dtype_name(tensor.dtype), tuple(tensor.shape))

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Header:
    """What stands in a file, in the order of the payload."""

    path: Path
    tensors: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def checksums(self) -> dict[str, str]:
        """Hexadecimal SHA-256 by name of the tensor; empty for files that have none."""
        return {k.removeprefix(CHECKSUM): v for k, v in self.metadata.items() if k.startswith(CHECKSUM)}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is too long, no JSON, no object, or says one thing twice.
    """
    if path.stat().st_size > MAX_HEADER:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes are too many for a file of settings.")
    return _object(path.read_bytes(), str(path))


def read_header(path: Path) -> Header:
    """What the file says it holds, where that agrees with its size.

    Raises:
        CheckpointError: it is cut short or padded, its header is none, or its tensors overlap, leave gaps or do not
            have the size that their shapes and dtypes take.
    """
    path = Path(path)
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise CheckpointError(f"{path} is no ordinary file.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if about.st_size < 10 or length > about.st_size - 8:
            raise CheckpointError(
                f"{path}: cut short, or no safetensors file: its {about.st_size:,} bytes do not hold the header of "
                f"{length:,} bytes that it speaks of. Get the file again."
            )
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: a header of {length:,} bytes; more than {MAX_HEADER:,} are not read.")
        raw = _object(file.read(length), f"{path}: the header")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header is not text by name. Get the file again.")
    if metadata.get("format", "pt") != "pt":
        raise CheckpointError(f"{path}: format in the header is {shown(metadata['format'])}; only 'pt' is read.")
    begin = 8 + length
    entries = {name: _entry(path, name, said, begin) for name, said in raw.items()}
    found = sorted(entries.items(), key=lambda x: (x[1].start, x[1].stop))
    place = begin
    for name, entry in found:
        if entry.start != place:
            problem = "overlaps what is before it" if entry.start < place else "leaves a gap before it"
            raise CheckpointError(f"{path}: {shown(name)} {problem} (data_offsets). Get the file again.")
        place = entry.stop
    if place != about.st_size:
        raise CheckpointError(
            f"{path}: {'cut short' if place > about.st_size else 'too long'}: the tensors end at byte {place:,}, the "
            f"file at {about.st_size:,}. Get the file again."
        )
    header = Header(path, dict(found), metadata)
    if header.checksums and (odd := sorted(header.checksums.keys() ^ raw.keys())):
        raise CheckpointError(f"{path}: {shown(odd[0])} has a checksum and no tensor, or the other way round.")
    return header


def read_tensor(header: Header, name: str) -> torch.Tensor:
    """One tensor, in memory of its own."""
    entry = header.tensors[name]
    data = bytearray(entry.nbytes)
    place = 0
    for chunk in payload(header, name):
        data[place : place + len(chunk)] = chunk
        place += len(chunk)
    dtype = WEIGHTS[entry.dtype]
    return torch.frombuffer(data, dtype=dtype).view(entry.shape) if data else torch.empty(entry.shape, dtype=dtype)


def payload(header: Header, name: str) -> Iterator[bytes]:
    """A tensor's bytes, in pieces.

    Read and not mapped: where a file is cut short meanwhile, reading ends, and a map would end the process. Nor do
    pages that were passed over stay in this process's memory.
    """
    entry = header.tensors[name]
    with header.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        left = entry.nbytes
        while left:
            chunk = file.read(min(left, CHUNK))
            if not chunk:
                raise CheckpointError(f"{header.path}: cut short at {shown(name)} while it was read.")
            left -= len(chunk)
            yield chunk


def verify(headers: Iterable[Header]) -> None:
    """Hold every tensor that has a checksum against it, on all cores.

    Raises:
        CheckpointError: one has other bytes than were saved; it is named.
    """

    def differs(job: tuple[Header, str, str]) -> bool:
        header, name, want = job
        digest = hashlib.sha256()
        for chunk in payload(header, name):
            digest.update(chunk)
        return digest.hexdigest() != want

    jobs = [(header, name, want) for header in headers for name, want in header.checksums.items()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter's lock
        wrong = [job for job, bad in zip(jobs, pool.map(differs, jobs), strict=True) if bad]
    if wrong:
        names = ", ".join(shown(name) for _, name, _ in wrong[:4])
        raise CheckpointError(
            f"{wrong[0][0].path}: damaged: the bytes of {names}{' …' if len(wrong) > 4 else ''} are not those that "
            "were saved (SHA-256). Get the file again, or pass verify=False to load it all the same."
        )


def write_tensors(
    path: Path, tensors: Mapping[str, Entry], chunks: Callable[[str], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a file, tensor by tensor, with the checksums of all.

    A checksum is as long before it is known as after, so the header is written twice and the payload once.

    Args:
        tensors: dtype and shape of each; their places are not looked at.
        chunks: the bytes of the tensor of that name, asked for once each and in the order of the file.
        metadata: more for the header.
    """
    # Wide numbers first keeps every tensor aligned; that is how the format's own writer does it.
    names = sorted(tensors, key=lambda name: (-BITS[tensors[name].dtype], name))
    sums = {CHECKSUM + name: "0" * 64 for name in names}
    head = _header(tensors, names, {"format": "pt", **(metadata or {}), **sums})
    with Path(path).open("wb") as file:
        file.write(head)
        for name in names:
            digest, size = hashlib.sha256(), 0
            for chunk in chunks(name):
                digest.update(chunk)
                size += file.write(chunk)
            assert size == tensors[name].nbytes, name
            sums[CHECKSUM + name] = digest.hexdigest()
        file.seek(0)
        again = _header(tensors, names, {"format": "pt", **(metadata or {}), **sums})
        assert len(again) == len(head)
        file.write(again)


def seal(path: Path) -> None:
    """Give a file its checksums, where it has none. It is replaced whole."""
    header = read_header(path)
    if header.checksums or not header.tensors:
        return
    new = path.with_name(f".{path.name}.sealed")
    try:
        write_tensors(new, header.tensors, lambda name: payload(header, name), header.metadata)
        os.chmod(new, stat.S_IMODE(path.stat().st_mode))
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes as they lie in a file, in one piece."""
    numbers = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    yield numbers.data


def dtype_name(dtype: torch.dtype) -> str:
    """How the format spells the dtype of a weight; Python's word for one that weights do not have."""
    return next((name for name, x in WEIGHTS.items() if x == dtype), str(dtype))


def shown(name: object) -> str:
    """A name from a file, as it may stand in a message: it can be anything, of any length."""
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 120 else text[:117] + "…"


def _header(tensors: Mapping[str, Entry], names: Iterable[str], metadata: Mapping[str, str]) -> bytes:
    said: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name in names:
        entry = tensors[name]
        said[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (place, place + entry.nbytes)}
        place += entry.nbytes
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(path: Path, name: str, said: Any, begin: int) -> Entry:
    def require(good: bool, what: str) -> None:
        if not good:
            raise CheckpointError(f"{path}: {shown(name)} in the header {what}. Get the file again.")

    fields = ("data_offsets", "dtype", "shape")
    require(isinstance(said, dict) and sorted(said) == list(fields), "does not say dtype, shape and data_offsets")
    offsets, dtype, shape = (said[key] for key in fields)
    require(isinstance(dtype, str) and dtype in BITS, f"has a dtype {shown(dtype)}, which is none")
    require(_naturals(shape) and len(shape) <= MAX_RANK, f"has a shape {shown(shape)}, which is none")
    require(_naturals(offsets) and len(offsets) == 2, f"has data_offsets {shown(offsets)}, which are none")
    entry = Entry(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])
    require(
        entry.stop - entry.start == entry.nbytes,
        f"has {offsets[1] - offsets[0]:,} bytes, and {dtype} of shape {shown(shape)} would be {entry.nbytes:,}",
    )
    return entry


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 63 for x in value)


def _object(data: bytes, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{what} says {shown(twice)} twice. Get the file again.")
        return found

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{what} is not JSON ({shown(str(error))}). Get the file again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is a {type(found).__name__} where an object should be.")
    return found
