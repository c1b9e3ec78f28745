"""A small job on invented hardware, for the planner's tests."""

from collections import defaultdict

from transformers import LlamaConfig

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model.dispatch_plan import GroupShape
from ldmole_ds.planner import Batch, Cluster, Device, Job, ModelShape, Precision, Routing, StepTrace, Wire
from ldmole_ds.planner.trace import Trace

DEVICE = Device("invented", 10e9, 100e9, 10e9, 1e9, 0.0, False)


def small_hf_config(layers: int = 2, **changes) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, "vocab_size": 128, "num_hidden_layers": layers, **changes})


def cluster(nodes: int = 1, ranks_per_node: int = 4, device: Device = DEVICE) -> Cluster:
    return Cluster(device, nodes, ranks_per_node, Wire(1e-6, 1e9), Wire(1e-5, 1e8))


def shape(num_experts: int = 4, r: int = 2) -> ModelShape:
    """One group of two projections: D 10, O 6 and 4; one expert has 2 * (2 * 10 + 10) = 60 parameters."""
    config = LDMoLEConfig(num_experts=num_experts, r=r)
    groups = (GroupShape(num_experts, 10, [6, 4]),)
    return ModelShape("Invented", config, groups, 100, 80, 0, 1000, 200, (1000, 200), (100, 80), 50, 1)


def job(of_shape: ModelShape | None = None, *, on: Cluster | None = None, batch: Batch | None = None, **routing) -> Job:
    trace = StepTrace(Trace(peak=5000))
    return Job(
        of_shape or shape(),
        on or cluster(),
        batch or Batch(2, 10),
        Precision(),
        Routing(**{"active_experts": 4, **routing}),
        defaultdict(lambda: trace),
    )
