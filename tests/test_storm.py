"""A small storm: the large one is `make storm`."""

import os
import re
import subprocess
import sys

from conftest import ROOT


def test_thirty_kills_at_random_moments_change_no_result(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests/storm.py", "collect-feedback", "build-prefs", "eval",
         "--kills", "30", "--jobs", "2", "--folder", tmp_path / "storm"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^\| ([\w-]+) \| (\d+) \|", done.stdout, re.MULTILINE) == [
        ("collect-feedback", "10"), ("build-prefs", "10"), ("eval", "10"),
    ]  # fmt: skip
    assert re.search(r"^30 kills in ", done.stdout, re.MULTILINE)
    assert "; 0 broken." in done.stdout
