"""The page "Your own photographs", run as it is written, on a folder made for it: with blanks and umlauts in names, and
with what systems leave in folders.

To be quick, the training takes the package's smallest backbone by default.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loupe_core.cli import main

PAGE = Path(__file__).resolve().parents[1] / "book" / "your_photographs.md"
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_page_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for name, colour in (("robin", (200, 60, 40)), ("wren", (90, 70, 50)), ("Rotkehlchen süß", (60, 90, 200))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(20):
            picture = rng.integers(60, 180, (90, 120, 3)).astype(np.uint8)
            y, x = rng.integers(0, (50, 80))
            picture[y:y + 40, x:x + 40] = colour
            file = "one" if (name, k) == ("robin", 0) else f"ä {k}"
            Image.fromarray(picture).save(tmp_path / "photos" / name / f"{file}.jpg")
        for left in (".DS_Store", "._one.jpg", "Thumbs.db"):
            (tmp_path / "photos" / name / left).write_bytes(b"\0")
    monkeypatch.setattr("loupe_core.start.options.default_backbone", lambda drawn: "swin_micro")
    monkeypatch.chdir(tmp_path)
    printed = []
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, PAGE.name, "exec"), {})
        elif "loupe explain" in block:  # the command as pip installs it
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(["sh", "-e", "-c", block], capture_output=True, text=True,
                                  env=os.environ | dict(PATH=path))
            assert done.returncode == 0, done.stderr[-2000:]
            print(done.stdout)
        else:  # the shell says which words each command gets; a process of its own for each would import torch again
            words = 'loupe() { printf "%s\\0" "$@"; echo; }\n' + block
            calls = subprocess.run(["sh", "-e", "-c", words], capture_output=True, text=True, check=True).stdout
            for call in calls.splitlines():
                assert main(call.split("\0")[:-1]) == 0
        printed.append(capsys.readouterr().out)
    train, test, look, folder, table, python, twice, onnx, audit, share = printed
    assert train.count("photographs of 3 classes (Rotkehlchen süß, robin, wren)") == 2
    assert test.count("test accuracy") == 2 and (tmp_path / "report" / "index.html").is_file()
    assert table.startswith("20 photographs: predictions.csv")
    assert "robin" in look and (tmp_path / "robin.png").is_file()
    assert folder.count("overlay: ") == len(list((tmp_path / "grad_cam").glob("*.jpg.png"))) == 20
    assert len(list((tmp_path / "heatmaps").glob("*.png"))) == 2 * 20 and "mean of its mask" in python
    assert "with a second look by mask: test accuracy" in twice and (tmp_path / "closer.png").is_file()
    assert re.search(r"first look: .*; second, \d+ x \d+ px: .*; both: ", onnx)
    assert "mean" in audit and share == "3 classes, gate at stage2\n"
    card = (tmp_path / "runs" / "own" / "best" / "README.md").read_text()
    assert "\n- test accuracy" in card and "\n- with a second look by mask: test accuracy" in card
