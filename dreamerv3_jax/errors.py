"""The one exception that is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake or a missing thing that the user can mend.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    without a traceback and exits with code 2.
    """


def nearest(name: str, candidates: Iterable[str], otherwise: str = '') -> str:
    """Returns the end of a sentence that names what was probably meant, or all there is.

    Args:
      name: what the user wrote.
      candidates: what there is.
      otherwise: what to say where nothing is near and all of it would be too much.
    """
    options = list(candidates)
    close = difflib.get_close_matches(name, options, n=1)
    if close:
        return f'; did you mean {close[0]!r}?'
    return f'; {otherwise or "choose one of " + ", ".join(options)}.'
