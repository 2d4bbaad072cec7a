"""Builds grammars in a process of its own, which its owner may kill: a hostile pattern takes any time and memory.

Started as a script, so that it imports nothing else of the package.
"""

import resource
import sys
from multiprocessing.connection import Connection

DEPTH = 2  # of what a schema leaves open


def main(pipe: Connection) -> None:
    """Read the vocabulary and the bytes of memory that may be used, then one ("regex" or "schema", text) after another;
    write ("index", it) or ("error", why) for each."""
    from outlines_core import Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    end, words, memory = pipe.recv()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    vocabulary = Vocabulary(end, words)
    while True:
        try:
            kind, text = pipe.recv()
        except EOFError:
            return
        try:
            regex = build_regex_from_schema(text, None, DEPTH) if kind == "schema" else text
            pipe.send(("index", Index(regex, vocabulary)))
        except Exception as error:
            pipe.send(("error", str(error)))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
