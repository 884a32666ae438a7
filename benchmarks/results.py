"""
All that a run has seen, and what follows from it.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.catalog import PEERS, WORKS
from benchmarks.measure import Sample

#: A server that had its core for less of the time was waiting for the load, or for
#: the machine.
BUSY = 0.85

#: The one that others are compared with.
OURS = "tcpsvc"


@dataclass(slots=True)
class Results:
    """
    What a run has seen.

    :ivar date: when, in UTC.
    :ivar machine: names of properties, and values.
    :ivar versions: of what was measured.
    :ivar rounds: how often.
    :ivar seconds: how long each measurement was.
    :ivar works: the names of the kinds of work, in order.
    :ivar connections: of each work.
    :ivar samples: by work and peer.
    :ivar left_out: what has no figures, and why.
    """

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    rounds: int
    seconds: float
    works: list[str]
    connections: dict[str, int]
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, work: str, peer: str, sample: Sample) -> None:
        """One more measurement."""
        self.samples.setdefault(work, {}).setdefault(peer, []).append(sample)

    def leave_out(self, work: str, peer: str, why: str) -> None:
        """A measurement failed: what there is of that server at that work is void."""
        self.samples.get(work, {}).pop(peer, None)
        self.left_out.append(f"{peer} at {work}: {why}")

    def median(self, work: str, peer: str) -> float | None:
        """The median of the rounds, or ``None`` if there is none."""
        samples = self.samples.get(work, {}).get(peer)
        if not samples:
            return None
        return statistics.median(sample.figure for sample in samples)

    def medians(self, work: str) -> dict[str, float]:
        """Of all that were measured at a work, the lowest first."""
        found = {peer: self.median(work, peer) for peer in self.samples.get(work, {})}
        figures = {peer: figure for peer, figure in found.items() if figure is not None}
        return dict(sorted(figures.items(), key=lambda item: item[1]))

    def ratio(self, work: str, peer: str) -> float | None:
        """A peer's figure as a multiple of ours."""
        figure, ours = self.median(work, peer), self.median(work, OURS)
        if figure is None or ours is None or ours <= 0:
            return None
        return figure / ours

    def peers(self) -> list[str]:
        """Those with any figure, in the catalog's order."""
        return [p for p in PEERS if any(p in self.samples.get(w, {}) for w in WORKS)]

    def spread(self) -> tuple[float, str] | None:
        """
        How far the rounds of one server at one work are apart at most, as a part of
        their median, and where. ``None`` with one round.
        """
        found = []
        for work, by_peer in self.samples.items():
            for peer, samples in by_peer.items():
                figures = [sample.figure for sample in samples]
                median = statistics.median(figures)
                if len(figures) > 1 and median > 0:
                    apart = (max(figures) - min(figures)) / median
                    found.append((apart, f"{peer}, {work}"))
        return max(found, default=None)

    def not_busy(self) -> dict[str, dict[str, float]]:
        """
        By work, which servers did not have their core all the time, and what part
        of it they had.
        """
        found: dict[str, dict[str, float]] = {}
        for work, by_peer in self.samples.items():
            for peer, samples in by_peer.items():
                busy = [s.server_busy for s in samples if s.server_busy is not None]
                if busy and statistics.median(busy) < BUSY:
                    found.setdefault(work, {})[peer] = statistics.median(busy)
        return found

    def failures(self) -> list[str]:
        """Which servers lost connections that they should have served."""
        return [
            f"{peer} ({work}: {lost})"
            for work, by_peer in self.samples.items()
            for peer, samples in by_peer.items()
            if (lost := sum(sample.failed for sample in samples))
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every sample, and the medians."""
        medians = {work: self.medians(work) for work in self.works}
        return {**asdict(self), "medians": medians}
