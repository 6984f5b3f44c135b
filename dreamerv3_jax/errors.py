"""Exceptions that are meant for the person at the keyboard."""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A mistake or a missing thing that the user can mend.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class Failure(UserError):
    """What ends a run that was begun without a mistake, as a full disk does."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """Returns what an error says, without line breaks."""
    return ' '.join(str(error).split())


@contextlib.contextmanager
def readable_device_errors(advice: str) -> Iterator[None]:
    """Answers what JAX says of devices that are too small, or not there.

    Args:
      advice: the end of the sentence that their memory is too small: for what, and what to do.

    Raises:
      UserError: instead of JAX's error.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # JAX's are such; it may not be imported yet
        text, named = one_line(error), os.environ.get('JAX_PLATFORMS', '')
        if 'RESOURCE_EXHAUSTED' in text:
            raise UserError(f'The memory of the device is too small {advice}') from error
        # Of GPUs without a driver JAX says nothing at all.
        silent = named == 'cuda' and not text and isinstance(error, AssertionError)
        if silent or (named and text.startswith('Unable to initialize backend')):
            raise UserError(
                f'JAX_PLATFORMS={named} names devices that are not here, taken, or without their '
                'extra (cuda, tpu); leave it out for those that are'
                + (f' ({text}).' if text else '.')
            ) from error
        if text.startswith('Unable to initialize backend'):
            raise UserError(
                f'A device cannot be used ({text.rstrip(".")}); let no other process hold it, and '
                'under SLURM let each task see all GPUs of its node (--gpus-per-node).'
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
