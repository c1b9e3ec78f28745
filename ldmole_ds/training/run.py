"""One training run from parsed flags to report: the body of ``launch/train.py``."""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction
from transformers.utils import logging as hf_logging

from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.adapter_io import load_state
from ldmole_ds.tasks.metrics import task_metrics
from ldmole_ds.tasks.sft.collate import DocumentCollator, PackedCollator
from ldmole_ds.training import runtime
from ldmole_ds.training.adapter_start import start_from_adapter
from ldmole_ds.training.argument_groups import LDMoLETrainingArguments
from ldmole_ds.training.arguments import adapter_config
from ldmole_ds.training.batch import BatchSizeWarmup, batch_size_warmup
from ldmole_ds.training.callbacks import GroupTimeoutCallback, SettingsFileCallback
from ldmole_ds.training.data import ChoiceData
from ldmole_ds.training.ds_config import check_device, check_ds_config, check_precision, read_ds_config
from ldmole_ds.training.finish import finish
from ldmole_ds.training.memory import MemoryOfTraining
from ldmole_ds.training.metrics_file import MetricsFileCallback
from ldmole_ds.training.optimizer_check import check_optimizer
from ldmole_ds.training.packing_check import PackingCheckCallback
from ldmole_ds.training.placement import gather_places, placement_table
from ldmole_ds.training.preemption import EXIT_PREEMPTED
from ldmole_ds.training.run_record import SETTINGS_NAME, check_output_folder, run_settings, write_json
from ldmole_ds.training.runtime import UserError, agreed, is_main_process
from ldmole_ds.training.setup import build_model, build_settings, load_base, load_data
from ldmole_ds.training.sft import SFTData, SFTLossTrainer
from ldmole_ds.training.trainer import LDMoLETrainer


def train(flags: Namespace) -> None:
    """Run it. Collective: every rank calls it with the same flags."""
    try:
        config, start = adapter_config(flags), None
        if flags.deepspeed:
            ds_config = read_ds_config(flags.deepspeed)
            check_ds_config(ds_config, flags.deepspeed)
            check_precision(ds_config, flags.deepspeed, bf16=flags.bf16, fp16=flags.fp16)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    device = runtime.start(
        use_deepspeed=bool(flags.deepspeed),
        timeout_s=int(flags.ddp_timeout),
        network_interface=flags.network_interface,
    )
    quiet_libraries()
    if flags.deepspeed:
        with agreed("precision"):
            check_device(bf16=flags.bf16, fp16=flags.fp16)
    places = gather_places()
    memory = MemoryOfTraining()
    if flags.adapter_name_or_path:
        with agreed("starting adapter"):
            config, start = start_from_adapter(flags)
    settings = build_settings(flags, device)
    training, layout = settings["training"], settings["layout"]
    folder = Path(training.output_dir)
    with agreed("output folder"):
        if is_main_process():
            resume = bool(training.resume_from_checkpoint) or layout.resume == "auto"
            check_output_folder(folder, overwrite=layout.overwrite_output_dir, resume=resume)
    tokenizer, data = load_data(settings)
    with agreed("model"):
        base = load_base(settings["model"], training)
    with agreed("adapter"):
        model = build_model(base, config, data, settings, places)
        if start is not None:
            load_state(model, start, source=flags.adapter_name_or_path)
    with agreed("trainer"):
        warmup = batch_size_warmup(settings["batch"])
        check_optimizer(training, model)
        check_best_metric(training, data)
        try:
            trainer = build_trainer(model, tokenizer, data, training, warmup)
        except RuntimeError as error:  # a package that --report_to needs
            raise ValueError(str(error)) from error
    if is_main_process():
        record = {name: group.to_dict() if name == "training" else asdict(group) for name, group in settings.items()}
        resolved = {"world_size": model.topology.world_size, "ep_size": model.topology.ep_size}
        record["model"]["token"] = None
        adapter = model.adapter_config.to_dict()
        record = run_settings(**record, adapter=adapter, resolved=resolved, seed=training.seed)
        trainer.add_callback(SettingsFileCallback(folder / SETTINGS_NAME, record))
        print(startup_table(model, data, training, warmup), flush=True)
        print(placement_table(places, model.topology, model.adapter_config.num_experts), flush=True)
        if start is not None:
            print(f"start     the weights of {flags.adapter_name_or_path}", flush=True)
        if data.label_words:
            write_json(folder / "label_words.json", data.label_words)
    resume = "auto" if layout.resume == "auto" else _resume(training.resume_from_checkpoint)
    trainer.add_callback(memory)
    finish(trainer, model, data, folder, resume, memory)
    runtime.stop()
    if trainer.preemption.stopped_by:
        runtime.leave(EXIT_PREEMPTED)


def quiet_libraries() -> None:
    """Leave the log to the run: libraries speak from warnings up, and only on rank 0."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    level = logging.WARNING if is_main_process() else logging.ERROR
    logging.getLogger("DeepSpeed").setLevel(level)
    logging.getLogger("accelerate").setLevel(level)
    hf_logging.set_verbosity(level)
    if not is_main_process():
        hf_logging.disable_progress_bar()


def choice_metrics(data: ChoiceData) -> Callable[[EvalPrediction], dict[str, float]]:
    """What the Trainer calls after each evaluation: `task_metrics` of the held-out rows, whose order it keeps.

    Its ``loss`` takes the place of the Trainer's, in which rows that fill up the last batch of all ranks count twice.
    It also leaves the answers in ``data``.
    """
    validation = data.validation

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        if prediction.label_ids.tolist() != [question.gold for question in validation.questions]:
            raise ValueError("the answers are not those of the held-out rows in their order")
        tasks = [question.task for question in validation.questions]
        answers = np.argmax(prediction.predictions, axis=-1)
        data.note_answers(answers.tolist())
        right = np.take_along_axis(prediction.predictions, prediction.label_ids[:, None], axis=-1)
        return {"loss": -float(right.mean(dtype="float64")), **task_metrics(tasks, answers, prediction.label_ids)}

    return metrics


def check_best_metric(training: LDMoLETrainingArguments, data: ChoiceData | SFTData) -> None:
    """Before training, not after its first evaluation.

    Raises:
        ValueError: Evaluations have no such metric; names those that they have.
    """
    if training.metric_for_best_model is None or data.validation is None:
        return
    name, known = training.metric_for_best_model, data.metric_names
    if name.removeprefix("eval_") not in known:
        raise ValueError(f"--metric_for_best_model {name} is not one of {', '.join(known)}")


def build_trainer(
    model: LDMoLEModel,
    tokenizer: Any,
    data: ChoiceData | SFTData,
    training: LDMoLETrainingArguments,
    warmup: BatchSizeWarmup | None = None,
) -> LDMoLETrainer:
    """The Trainer of a run."""
    common = {
        "train_dataset": data.train,
        "eval_dataset": data.validation,
        "data_collator": data.collator,
        "processing_class": tokenizer,
        "callbacks": [GroupTimeoutCallback()],
        "batch_size_warmup": warmup,
        "peak_tflops": training.peak_tflops,
    }
    if isinstance(data, SFTData):
        if isinstance(data.collator, PackedCollator):
            data.collator.one_row = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
            common["callbacks"].append(PackingCheckCallback(data.collator))
        trainer = SFTLossTrainer(model, training, eval_collator=DocumentCollator(data.pad_token_id), **common)
    else:
        metrics = choice_metrics(data)
        trainer = LDMoLETrainer(
            model, training, compute_metrics=metrics, single_token_choices=data.single_token, **common
        )
    trainer.add_callback(MetricsFileCallback(trainer, per_layer=training.log_per_layer))
    return trainer


def startup_table(
    model: LDMoLEModel,
    data: ChoiceData | SFTData,
    training: LDMoLETrainingArguments,
    warmup: BatchSizeWarmup | None = None,
) -> str:
    """What is about to run, in a few lines."""
    topology, config = model.topology, model.adapter_config
    accumulation, micro = training.gradient_accumulation_steps, training.per_device_train_batch_size
    parameters = model.num_parameters_by_kind()
    held = len(topology.local_experts(config.num_experts))
    projections = sum(len(g.members) for g in model.input_groups)
    full = micro * accumulation * topology.world_size
    lines = [
        f"data      {data.summary()}",
        f"adapter   {config.router}, {config.num_experts} experts of rank {config.r} on {projections} projections "
        f"in {len(model.input_groups)} input groups, {parameters['trainable']:,} trainable parameters",
        f"layout    {topology.world_size} ranks, ep_size {topology.ep_size}: {held} of {config.num_experts} "
        f"experts on each rank, expert_dispatch {model.expert_dispatch}",
        f"batch     {micro} rows x {accumulation} accumulation x {topology.world_size} ranks = "
        f"{full} rows a step, learning rate {training.learning_rate:g}",
    ]
    if warmup is not None:
        lines.append(f"warm-up   {warmup.describe(full)}")
    return "\n".join(lines)


def _resume(value: str | None) -> str | bool | None:
    return {"true": True, "True": True, "false": None, "False": None}.get(value, value)
