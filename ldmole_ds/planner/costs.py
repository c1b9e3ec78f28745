"""What a training step costs the host beyond products, memory and bytes on the wire.

A collective of expert parallelism packs and unpacks rows, starts operations, and waits for the ranks that arrive later;
DeepSpeed's engine touches every trainable tensor and every bucket of gradients, and under stage 3 every parameter
whenever a module uses it. These costs hardly depend on sizes. `ldmole_ds.planner.calibrate` measures them in steps of a
reference model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ldmole_ds.planner.layout import Layout

# Not calibrated: operations that the host starts for one collective (pack, send, unpack), and for one parameter that a
# module fetches under ZeRO-3 (hooks in Python). Assumptions, as the presets' speeds are.
_STARTED = {"collective": 10, "fetch": 5}
# Neither are values moved for one that is updated: AdamW as about ten operations on whole tensors (21), and the
# engine's copies of the gradient, its norm, clipping, and the copy of the weight (9).
_UPDATE_VALUES = 30


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one rank, the slowest.

    Attributes:
        tensor: Of an optimizer step, for each trainable tensor: the engine's hooks and buckets.
        reduction: For each bucket of gradients that the engine reduces, on top of the link's.
        fetch: Under ZeRO-3, for each parameter that a pass fetches and lets go, on top of the gather itself; None: not
            measured.
        tokens: Of each collective of ``--expert_dispatch tokens``, by ep_size, on top of the link's.
        weights: The same of ``weights``.
        value: Of an optimizer step, for each value that the rank updates; None: not measured.
        gradient: Of a backward pass, for each value of which the rank has a gradient: what the engine does with it.
    """

    tensor: float = 0.0
    reduction: float = 0.0
    fetch: float | None = None
    tokens: Mapping[int, float] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)
    value: float | None = None
    gradient: float = 0.0

    def collective(self, layout: Layout, op_seconds: float) -> float:
        """Of one collective in this layout; ep_size as near as it was measured.

        Args:
            layout: With ep_size above 1.
            op_seconds: What starting an operation costs, from which an unmeasured collective is assumed.
        """
        measured = self.tokens if layout.dispatch == "tokens" else self.weights
        if not measured:
            return _STARTED["collective"] * op_seconds
        return measured[min(measured, key=lambda size: abs(math.log(size / layout.ep_size)))]

    def fetching(self, op_seconds: float) -> float:
        """Of one parameter in one pass; without a measurement assumed as in `collective`."""
        return _STARTED["fetch"] * op_seconds if self.fetch is None else self.fetch

    def updating(self, bandwidth: float) -> float:
        """Of one value in an optimizer step; without a measurement what moving float32 values takes."""
        return 4.0 * _UPDATE_VALUES / bandwidth if self.value is None else self.value
