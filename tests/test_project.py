"""The files that hold the project together agree with one another, and the book's runner does as it says."""

import ast
import importlib
import importlib.util
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from nbval.plugin import get_sanitize_patterns
from packaging.requirements import Requirement
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()

# A file imports only from files that stand before it here; the README and the page "The package" have the same order.
ORDER = """loupe_core.errors loupe_core.gate loupe_core.sites loupe_core.files.console loupe_core.files.atomic
           loupe_core.files.signals loupe_core.files.images loupe_core.files.lists loupe_core.files.folders
           loupe_core.files.labels loupe_core.files.cuts loupe_core.files.checks loupe_core.files.progress
           loupe_core.files.download loupe_core.files.set_lists loupe_core.files.known_sets
           loupe_core.files.given_labels loupe_core.files.pixel_cache loupe_core.files.checkpoint loupe_core.files.hub
           loupe_core.files.run_folder loupe_core.weights.swin_micro loupe_core.weights.lite0 loupe_core.start.devices
           loupe_core.start.layers loupe_core.start.backbones loupe_core.model loupe_core.files.export loupe_core.loss
           loupe_core.augment loupe_core.geometry loupe_core.samples loupe_core.datasets loupe_core.files.card
           loupe_core.start.limits loupe_core.recipe loupe_core.start.choose loupe_core.start.options
           loupe_core.start.first loupe_core.start.machine loupe_core.start.lion loupe_core.start.optimizers
           loupe_core.start.labels loupe_core.start.probe loupe_core.start.on_card loupe_core.start.batches
           loupe_core.start.steps loupe_core.trainer loupe_core.heatmap loupe_core.look.words loupe_core.look.cut
           loupe_core.look.boxes loupe_core.look.sources loupe_core.look.magnifier loupe_core.look.training
           loupe_core.look.command loupe_core.look.export loupe_core.cli loupe_core.__main__
           loupe_lab.birds.painter loupe_lab.birds.fieldguide loupe_lab.evidence.statistics loupe_lab.evidence.results
           loupe_lab.evidence.cost loupe_lab.evidence.masks loupe_lab.evidence.baselines loupe_lab.evidence.oracle
           loupe_lab.evidence.explain loupe_lab.evidence.where loupe_lab.evidence.answers loupe_lab.evidence.audit
           loupe_lab.evidence.routing loupe_lab.evidence.scorecard loupe_lab.evidence.pointing
           loupe_lab.evidence.changed
           loupe_lab.evidence.robustness loupe_lab.pages.plots loupe_lab.pages.tables loupe_lab.pages.pictures
           loupe_lab.pages.report loupe_lab.pages.widgets loupe_lab.pages.explorer loupe_lab.paper.arms
           loupe_lab.paper.hours loupe_lab.paper.machine loupe_lab.paper.experiment loupe_lab.paper.grid
           loupe_lab.paper.table loupe_lab.paper.rehearsal loupe_lab.commands""".split()
PACKAGES = ("loupe_core", "loupe_lab")
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if path.name != "__init__.py"}


def package_imports(path: Path) -> set[str]:
    """Dotted names of the two packages' own files that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES}
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] in PACKAGES):
            assert not node.level, f"{path}: import by the full name"
            for alias in node.names:  # `from loupe_core import Loupe`, and `from loupe_core.files import images`
                inner = f"{node.module}.{alias.name}"
                value = getattr(importlib.import_module(node.module), alias.name, None)
                names.add(inner if inner in FILES else getattr(value, "__module__", node.module)
                          if node.module in PACKAGES else node.module)
    return names


@pytest.mark.parametrize("name", FILES)
def test_a_package_file_imports_only_from_files_above_it(name):
    assert name in ORDER, f"give {name} its place in ORDER"
    assert package_imports(FILES[name]) <= set(ORDER[: ORDER.index(name)])


def test_every_file_of_the_order_is_there():
    assert sorted(ORDER) == sorted(FILES)


def test_readme_and_api_page_have_the_same_order():
    page = re.findall(r"automodule:: (\S+)", (ROOT / "book" / "api.md").read_text())
    assert page[0] == "loupe_core" and page[1:] == [name for name in ORDER if name in page]
    rooms = re.findall(r"^\| `(loupe_\w+/(?:\w+/)?)` \| .*: (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    listed = {room.rstrip("/").replace("/", "."): names.split(", ") for room, names in rooms}
    there = {room: [name.rpartition(".")[2] for name in ORDER if name.rpartition(".")[0] == room] for room in listed}
    assert {room: [n for n in names if n != "__main__"] for room, names in there.items()} == listed
    assert set(ORDER) - {f"{room}.{name}" for room, names in there.items() for name in names} == {"loupe_lab.commands"}


def test_the_core_knows_nothing_of_the_lab():
    for name, path in FILES.items():
        assert name.startswith("loupe_lab") or "import loupe_lab" not in path.read_text() \
            and not any(used.startswith("loupe_lab") for used in package_imports(path)), name


def test_the_front_of_the_core_can_be_read_in_one_sitting():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "loupe_core").glob("*.py")}
    assert sum(lines.values()) <= 2600
    assert max(lines.values()) <= 380, max(lines, key=lines.get)


def public_functions(tree: ast.Module):
    """Functions, and methods of classes, whose names a user may write; functions inside of functions do not count."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    for node in (node for body in bodies for node in body):
        if isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name in ("__init__", "__call__")):
            yield node


SCRIPTS = {str(path.relative_to(ROOT)): path for folder in ("scripts", "benchmarks")
           for path in sorted((ROOT / folder).rglob("*.py"))}


@pytest.mark.parametrize("name", [*FILES, *SCRIPTS])
def test_public_functions_state_their_types(name):
    for node in public_functions(ast.parse((FILES | SCRIPTS)[name].read_text())):
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        bare = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in ("self", "cls")]
        assert not bare, f"{node.name}: {bare} have no type"
        assert node.returns is not None or node.name == "__init__", f"{node.name} does not say what it returns"


@pytest.mark.parametrize("name", FILES)
def test_code_in_docstrings_stands_in_single_backticks(name):
    assert "``" not in FILES[name].read_text()


def test_what_extends_the_trainer_replaces_public_methods_alone():
    found = []
    for folder in (*PACKAGES, "scripts", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and "Trainer" in map(ast.unparse, node.bases):
                    found += [f"{path.name}: {part.name}" for part in node.body if isinstance(part, ast.FunctionDef)]
    assert found and [name for name in found if ": _" in name and ": __init__" not in name] == []


def test_environment_yml_adds_nothing_to_pyproject():
    python, pip, packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert python == "python" + PYPROJECT["project"]["requires-python"]
    assert pip == "pip"
    others = ("bench", "environments")  # for a `make` target each, which installs them
    extras = ",".join(name for name in PYPROJECT["project"]["optional-dependencies"] if name not in others)
    assert packages == {"pip": [f"-e .[{extras}]"]}


def test_requirements_have_lower_bounds_only():
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    groups.append(PYPROJECT["build-system"]["requires"])
    requirements = [Requirement(text) for group in groups for text in group]
    requirements = [r for r in requirements if r.name != PYPROJECT["project"]["name"]]  # one extra names another
    bounds = {r.name: sorted(str(s) for s in r.specifier) for r in requirements}
    assert bounds.pop("jupyter-book") == ["<2", ">=1.0.3"]
    assert all(len(b) == 1 and b[0].startswith(">=") for b in bounds.values()), bounds
    assert len({r.name for r in requirements}) == len(requirements), "a package is listed twice"


def test_every_file_that_the_makefile_names_is_there():
    named = set(re.findall(r"[\w./-]+\.(?:py|toml|cfg|yml)\b", MAKEFILE))
    assert "scripts/publish/build_book.py" in named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("command", re.findall(r"-m (loupe_core(?: \w+|\.\w+))", MAKEFILE))
def test_the_package_knows_the_makefiles_commands(command, monkeypatch):
    module, *words = command.split()
    monkeypatch.setattr(sys, "argv", [module, *words, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code


def test_no_test_file_chooses_threads_as_it_is_imported():
    """It would choose for all files, against OMP_NUM_THREADS: two processes of two threads wait for each other."""
    for path in (ROOT / "tests").glob("*.py"):
        calls = [ast.unparse(node) for node in ast.parse(path.read_text()).body if isinstance(node, ast.Expr)]
        assert not any("set_num_threads" in call for call in calls), path.name


def test_table_of_contents_and_pages_are_the_same_set():
    listed = set(parse_toc_yaml(ROOT / "_toc.yml"))
    pages = {path.stem for suffix in ("md", "ipynb") for path in (ROOT / "book").glob(f"*.{suffix}")}
    assert listed == pages


SANITIZERS = get_sanitize_patterns((ROOT / "tests" / "nbval_sanitize.cfg").read_text())


def sanitize(text: str) -> str:
    for regex, replacement in SANITIZERS:
        text = re.sub(regex, replacement, text)
    return text


def test_every_section_of_the_sanitizer_is_read():
    sections = re.findall(r"^\[.+\]$", (ROOT / "tests" / "nbval_sanitize.cfg").read_text(), re.MULTILINE)
    assert len(sections) == len(SANITIZERS) > 0


@pytest.mark.parametrize("one, other", [
    ("trained in 41.3 s", "trained in 9.8 s"),
    ("epoch 3   41.3 s  0.81", "epoch 3  141.0 s  0.81"),
    ("212.7 images/s", "97.0 images/s"),
])
def test_wall_clock_numbers_are_not_compared(one, other):
    assert sanitize(one) == sanitize(other)


@pytest.mark.parametrize("text", [
    "accuracy 0.853 +- 0.012", "85.3 %", "85.3 species", "20 species, 3 seeds", "112.0 px", "64.0 images",
    "mask 14 x 14", "lam 0.05", "loss 1.2 sparsity 0.3", "10.5 steps", "3 s", "4.0 MB", "1e-05", "0.042 %",
])
def test_every_other_number_is_compared(text):
    assert sanitize(text) == text


@pytest.fixture
def build_book(monkeypatch, tmp_path):
    """scripts/publish/build_book.py, with an empty book in a temporary folder."""
    spec = importlib.util.spec_from_file_location("build_book", ROOT / "scripts" / "publish" / "build_book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, path in {"ROOT": tmp_path, "BOOK": tmp_path, "SOURCE": tmp_path, "FULL": tmp_path / "full"}.items():
        monkeypatch.setattr(module, name, path)
    return module


SMALL = 'PROFILE = "small"'
PICTURE = """
display({"image/png": b"-", "text/plain": "<figure>"}, raw=True, metadata={"image/png": {"alt": "a bird"}})
"""
WIDGET = "application/vnd.jupyter.widget-view+json"


def write_chapter(folder: Path, *sources: str) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata.tags = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "chapter.ipynb")


def test_a_run_leaves_the_authors_cells_and_no_trace_of_the_machine(build_book, tmp_path):
    write_chapter(tmp_path, SMALL, "print(PROFILE)", "1 + 1", PICTURE)
    before = nbformat.read(tmp_path / "chapter.ipynb", as_version=4)
    _, seconds, megabytes = build_book.run("chapter")
    after = nbformat.read(tmp_path / "chapter.ipynb", as_version=4)
    assert [(c.id, c.source) for c in after.cells] == [(c.id, c.source) for c in before.cells]
    assert [cell.execution_count for cell in after.cells] == [1, 2, 3, 4]
    alt = {"mystnb": {"image": {"alt": "a bird"}}}
    assert [cell.metadata for cell in after.cells] == [{"tags": ["parameters"]}, {}, {}, alt]
    assert after.cells[1].outputs[0].text == "small\n"
    assert set(after.metadata) == {"kernelspec", "language_info"}
    assert "version" not in after.metadata.language_info
    assert 0 < seconds and 10 < megabytes


def test_a_full_run_is_kept_beside_the_pages_with_its_parameters(build_book, tmp_path, capfd):
    write_chapter(tmp_path, f"{SMALL}\nOUT = None", "import sys; print(PROFILE, OUT)",
                  'print("a bar", file=sys.stderr)', PICTURE.replace('{"image/png": {"alt": "a bird"}}', "{}"))
    notebook, _, _ = build_book.run("chapter", dict(PROFILE="full", OUT="there"))
    assert notebook == nbformat.read(tmp_path / "full" / "chapter.ipynb", as_version=4)
    assert [cell.metadata.get("tags") for cell in notebook.cells[:2]] == [["parameters"], ["injected-parameters"]]
    assert notebook.cells[2].outputs[0].text == "full there\n" and notebook.cells[3].outputs == []
    assert "a bar" in capfd.readouterr().err and notebook.cells[4].outputs
    with pytest.raises(build_book.BuildError, match=r"ZeroDivisionError.*traceback: full/chapter.ipynb"):
        write_chapter(tmp_path, SMALL, "1 / 0")
        build_book.run("chapter", dict(PROFILE="full"))


def test_parameters_of_a_full_run_are_values_or_paths_from_here(build_book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = ["SEED=3", "CHANGES={'lam': 0.5}", "WEIGHTS=swin.safetensors", "OUT=None", "NAME=swin"]
    assert dict(map(build_book.parameter, texts)) == dict(
        SEED=3, CHANGES={"lam": 0.5}, WEIGHTS=str(tmp_path / "swin.safetensors"), OUT=None, NAME="swin")
    with pytest.raises(build_book.BuildError, match="expected NAME=VALUE"):
        build_book.parameter("swin.safetensors")


def test_a_chapter_is_found_by_its_number(build_book, monkeypatch):
    monkeypatch.setattr(build_book, "chapters", lambda: ["01_a", "02_b", "10_c"])
    assert build_book.chosen(["02", "10_c"]) == ["02_b", "10_c"] and len(build_book.chosen([])) == 3
    with pytest.raises(build_book.BuildError, match="no chapter 1 in"):
        build_book.chosen(["1"])


@pytest.mark.parametrize("words, offline", [([], "1"), (["PROFILE=full"], "")])
def test_the_hub_is_shut_but_for_the_full_profile(words, offline, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    rule = 'shown:; @echo "[$$HF_HUB_OFFLINE]"'
    said = subprocess.run(["make", "-s", "--eval", rule, "shown", *words], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == f"[{offline}]\n"


@pytest.mark.parametrize("sources, line", [
    ([SMALL, "x = 1\n1 / 0"], r"chapter, cell \[2\] \(x = 1\): ZeroDivisionError: division by zero"),
    ([SMALL, "import os; os._exit(1)"], r"chapter, cell \[2\] .*: DeadKernelError"),
    (['PROFILE = "full"'], r'chapter: the cell tagged "parameters" says PROFILE = "full"'),
])
def test_a_chapter_that_fails_is_named_in_one_line(build_book, tmp_path, sources, line):
    write_chapter(tmp_path, *sources)
    with pytest.raises(build_book.BuildError, match=f"^{line}") as caught:
        build_book.run("chapter")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("outputs, line", [
    ([{"text/plain": f"wrote {ROOT}/data"}], "prints a path of this machine: " + re.escape(f"{ROOT}/data")),
    ([{WIDGET: {}, "text/plain": "Button()"}], "shows a widget"),
    ([{"image/png": "-"}], "shows a picture without"),
    ([{"image/png": "-"}, {"image/png": "-"}], "shows several pictures"),
])
def test_an_output_that_has_no_place_on_a_page_is_refused(outputs, line, build_book, monkeypatch):
    monkeypatch.setattr(build_book, "ROOT", ROOT)
    described = {"mystnb": {"image": {"alt": "a bird"}}} if len(outputs) > 1 else {}
    cell = nbformat.v4.new_code_cell(execution_count=7, metadata=described)
    cell.outputs = [nbformat.v4.new_output("display_data", data) for data in outputs]
    with pytest.raises(build_book.BuildError, match=rf"^chapter, cell \[7\] {line}"):
        build_book.check_outputs("chapter", nbformat.v4.new_notebook(cells=[cell]))
