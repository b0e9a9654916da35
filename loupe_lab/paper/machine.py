"""On what a run was made: the card, its driver, the precision, the versions and the commit."""

import os
import platform
import subprocess
from pathlib import Path

import timm
import torch
from accelerate import Accelerator

from loupe_core.errors import LoupeError
from loupe_lab.evidence.results import commit

ROOT = Path(__file__).resolve().parents[2]  # of a checkout; elsewhere it has no commit


def card(device: torch.device) -> str:
    """The name of a card, such as "NVIDIA A100-SXM4-40GB"; of a processor, its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def driver() -> str:
    """The version of NVIDIA's driver; empty where there is none."""
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip().split("\n")[0] if found.returncode == 0 else ""


def facts(accelerator: Accelerator) -> dict[str, str]:
    """The columns of a row that say on what it was made, and with what."""
    cuda = accelerator.device.type == "cuda"
    return dict(precision=accelerator.mixed_precision, card=card(accelerator.device), driver=driver() if cuda else "",
                cuda=(torch.version.cuda or "") if cuda else "", torch=torch.__version__, timm=timm.__version__,
                threads=str(torch.get_num_threads()), commit=commit(ROOT, ("loupe_core", "loupe_lab")))


def check_alone() -> None:
    """Raises LoupeError where this is one of several processes that share a training, as torchrun starts them."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise LoupeError(f"found {os.environ['WORLD_SIZE']} processes of one training; expected one: for several cards "
                         "start the command once on each (CUDA_VISIBLE_DEVICES), they share the runs")
