"""``expert_dispatch auto`` measures the link where training will use it."""

import pytest
import torch

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.distributed import CommStats, ExpertParallel
from ldmole_ds.distributed.link import Link
from ldmole_ds.model import dispatch_plan
from ldmole_ds.model.dispatch_plan import DispatchSettings, GroupShape, plan_dispatch

PAIR = ExpertParallel(2, 0, ep_group=object(), edp_group=object(), world_size=2, rank=0)


@pytest.mark.parametrize(
    ("backend", "model_on", "measured_on"),
    [("nccl", "cpu", "cuda:1"), ("nccl", "cuda:0", "cuda:0"), ("gloo", "cpu", "cpu")],
)
def test_the_link_is_measured_from_where_the_backend_sends(monkeypatch, backend, model_on, measured_on):
    """A model is on the CPU when it gets its experts, and NCCL takes no tensor from there."""
    devices = []

    def measure(topology, device, itemsize):
        devices.append(device)
        return Link(1e-6, 1e9)

    monkeypatch.setattr(dispatch_plan, "measure_link", measure)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    shapes, settings = [GroupShape(8, 16, [16, 8])], DispatchSettings("auto")
    device = torch.device(model_on)
    dispatchers, text = plan_dispatch(settings, shapes, LDMoLEConfig(), PAIR, CommStats(), itemsize=4, device=device)
    assert devices == [torch.device(measured_on)] and len(dispatchers) == 1 and text.startswith("auto: ")
