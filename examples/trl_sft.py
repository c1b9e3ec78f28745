#!/usr/bin/env python
"""LD-MoLE in TRL's SFTTrainer, on messages. Needs `pip install 'ldmole_ds[trl]'`.

deepspeed --num_gpus 2 examples/trl_sft.py
deepspeed --num_gpus 2 examples/trl_sft.py --model_name_or_path Qwen/Qwen3-0.6B --train_file chats.jsonl --bf16

Rows are JSON Lines as SFTTrainer takes them: {"messages": [{"role", "content"}, ...]}, or {"prompt", "completion"}.
Every flag of TRL's SFTConfig works. Without a model and rows, the embedded ones are used.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldmole_ds import LDMoLEConfig, LDMoLETrainer, get_ldmole_model
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from ldmole_ds.tasks import demo_files, demo_model_file
from ldmole_ds.training import runtime

DS_CONFIG = Path(__file__).resolve().parents[1] / "ds_configs" / "zero2.json"


class LDMoLESFTTrainer(LDMoLETrainer, SFTTrainer):
    """SFTTrainer's data and flags; LDMoLETrainer's optimizer groups, losses, logs and saves, which come first."""


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "hub id, folder or GGUF file"})
    train_file: str | None = field(default=None, metadata={"help": "JSON Lines"})
    ep_size: int = field(default=2, metadata={"help": "ranks that share one copy of all experts"})
    num_experts: int = field(default=8, metadata={"help": "experts per adapted projection, over all ranks"})
    r: int = field(default=8, metadata={"help": "rank of each expert"})


def read_rows(file: str | None) -> list[dict]:
    """The rows of a file; else the embedded messages with their domains as answers."""
    path = Path(file) if file else demo_files()["train"]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if file:
        return rows
    return [
        {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}
        for row in rows
    ]


def main() -> None:
    device = runtime.start(use_deepspeed=True)  # before SFTConfig, which takes the state that this makes
    parser = HfArgumentParser((ScriptArguments, SFTConfig))
    parser.set_defaults(
        deepspeed=str(DS_CONFIG),
        accelerator_config={"use_configured_state": True},
        use_cpu=device == "cpu",
        bf16=False,
        output_dir="runs/sft",
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    script, args = parser.parse_args_into_dataclasses([a for a in sys.argv[1:] if not a.startswith("--local_rank")])

    name = script.model_name_or_path or str(demo_model_file())
    dtype = "bfloat16" if args.bf16 else "float32"
    config = LDMoLEConfig(num_experts=script.num_experts, r=script.r, adapter_dtype=dtype)
    model = get_ldmole_model(load_base_model(name), config, args.seed, ep_size=script.ep_size)
    rows = Dataset.from_list(read_rows(script.train_file))
    trainer = LDMoLESFTTrainer(model, args, train_dataset=rows, processing_class=load_tokenizer(name))
    trainer.train()
    trainer.save_model()  # every rank calls it; one file with all experts of all ranks
    trainer.save_state()
    runtime.stop()


if __name__ == "__main__":
    main()
