"""The README's table of results: some claims of the ledger, with their verdicts and first numbers.

    python scripts/publish/readme.py    # writes it; a test fails if the README is not up to date
"""

import re
from pathlib import Path

import ledger

from loupe_core.files.atomic import write_whole

README = Path(__file__).resolve().parents[2] / "README.md"
CLAIMS = ("gain-base-v1", "lambda-five", "finds-parts", "explanation", "exactly-zero", "feedback-loop", "perturbations",
          "plug-and-play")
MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)


def table() -> str:
    claims = {claim["id"]: claim for claim in ledger.ledger()["claims"]}
    lines = ["| the paper or its summary says | here | what shows it, on drawn birds with a small Swin |"]
    lines.append("|---|---|---|")
    for claim in map(claims.get, CLAIMS):
        of, number = ledger.evidence(claim)[0]
        cells = (claim["claim"], claim["verdict"], f"{of}: {number.text}" if of else number.text)
        lines.append("| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in cells) + " |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    return MARKS.sub(lambda marks: marks[1] + table() + marks[2], text)


if __name__ == "__main__":
    write_whole(README, filled(README.read_text(encoding="utf-8")))
