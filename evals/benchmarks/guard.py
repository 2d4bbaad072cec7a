"""Runs one program with next to no rights: the script of a process of its own, started by `execution` beside it.

Only the standard library, and nothing of this package: it runs isolated (`python -I -S`). On the file descriptor named
first comes {"program", "seconds", "memory", "word"} as JSON; `word` goes back on the second one if the program ran to
its end, else what stopped it. What it may not do is taken away by rlimits, by giving up all capabilities, and by a
seccomp filter, in that order, before the program is compiled.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys

# Numbers of system calls (the kernel's asm/unistd_64.h and asm-generic/unistd.h). -1: there is none on that machine.
# What starts processes and programs, talks to others, and changes files, limits or the machine.
CALLS = {
    "x86_64": (
        57, 58, 59, 322, 435,  # fork vfork execve execveat clone3
        41, 53, 42, 49, 44, 46,  # socket socketpair connect bind sendto sendmsg
        62, 129, 200, 234, 297, 424, 101, 310, 311,  # kill, its variants, ptrace, process_vm_readv and _writev
        85, 437, 87, 263, 82, 264, 316, 83, 258, 84, 86, 265, 88, 266, 133, 259,  # creat openat2 unlink … mknodat
        76, 77, 90, 91, 268, 452, 92, 93, 94, 260, 132, 235, 261, 280, 188, 189, 190,  # … utime xattr
        319, 29, 30, 68, 240, 425, 426, 427,  # memfd_create shmget shmat msgget mq_open io_uring_…
        160, 302, 272, 308, 161, 155, 165, 166, 428, 429, 430, 442,  # limits, namespaces, mounts
        321, 298, 323, 248, 249, 250, 169, 175, 313, 246, 167, 168,  # bpf perf userfaultfd keys reboot modules kexec
    ),
    "aarch64": (
        221, 281, 435,
        198, 199, 203, 200, 206, 211,
        129, 130, 131, 138, 240, 424, 117, 270, 271,
        437, 35, 38, 276, 34, 37, 36, 33,
        45, 46, 52, 53, 452, 54, 55, 88, 5, 6, 7,
        279, 194, 196, 186, 180, 425, 426, 427,
        164, 261, 97, 268, 51, 41, 40, 39, 428, 429, 430, 442,
        280, 241, 282, 217, 218, 219, 142, 105, 273, 104, 224, 225,
    ),
}  # fmt: skip
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
OPENS = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}  # open and openat, with the place of their flags
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CLONE_THREAD = 0x10000
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06


def program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter, as BPF instructions (code, jump if true, jump if false, k)."""
    refused, unknown = REFUSE | errno.EPERM, REFUSE | errno.ENOSYS
    out = [
        (LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCHITECTURE[machine]), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0), (AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, KILL),  # x86's third set of numbers
    ]  # fmt: skip
    for number in CALLS[machine]:
        # The C library asks for the older call where the newer one is unknown.
        out += [(EQUAL, 0, 1, number), (RETURN, 0, 0, unknown if number in (435, 437) else refused)]
    for number, place in OPENS[machine]:
        out += [
            (EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * place), (ANY_BIT, 0, 1, WRITING), (RETURN, 0, 0, refused),
            (RETURN, 0, 0, ALLOW),
        ]  # fmt: skip
    out += [
        (EQUAL, 0, 4, CLONE[machine]), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, refused),
        (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ALLOW),
    ]  # fmt: skip
    return out


def confine(seconds: float, memory: int) -> None:
    """Give up what a program that only computes has no need of. Raises OSError where that cannot be done."""
    for what, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_STACK, 64 << 20),
    ):  # fmt: skip
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)

    def call(done: int, what: str) -> None:
        if done:
            raise OSError(ctypes.get_errno(), what)

    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    call(libc.capset(header, nothing), "capset")
    call(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    code = b"".join(struct.pack("HBBI", *line) for line in program(platform.machine()))
    held = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held))
    call(libc.prctl(22, 2, ctypes.c_char_p(filter_), 0, 0), "seccomp")


def main() -> None:
    source, result = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(source) as given:
        task = json.load(given)
    sys.argv = [""]
    word, text = task["word"], task["program"]
    try:
        confine(task["seconds"], task["memory"])
    except (OSError, KeyError) as error:
        os.write(result, f"no guard: {error!r}".encode())
        os._exit(1)
    try:
        exec(compile(text, "program", "exec"), {"__name__": "program"})
        said = word
    except BaseException as error:  # SystemExit too: a program that leaves has not passed
        said = f"{type(error).__name__}"
    os.write(result, said.encode())
    os._exit(0)  # no thread or exit handler of the program's goes on


if __name__ == "__main__":
    main()
