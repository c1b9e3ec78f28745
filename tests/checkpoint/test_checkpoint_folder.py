"""A checkpoint folder is whole or absent, whatever happens while it is written."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ldmole_ds.checkpoint import CheckpointError, list_checkpoints, problem_of, recover, save_folder
from tests.distributed_utils import run_distributed


def write_step(step: int):
    def write(folder: Path) -> list[Path]:
        (folder / "part").mkdir()
        (folder / "part" / "a.bin").write_bytes(bytes([step]) * 1000)
        (folder / "b.json").write_text("{}")
        return [folder / "b.json"]

    return write


@pytest.fixture
def run(tmp_path):
    for step in (2, 10, 9):
        save_folder(tmp_path / f"checkpoint-{step}", write_step(step))
    return tmp_path


def test_newest_step_first(run):
    (run / "checkpoint-x").mkdir()
    assert [p.name for p in list_checkpoints(run)] == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
    assert all(problem_of(p) is None for p in list_checkpoints(run))
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "part/a.bin").unlink(), "part/a.bin is missing"),
        (lambda f: (f / "part/a.bin").write_bytes(b"short"), "has 5 bytes, its manifest says 1000"),
        (lambda f: (f / "part/a.bin").write_bytes(bytes(999) + b"x"), "checksum"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "cannot be read"),
    ],
)
def test_damage_is_found(run, damage, words):
    damage(run / "checkpoint-10")
    assert words in problem_of(run / "checkpoint-10")


def test_readers_share_the_work_and_one_of_them_finds_the_damage(run):
    (run / "checkpoint-10/part/a.bin").write_bytes(bytes(999) + b"x")
    problems = [problem_of(run / "checkpoint-10", rank=rank, world_size=2) for rank in range(2)]
    assert sorted(p is None for p in problems) == [False, True]


def test_a_failed_write_leaves_the_old_checkpoint(run):
    before = (run / "checkpoint-10/manifest.json").read_text()

    def fail(folder):
        (folder / "half.bin").write_bytes(b"1")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="checkpoint-10 could not be saved: .*No space left.*--resume auto"):
        save_folder(run / "checkpoint-10", fail)
    assert (run / "checkpoint-10/manifest.json").read_text() == before
    assert problem_of(run / "checkpoint-10") is None
    assert not list(run.glob(".*"))


def test_a_replaced_checkpoint_returns_if_the_save_died_between_its_two_renames(run):
    (run / "checkpoint-10").rename(run / ".checkpoint-10.replaced")
    (run / ".checkpoint-11.saving").mkdir()
    recover(run)
    assert problem_of(run / "checkpoint-10") is None
    assert not list(run.glob(".*"))


def save_for_ever(run: Path, step: int) -> None:
    """Every checkpoint twice, the second time in the place of the first."""

    def write(folder: Path) -> list[Path]:
        for i in range(4):
            (folder / f"{i}.bin").write_bytes(bytes([step % 256]) * 100_000)
        return []

    while True:
        save_folder(run / f"checkpoint-{step}", write)
        save_folder(run / f"checkpoint-{step}", write)
        step += 1


def test_killed_at_any_moment(tmp_path):
    """kill -9 at random moments: the newest checkpoint is whole, and never older than the last one that was."""
    moments, newest, unfinished = random.Random(0), 0, 0
    for _ in range(25):
        child = os.fork()
        if child == 0:
            save_for_ever(tmp_path, newest + 1)
        time.sleep(moments.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += len(list(tmp_path.glob(".*")))
        recover(tmp_path)
        found = list_checkpoints(tmp_path)
        assert [problem_of(folder) for folder in found] == [None] * len(found)
        assert not list(tmp_path.glob(".*"))
        if found:
            step = int(found[0].name.split("-")[1])
            assert step >= newest and (found[0] / "0.bin").read_bytes()[:1] == bytes([step % 256])
            newest = step
    assert newest > 0 and unfinished > 0  # it was killed in the middle of saves


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount a file system")
    try:
        save_folder(disk / "checkpoint-1", write_step(1))

        def too_much(folder):
            (folder / "big.bin").write_bytes(bytes(2_000_000))
            return []

        with pytest.raises(CheckpointError, match="No space left"):
            save_folder(disk / "checkpoint-2", too_much)
        assert [p.name for p in list_checkpoints(disk)] == ["checkpoint-1"]
        assert problem_of(disk / "checkpoint-1") is None
        save_folder(disk / "checkpoint-3", write_step(3))  # the room is free again
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def save_with_a_failing_rank(rank, world_size, folder):
    def write(staging):
        if rank == 1:
            raise OSError("the disk of rank 1 is gone")
        (staging / "rank0.bin").write_bytes(b"0")
        return [staging / "rank0.bin"]

    try:
        save_folder(Path(folder) / "checkpoint-1", write, rank)
    except CheckpointError as error:
        return str(error)


@pytest.mark.distributed
def test_all_ranks_hear_of_one_that_could_not_write(tmp_path):
    first, second = run_distributed(save_with_a_failing_rank, 2, str(tmp_path))
    assert first == second and "the disk of rank 1 is gone (rank 1)" in first
    assert list_checkpoints(tmp_path) == [] and not list(tmp_path.glob(".*"))


def test_the_manifest_names_every_file(run):
    files = json.loads((run / "checkpoint-10/manifest.json").read_text())["files"]
    assert set(files) == {"part/a.bin", "b.json"}
    assert files["part/a.bin"][0] == 1000
