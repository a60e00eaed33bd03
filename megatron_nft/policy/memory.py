"""The peak of this rank's memory, for the log."""

import resource
from pathlib import Path

import torch


class PeakMemory:
    """Most bytes in use since `start`: torch's on this rank's GPU; without one, the process's resident set.

    Linux can forget the resident set's peak; where that may not be asked of it, what is resident at the end is told instead.
    """

    def __init__(self, proc: Path = Path("/proc/self")):
        self._status, self._forget = proc / "status", proc / "clear_refs"
        self._field = "VmHWM"

    def start(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            self._forget.write_text("5")  # "reset the peak resident set size to the current value" (proc(5))
        except OSError:
            self._field = "VmRSS"

    def peak(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if not self._status.exists():  # no Linux: the peak since the process began
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines() if ":" in line)
        return int(lines[self._field].split()[0]) * 1024
