"""Signals that ask a run to stop: noticed at once, also inside collectives, and acted on at a step border.

A Python signal handler runs between two instructions of the main thread, so not before a collective in C++ returns. But
the interpreter's own C handler writes the number of every signal to a descriptor at once, and a thread that reads from
there needs no main thread. It sets the flag that ranks agree on; where no step border comes in time (a peer is dead,
a disk hangs) it ends the process.

Whatever is forked meanwhile (loader workers) gets the handlers of before and no descriptor: its signals are not ours.
"""

import logging
import os
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from janus_mega.observe.pulse import Pulse
from janus_mega.observe.stopping import StopFlag
from janus_mega.train.exits import NOT_SAVED

_log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LOOK_EVERY_S = 1.0
_TELL_S = 5.0
"""Seconds that writing down why a process is ended may take; a disk that hangs must not keep it."""


class StopSignals:
    """Takes stop signals as long as it is entered; does nothing outside the main thread, where Python takes none."""

    def __init__(self, flag: StopFlag, pulse: Pulse, rank: int, grace_s: float) -> None:
        """`grace_s`: seconds from the first signal to the end of the run, after which the process ends; 0 for ever."""
        self._flag = flag
        self._pulse = pulse
        self._rank = rank
        self._grace_s = grace_s
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.note_end: Callable[[str], None] = lambda outcome: None
        """Told before the process is ended from here."""

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            _log.info("rank %d trains outside the main thread: stop signals are not taken", self._rank)
            return self
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _only_wake) for number in STOP_SIGNALS}
        me = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _reset_in_child(me))
        self._thread = threading.Thread(target=self._watch, name="janus-mega-stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._restore()
        self._ended.set()
        self._sender.send(b"\0")
        self._thread.join()
        self._thread = None
        self._receiver.close()
        self._sender.close()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._wakeup_before)

    def _watch(self) -> None:
        deadline = float("inf")
        while not self._ended.is_set():
            select.select([self._receiver], [], [], min(_LOOK_EVERY_S, max(0.0, deadline - time.monotonic())))
            try:
                received = self._receiver.recv(4096)
            except BlockingIOError:
                received = b""
            for number in received:
                if number in STOP_SIGNALS:  # others write here too, such as SIGCHLD
                    self._take(number)
            if self._flag.asked and self._grace_s and deadline == float("inf"):
                deadline = time.monotonic() + self._grace_s
            if time.monotonic() >= deadline and not self._ended.is_set():
                self._give_up()

    def _take(self, number: int) -> None:
        name, pulse = signal.Signals(number).name, self._pulse
        if self._flag.signal:
            told = "the run is stopping already, nothing changes; SIGKILL ends it without saving"
            self._warn(f"{name} on rank {self._rank}: {told}")
            return
        self._flag.signal = number
        where = f"in step {pulse.step + 1} ({pulse.phase})"
        self._warn(f"{name} on rank {self._rank} {where}: all ranks stop and save at the next step border")

    def _warn(self, told: str) -> None:
        """Logs beside the thread that watches: a log that hangs must not keep it from ending the run in time."""
        threading.Thread(target=_log.warning, args=("%s", told), name="janus-mega-stop-log", daemon=True).start()

    def _give_up(self) -> None:
        outcome = (
            f"NotSaved: rank {self._rank} reached no end within {self._grace_s:g} s (health.stop_grace_s) of a stop "
            f"signal; it was in step {self._pulse.step + 1} ({self._pulse.phase})"
        )
        teller = threading.Thread(target=self._tell, args=(outcome,), name="janus-mega-stop-note", daemon=True)
        try:
            teller.start()
            teller.join(_TELL_S)
        finally:
            os._exit(NOT_SAVED)

    def _tell(self, outcome: str) -> None:
        """Says why the process ends. All of it writes somewhere, so all of it may hang as the run did."""
        _log.error("%s; the newest checkpoint stands", outcome)
        try:
            self.note_end(outcome)
        finally:
            logging.shutdown()


def _only_wake(number: int, frame: object) -> None:
    """There must be a handler in Python, or none of the C handler's."""


def _reset_in_child(entered: "weakref.ref[StopSignals]") -> None:
    signals = entered()
    if signals is not None and signals._thread is not None:
        signals._thread = None  # it lives in the parent alone
        signals._restore()
