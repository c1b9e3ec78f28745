"""The planner's flags: the machines and the plan; model, adapter and batch as in training."""

from __future__ import annotations

import typing
from argparse import Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass

from ldmole_ds.training.flags import Formatter, field_with_help, raise_user_error


@dataclass
class ClusterArguments:
    """The machines."""

    _argument_group_name: typing.ClassVar[str] = "cluster"

    nodes: int = field_with_help(1, "Machines.")
    gpus_per_node: int = field_with_help(8, "Devices, and so ranks, of each machine.")
    gpu: str = field_with_help(
        "h100", "A known device (h200, h100, a100-80gb, a100-40gb, l40s), or a file from --calibrate."
    )
    memory_gb: float | None = field_with_help(None, "Memory of a device in GB (10^9 bytes), instead of the preset's.")
    tflops: float | None = field_with_help(
        None, "Half-precision TFLOPS that products reach, instead of half the preset's peak."
    )
    intra_bandwidth_gbs: float | None = field_with_help(None, "GB/s that a rank sends to others of its node (beta).")
    intra_latency_us: float | None = field_with_help(None, "Microseconds per message inside a node (alpha).")
    inter_bandwidth_gbs: float | None = field_with_help(None, "GB/s that a rank sends to other nodes.")
    inter_latency_us: float | None = field_with_help(None, "Microseconds per message between nodes.")


@dataclass
class PlanArguments:
    """What is planned, and what comes out."""

    _argument_group_name: typing.ClassVar[str] = "plan"

    per_device_train_batch_size: int = field_with_help(8, "Rows of a micro-step on one rank.")
    max_length: int = field_with_help(512, "Tokens per row; all rows are taken to be as long.")
    gradient_accumulation_steps: int = field_with_help(1, "Micro-steps per optimizer step.")
    global_batch_size: int | None = field_with_help(
        None, "Rows of an optimizer step over all ranks; gradient_accumulation_steps follows from it."
    )
    bf16: bool = field_with_help(False, "bfloat16 engine: base and adapters in 2 bytes, float32 masters.")
    fp16: bool = field_with_help(False, "float16 engine, in the same way.")
    activation_checkpointing: bool = field_with_help(False, "Recompute each layer in backward instead of keeping it.")
    ep_size: str = field_with_help("auto", "Compare this one only; auto compares all that divide ranks and experts.")
    expert_dispatch: str = field_with_help(
        "auto", "Compare this one only: tokens or weights.", choices=("tokens", "weights", "auto")
    )
    zero_stage: int | None = field_with_help(None, "Compare this ZeRO stage only; default: all.")
    dispatch_chunk_tokens: int = field_with_help(
        0, "As in training: bounds the rows that a rank holds for others. 0: no bound."
    )
    active_experts: float | None = field_with_help(
        None, "Experts that a token uses on average; default: what the router is held to, else all."
    )
    skew: float = field_with_help(1.0, "Load of the fullest rank over the mean: 1 is balanced.")
    json: str | None = field_with_help(None, "Write the whole plan to this file.")
    write_config: str | None = field_with_help(
        None, "Write ds_config.json for the recommended layout into this folder, and print the launch command."
    )
    calibrate: str | None = field_with_help(
        None,
        "Measure this machine with DeepSpeed steps of a small reference model (half a minute), write this file (for "
        "--gpu), and stop. Under a launcher also the link, and what expert parallelism and ZeRO-3 cost in a step.",
    )


class _Formatter(Formatter, RawDescriptionHelpFormatter):
    """The description above keeps its lines."""


def parse_flags(argv: list[str], description: str) -> Namespace:
    """Flags of cluster and plan, and those of model, adapter and batch as in training."""
    from transformers import HfArgumentParser

    from ldmole_ds.config import PRESETS
    from ldmole_ds.training.argument_groups import AdapterArguments, ModelArguments

    groups = (ModelArguments, AdapterArguments, ClusterArguments, PlanArguments)
    parser = HfArgumentParser(
        groups, prog="launch/plan.py", description=description, formatter_class=_Formatter, allow_abbrev=False
    )
    parser.error = raise_user_error
    preset = parser.parse_known_args(argv)[0].preset
    if preset is not None and preset not in PRESETS:
        raise_user_error(f"--preset {preset} is not known: use one of {', '.join(PRESETS)}")
    parser.set_defaults(**(PRESETS[preset] if preset else {}))
    flags, rest = parser.parse_known_args(argv)
    if rest:
        raise_user_error(f"unknown argument {' '.join(rest)}")
    return flags
