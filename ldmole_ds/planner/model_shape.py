"""What the planner knows of a model and its adapter: sizes, read off the model built without weights."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.layers import build_router
from ldmole_ds.model.dispatch_plan import GroupShape
from ldmole_ds.model.grouping import find_input_groups
from ldmole_ds.model.layer_experts import expert_counts
from ldmole_ds.model.targets import candidate_modules, find_targets, linear_features

# Bytes of a quantised weight with its scales: nf4 has one 8-bit scale per 64 weights and one float32 per 256 scales.
QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a base model and its adapter.

    Attributes:
        name: Class of the model, for reports.
        config: The adapter, with the input groups that were found.
        groups: Input groups in the model's order.
        lambda_parameters: Of all lambda MLPs.
        gate_parameters: Of all routers.
        saved_parameters: Trained in full (``modules_to_save``).
        linear_parameters: Frozen weights that ``--quantization`` packs.
        other_parameters: All other frozen weights.
        base_tensors: Sizes of all frozen parameters.
        dense_tensors: Sizes of the trainable parameters besides experts.
        hidden_size: Of the model's configuration.
        num_layers: Of the model's configuration.
    """

    name: str
    config: LDMoLEConfig
    groups: tuple[GroupShape, ...]
    lambda_parameters: int
    gate_parameters: int
    saved_parameters: int
    linear_parameters: int
    other_parameters: int
    base_tensors: tuple[int, ...]
    dense_tensors: tuple[int, ...]
    hidden_size: int
    num_layers: int

    def expert_parameters(self, group: GroupShape) -> int:
        """Of one expert: A and B of every projection of the group."""
        return self.config.r * (len(group.out_features) * group.in_features + sum(group.out_features))

    def is_partitioned(self, group: GroupShape, ep_size: int) -> bool:
        """As `ExpertParallel.partitions`."""
        return ep_size > 1 and group.num_experts % ep_size == 0

    def held(self, ep_size: int) -> tuple[int, int]:
        """Trainable parameters on one rank: replicated on all ranks, and of partitioned experts."""
        dense, experts = self.lambda_parameters + self.gate_parameters + self.saved_parameters, 0
        for group in self.groups:
            total = group.num_experts * self.expert_parameters(group)
            if self.is_partitioned(group, ep_size):
                experts += total // ep_size
            else:
                dense += total
        return dense, experts

    def trainable_tensors(self, ep_size: int) -> tuple[list[int], list[int]]:
        """Sizes of the parameters that `held` counts: A of each group, B of each projection, and what is dense."""
        dense, experts = list(self.dense_tensors), []
        for group in self.groups:
            partitioned = self.is_partitioned(group, ep_size)
            inner = self.config.r * group.num_experts // (ep_size if partitioned else 1)
            sizes = [len(group.out_features) * inner * group.in_features, *(inner * o for o in group.out_features)]
            (experts if partitioned else dense).extend(sizes)
        return dense, experts

    @property
    def tensors(self) -> int:
        """Trainable parameters on a rank, each counted as one."""
        return len(self.trainable_tensors(1)[0])

    @property
    def trainable(self) -> int:
        """Every expert counted once."""
        return self.held(1)[0]

    @property
    def frozen(self) -> int:
        """All weights that are not trained."""
        return self.linear_parameters + self.other_parameters

    def frozen_bytes(self, itemsize: int, quantization: str = "none") -> float:
        """The base model in memory, whole."""
        packed = QUANTIZED_BYTES.get(quantization, itemsize)
        return self.linear_parameters * packed + self.other_parameters * itemsize


def load_config(name: str, *, revision: str = "main", token: str | None = None) -> PreTrainedConfig:
    """A model's configuration from a hub id, a folder, a ``config.json`` or a GGUF file; no weights are read.

    Raises:
        ValueError: It cannot be found or read.
    """
    path, options = Path(name), {}
    if path.suffix.lower() == ".gguf":
        path, options = path.parent, {"gguf_file": path.name}
        name = str(path)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, token=token, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"--model_name_or_path {name!r} has no readable configuration: {first} -- give a hub id you can reach, a "
            "folder or file with the config.json, or a .gguf file"
        ) from error


def build_base(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model of this configuration, on whatever device is the default one."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def shape_of_config(hf_config: PreTrainedConfig, config: LDMoLEConfig) -> ModelShape:
    """`shape_of` a causal language model that is built without weights."""
    with torch.device("meta"):
        base = build_base(hf_config)
    return shape_of(base, config)


def shape_of(base: nn.Module, config: LDMoLEConfig) -> ModelShape:
    """Sizes of ``base`` (on any device, the meta device included) with this adapter, as `get_ldmole_model` makes it.

    Raises:
        ValueError: As `get_ldmole_model` for settings that do not fit the model.
    """
    router = build_router(config.router, fixed_lambda=config.fixed_lambda, topk=config.topk)
    targets = find_targets(base, config.target_modules, config.modules_to_save)
    names = config.projection_groups or find_input_groups(base, targets, config.input_groups)
    config = dataclasses.replace(config, projection_groups=names)
    counts = expert_counts(config, [members[0] for members in names])
    groups = []
    for members in names:
        features = [linear_features(targets[name]) for name in members]
        groups.append(GroupShape(counts[members[0]], features[0][0], [out for _, out in features]))
    widths = [group.in_features for group in groups]
    mlp_inputs = sorted(set(widths)) if config.lambda_sharing == "shared" else widths
    hidden = config.lambda_hidden_size
    gates = [len(group.out_features) * group.num_experts * group.in_features for group in groups]
    saved = _saved_parameters(base, config.modules_to_save)
    packed = {id(module.weight): module.weight.numel() for module in candidate_modules(base).values()}
    linear = sum(numel for key, numel in packed.items() if key not in saved)
    total = sum(p.numel() for p in base.parameters())
    mlps = [(width * hidden, hidden, hidden, 1) for width in mlp_inputs] if router.uses_lambda else []
    return ModelShape(
        name=type(base).__name__,
        config=config,
        groups=tuple(groups),
        lambda_parameters=sum(map(sum, mlps)),
        gate_parameters=sum(gates) if router.uses_gate else 0,
        saved_parameters=sum(saved.values()),
        linear_parameters=linear,
        other_parameters=total - sum(saved.values()) - linear,
        base_tensors=tuple(p.numel() for p in base.parameters() if id(p) not in saved),
        dense_tensors=(*saved.values(), *(gates if router.uses_gate else ()), *(n for mlp in mlps for n in mlp)),
        hidden_size=base.config.hidden_size,
        num_layers=base.config.num_hidden_layers,
    )


def _saved_parameters(base: nn.Module, names: list[str] | None) -> dict[int, int]:
    """Sizes by identity, so that tied weights count once."""
    modules = [m for path, m in base.named_modules() for name in names or () if f".{path}".endswith(f".{name}")]
    if names and not modules:
        raise ValueError(f"modules_to_save: no module of the base model is named {names[0]!r}")
    return {id(p): p.numel() for module in modules for p in module.parameters()}
