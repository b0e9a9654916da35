"""The one exception for input that a person can mend, and the errors of others in one line."""


class LoupeError(ValueError):
    """Wrong input, told in one line: what was found, where, what was expected, what to do.

    The command line prints the line and exits with code 2; a notebook shows it as the last line of the traceback.
    """


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, printable, at most `limit` characters; the error's class where it has none."""
    lines = str(error).strip().splitlines()
    text = "".join(c for c in " ".join(lines[0].split()) if c.isprintable())[:limit] if lines else ""
    return text.rstrip(" .:") or type(error).__name__
