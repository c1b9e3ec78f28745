"""From the global batch size to accumulation steps and learning rate."""

import pytest

from ldmole_ds.training.batch import BatchArguments, accumulation_steps, scaled_learning_rate


@pytest.mark.parametrize(
    ("size", "micro", "given", "world_size", "expected"),
    [(None, 4, 3, 2, 3), (16, 4, 1, 2, 2), (8, 4, 1, 2, 1), (1024, 8, 1, 4, 32), (24, 4, 3, 2, 3)],
)
def test_accumulation(size, micro, given, world_size, expected):
    assert accumulation_steps(BatchArguments(global_batch_size=size), micro, given, world_size) == expected


@pytest.mark.parametrize(
    ("size", "given", "message"),
    [
        (20, 1, r"--global_batch_size 20 is not a multiple of 8, .* 4 x 2 ranks: use 16"),
        (2, 1, "not a multiple of 8.*use 8"),
        (0, 1, "not a multiple of 8"),
        (16, 4, r"needs --gradient_accumulation_steps 2, got 4: give one of the two"),
    ],
)
def test_a_batch_that_cannot_be(size, given, message):
    with pytest.raises(ValueError, match=message):
        accumulation_steps(BatchArguments(global_batch_size=size), 4, given, 2)


def test_learning_rate():
    def rate(kind, base=16):
        return scaled_learning_rate(BatchArguments(lr_scaling=kind, base_batch_size=base), 1e-4, 64)

    assert (rate("none"), rate("sqrt"), rate("linear")) == pytest.approx((1e-4, 2e-4, 4e-4))
    with pytest.raises(ValueError, match="--lr_scaling sqrt needs --base_batch_size"):
        rate("sqrt", None)
