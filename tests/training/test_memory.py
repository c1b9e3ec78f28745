"""Peak memory of training alone, and of the whole run."""

import sys

import pytest
import torch

from ldmole_ds.training import memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets a process's peak")
def test_what_came_before_training_is_not_counted(monkeypatch):
    monkeypatch.setattr(memory, "_forgotten", 0)
    big = torch.ones(64 * 2**20 // 4)  # 64 MB that loading needed and training does not
    del big
    before = memory.peak_memory_bytes()
    measured = memory.MemoryOfTraining()
    model = torch.ones(16 * 2**20 // 4)
    measured.on_train_begin(None, None, None)
    step = torch.ones(32 * 2**20 // 4)
    del step
    measured.on_train_end(None, None, None)
    # The allocator's own needs are a few megabytes.
    assert 48 * 2**20 <= measured.bytes + 2**20 and measured.bytes < 60 * 2**20
    assert memory.peak_memory_bytes() >= before and len(model)
