"""The tables of the page "Scaling up", made from data/results/bench_*.json, so that no measured number is typed there.

    python scripts/publish/bench_page.py    # print them
"""

import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "data" / "results"

CARD = "H100"  # its network, as in data sheets
LINK = {8: (450e9, "NVLink, one node"), 64: (50e9, "400 Gbit/s per card, eight nodes")}  # bytes per second and card
BATCH, IMAGES = 16, 5394  # images per card and step, as in the paper; CUB's training images without a tenth


def read(name: str) -> dict:
    file = RESULTS / f"bench_{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A markdown table; `columns`: key -> heading."""
    if not rows:
        return "*not measured yet: `make bench`*\n"
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_text(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


SPREAD = dict(ratio="ratio", span="single rounds")


def spread(row: dict, least: str = "least", largest: str = "largest") -> dict:
    return row | dict(span=f"{_text(row[least])} to {_text(row[largest])}")


def gate() -> str:
    rows = [row | {k: f"{100 * (row[k] - 1):+.3f} %" for k in ("ratio", "least", "largest")}
            for row in read("gate").get("rows", [])]
    columns = dict(what="Swin-Base", bare="bare", gated="with the gate", ratio="difference", span="single rounds")
    return table(list(map(spread, rows)), columns)


def training() -> str:
    found = read("training")
    names = {"trainer": "this `Trainer`", "plain": "plain loop, fp32", "lightning": "Lightning",
             "hugging_face": "Hugging Face's Trainer"}
    rows = [spread(row) | dict(who=names[row["who"]]) for row in found.get("rows", [])]
    columns = {"case": "model", "who": "trained by", "images/s": "images/s",
               "trainer's speed": "`Trainer` is faster by", "span": "single rounds", "peak MiB": "peak MiB"}
    shares = [{k: v if k == "case" else f"{v:.1%}" for k, v in row.items()} for row in found.get("shares", [])]
    parts = ("case", "data", "forward", "backward", "optimizer", "rest")
    return table(rows, columns) + "\nWhere the `Trainer`'s time goes:\n\n" + table(shares, {k: k for k in parts})


def loader() -> str:
    found = read("loader")
    rows = [spread(row, "warm_least", "warm_largest") for row in found.get("speed", [])]
    waits = [row | dict(waited=f"{row['waited']:.0%}") for row in found.get("wait", [])]
    columns = dict(augment="augmentation", size="pixels", workers="workers", theirs_images_s="theirs, img/s",
                   cold_images_s="cold", warm_images_s="warm", warm_ratio="ratio, warm", span="single rounds")
    return (table(rows, columns)
            + "\nThe share of its time that a card would wait for two workers, on this machine's cores:\n\n"
            + table(waits, dict(asked_images_s="a card's images/s", images="images travel as", workers="workers",
                                waited="waits")))


def explanations() -> str:
    columns = dict(method="method", passes="passes", ms="ms per image") | SPREAD
    return table(list(map(spread, read("explanations").get("rows", []))), columns)


def growth() -> str:
    found = read("growth")
    return "\n".join(table(found.get(part, []), {k: k for k in found[part][0]} if found.get(part) else {})
                     for part in ("images", "pixels", "processes"))


def launches() -> str:
    found = read("launches")
    columns = dict(model="model", precision="precision", step="", forward="forward", backward="backward",
                   optimizer="optimizer", bookkeeping="the row's sums", all="launches", waits="waits",
                   gflops="Gflop", megabytes="MB moved")
    return table([row | dict(bookkeeping=f"{row['bookkeeping']:.0f}", model=row["model"].split("_patch")[0])
                  for row in found.get("steps", [])], columns)


def hours() -> str:
    found = read("launches")
    if not found:
        return table([], {})
    given = {name: value * (1e6 if name in ("launch", "view") else 100) for name, value in found["assumptions"].items()}
    columns = dict(card="card", model="model", arm="arm", precision="precision", host_ms="launching, ms",
                   device_ms="computing, ms", images_s="images/s", hours="hours a run")
    rows = [row | {k: f"{row[k]:.0f}" for k in ("host_ms", "device_ms", "images_s")}
            | dict(hours=f"{row['hours']:.2f}", model=row["model"].split("_patch")[0]) for row in found["hours"]]
    sums = "; ".join(f"{row['card']}: **{row['hours']:.1f} hours**" for row in found["sums"])
    assumed = ("{launch:.0f} microseconds of the processor for an operation that launches a kernel and {view:.0f} "
               "for one that does not; {utilisation:.0f} % of the peak in 16 bit, {plain:.0f} % in fp32 without "
               "tensor cores; {reached:.0f} % of the bandwidth; {wait:.0f} % of the time for the wait for data")
    return (f"All {found['sums'][0]['runs']} trainings, with all their epochs: {sums}.\n\n{table(rows, columns)}\n"
            f"An estimate, **not run here**. Assumed: {assumed.format(**given)}. Peaks and bandwidths: "
            f"{'; '.join(found['sources'].values())}.\n")


def cards() -> str:
    """Swin-Base on many cards, calculated: time to exchange the gradients against time for a step."""
    exact = {row["what"]: row["gated"] for row in read("gate").get("rows", [])}
    found = [row for row in read("launches").get("hours", []) if (row["card"], row["arm"]) == (CARD, "loupe")]
    if not exact or not found:
        return table([], {})
    size, step = 4 * exact["parameters"], max(found[0]["host_ms"], found[0]["device_ms"]) / 1000
    rows = []
    for cards, (speed, what) in LINK.items():
        exchange = 2 * (cards - 1) / cards * size / speed  # ring all-reduce: each card sends 2 (n - 1) / n of the bytes
        rows.append({"cards": f"{cards} ({what})", "step, ms": 1000 * step, "exchange, ms": 1000 * exchange,
                     "exchange / step": exchange / step, "images per step": BATCH * cards,
                     "steps per epoch": -(-IMAGES // (BATCH * cards))})
    return (f"Gradients: {size / 1e6:,.0f} MB in fp32; a step on one {CARD}, estimated as above.\n\n"
            + table(rows, {k: k for k in rows[0]}))


def machine() -> str:
    found = read("gate").get("provenance")
    return f"{found['processor']}, {found['threads']} threads, torch {found['versions']['torch']}\n" if found else "-\n"


TABLES = dict(machine=machine, gate=gate, launches=launches, hours=hours, training=training, loader=loader,
              explanations=explanations, growth=growth, cards=cards)


def fill(text: str) -> str:
    """The page with a table between every pair of marks `<!-- bench: NAME -->` and `<!-- /bench -->`."""
    return re.sub(r"(<!-- bench: (\w+) -->\n).*?(<!-- /bench -->)", lambda m: m[1] + TABLES[m[2]]() + m[3], text,
                  flags=re.DOTALL)


if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}")
