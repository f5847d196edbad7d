"""How processes that work at the same time share a machine's cores."""

import os


def threads_each(processes: int) -> dict[str, str]:
    """Return the variable that gives each of some processes its part of the threads that this one may have.

    Without it, each would start as many threads as there are cores, and they would wait for each other, spinning.

    Args:
        processes: How many work at the same time.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    own = int(said) if said.isdecimal() else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, own // processes))}
