"""benchmarks/launches.py: how many operations a GPU is started for, which a step must not have more of than now."""

import importlib
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton's kernels are counted: pip install triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    script = importlib.import_module("launches")
    monkeypatch.setenv(script.SWITCH, os.environ.get(script.SWITCH, "auto"))  # the script sets it
    return script


def operations(script, variant):
    args = script.parse(["--device", "cuda" if torch.cuda.is_available() else "cpu"])
    return sum(script.of_a_layer(args, variant, "llama"), start=script.Counter())


@pytest.mark.slow
def test_one_node_for_a_group_saves_almost_half_of_the_operations(script):
    whole, apart = (operations(script, variant) for variant in (script.OURS, script.APART))
    # Four groups, each with one kernel in each direction.
    assert whole["a Triton kernel"] == apart["a Triton kernel"] == 8
    assert whole.total() < 0.6 * apart.total() and whole.total() <= 184


@pytest.mark.slow
def test_the_authors_formulation_has_many_times_as_many(script):
    assert operations(script, script.AUTHORS).total() > 5 * operations(script, script.OURS).total()


def test_lora_is_what_all_are_compared_with(script, capsys):
    with pytest.raises(SystemExit):
        script.parse(["--variants", "ours"])
    assert "--variants must name 'PEFT LoRA'" in capsys.readouterr().err
