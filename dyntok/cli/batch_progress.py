"""What `dyntok batch` shows while it runs: a bar on a terminal, a line a minute in a log."""

import sys
import time
from typing import TYPE_CHECKING

from dyntok.cli.progress import ProgressBar

if TYPE_CHECKING:
    from dyntok.batch import Summary

_ROWS_FOR_AN_ESTIMATE = 32
_WAIT = 10.0  # seconds for the first line, where there is no estimate yet
_INTERVAL = 60.0  # seconds between lines


class Progress:
    """Call it with the summary after every row. Shows images, images/s, errors and the time left on standard error."""

    def __init__(self) -> None:
        self.last: Summary | None = None
        self._bar = ProgressBar(desc="batch", unit=" images", disable=None, mininterval=0.5)
        self._next_line = time.monotonic() + _WAIT
        self._started = False  # whether a line was printed

    def __call__(self, summary: "Summary") -> None:
        self.last = summary
        if self._bar.disable:
            self._log(summary)
            return
        self._bar.total = summary.images_expected
        if self._bar.update(summary.images - self._bar.n):
            facts = f"{summary.tokens_per_image:.1f} tokens/image, {summary.errors} errors"
            self._bar.set_postfix_str(facts, refresh=False)

    def close(self) -> None:
        """Leaves the terminal as it should be."""
        self._bar.close()

    def _log(self, summary: "Summary") -> None:
        now = time.monotonic()
        first = not self._started and _has_estimate(summary)
        if first or now >= self._next_line:
            self._started, self._next_line = True, now + _INTERVAL
            print(_line(summary), file=sys.stderr, flush=True)


def _line(summary: "Summary") -> str:
    done = f"{summary.images:,} images"
    left = "time left not known yet"
    if _has_estimate(summary):
        done = f"{summary.images:,} of about {summary.images_expected:,} images"
        left = f"about {ProgressBar.format_interval(summary.seconds_left or 0.0)} left"
    return f"batch: {done}, {summary.images_per_second:.1f} images/s, {summary.errors:,} errors, {left}"


def _has_estimate(summary: "Summary") -> bool:
    return summary.seconds_left is not None and summary.rows >= _ROWS_FOR_AN_ESTIMATE
