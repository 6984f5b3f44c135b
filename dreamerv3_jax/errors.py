"""Exceptions that are meant for the person at the keyboard."""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A mistake or a missing thing that the user can mend.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    without a traceback and exits with code 2.
    """

    exit_code = 2


class Failure(UserError):
    """What ends a run that was begun without a mistake, as a full disk does; exit code 1."""

    exit_code = 1


@contextlib.contextmanager
def readable_device_errors(advice: str) -> Iterator[None]:
    """Answers what JAX says of devices that are too small, or not there.

    Args:
      advice: the end of a sentence that says for what their memory is too small, and what to do.

    Raises:
      UserError: instead of JAX's error.
    """
    try:
        yield
    except RuntimeError as error:  # JAX's are such, and it need not have been imported
        text = ' '.join(str(error).split())
        if 'RESOURCE_EXHAUSTED' in text:
            raise UserError(f'The memory of the device is too small {advice}') from error
        named = os.environ.get('JAX_PLATFORMS', '')
        if named and text.startswith('Unable to initialize backend'):
            raise UserError(
                f'JAX_PLATFORMS={named} names devices that are not here, or whose extra (cuda, '
                f'tpu) is not installed; leave it out for those that are ({text}).'
            ) from error
        raise


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
