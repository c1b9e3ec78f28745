"""`LDMoLEModel`: a Hugging Face model with experts, which behaves like the model it wraps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.distributed import CommStats, ExpertParallel, WeightGatherDispatcher
from ldmole_ds.distributed.zero import is_zero3_parameter
from ldmole_ds.layers import AdaptedLinear, ForwardContext, InputGroup, LambdaMLP
from ldmole_ds.layers.context import ContextHolder
from ldmole_ds.model import adapter_io, reference_adapter
from ldmole_ds.model.adaptive_l1 import AdaptiveL1
from ldmole_ds.model.aux_losses import Normalizer, RoutingBatch, auxiliary_losses
from ldmole_ds.model.hf_facade import adopt_signature, padding_mask_of, with_aux_losses
from ldmole_ds.model.quantized import drop_quantization_state, has_quantized_layers
from ldmole_ds.model.routing_stats import RoutingStatistics

REENTRANT_REFUSED = (
    "reentrant checkpointing loses the auxiliary losses' graph: pass use_reentrant=False "
    "(--activation_checkpointing_kwargs '{\"use_reentrant\": false}')"
)


class LDMoLEModel(nn.Module):
    """A model with LoRA experts; made by `get_ldmole_model` or `from_pretrained`, not directly.

    It forwards signature, ``config``, ``generate`` and every other attribute to the base model. ``out.loss`` includes
    the weighted auxiliary losses while training; in eval mode it is the base model's loss alone and no collective for
    statistics runs.

    Attributes:
        base_model: The Hugging Face model, its linear layers replaced in place.
        adapter_config: The adapter's configuration.
        input_groups: Owners of all router and expert parameters.
        lambda_mlps: The shared lambda MLPs by input width (empty with ``lambda_sharing="per_layer"``).
        topology: The expert-parallel layout.
        expert_dispatch: How tokens and experts meet: tokens, weights, or what ``auto`` chose and why.
        comm_stats: Calls, rows and bytes of the expert-parallel collectives so far.
        routing: Routing statistics since the last reset.
        adaptive_l1: Control of the L1 loss of router relu, else None.
    """

    # The Trainer asks for it before it trains on a quantised base: trainable adapters are attached.
    _hf_peft_config_loaded = True

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
        base_model.register_forward_pre_hook(self._open_context, with_kwargs=True)
        base_model.register_forward_hook(self._close_context, always_call=True)
        adopt_signature(self, base_model)
        if has_quantized_layers(base_model):
            self.register_state_dict_post_hook(drop_quantization_state)
        config = getattr(base_model, "config", None)
        if config is not None:
            ignored = list(getattr(config, "keys_to_ignore_at_inference", None) or ["past_key_values"])
            config.keys_to_ignore_at_inference = [*ignored, *({"aux_losses"} - set(ignored))]

    @torch.compiler.disable(recursive=False)  # torch.compile takes the base model; what is around it depends on data
    def forward(
        self,
        *args: Any,
        num_routed_tokens: Tensor | float | None = None,
        gradient_accumulation_steps: int = 1,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, with auxiliary losses.

        Args:
            *args: As the base model.
            num_routed_tokens: Routed tokens of the whole optimizer step over all ranks; default: of this call. With
                ragged micro-batches only the whole step's count makes the losses independent of the split.
            gradient_accumulation_steps: Micro-steps per optimizer step, with ``num_routed_tokens``.
            **kwargs: As the base model. With ``num_items_in_batch`` the loss is this rank's share of the global sum
                (the Trainer multiplies by the number of ranks), else its mean over ranks is the global loss.

        Returns:
            The base model's output. With labels it has ``aux_losses``: ``{"sparsity", "load_balancing",
            "router_z"}``, unweighted float32 scalars with their graph.

        Raises:
            FloatingPointError: Non-finite routing, on every rank, naming the layer.
        """
        bound, context = self._begin(args, kwargs, gradient_accumulation_steps)
        try:
            with self._holder.use(context):
                outputs = self.base_model(*args, **kwargs)
        finally:
            self._clear_pending()
        return self._finish(outputs, context, bound, num_routed_tokens, gradient_accumulation_steps)

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict, accumulation_steps: int) -> tuple[dict[str, Any], ForwardContext]:
        """The arguments by name and the pass's context."""
        self.comm_stats.step += self.training
        self._begin_gathering(accumulation_steps if self.training else 1)
        bound = self._bind(args, kwargs)
        return bound, ForwardContext(padding_mask=padding_mask_of(bound.get("attention_mask")))

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
        if self._holder.current is None:
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """Trade compute for memory. Non-reentrant only, which is the default here; not under ``torch.compile``.

        Args:
            activation_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``.
            **kwargs: For the base model's method.

        Raises:
            ValueError: ``use_reentrant=True`` was asked for.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise ValueError(REENTRANT_REFUSED)
        options["context_fn"] = self._holder.checkpoint_contexts
        if hasattr(self.base_model, "activation_checkpointing_enable"):
            self.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)
        else:
            self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    @property
    def needs_all_ranks(self) -> bool:
        """Whether a forward pass has collectives, so that all ranks must run equally many.

        It has where experts are partitioned, or where ZeRO-3 gathers parameters.
        """
        partitioned = any(group.partitioned for group in self.input_groups)
        return self.topology.world_size > 1 and (partitioned or any(map(is_zero3_parameter, self.parameters())))

    def generate(self, *args: Any, synced_gpus: bool | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate``. Collective where `needs_all_ranks`.

        Args:
            *args: As the base model.
            synced_gpus: Ranks that have finished keep on taking part until all have; default: where `needs_all_ranks`.
            **kwargs: As the base model.
        """
        if synced_gpus is None and self.needs_all_ranks:
            synced_gpus = True
        return self.base_model.generate(*args, synced_gpus=synced_gpus, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the bare base model."""
        layers = [m for m in self.base_model.modules() if isinstance(m, AdaptedLinear)]
        before = [layer.enabled for layer in layers]
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled in zip(layers, before, strict=True):
                layer.enabled = enabled

    def routing_summary(self, reduce: bool = False) -> dict[str, dict]:
        """Per projection: mean experts per token, load per expert, mean lambda and its spread over tokens, live hidden
        units of the lambda MLP; see `RoutingStatistics.summary`. Collective with ``reduce=True``."""
        return self.routing.summary(reduce)

    def reset_routing_summary(self) -> None:
        """Start the routing statistics anew."""
        self.routing.reset()

    def num_parameters_by_kind(self) -> dict[str, int]:
        """Trainable parameters over all ranks, and those held by this rank."""
        return adapter_io.count_parameters(self)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and one ``adapter_model.safetensors`` with all experts of all ranks.

        Collective: every rank calls it; rank 0 writes. Works under every ZeRO stage.
        """
        adapter_io.save_adapter(self, Path(save_directory))

    @classmethod
    def from_pretrained(
        cls, base_model: nn.Module, folder: str | Path, *, ep_size: int = 1, expert_dispatch: str = "tokens"
    ) -> LDMoLEModel:
        """Wrap ``base_model`` and load an adapter; needs torch, transformers and safetensors only."""
        from ldmole_ds.model.inject import get_ldmole_model

        config = LDMoLEConfig.from_pretrained(folder)
        model = get_ldmole_model(base_model, config, ep_size=ep_size, expert_dispatch=expert_dispatch)
        adapter_io.load_adapter(model, Path(folder))
        return model.eval()

    def load_reference_adapter(self, state_dict_or_path: dict[str, Tensor] | str | Path) -> None:
        """Load weights written by the authors' code; see `reference_adapter`."""
        reference_adapter.load_reference_adapter(self, state_dict_or_path)
