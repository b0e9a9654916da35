"""What a command does with wrong words, and how it ends: with an exit code, and one line for what came in its way."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

from loupe_core.errors import LoupeError, printable

READER_GONE = 141  # 128 + SIGPIPE, as the shell knows it from other commands


class Parser(argparse.ArgumentParser):
    """One whose errors are told as all others are; argparse's own prints the whole usage first."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", Path, _path)  # what `type=Path` means

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but nothing may be left over: a command knows this sooner than the parser above it."""
        found, unknown = super().parse_known_args(args, namespace)
        return (found, unknown) if not unknown else self.error(f"unrecognized arguments: {' '.join(unknown)}")

    def error(self, message: str) -> NoReturn:
        """Raises LoupeError with argparse's message, and where to look."""
        raise LoupeError(f"{message}; `{self.prog} --help` lists what is expected")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("found an empty name, expected that of a file or folder")
    return Path(text)


def exit_code(run: Callable[[], None]) -> int:
    """Runs a command and returns its exit code.

    0: it came through. 2: wrong input, or the system refused a file; one line on stderr tells which. 128 and a signal's
    number: Ctrl-C or SIGTERM; or 141, in silence, where whoever read the output has gone, as `head` has. Other errors
    are raised: they are faults of the program, and their traceback says where.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a notebook's
            stream.reconfigure(errors="backslashreplace")  # a console need not know every letter of a name
    try:
        try:
            return _ended(run)
        finally:
            sys.stdout.flush()  # what fails when Python ends is told by nobody
    except OSError as error:  # of the output itself
        if error.errno is None:
            raise
        with suppress(OSError):
            if not isinstance(error, BrokenPipeError):
                print(f"loupe: the output could not be written ({error.strerror})", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # what is still to be written has no reader
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return READER_GONE if isinstance(error, BrokenPipeError) else 2


def _ended(run: Callable[[], None]) -> int:
    one_of_many = os.environ.get("RANK", "0") not in ("0", "")  # as torchrun sets it: the first tells for all
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            with redirect_stdout(nowhere) if one_of_many else nullcontext():
                run()
        return 0
    except LoupeError as error:
        line, code = str(error), 2
    except KeyboardInterrupt as stop:
        line, code = str(stop) or "stopped", 128 + getattr(stop, "signal", signal.SIGINT)
    except OSError as error:
        if error.errno is None or isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise  # without a number it is not the system's
        sys.stdout.flush()  # raises once more where it is the output that cannot be written
        where = f"{error.filename}: " if error.filename is not None else ""
        line, code = f"{where}the system refused to read or write this ({error.strerror})", 2
    print(f"loupe: {printable(line)}", file=sys.stderr)
    return code


def _reader_has_gone() -> bool:
    """Whether stdout or stderr leads to nobody any more; a broken pipe may also be one of the program's own."""
    if not hasattr(select, "poll"):  # Windows
        return True
    streams = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            streams.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in streams.poll(0))
