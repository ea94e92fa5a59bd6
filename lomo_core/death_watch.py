"""Ending with the parent: an engine whose worker has died must not go on holding the device.

Two independent ways, because each has a hole. The kernel's parent-death signal (Linux) is instant, but follows the
thread that forked; the pipe works everywhere, but needs the inherited descriptor. Torch-free.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PARENT_FD = "LOMO_ENGINE_PARENT_FD"
PARENT_PID = "LOMO_ENGINE_PARENT_PID"

# linux/prctl.h
_PR_SET_PDEATHSIG = 1


def start_death_watch() -> None:
    """Start the watches that the environment asks for; none where it says nothing.

    `LOMO_ENGINE_PARENT_FD`: descriptor of the read end of a pipe whose other end only the parent holds.
    `LOMO_ENGINE_PARENT_PID`: the parent's process id; where it is no longer the parent, this process ends at once.
    """
    if descriptor := os.environ.get(PARENT_FD):
        threading.Thread(target=_wait_for_end, args=(int(descriptor),), name="death-watch", daemon=True).start()
    if (pid := os.environ.get(PARENT_PID)) and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The parent may have died before the call above.
        if os.getppid() != int(pid):
            os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_end(descriptor: int) -> None:
    """Read until the parent's end is closed, then kill the whole process group."""
    while True:
        try:
            if not os.read(descriptor, 1):
                break
        except OSError:
            break
    # Only a group that this process leads is its own to kill; in another one its members are strangers.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
