#!/usr/bin/env python
"""See what an adapter's routers do: one HTML page, to open in any browser, with nothing to install.

python launch/report.py --adapter runs/demo
    on the rows of the task that it was trained on (or the embedded ones)
python launch/report.py --adapter runs/mine --task arc_easy --max_rows 100
    on 100 questions of a benchmark
python launch/report.py --adapter runs/mine --prompt_file prompts.txt --output report.html
    on prompts of your own, one in each line

The page shows experts per token by layer and projection, their histogram, the load of every expert, lambda over
layers, the tokens with the most and fewest experts, and prompts coloured by experts per token. One process; needs
torch, transformers and safetensors, no DeepSpeed. What each plot means: docs/reading-the-routing.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--adapter", required=True, type=Path, help="folder written by launch/train.py")
    add("--task", help="tasks (docs/tasks.md) with commas between them; default: those of the adapter's run")
    add("--prompt_file", type=Path, help="text file with a prompt in each line, instead of a task")
    add("--split", help="split of the task; default: the one that results are reported on")
    add("--data_dir", help="folder with TASK/SPLIT.jsonl; default: as in training, else the hub")
    add("--scoring", choices=("letters", "cloze"), help="how questions are put; default: as in training")
    add("--max_rows", type=int, default=64, help="read at most so many prompts (default 64)")
    add("--show", type=int, default=8, help="prompts shown token by token (default 8)")
    add("--max_length", type=int, help="longest prompt in tokens, its end is kept; default: as in training, else 512")
    add("--batch_size", type=int, default=8, help="prompts in one forward pass (default 8)")
    add("--output", type=Path, help="the page; default: routing_report.html in the adapter's folder")
    add("--model_name_or_path", help="base model; default: the one the adapter was trained on")
    add("--dtype", default="auto", help="auto (default: the checkpoint's), float32, bfloat16 or float16")
    add("--device", help="cuda, cpu, ...; default: cuda where there is one")
    add("--trust_remote_code", action="store_true", help="run model code from the hub; only for code you have read")
    args = parser.parse_args(argv)
    if args.task and args.prompt_file:
        parser.error("--task and --prompt_file both say which prompts: give one of them")
    for name in ("max_rows", "show", "max_length", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def choose_prompts(args: argparse.Namespace) -> tuple[list[str], str, int]:
    """The prompts, what they are, and their longest length in tokens."""
    from ldmole_ds.analysis.source import DEFAULT_TASK, file_prompts, task_prompts, training_data_settings

    trained = training_data_settings(args.adapter)
    max_length = args.max_length or trained.get("max_length") or 512
    if args.prompt_file:
        return file_prompts(args.prompt_file)[: args.max_rows], str(args.prompt_file), max_length
    task = args.task or trained.get("task") or DEFAULT_TASK
    own = {name: getattr(args, name) or trained.get(name) for name in ("data_dir", "scoring")}
    return task_prompts(task, limit=args.max_rows, split=args.split, **own), task, max_length


def write_report(args: argparse.Namespace) -> Path:
    """Load, collect, summarise, write."""
    import torch
    from tqdm import tqdm

    from ldmole_ds.analysis import collect_routing, encode_prompts, render_page, summarise
    from ldmole_ds.tasks.adapted_model import load_adapted

    output = args.output or args.adapter / "routing_report.html"
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file, such as {output / 'routing_report.html'}")
    texts, source, max_length = choose_prompts(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    model, tokenizer = load_adapted(args.adapter, args.model_name_or_path, **options)
    model.to(device)
    prompts = encode_prompts(tokenizer, texts, max_length)
    with tqdm(total=len(prompts), unit="prompt", desc="routing") as bar:
        routing = collect_routing(model, prompts, batch_size=args.batch_size, on_batch=bar.update)
    config = model.adapter_config
    facts = {
        "base model": args.model_name_or_path or config.base_model_name_or_path or "",
        "router": f"{config.router}, {config.num_experts} experts of rank {config.r}",
        "prompts": f"{len(prompts)} of {source}",
    }
    idle = sum(len(group.members) for group in model.input_groups) - len(routing.projections)
    if idle:
        facts["left out"] = f"{idle} projections that these prompts never reach"
    page = render_page(summarise(routing, prompts, shown=args.show), facts, str(args.adapter))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        output = write_report(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output} ({output.stat().st_size / 1e3:.0f} kB): open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
