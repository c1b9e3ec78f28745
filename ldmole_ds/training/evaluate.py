"""Accuracy of an adapter or a base model on tasks: the body of ``launch/evaluate.py``."""

from __future__ import annotations

import json
import os
import time
import typing
from argparse import Namespace
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import HfArgumentParser

from ldmole_ds.tasks import SCORINGS, TASKS, ChoiceDataset, load_task, padding_id, tasks_of
from ldmole_ds.tasks.adapted_model import load_adapted
from ldmole_ds.tasks.evaluate import TaskResult, answer_all
from ldmole_ds.training import runtime
from ldmole_ds.training.argument_groups import ModelArguments
from ldmole_ds.training.arguments import build
from ldmole_ds.training.flags import Formatter, field_with_help, raise_user_error
from ldmole_ds.training.run import quiet_libraries
from ldmole_ds.training.run_record import SETTINGS_NAME, versions, write_json
from ldmole_ds.training.runtime import UserError, agreed, is_main_process

USAGE = """%(prog)s --adapter FOLDER --task NAME[,NAME ...] [--flag value ...]

  python launch/evaluate.py --adapter runs/mine
      an adapter, on the tasks it was trained on
  deepspeed --num_gpus 2 launch/evaluate.py --task arc_easy,cola --model_name_or_path Qwen/Qwen3-1.7B
      a bare base model on two tasks, the rows shared by two ranks (torchrun, mpirun and srun start ranks too)
"""


@dataclass
class EvaluateArguments:
    """What is asked of which adapter."""

    _argument_group_name: typing.ClassVar[str] = "evaluation"

    adapter: str | None = field_with_help(
        None, "Folder of a run, a checkpoint or an adapter, or a hub id. Default: the bare base model."
    )
    adapter_revision: str | None = field_with_help(None, "Branch, tag or commit of an adapter on the hub.")
    task: str | None = field_with_help(
        None,
        f"Tasks with commas between them: {', '.join(TASKS)}; or all. Default: those that the adapter was trained on.",
    )
    data_dir: str | None = field_with_help(
        None, "Folder with TASK/SPLIT.jsonl in the schemas of the hub datasets. Default: as in training, else the hub."
    )
    split: str | None = field_with_help(None, "train, validation or test. Default: the reported one (docs/tasks.md).")
    scoring: str | None = field_with_help(
        None,
        "letters or cloze, see launch/train.py --help. Default: as in training, else the task's own.",
        choices=SCORINGS,
    )
    max_length: int | None = field_with_help(
        None,
        "Longest sequence in tokens; longer prompts lose their beginning. Default: as in training, else 512.",
    )
    limit: int | None = field_with_help(None, "Ask only the first N rows of each task.")
    batch_size: int = field_with_help(16, "Rows in one forward pass of a rank.")
    ep_size: int = field_with_help(
        1, "Ranks that share one copy of all experts; 1 gives every rank all of them, which needs no exchange."
    )
    output_file: str | None = field_with_help(None, "JSON file for the results, beside the table.")
    ddp_timeout: int = field_with_help(1800, "Seconds until a collective of ranks gives up.")


def _base_model_arguments() -> type:
    """`ModelArguments` without the adapter to train on from."""
    hints = typing.get_type_hints(ModelArguments)
    names = [f for f in fields(ModelArguments) if not f.name.startswith("adapter_")]
    own = [(f.name, hints[f.name], field_with_help(f.default, **f.metadata)) for f in names]
    return make_dataclass("BaseModelArguments", own, namespace={"_argument_group_name": "base model"})


BaseModelArguments = _base_model_arguments()


def parse_evaluate_flags(argv: list[str]) -> Namespace:
    """Parse flags; touches no accelerator.

    Raises:
        UserError: An unknown flag, or a value of the wrong type or out of range.
    """
    parser = HfArgumentParser(
        (EvaluateArguments, BaseModelArguments),
        prog="launch/evaluate.py",
        usage=USAGE,
        formatter_class=Formatter,
        description="Measure accuracy on tasks: the paper's benchmarks, or the embedded one.",
        allow_abbrev=False,
    )
    parser.error = raise_user_error
    flags = parser.parse_args([a for a in argv if not a.startswith("--local_rank")])
    for name in ("limit", "batch_size", "ep_size"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    return flags


def evaluate(flags: Namespace) -> list[TaskResult]:
    """Run it. Collective: every rank calls it with the same flags."""
    device = runtime.start(use_deepspeed=False, timeout_s=flags.ddp_timeout)
    quiet_libraries()
    asked, model_flags = build(flags, EvaluateArguments), build(flags, BaseModelArguments)
    with agreed("tasks"):
        if asked.output_file and not Path(asked.output_file).absolute().parent.is_dir():
            raise UserError(f"--output_file {asked.output_file}: its folder does not exist")
        asked = with_training_defaults(asked)
        if not asked.task:
            raise UserError(f"which task? Add --task with one or several of {', '.join(TASKS)}, or all")
        tasks = tasks_of(",".join(TASKS) if asked.task == "all" else asked.task)
        common = {"data_dir": asked.data_dir, "scoring": asked.scoring, "limit": asked.limit}
        questions = [load_task(task, asked.split or task.heldout_split, **common) for task in tasks]
    with agreed("model"):
        model, tokenizer = load_model(asked, model_flags)
        model.to(torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device != "cpu" else device)
        datasets = [ChoiceDataset.from_questions(rows, tokenizer, asked.max_length or 512) for rows in questions]
        for dataset in datasets:
            dataset.check_positions(getattr(model.config, "max_position_embeddings", None))
    results, begin = [], time.perf_counter()
    with tqdm(total=sum(map(len, datasets)), unit="row", disable=not is_main_process()) as bar:
        for task, dataset in zip(tasks, datasets, strict=True):
            bar.set_description(task.name)
            answers = answer_all(
                model,
                dataset,
                padding_id(tokenizer),
                batch_size=asked.batch_size,
                device=next(model.parameters()).device,
                on_batch=bar.update,
            )
            split, scoring = asked.split or task.heldout_split, asked.scoring or task.scoring
            results.append(TaskResult.of_answers(task, split, scoring, dataset, answers))
    seconds = time.perf_counter() - begin
    if is_main_process():
        name = asked.adapter or f"{model_flags.model_name_or_path or 'the embedded model'}, without an adapter"
        print(format_results(results, name), flush=True)
        if asked.output_file:
            record = {"arguments": asdict(asked), "model": {**asdict(model_flags), "token": None}}
            record |= {"world_size": world_size(), "seconds": seconds, "versions": versions()}
            write_json(Path(asked.output_file), {"results": [asdict(r) for r in results], **means(results), **record})
    return results


def world_size() -> int:
    """Ranks of this job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def with_training_defaults(asked: EvaluateArguments) -> EvaluateArguments:
    """What was not asked for, as the adapter's own run had it."""
    # A checkpoint's record is that of its run, one folder up.
    folders = [Path(asked.adapter), Path(asked.adapter).parent] if asked.adapter else []
    record = next((file for folder in folders if (file := folder / SETTINGS_NAME).is_file()), None)
    if record is None:
        return asked
    data = json.loads(record.read_text(encoding="utf-8")).get("data", {})
    known = {name: data.get(name) for name in ("task", "data_dir", "scoring", "max_length")}
    return EvaluateArguments(**{**asdict(asked), **{k: v for k, v in known.items() if getattr(asked, k) is None}})


def load_model(asked: EvaluateArguments, model: Any) -> tuple[Any, Any]:
    """Model and tokenizer; what is not asked for is as the adapter's run had it."""
    if asked.ep_size > 1 and asked.adapter is None:
        raise UserError(f"--ep_size {asked.ep_size} is for the experts of an adapter: add --adapter, or leave it out")
    if world_size() % asked.ep_size:
        raise UserError(f"--ep_size {asked.ep_size} does not divide the {world_size()} ranks of this job")
    try:
        return load_adapted(
            asked.adapter,
            model.model_name_or_path,
            adapter_revision=asked.adapter_revision,
            revision=None if model.revision == "main" else model.revision,
            token=model.token,
            trust_remote_code=model.trust_remote_code,
            dtype=model.dtype,
            quantization=None if model.quantization == "none" else model.quantization,
            attn_implementation=model.attn_implementation,
            ep_size=asked.ep_size,
        )
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def means(results: list[TaskResult]) -> dict[str, float]:
    """The mean accuracy over tasks, which weighs every task alike."""
    return {"mean_accuracy": sum(result.accuracy for result in results) / len(results)}


def format_results(results: list[TaskResult], name: str) -> str:
    """The results as a table."""
    rows = [("task", "split", "scoring", "rows", "accuracy", "95% interval", "chance", "")]
    for r in results:
        notes = [f"{metric.replace('_', ' ')} {value:.3f}" for metric, value in r.metrics.items()]
        notes += [f"{r.truncated} prompts cut to --max_length"] if r.truncated else []
        low, high = r.interval
        numbers = (f"{r.accuracy:.3f}", f"{low:.3f} to {high:.3f}", f"{r.chance:.3f}")
        rows.append((r.task, r.split, r.scoring, str(r.rows), *numbers, ", ".join(notes)))
    if len(results) > 1:
        rows.append(("mean", "", "", "", f"{means(results)['mean_accuracy']:.3f}", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["", name, "-" * max(map(len, lines)), *lines])
