"""Batch-size warm-up: the rows of every optimizer step, and a Trainer loop that takes them.

The Trainer's loop counts the same number of micro-steps for every optimizer step. Steps with fewer rows therefore begin
with empty micro-steps, which are passed over without a forward pass or a collective, on all ranks alike; what is left
is a step with less accumulation. So nothing is computed in vain, and what counts optimizer steps (learning rate,
logging, checkpoints) needs no change. Epochs differ in their number of steps, which the Trainer must be told: it takes
all for as long as the first.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from ldmole_ds.training.batch import BatchSizeWarmup

logger = logging.getLogger(__name__)


class StepRows(Sampler[list[int]]):
    """One rank's micro-batches: always ``accumulation`` lists of row numbers for an optimizer step.

    The first ones are empty where a step has fewer rows. Steps take the rows in the order of ``sampler``, which must be
    the same on all ranks, so the rows of a step do not depend on the layout, and neither do those of its micro-steps
    while ``micro * world_size`` stays the same. The last step of an epoch has what is left; where that is no multiple
    of the ranks, some of the epoch's first rows fill it up (fewer than ranks).

    Args:
        sampler: Draws the rows of an epoch.
        warmup: Sizes of the first steps.
        micro: Most rows of one rank in a micro-step.
        accumulation: Micro-steps of a full optimizer step.
        rank, world_size: This rank, of how many.
        drop_last: Leave out the last step of an epoch where it is smaller than due.

    Attributes:
        epoch: Whose steps come next. Accelerate tells ``sampler``.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        warmup: BatchSizeWarmup,
        *,
        micro: int,
        accumulation: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.sampler, self.warmup, self.drop_last = sampler, warmup, drop_last
        self.micro, self.accumulation, self.rank, self.world_size = micro, accumulation, rank, world_size
        self.epoch = 0
        if not self.sizes(0):
            raise ValueError(f"{len(sampler)} training rows fill no optimizer step: add rows, or keep the last batch")

    def sizes(self, epoch: int) -> list[int]:
        """Rows of each optimizer step of an epoch, without those that fill up its last one."""
        step, full = self.first_step(epoch), self.micro * self.accumulation * self.world_size
        left, sizes = len(self.sampler), []
        while left:
            due = self.warmup.rows(step + len(sizes), full)
            if left < due and self.drop_last:
                break
            sizes.append(min(due, left))
            left -= sizes[-1]
        return sizes

    def first_step(self, epoch: int) -> int:
        """Optimizer steps before an epoch."""
        return 0 if epoch == 0 else self.first_step(epoch - 1) + len(self.sizes(epoch - 1))

    def position(self, step: int) -> tuple[int, int]:
        """Epoch, and step in it, after so many optimizer steps."""
        epoch = 0
        while step >= (steps := len(self.sizes(epoch))):
            epoch, step = epoch + 1, step - steps
        return epoch, step

    def __len__(self) -> int:
        return self.accumulation * len(self.sizes(self.epoch))

    def __iter__(self) -> Iterator[list[int]]:
        sizes, order = self.sizes(self.epoch), list(self.sampler)
        start = 0
        for size in sizes:
            rows = order[start : start + size]
            start += size
            rows += itertools.islice(itertools.cycle(order), -size % self.world_size)
            yield from self._micro_batches(rows)

    def _micro_batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        pass_rows = self.micro * self.world_size
        passes = [rows[i : i + pass_rows] for i in range(0, len(rows), pass_rows)]
        yield from ([] for _ in range(self.accumulation - len(passes)))
        for part in passes:
            share = len(part) // self.world_size
            yield list(part[self.rank * share : (self.rank + 1) * share])


class _CollateRows:
    """The collator, but nothing for no rows. A class, so that data-loading processes can be handed it."""

    def __init__(self, collator: Callable[[list], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: list) -> Any:
        return self.collator(rows) if rows else {}


class BatchWarmupLoop(Trainer):
    """The Trainer with a batch that grows, where ``batch_size_warmup`` is set."""

    batch_size_warmup: BatchSizeWarmup | None = None
    _step_rows: StepRows | None = None
    _micro_steps = 1

    def check_batch_size_warmup(self) -> None:
        """Refuse what the warm-up cannot go with.

        Raises:
            ValueError: Names the setting and the remedy.
        """
        if not hasattr(Trainer, "_run_epoch"):
            raise ValueError("batch-size warm-up needs a newer transformers: pip install --upgrade transformers")
        args, options = self.args, self.args.accelerator_config
        micro, accumulation, world_size = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
        self.batch_size_warmup.check(micro * accumulation * world_size, world_size)
        unsuited = {
            "--auto_find_batch_size": args.auto_find_batch_size,
            "--train_sampling_strategy batch_rebalance": args.train_sampling_strategy == "batch_rebalance",
            "split_batches in --accelerator_config": options.split_batches,
            "dispatch_batches in --accelerator_config": options.dispatch_batches,
            "training rows without a length": not hasattr(self.train_dataset, "__len__"),
        }
        for name, present in unsuited.items():
            if present:
                raise ValueError(f"batch-size warm-up does not work with {name}: leave out one of the two")

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, which then goes through the rows of growing steps."""
        loader = super().get_train_dataloader()
        if self.batch_size_warmup is None:
            return loader
        args, whole = self.args, loader.batch_sampler
        self._step_rows = StepRows(
            getattr(whole, "batch_sampler", whole).sampler,  # inside what deals batches out to ranks
            self.batch_size_warmup,
            micro=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            rank=args.process_index,
            world_size=args.world_size,
            drop_last=args.dataloader_drop_last,
        )
        kept = ("num_workers", "pin_memory", "worker_init_fn", "multiprocessing_context", "prefetch_factor",
                "persistent_workers", "in_order")  # fmt: skip
        return DataLoaderShard(
            loader.dataset,
            device=loader.device,
            batch_sampler=self._step_rows,
            collate_fn=_CollateRows(loader.collate_fn),
            **{name: getattr(loader, name) for name in kept},
        )

    def set_initial_training_values(self, args, dataloader, *rest):
        """Epochs and steps, counted from the rows of each step."""
        values = super().set_initial_training_values(args, dataloader, *rest)
        if self._step_rows is None:
            return values
        _, _, num_examples, _, total_batch_size, _, _ = values
        steps = self._step_rows
        first_epoch = len(steps.sizes(0))
        if args.max_steps > 0:
            max_steps = args.max_steps
            num_epochs = steps.position(max_steps - 1)[0] + 1
        else:
            whole = int(args.num_train_epochs)
            part = args.num_train_epochs - whole
            max_steps = steps.first_step(whole) + math.ceil(part * len(steps.sizes(whole)))
            num_epochs = math.ceil(args.num_train_epochs)
        if max_steps <= self.batch_size_warmup.steps:
            logger.warning(
                "the run ends after %d optimizer steps, before the batch has its full size: lower "
                "--batch_size_warmup_steps %d",
                max_steps,
                self.batch_size_warmup.steps,
            )
        every_size = itertools.chain.from_iterable(map(steps.sizes, range(num_epochs)))
        rows = sum(itertools.islice(every_size, max_steps))
        micro_steps = first_epoch * args.gradient_accumulation_steps
        return num_epochs, first_epoch, num_examples, rows, total_batch_size, micro_steps, max_steps

    def _init_training_state(self, *args, **kwargs):
        # Where a resumed run stands: epochs trained, and micro-steps in the next one.
        trained = super()._init_training_state(*args, **kwargs)
        if self._step_rows is None:
            return trained
        epoch, steps = self._step_rows.position(self.state.global_step)
        return epoch, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def _run_epoch(self, *, epoch, steps_in_epoch, num_update_steps_per_epoch, **kwargs):
        if self._step_rows is not None:
            self._step_rows.epoch = epoch
            num_update_steps_per_epoch = len(self._step_rows.sizes(epoch))
            steps_in_epoch = num_update_steps_per_epoch * self.args.gradient_accumulation_steps
        return super()._run_epoch(
            epoch=epoch,
            steps_in_epoch=steps_in_epoch,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            **kwargs,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, empty ones first; items are counted in the others."""
        if self._step_rows is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        drawn = list(itertools.islice(epoch_iterator, num_batches))
        batches = [batch for batch in drawn if batch]
        self._micro_steps = len(batches)
        batches, num_items = super().get_batch_samples(iter(batches), len(batches), device)
        return [{}] * (len(drawn) - len(batches)) + batches, num_items

    def training_step(self, model, inputs, *args, **kwargs):
        """Forward and backward of one micro-batch; nothing for an empty one."""
        if self._step_rows is None:
            return super().training_step(model, inputs, *args, **kwargs)
        if not inputs:
            return torch.zeros((), device=self.args.device)
        self.current_gradient_accumulation_steps = self._micro_steps
        return super().training_step(model, inputs, *args, **kwargs)
