"""The page of the ledger: counts on top, a row for each claim that unfolds, and a filter (book/_static/ledger.js).

The rows are HTML, as Markdown has no folds; without the script all of them are shown and can be unfolded.
"""

from __future__ import annotations

from collections import Counter
from html import escape

import ledger
from ledger import GROUNDS, VERDICTS

SHORT = {"arithmetic": "arithmetic", "drawn": "drawn", "photographs": "photos", "cub": "CUB"}
COLUMNS = [ground for ground in GROUNDS if ground != "arithmetic"]


def page() -> str:
    """Counts by ground, the rows topic by topic, and the commands."""
    book, rows = ledger.ledger(), ledger.table.recorded()
    claims = book["claims"]
    lines = [overview(claims), "", controls(len(claims)), ""]
    for topic in dict.fromkeys(claim["topic"] for claim in claims):
        lines += [f"## {topic}", "", '<div class="ledger-topic">',
                  *(row(claim, rows) for claim in claims if claim["topic"] == topic), "</div>", ""]
    lines += ["(commands)=", "## On a GPU, with CUB", ""]
    cards = sorted({row["card"] for row in rows})
    run = f"{len(rows)} runs on {', '.join(cards)} are recorded." if rows else "Not run here."
    lines += [f"{run} Each command goes on where it was stopped, and brings its rows into a table; `loupe reproduce "
              "--rehearse` tries all of them in small within a minute. See [Scaling up](scaling_up).", ""]
    for name, command in book["commands"].items():
        lines += [f"**{name}**: {command['for']}", "", "```sh", *command["run"].strip().splitlines(), "```", ""]
    return "\n".join(lines) + "\n"


def grounds_of(claim: dict) -> list[str]:
    """The grounds on which a claim has a verdict."""
    return ["arithmetic"] if claim["ground"] == "arithmetic" else COLUMNS


def overview(claims: list[dict]) -> str:
    """How many claims have which verdict, a row for each ground."""
    body = []
    for ground, name in GROUNDS.items():
        count = Counter(ledger.judged(claim, ground).verdict for claim in claims if ground in grounds_of(claim))
        cells = "".join(f"<td>{count[verdict] or ''}</td>" for verdict in VERDICTS)
        body.append(f'<tr><th scope="row">{name}</th>{cells}<td>{count.total()}</td></tr>')
    heads = "".join(f'<th scope="col">{chip(verdict)}</th>' for verdict in VERDICTS)
    return (f'<table class="ledger-overview"><caption>{len(claims)} claims: how many have which verdict on which '
            'ground. A claim of arithmetic is judged by arithmetic alone, any other on three grounds.</caption>'
            f'<thead><tr><th scope="col">ground</th>{heads}<th scope="col">claims</th></tr></thead>'
            f'<tbody>{"".join(body)}</tbody></table>')


def controls(total: int) -> str:
    """The filter, which the script shows."""
    def options(names: list[str] | dict[str, str], every: str) -> str:
        pairs = names.items() if isinstance(names, dict) else ((name, name) for name in names)
        return f'<option value="">{every}</option>' + "".join(f'<option value="{v}">{n}</option>' for v, n in pairs)

    return ('<form class="ledger-filter" hidden>'
            f'<label>Verdict <select name="verdict">{options(list(VERDICTS), "any")}</select></label>'
            f'<label>on <select name="ground">{options(GROUNDS, "any ground")}</select></label>'
            f'<output aria-live="polite">{total} of {total} claims</output></form>')


def chip(verdict: str, ground: str = "", own: bool = False) -> str:
    """A verdict, as a word and a colour."""
    of = f"<small>{SHORT[ground]}</small> " if ground else ""
    kind = verdict.replace(" ", "-") + (" own" if own else "")
    return f'<span class="verdict {kind}">{of}{verdict}</span>'


def row(claim: dict, rows: list[dict]) -> str:
    """A claim with its verdicts; unfolded, with its source, what is said to it, and the numbers."""
    found = {ground: ledger.judged(claim, ground, rows) for ground in GROUNDS}
    judged = grounds_of(claim)
    chips = "".join(chip(found[ground].verdict, ground, ground == claim["ground"]) for ground in judged)
    data = "".join(f' data-{ground}="{found[ground].verdict}"' for ground in judged)
    parts = [f'<p>{text(claim.get("reads", ""))} <span class="ledger-source">Source: {text(claim["source"])}. '
             f"Judged {by(claim['ground'])}.</span></p>"]
    for ground, name in GROUNDS.items():
        if numbers := found[ground].numbers:
            verdict = f": {found[ground].verdict}" if ground in judged else ""
            items = "".join(f"<li>{text(of)}</li>" for of in ledger.labelled(numbers))
            parts.append(f"<p><b>{name[:1].upper()}{name[1:]}{verdict}</b></p><ul>{items}</ul>")
    links = ", ".join(f'<a href="{name}.html">{int(name.split("_")[0])}</a>' for name in ledger.chapters(claim))
    links = f"Chapter {links}."
    if "gpu" in claim:
        links += f' On a GPU: <a href="#commands">{claim["gpu"]}</a>.'
    return (f'<details class="claim" id="claim-{claim["id"]}"{data}><summary><span>{text(claim["claim"])}</span>'
            f'<span class="verdicts">{chips}</span></summary><div>{"".join(parts)}<p>{links}</p></div></details>')


def by(ground: str) -> str:
    return GROUNDS[ground] if ground == "arithmetic" else f"on {GROUNDS[ground]}"


def text(words: str) -> str:
    return escape(" ".join(words.split()), quote=False)
