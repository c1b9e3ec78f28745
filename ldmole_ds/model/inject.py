"""Puts experts into a model: finds targets and groups, freezes the base, replaces the linear layers."""

from __future__ import annotations

import copy
import dataclasses
import logging

import torch
from torch import nn

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.distributed import CommStats, ExpertParallel, expert_parallel
from ldmole_ds.distributed.zero import outside_partitioned_init
from ldmole_ds.layers import AdaptedLinear, InputGroup, LambdaMLP, build_router
from ldmole_ds.layers.context import ContextHolder
from ldmole_ds.layers.input_group import seeded_generator
from ldmole_ds.model.dispatch_plan import DispatchSettings, GroupShape, plan_dispatch
from ldmole_ds.model.grouping import find_input_groups, group_name
from ldmole_ds.model.layer_experts import expert_counts
from ldmole_ds.model.ldmole_model import LDMoLEModel
from ldmole_ds.model.quantized import is_quantized, layer_dtype, prepare_quantized_layers
from ldmole_ds.model.targets import find_targets, left_out_modules, linear_features

logger = logging.getLogger(__name__)


@outside_partitioned_init()
def get_ldmole_model(
    base_model: nn.Module,
    config: LDMoLEConfig | None = None,
    seed: int = 0,
    ep_size: int = 1,
    expert_dispatch: str = "tokens",
    *,
    dispatch_chunk_tokens: int = 0,
    tokens_per_rank: int = 4096,
    accumulation_steps: int = 1,
) -> LDMoLEModel:
    """Give a Hugging Face model LoRA experts (in place) and wrap it.

    The base model is frozen. The experts' start depends on ``seed`` and the expert's global index only, so every
    layout starts from the same weights.

    Args:
        base_model: Any Hugging Face model; also one partitioned by ``zero.Init``, or quantised by bitsandbytes.
        config: The adapter; defaults to `LDMoLEConfig()`.
        seed: Of the adapter's start.
        ep_size: Ranks that share one copy of all experts; above 1 it needs an initialised process group.
        expert_dispatch: ``tokens`` moves tokens to experts, ``weights`` gathers experts, ``auto`` chooses for each
            input group; equal results.
        dispatch_chunk_tokens: Dispatch at most so many tokens of a rank at once, which bounds memory under any skew; 0
            is all.
        tokens_per_rank: Tokens of one micro-step on one rank, for ``auto``.
        accumulation_steps: Micro-steps per optimizer step, for ``auto``.

    Raises:
        ValueError: ``ep_size`` does not divide ranks or experts, no target module matches, the base model is an
            encoder-decoder or lies on several devices, or a quantised layer is in a state that cannot be trained on.
    """
    config = config or LDMoLEConfig()
    if isinstance(base_model, LDMoLEModel) or any(isinstance(m, AdaptedLinear) for m in base_model.modules()):
        raise ValueError("the model already has LD-MoLE experts: pass the bare base model")
    if getattr(getattr(base_model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base_model).__name__} is an encoder-decoder model: its two padding masks are not supported yet, "
            "use a decoder-only or an encoder-only base model"
        )
    places = sorted({str(place) for place in (getattr(base_model, "hf_device_map", None) or {}).values()})
    if len(places) > 1:
        raise ValueError(
            f"the base model is spread over {', '.join(places)}: load it without device_map (each rank moves its own "
            "to its device); ZeRO stage 3 or --quantization make a large one fit"
        )
    router = build_router(config.router, fixed_lambda=config.fixed_lambda, topk=config.topk)
    topology = expert_parallel(ep_size)
    if config.router != "lora" and config.num_experts % ep_size:
        raise ValueError(
            f"num_experts={config.num_experts} is not divisible by ep_size={ep_size}: change --num_experts, or use an "
            f"--ep_size among {[p for p in range(1, config.num_experts + 1) if config.num_experts % p == 0]}"
        )
    targets = find_targets(base_model, config.target_modules, config.modules_to_save)
    if config.target_modules == "all-linear" and topology.rank == 0:
        left_out = left_out_modules(base_model, targets, config.modules_to_save)
        if left_out:
            logger.warning("all-linear leaves these parts of the base model alone: %s", "; ".join(left_out))
    groups = _checked_groups(config, targets) or find_input_groups(base_model, targets, config.input_groups)
    config = dataclasses.replace(config, projection_groups=copy.deepcopy(groups))
    experts_of = expert_counts(config, [members[0] for members in groups])
    _tell_replicated(topology, experts_of)

    if config.sparsity_loss_weight and config.router not in ("sparsegen", "relu"):
        logger.warning("sparsity_loss_weight has no effect on router %s, which has no learned lambda", config.router)
    base_model.requires_grad_(False)
    prepare_quantized_layers(base_model)
    holder, stats = ContextHolder(), CommStats()
    shapes = []
    for members in groups:
        features = [linear_features(targets[name]) for name in members]
        shapes.append(GroupShape(experts_of[members[0]], features[0][0], [f[1] for f in features]))
    first = targets[groups[0][0]]
    dispatchers, dispatch_text = plan_dispatch(
        DispatchSettings(expert_dispatch, dispatch_chunk_tokens, tokens_per_rank, accumulation_steps),
        shapes,
        config,
        topology,
        stats,
        itemsize=_adapter_dtype(config, first, base_model).itemsize,
        device=first.weight.device,
    )
    lambda_mlps: dict[str, LambdaMLP] = {}
    input_groups = []
    for members, shape, dispatcher in zip(groups, shapes, dispatchers, strict=True):
        in_features, name, first = shape.in_features, group_name(members), targets[members[0]]
        dtype, device = _adapter_dtype(config, first, base_model), first.weight.device
        lambda_mlp = None
        if router.uses_lambda:
            shared = config.lambda_sharing == "shared"
            key = str(in_features) if shared else name
            if key not in lambda_mlps:
                lambda_mlps[key] = LambdaMLP(
                    in_features,
                    config.lambda_hidden_size,
                    init=config.lambda_init,
                    generator=seeded_generator(seed, "lambda_mlp", key),
                    dtype=dtype,
                    device=device,
                )
            lambda_mlp = lambda_mlps[key]
        group = InputGroup(
            name=name,
            members=members,
            in_features=in_features,
            out_features=shape.out_features,
            num_experts=shape.num_experts,
            r=config.r,
            scaling=config.scaling,
            dropout=config.lora_dropout,
            router=router,
            lambda_mlp=lambda_mlp,
            owns_lambda_mlp=config.lambda_sharing == "per_layer",
            topology=topology,
            dispatcher=dispatcher,
            holder=holder,
            mask_padding=config.mask_padding,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        input_groups.append(group)
        for member, path in enumerate(members):
            _replace(base_model, path, AdaptedLinear(targets[path], group, member))
    _train_in_full(base_model, config.modules_to_save)
    shared_mlps = lambda_mlps if config.lambda_sharing == "shared" else {}
    return LDMoLEModel(base_model, config, input_groups, shared_mlps, topology, holder, stats, dispatch_text)


def _adapter_dtype(config: LDMoLEConfig, layer: nn.Module, base_model: nn.Module) -> torch.dtype:
    return getattr(torch, config.adapter_dtype) if config.adapter_dtype else layer_dtype(layer, base_model)


def _tell_replicated(topology: ExpertParallel, experts_of: dict[str, int]) -> None:
    """Say which layers expert parallelism leaves whole on every rank."""
    whole = sorted({n for n in experts_of.values() if topology.ep_size > 1 and not topology.partitions(n)})
    if whole:
        layers = sum(n in whole for n in experts_of.values())
        logger.warning(
            "%d of %d input groups have %s experts, which ep_size=%d does not divide: replicated on all ranks",
            layers,
            len(experts_of),
            " or ".join(map(str, whole)),
            topology.ep_size,
        )


def _checked_groups(config: LDMoLEConfig, targets: dict[str, nn.Module]) -> list[list[str]] | None:
    """The groups a saved adapter was trained with, if they cover exactly the targets of this model."""
    if config.projection_groups is None:
        return None
    names = [name for group in config.projection_groups for name in group]
    if sorted(names) != sorted(targets):
        difference = sorted(set(names) ^ set(targets))
        raise ValueError(
            f"the adapter was made for another base model: its projections differ from this model's in {difference[:4]}"
            f"{' ...' if len(difference) > 4 else ''} ({len(difference)} in all)"
        )
    return config.projection_groups


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _train_in_full(model: nn.Module, names: list[str] | None) -> None:
    for name in names or ():
        matches = [m for path, m in model.named_modules() if path == name or path.endswith("." + name)]
        if not matches:
            raise ValueError(f"modules_to_save: no module of the base model is named {name!r}")
        for module in matches:
            if any(is_quantized(m) for m in module.modules()):
                raise ValueError(
                    f"modules_to_save: {name!r} is quantised and cannot be trained in full: leave it out, or load the "
                    "base with it in BitsAndBytesConfig's llm_int8_skip_modules"
                )
            module.requires_grad_(True)
