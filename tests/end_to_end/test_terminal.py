"""Progress on a terminal is one bar that moves; the same program writing to a file prints plain lines (test_training.py)."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from tests.support import ROOT, load_example


def run_in_a_terminal(command: list[str]) -> str:
    """Everything the command writes to a pseudo-terminal of 120 columns."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert process.wait(timeout=600) == 0, shown.decode()
    return shown.decode()


def test_the_bar(tmp_path: Path):
    load_example("arithmetic/make_model.py").write(tmp_path / "model", seed=1)
    rows = [json.dumps(row) for row in load_example("arithmetic/make_data.py").rows("train", 100)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    shown = run_in_a_terminal(
        [sys.executable, "-m", "megatron_nft", "sft", str(ROOT / "examples/arithmetic/sft.yaml"), f"run_dir={tmp_path / 'run'}"]
        + [f"model.path={tmp_path / 'model'}", f"sft.data.0.path={tmp_path / 'data.jsonl'}", "sft.steps=3", "sft.sequences_per_update=8"]
    )
    assert "sft step 3/3 |" in shown and "tokens/s" in shown and "left" in shown and "\r" in shown
    assert "step 1/3  " not in shown  # no plain lines beside the bar
