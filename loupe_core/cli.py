"""The command line: ``loupe train | evaluate | explain | audit | export | fieldguide``.

Every command says in one line what is wrong with its input, and then exits with code 2.
"""

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
from PIL import Image

from loupe_core.datasets import CUB200, PhotoFolder, open_set
from loupe_core.errors import LoupeError
from loupe_core.files.download import download_cub
from loupe_core.files.export import export_onnx
from loupe_core.files.images import open_image
from loupe_core.gate import FORMS
from loupe_core.geometry import transforms_for
from loupe_core.heatmap import alt_text, mask_to_original, overlay
from loupe_core.model import LoupeModel
from loupe_core.trainer import Recipe, Trainer, write_whole
from loupe_lab.birds.fieldguide import species_of, write_fieldguide
from loupe_lab.evidence.audit import conclusion, gate_effect, table
from loupe_lab.evidence.statistics import proportion


def train(args) -> None:
    if args.download:
        download_cub(args.data)
    recipe = _recipe(args)
    # The splits keep their own default seed: `evaluate` must find the test images that `train --seed 3` never saw.
    names = open_set(args.data, "train").class_names
    torch.manual_seed(recipe.seed)  # of the gate's and the head's initial weights
    site = () if args.bare else args.site[0] if len(args.site) == 1 else args.site
    model = LoupeModel(args.backbone, num_classes=len(names), pretrained=not args.from_scratch, class_names=names,
                       site=site, form=args.form, reduction=args.reduction)
    sets = {}
    for split in ("train", "val"):
        options = recipe.train_transform_options() if split == "train" else dict(train=False)
        sets[split] = open_set(args.data, split, cache=args.cache,
                               transform=transforms_for(model.data_config, **options))
    trainer = Trainer(model, sets["train"], sets["val"], recipe, args.out, tracker=args.track)
    print(f"{len(sets['train'])} training and {len(sets['val'])} validation images of {len(names)} classes, "
          f"{args.backbone}, precision {trainer.accelerator.mixed_precision}, {trainer.accelerator.device}")
    rows = trainer.fit(resume=args.resume)
    if not trainer.accelerator.is_main_process:
        return
    best = min(rows, key=lambda row: row["val_loss"])
    right, n = round(best["val_accuracy"] * len(sets["val"])), len(sets["val"])
    card = model.generate_model_card(
        backbone=f"{args.backbone}, gate at {', '.join(model.sites) or 'no site'} ({args.form})",
        data=f"{args.data.resolve().name}: {len(sets['train'])} training images of {len(names)} classes.",
        recipe=dataclasses.asdict(recipe) | dict(epochs_trained=len(rows), best_epoch=best["epoch"]),
        metrics=[_accuracy("validation", right, n) + "; it chose the epoch, so it is a little optimistic"])
    card.save(args.out / "best" / "README.md")
    print(f"best of {len(rows)} epochs: {best['epoch']}, validation loss {best['val_loss']:.4f}, "
          f"accuracy {best['val_accuracy']:.4f}")
    print(f"kept in {args.out / 'best'}; next: loupe evaluate {args.data} --checkpoint {args.out / 'best'}")


def _open(args) -> tuple[LoupeModel, CUB200 | PhotoFolder]:
    """The model in `--checkpoint`, and the split of the data set that it was trained on."""
    model = LoupeModel.from_pretrained(args.checkpoint)
    data = open_set(args.data, args.split, transform=transforms_for(model.data_config, train=False))
    if model.class_names and data.class_names != model.class_names:
        raise LoupeError(f"{args.data} has {len(data.class_names)} classes, {args.checkpoint} was trained on "
                         f"{len(model.class_names)} and they are not the same; expected the set that it was trained on")
    return model, data


def evaluate(args) -> None:
    model, data = _open(args)
    result = Trainer(model, data, recipe=Recipe(batch_size=args.batch_size, precision=args.precision)).evaluate(data)
    right = int((result.predictions == result.labels).sum())
    found = _accuracy(args.split, right, len(result.labels))
    print(found)
    if args.card:
        _add_to_card(Path(args.checkpoint) / "README.md", f"- {found}")
    print(f"loss {result.loss:.4f}   mean of the mask {result.mask_mean:.4f}")


def _accuracy(split: str, right: int, n: int) -> str:
    """For example: test accuracy 0.8950 (358 of 400 images; 95 % interval 0.8611 to 0.9214, Wilson)."""
    low, high = proportion(right, n)
    return f"{split} accuracy {right / n:.4f} ({right} of {n} images; 95 % interval {low:.4f} to {high:.4f}, Wilson)"


def _add_to_card(file: Path, line: str) -> None:
    """Puts a line below the card's "## Metrics", in place of an earlier one of its split."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise LoupeError(f"--card: {file} could not be read ({error.strerror}); expected a training's folder") from None
    kept = [old for old in text.splitlines() if not old.startswith(line[: line.index(" accuracy")])]
    if "## Metrics" not in kept:
        raise LoupeError(f"--card: {file} has no line '## Metrics'; expected the model card that a training wrote")
    at = kept.index("## Metrics") + 1
    write_whole(file, "\n".join([*kept[:at], "", line, *kept[at + (kept[at : at + 1] == [""]):]]) + "\n")


def explain(args) -> None:
    if args.output.suffix.lower() not in Image.registered_extensions():
        raise LoupeError(f"--output {args.output}: expected an image file such as out.png")
    model = LoupeModel.from_pretrained(args.checkpoint)
    if not model.sites:
        raise LoupeError(f"{args.checkpoint} holds a bare backbone; expected a model with a gate, which has a mask")
    photograph = open_image(args.photo)
    x, geometry = transforms_for(model.data_config, train=False)(photograph)
    with torch.inference_mode():
        logits, masks = model(x[None], return_mask=True)
    mask = masks[0] if isinstance(masks, list) else masks
    heatmap = mask_to_original(mask[0, 0], geometry)
    beside = args.output.with_name("unfinished-" + args.output.name)
    try:
        Image.fromarray(overlay(photograph, heatmap, args.alpha)).save(beside)
        os.replace(beside, args.output)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise LoupeError(f"{args.output}: could not be written ({error.strerror or error}); "
                         "give --output a folder that exists and has room") from error
    print(alt_text(heatmap))
    top = logits[0].softmax(0).topk(min(5, model.num_classes))
    for p, k in zip(top.values.tolist(), top.indices.tolist()):
        print(f"{p:7.2%}  {model.class_names[k] if model.class_names else f'class {k}'}")
    print(f"overlay: {args.output}")


def audit(args) -> None:
    model, data = _open(args)
    if args.images < 1:
        raise LoupeError(f"--images {args.images}: expected 1 or more")
    chosen = range(0, len(data), -(-len(data) // args.images))  # evenly spread, so over all classes
    samples = [data[i] for i in chosen]
    effects = gate_effect(model, torch.stack([sample.image for sample in samples]),
                          torch.tensor([sample.label for sample in samples]), site=args.site, seed=args.seed)
    print(f"{len(samples)} {args.split} images of {len(data)}; means over them, against the gate's own mask")
    print(table(effects))
    print(conclusion(effects))


def export(args) -> None:
    export_onnx(LoupeModel.from_pretrained(args.checkpoint), args.output)
    print(f"ONNX: {args.output} ({args.output.stat().st_size / 1e6:.1f} MB)")


def fieldguide(args) -> None:
    species = species_of(args.groups)
    root = write_fieldguide(args.out, species, train=args.train, test=args.test, size=args.size, seed=args.seed,
                            weather=args.weather, workers=os.cpu_count() or 1)
    print(f"{len(species) * (args.train + args.test)} drawn birds of {len(species)} species: {root}")


def _recipe(args) -> Recipe:
    """The recipe asked for by name, with the fields that were given on the command line in it."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)}
    if args.resume and (args.out / "recipe.json").is_file():
        return Recipe.read(args.out / "recipe.json", **given)
    return Recipe.small(**given) if args.recipe == "small" else Recipe(**given)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="loupe", description="Train a spatial attention gate; look through it.")
    commands = top.add_subparsers(required=True, metavar="command")

    def command(run, about):
        p = commands.add_parser(run.__name__, help=about, description=about,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(run=run)
        return p

    p = command(train, "Train on a folder in CUB-200-2011's layout, or on one folder of photographs a class.")
    p.add_argument("data", type=Path, help="folder of the data set")
    p.add_argument("--out", type=Path, default=Path("runs/loupe"), help="folder for checkpoints and log")
    p.add_argument("--backbone", default="swin_micro",
                   help="timm model name; the paper: swin_base_patch4_window7_224.ms_in22k")
    p.add_argument("--from-scratch", action="store_true", help="random weights instead of pretrained ones")
    p.add_argument("--site", nargs="+", default=["stage2"],
                   help="stage1..stage4, stage3.inside, ...; several: multi-scale")
    p.add_argument("--form", choices=FORMS, default="multiply", help="how the mask meets the features")
    p.add_argument("--reduction", type=int, default=16, help="hidden width of the gate: channels // reduction")
    p.add_argument("--bare", action="store_true", help="no gate: the baseline")
    p.add_argument("--recipe", choices=("paper", "small"), default="paper", help="starting values of the options below")
    p.add_argument("--resume", action="store_true", help="go on after the last complete epoch in --out")
    p.add_argument("--download", action="store_true", help="fetch CUB-200-2011 into the folder first (1.15 GB)")
    p.add_argument("--track", metavar="TRACKER", help="tensorboard, wandb, ...: also send every epoch's row there")
    p.add_argument("--cache", action="store_true", help="keep decoded images, at most 4 GiB, in a temporary file")
    for f in dataclasses.fields(Recipe):
        p.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=argparse.SUPPRESS,
                       help=f"recipe; the paper: {f.default}")

    p = command(evaluate, "Accuracy, loss and mean of the mask on one split.")
    p.add_argument("data", type=Path, help="folder of the data set")
    p.add_argument("--checkpoint", required=True, help="folder that save_pretrained wrote, or owner/name on the hub")
    p.add_argument("--split", choices=("train", "val", "test"), default="test", help="which split")
    p.add_argument("--batch-size", type=int, default=16, help="images a step")
    p.add_argument("--precision", default="auto", help="auto, bf16, fp16 or no")
    p.add_argument("--card", action="store_true", help="write the accuracy into the checkpoint's model card as well")

    p = command(explain, "Draw the mask over one photograph, in its own coordinates, and print the top 5.")
    p.add_argument("photo", type=Path, help="an image file")
    p.add_argument("--checkpoint", required=True, help="folder that save_pretrained wrote, or owner/name on the hub")
    p.add_argument("--output", type=Path, default=Path("loupe.png"), help="image file to write")
    p.add_argument("--alpha", type=float, default=0.5, help="weight of the colour, 0 to 1")

    p = command(audit, "How much of the mask reaches the logits and the accuracy: other masks in its place.")
    p.add_argument("checkpoint", help="folder that save_pretrained wrote, or owner/name on the hub")
    p.add_argument("--data", type=Path, required=True, help="folder of the data set")
    p.add_argument("--split", choices=("train", "val", "test"), default="test", help="which split")
    p.add_argument("--site", help="whose gate, where the model has several")
    p.add_argument("--images", type=int, default=400, help="at most so many, evenly spread over the split")
    p.add_argument("--seed", type=int, default=0, help="of the shuffled mask")

    p = command(export, "Write an ONNX file with logits and mask as outputs.")
    p.add_argument("--checkpoint", required=True, help="folder that save_pretrained wrote, or owner/name on the hub")
    p.add_argument("--output", type=Path, default=Path("loupe.onnx"), help="file to write")

    p = command(fieldguide, "Draw a set of field-guide birds in CUB-200-2011's layout.")
    p.add_argument("out", type=Path, help="folder to make")
    p.add_argument("--groups", type=int, default=5, help="groups of four species that differ in one part, 1 to 12")
    p.add_argument("--train", type=int, default=30, help="training images a species")
    p.add_argument("--test", type=int, default=20, help="test images a species")
    p.add_argument("--size", type=int, default=112, help="side in pixels")
    p.add_argument("--seed", type=int, default=0, help="same seed, same images")
    p.add_argument("--weather", type=float, default=1.0, help="0: clear plates; 1: haze, blur, grain, more twigs")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except LoupeError as error:
        # from a DataLoader's worker the line arrives below the worker's traceback
        line = str(error).strip().splitlines()[-1].removeprefix("loupe_core.errors.LoupeError: ")
        print(f"loupe: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"loupe: {stop or 'stopped'}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    return 0
