"""What every test starts from: one thread, no network, a fixed seed, and the CPU accelerator where there is no GPU.

The variables are set at import, before torch and DeepSpeed are, and are inherited by the processes that tests start.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import random

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, and DeepSpeed imports Triton
torch.set_num_threads(1)

# Examples are drawn from a fixed seed and may be slow, so that a run says the same on every machine.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
