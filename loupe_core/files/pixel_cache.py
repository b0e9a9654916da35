"""Decoded photographs, kept for the next epoch."""

import os
import struct
import tempfile
from multiprocessing import context, reduction

from PIL import Image


class PixelCache:
    """Decoded photographs in a temporary file without a name, which all of a DataLoader's processes share.

    Photograph i begins at byte i * SLOT: height and width, then RGB. Places that were never written take no room. The
    pages live in the system's file cache, which gives them up when memory is short, and the file goes with the last
    process that holds it open. Where nothing can be kept (full disk, Windows), photographs are decoded each time.
    """

    LIMIT = 4 * 2**30  # bytes; CUB's 5,994 training photographs take 3.3 GB
    SLOT = 2**26  # bytes, so up to 22 megapixels

    def __init__(self):
        try:
            self.file = tempfile.TemporaryFile(prefix="loupe", buffering=0) if hasattr(os, "pread") else None
        except OSError:
            self.file = None

    def read(self, i: int) -> Image.Image | None:
        if self.file is None:
            return None
        descriptor, start = self.file.fileno(), i * self.SLOT
        head = os.pread(descriptor, 8, start)
        h, w = struct.unpack("II", head) if len(head) == 8 else (0, 0)
        pixels = os.pread(descriptor, h * w * 3, start + 8)
        return Image.frombytes("RGB", (w, h), pixels) if h * w * 3 == len(pixels) > 0 else None

    def write(self, i: int, image: Image.Image) -> None:
        size = image.width * image.height * 3
        if self.file is None or size + 8 > self.SLOT:
            return
        descriptor, start = self.file.fileno(), i * self.SLOT
        try:
            disk = os.fstatvfs(descriptor)
            room = min(self.LIMIT, disk.f_bavail * disk.f_frsize)  # at least half of a free disk is left to others
            if os.fstat(descriptor).st_blocks * 512 + size > room:
                return
            if os.pwrite(descriptor, image.tobytes(), start + 8) == size:
                # the size comes last, so that no other process reads half a photograph
                os.pwrite(descriptor, struct.pack("II", image.height, image.width), start)
        except OSError:
            return

    def __getstate__(self):
        # a worker that is started, not forked, gets the same file; any other copy begins an empty one
        started = self.file is not None and context.get_spawning_popen() is not None
        return {"shared": reduction.DupFd(self.file.fileno()) if started else None}

    def __setstate__(self, state):
        if state["shared"] is None:
            self.__init__()
        else:
            self.file = os.fdopen(state["shared"].detach(), "r+b", buffering=0)
