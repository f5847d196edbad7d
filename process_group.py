"""Process groups of ``torch.distributed``."""

import atexit

import torch.distributed as dist


def leave_group_at_exit() -> None:
    """End the process group before the interpreter ends.

    A thread of gloo that still holds a Python object then would abort the process, with a code that says the run failed.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
