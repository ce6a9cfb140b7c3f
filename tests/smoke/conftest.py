"""Fixtures for programs that measure.

``measured(module, *words) -> str``
    runs one in the checkout, lets it write to ``tmp_path``, and returns what it has printed
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from devtools.binaries import CHECKOUT


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., str]:
    def run(module: str, *words: str) -> str:
        command = [sys.executable, "-m", module, *words, "--output", str(tmp_path)]
        done = subprocess.run(command, cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
