"""How a forward pass of a model with experts runs: its context, its statistics, its auxiliary losses."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.distributed import CommStats, ExpertParallel, WeightGatherDispatcher
from ldmole_ds.layers import ForwardContext, InputGroup, LambdaMLP
from ldmole_ds.layers.context import ContextHolder
from ldmole_ds.model.adaptive_l1 import AdaptiveL1
from ldmole_ds.model.aux_losses import Normalizer, auxiliary_losses
from ldmole_ds.model.hf_facade import adopt_signature, padding_mask_of, with_aux_losses
from ldmole_ds.model.quantized import drop_quantization_state, has_quantized_layers
from ldmole_ds.model.routing_batch import RoutingBatch
from ldmole_ds.model.routing_stats import RoutingStatistics


class AdaptedForward(nn.Module):
    """The base model between its input groups: opens a context, runs, adds the auxiliary losses.

    What a user does with the model besides running it is in `LDMoLEModel`.
    """

    def __init__(
        self,
        base_model: nn.Module,
        adapter_config: LDMoLEConfig,
        input_groups: list[InputGroup],
        lambda_mlps: dict[str, LambdaMLP],
        topology: ExpertParallel,
        holder: ContextHolder,
        comm_stats: CommStats,
        expert_dispatch: str,
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.adapter_config = adapter_config
        self.input_groups = nn.ModuleList(input_groups)
        self.lambda_mlps = nn.ModuleDict(lambda_mlps)
        self.topology, self.comm_stats, self.expert_dispatch = topology, comm_stats, expert_dispatch
        self.routing = RoutingStatistics({g.name: g.members for g in input_groups})
        self.adaptive_l1: AdaptiveL1 | None = None
        if adapter_config.router == "relu":
            control = (adapter_config.l1_initial_weight, adapter_config.l1_growth, adapter_config.target_num_experts)
            self.adaptive_l1 = AdaptiveL1(*control, device=self._loss_device())
        # In the order of the model, which is that of all ranks.
        gathering = dict.fromkeys(
            g.dispatcher for g in input_groups if isinstance(g.dispatcher, WeightGatherDispatcher)
        )
        self._gathering = [(d, [g for g in input_groups if g.dispatcher is d]) for d in gathering]
        self._holder = holder
        self._hooks = [
            base_model.register_forward_pre_hook(self._open_context, with_kwargs=True),
            base_model.register_forward_hook(self._close_context, always_call=True),
        ]
        adopt_signature(self, base_model)
        if has_quantized_layers(base_model):
            self.register_state_dict_post_hook(drop_quantization_state)
        config = getattr(base_model, "config", None)
        if config is not None:
            ignored = list(getattr(config, "keys_to_ignore_at_inference", None) or ["past_key_values"])
            config.keys_to_ignore_at_inference = [*ignored, *({"aux_losses"} - set(ignored))]

    def release_base(self) -> None:
        """Leave the base model without a trace of the wrapper; this model cannot be used any more."""
        for hook in self._hooks:
            hook.remove()
        vars(getattr(self.base_model, "config", self)).pop("keys_to_ignore_at_inference", None)

    @torch.compiler.disable(recursive=False)  # torch.compile takes the base model; what is around it depends on data
    def forward(
        self,
        *args: Any,
        num_routed_tokens: Tensor | float | None = None,
        gradient_accumulation_steps: int = 1,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, with auxiliary losses.

        Args:
            *args: As the base model.
            num_routed_tokens: Routed tokens of the whole optimizer step over all ranks; default: of this call. With
                ragged micro-batches only the whole step's count makes the losses independent of the split.
            gradient_accumulation_steps: Micro-steps per optimizer step, with ``num_routed_tokens``.
            padding_mask: (B, S), True for real tokens, where the attention mask does not say it: packed rows have none.
            **kwargs: As the base model. With ``num_items_in_batch`` the loss is this rank's share of the global sum
                (the Trainer multiplies by the number of ranks), else its mean over ranks is the global loss.

        Returns:
            The base model's output. With labels it has ``aux_losses``: ``{"sparsity", "load_balancing",
            "router_z"}``, unweighted float32 scalars with their graph.

        Raises:
            FloatingPointError: Non-finite routing, on every rank, naming the layer.
        """
        with self._holder.lock:
            if not self._holder.enabled:
                return self.base_model(*args, **kwargs)
            bound, context = self._begin(args, kwargs, gradient_accumulation_steps, padding_mask)
            try:
                with self._holder.use(context):
                    outputs = self.base_model(*args, **kwargs)
            finally:
                self._clear_pending()
            return self._finish(outputs, context, bound, num_routed_tokens, gradient_accumulation_steps)

    @torch.compiler.disable
    def _begin(
        self, args: tuple, kwargs: dict, accumulation_steps: int, padding_mask: Tensor | None
    ) -> tuple[dict[str, Any], ForwardContext]:
        """The arguments by name and the pass's context."""
        self.comm_stats.step += self.training
        self._begin_gathering(accumulation_steps if self.training else 1)
        bound = self._bind(args, kwargs)
        mask = bound.get("attention_mask") if padding_mask is None else padding_mask
        target = self.adapter_config.target_num_experts
        return bound, ForwardContext(padding_mask=padding_mask_of(mask), target_num_experts=target)

    def _begin_gathering(self, accumulation_steps: int) -> None:
        """Weights gathered for an earlier micro-step stay or go."""
        for dispatcher, groups in self._gathering:
            experts = {group.name: group.expert_parameters() for group in groups}
            dispatcher.begin_pass(experts, accumulation_steps)

    @torch.compiler.disable
    def _finish(
        self,
        outputs: Any,
        context: ForwardContext,
        bound: dict[str, Any],
        num_routed_tokens: Tensor | float | None,
        accumulation_steps: int,
    ) -> Any:
        """Statistics and auxiliary losses of what the groups recorded."""
        batches = RoutingBatch.collect(context.records)
        self.routing.add(batches, context.records)
        if bound.get("labels") is None:
            return outputs
        config, reduce = self.adapter_config, self.training
        world_size = self.topology.world_size if reduce else 1
        losses = auxiliary_losses(
            batches,
            Normalizer(
                world_size=world_size,
                factor=1.0 if bound.get("num_items_in_batch") is not None else float(world_size),
                num_routed_tokens=num_routed_tokens,
                accumulation_steps=accumulation_steps,
                global_statistics=config.balance_statistics == "global",
                reduce=reduce,
            ),
            target_num_experts=config.target_num_experts,
            mask_padding=config.mask_padding,
            device=self._loss_device(),
            adaptive_l1=self.adaptive_l1,
        )
        return self._add_losses(outputs, losses)

    def _bind(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        names = inspect.signature(self.base_model.forward).parameters
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _loss_device(self) -> torch.device:
        return next(self.input_groups[0].parameters()).device

    def _add_losses(self, outputs: Any, losses: dict[str, Tensor]) -> Any:
        if not isinstance(outputs, ModelOutput):
            return self._add_to_first(outputs, losses) if self.training else outputs
        outputs = with_aux_losses(type(outputs))(**outputs, aux_losses=losses)
        if self.training and outputs.loss is not None:
            outputs.loss = outputs.loss + self.weighted(losses)
        return outputs

    def _add_to_first(self, outputs: tuple, losses: dict[str, Tensor]) -> tuple:
        return (outputs[0] + self.weighted(losses), *outputs[1:])

    def weighted(self, losses: dict[str, Tensor]) -> Tensor:
        """The sum of the auxiliary losses, weighted as configured.

        Router relu: the L1 loss has the weight that its control found, and does the balancing as well. The balance loss
        assumes weights that sum to 1; on others it would be a second L1 loss.
        """
        config, l1 = self.adapter_config, self.adaptive_l1
        weights = {
            "sparsity": config.sparsity_loss_weight if l1 is None else l1.weight,
            "load_balancing": config.load_balancing_loss_weight if l1 is None else 0.0,
            "router_z": config.router_z_loss_weight,
        }
        return sum(weight * losses[name] for name, weight in weights.items())

    def _open_context(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Calls that bypass our forward (``generate``) still see their padding mask; they record nothing."""
        if self._holder.enabled and self._holder.current is None:
            mask = self._bind(args, kwargs).get("attention_mask")
            self._holder.current = ForwardContext(padding_mask=padding_mask_of(mask), recording=False)
            self._opened_by_hook = True
            self._begin_gathering(1)

    def _close_context(self, module: nn.Module, args: tuple, output: Any) -> None:
        if getattr(self, "_opened_by_hook", False):
            self._holder.current = None
            self._opened_by_hook = False
            self._clear_pending()

    def _clear_pending(self) -> None:
        for group in self.input_groups:
            group.clear()
