"""Nothing in bench/gpu.py is broken when a card is at hand: its parts run on two layers on a CPU.

`make bench-gpu-tiny` runs all of them in processes of their own, with the kill and the processes.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("gpu")
        for name in ("gpu", "train", "generate"):
            sys.modules.pop(name, None)


@pytest.fixture
def bench(gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return gpu.Bench(tmp_path, tiny=True)


def test_machine_and_generation(gpu, bench):
    assert gpu.machine(bench)["torch"]
    found = gpu.generation(bench)
    assert found["static"]["equal"] == found["static"]["rows"] == 4
    assert found["continuous"]["equal"] == 4
    assert found["out_of_memory"]["halvings"] >= 1
    assert found["out_of_memory"]["answered"] == 32


def test_trainings_and_the_six_commands(gpu, bench):
    for part in (gpu.sft, gpu.sft_lora, gpu.dpo):
        found = part(bench)
        assert found["tokens_per_second"] > 0
        assert found["planned_gib"] > 0
    assert gpu.end_to_end(bench)["commands"] == 6


def test_a_part_that_fails_or_takes_too_long_says_so(gpu, bench, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "broken.py"))
    (tmp_path / "broken.py").write_text("raise SystemExit('RuntimeError: no kernel')")
    assert gpu.run_part("sft", bench, 20) == {"failed": "RuntimeError: no kernel"}
    (tmp_path / "broken.py").write_text("import time; time.sleep(60)")
    assert gpu.run_part("sft", bench, 0.3) == {"failed": "more than 0 s"}
    assert json.dumps(gpu.show("sft", {"failed": "x"})) == '"sft: failed x"'
