"""The address of this repository: _config.yml holds it, and this script writes it into every file that needs it.

    python scripts/publish/address.py https://github.com/OWNER/NAME
    python scripts/publish/address.py    # in a GitHub workflow: its repository's address; otherwise that in _config.yml

The pages' buttons, the first cells, the citation and the badges have the address. This script replaces the text between
the marks `address` and `/address`. Until an address is given, the pages have no button that would need one.
"""

import os
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
BRANCH = "main"
COLAB = "https://colab.research.google.com"

GITHUB = re.compile(r"(https://github\.com/([A-Za-z0-9-]+)/([\w.-]+?))(?:\.git)?/?")
BLOCK = re.compile(r"^( *(?:#|<!--) address\b[^\n]*\n)(.*?)(^ *(?:#|<!--) /address)", re.MULTILINE | re.DOTALL)
# In a notebook's JSON, of which only the address changes.
FIRST_CELL = re.compile(r'(os\.environ\.get\(\\"LOUPE_ADDRESS\\")(?:, \\"[^"\\]*\\")?\)')

UNSET = "This book's repository has no address yet: `make address URL=https://github.com/OWNER/NAME` gives it one."


class AddressError(Exception):
    """The address cannot be written; the message is one line."""


def read(root: Path = ROOT) -> str:
    """The address in _config.yml, without a slash at the end; "" if there is none."""
    return (yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")).get("repository") or {}).get("url", "")


def published(url: str) -> str:
    """The address of the book of this repository on GitHub Pages."""
    _, owner, name = GITHUB.fullmatch(url).groups()
    site = f"https://{owner.lower()}.github.io/"
    return site if name.lower() == f"{owner.lower()}.github.io" else f"{site}{name}/"


def blocks(root: Path, url: str) -> dict[str, list[str]]:
    """file -> the texts between its pairs of marks, in order."""
    if not url:
        return {"_config.yml": ["", ""], "CITATION.cff": [""], "README.md": [""]}
    chapters = sorted(path.stem for path in (root / "book").glob("[0-9]*.ipynb"))
    on_colab = {name: f"{COLAB}/github/{url.removeprefix('https://github.com/')}/blob/{BRANCH}/book/{name}.ipynb"
                for name in chapters}
    badges = [f"[![{name}]({url}/actions/workflows/{name}.yml/badge.svg)]({url}/actions/workflows/{name}.yml)"
              for name in ("test", "book")]
    badges.append(f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({on_colab[chapters[0]]})")
    paper = on_colab[chapters[0]].replace(f"book/{chapters[0]}", "scripts/colab/reproduce")
    links = " ".join(f"[{int(name[:2])}]({address})" for name, address in on_colab.items())
    return {
        "_config.yml": [
            f"repository:\n  url: {url}\n  path_to_book: book\n  branch: {BRANCH}\n"
            f"launch_buttons:\n  colab_url: {COLAB}\n  binderhub_url: https://mybinder.org\n"
            "  notebook_interface: jupyterlab\n",
            "  use_repository_button: true\n  use_issues_button: true\n  use_edit_page_button: true\n",
        ],
        "CITATION.cff": [f"repository-code: {url}\nurl: {published(url)}\n"],
        "README.md": [f"{' '.join(badges)}\n\nRead the book: <{published(url)}>. Its chapters on Colab: {links}; "
                      f"[the paper's experiment]({paper}).\n"],
    }


def texts(root: Path, url: str) -> dict[Path, str]:
    """file -> its whole text with this address.

    Raises:
        AddressError: a file does not have the expected marks, or a chapter not the expected first cell.
    """
    found = {}
    for name, parts in blocks(root, url).items():
        between = BLOCK.split((root / name).read_text(encoding="utf-8"))  # text, mark, text between, mark, text, ...
        if len(between) != 4 * len(parts) + 1:
            raise AddressError(f"{name} has {len(between) // 4} pairs of the marks `address` and `/address`; expected "
                               f"{len(parts)}")
        between[2::4] = parts
        found[root / name] = "".join(between)
    default = f', \\\\"{url}\\\\"' if url else ""
    for path in [*sorted((root / "book").glob("[0-9]*.ipynb")), *(root / "scripts" / "colab").glob("*.ipynb")]:
        found[path], count = FIRST_CELL.subn(rf"\1{default})", path.read_text(encoding="utf-8"))
        if count != 1:
            raise AddressError(f"{path.name} reads LOUPE_ADDRESS {count} times; expected the first cell of the others")
    return found


def disagreeing(root: Path = ROOT) -> list[str]:
    """The files whose address differs from that in _config.yml."""
    wanted = texts(root, read(root))
    return [str(path.relative_to(root)) for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]


def write(url: str, root: Path = ROOT) -> list[str]:
    """Writes the address into every file that needs it; returns the names of those that changed.

    Raises:
        AddressError: it is not the address of a repository on GitHub, or a file has no place for it.
    """
    if url and not (match := GITHUB.fullmatch(url)):
        raise AddressError(f"{url!r} is no address of a repository; expected https://github.com/OWNER/NAME")
    changed = []
    for path, text in texts(root, url and match[1]).items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(str(path.relative_to(root)))
    return changed


def main(arguments: list[str]) -> None:
    workflow = [os.environ.get(f"GITHUB_{name}", "") for name in ("SERVER_URL", "REPOSITORY")]
    own = "/".join(workflow) if all(workflow) else ""
    url = arguments[0] if arguments else own or read()
    try:
        changed = write(url)
    except AddressError as error:
        sys.exit(f"address: {error}")
    print(f"{read() or UNSET}  ({len(changed)} files changed)")


if __name__ == "__main__":
    main(sys.argv[1:])
