"""Evaluations of the network as `octavo tune` makes them: counted by kind, and shown as one bar with the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tqdm import tqdm

KINDS = {
    "calibration": "for the calibration pairs (quantizing runs over these some times more)",
    "timing": "for the times",
    "search": "for searched timesteps",
    "reference": "for the reference",
    "scores": "for scores",
    "verification": "for the verification",
}


class Spending:
    """Counts of what is asked for, whether it is at hand from an earlier run or not, and the bar of what is made.

    `at_most`: kind -> evaluations of the network, one for each image, that there may be. With `progress` it is told on
    standard error at once, the lines of `notes` too, and the bar goes towards it; what turns out not to be needed is
    taken off.

    >>> spending = Spending({"scores": 100}, progress=False)
    >>> with spending.stage("scores", 40, "ddim, 4 steps") as made:
    ...     made(30)  # the other 10 were at hand
    >>> spending.counts, spending.made, spending.left
    ({'scores': 40}, 30, 60)
    """

    def __init__(
        self, at_most: Mapping[str, int] | None = None, progress: bool = False, notes: Sequence[str] = ()
    ) -> None:
        self.at_most = dict(at_most or {})
        self.counts = dict.fromkeys(self.at_most, 0)
        for line in (cost_text(self.at_most), *notes) if progress else ():
            tqdm.write(line, file=sys.stderr)
        self._bar = tqdm(
            total=sum(self.at_most.values()), desc="tune", unit="evaluation", disable=not progress
        )
        self.made = 0
        self._total = sum(self.at_most.values())

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        return self._total - self.made

    @contextmanager
    def stage(self, kind: str, evaluations: int, label: str) -> Iterator[Callable[[int], None]]:
        """Yields what is to be told of every n evaluations made; those that the block does not tell were at hand."""
        self._bar.set_postfix_str(label)
        before = self.made

        def advance(count: int) -> None:
            self.made += count
            self._bar.update(count)

        yield advance
        self.counts[kind] = self.counts.get(kind, 0) + evaluations
        self.expect(self.left - (evaluations - (self.made - before)))

    def expect(self, left: int) -> None:
        """From here on at most `left` evaluations will be made."""
        self._total = self.made + max(left, 0)
        self._bar.total = self._total
        self._bar.refresh()

    def close(self) -> None:
        """The bar ends where it is."""
        self.expect(0)
        self._bar.close()


def cost_text(at_most: Mapping[str, int]) -> str:
    """What there may be to compute, in words.

    >>> cost_text({"timing": 300, "scores": 12000})
    'tune: at most 12,300 evaluations of the network, one for each image: 300 for the times, 12,000 for scores'
    """
    parts = [f"{count:,} {KINDS[kind]}" for kind, count in at_most.items() if count]
    total = f"{sum(at_most.values()):,}"
    return f"tune: at most {total} evaluations of the network, one for each image: {', '.join(parts)}"
