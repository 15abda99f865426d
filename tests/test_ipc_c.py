"""The C tests of ipc/, under the sanitizers: a crash after each store, hostile peers."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["journal_crash", "ring_crash", "ring_hostile"])
def test_c(name: str) -> None:
    done = subprocess.run([ROOT / ".ci/c-tests", f"tests/c/{name}.c"], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)  # with the seed
    assert done.returncode == 0, done.stdout + done.stderr
