"""What is planned: a batch, and one way to lay the experts and the optimizer out over the ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """Of one rank: ``micro`` rows of ``length`` tokens, ``accumulation`` micro-steps per optimizer step."""

    micro: int
    length: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name in ("micro", "length", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Of one micro-step on one rank, T."""
        return self.micro * self.length


@dataclass(frozen=True)
class Precision:
    """Bytes of a base weight, bytes of an adapter weight, and how the base is quantised."""

    base: int = 4
    adapter: int = 4
    quantization: str = "none"


@dataclass(frozen=True)
class Layout:
    """One candidate.

    Attributes:
        ep_size: Ranks that share one copy of all experts.
        zero_stage: 0 to 3.
        dispatch: tokens or weights; replicate where ep_size is 1.
        checkpointing: Whether activations are recomputed in backward.
        chunk_tokens: ``--dispatch_chunk_tokens``, 0 for all at once.
    """

    ep_size: int = 1
    zero_stage: int = 2
    dispatch: str = "replicate"
    checkpointing: bool = False
    chunk_tokens: int = 0

    def __post_init__(self) -> None:
        if (self.ep_size == 1) != (self.dispatch == "replicate") or self.dispatch not in (
            "replicate",
            "tokens",
            "weights",
        ):
            raise ValueError(f"dispatch {self.dispatch!r} does not go with ep_size {self.ep_size}")


@dataclass(frozen=True)
class Routing:
    """How tokens spread over experts.

    Attributes:
        active_experts: Experts that a token uses per projection, on average.
        skew: Load of the fullest rank over the mean: 1 is balanced, ep_size is everything on one rank.
        remote_ranks: Other ranks that a token visits per input group, where it was measured; else it is expected from
            ``active_experts``.
    """

    active_experts: float
    skew: float = 1.0
    remote_ranks: float | None = None

    def __post_init__(self) -> None:
        if self.active_experts <= 0 or self.skew < 1:
            raise ValueError(
                f"active_experts must be above 0 and skew at least 1, got {self.active_experts} and {self.skew}"
            )
