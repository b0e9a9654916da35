"""Peak memory of a function in a fresh process. That process imports this file first, so it imports nothing large."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory(function: Callable, *arguments: Any) -> int:
    """The most bytes that a fresh process held in memory up to the end of `function(*arguments)`.

    Args:
        function: one at the top level of a module, which the process can import.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_tell, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed in its process; see the lines above") from None
    finally:
        process.join()


def _run_and_tell(pipe, function: Callable, arguments: tuple) -> None:
    function(*arguments)
    pipe.send(_own_peak())


def _own_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss on to a started program, so it may be that of the parent
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
