"""Whether the output can be written at all: asked before the work, which takes minutes."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from expertly.folders import disk_error


def require_room(target: Path, need: int) -> None:
    """Raises E401 where a new folder of `need` bytes has no room, or may not be made."""
    try:
        with suppress(FileNotFoundError):
            os.lstat(target)  # which says what is wrong with the name, or on the way to it
        parent = next(each for each in target.absolute().parents if each.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if shutil.disk_usage(parent).free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise disk_error(target, error, need) from error
