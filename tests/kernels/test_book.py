"""The kernel book's code runs: machine code of a kernel, compiled for a card that is not there."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import rungs
from conftest import NEEDS_TRITON

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)
def test_the_front_pages_code_prints_machine_code(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "kernels/README.md").read_text(), re.DOTALL)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DISABLE_LINE_INFO": "1",
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Function:_scan" in run.stdout and run.stdout.count("LDG") >= 16, run.stdout[:2000]
