"""How the time of a training grows: with images, with pixels, with processes.

    python -m benchmarks.growth [--quick]

1. Seconds per image in an epoch of swin_micro on 1,000, 4,000 and 12,000 drawn birds, and seconds to open such a set.
2. Seconds per image in a training step of Swin-Tiny at 224, 384 and 448 pixels.
3. The same epochs by one process and by two (gloo, torchrun): their losses, and their seconds.

Writes data/results/bench_growth.json.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import timm
import torch

from benchmarks.common import ROOT, command, interleaved
from benchmarks.gate import stepper
from loupe_core import CUB200, LoupeModel, Recipe, Trainer, transforms_for
from loupe_lab.birds.fieldguide import fieldguide_set, species_of, write_fieldguide


def repeated(root: Path, folder: Path, times: int) -> Path:
    """Makes a data set in `folder` with every image of the one in `root` `times` times; the files are hard links."""
    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt"):
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        out, count = [], len(lines)
        for k in range(times):
            for line in lines:
                number, rest = line.split(maxsplit=1)
                if name == "images.txt":
                    stem, kind = os.path.splitext(rest)
                    copy = folder / "images" / f"{stem}_{k}{kind}"
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    os.link(root / "images" / rest, copy)
                    rest = f"{stem}_{k}{kind}"
                out.append(f"{int(number) + k * count} {rest}")
        (folder / name).write_text("\n".join(out) + "\n", encoding="utf-8")
    shutil.copy(root / "classes.txt", folder)
    return folder


def by_images(folder: Path, sizes: tuple[int, ...]) -> list[dict]:
    base = write_fieldguide(folder / "base", species_of(5), train=50, test=1, size=112, workers=os.cpu_count())
    rows = []
    for size in sizes:
        root = repeated(base, folder / str(size), -(-size // 1000))
        began = time.perf_counter()
        birds = CUB200(root, "train", val_fraction=0, cache=True)
        opened = time.perf_counter() - began
        torch.manual_seed(0)
        model = LoupeModel("swin_micro", num_classes=20)
        recipe = Recipe.small(epochs=1)
        birds.transform = transforms_for(model.data_config, **recipe.train_transform_options())
        row = Trainer(model, recipe, progress=False).fit(birds)[0]
        rows.append({"images": len(birds), "opening, s": opened, "epoch, s": row["seconds"],
                     "ms an image": 1000 * row["seconds"] / len(birds)})
    return rows


def by_pixels(sides: tuple[int, ...], rounds: int) -> list[dict]:
    rows = []
    for side in sides:
        torch.manual_seed(0)
        backbone = timm.create_model("swin_tiny_patch4_window7_224", img_size=side, num_classes=200)
        step, _ = stepper(LoupeModel(backbone, num_classes=200), 4, side)
        step()
        ms = 1000 * statistics.median(interleaved({"step": step}, rounds)["step"]) / 4
        rows.append({"pixels": side, "ms an image": ms, "ms a 1,000 pixels": 1000 * ms / side**2})
    return rows


def train(root: Path, out: Path, batch: int, threads: int) -> None:
    """What each process of part 3 runs: two epochs without any randomness but the order of the images."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    backbone = timm.create_model("swin_micro", num_classes=20, drop_path_rate=0.0)
    model = LoupeModel(backbone, num_classes=20)
    birds = CUB200(root, "train", val_fraction=0, cache=True, transform=transforms_for(model.data_config, train=False))
    recipe = Recipe.small(epochs=2, batch_size=batch, augment="none", precision="no", optimizer="adamw", lr=1e-4)
    trainer = Trainer(model, recipe, progress=False)
    rows = trainer.fit(birds)
    if trainer.accelerator.is_main_process:
        out.write_text(json.dumps(rows), encoding="utf-8")


def by_processes(folder: Path, images: int, counts: tuple[int, ...] = (1, 2)) -> list[dict]:
    root, rows = fieldguide_set(folder, species_of(5), train=images // 20, test=1, size=112), []
    for processes in counts:
        out = folder / f"{processes}.json"
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port",
               str(29500 + os.getpid() % 1000), "-m", "benchmarks.growth", "--worker", str(root), str(out),
               str(32 // processes), str(max(torch.get_num_threads() // processes, 1))]
        subprocess.run(run, cwd=ROOT, check=True, capture_output=True, env=os.environ | dict(ACCELERATE_USE_CPU="1"))
        rows.append((processes, json.loads(out.read_text(encoding="utf-8"))))
    return [{"processes": n, "second epoch, s": found[1]["seconds"], "loss, epoch 1": found[0]["loss"],
             "loss, epoch 2": found[1]["loss"]} for n, found in rows]


def measure(quick: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return dict(images=by_images(Path(folder), (1000,) if quick else (1000, 4000, 12000)),
                    pixels=by_pixels((224,) if quick else (224, 384, 448), 1 if quick else 5),
                    processes=by_processes(Path(folder), 160 if quick else 640))


main = partial(command, "growth", __doc__, measure)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:  # one of several processes
        root, out, batch, threads = sys.argv[2:]
        train(Path(root), Path(out), int(batch), int(threads))
    else:
        main()
