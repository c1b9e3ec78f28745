"""The Trainer's checkpoints in our own form: small, complete or absent, loadable into any layout.

``checkpoint-N`` holds

    training_state/     weights and moments, a file per rank, and the index of what lies where
    adapter_config.json, trainer_state.json, scheduler.pt, batch.json, rng_state_<rank>.pth, tokenizer files
    manifest.json       sizes and SHA-256 of all of them, written last

It replaces DeepSpeed's files, which hold the frozen base and fit one layout only.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from ldmole_ds.checkpoint import CheckpointError, has_training_state, list_checkpoints, recover, save_folder
from ldmole_ds.distributed.agreement import everyones, raise_together
from ldmole_ds.distributed.optimizer_shards import OptimizerShards
from ldmole_ds.model import adapter_io
from ldmole_ds.model.training_state import first_problem, load_state, save_state
from ldmole_ds.training.batch_record import BatchRecord, check_batch

logger = logging.getLogger(__name__)
SCHEDULER_NAME, TRAINER_STATE_NAME = "scheduler.pt", "trainer_state.json"


def find_checkpoint(run: Path, value: str | bool | None, rank: int = 0) -> Path | None:
    """The checkpoint to resume from, all its files compared with its manifest. Collective.

    Args:
        run: The run's folder.
        value: A checkpoint folder; True for the newest whole one; "auto" for the same, or none if there is none.
        rank: This rank; rank 0 says what it found.

    Raises:
        CheckpointError: The folder is damaged, or there is none.
    """
    if not value:
        return None
    tell = logger.warning if rank == 0 else logger.debug
    with raise_together(lambda reason: CheckpointError(f"{run} cannot be searched for checkpoints: {reason}")):
        if rank == 0 and run.is_dir():
            recover(run)
        found = list_checkpoints(run) if rank == 0 and run.is_dir() else []
    if value is not True and value != "auto":
        if not has_training_state(value):
            raise CheckpointError(
                f"--resume_from_checkpoint {value} is no training checkpoint: give a checkpoint-N folder, or pass "
                "--resume auto"
            )
        problem = first_problem(Path(value))
        if problem:
            raise CheckpointError(f"{value} is damaged: {problem}. Resume from an older one, or with --resume auto")
        return Path(value)
    for folder in everyones(found)[0]:
        problem = first_problem(folder)
        if problem is None:
            tell("resuming from %s", folder)
            return folder
        tell("%s is damaged: %s; trying the one before", folder, problem)
    if value == "auto":
        tell("no whole checkpoint in %s: starting from the beginning", run)
        return None
    raise CheckpointError(f"{run} holds no whole checkpoint to resume from: start anew, or name one")


class UnsupportedOptimizerError(CheckpointError, ValueError):
    """An optimizer whose state checkpoints cannot hold."""


class CheckpointableCallback(TrainerCallback):
    """Asks after the first step, when the optimizer's state exists, whether it can be saved: not hours later."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.checked = trainer, False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self.checked and args.save_strategy != "no" and not args.save_only_model:
            try:
                for flat in OptimizerShards(*self.trainer.model_and_optimizer()).flats:
                    flat.moments()
            except ValueError as error:
                raise UnsupportedOptimizerError(str(error)) from error
        self.checked = True


class CheckpointMixin:
    """Overrides of the Trainer for saving and resuming; see the module."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with ``resume_from_checkpoint`` as in `find_checkpoint`."""
        rank = self.args.process_index
        folder = find_checkpoint(Path(self.args.output_dir), resume_from_checkpoint, rank)
        if folder is not None:
            check_batch(folder, self._batch_record, rank)
            self.args.eval_on_start = False  # that was before the first step
        return super().train(str(folder) if folder else None, *args, **kwargs)

    def model_and_optimizer(self) -> tuple[Any, Any]:
        """The `LDMoLEModel`, and what steps it: the engine's optimizer, or torch's."""
        return self.model, self.deepspeed.optimizer if self.deepspeed is not None else self.optimizer

    @property
    def _batch_record(self) -> BatchRecord:
        return BatchRecord.of(self.args, self.batch_size_warmup)

    # ---- saving ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        run, state = Path(self._get_output_dir(trial=trial)), self.state
        place = run / f"checkpoint-{state.global_step}"
        if state.best_global_step:
            best = run / f"checkpoint-{state.best_global_step}"
            if best == place or best.is_dir():
                state.best_model_checkpoint = str(best)
        save_folder(place, self._write_checkpoint, self.args.process_index)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )

    def _write_checkpoint(self, folder: Path) -> list[Path]:
        written: list[Path] = []
        if self.args.save_only_model:
            self.model.save_pretrained(folder)
        else:
            written = save_state(*self.model_and_optimizer(), folder, self.deepspeed)
            self._save_rng_state(str(folder))
            own = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
            written.append(folder / f"rng_state{own}.pth")
            self._save_scaler(str(folder))
        if self.args.should_save:
            if not self.args.save_only_model:
                self._batch_record.write(folder)
                if self._scheduler_is_ours:
                    torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            self._note_callbacks()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        return written

    @property
    def _scheduler_is_ours(self) -> bool:
        """Whether the scheduler is not one that DeepSpeed steps (the engine's state holds that)."""
        return type(self.lr_scheduler).__name__ != "DeepSpeedSchedulerWrapper"

    def _note_callbacks(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                kept, name = self.state.stateful_callbacks, type(callback).__name__
                if isinstance(kept.get(name), list):
                    kept[name].append(callback.state())
                else:
                    kept[name] = callback.state()

    # ---- resuming ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights are loaded with the optimizer, once both are where they will be trained."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._resume(Path(resume_from_checkpoint))
        return prepared

    def _resume(self, folder: Path) -> None:
        layout = load_state(*self.model_and_optimizer(), folder, self.deepspeed)
        if self._scheduler_is_ours:
            with raise_together(lambda reason: CheckpointError(f"{folder / SCHEDULER_NAME}: {reason}")):
                saved = torch.load(folder / SCHEDULER_NAME, weights_only=True)
                self.lr_scheduler.load_state_dict(self._scheduler_state(saved))
        self._load_scaler(str(folder))
        if layout["world_size"] != self.args.world_size and self.args.should_save:
            logger.warning(
                "%s was saved on %d ranks, this is %d: training goes on as it would have, but for dropout masks, which "
                "differ with the number of ranks",
                folder,
                layout["world_size"],
                self.args.world_size,
            )

    def _scheduler_state(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The saved state for this layout's parameter groups, whose number may be another (experts have their own)."""
        groups, fresh = self.optimizer.param_groups, self.lr_scheduler.state_dict()
        of_groups = {k: v for k, v in fresh.items() if isinstance(v, list) and len(v) == len(groups)}
        if "base_lrs" in saved:  # reduce_lr_on_plateau has none
            of_groups["base_lrs"] = [group["initial_lr"] for group in groups]
        of_groups["_last_lr"] = [group["lr"] for group in groups]
        return {key: of_groups.get(key, value) for key, value in saved.items()}

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        logger.info("loading the best model, of %s (%s)", folder, self.state.best_metric)
        problem = first_problem(folder)
        if problem:
            raise CheckpointError(f"the best checkpoint {folder} is damaged: {problem}")
        model, optimizer = self.model_and_optimizer()
        if has_training_state(folder):
            load_state(model, optimizer, folder, self.deepspeed, weights_only=True)
        else:
            adapter_io.load_state(model, adapter_io.read_adapter(folder), str(folder))
            if hasattr(optimizer, "refresh_fp32_params"):
                optimizer.refresh_fp32_params()
