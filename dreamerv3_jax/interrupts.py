"""Ctrl-C, and SIGTERM, which machines send before they go: a run is saved first."""

import contextlib
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Collects the first signal, so that it does not come amid an update; the second is raised.

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
        """`notify` is called when the first one comes."""
        self.received: list[int] = []  # signal numbers
        self._notify = notify
        self._raises = False

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Collects them in this context, where it is left in the main thread: others get none.

        Raises:
          KeyboardInterrupt: the second one was Ctrl-C.
          SystemExit: it was SIGTERM; the exit code is 143.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        except KeyboardInterrupt as error:
            raise self.exception() if self.received else error from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raises `KeyboardInterrupt` at the first one in this context, for what may take long."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def came_first(self) -> bool:
        """Whether an error came of the one signal so far, which all processes may have got.

        SIGTERM may reach the environments' processes before this one, hence the short wait.
        """
        time.sleep(0.5)
        return len(self.received) == 1

    def exception(self) -> BaseException:
        """Returns what ends the program with the exit code of the last signal."""
        number = self.received[-1]
        return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) == 1:
            with contextlib.suppress(RuntimeError):  # the signal came amid another line
                self._notify()
        if len(self.received) > 1 or self._raises:
            raise KeyboardInterrupt
