"""One page on what a model gets right and wrong, for `loupe evaluate --report`: without a script or other files."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from loupe_core.datasets import CUB200, PhotoFolder
from loupe_core.errors import LoupeError
from loupe_core.files.atomic import replaced, write_whole
from loupe_core.look.words import alt_text
from loupe_core.model import LoupeModel
from loupe_lab.evidence.answers import BATCH, answers, mask_columns, write_table
from loupe_lab.evidence.explain import explain
from loupe_lab.pages.pictures import drawn, sampled

MARK = "<!-- a report of loupe evaluate -->"
MATRIX = 30  # classes; a larger confusion matrix cannot be read, and its largest entries are listed instead
MISTAKES = 12
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #bbb; --shade: 0, 114, 178 }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --paper: #16181c; --line: #555; --shade: 86, 180, 233 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .5rem; border: 1px solid var(--line); text-align: right; overflow-wrap: normal }
th.name { text-align: left; white-space: nowrap }
a { color: inherit }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
figure { margin: 0 } figure div { display: flex; gap: 4px; align-items: flex-start } img { width: 50%; height: auto }
"""


@dataclass
class Tested:
    """A test's answers: labels and predictions `(N,)`, the probability of each prediction, and the lines to print."""

    labels: np.ndarray
    predictions: np.ndarray
    confidence: np.ndarray
    lines: Sequence[str]


def write_report(folder: Path, model: LoupeModel, data: CUB200 | PhotoFolder, lines: Sequence[str]) -> None:
    """Writes `index.html` and `predictions.csv` into `folder`, or leaves it as it was.

    Args:
        folder: new, empty, or an earlier report, whose place it takes.
        model: with one gate, or none: then Grad-CAM stands beside the mistakes.
        data: with the transform of the evaluation, its labels numbered as the model's classes.
        lines: what `loupe evaluate` printed.

    Raises:
        LoupeError: The folder holds something else, or cannot be written to; or a photograph cannot be read.
    """
    check_folder(folder)
    site = model.sites[0] if model.sites else None  # of several gates, the first
    names = model.class_names or [f"class {k}" for k in range(model.num_classes)]
    rows, predictions, confidence = [], [], []
    for first in tqdm(range(0, len(data), BATCH), desc="report", disable=None):
        samples = [data[i] for i in range(first, min(first + BATCH, len(data)))]
        for sample, (probabilities, mask) in zip(samples, answers(model, [s.image for s in samples], site)):
            answer = int(probabilities.argmax())
            predictions.append(answer)
            confidence.append(float(probabilities[answer]))
            rows.append(dict(file=data.names[len(rows)], label=names[sample.label], predicted=names[answer],
                             probability=round(confidence[-1], 4), right=int(sample.label == answer),
                             **mask_columns(mask, sample.geometry)))
    found = Tested(data.labels, np.array(predictions), np.array(confidence), lines)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replaced(folder) as beside:
            beside.mkdir()
            write_table(beside / "predictions.csv", rows)
            write_whole(beside / "index.html", page(model, data, found, names, site))
    except OSError as error:
        raise LoupeError(f"--report {folder}: could not be written ({error.strerror or error}); give a folder that can "
                         "be made and has room") from error


def check_folder(folder: Path) -> None:
    """Raises LoupeError where something else than a report lies in the place of one."""
    page = folder / "index.html"
    there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if there and not (page.is_file() and MARK.encode() in page.read_bytes()[:200]):
        raise LoupeError(f"--report {folder}: found something else there; expected a new or empty folder, or an "
                         "earlier report")


def page(model: LoupeModel, data: CUB200 | PhotoFolder, found: Tested, names: Sequence[str], site: str | None) -> str:
    """The report as HTML."""
    K, right = len(names), found.predictions == found.labels
    counts = np.zeros((K, K), dtype=int)
    np.add.at(counts, (found.labels, found.predictions), 1)
    wrong = sorted(np.flatnonzero(~right), key=lambda i: -found.confidence[i])
    map_name = "mask" if model.sites else "Grad-CAM"
    parts = ["".join(f"<p>{escape(line)}</p>" for line in found.lines),
             f"<h2>What is taken for what</h2>{_confusion(counts, names)}",
             f"<h2>Each class</h2>{_classes(counts, names)}",
             f"<h2>The worst mistakes</h2><p>{len(wrong)} of {len(right)} answers are wrong"
             + (f"; the most confident, each beside its {map_name}:" if wrong else ".") + "</p>",
             '<div class="mistakes">' + "".join(_mistake(model, data, found, names, i, site) for i in wrong[:MISTAKES])
             + "</div>",
             '<p>Every answer, and the mask in numbers: <a href="predictions.csv">predictions.csv</a>. Written on '
             f"{date.today().isoformat()}.</p>"]
    title = escape(f"{data.root.resolve().name}: {int(right.sum())} of {len(right)} right")
    return (f'<!doctype html>\n{MARK}\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{title}</title><style>{STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n" + "\n".join(parts) + "\n</body></html>\n")


def _confusion(counts: np.ndarray, names: Sequence[str]) -> str:
    used = np.flatnonzero(counts.sum(0) + counts.sum(1))
    if len(used) > MATRIX:
        off = counts * (1 - np.eye(len(counts), dtype=int))
        pairs = [divmod(int(k), len(counts)) for k in np.argsort(-off, axis=None, kind="stable")[:20]]
        rows = "".join(f'<tr><th class="name">{escape(names[a])}</th><th class="name">{escape(names[b])}</th>'
                       f"<td>{off[a, b]}</td></tr>" for a, b in pairs if off[a, b])
        return (f"<p>{len(used)} classes are too many for a matrix; these are its largest entries.</p>"
                '<div class="wide"><table><tr><th class="name">is</th><th class="name">taken for</th><th>times</th>'
                f"</tr>{rows}</table></div>")
    head = "".join(f'<th title="{escape(names[b])}">{b + 1}</th>' for b in used)
    rows = []
    for a in used:
        total = max(counts[a].sum(), 1)
        cells = "".join(f'<td style="background: rgba(var(--shade), {0.6 * counts[a, b] / total:.2f})">'
                        f"{counts[a, b] or ''}</td>" for b in used)
        rows.append(f'<tr><th class="name">{a + 1} {escape(names[a])}</th>{cells}</tr>')
    return ("<p>Rows: what it is. Columns: what it was taken for, by the numbers of the rows.</p>"
            f'<div class="wide"><table><tr><th class="name">class</th>{head}</tr>{"".join(rows)}</table></div>')


def _classes(counts: np.ndarray, names: Sequence[str]) -> str:
    rows = []
    for k in np.flatnonzero(counts.sum(0) + counts.sum(1)):
        n, said, hit = counts[k].sum(), counts[:, k].sum(), counts[k, k]
        recall, precision = (f"{hit / total:.2f}" if total else "-" for total in (n, said))
        rows.append(f'<tr><th class="name">{k + 1} {escape(names[k])}</th><td>{n}</td><td>{recall}</td>'
                    f"<td>{said}</td><td>{precision}</td></tr>")
    head = "".join(f"<th>{text}</th>" for text in ("photographs", "of these right (recall)", "named",
                                                   "of these right (precision)"))
    return f'<div class="wide"><table><tr><th class="name">class</th>{head}</tr>{"".join(rows)}</table></div>'


def _mistake(model: LoupeModel, data: CUB200 | PhotoFolder, found: Tested, names: Sequence[str], i: int,
             site: str | None) -> str:
    photograph, sample = data.image(i), data[i]
    method, options = ("mask", dict(site=site)) if site else ("grad_cam", {})
    map_ = explain(model, sample.image[None], method, int(found.predictions[i]), **options)[0]
    heatmap = sampled(map_, sample.geometry)
    limits = (0, 1) if site else (float(np.nanmin(heatmap)), float(np.nanmax(heatmap)))
    label, answer = (names[k] for k in (found.labels[i], found.predictions[i]))
    words = alt_text(heatmap, name="mask" if site else "Grad-CAM", size=sample.geometry.original_size)
    pictures = {label: photograph, words: drawn(photograph, map_, sample.geometry, limits)}
    shown = "".join(f'<img src="{_data_uri(picture)}" alt="{escape(alt)}">' for alt, picture in pictures.items())
    return (f"<figure><div>{shown}</div><figcaption>{escape(label)}, taken for {escape(answer)} "
            f"({found.confidence[i]:.0%}): {escape(data.names[i])}</figcaption></figure>")


def _data_uri(image: Image.Image) -> str:
    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((320, 320))
    small.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
