"""What can be said of a file in the videos folder before anything decodes it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fw_model.files import printable

# What keeps a file from being read and is the file's own: links to nowhere or in circles, no right to read, a name too long.
NO_GOOD = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}


def unreadable(path: Path) -> str:
    """Why a file in the videos folder can give nothing whatever is in it, without waiting for it to open; "" when it may."""
    name = printable(path.name)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"{name}: not a file (a folder, pipe or device)"
        with path.open("rb"):
            return ""
    except OSError as error:
        if error.errno not in NO_GOOD:  # a fault of the machine, not of the file
            raise
        target = f": a link to {printable(os.readlink(path))}" if path.is_symlink() else ""
        return f"{name}: cannot be read ({error.strerror}){target}"
