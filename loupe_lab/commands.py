"""The lab's commands of `loupe`: explain, predict, audit, fieldguide, evaluate --report. Each imports what it needs.

explain, predict and audit use the card where there is one, as train and evaluate do: see `best_device`.
export stays on the CPU: a card would save it nothing.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

import torch

from loupe_core.cli import Arguments, add_checkpoint, add_data, open_trained
from loupe_core.datasets import CUB200, PhotoFolder
from loupe_core.errors import LoupeError, printable
from loupe_core.files.atomic import replaced
from loupe_core.files.card import worth
from loupe_core.files.folders import list_images
from loupe_core.files.hub import hub_or_cache
from loupe_core.files.images import open_image
from loupe_core.geometry import transforms_for
from loupe_core.heatmap import is_flat
from loupe_core.look.command import add_magnify, rule_of
from loupe_core.look.magnifier import Magnifier
from loupe_core.look.words import alt_text
from loupe_core.model import LoupeModel
from loupe_core.start.devices import device_of, on_best_device

METHODS = ("mask", "grad_cam", "integrated_gradients", "rollout", "occlusion")  # of `explain`
WITH_SITE = ("mask", "grad_cam")
REPRODUCE = """\
Run the paper's experiment on CUB-200-2011: train, evaluate once on the test split, audit, and print the table.

It is made for a card. It stops and goes on anywhere with the same command; every finished run is a row.

  loupe reproduce --rehearse                     a minute, anywhere: does all of it work here?
  loupe reproduce data --out runs/paper          24 runs: with and without the gate, Swin-Base and Swin-Tiny, 5 seeds;
                                                 and the authors' own protocol
  loupe reproduce data --table ablations --part 3/16
  loupe reproduce --show                         the table of what is there"""
FOR_ALL_CLASSES = ("mask", "rollout")  # the same map whichever class is asked for


def explain(args: Arguments) -> None:
    """Draws a map over each photograph, and prints it in words with the likeliest classes."""
    from PIL import Image

    folder = args.photo.is_dir()
    photographs = list_images(args.photo) if folder else [args.photo]
    if not photographs:
        raise LoupeError(f"{args.photo}: found no photograph in this folder; expected some, such as .jpg files")
    out = args.out or Path("explained" if folder else "loupe.png")
    if not folder and Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise LoupeError(f"--out {out}: expected an image file such as out.png")
    if folder and out.exists() and not out.is_dir():
        raise LoupeError(f"--out {out}: found a file; expected a folder for the pictures")
    if not 0 <= args.alpha <= 1:
        raise LoupeError(f"--alpha {args.alpha}: expected a weight from 0 to 1")
    if args.site is not None and args.method not in WITH_SITE:
        raise LoupeError(f"--site {args.site}: {args.method} has none; expected --method {' or '.join(WITH_SITE)}")
    # not its own pictures of an earlier run
    photographs = [path for path in photographs if not path.resolve().is_relative_to(out.resolve())]
    model = _open(args.checkpoint)
    if not model.sites and args.method == "mask":
        raise LoupeError(f"{args.checkpoint} holds a bare backbone, which has no mask; expected another --method, such "
                         "as grad_cam")
    if args.method == "mask" and len(model.sites) > 1 and args.site is None:
        raise LoupeError(f"{args.checkpoint} has several gates; expected --site, one of {', '.join(model.sites)}")
    target = _class_number(model, args)
    rule, failed = rule_of(args, args.checkpoint), []
    magnifier = Magnifier(model, rule) if rule else None
    for path in photographs:
        try:
            if folder:
                print(f"{printable(str(path))}:")
            picture = out / f"{path.relative_to(args.photo)}.png" if folder else out
            _explain_one(model, args, path, target, picture, magnifier)
        except LoupeError as error:
            if not folder or isinstance(error.__cause__, OSError):  # the next picture would have no place either
                raise
            failed.append(path)
            print(f"loupe: {error}", file=sys.stderr)
    if failed:
        raise LoupeError(f"{args.photo}: {len(failed)} of {len(photographs)} photographs could not be explained, the "
                         "lines above say why; all others were")


def _open(checkpoint: str) -> LoupeModel:
    """The model in `--checkpoint`, on the card where there is one."""
    hub_or_cache(checkpoint)
    return on_best_device(LoupeModel.from_pretrained(checkpoint))


def _explain_one(model: LoupeModel, args: Arguments, path: Path, target: int | None, out: Path,
                 magnifier: Magnifier | None) -> None:
    import numpy as np
    from PIL import Image

    from loupe_lab.evidence.explain import explain as explain_images
    from loupe_lab.pages.pictures import beside_parts, drawn, sampled

    photograph = open_image(path)
    looks = None if magnifier is None else magnifier.look([photograph])
    x, geometry = transforms_for(model.data_config, train=False)(photograph)
    options = {} if args.site is None else dict(site=args.site)
    found = explain_images(model, x[None], args.method, target, **options)[0]
    found = found.abs()
    heatmap = sampled(found, geometry)
    low, high = float(np.nanmin(heatmap)), float(np.nanmax(heatmap))
    name = args.method.replace("_", " ").replace("grad cam", "Grad-CAM")
    try:
        if path != args.photo:
            out.parent.mkdir(parents=True, exist_ok=True)
        limits = (0, 1) if args.method == "mask" else (low, high)
        encoded = io.BytesIO()  # to a file, Pillow writes half of a JPEG on a full disk, without a word
        picture = drawn(photograph, found, geometry, limits, args.alpha)
        if looks is not None:
            picture = beside_parts(picture, photograph, looks.boxes[0])
        picture.save(encoded, Image.registered_extensions()[out.suffix.lower()])
        with replaced(out) as beside:
            beside.write_bytes(encoded.getvalue())
    except OSError as error:
        raise LoupeError(f"{out}: could not be written ({error.strerror or error}); "
                         "give --out a folder that exists and has room") from error
    print(alt_text(heatmap, name=name, size=geometry.original_size))
    if not is_flat(heatmap):
        print(f"{name} from {low:.3g} to {high:.3g} on what the model saw of it; " + (
            "colours from 0 to 1" if args.method == "mask" else "colours between these"))
    with torch.inference_mode():
        logits = model(x[None].to(device_of(model))) if looks is None else looks.first
    _print_top(model, logits[0])
    if looks is not None:
        for box in looks.boxes[0]:
            print(f"second look: {box.width} x {box.height} px from ({box.x}, {box.y}) on, by {magnifier.rule.source}")
        _print_top(model, looks.second[0])
        print("both looks:")
        _print_top(model, looks.logits[0])
    print(f"overlay: {printable(str(out))}")


def _print_top(model: LoupeModel, logits: torch.Tensor) -> None:
    top = logits.softmax(0).topk(min(5, model.num_classes))
    for p, k in zip(top.values.tolist(), top.indices.tolist()):
        print(f"{p:7.2%}  {printable(model.class_names[k]) if model.class_names else f'class {k}'}")


def _class_number(model: LoupeModel, args: Arguments) -> int | None:
    """`--class` as a number: a class's name, or its number from 0; None where it was not given."""
    wanted = args.target
    if wanted is None:
        return None
    if args.method in FOR_ALL_CLASSES:
        raise LoupeError(f"--class {wanted}: the {args.method} is the same for every class; expected a --method such "
                         "as grad_cam")
    names, wanted = model.class_names or [], normalize("NFC", wanted)
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < model.num_classes:
        return int(wanted)
    known = f", or a name such as {', '.join(names[:3])}" if names else ""
    raise LoupeError(f"--class {wanted}: unknown to {args.checkpoint}; expected a number from 0 to "
                     f"{model.num_classes - 1}{known}")


def predict(args: Arguments) -> None:
    """Writes a table of what is likeliest on each photograph, and of what the mask does there."""
    from tqdm import tqdm

    from loupe_lab.evidence.answers import BATCH, answers, mask_columns, write_table

    photographs = list_images(args.photo) if args.photo.is_dir() else [args.photo]
    if not photographs:
        raise LoupeError(f"{args.photo}: found no photograph in this folder; expected some, such as .jpg files")
    if args.top < 1:
        raise LoupeError(f"--top {args.top}: expected 1 or more")
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise LoupeError(f"--out {args.out}: expected a file to write in a folder that is there")
    model = _open(args.checkpoint)
    if len(model.sites) > 1 and args.site is None:
        raise LoupeError(f"{args.checkpoint} has several gates; expected --site, one of {', '.join(model.sites)}")
    rule = rule_of(args, args.checkpoint)
    magnifier = Magnifier(model, rule) if rule else None
    transform, top = transforms_for(model.data_config, train=False), min(args.top, model.num_classes)
    names = model.class_names or [f"class {k}" for k in range(model.num_classes)]
    rows, failed = [], 0
    for first in tqdm(range(0, len(photographs), BATCH), desc="photographs, in batches", disable=None):
        opened = []
        for path in photographs[first : first + BATCH]:
            try:
                photograph = open_image(path)
                opened.append((path, *transform(photograph), photograph if magnifier else None))
            except LoupeError as error:
                failed += 1
                print(f"loupe: {error}", file=sys.stderr)
        found = answers(model, [x for _, x, *_ in opened], args.site) if opened else []
        twice = magnifier.look([photograph for *_, photograph in opened]) if magnifier and opened else None
        for i, ((path, _, geometry, _), (probabilities, mask)) in enumerate(zip(opened, found)):
            if twice:
                probabilities = twice.logits[i].softmax(0).numpy()
            row = dict(file=path.relative_to(args.photo).as_posix() if args.photo.is_dir() else str(path))
            for place, k in enumerate(probabilities.argsort()[::-1][:top], 1):
                row |= {f"class_{place}": names[k], f"probability_{place}": round(float(probabilities[k]), 4)}
            part = dict(zip(("part_x", "part_y", "part_width", "part_height"), twice.boxes[i][0])) if twice else {}
            rows.append(row | mask_columns(mask, geometry) | part)
    if rows:
        try:
            write_table(args.out, rows)
        except OSError as error:
            raise LoupeError(f"--out {args.out}: could not be written ({error.strerror or error})") from error
        print(f"{len(rows)} photographs: {printable(str(args.out))}")
    if failed:
        raise LoupeError(f"{args.photo}: {failed} of {len(photographs)} photographs could not be read, the lines above "
                         f"say why; {'all others are in the table' if rows else 'no table was written'}")


def report(args: Arguments, model: LoupeModel, data: CUB200 | PhotoFolder, lines: list[str]) -> None:
    """After `evaluate`: writes its report where one was asked for."""
    if args.report is None:
        return
    from loupe_lab.pages.report import write_report

    write_report(args.report, model, data, lines)
    print(f"report: {printable(str(args.report / 'index.html'))}")


def audit(args: Arguments) -> None:
    """Prints what other masks in the place of the gate's own do."""
    from tqdm import tqdm

    from loupe_lab.evidence.audit import ROWS, conclusion, gate_effect, table

    if args.old_data is not None:  # until November 2026: loupe audit CHECKPOINT --data FOLDER
        if args.checkpoint is not None:
            raise LoupeError(f"audit: found two folders, {args.data} and --data {args.old_data}; expected one")
        args.checkpoint, args.data = str(args.data), args.old_data
    if args.checkpoint is None:
        raise LoupeError("audit: found no --checkpoint; expected: loupe audit FOLDER --checkpoint CHECKPOINT")
    if args.images < 1:
        raise LoupeError(f"--images {args.images}: expected 1 or more")
    if not 0 <= args.seed < 2**63:
        raise LoupeError(f"--seed {args.seed}: expected a whole number from 0 to 2**63 - 1")
    model, data = open_trained(args)
    if not model.sites:
        raise LoupeError(f"{args.checkpoint} holds a bare backbone, which has no mask; expected a model with a gate")
    chosen = range(0, len(data), -(-len(data) // args.images))  # evenly spread, so over all classes
    samples = [data[i] for i in tqdm(chosen, desc="photographs", leave=False, disable=None)]
    labels = torch.tensor([sample.label for sample in samples])
    images = torch.stack([sample.image for sample in samples])
    effects = gate_effect(on_best_device(model), images, labels, site=args.site, seed=args.seed, progress=True,
                          only=[*ROWS, "centre", *(f"{name}, eps 0" for name in ROWS)])
    print(f"{len(samples)} {args.split} images of {len(data)}; means over them, against the gate's own mask; precision "
          "fp32")
    print(table(effects))
    print(f"beside these: {worth(labels.numpy(), model.num_classes)}")
    print(conclusion(effects))


def reproduce(args: Arguments) -> None:
    """Runs the paper's experiment, or goes on with it, and prints its table."""
    from loupe_core.files.download import download_cub
    from loupe_core.recipe import Recipe
    from loupe_core.start.devices import best_device
    from loupe_lab.paper import arms, grid
    from loupe_lab.paper.experiment import Setting, check_complete
    from loupe_lab.paper.hours import TEST, at_most, hours
    from loupe_lab.paper.machine import card, check_alone
    from loupe_lab.paper.rehearsal import CLASSES, SEEDS, rehearsed
    from loupe_lab.paper.table import table

    check_alone()
    if args.rehearse and args.results:
        raise LoupeError(f"--results {args.results}: the figures of a rehearsal mean nothing and stay in --out; "
                         "expected --results without --rehearse")
    seeds = args.seeds
    if args.rehearse:
        seeds = SEEDS if seeds is None else min(seeds, SEEDS)
    tables = args.table or ("all" if args.rehearse and not args.arm else "core")
    runs = arms.plan(tables, args.arm, args.backbone, seeds, args.pixels)
    changes = {name: value for name, value in vars(args).items()
               if name in ("precision", "workers", "compile") and value is not None}
    Recipe(**changes)  # a wrong one is told before anything is fetched
    if args.save_every < 1:
        raise LoupeError(f"--save-every {args.save_every}: expected 1 or more")
    out = args.out / "rehearsal" if args.rehearse else args.out
    book = Path("data", "results")
    results = args.results or (book if book.is_dir() and not args.rehearse else out) / "cub.csv"
    images = CLASSES if args.rehearse else TEST
    if args.show or args.plan:
        rows = grid.collect(out, results, images, write=False)
        if args.plan:
            print("\n".join(f"{run.name}  {'done' if run in rows else 'to do'}" for run in runs))
            print(grid.remaining(runs, rows, lambda run: None))
            if left := [] if args.rehearse else [run for run in runs if run not in rows]:
                print(hours(left))
        else:
            print(table(list(rows.values()), published=not args.rehearse))
        return
    if args.rehearse:
        with rehearsed(out, changes) as setting:
            setting.keep_weights = not args.no_weights
            setting.options["save_every"] = args.save_every
            rows = grid.reproduce(runs, setting, results, args.part)
    else:
        root = download_cub(args.data)
        check_complete(root)
        setting = Setting(root, out, dict(save_every=args.save_every), changes,
                          keep_weights=not args.no_weights, images=images)
        here = card(best_device())
        rows = grid.reproduce(runs, setting, results, args.part, expected=lambda run: at_most(run, here), card=here)
    print(table(list(rows.values()), published=not args.rehearse))
    print(f"rows: {printable(str(results))}")


def fieldguide(args: Arguments) -> None:
    """Writes the drawn birds."""
    from loupe_lab.birds.fieldguide import species_of, write_fieldguide

    out = args.out or args.folder
    if args.out is not None and args.folder is not None:
        raise LoupeError(f"fieldguide: found two folders, {args.folder} and --out {args.out}; expected one, --out")
    if out is None:
        raise LoupeError("fieldguide: found no --out; expected a folder to make, such as --out data/birds")
    species = species_of(args.groups)
    root = write_fieldguide(out, species, train=args.train, test=args.test, size=args.size, seed=args.seed,
                            weather=args.weather, workers=os.cpu_count() or 1)
    print(f"{len(species) * (args.train + args.test)} drawn birds of {len(species)} species: {root}")


def part(text: str) -> tuple[int, int]:
    """"3/16" as (3, 16): which part, of how many."""
    which, _, parts = text.partition("/")
    if not (which.isdecimal() and parts.isdecimal() and 1 <= int(which) <= int(parts)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected which/of how many, such as 3/16")
    return int(which), int(parts)


def add_commands(command: Callable[..., argparse.ArgumentParser], parsers: dict[str, argparse.ArgumentParser]) -> None:
    """The entry point: see `loupe_core.cli`."""
    p = parsers["evaluate"]
    p.add_argument("--report", type=Path, metavar="FOLDER", help="also write a page there: what is taken for what, "
                   "each class, the worst mistakes with their heatmaps; and every answer as a table")
    p.set_defaults(then=[report])

    p = command(predict, "Name photographs without labels: a table of the likeliest classes, and the mask in numbers.")
    p.add_argument("photo", type=Path, help="an image file, or a folder of them, at any depth")
    add_checkpoint(p)
    p.add_argument("--out", type=Path, default=Path("predictions.csv"), help="CSV file to write")
    p.add_argument("--top", type=int, default=5, help="how many classes of each photograph")
    p.add_argument("--site", help="whose gate, where the model has several")
    add_magnify(p, "answer by two looks, and add the part that the second one shows, px")

    p = command(explain, "Draw the mask, or another explanation, over one photograph or a folder of them, in their own "
                "coordinates, and print the top 5.")
    p.add_argument("photo", type=Path, help="an image file, or a folder of them")
    add_checkpoint(p)
    p.add_argument("--out", "--output", type=Path,
                   help="image file to write (loupe.png); for a folder of photographs, a folder (explained)")
    p.add_argument("--method", choices=METHODS, default="mask", help="what to draw; signed maps by absolute value")
    p.add_argument("--site", help="mask: whose gate, where there are several; grad_cam: which features")
    p.add_argument("--class", dest="target", metavar="CLASS", help="name or number; the predicted class by default")
    p.add_argument("--alpha", type=float, default=0.5, help="weight of the colour, 0 to 1")
    add_magnify(p, "also draw what a second look shows, and print what each look says")

    p = command(audit, "How much of the mask reaches the logits and the accuracy: other masks in its place.")
    add_data(p)
    add_checkpoint(p, required=False)
    p.add_argument("--data", dest="old_data", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--site", help="whose gate, where the model has several")
    p.add_argument("--images", type=int, default=400, help="at most so many, evenly spread over the split")
    p.add_argument("--seed", type=int, default=0, help="of the shuffled mask")

    p = command(reproduce, REPRODUCE)
    p.usage = "loupe reproduce [FOLDER] [--table TABLE] [--out FOLDER] [options]"
    p.add_argument("data", type=Path, nargs="?", default=Path(os.environ.get("LOUPE_CUB_ROOT") or "data"),
                   help="folder of CUB-200-2011, which is fetched (1.15 GB) where it is not there; LOUPE_CUB_ROOT "
                   "names another than data")
    p.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder for the runs; where they are, a "
                   "stopped experiment goes on")
    p.add_argument("--results", type=Path, metavar="CSV", help="file for the rows; if it is not given, "
                   "data/results/cub.csv in a checkout of the book, else cub.csv in --out")
    p.add_argument("--table", help="core (24 runs), weights (30), ablations (51), or all; core if it is not given, all "
                   "in a rehearsal")
    p.add_argument("--arm", nargs="+", default=[], help="only these arms, such as bare loupe 'lambda 0'")
    p.add_argument("--backbone", nargs="+", default=[], help="only these, such as 'base 22k-1k' 'tiny 1k'")
    p.add_argument("--seeds", type=int, metavar="N", help="so many seeds in place of the table's 2, 3 or 5")
    p.add_argument("--part", type=part, default=(1, 1), metavar="K/N", help="only every Nth run, from the Kth on: for "
                   "array jobs; processes that see the same --out share the runs without it")
    p.add_argument("--pixels", type=int, default=224, help="224, or 384 with the weights for it")
    p.add_argument("--rehearse", action="store_true", help="all of it in small, in about a minute: tiny images, a tiny "
                   "Swin, two seeds, in OUT/rehearsal, with --precision, --workers and --compile; its figures "
                   "mean nothing")
    p.add_argument("--plan", action="store_true", help="only list the runs, which of them are done, and the hours that "
                                                       "the others take")
    p.add_argument("--show", action="store_true", help="only print the table of what is there")
    p.add_argument("--save-every", type=int, default=1, metavar="N", help="keep a state after so many epochs")
    p.add_argument("--no-weights", action="store_true", help="remove a finished run's weights too (350 MB for each "
                   "Swin-Base); rows and answers stay")
    p.add_argument("--precision", help="of every run but the authors' protocol, which is fp32; auto if it is not given")
    p.add_argument("--workers", type=int, help="processes that read images")
    p.add_argument("--compile", metavar="MODE", help="compile the steps, see `loupe train --help`")

    p = command(fieldguide, "Draw a set of field-guide birds in CUB-200-2011's layout.")
    p.add_argument("folder", type=Path, nargs="?", help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, help="folder to make")
    p.add_argument("--groups", type=int, default=5, help="groups of four species that differ in one part, 1 to 12")
    p.add_argument("--train", type=int, default=30, help="training images per species")
    p.add_argument("--test", type=int, default=20, help="test images per species")
    p.add_argument("--size", type=int, default=112, help="side in pixels")
    p.add_argument("--seed", type=int, default=0, help="same seed, same images")
    p.add_argument("--weather", type=float, default=1.0, help="0: clear plates; 1: haze, blur, grain, more twigs")
