"""A small storm: the large one is `make storm`."""

import os
import re
import subprocess
import sys

from conftest import ROOT


def test_thirty_kills_at_random_moments_change_no_result(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests/storm.py", "collect-feedback", "build-prefs", "eval",
         "--kills", "30", "--folder", tmp_path / "storm"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^(\d+) kills in ", done.stdout, re.MULTILINE)
    assert found is not None
    assert int(found[1]) >= 30
