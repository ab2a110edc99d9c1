"""How long each step took, on the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class StageClock:
    """Milliseconds by stage name, in the order in which the stages first ran."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - start) * 1e3

    def rounded(self) -> dict[str, float]:
        """Return the times to a tenth of a millisecond, for a report."""
        return {name: round(ms, 1) for name, ms in self.ms.items()}

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Return what was added to each stage since `before`, a former copy of `ms`, where anything was."""
        added = {name: round(ms - before.get(name, 0.0), 3) for name, ms in self.ms.items()}
        return {name: ms for name, ms in added.items() if ms}
