"""The methods by name: adapter settings over a common base; and the settings that a sweep varies."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.planner.model_shape import shape_of_config


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
        name: As in ``--methods``, and the name of its folder.
        label: As in tables.
        settings: Fields of `LDMoLEConfig` that differ from the common ones.
        equal_parameters: Whether ``r`` is to give as many trainable parameters as LD-MoLE has.
    """

    name: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    equal_parameters: bool = False


BASELINE = "lora"
LDMOLE = "ld-mole"
METHODS = {
    method.name: method
    for method in (
        Method(LDMOLE, "LD-MoLE"),
        Method("ld-mole-per-layer", "LD-MoLE, lambda per layer", {"lambda_sharing": "per_layer"}),
        Method("ld-mole-fixed", "LD-MoLE, fixed lambda", {"router": "sparsegen_fixed"}),
        Method("ld-mole-paper", "LD-MoLE, authors' lambda start", {"lambda_init": "paper"}),
        Method("mola-8888", "MoLA 8888", {"router": "topk", "experts_per_layer": [8, 8, 8, 8]}),
        Method("mola-2468", "MoLA 2468", {"router": "topk", "experts_per_layer": [2, 4, 6, 8]}),
        Method("remole", "ReMoLE", {"router": "relu"}),
        Method("softmax", "dense softmax", {"router": "softmax"}),
        Method(BASELINE, "plain LoRA, equal rank", {"router": "lora"}),
        Method("lora-params", "plain LoRA, equal parameters", {"router": "lora"}, equal_parameters=True),
    )
}

# What --sweep varies, and the values unless others are given.
SWEEPS: dict[str, tuple[float, ...]] = {
    "target_num_experts": (1, 2, 4, 8),
    "sparsity_loss_weight": (0.0, 0.5, 1.0, 2.0, 4.0),
    "load_balancing_loss_weight": (0.0, 0.1, 1.0, 10.0),
    "lambda_hidden_size": (32, 128, 256, 512),
    "r": (2, 4, 8, 16),
    "num_experts": (2, 4, 8, 16),
}


def methods_of(names: str) -> list[Method]:
    """The methods of a comma-separated list, plain LoRA among them and first.

    Raises:
        ValueError: A name is not known or occurs twice, or there is none.
    """
    found: list[Method] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"--methods {name!r} is not known: {hint}choose among {', '.join(METHODS)}")
        if METHODS[name] in found:
            raise ValueError(f"--methods names {name} twice: name each method once")
        found.append(METHODS[name])
    if not found:
        raise ValueError(f"--methods is empty: name one or several of {', '.join(METHODS)}")
    return with_baseline(found)


def with_baseline(methods: list[Method]) -> list[Method]:
    """Plain LoRA first: it is what every other method is measured against."""
    return [METHODS[BASELINE], *(method for method in methods if method.name != BASELINE)]


def sweep_of(setting: str, values: str | None, of: Method, common: LDMoLEConfig) -> list[Method]:
    """One variant of a method for each value of one setting.

    With ``r``, ``lora_alpha`` follows, so that the scale ``lora_alpha / r`` stays what it is.

    Args:
        setting: One of `SWEEPS`.
        values: With commas between them; None: those of `SWEEPS`.
        of: The method that is varied.
        common: Settings of all methods.

    Raises:
        ValueError: A value is not a number of the setting's kind, or occurs twice, or there is none.
    """
    kind = type(getattr(LDMoLEConfig(), setting))
    try:
        found = list(SWEEPS[setting]) if values is None else [kind(v) for v in values.split(",") if v.strip()]
    except ValueError as error:
        kinds = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"--sweep_values {values}: {setting} takes {kinds} with commas between them") from error
    if not found or len(set(found)) < len(found):
        raise ValueError(f"--sweep_values {values!r}: give one or several different values of {setting}")
    scale = {value: {"lora_alpha": common.scaling * value} if setting == "r" else {} for value in found}
    return [
        Method(f"{setting}={value:g}", f"{setting} {value:g}", {**of.settings, setting: value, **scale[value]})
        for value in found
    ]


def with_equal_parameters(method: Method, common: LDMoLEConfig, model_config: Any) -> Method:
    """Plain LoRA with the rank whose number of trainable parameters is nearest to LD-MoLE's on this model.

    ``lora_alpha`` follows the rank, so that the scale is that of all methods.

    Args:
        method: With ``equal_parameters``.
        common: Settings of all methods.
        model_config: Hugging Face configuration of the base model.
    """
    moe = shape_of_config(model_config, common)
    one = shape_of_config(model_config, dataclasses.replace(common, router="lora", r=1))
    rank = max(1, round((moe.trainable - moe.saved_parameters) / (one.trainable - one.saved_parameters)))
    settings = {**method.settings, "r": rank, "lora_alpha": common.scaling * rank}
    return Method(method.name, f"{method.label} (r {rank})", settings)
