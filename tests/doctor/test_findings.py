"""What the doctor says about a machine or a job: one finding for each thing that is wrong, none for a good one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ldmole_ds.doctor.findings import before_start, of_job
from ldmole_ds.doctor.machine import RankFacts, StartFacts, rank_facts, start_facts
from ldmole_ds.doctor.support import TESTED

GOOD_START = StartFacts(
    host="one", address="10.0.0.1", interfaces=("lo", "eth0", "ib0"), locks=(), variables={}, gpu_driver=False
)
GOOD = RankFacts(
    rank=0,
    start=GOOD_START,
    device="cpu",
    device_memory=None,
    threads=1,
    cores=(0, 1),
    memory=1 << 34,
    free={"output": 1 << 40, "tmp": 1 << 40, "shm": 1 << 33},
    versions={name: highest for name, (_, highest) in TESTED.items()},
)
TWO_HOSTS = {"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}


def test_a_good_machine_has_no_findings():
    assert before_start(GOOD_START) == [] and of_job([GOOD, replace(GOOD, rank=1)]) == []


@pytest.mark.parametrize(
    ("change", "problem", "remedy"),
    [
        ({"variables": {"GLOO_SOCKET_IFNAME": "eth7"}}, "GLOO_SOCKET_IFNAME=eth7 names no interface", "eth0"),
        ({"variables": {"GLOO_SOCKET_IFNAME": "eth"}}, "GLOO_SOCKET_IFNAME=eth names no interface", "eth0"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "bond"}}, "NCCL_SOCKET_IFNAME=bond names no interface", "ib0"),
        ({"variables": TWO_HOSTS, "address": "127.0.1.1"}, "resolves to 127.0.1.1", "GLOO_SOCKET_IFNAME"),
        ({"variables": TWO_HOSTS, "address": None}, "does not resolve", "GLOO_SOCKET_IFNAME"),
        ({"locks": ("/cache/op/lock",)}, "/cache/op/lock was left", "rm /cache/op/lock"),
    ],
)
def test_before_the_start(change, problem, remedy):
    (finding,) = before_start(replace(GOOD_START, **change))
    assert problem in finding.problem and remedy in finding.remedy and str(finding).startswith("one: ")


@pytest.mark.parametrize(
    "change",
    [
        {"variables": {"GLOO_SOCKET_IFNAME": "eth0"}},
        {"variables": {"NCCL_SOCKET_IFNAME": "eth"}},  # a prefix
        {"variables": {"NCCL_SOCKET_IFNAME": "^docker"}},
        {"variables": {"NCCL_SOCKET_IFNAME": "=ib0,eth1"}},
        {"variables": {**TWO_HOSTS, "GLOO_SOCKET_IFNAME": "ib0"}, "address": "127.0.1.1"},
        {"variables": {"WORLD_SIZE": "4", "LOCAL_SIZE": "4"}, "address": None},
    ],
)
def test_what_only_looks_wrong(change):
    assert before_start(replace(GOOD_START, **change)) == []


def started(**change) -> dict:
    return {"start": replace(GOOD_START, **change)}


@pytest.mark.parametrize(
    ("change", "problem", "remedy"),
    [
        ({"versions": {**GOOD.versions, "deepspeed": "0.18.0"}}, "deepspeed 0.18.0 is outside", "--parity"),
        ({"threads": 4}, "1 rank(s) run 4 threads on 2 cores", "OMP_NUM_THREADS=2"),
        ({"free": {**GOOD.free, "shm": 64 << 20}}, "/dev/shm has 64 MiB free", "--shm-size"),
        ({"free": {**GOOD.free, "output": 0}}, "the output folder's disk has 0 MiB free", "--output_dir"),
        ({"free": {**GOOD.free, "tmp": 0}}, "the tmp folder's disk has 0 MiB free", "TMPDIR"),
        (started(variables={"DEEPSPEED_TIMEOUT": "30"}), "DEEPSPEED_TIMEOUT=30 has no effect", "--ddp_timeout"),
        (started(gpu_driver=True), "torch finds no GPU", "CUDA build"),
        (started(gpu_driver=True, variables={"DS_ACCELERATOR": "cpu"}), "DS_ACCELERATOR=cpu is set", "Unset"),
        (started(locks=("/cache/lock",)), "/cache/lock was left", "rm"),
    ],
)
def test_of_one_rank(change, problem, remedy):
    (finding,) = of_job([replace(GOOD, **change)])
    assert problem in finding.problem and remedy in finding.remedy


def test_of_several_ranks():
    crowd = of_job([replace(GOOD, rank=rank) for rank in range(3)])
    assert [f.remedy for f in crowd] == ["Start at most 2 ranks on this host"]
    other = replace(GOOD, rank=1, versions={**GOOD.versions, "torch": "2.12.0"}, start=replace(GOOD_START, host="two"))
    (finding,) = of_job([GOOD, other])
    assert finding.where == "two" and f"torch 2.12.0 (rank 0: {GOOD.versions['torch']})" in finding.problem


def test_the_facts_of_this_machine(monkeypatch, tmp_path):
    (tmp_path / "py310" / "op").mkdir(parents=True)
    lock = tmp_path / "py310" / "op" / "lock"
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "7")
    start = start_facts()
    assert start.locks == (str(lock),) and "lo" in start.interfaces and start.variables["DEEPSPEED_TIMEOUT"] == "7"
    facts = rank_facts(3, "cpu", Path(tmp_path) / "not" / "there", {"torch": "1"})
    assert facts.rank == 3 and facts.device == "cpu" and facts.device_memory is None and facts.host == start.host
    assert facts.memory > 0 and facts.free["output"] > 0 and facts.threads >= 1 and facts.cores
