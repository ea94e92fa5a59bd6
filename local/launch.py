"""Become the right user, bind one's life to the parent's, then exec the real program.

Run as a script in a fresh interpreter, `python -I -S launch.py PARENT SIGNAL IDENTITY -- PROGRAM ARGS...`, instead of
as a `preexec_fn`: Python code between fork and exec can deadlock when the parent has threads, and the supervisor has
one thread per child. It uses the standard library alone and costs 16 ms.

The parent-death signal exists on Linux only; elsewhere `kill -9` of the supervisor leaves its children running.

IDENTITY says as whom the program runs. Postgres refuses to run as root, so for it root becomes something else:

    same             no change
    userns:UID:GID   root only: a new user namespace in which root is called UID. Outside it the process still is root,
                     so files keep their owner and no folder has to be opened for anybody
    drop:UID:GID     root only: really become UID, keeping only CAP_DAC_OVERRIDE (the right to pass through folders such
                     as /root that are closed to UID), for containers whose seccomp profile refuses user namespaces

`--check PATH...` in place of `-- PROGRAM` exits with 0 if the identity can be taken and may enter or execute each PATH.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# From <linux/prctl.h>, <linux/sched.h> and <linux/capability.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CLONE_NEWUSER = 0x10000000
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE = 1

_EXIT_CANNOT_EXEC = 127  # what a shell answers for "command not found"


def main(argv: list[str]) -> int:
    """Do what the module's docstring says; returns only for `--check` or when the program cannot be executed."""
    parent, death_signal, identity, separator, *rest = argv
    _default_signals()
    try:
        _take_identity(identity)
    except OSError as error:
        sys.stderr.write(f"cannot run as {identity!r}: {error}\n")
        return 1
    if separator == "--check":
        return 0 if all(os.access(path, os.X_OK, effective_ids=True) for path in rest) else 1
    _die_with_parent(int(death_signal), int(parent))
    try:
        os.execv(rest[0], rest)  # noqa: S606 - executing exactly the given program is this script's purpose
    except OSError as error:
        sys.stderr.write(f"cannot execute {rest[0]}: {error.strerror}\n")
        return _EXIT_CANNOT_EXEC


def _default_signals() -> None:
    """Undo what the interpreter set for itself: an ignored signal stays ignored across exec."""
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def _take_identity(identity: str) -> None:
    kind, _, ids = identity.partition(":")
    if kind == "same":
        return
    uid, gid = (int(number) for number in ids.split(":"))
    if kind == "userns":
        _enter_user_namespace(uid, gid)
    elif kind == "drop":
        _drop_to(uid, gid)
    else:
        raise OSError(f"unknown identity {identity!r}")


def _enter_user_namespace(uid: int, gid: int) -> None:
    _call("unshare", _CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} 0 1"), ("gid_map", f"{gid} 0 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123 - pathlib costs 10 ms to import
            file.write(text)
    # Execing as a non-root uid of the namespace clears the capabilities that unshare gave inside it.


def _drop_to(uid: int, gid: int) -> None:
    _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    bit = 1 << _CAP_DAC_OVERRIDE
    sets = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)  # effective, permitted, inheritable; then their upper halves
    try:
        _call("capset", header, sets)
        _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0)
    except OSError:
        # A container may have dropped the capability; then only folders that are open to `uid` work, see `--check`.
        return


def _die_with_parent(death_signal: int, parent: int) -> None:
    """Ask the kernel for `death_signal` when the parent's forking thread ends (prctl(2), PR_SET_PDEATHSIG)."""
    if not sys.platform.startswith("linux"):
        return
    # After the change of identity: a change of credentials clears the setting.
    _call("prctl", _PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request was made, so the signal will never come
        os.kill(os.getpid(), signal.SIGKILL)


def _call(name: str, *args: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
