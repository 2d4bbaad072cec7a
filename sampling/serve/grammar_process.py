"""Builds grammars in a process of its own, which its owner may kill: a hostile pattern takes any time and memory.

Started as a script, so that it imports nothing else of the package.
"""

import pickle
import resource
import struct
import sys
from typing import IO, Any

DEPTH = 2  # of what a schema leaves open


def send(file: IO[bytes], what: Any) -> None:
    data = pickle.dumps(what)
    file.write(struct.pack("<Q", len(data)) + data)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    head = file.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(file.read(*struct.unpack("<Q", head)))  # of our own process


def main() -> None:
    """Read the vocabulary and the bytes of memory that may be used, then one ("regex" or "schema", text) after another;
    write ("index", it) or ("error", why) for each."""
    from outlines_core import Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    source, target = sys.stdin.buffer, sys.stdout.buffer
    end, words, memory = receive(source)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    vocabulary = Vocabulary(end, words)
    while True:
        try:
            kind, text = receive(source)
        except EOFError:
            return
        try:
            regex = build_regex_from_schema(text, None, DEPTH) if kind == "schema" else text
            send(target, ("index", Index(regex, vocabulary)))
        except Exception as error:
            send(target, ("error", str(error)))


if __name__ == "__main__":
    main()
