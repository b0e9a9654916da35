"""Fixtures: sets of tiny photographs, and the browser's."""

import os
from pathlib import Path

import pytest
from browser import browser, chromium, new_page, open_html, site, site_folder  # noqa: F401  (fixtures)
from emulated import emulated_card  # noqa: F401  (a fixture)
from helpers import write_cub

# Those that take longest, before all others: one that was begun last would leave a processor without work at the end.
FIRST = """test_site test_results test_full_profile test_lab test_kill test_benchmarks test_export test_publish
           test_trainer""".split()

os.environ["LOUPE_STRICT"] = "1"  # book/conftest.py says why; chapters are also run by tests of this folder


def pytest_collection_modifyitems(items) -> None:
    """Chapters, then FIRST, then the rest as it comes."""
    def turn(item) -> int:
        name = item.path.stem
        return 0 if item.path.suffix == ".ipynb" else 1 + FIRST.index(name) if name in FIRST else 1 + len(FIRST)

    items.sort(key=turn)


@pytest.fixture
def make_cub(tmp_path):
    """make_cub(**settings) -> the folder of a fresh tiny set in the CUB layout, see `write_cub`."""

    def make(**settings) -> Path:
        return write_cub(tmp_path / "CUB_200_2011", **settings)

    return make


@pytest.fixture
def real_cub() -> Path:
    """The folder of genuine CUB photographs, where there is one."""
    root = os.environ.get("LOUPE_CUB_ROOT")
    if not root:
        pytest.skip("set LOUPE_CUB_ROOT to a folder in the CUB-200-2011 layout")
    return Path(root)
