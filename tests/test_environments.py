"""Other environments than this one: an empty one with the wheel in it, the lowest versions, and Colab's.

Each gets gigabytes installed, so they wait for LOUPE_ENVIRONMENTS=1; `make environments` is the command. With
UV_TORCH_BACKEND=cpu and PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu torch comes without CUDA.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nbformat
import papermill
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_project import PYPROJECT

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "book").glob("[0-9]*.ipynb"))
LOWEST, NEWEST = PYPROJECT["project"]["requires-python"].removeprefix(">="), "3.13"  # Colab's since August 2026

# What stands on Colab before a reader opens a chapter, as far as the book needs it.
PREINSTALLED = ["torch", "torchvision", "numpy", "ipykernel", "matplotlib", "ipywidgets", "pandas", "jinja2"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("LOUPE_ENVIRONMENTS"), reason="set LOUPE_ENVIRONMENTS=1 (installs much)"),
]


def run(*command, cwd: Path | None = None, **variables: str) -> str:
    """Runs it apart from this checkout and this environment; returns what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON", "VIRTUAL_ENV"))}
    ran = subprocess.run([str(part) for part in command], cwd=cwd, env=environment | variables, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-6000:]}"
    return ran.stdout


def uv(*arguments, **settings) -> str:
    return run(sys.executable, "-m", "uv", *arguments, **settings)


def make(folder: Path, python: str, *packages, options: tuple = ()) -> Path:
    """A virtual environment with pip, as Colab has it, and these packages; returns its Python."""
    uv("venv", "--quiet", "--seed", "--python", python, folder)
    interpreter = folder / "bin" / "python"
    uv("pip", "install", "--quiet", "--python", interpreter, *options, *packages)
    return interpreter


def versions(python: Path) -> dict[str, str]:
    listed = json.loads(uv("pip", "list", "--quiet", "--format", "json", "--python", python))
    return {canonicalize_name(package["name"]): package["version"] for package in listed}


def bounds(*extras: str) -> dict[str, str]:
    """package -> the lowest version that pyproject.toml allows, of the dependencies and of these extras."""
    project = PYPROJECT["project"]
    texts = project["dependencies"] + [text for extra in extras for text in project["optional-dependencies"][extra]]
    requirements = [Requirement(text) for text in texts]
    return {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in requirements if r.specifier}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A clone, as a reader gets it: only what is committed."""
    folder = tmp_path_factory.mktemp("repository") / "loupe"
    run("git", "clone", "--quiet", ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def distributions(repository, tmp_path_factory) -> dict[str, Path]:
    """suffix -> the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--out-dir", folder, repository)
    return {".whl": next(folder.glob("*.whl")), ".gz": next(folder.glob("*.tar.gz"))}


def test_wheel_and_sdist_carry_weights_the_widgets_script_and_the_model_card(repository, distributions):
    files = set(run("git", "-C", repository, "ls-files", "loupe_core", "loupe_lab").split())
    assert {"loupe_lab/pages/explorer.js", "loupe_core/weights/fieldguide_loupe/model.safetensors"} <= files
    wheel = zipfile.ZipFile(distributions[".whl"]).namelist()
    sdist = [name.split("/", 1)[-1] for name in tarfile.open(distributions[".gz"]).getnames()]
    for there in (wheel, sdist):
        assert files <= set(there)
    assert distributions[".whl"].stat().st_size < 10e6  # two backbones and a Loupe, 3 MB each
    assert {name.split("/")[0] for name in wheel} == {"loupe_core", "loupe_lab", Path(wheel[-1]).parts[0]}  # no tests


@pytest.mark.parametrize("suffix", [".whl", ".gz"])
def test_an_empty_environment_trains_from_the_distribution_alone(distributions, suffix, tmp_path):
    python = make(tmp_path / "venv", NEWEST, f"loupe-core[onnx] @ {distributions[suffix].as_uri()}")
    loupe, here = python.parent / "loupe", tmp_path / "empty"
    here.mkdir()
    where = run(python, "-c", "import loupe_core; print(loupe_core.__file__)", cwd=here)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    run(loupe, "fieldguide", "--out", "birds", cwd=here)
    run(loupe, "train", "birds", "--recipe", "small", "--out", "run", cwd=here)
    printed = run(loupe, "evaluate", "birds", "--checkpoint", "run/best", cwd=here)
    assert float(re.search(r"test accuracy (\S+)", printed)[1]) > 0.5, printed  # 20 species: chance is 0.05
    photograph = next((here / "birds" / "images").rglob("*.png"))
    run(loupe, "explain", photograph, "--checkpoint", "run/best", "--out", "seen.png", cwd=here)
    run(loupe, "export", "--checkpoint", "run/best", "--out", "loupe.onnx", cwd=here)
    assert (here / "seen.png").is_file() and (here / "loupe.onnx").is_file()


def test_the_unit_tests_pass_with_the_lowest_versions(distributions, repository, tmp_path):
    lowest = bounds("book", "chapters", "onnx", "test")
    requirements = [f"{name}>={version}" for name, version in lowest.items()]
    python = make(tmp_path / "venv", LOWEST, *requirements, options=("--resolution", "lowest-direct"))
    uv("pip", "install", "--quiet", "--no-deps", "--python", python, distributions[".whl"])
    there = versions(python)
    found = {name: Version(Version(there[canonicalize_name(name)]).public) for name in lowest}  # without "+cpu"
    assert found == {name: Version(version) for name, version in lowest.items()}
    print(run(python, "-m", "pytest", "tests", "-q", "-n", "2", "--dist", "loadfile", cwd=repository,
              OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", LOUPE_ENVIRONMENTS=""))


# The part of Colab's own package that anywidget meets; a kernel there has imported it before the first cell.
COLAB = """\
def enable_custom_widget_manager():
    pass

class _widgets:
    _installed_url = "https://example.org/widget-manager"
"""
VIEW = "application/vnd.jupyter.widget-view+json"


class Colab:
    """A machine like Colab's: packages that are there before the book, kernels in which google.colab can be imported.

    before: the versions of these packages. Every notebook starts in an empty folder.
    """

    def __init__(self, folder: Path, python: str, lowest: bool, address: str) -> None:
        low = bounds("book")
        self.folder = folder
        packages = [f"{name}=={low[name]}" if lowest else name for name in PREINSTALLED]
        self.python = make(folder / "venv", python, *packages)
        self.before = versions(self.python)
        (folder / "ipython" / "profile_default" / "startup").mkdir(parents=True)
        (folder / "ipython" / "profile_default" / "startup" / "00-colab.py").write_text("import google.colab.output")
        package = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (package / "google" / "colab").mkdir(parents=True)
        (package / "google" / "colab" / "output.py").write_text(COLAB)
        kernel = folder / "jupyter" / "kernels" / "colab"
        kernel.mkdir(parents=True)
        (kernel / "kernel.json").write_text(json.dumps({
            "argv": [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Colab", "language": "python",
            "env": {"IPYTHONDIR": str(folder / "ipython"), "LOUPE_ADDRESS": address, "HF_HUB_OFFLINE": "1",
                    "LOUPE_DATA": str(folder / "data"), "PYTHONPATH": ""},
        }))

    def run(self, notebook: Path, here: Path) -> nbformat.NotebookNode:
        """The notebook with its outputs, run in the folder `here`; a cell that fails fails the test."""
        copy = here / notebook.name
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JUPYTER_PATH", str(self.folder / "jupyter"))
            return papermill.execute_notebook(str(shutil.copy(notebook, copy)), None, cwd=str(here),
                                              kernel_name="colab", progress_bar=False)


@pytest.fixture(scope="module", params=["lowest", "newest"])
def colab(request, repository, tmp_path_factory) -> Colab:
    lowest = request.param == "lowest"
    return Colab(tmp_path_factory.mktemp(request.param), LOWEST if lowest else NEWEST, lowest, repository.as_uri())


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_runs_on_colab_and_leaves_torch_and_numpy_alone(colab, name, tmp_path):
    ran = colab.run(ROOT / "book" / f"{name}.ipynb", tmp_path)
    after = versions(colab.python)
    assert "loupe-core" in after and after.items() >= colab.before.items()
    widgets = [out for cell in ran.cells for out in cell.get("outputs", []) if VIEW in out.get("data", {})]
    assert len(widgets) == sum("HeatmapExplorer(" in cell.source for cell in ran.cells if cell.cell_type == "code")
    # Colab shows a widget of others only if its output names the manager
    assert all("colab" in out.metadata[VIEW] for out in widgets)


def test_a_first_cell_may_run_again_and_in_a_new_kernel(colab, tmp_path):
    chapter = nbformat.read(ROOT / "book" / f"{CHAPTERS[0]}.ipynb", as_version=4)
    first = next(cell.source for cell in chapter.cells if cell.cell_type == "code")
    cells = [nbformat.v4.new_code_cell(source) for source in 2 * [first, "print(os.getcwd())"]]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "again.ipynb")
    (tmp_path / "content").mkdir()
    for _ in range(2):
        ran = colab.run(tmp_path / "again.ipynb", tmp_path / "content")
        folders = [cell.outputs[0].text.strip() for cell in (ran.cells[1], ran.cells[3])]
        assert folders == [str(tmp_path / "content" / "loupe" / "book")] * 2
