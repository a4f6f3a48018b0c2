"""A save broken at every single system call: killed, disk full, I/O error, read-only, cut short."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs a C compiler")
def test_a_save_broken_at_any_system_call_loses_nothing(disk, tmp_path):
    library = tmp_path / "faults.so"
    build = ["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"]
    subprocess.run(build, check=True, capture_output=True)
    try:
        done = subprocess.run(
            [sys.executable, HERE / "faults.py", disk],
            **{"capture_output": True, "text": True, "timeout": 250},
            env={**os.environ, "LD_PRELOAD": str(library)},
        )
    finally:
        shutil.rmtree(disk)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["calls"] > 30
    assert found["outcomes"]["SIGKILL: killed"] == found["calls"]
    assert found["outcomes"]["short write: saved"] == found["calls"]
    assert found["outcomes"]["EROFS: refused"] > found["calls"] / 2
