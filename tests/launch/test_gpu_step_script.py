"""benchmarks/gpu_step.py without a GPU: a tiny model, every variant, the table. Its figures say nothing."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from ldmole_ds.ops import cpu_kernels

pytest.importorskip("peft", reason="the peers of benchmarks need peft: pip install -e '.[bench]'")


@pytest.fixture(scope="module")
def script():
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("gpu_step")
    sys.path.remove(folder)


@pytest.mark.slow
def test_a_tiny_model_on_a_cpu(script, tmp_path, monkeypatch):
    flags = "--device cpu --shapes tiny --tokens 64 --sequence 32 --rounds 2 --warmup 1 --repeats 1 --peak_tflops 1"
    # Each variant's process would import everything anew; what it is told and answers is the same.
    monkeypatch.setattr(
        script.harness,
        "in_own_process",
        lambda path, *argv: json.loads(json.dumps(script.measure(script.parse(list(argv))))),
    )
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *flags.split(), "--output", str(tmp_path)])
    monkeypatch.setenv(script.SWITCH, "auto")
    script.main()
    values = json.loads((tmp_path / "gpu_step.json").read_text())
    (setting,) = values["results"].values()
    assert len(setting) == 4 and all(len(variant["seconds"]) == 2 for variant in setting.values())
    assert max(values["equality"].values()) < 1e-3
    # The same routing, by whatever way; plain LoRA has one expert, and costs less.
    lora, authors, plain, ours = (setting[name] for name in script.VARIANTS)
    assert authors["used"] == plain["used"] == ours["used"] > 1 == lora["used"]
    assert authors["flops"] == plain["flops"] == ours["flops"] > lora["flops"] > 0
    report = (tmp_path / "gpu_step.md").read_text()
    kernel = "not used" if cpu_kernels.why_not() else "used"
    assert f"Routing kernel: {kernel}." in report and "## tiny, 64 tokens" in report


def test_a_variant_that_does_not_fit_says_so(script):
    args = script.parse(["--device", "cpu", "--shapes", "tiny", "--tokens", "1024"])
    fits = {"seconds": [1.0, 1.0], "above_GB": 1.0, "total_GB": 2.0, "flops": 1e12, "used": 2.0, "kernel": True}
    table = script.setting_table(args, {**dict.fromkeys(script.VARIANTS, fits), script.AUTHORS: None}, 10.0)
    assert "| authors' formulation | out of memory |" in table and "| 0.100 | 2.00 |" in table


def test_memory_runs_out_in_more_ways_than_one(script):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ):
        assert script.is_out_of_memory(error)
    assert not script.is_out_of_memory(RuntimeError("mat1 and mat2 must have the same dtype"))


def test_what_is_measured_is_kept_when_a_later_variant_fails(script, tmp_path, monkeypatch):
    fits = {"seconds": [1.0], "above_GB": 1.0, "total_GB": 2.0, "flops": 1e12, "used": 2.0, "kernel": False}

    def in_own_process(path, *argv):
        if "64" in argv[-5:]:
            raise RuntimeError("a variant failed")
        return dict(fits)

    monkeypatch.setattr(script.harness, "in_own_process", in_own_process)
    monkeypatch.setattr(script, "check_equal", lambda args: {"loss": 0.0, "gradients": 0.0})
    flags = "--device cpu --shapes tiny --tokens 32 64 --sequence 32 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *flags.split(), "--output", str(tmp_path)])
    with pytest.raises(RuntimeError, match="a variant failed"):
        script.main()
    assert list(json.loads((tmp_path / "gpu_step.json").read_text())["results"]) == ["tiny, 32 tokens"]
    assert "| 1000.0 (1000.0 to 1000.0) |" in (tmp_path / "gpu_step.md").read_text(), "one timing has a spread, too"


def test_bad_flags_end_in_one_sentence(script, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.parse(["--device", "cpu", "--tokens", "100"])
    assert "--tokens 100 is no multiple of --sequence 1024" in capsys.readouterr().err
