#!/usr/bin/env python
"""LD-MoLE in a training loop of one's own: DeepSpeed's engine, no Trainer.

deepspeed --num_gpus 2 examples/plain_loop.py
deepspeed --num_gpus 2 examples/plain_loop.py --model_name_or_path Qwen/Qwen3-0.6B --ep_size 2 --stage 3

The rows are those of the embedded data, and so is the model unless one is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldmole_ds import LDMoLEConfig, get_ldmole_model, ldmole_param_groups
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from ldmole_ds.tasks import demo_files, demo_model_file


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="hub id, folder or GGUF file; default: the embedded model")
    parser.add_argument("--ep_size", type=int, default=2, help="ranks that share one copy of all experts (default 2)")
    parser.add_argument("--stage", type=int, default=2, choices=[0, 1, 2, 3], help="ZeRO stage (default 2)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default 10)")
    parser.add_argument("--batch_size", type=int, default=4, help="rows per rank and step (default 4)")
    parser.add_argument("--output_dir", default="runs/plain_loop", help="where the adapter goes")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    name = args.model_name_or_path or str(demo_model_file())
    tokenizer, base_model = load_tokenizer(name), load_base_model(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    config = LDMoLEConfig(num_experts=8, r=8, adapter_dtype="float32")
    model = get_ldmole_model(base_model, config, seed=0, ep_size=args.ep_size)
    optimizer = torch.optim.AdamW(ldmole_param_groups(model, weight_decay=0.1), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": args.batch_size,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": args.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )

    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = [json.loads(line) for line in demo_files()["train"].read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['text']}\nTopic: {row['label']}{tokenizer.eos_token}" for row in rows][rank::world_size]
    engine.train()
    for step in range(args.steps):
        start = step * args.batch_size % (len(texts) - args.batch_size)
        batch = tokenizer(texts[start : start + args.batch_size], padding=True, return_tensors="pt").to(engine.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        # The mean over all ranks' label tokens, however unequal their rows are. DeepSpeed averages over ranks.
        items = labels[:, 1:].ne(-100).sum()
        dist.all_reduce(items)
        tokens = batch["attention_mask"].sum()
        dist.all_reduce(tokens)
        outputs = engine(**batch, labels=labels, num_items_in_batch=items, num_routed_tokens=tokens)
        engine.backward(outputs.loss * world_size)  # cross-entropy and the auxiliary losses
        engine.step()
        loss = outputs.loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step + 1}  loss {loss:.6f}", flush=True)

    model.save_pretrained(args.output_dir)  # every rank calls it; one file with all experts of all ranks
    if rank == 0:
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    arguments = parse()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference on CPUs; would need a compiler
    deepspeed.init_distributed()
    train(arguments)
    # Leave together: a rank that ends while others still hold connections may abort.
    dist.barrier()
    dist.destroy_process_group()
