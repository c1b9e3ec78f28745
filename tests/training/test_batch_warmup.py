"""Batch-size warm-up: the schedule, the rows of every step in every layout, and the training that comes out."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from ldmole_ds.checkpoint import CheckpointError
from ldmole_ds.training.batch import BatchArguments, BatchSizeWarmup, batch_size_warmup
from ldmole_ds.training.batch_warmup import StepRows
from tests.distributed_utils import run_distributed
from tests.training.trainer_runs import (
    ROWS,
    assert_same,
    by_hand,
    collate,
    make_trainer,
    rows,
    start_deepspeed_state,
    train,
    zero_config,
)

# Of 24 rows: one epoch of 2, 4, 6, 8 and the 4 that are left, then three of 8 in each.
WARMUP = BatchSizeWarmup(start=2, steps=3)
FIRST_EPOCH = [2, 4, 6, 8, 4]


def test_the_batch_grows_linearly_in_multiples_of_its_start():
    assert [BatchSizeWarmup(16, 6).rows(step, 64) for step in range(8)] == [16, 16, 32, 32, 48, 48, 64, 64]
    assert [BatchSizeWarmup(16, 3).rows(step, 40) for step in range(4)] == [16, 16, 32, 40]
    sizes = [BatchSizeWarmup(16, 100).rows(step, 1024) for step in range(101)]
    assert sizes == sorted(sizes) and all(size % 16 == 0 for size in sizes)
    assert all(0 <= 16 + 1008 * step / 100 - size < 16 for step, size in enumerate(sizes))


def test_the_schedule_is_printed_in_a_line():
    assert BatchSizeWarmup(16, 5).describe(64) == "16 x 2, 32 x 2, 48 rows a step, 64 from step 6 on"
    assert BatchSizeWarmup(16, 63).describe(1024) == (
        "16, 32, 48, 64, ..., 992, 1008 rows a step, 1024 from step 64 on"
    )


@pytest.mark.parametrize(
    ("start", "steps", "message"),
    [
        (3, 4, r"--batch_size_warmup_start 3 is not a multiple of the 2 ranks, which take equally many rows: use 4"),
        (0, 4, "not a multiple of the 2 ranks.*use 2"),
        (16, 4, "--batch_size_warmup_start 16 is not below the 16 rows of a full batch: lower it"),
        (32, 4, "32 is not below the 16 rows"),
        (4, 0, "--batch_size_warmup_steps must be at least 1, got 0"),
        (None, 4, "--batch_size_warmup_steps needs --batch_size_warmup_start too"),
        (4, None, "--batch_size_warmup_start needs --batch_size_warmup_steps too"),
    ],
)
def test_a_warmup_that_cannot_be(start, steps, message):
    with pytest.raises(ValueError, match=message):
        arguments = BatchArguments(batch_size_warmup_start=start, batch_size_warmup_steps=steps)
        batch_size_warmup(arguments).check(16, world_size=2)


def test_no_warmup_without_its_flags():
    assert batch_size_warmup(BatchArguments()) is None


def step_rows(num_rows, warmup, micro, accumulation, rank=0, world_size=1, epoch=0, **settings):
    """One rank's micro-batches of every step of an epoch."""
    sampler = StepRows(
        SequentialSampler(range(num_rows)),
        warmup,
        micro=micro,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        **settings,
    )
    sampler.epoch = epoch
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]


@pytest.mark.parametrize(("micro", "accumulation"), [(8, 4), (4, 8), (32, 1)])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_every_layout_sees_the_same_rows_in_every_step_and_micro_step(micro, accumulation, epoch):
    warmup = BatchSizeWarmup(start=4, steps=9)

    def of_all_ranks(world_size):
        ranks = [
            step_rows(90, warmup, micro // world_size, accumulation, rank, world_size, epoch)
            for rank in range(world_size)
        ]
        for step in zip(*ranks, strict=True):
            for batches in zip(*step, strict=True):
                assert len({len(batch) for batch in batches}) == 1, "ranks with unequal micro-batches"
        return [[sum((rank[i][j] for rank in ranks), []) for j in range(accumulation)] for i in range(len(ranks[0]))]

    expected = of_all_ranks(1)
    assert [row for step in expected for batch in step for row in batch] == list(range(90)), "each row once"
    for world_size in (2, 4):
        found = of_all_ranks(world_size)
        assert found[:-1] == expected[:-1]
        last, whole = sum(found[-1], []), sum(expected[-1], [])
        assert last == whole + list(range(-len(whole) % world_size)), "the epoch's first rows fill its last step"


def test_steps_with_fewer_rows_begin_with_empty_micro_steps():
    steps = step_rows(ROWS, WARMUP, micro=1, accumulation=4, rank=1, world_size=2)
    assert steps == [
        [[], [], [], [1]],
        [[], [], [3], [5]],
        [[], [7], [9], [11]],
        [[13], [15], [17], [19]],
        [[], [], [21], [23]],
    ]
    assert step_rows(ROWS, WARMUP, 4, 2, epoch=1) == step_rows(ROWS, WARMUP, 4, 2, epoch=2)
    # Fewer rows than ranks, and rows that fill no step.
    assert [step_rows(1, WARMUP, 1, 4, rank, 4) for rank in range(4)] == [[[[], [], [], [0]]]] * 4
    assert sum(map(len, step_rows(ROWS, WARMUP, 2, 4, drop_last=True))) == 16
    with pytest.raises(ValueError, match="1 training rows fill no optimizer step"):
        step_rows(1, WARMUP, 1, 4, drop_last=True)


def numbered(items):
    """Rows with a number, in a field that the Trainer takes out before the model."""
    return {**collate([item for item, _ in items]), "gold": torch.tensor([number for _, number in items])}


def watched_trainer(*args, **settings):
    """A trainer on shuffled rows that notes which of them this rank saw in every optimizer step."""
    trainer = make_trainer(*args, batch_size_warmup=WARMUP, **settings)
    trainer.train_dataset = [(row, number) for number, row in enumerate(rows())]
    trainer.data_collator = numbered
    trainer._get_train_sampler = lambda *_: RandomSampler(trainer.train_dataset)
    draw, trainer.seen = trainer.get_batch_samples, []

    def noting(*args):
        batches, num_items = draw(*args)
        trainer.seen.append([number for batch in filter(None, batches) for number in batch["gold"].tolist()])
        return batches, num_items

    trainer.get_batch_samples = noting
    return trainer


def logged(trainer):
    return [(row["step"], row["loss"], row["learning_rate"]) for row in trainer.state.log_history if "loss" in row]


def test_epochs_steps_and_learning_rate_are_counted_right():
    trainer = watched_trainer(2, 4, max_steps=-1, num_train_epochs=2.5, lr_scheduler_type="linear")
    trainer.train()
    sizes = [*FIRST_EPOCH, 8, 8, 8, 8, 8]
    assert [len(step) for step in trainer.seen] == sizes
    assert trainer.state.max_steps == trainer.state.global_step == 10
    assert [rate for *_, rate in logged(trainer)] == pytest.approx([1e-3 * (1 - step / 10) for step in range(10)])
    first, second = sum(trainer.seen[:5], []), sum(trainer.seen[5:8], [])
    assert sorted(first) == sorted(second) == list(range(ROWS)) and first != second
    epochs = [row["epoch"] for row in trainer.state.log_history if "loss" in row]
    assert epochs[4] == 1 and epochs[7] == 2 and epochs == sorted(epochs)


def test_max_steps_end_a_run_in_a_later_epoch_with_every_learning_rate():
    trainer = watched_trainer(2, 4, max_steps=7, lr_scheduler_type="linear")
    trainer.train()
    assert [len(step) for step in trainer.seen] == [*FIRST_EPOCH, 8, 8]
    assert logged(trainer)[-1][2] == pytest.approx(1e-3 / 7)


def test_a_step_equals_that_of_a_run_with_this_batch():
    for step, accumulation in ((1, 1), (2, 2), (3, 3)):
        growing = train(make_trainer(2, 4, batch_size_warmup=BatchSizeWarmup(2 * step, 3), max_steps=1))
        assert_same(growing, train(make_trainer(2, accumulation, max_steps=1)))


@pytest.mark.parametrize("checkpoint", [2, 9])
def test_a_resumed_run_sees_the_rows_that_are_left(tmp_path, checkpoint):
    settings = {"max_steps": 11, "save_strategy": "steps", "save_steps": checkpoint, "lr_scheduler_type": "linear"}
    whole = watched_trainer(2, 4, output_dir=str(tmp_path), **settings)
    whole.train()
    resumed = watched_trainer(2, 4, output_dir=str(tmp_path), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert resumed.seen == whole.seen[checkpoint:]
    assert logged(resumed) == logged(whole)


def test_what_it_does_not_go_with_is_refused():
    for settings, name in (
        ({"train_sampling_strategy": "batch_rebalance"}, "--train_sampling_strategy batch_rebalance"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
    ):
        with pytest.raises(ValueError, match=f"batch-size warm-up does not work with {name}"):
            make_trainer(2, 4, batch_size_warmup=WARMUP, **settings)
    with pytest.raises(ValueError, match="8 is not below the 8 rows"):
        make_trainer(2, 4, batch_size_warmup=BatchSizeWarmup(8, 2))


def on_ranks(rank, world_size, folder):
    """Training from the first step to the tail of the epoch; rows seen; and those of a resumed run."""
    trained = []
    for stage, ep_size, dispatch in ((2, 2, "tokens"), (3, 2, "tokens"), (2, 2, "weights")):
        start_deepspeed_state()
        trainer = make_trainer(
            1, 4, zero_config(stage), ep_size, batch_size_warmup=WARMUP, max_steps=5, expert_dispatch=dispatch
        )
        trained.append(train(trainer))
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "output_dir": folder,
        "lr_scheduler_type": "linear",
    }
    runs = []
    for resume in (None, f"{folder}/checkpoint-2"):
        start_deepspeed_state()
        trainer = watched_trainer(1, 4, zero_config(2), 2, **settings)
        trainer.train(resume_from_checkpoint=resume)
        runs.append((trainer.seen, logged(trainer)))
    start_deepspeed_state()
    other = make_trainer(1, 4, zero_config(2), 2, batch_size_warmup=BatchSizeWarmup(2, 2), **settings)
    with pytest.raises(CheckpointError) as refused:
        other.train(resume_from_checkpoint=resume)
    return trained, runs, str(refused.value)


@pytest.mark.distributed
def test_two_ranks_train_as_one_process_and_resume(tmp_path):
    results = run_distributed(on_ranks, 2, str(tmp_path), deepspeed=True, timeout_s=300)
    expected = by_hand(FIRST_EPOCH, 2)
    for trained, *_ in results:
        for found in trained:
            assert_same(found, expected)
    # One process goes on where two ranks were, in the midst of the warm-up.
    alone = watched_trainer(2, 4, max_steps=6, lr_scheduler_type="linear")
    alone.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for step, one_process in enumerate(alone.seen, 2):
        assert sorted(one_process) == sorted(sum((runs[0][0][step] for _, runs, _ in results), []))
    two_ranks = results[0][1][0][1]
    for found, expected in zip(logged(alone), two_ranks, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for _, ((seen, losses), (seen_after, losses_after)), refused in results:
        assert seen_after == seen[2:]
        assert losses_after == losses
        assert "checkpoint-2 was saved with --global_batch_size 8 --batch_size_warmup_start 2" in refused
