"""`LDMoLETrainer`: the Hugging Face Trainer, with expert-parallel gradients, losses and saves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers.trainer_pt_utils import get_parameter_names

from ldmole_ds.distributed import deepspeed_groups
from ldmole_ds.distributed.agreement import raise_together
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.adapter_io import write_atomically
from ldmole_ds.tasks.scoring import score_candidates
from ldmole_ds.training.batch import BatchSizeWarmup
from ldmole_ds.training.batch_warmup import BatchWarmupLoop
from ldmole_ds.training.checkpointing import CheckpointableCallback, CheckpointMixin
from ldmole_ds.training.checks import check_trainable
from ldmole_ds.training.flops import device_peak_tflops
from ldmole_ds.training.length_groups import LengthGroups, row_lengths
from ldmole_ds.training.live_metrics import LogWindow, TokenCounts, count_tokens
from ldmole_ds.training.preemption import PreemptionCallback
from ldmole_ds.training.step_loss import StepLossMixin

logger = logging.getLogger(__name__)


class LDMoLETrainer(CheckpointMixin, StepLossMixin, BatchWarmupLoop):
    """Trains an `LDMoLEModel`; everything else is the Trainer's.

    What differs: the optimizer's groups tell DeepSpeed which parameters are experts; the loss holds the auxiliary
    losses, normalised over the whole optimizer step; logs hold the routing; saving writes the whole adapter, and
    checkpoints resume in any layout; SIGTERM and SIGUSR1 stop it with a checkpoint. Batches with ``candidate_ids`` and
    ``gold`` (multiple choice) are evaluated by the candidates' log-probabilities.

    Another trainer whose loss is the model's own gets all of it by inheriting from both, this one first:
    ``class LDMoLESFTTrainer(LDMoLETrainer, SFTTrainer)``, see ``examples/trl_sft.py``.

    Args:
        model: The wrapped model.
        *args: As the Trainer.
        single_token_choices: Multiple choice: whether every candidate is one token.
        batch_size_warmup: A global batch that grows over the first optimizer steps to its full size, which is
            ``per_device_train_batch_size * gradient_accumulation_steps`` on every rank.
        peak_tflops: Of one device, 10^12 operations a second, for MFU in the logs; default: by the card's name, and no
            MFU where it is not in the table (`ldmole_ds.training.flops`).
        **kwargs: As the Trainer.

    Raises:
        ValueError: A combination that would train wrongly; the message names the setting and the remedy.
    """

    def __init__(
        self,
        model: LDMoLEModel,
        *args: Any,
        single_token_choices: bool = False,
        batch_size_warmup: BatchSizeWarmup | None = None,
        peak_tflops: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        self._use_one_gpu()
        self.preemption = PreemptionCallback()
        self.add_callback(self.preemption)
        self.add_callback(CheckpointableCallback(self))
        self.single_token_choices = single_token_choices
        self.batch_size_warmup = batch_size_warmup
        if batch_size_warmup is not None:
            self.check_batch_size_warmup()
        self.log_window = LogWindow(model, 0, peak_tflops or device_peak_tflops(self.args.device))
        self.tokens_timed, self.train_seconds, self.operations = 0, 0.0, 0.0
        check_trainable(model, self.args, self._zero_stage)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func would leave out the auxiliary losses: override compute_loss in a subclass instead, "
                "and add model.weighted(outputs.aux_losses)"
            )

    def _use_one_gpu(self) -> None:
        """The Trainer gives a process that sees several GPUs to DataParallel, whose copies would share experts."""
        seen = self.args.n_gpu
        if seen > 1:
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size  # was rows for all of them
            logger.warning(
                "one process trains on one of the %d GPUs that it sees: for all of them start it with deepspeed "
                "--num_gpus %d, or torchrun --nproc_per_node %d",
                *[seen] * 3,
            )

    @property
    def _zero_stage(self) -> int | None:
        """ZeRO stage of the DeepSpeed config, None without DeepSpeed."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin.zero_stage if self.is_deepspeed_enabled and plugin is not None else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with experts in groups of their own where DeepSpeed wants them so."""
        split = self._zero_stage in (1, 2) and any(
            deepspeed_groups.is_expert_parameter(p) for p in self.model.parameters()
        )
        if type(self.optimizer).__name__ == "DummyOptim":  # the optimizer comes from the DeepSpeed config
            decay = set(self.get_decay_parameter_names(self.model))
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for n, p in named if n in decay], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            self.optimizer.params = deepspeed_groups.split_expert_param_groups(groups) if split else groups
            return self.optimizer
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            if split:
                optimizer.param_groups[:] = deepspeed_groups.split_expert_param_groups(optimizer.param_groups)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """The Trainer's, but for grouping by length, see `LengthGroups`."""
        dataset, args = train_dataset if train_dataset is not None else self.train_dataset, self.args
        if args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthGroups(row_lengths(dataset), step, seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """Held-out rows stay in their order."""
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(eval_dataset, "__len__"):
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Every trainable parameter but biases and norms."""
        forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
        return get_parameter_names(model, [nn.LayerNorm], forbidden)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step; counts the tokens that all ranks will route in it."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        real = filter(None, batches)  # empty ones are passed over (batch-size warm-up)
        counts = sum((count_tokens(batch).cpu() for batch in real), torch.zeros(4, dtype=torch.long))
        if not self.tokens_timed and not self.log_window.tokens.real:
            self.restart_window()  # what came before the first step is no training time
        if self.args.world_size > 1:
            counts = counts.to(device)
            dist.all_reduce(counts)
        counts = TokenCounts(counts)
        self._num_routed_tokens = counts.real if self.model.adapter_config.mask_padding else counts.padded
        self.log_window.tokens += counts
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds auxiliary losses, routing and speed to the training logs. Every rank logs, so it may reduce."""
        if "loss" in logs:
            logs.update(self._training_metrics())
        super().log(logs, start_time)

    def _training_metrics(self) -> dict[str, float]:
        window = self.log_window
        metrics, seconds = window.metrics(self.state.global_step)
        self.train_seconds += seconds
        self.tokens_timed += window.tokens.real
        self.operations += window.operations
        self.restart_window()
        return metrics

    def restart_window(self) -> None:
        """Start the next logging window: what happens in between (evaluation) is in neither."""
        self.log_window.restart(self.state.global_step)

    def close_window(self) -> None:
        """Count what came after the last log. Collective."""
        if self.log_window.tokens.real:
            self._training_metrics()

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        """The Trainer's; ``dataloader_drop_last`` is for training: every held-out row counts."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation; its routing, traffic and time do not count into the training logs."""
        with self.log_window.paused() as self.eval_routing:
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Multiple choice: scores of all candidates, with the negative log-probability of the right one as loss."""
        if "candidate_ids" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            scores = score_candidates(model, inputs, single_token=self.single_token_choices)
        gold = inputs["gold"]
        loss = -scores.gather(1, gold.unsqueeze(1)).mean()
        return (loss, None, None) if prediction_loss_only else (loss, scores, gold)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole adapter (all experts of all ranks) and the tokenizer. Collective, and so is its failure."""
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder)
        with raise_together(OSError):
            if self.args.should_save:
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
                write_atomically(Path(folder) / "training_args.bin", lambda path: torch.save(self.args, path))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
