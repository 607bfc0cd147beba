"""The one exception for mistakes of the input."""


class L2R2Error(ValueError):
    """Something given to the library cannot be used; the message is one sentence that says what to do.

    Commands print it without a traceback and exit with status 1.
    """
