"""What happens while rows travel in `tokens` mode: a timeline of one step, and the same step without overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ldmole_ds.distributed import expert_exchange


@contextmanager
def replaced_exchange(kind: type[expert_exchange.Exchange]) -> Iterator[None]:
    original, expert_exchange.Exchange = expert_exchange.Exchange, kind
    try:
        yield
    finally:
        expert_exchange.Exchange = original


class _AtOnce(expert_exchange.Exchange):
    """An exchange that is over before anything else is done."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        super().wait()

    def wait(self) -> Tensor:
        return self.out


def waiting_at_once():
    """Within, every exchange is waited for where it starts."""
    return replaced_exchange(_AtOnce)


class _Timed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, spans):
        ctx.save_for_backward(weight)
        ctx.spans, begin = spans, time.perf_counter()
        y = x @ weight.t()
        spans.append(("frozen GEMM", begin, time.perf_counter()))
        return y

    @staticmethod
    def backward(ctx, grad):
        (weight,), begin = ctx.saved_tensors, time.perf_counter()
        grad_x = grad @ weight
        ctx.spans.append(("frozen GEMM, backward", begin, time.perf_counter()))
        return grad_x, None, None


class TimedLinear(nn.Linear):
    """A frozen layer that writes down when it computes."""

    spans: list[tuple[str, float, float]]

    def forward(self, x: Tensor) -> Tensor:
        return _Timed.apply(x, self.weight, self.spans)


def spans_of_step(layer, x: Tensor, cotangent: Tensor) -> list[tuple[str, float, float]]:
    """(What, begin, end) in ms of one step of a `Formulation` in tokens mode: exchanges, waits and frozen products.

    By the clock of the host: on a GPU it shows what is queued when, not what runs when.
    """
    spans: list[tuple[str, float, float]] = []

    class Timed(expert_exchange.Exchange):
        def __init__(self, *args) -> None:
            self.begin = time.perf_counter()
            super().__init__(*args)

        def wait(self) -> Tensor:
            waiting = time.perf_counter()
            out = super().wait()
            spans.append((self._phase, self.begin, time.perf_counter()))
            spans.append((f"wait for {self._phase}", waiting, spans[-1][2]))
            return out

    adapted = layer.forward
    base = adapted.base_layer
    timed = TimedLinear(base.in_features, base.out_features, bias=False, device=x.device, dtype=x.dtype)
    timed.weight, timed.spans, adapted.base_layer = base.weight, spans, timed
    begin = time.perf_counter()
    with replaced_exchange(Timed):
        layer.step(x, cotangent)
    adapted.base_layer = base
    return [(what, 1e3 * (a - begin), 1e3 * (b - begin)) for what, a, b in spans]


def plot_spans(spans: list[tuple[str, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys(what for what, _, _ in spans if not what.startswith("wait")))
    figure, axis = pyplot.subplots(figsize=(9, 2.4), layout="constrained")
    for what, begin, end in spans:
        name, waits = what.removeprefix("wait for "), what.startswith("wait")
        color = "#c44" if waits else "#789" if "GEMM" in what else "#9bd"
        axis.barh(name, end - begin, left=begin, color=color, height=0.4 if waits else 0.7)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.set_xlabel("ms of one step on rank 0; blue: rows under way, red: waited for, grey: frozen layer computes")
    figure.savefig(path, dpi=120)
