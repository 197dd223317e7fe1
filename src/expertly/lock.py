"""One process a folder. The kernel keeps the lock, so it dies with its holder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from expertly.errors import ExpertlyError
from expertly.folders import disk_error, make_folder

LOCK = ".lock"
_TRIES = 1000  # to open it: a holder that leaves may delete the folder under whoever comes


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder, made if it is missing, for this process alone.

    Raises E210 when another process has it, E211 when nothing may be written there.
    """
    handle = _taken(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # somebody may have deleted it all
            if os.listdir(folder) == [LOCK]:  # nothing came of it: leave the name free
                (folder / LOCK).unlink()
                folder.rmdir()
        os.close(handle)  # and with it goes the lock


def _taken(folder: Path) -> int:
    """A handle that has the lock."""
    while True:
        handle = _open(folder)
        try:
            _take(handle, folder)
            # a holder before us may have deleted the file that we opened
            if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                return handle
        except FileNotFoundError:
            pass
        except ExpertlyError:
            os.close(handle)
            raise
        os.close(handle)


def _open(folder: Path) -> int:
    for left in reversed(range(_TRIES)):
        try:
            make_folder(folder)
            return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if not (left and error.errno in (errno.ENOENT, errno.EEXIST)):
                raise _refusal(folder, error) from error
    raise AssertionError("the last try returns or raises")


def _refusal(folder: Path, error: OSError) -> ExpertlyError:
    if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return disk_error(folder, error)
    why = f"cannot be written ({os.strerror(error.errno).lower()})"
    return ExpertlyError("E211", str(folder), why, fix="name a folder that you may write to")


def _take(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
        why = f"in use by {holder or 'another process'}"
        fix = "wait for it, stop it, or name another folder"
        raise ExpertlyError("E210", str(folder), why, fix=fix) from error
    except OSError:
        return  # a file system without locks: better to train than to refuse
    with suppress(OSError):  # who holds it is for people to read, on a full disk it is left out
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
