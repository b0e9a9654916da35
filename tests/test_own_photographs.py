"""The page "Your own photographs", run as it is written, on a folder made for it.

The hub cannot be asked in a test: the one line that names the backbone takes the package's own instead.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).resolve().parents[1] / "book" / "your_photographs.md"
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_page_runs_as_it_is_written(tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in (("robin", (200, 60, 40)), ("wren", (90, 70, 50))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(20):
            picture = rng.integers(60, 180, (90, 120, 3)).astype(np.uint8)
            y, x = rng.integers(0, (50, 80))
            picture[y:y + 40, x:x + 40] = colour
            file = "one" if (name, k) == ("robin", 0) else f"{k}"
            Image.fromarray(picture).save(tmp_path / "photos" / name / f"{file}.jpg")
    asked = "BACKBONE=tf_efficientnet_lite0.in1k"
    assert sum(block.count(asked) for _, block in BLOCKS) == 1
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = []
    for kind, block in BLOCKS:
        command = ["sh", "-e", "-c", block.replace(asked, "BACKBONE=swin_micro")] if kind == "sh" else [
            sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(PATH=path))
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout)
    train, test, look, python, audit, share = printed
    assert train.count("of 2 classes") == 2 and test.count("test accuracy") == 2
    assert "robin" in look and (tmp_path / "robin.png").is_file()
    assert len(list((tmp_path / "heatmaps").glob("*.png"))) == 2 * 20 and "mean of its mask" in python
    assert "mean" in audit and share == "2 classes, gate at stage2\n"
    assert "test accuracy" in (tmp_path / "runs" / "own" / "best" / "README.md").read_text()
