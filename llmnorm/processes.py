"""Leave the launcher's process group, and the process, without dying on the way out."""

import multiprocessing
import os
import sys
import time
from typing import NoReturn

import torch.distributed as dist

_IDLE_SECONDS = 0.3
"""How long gloo's workers are given to let go of the last collective's tensors."""


def leave_process_group() -> None:
    """Leave torch's process group, if there is one.

    A gloo worker drops the tensors of the last collective after the caller has gone on, and takes
    Python's lock to do so. In an interpreter that is already shutting down this ends the process
    with `terminate called without an active exception`. The wait here releases that lock.
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(_IDLE_SECONDS)
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Exit; at once where a process group is still open.

    Its threads wait for ranks that may be gone, and an interpreter that shuts down beside them may
    hang, or abort with a code of its own.
    """
    if dist.is_available() and dist.is_initialized():
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
