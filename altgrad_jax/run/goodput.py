"""Goodput: which share of a process's wall time made new steps, and what the rest went into."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# The order in which they are shown. Start-up is everything up to the first dispatch but compilation; replayed are steps
# that an earlier start of the run had made and recorded, and that were lost to its last checkpoint.
CATEGORIES = ("step", "start_up", "compile", "evaluation", "save_blocked", "logging_blocked", "replayed", "other")


class Goodput:
    """Divides the time of the host loop's thread: at every moment exactly one category runs, so that all of them sum to
    the wall time."""

    def __init__(self, before: float = 0.0, clock: Callable[[], float] = time.perf_counter):
        """Starts with start-up, of which `before` seconds have passed already."""
        self._clock, self._category, self._since = clock, "start_up", clock() - before
        self._seconds: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)

    def enter(self, category: str) -> str:
        """From now on time goes to `category`. Returns the one before."""
        now, before = self._clock(), self._category
        self._seconds[before] += now - self._since
        self._category, self._since = category, now
        return before

    @contextlib.contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Time in this context goes to `category`, and to no other."""
        before = self.enter(category)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Books `seconds` of one category as another's."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def account(self) -> dict[str, float]:
        """{"wall_s": seconds until now, "step_s": of which, ...}, in whole milliseconds that add up."""
        self.enter(self._category)
        spent = {f"{name}_s": round(seconds, 3) for name, seconds in self._seconds.items()}
        return {"wall_s": round(sum(spent.values()), 3)} | spent


def total(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The sum of a run's goodput events, over its starts.

    Args:
      events: of timing.jsonl, in order.

    Returns:
      The keys of `Goodput.account`, `starts`, and `starts_without`: how many starts left no account (they were killed,
      or are of a version that wrote none), whose time is in none of the sums. None where there is no account at all.
    """
    accounts = [event for event in events if event["event"] == "goodput"]
    if not accounts:
        return None
    starts = sum(event["event"] in ("start", "resume") for event in events)
    names = ("wall_s", *(f"{name}_s" for name in CATEGORIES))
    return {name: round(sum(account.get(name, 0.0) for account in accounts), 3) for name in names} | {
        "starts": starts,
        "starts_without": max(0, starts - len(accounts)),
    }


def describe(account: Mapping[str, float]) -> str:
    """An account as one line."""
    wall = account["wall_s"]
    share = f"{100 * account['step_s'] / wall:.0f}%" if wall else "-"
    rest = ", ".join(
        f"{name.replace('start_up', 'start-up').replace('_', '-')} {account[f'{name}_s']:.1f} s"
        for name in CATEGORIES[1:]
    )
    return f"goodput: {share} of {wall:.1f} s in steps; {rest}"
