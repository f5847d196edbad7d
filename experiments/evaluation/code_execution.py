"""Running generated code with its tests, in a process of its own with little time and memory."""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What generated code may use.

    Args:
        seconds: Time on the clock and on the processor.
        memory_bytes: Address space.
        file_bytes: Size of a file that it writes.
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
    """Run a program and return whether it ended well, and its last line of output.

    The process has an empty folder, no environment, no input, and limits on time, memory and the size of files. That keeps
    mistakes from harm; it is no jail for hostile code: the network and the user's files stay within reach.

    Args:
        program: Python source; a test that fails raises.
        limits: What it may use.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(program, "utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(file)],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limits.seconds + 5,
                preexec_fn=limits.apply(),
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False, f"no end within {limits.seconds} seconds"
    lines = (done.stderr or done.stdout).strip().splitlines()
    if done.returncode < 0:
        return False, f"stopped by signal {-done.returncode}"
    return done.returncode == 0, lines[-1] if lines else ""
