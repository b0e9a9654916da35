"""The one exception for input that a person can mend."""


class LoupeError(ValueError):
    """Wrong input, told in one line: what was found, where, what was expected, what to do.

    The command line prints the line and exits with code 2; a notebook shows it as the last line of the traceback.
    """
