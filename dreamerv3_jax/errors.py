"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake or a missing thing that the user can mend.

    The message is one sentence that says what is wrong and what to do. The command line prints it
    without a traceback and exits with code 2.
    """
