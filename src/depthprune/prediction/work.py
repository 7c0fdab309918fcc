"""What a command does, in stages whose operations and bytes are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from depthprune.prediction.rate import Rate


@dataclass(frozen=True)
class Stage:
    """A part of a command's work, over all devices together.

    Attributes:
        name: what is done.
        tokens: that are read or written.
        flops: floating-point operations.
        moved: bytes of weights that go through a device where tokens are written one after the other.
    """

    name: str
    tokens: float
    flops: float
    moved: float = 0.0

    def seconds(self, rate: Rate, devices: int) -> float:
        """How long it takes; what is written one by one waits for the weights rather than for the operations."""
        return (self.moved / rate.bytes if self.moved and rate.bytes else self.flops / rate.flops) / devices


@dataclass
class Work:
    """All that a command does.

    Attributes:
        stages: in the order in which they are done.
        memory: what one device holds, bytes by what they are, by phase: "" is held all the time, the others by turns.
        disk: bytes that are written.
        left_out: what cannot be counted before it is begun, in sentences.
        devices: how many share the work.
    """

    stages: list[Stage] = field(default_factory=list)
    memory: dict[str, dict[str, float]] = field(default_factory=lambda: {"": {}})
    disk: float = 0.0
    left_out: list[str] = field(default_factory=list)
    devices: int = 1

    def add(self, name: str, tokens: float, flops: float, moved: float = 0.0) -> None:
        """Add to the stage of that name, unless there is nothing to do in it."""
        before = next((stage for stage in self.stages if stage.name == name), Stage(name, 0.0, 0.0))
        if not tokens:
            return
        after = Stage(name, before.tokens + tokens, before.flops + flops, before.moved + moved)
        if before in self.stages:
            self.stages[self.stages.index(before)] = after
        else:
            self.stages.append(after)

    def hold(self, parts: Mapping[str, float], phase: str = "") -> None:
        """Add to what is held in a phase; the larger of two that have one name."""
        held = self.memory.setdefault(phase, {})
        for name, size in parts.items():
            held[name] = max(held.get(name, 0.0), size)

    @property
    def most(self) -> float:
        """Bytes that one device holds in the phase that takes most."""
        always, *others = (sum(parts.values()) for parts in self.memory.values())
        return always + max(others, default=0.0)
