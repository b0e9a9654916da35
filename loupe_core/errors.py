"""The one exception for input that a person can mend, and the errors of others in one line."""


class LoupeError(ValueError):
    """Wrong input, told in one line: what was found, where, what was expected, what to do.

    The command line prints the line and exits with code 2; a notebook shows it as the last line of the traceback.
    """

    def __init__(self, message: str = "") -> None:
        # from a DataLoader's worker the line arrives below the worker's traceback
        super().__init__(printable(str(message).strip().rpartition("loupe_core.errors.LoupeError: ")[2]))


def printable(text: str) -> str:
    """`text` in one line, with "?" for what no console shows: a file's name may hold a line break or any bytes."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, printable, at most `limit` characters; the error's class where it has none."""
    lines = str(error).strip().splitlines()
    text = "".join(c for c in " ".join(lines[0].split()) if c.isprintable())[:limit] if lines else ""
    return text.rstrip(" .:") or type(error).__name__
