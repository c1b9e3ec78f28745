"""What one forward pass of the model shares with its adapted layers: the padding mask in, routing records out.

The model owns one `ContextHolder`; every input group holds the same one. There is no module-level state.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldmole_ds.ops.planned import is_planned_gpu


@dataclass(frozen=True)
class RoutingRecord:
    """The routing of one input group in one forward pass.

    Attributes:
        group: Name of the input group.
        logits_TGE: Router logits, float32, with their graph.
        probs_TGE: Routing weights, float32, zero for tokens that are not routed, with their graph. With ``sums`` on a
            GPU: in the dtype of the experts' products.
        lam_T: lambda per token, float32, or None for routers without one.
        mask_T: bool, True for tokens that are not padding; None when there is no padding mask.
        live_units_H: bool, lambda MLP hidden units that fired on some token; None for routers without one.
        sums: ``Routing.sums`` of `ldmole_ds.ops.fused_routing`, where the kernel has made them: statistics and losses
            come from them, with their graph, and not from the tensors above, which may then be without.
    """

    group: str
    logits_TGE: Tensor
    probs_TGE: Tensor
    lam_T: Tensor | None
    mask_T: Tensor | None
    live_units_H: Tensor | None
    sums: Tensor | None = None


@dataclass
class ForwardContext:
    """State of one call of the model's forward.

    Attributes:
        padding_mask: ``(B, S)`` bool, True for real tokens, or None.
        recording: Whether groups append to ``records`` (off while activation checkpointing recomputes).
        target_num_experts: k of the sparsity loss.
        records: In the order in which the groups ran.
    """

    padding_mask: Tensor | None = None
    recording: bool = True
    target_num_experts: int = 2
    records: list[RoutingRecord] = field(default_factory=list)
    _has_padding: bool | None = field(default=None, init=False)

    def has_padding(self) -> bool:
        """Whether some token may be padding. Looking into the mask would make a GPU wait, and cannot be traced."""
        if self._has_padding is None:
            mask = self.padding_mask
            if mask is None or mask.device.type != "cpu" or is_planned_gpu(mask) or torch.compiler.is_compiling():
                return mask is not None
            self._has_padding = bool(mask.logical_not().any())
        return self._has_padding

    def token_mask(self, x: Tensor) -> Tensor | None:
        """``(T,)`` mask of the rows of ``x (..., D)`` flattened, or None where the mask does not describe them."""
        mask = self.padding_mask
        if mask is None:
            return None
        if x.dim() == 4 and 1 in x.shape[1:3]:  # the one head of latent attention: (B, 1, S, D), or (B, S, 1, D)
            x = x.squeeze(1 if x.shape[1] == 1 else 2)
        if x.dim() == 3 and x.shape[0] == mask.shape[0]:
            # With a KV cache the mask covers past tokens too: the last columns are those of this call.
            if x.shape[1] <= mask.shape[1]:
                return mask[:, mask.shape[1] - x.shape[1] :].reshape(-1)
        elif x.dim() == 2 and x.shape[0] == mask.numel():
            return mask.reshape(-1)
        return None


class ContextHolder:
    """The slot through which groups find the running forward pass; ``current`` is None between passes.

    While ``enabled`` is False the adapted layers are their frozen layers alone. ``lock`` is held for a pass: groups
    keep what their members share, so one thread at a time runs the model, recomputation in backward included.
    """

    def __init__(self) -> None:
        self.current: ForwardContext | None = None
        self.enabled = True
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, bool]:
        return {"enabled": self.enabled}  # a lock can be neither copied nor pickled

    def __setstate__(self, state: dict[str, bool]) -> None:
        self.__init__()
        self.enabled = state["enabled"]

    @contextmanager
    def use(self, context: ForwardContext) -> Iterator[ForwardContext]:
        """Make ``context`` the current one for the duration."""
        with self.lock:
            previous, self.current = self.current, context
            try:
                yield context
            finally:
                self.current = previous

    def checkpoint_contexts(self):
        """``context_fn`` for non-reentrant checkpointing: recomputation sees the mask of its own forward pass.

        Two micro-batches may be in flight before the first backward, so "the last mask" would be the wrong one. The
        second pass does not record: auxiliary losses are counted once.
        """
        forward_context = self.current or ForwardContext()
        replay = ForwardContext(forward_context.padding_mask, False, forward_context.target_num_experts)
        return self.use(forward_context), self.use(replay)


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread (only recomputation calls a forward then)."""
    return torch._C._current_graph_task_id() != -1
