"""Running generated code with its tests, in a process of its own with little time and memory."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What generated code may use.

    Args:
        seconds: Time on the clock and on the processor.
        memory_bytes: Address space.
        file_bytes: Size of a file that it writes, and of its output.
    """

    seconds: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20

    def apply(self) -> Callable[[], None]:
        """Return the function that sets the limits in the new process."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_CPU, (self.seconds, self.seconds))
            resource.setrlimit(resource.RLIMIT_AS, (self.memory_bytes, self.memory_bytes))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, self.file_bytes))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        return limit


def run_code(program: str, limits: Limits = Limits()) -> tuple[bool, str]:
    """Run a program and return whether it ran to its very end, and its last line of output.

    The process has an empty folder, no environment, no input, and limits on time, memory, and the size of files and output.
    That keeps mistakes from harm; it is no jail for hostile code: the network and the user's files stay within reach.

    Args:
        program: Python source; a test that fails raises.
        limits: What it may use.
    """
    end = uuid.uuid4().hex  # printed behind the last statement: a program that exits early has not passed its tests
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        file = Path(folder) / "program.py"
        file.write_text(f"{program}\nprint(); print({end!r})\n", "utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", str(file)],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=limits.apply(),
            start_new_session=True,
        )
        try:
            process.wait(limits.seconds + 5)
        except subprocess.TimeoutExpired:
            return False, f"no end within {limits.seconds} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.wait()
        output.seek(0)
        lines = output.read().decode("utf-8", "replace").strip().splitlines()
    if process.returncode < 0:
        return False, f"stopped by signal {-process.returncode}"
    passed = process.returncode == 0 and bool(lines) and lines[-1] == end
    said = [line for line in lines if line and line != end]
    return passed, said[-1] if said else "" if passed else "it exits before its end"
