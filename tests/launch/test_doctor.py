"""launch/doctor.py: alone and on two ranks, and its exit code where something is computed wrongly."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.launcher import ROOT, free_port, launch

# The doctor of a job in which every result that comes back from another rank is 1 % too large.
BROKEN = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from ldmole_ds.distributed import expert_exchange

class TooLarge(expert_exchange.Exchange):
    def wait(self):
        rows = super().wait()
        return rows * 1.01 if self._phase == "combine" else rows

expert_exchange.Exchange = TooLarge
runpy.run_path({str(ROOT / "launch/doctor.py")!r}, run_name="__main__")
"""


def run(*command, **environment) -> subprocess.CompletedProcess:
    """A command of this environment, in the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def broken_doctor(tmp_path):
    script = tmp_path / "broken_doctor.py"
    script.write_text(BROKEN)
    return str(script)


@pytest.mark.slow
def test_one_process(tmp_path):
    done = run("launch/doctor.py", "--json", tmp_path / "new" / "doctor.json")
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("deepspeed  ", "1 rank(s) on 1 host(s)", "all-to-all among 1 rank(s): latency", "what to fix"):
        assert said in done.stdout
    result = json.loads((tmp_path / "new" / "doctor.json").read_text())
    assert result["passed"] and [check["calls"] for check in result["exchange"]] == [5, 2]
    assert {"python", "torch", "transformers", "deepspeed", "accelerate"} <= set(result["ranks"][0]["versions"])
    assert isinstance(result["findings"], list) and len(result["link"]) == 24


@pytest.mark.slow
def test_two_ranks_of_torchrun():
    flags = ["--nproc_per_node", 2, "--master_port", free_port()]
    done = run("-m", "torch.distributed.run", *flags, "launch/doctor.py", OMP_NUM_THREADS="8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s) on 1 host(s)" in done.stdout and "GB/s" in done.stdout
    assert "run 16 threads on" in done.stdout and "export OMP_NUM_THREADS=" in done.stdout


@pytest.mark.slow
def test_parity_on_two_ranks(tmp_path):
    done = launch("--parity", "--quick", "--json", tmp_path / "parity.json", script="launch/doctor.py")
    assert done.returncode == 0, done.stdout
    assert "| 2 ranks, ep 2, ZeRO 2, fp32 | dense |" in done.stdout and "2 of 2 layouts pass" in done.stdout
    result = json.loads((tmp_path / "parity.json").read_text())
    assert result["passed"] and [cell["passed"] for cell in result["cells"]] == [True, True]


@pytest.mark.slow
def test_a_broken_exchange_fails(broken_doctor):
    done = launch("--parity", "--quick", script=broken_doctor)
    assert done.returncode != 0, done.stdout
    rows = {line.split(" | ")[0]: line for line in done.stdout.splitlines() if line.startswith("| 2 ranks")}
    assert "| pass |" in rows["| 2 ranks, ep 1, ZeRO 2, fp32"]
    assert "| FAIL |" in rows["| 2 ranks, ep 2, ZeRO 2, fp32"] and "1 of 2 layouts pass" in done.stdout


@pytest.mark.slow
def test_a_broken_exchange_fails_in_one_process_too(broken_doctor):
    done = run(broken_doctor)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tokens       FAIL" in done.stdout and "weights      pass" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--json"], "--json: expected one argument"), (["--what"], "unrecognized"), (["--ep_size", "2"], "1 ranks")],
)
def test_a_wrong_flag_is_one_line(flags, said):
    done = run("launch/doctor.py", *flags)
    assert done.returncode == 2 and said in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")], done.stderr
