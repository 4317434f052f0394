"""Progress and time left as plain lines, the same in a terminal, a log and a notebook."""

import time
from collections.abc import Collection, Iterator

INTERVAL = 10.0  # seconds between two lines


def track(items: Collection, what: str) -> Iterator:
    """Yield `items`; log how far it is, at most every INTERVAL seconds and at the end."""
    started = logged = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - logged >= INTERVAL or done == len(items):
            logged = now
            log_progress(what, done, len(items), now - started)


def log_progress(what: str, done: int, total: int, seconds: float, note: str = "") -> None:
    left = seconds / done * (total - done)
    print(f"{what}: {done}/{total}, {seconds:.0f} s so far, {left:.0f} s left{note}", flush=True)
