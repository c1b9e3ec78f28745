"""Checks a DeepSpeed config before anything is started: what cannot work with partitioned experts is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldmole_ds.training.runtime import UserError

_SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "tensor_parallel", "pipeline")
_OFFLOAD = ("offload_optimizer", "offload_param")


def read_ds_config(path: str) -> dict[str, Any]:
    """The JSON of ``--deepspeed``.

    Raises:
        UserError: Missing, or not a JSON object of such objects.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--deepspeed {path} does not exist: give a DeepSpeed config, such as ds_configs/zero2.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"--deepspeed {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path} must hold a JSON object")
    sections = {name: config.get(name) for name in _SECTIONS}
    _refuse_other_than_objects(sections, path)
    zero = sections["zero_optimization"] or {}
    _refuse_other_than_objects({f"zero_optimization.{name}": zero.get(name) for name in _OFFLOAD}, path)
    return config


def _refuse_other_than_objects(sections: dict[str, Any], path: str) -> None:
    for name, value in sections.items():
        if value is not None and not isinstance(value, dict):
            raise UserError(f"--deepspeed {path}: {name} must be a JSON object of its settings, got {value!r}")


def _size(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def check_ds_config(config: dict[str, Any], path: str) -> None:
    """Refuse settings that are not supported, by name.

    Raises:
        UserError: Names the key and the remedy.
    """
    zero = config.get("zero_optimization") or {}
    tensor_parallel = config.get("tensor_parallel") or {}
    pipeline = config.get("pipeline") or {}
    unsupported = {
        "tensor_parallel": _size(tensor_parallel.get("autotp_size")) > 1
        or _size((tensor_parallel.get("tp") or {}).get("tp_size")) > 1,
        "pipeline": _size(pipeline.get("stages")) > 1 or pipeline.get("stages") == "auto",
        "sequence_parallel_size": _size(config.get("sequence_parallel_size")) > 1,
        "expert_parallel": bool(config.get("expert_parallel")),
        "use_data_before_expert_parallelism": bool(config.get("use_data_before_expert_parallelism")),
        "zero_optimization.zero_hpz_partition_size": _size(zero.get("zero_hpz_partition_size")) > 1,
        "zero_optimization.mics_shard_size": _size(zero.get("mics_shard_size")) > 1,
        "zero_optimization.offload_param": (zero.get("offload_param") or {}).get("device", "none") != "none",
    }
    for key, present in unsupported.items():
        if present:
            raise UserError(f"--deepspeed {path}: {key} is not supported yet: remove it from the config")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"--deepspeed {path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")


def check_device(*, bf16: bool, fp16: bool) -> None:
    """Refuse an engine in a dtype that DeepSpeed does not compute in on this device; it would end in a traceback.

    Raises:
        UserError: Names the flag, and what to use instead.
    """
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    name = "CPU" if device.device_name() == "cpu" else device.device_name()
    if bf16 and not device.is_bf16_supported():
        raise UserError(f"--bf16: DeepSpeed does not compute in bfloat16 on this {name}: leave it out, for float32")
    if fp16 and not device.is_fp16_supported():
        instead = "take --bf16 and its config" if device.is_bf16_supported() else "leave it out, for float32"
        raise UserError(f"--fp16: DeepSpeed does not compute in float16 on this {name}: {instead}")


def check_precision(config: dict[str, Any], path: str, *, bf16: bool, fp16: bool) -> None:
    """Refuse a config that enables half precision where the command line does not: adapters would be float32.

    Raises:
        UserError: Names the flag, and the way to float32 adapters on a half-precision base.
    """
    for name, flag in (("bf16", bf16), ("fp16", fp16)):
        if (config.get(name) or {}).get("enabled") is True and not flag:
            raise UserError(
                f"--deepspeed {path} enables {name}: add --{name}, or, for float32 adapters on a half-precision base, "
                "take a config without it and --dtype bfloat16"
            )
