"""Progress bar of regeneration: finished conversations, and tokens per second also while long answers are running."""

import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

INTERVAL = 1.0  # seconds between updates


class Progress:
    """Progress bar over all conversations of a dataset. Finished ones of earlier runs are included from the start."""

    def __init__(self, total: int, finished: int, **options: Any) -> None:
        """
        Args:
            options: further arguments to `tqdm`.
        """
        self._bar = tqdm(total=total, initial=finished, desc="regenerating", unit=" conversations", **options)
        self._tokens = self._dropped = 0
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show()
        self._bar.close()

    def finish(self, *, kept: bool) -> None:
        """Count a finished conversation."""
        self._dropped += not kept
        self._bar.update()
        self._refresh()

    def tokens(self, count: int) -> None:
        """Count generated tokens."""
        self._tokens += count
        self._refresh()

    def _refresh(self) -> None:
        if time.monotonic() - self._shown >= INTERVAL:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        speed = self._tokens / max(1e-9, self._shown - self._start)
        self._bar.set_postfix_str(f"{self._tokens:,} tokens, {speed:,.0f} tokens/s, {self._dropped:,} dropped")
