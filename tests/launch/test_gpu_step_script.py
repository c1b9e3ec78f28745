"""benchmarks/gpu_step.py from end to end without a GPU: a tiny model, every variant, the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py")]


@pytest.mark.slow
def test_a_tiny_model_on_a_cpu(tmp_path):
    pytest.importorskip("peft", reason="the peers of benchmarks need peft: pip install -e '.[bench]'")
    flags = "--device cpu --shapes tiny --tokens 64 --sequence 32 --rounds 2 --warmup 1 --repeats 1 --peak_tflops 1"
    command = [*SCRIPT, *flags.split(), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads((tmp_path / "gpu_step.json").read_text())
    (setting,) = values["results"].values()
    assert len(setting) == 4 and all(len(variant["seconds"]) == 2 for variant in setting.values())
    assert max(values["equality"].values()) < 1e-3
    # The same routing, by whatever way; plain LoRA has one expert, and costs less.
    lora, authors, plain, ours = (setting[name] for name in setting)
    assert authors["used"] == plain["used"] == ours["used"] > 1 == lora["used"]
    assert authors["flops"] == plain["flops"] == ours["flops"] > lora["flops"] > 0
    report = (tmp_path / "gpu_step.md").read_text()
    assert "Routing kernel: not used." in report and report.count("| tiny") == 0 and "## tiny, 64 tokens" in report


def test_bad_flags_end_in_one_sentence():
    done = subprocess.run([*SCRIPT, "--device", "cpu", "--tokens", "100"], capture_output=True, text=True)
    assert done.returncode == 2 and "--tokens 100 is no multiple of --sequence 1024" in done.stderr
