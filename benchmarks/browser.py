"""A prediction in the page "Try it" against native ONNX Runtime, one thread each, on this machine.

    python -m benchmarks.browser [RUNS]

Builds what the page needs into a temporary folder, opens its modules in Chromium, and times the same picture in turn:
in the page and natively (both from pixels to mask; natively with Pillow), and the native network alone. Prints one row
of a Markdown table with medians in ms.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "publish"))

import web_assets  # noqa: E402
from build_lab import build_lab  # noqa: E402
from chromium import opened  # noqa: E402

from benchmarks.common import processor  # noqa: E402
from loupe_core import LoupeModel, transforms_for  # noqa: E402
from loupe_core.model import FIELDGUIDE  # noqa: E402

PREPARE = """async picture => {
    const base = new URL("/_static/", location.href);
    const {loadNetwork} = await import(new URL("lab_network.js", base));
    const data = await (await fetch(new URL("lab/lab.json", base))).json();
    window.predict = await loadNetwork(base, data.model);
    const image = new Image();
    image.src = new URL(`lab/${picture}`, base);
    await image.decode();
    const pen = new OffscreenCanvas(image.width, image.height).getContext("2d");
    pen.drawImage(image, 0, 0);
    window.pixels = pen.getImageData(0, 0, image.width, image.height);
}"""


def measure(folder: Path, runs: int) -> dict[str, float]:
    """Medians in ms: page, native (both from pixels to mask), native_network."""
    picture = json.loads((folder / "_static/lab/lab.json").read_text(encoding="utf-8"))["species"][1]["picture"]
    image = Image.open(folder / "_static/lab" / picture).convert("RGB")
    transform = transforms_for(LoupeModel.from_pretrained(FIELDGUIDE).data_config, train=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "_static/lab/model.onnx", options)
    found = {"page": [], "native": [], "native_network": []}
    with opened(folder) as (browser, address):
        page = browser.new_page()
        page.goto(address)
        page.evaluate(PREPARE, picture)
        for run in range(runs + 5):  # the first five warm up
            milliseconds = {"page": page.evaluate("async () => (await predict(pixels)).milliseconds")}
            began = time.perf_counter()
            x = transform(image)[0][None].numpy()
            middle = time.perf_counter()
            session.run(None, {"image": x})
            end = time.perf_counter()
            milliseconds |= {"native": 1e3 * (end - began), "native_network": 1e3 * (end - middle)}
            for name, value in milliseconds.items() if run >= 5 else ():
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def main(runs: int = 50) -> None:
    if failure := web_assets.install():
        sys.exit(f"benchmarks.browser: {failure}, so ONNX Runtime for the page is not here: apt-get install npm")
    with tempfile.TemporaryDirectory() as name:
        static = Path(name) / "_static"
        static.mkdir()
        build_lab(static / "lab")
        web_assets.publish(static)
        for script in (ROOT / "book" / "_static").glob("lab*.js"):
            shutil.copy(script, static)
        (Path(name) / "index.html").write_text('<!doctype html><link rel="icon" href="data:,">', encoding="utf-8")
        ms = measure(Path(name), runs)
    ratio = ms["page"] / ms["native"]
    row = [f"{ms[name]:.1f}" for name in ("page", "native", "native_network")]
    print("| processor | runs | page, ms | native, ms | its network alone, ms | page / native |")
    print("|---|---:|---:|---:|---:|---:|")
    print(f"| {' | '.join([processor(), str(runs), *row, f'{ratio:.1f}'])} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
