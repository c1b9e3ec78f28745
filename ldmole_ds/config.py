"""The adapter's configuration: one dataclass, validated when it is made, saved beside the weights."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAMBDA_SHARING = ("shared", "per_layer")
LAMBDA_INITS = ("live", "paper")
BALANCE_STATISTICS = ("global", "per_rank")
INPUT_GROUP_MODES = ("auto", "single")
ADAPTER_DTYPES = (None, "float32", "bfloat16", "float16")
LOSS_WEIGHTS = ("sparsity_loss_weight", "load_balancing_loss_weight", "router_z_loss_weight")
EXPERT_DISPATCH = ("tokens", "weights", "auto")
QUANTIZATIONS = ("none", "nf4", "int8")

# Settings that differ from the defaults, by name; docs/method.md compares the defaults with the authors' released run.
PRESETS: dict[str, dict[str, Any]] = {
    # LD-MoLE (arXiv 2509.25684): best hidden size of the lambda MLP for each of its two models.
    "qwen3-1.7b": {"lambda_hidden_size": 256},
    "llama-3.2-3b": {"lambda_hidden_size": 512},
    # LD-MoLE with its sparsity loss on: at most two experts per token are free of penalty.
    "sparse": {"target_num_experts": 2, "sparsity_loss_weight": 1.0},
    # MoLA (arXiv 2402.08562): two experts per token; as many experts in every layer, or more in higher layers.
    "mola-8888": {"router": "topk", "topk": 2, "experts_per_layer": [8, 8, 8, 8]},
    "mola-2468": {"router": "topk", "topk": 2, "experts_per_layer": [2, 4, 6, 8]},
    # ReMoE's routing (arXiv 2412.14711) over LoRA experts, two of eight on average.
    "remole": {"router": "relu", "target_num_experts": 2},
}

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def _help(default: Any, text: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class LDMoLEConfig:
    """What an LD-MoLE adapter is (arXiv 2509.25684), independent of how it is laid out over ranks.

    The defaults are those of the authors' released run, but for ``lambda_init`` (see ``LambdaMLP``),
    ``lambda_hidden_size`` (512 there) and ``mask_padding``. Layout (``ep_size``, ``expert_dispatch``) is not part of
    the adapter: an adapter trained on eight ranks loads on one.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field and the remedy.
    """

    num_experts: int = _help(8, "LoRA experts per adapted linear layer (E).")
    experts_per_layer: list[int] | None = field(
        default=None,
        metadata={
            "help": "Expert counts from the lowest to the highest layers, spread evenly (MoLA: 2 4 6 8 gives the first "
            "quarter of the layers 2 experts); num_experts becomes the largest of them."
        },
    )
    # torchrun takes --r for an abbreviation of its own options.
    r: int = _help(8, "Rank of each expert; --lora_r is the same (for torchrun).", aliases=["--lora_r"])
    lora_alpha: float = _help(16.0, "LoRA scaling numerator: the experts' sum is multiplied by lora_alpha / r.")
    lora_dropout: float = _help(0.1, "Dropout on the adapter's input; router, lambda MLP and experts share one mask.")
    target_modules: str | list[str] = field(
        default="all-linear",
        metadata={
            "help": "Which linear layers get experts: 'all-linear' (all but the head), a list of name endings, "
            "or one regular expression matched against the full module name."
        },
    )
    router: str = _help(
        "sparsegen",
        "How experts are chosen: sparsegen (learned lambda per token), sparsegen_fixed, softmax (dense), "
        "topk (MoLA), relu (ReMoLE, with its adaptive L1 control), or lora (plain LoRA: one expert, no router).",
    )
    lambda_hidden_size: int = _help(256, "Hidden units of the lambda MLP.")
    lambda_sharing: str = _help(
        "shared", "One lambda MLP per input width (shared) or one per input group (per_layer).", choices=LAMBDA_SHARING
    )
    lambda_init: str = _help(
        "live",
        "Start of the lambda MLP: live (hidden bias 0) or paper (all biases -2.5, as the authors).",
        choices=LAMBDA_INITS,
    )
    fixed_lambda: float = _help(0.0, "lambda of router sparsegen_fixed; 0 is sparsemax, must be below 1.")
    topk: int = _help(2, "Experts per token of router topk.")
    target_num_experts: int = _help(
        2,
        "k of the sparsity loss: no penalty for tokens with at most k experts. Router relu: its aim on average.",
    )
    sparsity_loss_weight: float = _help(0.0, "Weight of the sparsity loss (router relu sets its own).")
    l1_initial_weight: float = _help(1e-8, "Router relu: weight of its L1 loss at the start.")
    l1_growth: float = _help(1.2, "Router relu: the L1 weight is multiplied or divided by this after every step.")
    load_balancing_loss_weight: float = _help(1.0, "Weight of the load balancing loss.")
    router_z_loss_weight: float = _help(0.0, "Weight of the router z-loss.")
    mask_padding: bool = _help(
        True, "Padding is neither routed nor counted. False: routed, and masked in the balance loss only (authors)."
    )
    balance_statistics: str = _help(
        "global",
        "Expert shares of the balance loss over all data-parallel ranks, or per_rank.",
        choices=BALANCE_STATISTICS,
    )
    input_groups: str = _help(
        "auto",
        "auto: projections that read one tensor (q, k, v) share one routing pass and one dispatch; single: never.",
        choices=INPUT_GROUP_MODES,
    )
    adapter_dtype: str | None = _help(None, "float32, bfloat16 or float16; default: the base model's dtype.")
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of further modules trained in full and saved with the adapter."}
    )
    base_model_name_or_path: str | None = _help(None, "Filled by training: the base model the adapter belongs to.")
    base_model_revision: str | None = _help(None, "Filled by training: the base model's revision.")
    base_model_quantization: str = _help("none", "Filled by training: how the base model was quantised.")
    projection_groups: list[list[str]] | None = field(
        default=None, metadata={"help": "Filled by training: the input groups that were found."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, (tuple, set)):
            self.target_modules = sorted(self.target_modules)
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if self.router == "lora":
            self.num_experts = 1
        if self.experts_per_layer is not None:
            counts = self.experts_per_layer = list(self.experts_per_layer)
            if not counts or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in counts):
                raise ValueError(f"experts_per_layer must hold whole numbers of at least 1, got {counts!r}")
            if self.router == "lora":
                raise ValueError("experts_per_layer has no meaning for router lora, which has one expert: remove it")
            self.num_experts = max(counts)
        for name in ("num_experts", "r", "lambda_hidden_size", "target_num_experts", "topk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("lora_alpha", "lora_dropout", "fixed_lambda", "l1_initial_weight", "l1_growth", *LOSS_WEIGHTS):
            if not isinstance(getattr(self, name), (int, float)) or not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha!r}")
        if not self.fixed_lambda < 1.0:
            raise ValueError(f"fixed_lambda must be below 1 (at 1 Sparsegen is undefined), got {self.fixed_lambda!r}")
        if not self.l1_initial_weight > 0 or not self.l1_growth > 1:
            raise ValueError(
                f"l1_initial_weight must be above 0 and l1_growth above 1, got {self.l1_initial_weight!r} and "
                f"{self.l1_growth!r}"
            )
        if self.router == "topk" and self.topk > self.num_experts:
            raise ValueError(f"topk={self.topk} is more than num_experts={self.num_experts}: lower topk")
        for name in LOSS_WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)!r}")
        for name, allowed in (
            ("lambda_sharing", LAMBDA_SHARING),
            ("lambda_init", LAMBDA_INITS),
            ("balance_statistics", BALANCE_STATISTICS),
            ("input_groups", INPUT_GROUP_MODES),
            ("adapter_dtype", ADAPTER_DTYPES),
            ("base_model_quantization", QUANTIZATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known: use one of {', '.join(map(str, allowed))}"
                )
        if not self.target_modules:
            raise ValueError("target_modules is empty: use 'all-linear', a list of names, or a regular expression")

    @property
    def scaling(self) -> float:
        """The factor on the experts' sum, ``lora_alpha / r``."""
        return self.lora_alpha / self.r

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LDMoLEConfig:
        """The configuration named ``name`` in `PRESETS`, with ``changes`` on top."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known: use one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the method's name, as plain JSON types."""
        return {"peft_type": "LD_MOLE", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LDMoLEConfig:
        """The inverse of `to_dict`; an unknown field is an error, not a silent loss."""
        values = {k: v for k, v in values.items() if k != "peft_type"}
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown adapter settings {unknown}: written by a newer ldmole_ds? upgrade, or remove them"
            )
        return cls(**values)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LDMoLEConfig:
        """Read ``adapter_config.json`` from an adapter folder."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): restore it from a complete save") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no JSON object: restore it from a complete save")
        if values.get("peft_type") != "LD_MOLE":
            raise ValueError(f"{path} describes a {values.get('peft_type')!r} adapter, not LD_MOLE")
        return cls.from_dict(values)
