"""`LDMoLETrainer`: the Hugging Face Trainer, with expert-parallel gradients, losses and saves."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import get_parameter_names
from transformers.utils import find_labels

from ldmole_ds.distributed import deepspeed_groups
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.adapter_io import write_atomically
from ldmole_ds.tasks.scoring import score_candidates
from ldmole_ds.training.batch import BatchSizeWarmup
from ldmole_ds.training.batch_warmup import BatchWarmupLoop
from ldmole_ds.training.checkpointing import CheckpointableCallback, CheckpointMixin
from ldmole_ds.training.checks import check_trainable
from ldmole_ds.training.flops import device_peak_tflops
from ldmole_ds.training.live_metrics import LogWindow, TokenCounts, count_tokens
from ldmole_ds.training.preemption import PreemptionCallback

_CHOICE_FIELDS = ("candidate_ids", "candidate_lengths", "gold", "prompt_length")


class LDMoLETrainer(CheckpointMixin, BatchWarmupLoop):
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
        self.preemption = PreemptionCallback()
        self.add_callback(self.preemption)
        self.add_callback(CheckpointableCallback(self))
        self.single_token_choices = single_token_choices
        self.batch_size_warmup = batch_size_warmup
        if batch_size_warmup is not None:
            self.check_batch_size_warmup()
        # The Trainer looks at our class, which names no labels, and takes every forward with **kwargs for one that
        # hands num_items_in_batch to its loss. Losses other than the causal one are means over their micro-batch.
        if self.args.label_names is None:
            self.label_names = find_labels(type(model.base_model))
        # The Trainer's own name: it counts shifted labels by it. It goes by loss_type, which GPT-2 has none of.
        self._loss_shifts_labels = getattr(model, "loss_function", None) is ForCausalLMLoss
        if not hasattr(model, "accepts_loss_kwargs"):
            self.model_accepts_loss_kwargs &= self._loss_shifts_labels
        self.log_window = LogWindow(model, 0, peak_tflops or device_peak_tflops(self.args.device))
        self.tokens_timed, self.train_seconds, self.operations = 0, 0.0, 0.0
        check_trainable(model, self.args, self._zero_stage)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func would leave out the auxiliary losses: override compute_loss in a subclass instead, "
                "and add model.weighted(outputs.aux_losses)"
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy (smoothed if asked for) plus auxiliary losses, as this rank's share of the global mean."""
        inputs = {k: v for k, v in inputs.items() if k not in _CHOICE_FIELDS}
        if not return_outputs:  # metrics want all logits
            inputs = _keep_answer_logits(inputs, self._forward_parameters)
        inputs = self._accepted(inputs)
        # A model that takes num_items_in_batch returns its share of the whole optimizer step; one that does not,
        # the mean of its micro-batch, which the Trainer averages.
        num_items = num_items_in_batch if self.model_accepts_loss_kwargs else None
        if num_items is not None:
            inputs["num_items_in_batch"] = num_items
            if model.training:
                inputs["num_routed_tokens"] = self._num_routed_tokens
                inputs["gradient_accumulation_steps"] = self.current_gradient_accumulation_steps
        outputs = model(**inputs)
        loss = outputs["loss"]
        if self.args.label_smoothing_factor and model.training:
            loss = loss + self._smoothing(outputs["logits"], inputs["labels"], num_items)
        if num_items is not None:
            loss = loss * self.accelerator.num_processes
        if model.training:
            self._note_losses(outputs, num_items)
        return (loss, outputs) if return_outputs else loss

    def _smoothing(self, logits: Tensor, labels: Tensor, num_items: Tensor | None) -> Tensor:
        """What label smoothing adds to the cross-entropy: ``epsilon (mean_v -log p_v - (-log p_label))``."""
        if self._loss_shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        valid = labels.ne(-100)
        log_probs = F.log_softmax(logits[valid].float(), dim=-1)
        nll = -log_probs.gather(-1, labels[valid].unsqueeze(-1)).sum()
        uniform = -log_probs.mean(-1).sum()
        count = valid.sum() if num_items is None else num_items
        return self.args.label_smoothing_factor * (uniform - nll) / count

    @property
    def _forward_parameters(self) -> set[str]:
        # Not of our model: other trainers put forwards of their own in front of it.
        return set(inspect.signature(self.model.base_model.forward).parameters)

    def _accepted(self, inputs: dict) -> dict:
        if "position_ids" in inputs and "position_ids" not in self._forward_parameters:
            inputs.pop("position_ids")
        return inputs

    def _note_losses(self, outputs, num_items: Tensor | None) -> None:
        # Each value becomes this rank's share of the step's: a share of the global sum, or of the micro-steps' mean.
        accumulation = self.current_gradient_accumulation_steps
        scale = self.accelerator.num_processes if num_items is not None else 1 / accumulation
        aux = outputs["aux_losses"]
        with torch.no_grad():
            cross_entropy = outputs["loss"] - self.model.weighted(aux)
            for name, value in {"cross_entropy": cross_entropy, **aux}.items():
                self.log_window.add_loss(name, value * scale)

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
        """Write the whole adapter (all experts of all ranks) and the tokenizer. Collective."""
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            write_atomically(Path(folder) / "training_args.bin", lambda path: torch.save(self.args, path))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def _keep_answer_logits(inputs: dict, parameters: set[str]) -> dict:
    """Compute logits only from the first answer token on: exact, and most of the head's cost when prompts are long."""
    labels = inputs.get("labels")
    if labels is None or "logits_to_keep" not in parameters or labels.dim() != 2:
        return inputs
    columns = labels.ne(-100).any(0).nonzero()
    if columns.numel() == 0 or labels.shape[1] < 2:
        return inputs
    keep = labels.shape[1] - max(int(columns[0]), 1) + 1
    return {**inputs, "labels": labels[:, -keep:], "logits_to_keep": keep}
