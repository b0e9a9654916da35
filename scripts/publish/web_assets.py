"""The npm packages that the pages use, copied into the pages' `_static/npm`. Without npm the pages use a CDN.

`package.json` pins their versions, `package-lock.json` has their checksums; the packages are not in git.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
CDN = "https://cdn.jsdelivr.net/npm/{name}@{version}/{folder}/"

# package -> its folder, and the parts of it that a page or a menu of MathJax can load
PACKAGES = {
    "mathjax": ("es5", ["tex-mml-chtml.js", "a11y", "input/mml", "input/tex", "output", "sre", "ui"]),
    "onnxruntime-web": ("dist", ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]),
}


def install() -> str:
    """Installs what package-lock.json lists. Returns "", or one line that says why it could not."""
    lock, installed = ROOT / "package-lock.json", ROOT / "node_modules" / ".package-lock.json"
    if installed.is_file() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return ""
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    with FileLock(ROOT / ".npm.lock"):  # tests run in two processes
        if installed.is_file() and installed.stat().st_mtime >= lock.stat().st_mtime:
            return ""
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if "npm error" in line] or ["it says nothing"]
        return f"npm ci failed ({said[0].strip()})"
    return ""


def publish(static: Path) -> dict[str, str]:
    """Copies the packages into `static`/npm; returns package -> a folder relative to `static`, or a URL.

    A page that starts ONNX Runtime reads its address from npm/where.json.
    """
    versions = json.loads((ROOT / "package.json").read_text(encoding="utf-8"))["dependencies"]
    failure = install()
    if failure:
        print(f"{failure}: the pages will load {' and '.join(PACKAGES)} from cdn.jsdelivr.net", flush=True)
    where = {}
    for name, (folder, parts) in PACKAGES.items():
        if failure:
            where[name] = CDN.format(name=name, version=versions[name], folder=folder)
            continue
        where[name] = f"npm/{name}/"
        for part in parts:
            source, target = ROOT / "node_modules" / name / folder / part, static / where[name] / part
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    (static / "npm").mkdir(parents=True, exist_ok=True)
    text = json.dumps({"onnxruntime": where["onnxruntime-web"]}) + "\n"
    (static / "npm" / "where.json").write_text(text, encoding="utf-8")
    return where
