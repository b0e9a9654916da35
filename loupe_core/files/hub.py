"""The Hugging Face hub, where it cannot be reached: known within seconds, and what it gave before is still there."""

from pathlib import Path

import timm
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from loupe_core.files.checkpoint import HUB_ID

SOURCES = ("hf-hub", "hf_hub", "local-dir")  # timm's: hf-hub:owner/name, local-dir:FOLDER
SECONDS = 5  # for the hub's first answer
_set_here = False


def hub_or_cache(name: str | Path) -> None:
    """To be called before a checkpoint, or a backbone's pretrained weights, are loaded by name.

    Where they come from the hub and it does not answer, its client works from its cache from now on, as with
    HF_HUB_OFFLINE=1: else it asks six times for each file, with pauses that no setting shortens, for 23 s and more.
    """
    global _set_here
    if constants.HF_HUB_OFFLINE and not _set_here or not _is_on_hub(name):
        return
    _set_here = constants.HF_HUB_OFFLINE = not _answers()


def _is_on_hub(name: str | Path) -> bool:
    if Path(name).is_dir() or isinstance(name, Path):
        return False
    if HUB_ID.fullmatch(name) or name.partition(":")[0].lower() in SOURCES[:2]:
        return True
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    return bool(config and config.hf_hub_id and not config.file)


def _answers() -> bool:
    try:
        return get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code < 500
    except Exception:  # of the client's library for connections, which has changed its name before
        return False
