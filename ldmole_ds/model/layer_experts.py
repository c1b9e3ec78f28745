"""How many experts each layer gets (MoLA, arXiv 2402.08562: more experts in higher layers)."""

from __future__ import annotations

import re

from ldmole_ds.config import LDMoLEConfig


def _layer_index(name: str) -> int | None:
    """The number of the layer in a module's name: 3 in ``model.layers.3.mlp.up_proj``."""
    numbers = [int(part) for part in name.split(".") if re.fullmatch(r"\d+", part)]
    return numbers[0] if numbers else None


def expert_counts(config: LDMoLEConfig, names: list[str]) -> dict[str, int]:
    """Experts of the projections ``names``: ``num_experts``, or what ``experts_per_layer`` says of their layer.

    With n counts for L layers, layer i has the count at ``i * n // L``.

    Raises:
        ValueError: A projection is in no numbered layer, or there are more counts than layers.
    """
    counts = config.experts_per_layer
    if counts is None:
        return dict.fromkeys(names, config.num_experts)
    layers = {name: _layer_index(name) for name in names}
    homeless = [name for name, layer in layers.items() if layer is None]
    if homeless:
        raise ValueError(f"experts_per_layer: {homeless[0]} is in no numbered layer: remove it from target_modules")
    num_layers = 1 + max(layers.values())
    if len(counts) > num_layers:
        raise ValueError(f"experts_per_layer has {len(counts)} counts, but the model has {num_layers} layers")
    return {name: counts[layer * len(counts) // num_layers] for name, layer in layers.items()}
