"""Ctrl-C, and SIGTERM, which machines send before they go: a run is saved first."""

import contextlib
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal came while nothing was under way that has to be finished."""


class Interrupts:
    """Collects the first signal, so that it does not come amid an update.

    The second one does what it would have done without this. Python notices neither while compiled
    code runs in the main thread, such as an update.

    Example:
      >>> interrupts = Interrupts(lambda: print('stopping'))
      >>> with interrupts.collected():
      ...     while not interrupts.received:
      ...         signal.raise_signal(signal.SIGTERM)
      stopping
      >>> interrupts.exception()
      SystemExit(143)
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        """Prepares; `notify` is called when the first signal comes."""
        self.received: list[int] = []  # signal numbers
        self._notify = notify
        self._raises = False
        self._before: dict[int, Any] = {}  # handlers

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Collects it in this context, if that is in the main thread: others get no signals."""
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in _SIGNALS}
            # Jobs in the background ignore Ctrl-C, which is meant for another one.
            self._before = {n: handler for n, handler in found.items() if handler != signal.SIG_IGN}
            for number in tuple(self._before):
                signal.signal(number, self._receive)
        try:
            yield
        finally:
            self._hand_back()

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raises it as `Interrupted` in this context, for what may take for ever.

        Raises:
          Interrupted: also at the start, if it came before.
        """
        self._raises = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._raises = False

    def explain(self, error: BaseException) -> bool:
        """Whether a signal to all processes is behind an error, as that of an environment's end.

        It may reach theirs before this one, so this takes half a second.
        """
        if not isinstance(error, Interrupted):
            time.sleep(0.5)
        return bool(self.received)

    def exception(self) -> BaseException:
        """Returns what ends the program with the exit code for the signal."""
        number = self.received[0]
        return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        self.received.append(number)
        self._hand_back()
        with contextlib.suppress(RuntimeError):  # the signal came amid another line
            self._notify()
        if self._raises:
            raise Interrupted

    def _hand_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
