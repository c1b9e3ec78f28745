"""launch/doctor.py: alone and on two ranks, and its exit code where something is computed wrongly."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest

from ldmole_ds.training.runtime import UserError
from tests.distributed_utils import CAN_SHARE
from tests.launcher import ROOT, free_port, launch

TRANSPORT = "shared memory" if CAN_SHARE else "gloo ("
DOCTOR = str(ROOT / "launch/doctor.py")
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
runpy.run_path({DOCTOR!r}, run_name="__main__")
"""


def run(*command, **environment) -> subprocess.CompletedProcess:
    """Python with these arguments, in the checkout."""
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
def test_two_ranks_of_torchrun(tmp_path):
    path = tmp_path / "new" / "doctor.json"
    flags = ["--nproc_per_node", 2, "--master_port", free_port(), DOCTOR, "--json", path]
    done = run("-m", "torch.distributed.run", *flags, OMP_NUM_THREADS="8")
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "package ", "deepspeed ", "2 rank(s) on 1 host(s)",
        f"all-to-all among 2 rank(s), {TRANSPORT}", ": latency ", " GB/s", "tokens       pass", "what to fix",
    ):  # fmt: skip
        assert said in done.stdout
    result = json.loads(path.read_text())
    assert result["passed"] and [rank["rank"] for rank in result["ranks"]] == [0, 1]
    assert {"python", "torch", "transformers", "deepspeed", "accelerate"} <= set(result["ranks"][0]["versions"])
    crowded = sum(rank["threads"] for rank in result["ranks"]) > len(result["ranks"][0]["cores"])
    assert crowded == any("OMP_NUM_THREADS=" in finding["remedy"] for finding in result["findings"])


@pytest.mark.slow
def test_a_broken_exchange_in_one_process(broken_doctor):
    done = run(broken_doctor)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 rank(s) on 1 host(s)" in done.stdout and "all-to-all among 1 rank(s), gloo: latency " in done.stdout
    assert "tokens       FAIL" in done.stdout and "weights      pass" in done.stdout
    assert "exchange: the one of tokens is wrong. Do not train" in done.stdout


@pytest.mark.slow
def test_parity_that_holds(tmp_path):
    done = run(DOCTOR, "--parity", "--quick", "--json", tmp_path / "parity.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 1 ranks, ep 1, ZeRO 2, fp32 | dense |" in done.stdout and "1 of 1 layouts pass" in done.stdout
    result = json.loads((tmp_path / "parity.json").read_text())
    assert result["passed"] and [cell["passed"] for cell in result["cells"]] == [True]


@pytest.mark.slow
def test_parity_that_fails_on_two_ranks(broken_doctor):
    done = launch("--parity", "--quick", script=broken_doctor)
    assert done.returncode != 0, done.stdout
    rows = {line.split(" | ")[0]: line for line in done.stdout.splitlines() if line.startswith("| 2 ranks")}
    assert "| pass |" in rows["| 2 ranks, ep 1, ZeRO 2, fp32"]
    assert "| FAIL |" in rows["| 2 ranks, ep 2, ZeRO 2, fp32"] and "1 of 2 layouts pass" in done.stdout


def test_a_wrong_flag_is_one_sentence():
    parse = runpy.run_path(DOCTOR)["parse"]
    assert parse(["--parity", "--local_rank=1"]).parity
    for flags, said in ((["--json"], "--json: expected one argument"), (["--what"], "unrecognized arguments: --what")):
        with pytest.raises(UserError, match=said):
            parse(flags)
