"""The README.md of an adapter: what it is, how it is loaded, what it was trained with, how well it did."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ldmole_ds.config import LDMoLEConfig

CARD_NAME = "README.md"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_METHODS = {
    "sparsegen": "LD-MoLE ([arXiv 2509.25684](https://arxiv.org/abs/2509.25684)): Sparsegen and a learned lambda per "
    "token decide how many and which experts each token uses",
    "sparsegen_fixed": "a mixture of LoRA experts routed by Sparsegen with one fixed lambda",
    "softmax": "a dense, softmax-weighted mixture of LoRA experts",
    "topk": "a top-k mixture of LoRA experts (MoLA, [arXiv 2402.08562](https://arxiv.org/abs/2402.08562))",
    "relu": "a ReLU-routed mixture of LoRA experts (ReMoE's routing, [arXiv 2412.14711]"
    "(https://arxiv.org/abs/2412.14711))",
    "lora": "plain LoRA",
}
# Of no meaning to a reader, or said elsewhere in the card.
_NOT_SETTINGS = {"peft_type", "projection_groups", "base_model_name_or_path", "base_model_revision"}


def model_card(config: LDMoLEConfig, name: str, results: dict[str, Any] | None = None) -> str:
    """The card's text; the licence is left to whoever publishes the adapter.

    Args:
        config: The adapter's. A base model that is a local path is named by its last part only.
        name: Title, and what the example loads.
        results: Figures by their names.
    """
    base = config.base_model_name_or_path or "an unnamed base model"
    on_hub = bool(HUB_ID.fullmatch(base)) and not Path(base).exists()
    revision = config.base_model_revision if on_hub else None
    shown = base if on_hub else re.split(r"[/\\]", base.rstrip("/\\"))[-1]
    head = [f"base_model: {base}", "base_model_relation: adapter"] if on_hub else []
    # A setting that differs from what its router reads is still part of the record.
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_SETTINGS and v is not None}
    source = f'"{shown}", revision="{revision}"' if revision else f'"{shown}"'
    quantized = config.base_model_quantization
    return "\n".join(
        [
            "---",
            *head,
            "library_name: ldmole_ds",
            "tags:",
            "- lora",
            "- mixture-of-experts",
            "- ld-mole",
            "# license: choose one; the base model's licence may bind the adapter too",
            "---",
            "",
            f"# {name}",
            "",
            f"An adapter for `{shown}`{f' at revision `{revision}`' if revision else ''}"
            f"{f', quantised to {quantized} in training' if quantized != 'none' else ''}: {_METHODS[config.router]}.",
            "",
            "## Load it",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "from ldmole_ds import LDMoLEModel",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({source})",
            f'model = LDMoLEModel.from_pretrained(base, "{name}")  # a hub id or a folder',
            "```",
            "",
            "It holds safetensors only, and is loaded by torch, transformers and safetensors alone.",
            "",
            *(_table("Results", results) if results else []),
            *_table("Settings", settings),
        ]
    )


def _table(title: str, values: dict[str, Any]) -> list[str]:
    rows = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in values.items()]
    return [f"## {title}", "", "| | |", "| --- | --- |", *rows, ""]


def recorded_results(folder: Path) -> dict[str, Any]:
    """What ``folder`` itself says about its weights: a run's ``report.json``, or a checkpoint's evaluation at its step.

    Files that are absent or cannot be read say nothing.
    """
    report, state = _read(folder / "report.json"), _read(folder / "trainer_state.json")
    names = ("steps", "accuracy_before", "accuracy_after", "eval_rows")
    results = {name: report[name] for name in names if report.get(name) is not None}
    step = state.get("global_step")
    if not results and step is not None:
        results = {"steps": step}
        for row in state.get("log_history") or []:
            if row.get("step") == step:
                results.update({k: v for k, v in row.items() if k in ("loss", "eval_loss", "eval_accuracy")})
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
