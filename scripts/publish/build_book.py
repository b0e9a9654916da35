"""Run the chapters and build the pages.

    python scripts/publish/build_book.py                                 # all chapters, then the pages
    python scripts/publish/build_book.py --in-place                      # also write the new outputs into book/
    python scripts/publish/build_book.py --in-place 05_training_on_cub   # run one chapter, the others as committed
    python scripts/publish/build_book.py --no-run                        # only the pages, from the committed outputs
    python scripts/publish/build_book.py --profile full 05               # one chapter in its full profile

Papermill runs a chapter in the small profile, with book/ as its working directory, like Jupyter and nbval. The result
is written to a copy of book/ under book/_build, from which Jupyter Book makes the pages; `--in-place` writes the same
notebook, byte for byte, into book/. Nothing is cached, so a change to the package takes effect at once.

In the full profile a chapter may ask the model hub, take hours, and contradict the text, which then prints a line; its
other parameters are given by `--set WEIGHTS=swin_base.safetensors`. The notebook with its outputs is kept as
book/_build/full/NAME.ipynb, cell by cell as it runs, and never written into book/.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import as_shown
import bench_page
import ledger_page
import nbformat
import papermill
import printed
import psutil
import web_assets
import yaml
from ledger import LedgerError
from mend_pages import mend
from sphinx_external_toc.parsing import parse_toc_yaml

from loupe_core.errors import LoupeError
from loupe_core.files.atomic import replaced

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
SOURCE = BOOK / "_build" / "source"
FULL = BOOK / "_build" / "full"
PROFILE = "small"
PATHS = ("WEIGHTS", "OUT")  # parameters of chapters
WIDGET = "application/vnd.jupyter.widget-view+json"

CELL_METADATA = ("tags", "mystnb", "jupyter")  # written by the author; the rest comes from programs
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


class BuildError(Exception):
    """The book cannot be built; the message is one line."""


def chapters() -> list[str]:
    """Names of the notebooks in _toc.yml, in reading order."""
    pages = list(parse_toc_yaml(ROOT / "_toc.yml"))
    for name in pages:
        if not any((BOOK / f"{name}{suffix}").exists() for suffix in (".md", ".ipynb")):
            raise BuildError(f"_toc.yml names book/{name}, and there is no such .md or .ipynb file")
    return [name for name in pages if (BOOK / f"{name}.ipynb").exists()]


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Yields a function that returns the peak resident memory, in MB, of all child processes together.

    Sampled five times per second; memory shared by two processes counts twice.
    """
    peak, stop = 0, threading.Event()

    def held(process: psutil.Process) -> int:
        try:
            return process.memory_info().rss
        except psutil.Error:  # it has just ended
            return 0

    def watch():
        nonlocal peak
        while not stop.wait(0.2):
            peak = max(peak, sum(map(held, psutil.Process().children(recursive=True))))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: peak / 1e6
    finally:
        stop.set()
        watcher.join()


def check_parameters(name: str) -> None:
    """Raises a BuildError unless the chapter's parameters cell, which the page shows, has the profile that is run."""
    found = papermill.inspect_notebook(str(SOURCE / f"{name}.ipynb")).get("PROFILE")
    if found is None or literal_eval(found["default"]) != PROFILE:
        says = "does not set PROFILE" if found is None else f"says PROFILE = {found['default']}"
        raise BuildError(f'{name}: the cell tagged "parameters" {says}; commit it with PROFILE = "{PROFILE}"')


def run(name: str, parameters: dict[str, Any] | None = None) -> tuple[nbformat.NotebookNode, float, float]:
    """Runs one chapter; returns the cleaned notebook, seconds, and peak MB of its kernel and workers.

    Args:
        parameters: of a run in the full profile, PROFILE among them; the notebook then stays under book/_build/full
            too, with the cell that says so. None: the small profile, as the pages show it.
    """
    page = SOURCE / f"{name}.ipynb"
    nbformat.write(clean(nbformat.read(page, as_version=4)), page)
    check_parameters(name)
    made = page if parameters is None else FULL / page.name
    made.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with peak_memory() as peak:
        try:
            notebook = papermill.execute_notebook(
                page,
                made,
                parameters={"PROFILE": PROFILE} if parameters is None else parameters,
                cwd=BOOK,
                progress_bar=sys.stderr.isatty(),
                coalesce_streams=True,
                stderr_file=None if parameters is None else sys.stderr,  # the bars of hours
                extra_arguments=["--log-level=ERROR"],  # for messages of the kernel, not of the chapter
            )
        except Exception as error:
            traceback = made.relative_to(ROOT)
            raise BuildError(f"{name}, {place(made)}: {reason(error)} (traceback: {traceback})") from error
    seconds = time.perf_counter() - start
    notebook = clean(notebook, kept=parameters is not None)
    if parameters is None:
        check_outputs(name, notebook)
    else:
        nbformat.write(notebook, made)
    nbformat.write(notebook, page)
    return notebook, seconds, peak()


def place(page: Path) -> str:
    """The cell at which a run stopped, with its number on the page and its first line."""
    cells = own_cells(nbformat.read(page, as_version=4).cells)
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    started = [cell for cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    if not started:
        return "before its first cell"
    return f"cell [{len(started)}] ({started[-1].source.strip().splitlines()[0]})"


def reason(error: Exception) -> str:
    if isinstance(error, papermill.PapermillExecutionError):
        return " ".join(f"{error.ename}: {error.evalue}".split())
    return " ".join(f"{type(error).__name__}: {error}".split())


def own_cells(cells: list) -> list:
    """The author's cells, without the one that papermill adds."""
    return [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def clean(notebook: nbformat.NotebookNode, kept: bool = False) -> nbformat.NotebookNode:
    """The notebook without metadata of papermill, times and Python version; ids, sources and outputs stay.

    Args:
        kept: of a run in the full profile: papermill's cell of parameters stays, and progress bars go.
    """
    notebook.cells = notebook.cells if kept else own_cells(notebook.cells)
    for cell in notebook.cells if kept else ():
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    count = 0
    for cell in notebook.cells:
        kept = {key: value for key, value in cell.metadata.items() if key in CELL_METADATA and value}
        # MyST-NB reads the alternative text from the cell, not from the output.
        if alt := next((p.metadata.get("image/png", {}).get("alt") for p in pictures(cell)), None):
            kept["mystnb"] = {**kept.get("mystnb", {}), "image": {"alt": alt}}
        cell.metadata = nbformat.from_dict(kept)
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):  # shown in place of the widget where no kernel runs
                output.data.pop(WIDGET, None)
        if cell.cell_type == "code" and cell.execution_count is not None:
            count += 1
            for holder in [cell, *(out for out in cell.outputs if out.output_type == "execute_result")]:
                holder.execution_count = count
    return notebook


def pictures(cell: nbformat.NotebookNode) -> list:
    return [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


def check_outputs(name: str, notebook: nbformat.NotebookNode) -> None:
    """Raises a BuildError for a path of this machine, a widget without HTML, or a picture without alternative text."""
    here = {str(ROOT), str(Path.home()), sys.prefix, sys.base_prefix, tempfile.gettempdir()} - {"/"}
    pattern = re.compile(rf"(?<![\w+/.-])(?:{'|'.join(map(re.escape, here))})(?:/\S*|\b)")
    for cell in notebook.cells:
        where = f"{name}, cell [{cell.get('execution_count')}]"
        if pictures(cell) and not cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
            raise BuildError(f"{where} shows a picture without alternative text: use loupe_lab.pages.plots.show")
        if len(pictures(cell)) > 1:
            raise BuildError(f"{where} shows several pictures, and a cell has one alternative text: split it")
        if as_shown.captions(cell) and len(as_shown.displayed(cell)) != 1:
            raise BuildError(f"{where} puts a caption below {len(as_shown.displayed(cell))} things: expected one, so "
                             "split it")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = [output.get("text", ""), *(v for kind, v in data.items() if not kind.startswith("image/"))]
            page = str(data.get("text/html", ""))
            if any('alt="' not in image for image in re.findall(r"<img\b[^>]*>", page)):
                raise BuildError(f"{where} shows a picture in HTML without alternative text")
            found = pattern.search(" ".join(map(str, text)))
            if found:
                raise BuildError(f"{where} prints a path of this machine: {found[0]}")
            if WIDGET in data:
                raise BuildError(f"{where} shows a widget, which is dead on the page")


def status_table(rows: list[tuple[str, str, str]], ran: bool) -> str:
    """A table of the chapters with seconds and memory, and, if they were run, one of the environment."""
    lines = ["| chapter | seconds | peak MB |", "|---|---:|---:|"]
    lines += [f"| [{name}]({name}) | {seconds} | {megabytes} |" for name, seconds, megabytes in rows]
    if ran:
        packages = ("torch", "torchvision", "timm", "lion-pytorch", "accelerate", "captum", "numpy", "jupyter-book")
        lines += ["", "| environment | |", "|---|---|", *(f"| {name} | {version(name)} |" for name in packages),
                  f"| Python | {platform.python_version()} |", f"| system | {platform.system()} {platform.machine()} |",
                  f"| cores | {os.cpu_count()} |", f"| run on | {date.today()} |"]
    return "\n".join(lines) + "\n"


def copy_sources(source: Path) -> None:
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns("_build", ".ipynb_checkpoints"))


def build_pages(source: Path, rows: list[tuple[str, str, str]] = (), kept: bool = True) -> Path:
    """Builds the pages from X/_build/source; returns their folder, X/_build/html.

    Args:
        rows: name, seconds and peak MB of each chapter that was run. Empty: the status page says that none was.
        kept: whether the outputs are the committed ones, or become them. Those of a run on a reader's machine may round
            otherwise: where they differ from a number in prose, a line says so, and the pages are built.

    Raises:
        BuildError: a number in prose is not what its cell has printed, where `kept`; or Sphinx warned. (With `--all`,
            as a page kept from an earlier build would not warn again.)
    """
    if found := printed.unbound_in(source):
        if kept:
            raise BuildError("; ".join(map(str, found)))
        print(*(f"other on this machine than in the text: {one}" for one in found), sep="\n")
    html = source.with_name("html")
    shutil.rmtree(html, ignore_errors=True)
    status = source / "status.md"
    before, rest = status.read_text(encoding="utf-8").split("<!-- status -->\n")
    table = status_table(rows or [(name, "not run in this build", "") for name in chapters()], ran=bool(rows))
    status.write_text(before + table + rest.split("<!-- /status -->\n")[1], encoding="utf-8")
    write_ledger(source / "ledger.md")
    scaling = source / "scaling_up.md"
    if scaling.is_file():
        scaling.write_text(bench_page.fill(scaling.read_text(encoding="utf-8")), encoding="utf-8")
    as_shown.prepare(source)
    config = source.with_name("config.yml")
    config.write_text(yaml.safe_dump(configuration(source)), encoding="utf-8")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", source, "--path-output", source.parents[1]]
    command += ["--config", config, "--toc", ROOT / "_toc.yml", "--all", "-W", "-n", "--keep-going", "-q"]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise BuildError("the pages have the warnings above; mend them all")
    mend(html)
    return html


def write_ledger(page: Path) -> None:
    """Writes claims, verdicts and numbers between the two marks of the page, if the page exists."""
    if not page.is_file():
        return
    try:
        table = ledger_page.page()
    except (LedgerError, LoupeError) as error:
        raise BuildError(str(error)) from error
    before, rest = page.read_text(encoding="utf-8").split("<!-- ledger -->\n")
    page.write_text(before + table + rest.split("<!-- /ledger -->\n")[1], encoding="utf-8")


def configuration(source: Path) -> dict:
    """_config.yml with the paths of the pages' scripts and data, which this function copies there.

    Jupyter Book makes every page load every script in _static. Here a page loads only what it needs, so the scripts
    are copied to X/_build/extra/_static, whose files Sphinx copies to the same _static at the end.
    """
    extra = source.with_name("extra")
    shutil.rmtree(extra, ignore_errors=True)
    static = extra / "_static"
    static.mkdir(parents=True)
    for script in (source / "_static").glob("*.js"):
        shutil.move(script, static)
    if (source / "try_it.md").is_file():
        from build_lab import build_lab  # loads torch

        build_lab(static / "lab")
    where = web_assets.publish(static)
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    own = config["sphinx"].get("local_extensions", {})
    config["sphinx"]["local_extensions"] = {name: str(ROOT / folder) for name, folder in own.items()}
    config["sphinx"]["config"] |= {
        "html_extra_path": [str(extra)],
        "mathjax_path": f"{where['mathjax']}tex-mml-chtml.js",
    }
    return config


def build_committed(folder: Path) -> Path:
    """Builds the pages from the committed notebooks, without running them; returns `folder`/_build/html."""
    source = folder / "_build" / "source"
    copy_sources(source)
    return build_pages(source)


def chosen(words: list[str]) -> list[str]:
    """The chapters of these names, or of their beginnings, such as 05; all of them where there is no word."""
    listed = chapters()
    found = [[name for name in listed if name == word or name.startswith(f"{word}_")] for word in words]
    for word, names in zip(words, found):
        if not names:
            raise BuildError(f"no chapter {word} in _toc.yml, which has: {', '.join(listed)}")
    return [name for names in found for name in names] or listed


def build(words: list[str], in_place: bool, parameters: dict[str, Any] | None = None) -> None:
    """Runs chapters and builds the pages; `parameters` as in `run`."""
    names = chosen(words)
    if parameters is None:
        os.environ |= dict(TQDM_DISABLE="1", LOUPE_STRICT="1")  # book/conftest.py says why
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the committed outputs; more threads round otherwise
    copy_sources(SOURCE)
    rows = []
    for name in names:
        print(f"running {name} ...", flush=True)
        notebook, seconds, megabytes = run(name, parameters)
        rows.append((name, f"{seconds:.1f}", f"{megabytes:.0f}"))
        if in_place:
            with replaced(BOOK / f"{name}.ipynb") as unfinished:
                nbformat.write(notebook, unfinished)
    print("building the pages ...", flush=True)
    html = build_pages(SOURCE, rows, kept=in_place)
    width = max(len(name) for name, *_ in [("chapter",), *rows])
    for name, seconds, megabytes in [("chapter", "seconds", "peak MB"), *rows]:
        print(f"{name:<{width}}  {seconds:>7}  {megabytes:>7}")
    print(f"the book: {html / 'index.html'}")


def parameter(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` -> the name and the value: a Python literal, or else the text itself; WEIGHTS and OUT are paths."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise BuildError(f"--set {text}: expected NAME=VALUE, such as WEIGHTS=swin_base.safetensors")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, str(Path(value).absolute()) if name in PATHS else value  # a chapter runs in another folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the chapters and build the pages.")
    parser.add_argument("chapters", nargs="*", help="such as 05_training_on_cub, or 05; default: all")
    parser.add_argument("--in-place", action="store_true", help="also write the new outputs into book/")
    parser.add_argument("--no-run", action="store_true", help="only build the pages, from the committed outputs")
    parser.add_argument("--profile", choices=(PROFILE, "full"), default=PROFILE, help="full: see each chapter's top")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other parameters of a full run")
    args = parser.parse_args()
    if args.no_run and (args.chapters or args.in_place):
        parser.error("--no-run runs no chapter: use it alone")
    full = args.profile == "full"
    if full and (args.in_place or len(args.chapters) != 1):
        parser.error("--profile full: expected one chapter, such as CHAPTER=05, and not --in-place, as the committed "
                     "outputs are those of the small profile")
    if args.set and not full:
        parser.error("--set: found it without --profile full, whose parameters it gives")
    try:
        parameters = dict(map(parameter, args.set)) | dict(PROFILE="full") if full else None
        if args.no_run:
            print(f"the book: {build_committed(BOOK) / 'index.html'}")
        else:
            build(args.chapters, args.in_place, parameters)
    except BuildError as error:
        sys.exit(f"build_book: {error}")


if __name__ == "__main__":
    main()
