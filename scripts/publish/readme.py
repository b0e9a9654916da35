"""The README's table of results: some claims of the ledger, with a verdict on each ground and its first number.

    python scripts/publish/readme.py    # writes it; a test fails if the README is not up to date
"""

import re
from pathlib import Path

import ledger

from loupe_core.files.atomic import write_whole

README = Path(__file__).resolve().parents[2] / "README.md"
CLAIMS = ("gain-base-v1", "headroom", "regularizer", "spatial-at-all", "reduces-overfitting", "localize", "explanation",
          "exactly-zero", "perturbations", "plug-and-play")
MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)


def table() -> str:
    claims = {claim["id"]: claim for claim in ledger.ledger()["claims"]}
    lines = ["| claim | drawn birds | real photographs | CUB at full size |", "|---|---|---|---|"]
    for claim in map(claims.get, CLAIMS):
        cells = [claim["claim"]]
        for ground in ("drawn", "photographs", "cub"):
            verdict, numbers = ledger.judged(claim, ground)
            cells.append(f"{verdict}. {ledger.sentence(numbers[:1])}" if verdict and numbers else verdict)
        if claim["ground"] == "arithmetic":
            cells[0] += f" ({ledger.overall(claim)}, by arithmetic)"
        lines.append("| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in cells) + " |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    return MARKS.sub(lambda marks: marks[1] + table() + marks[2], text)


if __name__ == "__main__":
    write_whole(README, filled(README.read_text(encoding="utf-8")))
