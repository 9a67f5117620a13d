"""Stopping from outside: another thread, or a time, ends a call in the middle of a pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal

Reason = Literal["cancelled", "time"]


class Interrupted(Exception):
    """A run was stopped. It never leaves the package: a call that is stopped ends as others do."""


class Cancellation:
    """Ends the calls that it is given to, from any thread, within milliseconds.

    A call that was cancelled gives what it has so far, with the finish reason "cancelled"; one that
    begins after `cancel()` ends at once. A cancellation is spent when it was used: make a new one
    for the next call.

    >>> stop = Cancellation()
    >>> stop.cancel()
    >>> stop.reason
    'cancelled'
    """

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self._lock = threading.RLock()  # a stream that is collected unlinks in any thread
        self._linked: list[Callable[[Reason], None]] = []

    def cancel(self) -> None:
        """End every call that was given this, now and later."""
        self.stop("cancelled")

    def stop(self, reason: Reason) -> None:
        """The same, for a reason; of several the first counts."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
            linked, self._linked = self._linked, []
        for stop in linked:
            stop(reason)

    def link(self, stop: Callable[[Reason], None]) -> None:
        """Have `stop` called with the reason: at once, if there is one already."""
        with self._lock:
            if self.reason is None:
                self._linked.append(stop)
                return
        stop(self.reason)

    def unlink(self, stop: Callable[[Reason], None]) -> None:
        with self._lock:
            if stop in self._linked:
                self._linked.remove(stop)


class Interrupt(Cancellation):
    """What can end one call: its engine asks for a `handle`, which is told to terminate.

    `seconds` from now it ends by itself, for the reason "time"; `linked` ends it too.
    """

    def __init__(self, seconds: float | None = None, *, linked: Cancellation | None = None) -> None:
        super().__init__()
        self._handle: Any = None
        self._source = linked
        self._end = None if seconds is None else time.monotonic() + seconds
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """From now on somebody listens: a call that never begins leaves nothing behind."""
        if self._source is not None:
            self._source.link(self.stop)
        if self._end is not None:
            left = min(max(0.0, self._end - time.monotonic()), threading.TIMEOUT_MAX)
            self._timer = threading.Timer(left, self.stop, ("time",))
            self._timer.daemon = True
            self._timer.start()

    def stop(self, reason: Reason) -> None:
        super().stop(reason)
        handle = self._handle
        if handle is not None:
            handle.terminate = True

    def handle(self, make: Callable[[], Any]) -> Any:
        """The run options of the call, made when a run first needs them."""
        if self._handle is None:
            handle = make()
            self._handle = handle
            if self.reason is not None:  # stop() came before there was anything to tell
                handle.terminate = True
        return self._handle

    def check(self) -> None:
        """Raises Interrupted if the call is to end."""
        if self.reason is not None:
            raise Interrupted

    def close(self) -> None:
        """The call is over."""
        if self._timer is not None:
            self._timer.cancel()
        if self._source is not None:
            self._source.unlink(self.stop)
