"""The place of a process, from what each launcher exports."""

import socket

import pytest

from ldmole_ds.training import network, ranks
from ldmole_ds.training.ranks import discover_ranks, first_host, tasks_per_node

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-a-12@1", "PMIX_RANK": "3",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# As srun sets them for rank 5 of 7 on nodes of 2, 2, 2 and 1.
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "localhost,gpu[03-05]", "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0", "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3",
}  # fmt: skip


def place(environ: dict) -> tuple:
    found = discover_ranks(environ)
    assert found is not None
    assert environ["RANK"] == str(found.rank) and environ["LOCAL_WORLD_SIZE"] == str(found.local_world_size)
    return (found.source, found.rank, found.world_size, found.local_rank, found.local_world_size, found.master_addr)


def test_torch_style():
    meet = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    deepspeed = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", **meet}
    assert place(deepspeed) == ("deepspeed", 3, 4, 1, 2, "10.0.0.1")
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    assert place({**torchrun, **meet}) == ("torchrun", 3, 4, 1, 2, "10.0.0.1")
    assert place({"RANK": "0", "WORLD_SIZE": "1"}) == ("RANK", 0, 1, 0, 1, "127.0.0.1")
    with pytest.raises(ValueError, match="RANK is set but WORLD_SIZE is not"):
        discover_ranks({"RANK": "0"})


def test_a_torch_style_launcher_inside_a_slurm_job_wins():
    assert place({**SLURM, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"})[:3] == (
        "RANK", 0, 2)  # fmt: skip


def test_mpi_on_one_host_needs_no_address():
    one_host = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert place(one_host) == ("Open MPI", 3, 4, 1, 4, "127.0.0.1")
    # Ranks of one job agree on the port, another job on the host has its own.
    other = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a-13@1"}
    discover_ranks(other)
    assert 20000 <= int(one_host["MASTER_PORT"]) < 30000 and other["MASTER_PORT"] != one_host["MASTER_PORT"]
    assert place(dict(MPICH)) == ("MPICH", 1, 2, 1, 2, "127.0.0.1")


def test_mpi_on_several_hosts_takes_the_address_given_else_asks_mpi(monkeypatch):
    assert place({**OPEN_MPI, "MASTER_ADDR": "a"}) == ("Open MPI", 3, 4, 1, 2, "a")
    asked = []
    monkeypatch.setattr(ranks, "_ask_mpi", lambda *args: asked.append(args) or ranks.Ranks("m", 3, 4, 1, 2, "a", 1))
    assert place(dict(OPEN_MPI))[0] == "m" and "MASTER_ADDR" in asked[0][1]
    assert place({"PMIX_RANK": "3"})[0] == "m" and len(asked) == 2


def test_without_mpi4py_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(ValueError, match="MASTER_ADDR is not set and mpi4py cannot be loaded .* mpirun -x MASTER_ADDR"):
        discover_ranks(dict(OPEN_MPI))


def test_slurm():
    assert place(dict(SLURM)) == ("Slurm", 5, 7, 1, 2, "localhost")
    # A name that means nothing here: the address of the node where srun was called.
    unknown = {**SLURM, "SLURM_STEP_NODELIST": "no-such-node-[1-4].invalid"}
    assert place(unknown)[-1] == "10.1.2.3"
    del unknown["SLURM_LAUNCH_NODE_IPADDR"]
    for name in ("RANK", "MASTER_ADDR"):
        del unknown[name]
    assert place(unknown)[-1] == "no-such-node-1.invalid"
    one_node = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"}
    assert place(one_node)[-2:] == (7, "127.0.0.1")
    ports = []
    for step in ("0", "0", "1"):
        environ = {**SLURM, "SLURM_STEP_ID": step}
        discover_ranks(environ)
        ports.append(environ["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]
    with pytest.raises(ValueError, match="export MASTER_ADDR"):
        discover_ranks({k: v for k, v in SLURM.items() if "NODELIST" not in k and "IPADDR" not in k})


def test_mpirun_inside_a_slurm_job_is_mpi_and_a_batch_shell_is_no_rank():
    assert place({**SLURM, **MPICH})[:3] == ("MPICH", 1, 2)
    batch_shell = {k: v for k, v in SLURM.items() if "STEP" not in k}
    assert discover_ranks(batch_shell) is None and "RANK" not in batch_shell
    assert discover_ranks({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"}) is None


def test_slurms_short_forms():
    assert first_host("gpu[03-05,9],cpu1") == "gpu03"
    assert first_host("cpu1,gpu[03-05]") == "cpu1"
    assert first_host("r[2-3]n[10,12].site") == "r2n10.site"
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("8") == [8]
    with pytest.raises(ValueError, match="cannot be read"):
        tasks_per_node("2(x")


def test_interfaces(monkeypatch):
    addresses = network.interface_addresses()
    assert addresses["lo"] == "127.0.0.1"
    # On loopback gloo needs no help.
    assert network.route_to("127.0.0.1") is None
    environ: dict = {}
    assert network.choose_interface("auto", "127.0.0.1", environ) is None and environ == {}
    monkeypatch.setattr(network, "route_to", lambda host: "eth7")
    assert network.choose_interface("auto", "a", environ) == "eth7" and environ == {"GLOO_SOCKET_IFNAME": "eth7"}
    environ = {"GLOO_SOCKET_IFNAME": "mine"}
    assert network.choose_interface("auto", "a", environ) is None and environ == {"GLOO_SOCKET_IFNAME": "mine"}
    assert network.choose_interface("ib9,lo", "a", environ) == "lo"
    assert environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    with pytest.raises(ValueError, match="--network_interface ib9: .* has only lo.*or auto"):
        network.choose_interface("ib9", "a", environ)


def test_the_own_address_is_never_loopback_where_there_is_another(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(network, "interface_addresses", lambda: {"lo": "127.0.0.1", "eth0": "10.9.8.7"})
    assert network.own_address() == "10.9.8.7"
