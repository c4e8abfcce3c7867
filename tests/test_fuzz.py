"""Random calls of the operators and the optimizer: a part of what ``make fuzz`` plays."""

import subprocess
import sys
from pathlib import Path


def test_five_hundred_rounds_without_a_fault():
    command = [sys.executable, Path(__file__).parent / "fuzz", "--rounds", "500"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout
