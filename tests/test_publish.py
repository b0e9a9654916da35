"""From a fork to a book that people read: workflows, forms, one address, and chapters that start as good ones."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import address
import build_book
import build_pdf
import nbformat
import new_chapter
import pytest
import test_chapters
import yaml
from pypdf import PdfReader

import loupe_core

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
JOBS = {(file, name): job for file, flow in WORKFLOWS.items() for name, job in flow["jobs"].items()}
MARKDOWN = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
ONE, OTHER = "https://github.com/one-reader/loupe-fork", "https://github.com/Another-Reader/book_2.0"


def steps(file: str, job: str) -> list[dict]:
    return JOBS[file, job]["steps"]


def validate(schema: str, *files: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    return subprocess.run([*command, *files], capture_output=True, text=True)


# --- workflows and forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema, files, needed", [
    ("vendor.github-workflows", ".github/workflows/*.yml", "jobs"),
    ("custom.github-workflows-require-timeout", ".github/workflows/*.yml", "timeout-minutes"),
    ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*.yml", "body"),
    ("vendor.citation-file-format", "CITATION.cff", "authors"),
])
def test_what_github_reads_has_the_form_that_it_reads(schema, files, needed, tmp_path):
    found = sorted(ROOT.glob(files))
    assert found
    copies = [Path(shutil.copy(path, tmp_path / f"{path.stem}.yml")) for path in found]
    checked = validate(schema, *copies)
    assert checked.returncode == 0, checked.stdout
    copies[0].write_text(copies[0].read_text().replace(f"{needed}:", f"{needed}-misspelt:"))
    assert validate(schema, *copies).returncode == 1


def test_workflows_test_publish_and_look_every_week():
    triggers = {file: set(flow[True]) for file, flow in WORKFLOWS.items()}  # YAML 1.1 reads the key `on` as true
    assert triggers == {
        "test.yml": {"push", "pull_request", "workflow_dispatch"},
        "book.yml": {"push", "workflow_dispatch"},
        "colab.yml": {"schedule", "workflow_dispatch"},
    }
    assert {"run": "make test"} in steps("test.yml", "test")
    assert {"run": "make book"} in steps("book.yml", "build")


def test_a_job_may_only_write_what_it_has_to():
    assert all(flow["permissions"] == {"contents": "read"} for flow in WORKFLOWS.values())
    writing = {job: {k for k, v in spec.get("permissions", {}).items() if v != "read"} for job, spec in JOBS.items()}
    assert {job: rights for job, rights in writing.items() if rights} == {
        ("book.yml", "publish"): {"pages", "id-token"},
        ("colab.yml", "report"): {"issues"},
    }
    # a job that may write runs no code of the repository's, nor of a package's
    for file, job in (job for job, rights in writing.items() if rights):
        assert not [step for step in steps(file, job) if re.search(r"checkout|setup-", step.get("uses", ""))]


def test_actions_are_githubs_own_and_pinned_by_their_major_version():
    used = [step["uses"] for file, job in JOBS for step in steps(file, job) if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[a-z-]+@v\d+", name) for name in used)
    assert len(set(used)) == len({name.split("@")[0] for name in used}), "one action in two versions"


def test_jobs_end_do_not_pile_up_and_keep_what_pip_fetched():
    assert all(flow["concurrency"]["group"] for flow in WORKFLOWS.values())
    for file, job in JOBS:
        for step in steps(file, job):
            if step.get("uses", "").startswith("actions/setup-python"):
                assert step["with"]["cache"] == "pip"
                assert (ROOT / step["with"]["cache-dependency-path"]).is_file()


def test_scripts_of_workflows_are_sound():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    scripts = [step["run"] for file, job in JOBS for step in steps(file, job) if "run" in step]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert "${{" not in script, "what comes from outside comes by `env`, not into the script"
        assert set(re.findall(r"^ *make (\w+)", script, flags=re.MULTILINE)) <= targets
    upload = next(step for step in steps("book.yml", "build") if "upload-pages" in step.get("uses", ""))
    assert ROOT / upload["with"]["path"] == build_book.SOURCE.with_name("html")


def test_the_weekly_run_pins_nothing():
    scripts = " ".join(step.get("run", "") for step in steps("colab.yml", "chapters"))
    assert "tests/test_environments.py -k newest" in scripts
    assert not re.search(r"[=<>~]=", scripts)


def run_step(file: str, job: str, step: dict, folder: Path, programs: dict[str, str], **environment):
    """Runs a step's script in an empty folder, with these programs in front of the others. Returns what it wrote."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(folder / "output")}
    return subprocess.run(["bash", "-e", "-c", step["run"]], cwd=folder, env=os.environ | paths | environment,
                          capture_output=True, text=True)


@pytest.mark.parametrize("failing", [[], ["02_b"], ["01_a", "02_b"]])
def test_the_weekly_run_names_the_chapters_that_fail(failing, tmp_path):
    step = next(step for step in steps("colab.yml", "chapters") if step.get("id") == "chapters")
    lines = "".join(f"echo 'FAILED tests/test_environments.py::test_a_chapter[newest-{name}] - Error: FAILED'\n"
                    for name in failing)
    ran = run_step("colab.yml", "chapters", step, tmp_path, {"python": f"{lines}exit {len(failing)}"})
    assert ran.returncode == len(failing), ran.stderr
    assert (tmp_path / "output").read_text() == f"failed={' '.join(failing)}\n"


@pytest.mark.parametrize("open_issue, failed", [("", " 02_b"), ("17", " 02_b"), ("", "")])
def test_a_failing_week_opens_one_issue_and_adds_to_it_later(open_issue, failed, tmp_path):
    (step,) = steps("colab.yml", "report")
    gh = f'echo "$@" >> calls; [ "$2" = list ] && echo "{open_issue}"; true'
    assert set(step["env"]) == {"GH_TOKEN", "GH_REPO", "FAILED", "RUN"}
    ran = run_step("colab.yml", "report", step, tmp_path, {"gh": gh}, FAILED=failed, RUN="https://the.run")
    assert ran.returncode == 0, ran.stderr
    asked, done = (tmp_path / "calls").read_text().splitlines()
    assert asked.startswith("issue list --state open")
    assert done.startswith(f"issue comment {open_issue} " if open_issue else "issue create --title The chapters fail")
    assert ("02_b" if failed else "the installation") in done and done.endswith("https://the.run")


# --- one address ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what the project is made of, without what it makes."""
    names = ["_config.yml", "_toc.yml", "README.md", "CITATION.cff", "Makefile", "pyproject.toml", "book", "scripts",
             "tests", ".github", "CONTRIBUTING.md", "CHANGELOG.md"]
    leave = shutil.ignore_patterns("_build", "__pycache__", ".ipynb_checkpoints")
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name, **({"ignore": leave} if copy is shutil.copytree else {}))
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


def contents(tree: Path) -> dict[str, bytes]:
    files = (path for path in tree.rglob("*") if path.is_file() and "tests" not in path.parts)
    return {str(path.relative_to(tree)): path.read_bytes() for path in files}


def test_all_files_have_the_address_of_the_configuration():
    assert address.disagreeing() == []


def test_an_address_goes_everywhere_and_another_takes_its_place(tree):
    unset = contents(tree)
    address.write(ONE, tree)
    first = contents(tree)
    everywhere = {"_config.yml", "CITATION.cff", "README.md", "scripts/colab/reproduce.ipynb",
                  *(f"book/{path.name}" for path in CHAPTERS)}
    assert {name for name in first if ONE.encode() in first[name]} == everywhere
    assert {name for name in first if first[name] != unset[name]} == everywhere
    assert address.read(tree) == ONE
    assert address.write(ONE + ".git", tree) == address.disagreeing(tree) == []

    address.write(OTHER, tree)
    second = contents(tree)
    assert not [name for name in second if b"one-reader" in second[name] or b"loupe-fork" in second[name]]
    assert {name for name in second if OTHER.encode() in second[name]} == everywhere
    address.write("", tree)
    assert contents(tree) == unset


@pytest.mark.parametrize("name", ["CITATION.cff", "README.md", "book/" + CHAPTERS[-1].name])
def test_a_file_with_another_address_is_named(tree, name):
    address.write(ONE, tree)
    path = tree / name
    path.write_text(path.read_text().replace(ONE, OTHER))
    assert address.disagreeing(tree) == [name]


def test_first_cells_fetch_the_book_from_the_address(tree):
    for url in (ONE, OTHER):
        address.write(url, tree)
        cells = [nbformat.read(path, as_version=4).cells for path in sorted((tree / "book").glob("[0-9]*.ipynb"))]
        first = {next(cell.source for cell in found if cell.cell_type == "code") for found in cells}
        assert len(first) == 1
        assert f'address = os.environ.get("LOUPE_ADDRESS", "{url}")' in first.pop()


def test_readers_are_led_to_the_repository_its_pages_and_colab(tree):
    address.write(ONE, tree)
    config, citation = (yaml.safe_load((tree / name).read_text()) for name in ("_config.yml", "CITATION.cff"))
    assert config["repository"] == {"url": ONE, "path_to_book": "book", "branch": "main"}
    assert config["launch_buttons"]["colab_url"] == "https://colab.research.google.com"
    buttons = {name for name, value in config["html"].items() if name.startswith("use_") and value is True}
    assert buttons == {"use_repository_button", "use_issues_button", "use_edit_page_button"}
    assert citation["repository-code"] == ONE and citation["url"] == "https://one-reader.github.io/loupe-fork/"
    copy = shutil.copy(tree / "CITATION.cff", tree / "citation.yml")
    assert validate("vendor.citation-file-format", copy).returncode == 0
    readme = (tree / "README.md").read_text()
    for path in CHAPTERS:
        assert f"https://colab.research.google.com/github/one-reader/loupe-fork/blob/main/book/{path.name})" in readme
    badges = set(re.findall(rf"{ONE}/actions/workflows/([\w.]+)/badge.svg", readme))
    assert badges and badges <= set(WORKFLOWS)
    branches = {branch for flow in WORKFLOWS.values() for branch in (flow[True].get("push") or {}).get("branches", [])}
    assert branches == {config["repository"]["branch"]}


def links(tree: Path, folder: Path) -> dict[str, set[str]]:
    """page -> where its buttons lead, of a book of one chapter and one page with this tree's configuration."""
    source = folder / "_build" / "source"
    source.mkdir(parents=True)
    for name in ("intro.md", "references.bib", "_static"):
        copy = shutil.copytree if (tree / "book" / name).is_dir() else shutil.copy
        copy(tree / "book" / name, source / name)
    (source / "intro.md").write_text("# The book\n\n<script></script>\n")
    (source / "status.md").write_text("# Status\n\n<!-- status -->\n<!-- /status -->\n")
    cells = [nbformat.v4.new_markdown_cell("# A chapter", id="title"), nbformat.v4.new_code_cell("1 + 1", id="sum")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=build_book.NOTEBOOK_METADATA), source / "01_a.ipynb")
    toc = tree / "_toc.yml"
    toc.write_text("format: jb-book\nroot: intro\nchapters:\n  - file: 01_a\n  - file: status\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_book, "ROOT", tree)
        patch.setattr(build_book, "BOOK", source)
        html = build_book.build_pages(source)
    pages = {name: (html / f"{name}.html").read_text() for name in ("intro", "01_a")}
    assert not any("make address" in page for page in pages.values())
    return {name: set(re.findall(r'href="(https?://[^"]+)"', page)) for name, page in pages.items()}


def test_without_an_address_no_page_asks_for_one_and_no_button_leads_nowhere(tree, tmp_path_factory):
    address.write("", tree)
    config = yaml.safe_load((tree / "_config.yml").read_text())
    assert "launch_buttons" not in config and "repository" not in config and "extra_footer" not in config["html"]
    assert "make address" not in (tree / "README.md").read_text().split("## ")[0]
    found = links(tree, tmp_path_factory.mktemp("book"))
    assert not [url for urls in found.values() for url in urls if re.search("github|colab|binder", url)]


def test_with_an_address_every_page_leads_to_its_source_and_a_chapter_to_colab_and_binder(tree, tmp_path_factory):
    address.write(ONE, tree)
    found = links(tree, tmp_path_factory.mktemp("book"))
    for name, suffix in (("intro", "md"), ("01_a", "ipynb")):
        assert {ONE, f"{ONE}/edit/main/book/{name}.{suffix}"} <= found[name]
        assert any(url.startswith(f"{ONE}/issues/new?") for url in found[name])
    where = ONE.removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{where}/blob/main/book/01_a.ipynb" in found["01_a"]
    assert any(url.startswith(f"https://mybinder.org/v2/gh/{where}/main?") for url in found["01_a"])


@pytest.mark.parametrize("wrong", ["github.com/a/b", "https://github.com/a", "https://github.com/a/b/tree/main",
                                   "https://example.org/a/b", "https://github.com/a b/c", 'https://github.com/a/b"'])
def test_what_is_no_repositorys_address_is_refused_and_changes_nothing(tree, wrong):
    before = contents(tree)
    with pytest.raises(address.AddressError, match="expected https://github.com/OWNER/NAME"):
        address.write(wrong, tree)
    assert contents(tree) == before


def test_a_file_without_the_marks_is_refused_before_anything_is_written(tree):
    (tree / "CITATION.cff").write_text("title: nothing\n")
    before = contents(tree)
    with pytest.raises(address.AddressError, match=r"^CITATION.cff has 0 pairs of the marks"):
        address.write(ONE, tree)
    assert contents(tree) == before


def script(tree: Path, *arguments: str, **environment) -> subprocess.CompletedProcess:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=plain | environment, capture_output=True,
                          text=True)


def test_a_workflow_takes_its_own_address_from_the_environment(tree):
    address.write(OTHER, tree)
    owner_and_name = ONE.removeprefix("https://github.com/")
    ran = script(tree, "scripts/publish/address.py", GITHUB_SERVER_URL="https://github.com",
                 GITHUB_REPOSITORY=owner_and_name)
    assert ran.returncode == 0 and ONE in ran.stdout
    assert address.read(tree) == ONE and address.disagreeing(tree) == []
    assert script(tree, "scripts/publish/address.py").stdout.startswith(f"{ONE}  (0 files changed)")
    ran = script(tree, "scripts/publish/address.py", "nowhere")
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1


def test_pages_of_a_user_lie_at_the_root():
    assert address.published("https://github.com/Someone/someone.github.io") == "https://someone.github.io/"


# --- contributors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_committed_outputs_have_words_for_pictures_and_no_path_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    build_book.check_outputs(path.stem, notebook)  # as when they were made, but there with the paths of that machine
    for cell in notebook.cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
        for text in texts:
            assert not re.search(r"(?<![\w.~/-])/(home|Users|root|tmp|private|mnt)/\w|[A-Z]:\\\\?Users", text), text


def test_ruff_finds_nothing():
    ran = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format", "concise"], cwd=ROOT,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_hooks_of_pre_commit_run_what_is_there():
    hooks = {hook["id"]: hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
             for hook in repo["hooks"]}
    assert set(hooks) == {"ruff", "chapters"}
    *files, option, names = shlex.split(hooks["chapters"]["entry"])[4:]
    assert files == ["tests/test_chapters.py", "tests/test_publish.py"]
    chosen = test_committed_outputs_have_words_for_pictures_and_no_path_of_a_machine.__name__
    assert option == "-k" and Path(files[0]).stem in names.split(" or ") and names.split(" or ")[1] in chosen
    assert all(re.search(hooks["chapters"]["files"], str(path.relative_to(ROOT))) for path in CHAPTERS)


def test_the_changelog_is_of_this_version():
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
    assert loupe_core.__version__ in newest


@pytest.mark.parametrize("name", MARKDOWN)
def test_files_and_targets_that_a_page_names_are_there(name):
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
    files = re.findall(r"[`\s]((?:book|scripts|tests|data|benchmarks)/[\w/.-]+\.\w+)", text)
    missing = [f for f in files if not (ROOT / f).exists() and not f.startswith("data/birds")]
    assert missing == []


@pytest.mark.slow
def test_a_new_chapter_keeps_every_promise_from_the_start(tree):
    address.write(ONE, tree)
    name = f"{len(CHAPTERS) + 1:02d}_shadows"
    ran = script(tree, "scripts/publish/new_chapter.py", name, "Birds and their shadows")
    assert ran.returncode == 0, ran.stderr
    checks = ["tests/test_chapters.py", "tests/test_project.py", "tests/test_publish.py"]
    checks += ["--nbval", f"book/{name}.ipynb"]
    checks += ["-k", f"{name} or same_everywhere or same_set or bibliography or glossary or have_the_address"]
    ran = script(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", *checks)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count(f"[{name}]") >= 7 and ran.stdout.count(f"PASSED book/{name}.ipynb::") >= 5
    toc = (tree / "_toc.yml").read_text().split()
    assert toc[toc.index(name) - 3] == CHAPTERS[-1].stem
    assert address.disagreeing(tree) == []

    cells = nbformat.read(tree / "book" / f"{name}.ipynb", as_version=4).cells
    was_run = test_chapters.test_every_exercise_has_a_hidden_solution_that_was_run
    was_run(cells)
    next(cell for cell in cells if cell.id == "ex2-solution").execution_count = None  # not run
    with pytest.raises(AssertionError, match="ex2"):
        was_run(cells)


@pytest.mark.parametrize("name, title, says", [
    ("shadows", "Shadows", "is no name of a chapter; expected one such as 20_shadows"),
    ("04_shadows", "Shadows", "number 04 is taken by 04_the_loupe.ipynb"),
    ("77_shadows", " ", "no title for 77_shadows"),
])
def test_a_chapter_that_cannot_start_is_told_in_one_line_and_leaves_nothing(tree, monkeypatch, name, title, says):
    monkeypatch.setattr(new_chapter, "ROOT", tree)
    monkeypatch.setattr(new_chapter, "BOOK", tree / "book")
    before = contents(tree)
    with pytest.raises(loupe_core.LoupeError, match=says) as caught:
        new_chapter.start(name, title)
    assert "\n" not in str(caught.value) and contents(tree) == before


# --- print ------------------------------------------------------------------------------------------------------------


def test_printed_pages_keep_their_numbers_and_have_a_bookmark_each(site_folder, tmp_path):
    sheets = build_pdf.print_pages(site_folder, ["12_the_gap", "try_it"], tmp_path / "book.pdf")
    printed = PdfReader(tmp_path / "book.pdf")
    text = [" ".join(page.extract_text().split()) for page in printed.pages]
    assert sheets == len(text) and text[0].startswith("12. The gap")
    first = [printed.get_destination_page_number(bookmark) for bookmark in printed.outline]
    assert len(first) == 2 and first[0] == 0 and text[first[1]].startswith("Try it")
    assert "Computed in" in " ".join(text[first[1]:])  # the network has answered before the page is printed
