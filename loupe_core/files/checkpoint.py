"""Checkpoints from elsewhere: what is refused before anything of them is built, run or filled with memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from loupe_core.errors import LoupeError, one_line

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LARGEST_SIDE = 2048  # pixels; of the images of a checkpoint from elsewhere
LARGEST_IMAGE = 3 * LARGEST_SIDE**2  # numbers
# timm.create_model would open, fetch or even unpickle a file for these
FILE_OPTIONS = {"cache_dir", "checkpoint_path", "features_only", "pretrained", "scriptable"}


def check_folder(folder: Path) -> None:
    """Refuses a folder without weights in safetensors, in a line that names what is there."""
    files = {path.name for path in folder.iterdir()}
    if special := [name for name in (WEIGHTS_NAME, CONFIG_NAME) if name in files and not (folder / name).is_file()]:
        raise LoupeError(f"{folder / special[0]} is no file; expected a folder that save_pretrained wrote")
    if WEIGHTS_NAME in files:
        return
    pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
    if pickles:
        raise LoupeError(
            f"{folder} holds {pickles[0]} but no {WEIGHTS_NAME}: pickled weights can run code and are not read; save "
            "the model with save_pretrained"
        )
    if (folder / "best" / CONFIG_NAME).is_file():
        raise LoupeError(f"{folder} is the folder of a training; expected the model in it, {folder / 'best'}")
    if "recipe.json" in files:
        raise LoupeError(f"{folder} holds a training that has kept no model yet; expected one with {folder / 'best'}: "
                         "let it go on, or train again")
    raise LoupeError(f"{folder} holds no {WEIGHTS_NAME}; expected a folder that save_pretrained wrote")


def check_config(where: str, arguments: dict) -> None:
    """Refuses what LoupeModel's own code would not write into config.json; a stranger may have written this one."""

    def whole(value, top=10**9) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= top

    def numbers(value) -> bool:
        kinds = isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)
        return kinds and 0 < len(value) < 1000 and all(abs(v) < 1e6 for v in value)

    def texts(value) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)

    def size(value) -> bool:
        sides = value if isinstance(value, (list, tuple)) else [value]
        return len(sides) in (1, 2) and all(whole(v, LARGEST_SIDE) for v in sides)

    def modest(value) -> bool:  # timm makes lists as long as `depth` says
        if isinstance(value, (dict, list, tuple)):
            return len(value) < 1000 and all(map(modest, value.values() if isinstance(value, dict) else value))
        return not isinstance(value, (int, float)) or abs(value) <= 100_000

    def options(value) -> bool:
        plain = isinstance(value, dict) and modest(value)
        return plain and not any(k in FILE_OPTIONS or k.startswith("pretrained_") for k in value)

    data = arguments.get("data_config")
    checks = dict(
        # timm.create_model would open or fetch a file for local-dir:FOLDER and hf-hub:owner/name
        backbone=(lambda v: isinstance(v, nn.Module) or isinstance(v, str) and not re.search("[:/\\\\]", v),
                  "the name of a timm model"),
        num_classes=(whole, "a whole number from 1"),
        site=(lambda v: isinstance(v, str) or texts(v), "a site's name or a list of them"),
        form=(lambda v: isinstance(v, str), "a name"),
        reduction=(whole, "a whole number from 1"),
        class_names=(texts, "a list of names"),
        img_size=(size, f"one or two whole numbers of pixels up to {LARGEST_SIDE}"),
        data_config=(lambda v: isinstance(v, dict), "an object with mean, std, ..."),
        backbone_kwargs=(options, "an object of modest numbers, without options that lead to files"),
        input_size=(lambda v: isinstance(v, (list, tuple)) and size(v[-2:]), f"sides up to {LARGEST_SIDE} pixels"),
        mean=(numbers, "a number for each channel"),
        std=(lambda v: numbers(v) and min(v) > 0, "a number above 0 for each channel"),
        crop_pct=(lambda v: isinstance(v, (int, float)) and 0.01 < v < 100, "a fraction such as 0.9"),
        interpolation=(lambda v: isinstance(v, str), "a name such as bicubic"),
    )
    given = {k: v for k, v in arguments.items() if v is not None} | (data if isinstance(data, dict) else {})
    for name, (good, expected) in checks.items():
        if name in given and not good(given[name]):
            raise LoupeError(f"{where} has {name}={repr(given[name])[:80]}; expected {expected}")
    channels, sides = given.get("backbone_kwargs", {}).get("in_chans", 3), given.get("img_size", LARGEST_SIDE)
    H, W = (2 * list(sides) if isinstance(sides, (list, tuple)) else [sides, sides])[:2]
    if not whole(channels) or channels * H * W > LARGEST_IMAGE:
        raise LoupeError(f"{where} has in_chans={repr(channels)[:80]} for images of {H} x {W} pixels; expected a whole "
                         f"number, and at most {LARGEST_IMAGE:,} numbers in an image")


def stored_weights(file: str | Path) -> int:
    """How many numbers a safetensors file holds. LoupeError where it is damaged, or is none."""
    try:
        with safe_open(file, framework="pt") as weights:
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    except SafetensorError as error:
        raise LoupeError(f"{file} is damaged or no safetensors file ({one_line(error)})") from error


@contextmanager
def at_most(room: int, file: str | Path) -> Iterator[None]:
    """While it is open, refuses to build a model of many more weights than `room`, before its memory is filled."""
    taken = 0

    def count(module, name, parameter):
        nonlocal taken
        taken += 0 if parameter is None else parameter.numel()
        if taken > max(2 * room, 2**24):  # twice, as a head that is replaced was built before; 2**24 are 67 MB
            raise LoupeError(
                f"{file} holds {room:,} weights, the config.json beside it describes a model of many more; expected "
                "both files of one model"
            )

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
