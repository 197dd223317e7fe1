"""One way to save anything: write beside the target, hash, fsync, rename. Never overwrite.

A folder under its final name is complete, or it does not exist. What it holds is listed in
MANIFEST.json with size and sha256, so that a later reader can tell truncation from corruption.
Work in progress is hidden as `.NAME.HOST.PID.tmp`; what a killed process left of it goes with the
next save to the same parent on the same host. Links are followed when read, never made.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from expertly.errors import ExpertlyError
from expertly.faults import strike
from expertly.memory import size

MANIFEST = "MANIFEST.json"


def save_folder(target: Path, write: Callable[[Path], None], *, need: int = 0) -> Path:
    """Have `write` fill a hidden folder beside `target`, then make it visible in one rename.

    Returns the target. need: the bytes it will take, where known; a full disk's E401 tells them.
    Raises E205 when it exists, E401 when the disk refuses; then nothing is left behind. `write`
    reads its inputs beforehand: an OSError in it counts as the disk's.
    """
    if os.path.lexists(target):
        raise _in_the_way(target)
    with _hidden(target, need) as hidden:
        hidden.mkdir()
        strike("save.begun", target.name)
        write(hidden)
        strike("save.written", target.name)
        _seal(hidden)
        strike("save.sealed", target.name)
        os.rename(hidden, target)
        strike("save.renamed", target.name)
        _sync(target.parent)
    return target


def save_file(target: Path, text: str) -> Path:
    """Write a small file in one rename: a reader sees the old text or the new, never a part.

    Returns the target, which may have existed. Raises E401 when the disk refuses.
    """
    with _hidden(target, len(text)) as hidden:
        hidden.write_text(text, encoding="utf-8")
        _sync(hidden)
        os.replace(hidden, target)
        _sync(target.parent)
    return target


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably; no error when it is there. Raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder, by a rename first, so that no half-deleted one keeps its name.

    Of a link only the link goes. A missing folder is no error; E401 when the disk refuses.
    """
    if not os.path.lexists(folder):
        return
    with _hidden(folder) as hidden:
        os.rename(folder, hidden)
        _sync(folder.parent)
        if hidden.is_symlink():
            hidden.unlink()
        else:
            shutil.rmtree(hidden)


def verify(folder: Path, *, hashes: bool = True) -> bool:
    """Check every file of a manifest: sizes always, sha256 when `hashes`.

    Returns False when the folder has no manifest, so that nothing could be checked. Raises E301
    for a file that is missing, unreadable or of another size, E302 for other contents.
    """
    if not (folder / MANIFEST).is_file():
        return False
    for name, entry in _listed(folder).items():
        file = folder / name
        try:
            _check(file, entry, hashes)
        except OSError as error:
            why = f"cannot be read ({os.strerror(error.errno or errno.EIO).lower()})"
            raise ExpertlyError("E301", str(file), why, fix="copy the folder again") from error
    return True


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint-N folders of a run, the highest step last."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def sha256(file: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path) -> dict:
    """A JSON object from a file; E301 when it is missing or not an object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = f"cannot be read ({error})"
        raise ExpertlyError("E301", str(file), why, fix="copy the file again") from error
    if not isinstance(value, dict):
        raise ExpertlyError("E301", str(file), "is not a JSON object", fix="copy the file again")
    return value


def write_json(file: Path, value: dict) -> None:
    """A JSON object as a file that people can read too; not durable, so for use inside a save."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def disk_error(
    path: Path, error: OSError, need: int = 0, inodes: int | None = None
) -> ExpertlyError:
    """The E401 for a write that the operating system refused.

    need: its bytes, where known. inodes: how many further files there was room for; None: now.
    """
    why = (os.strerror(error.errno) if error.errno else str(error)).lower()
    fix = "free space or name another output folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = _no_room(path, need, _inodes_left(path) if inodes is None else inodes)
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        fix = "name an output folder that you may write to"
    if error.errno == errno.EFBIG:
        fix = "raise the limit on file sizes (ulimit -f)"
    return ExpertlyError("E401", str(path), why, fix=fix)


def _disk_of(path: Path) -> os.statvfs_result:
    return os.statvfs(next(folder for folder in path.parents if folder.is_dir()))


def _inodes_left(path: Path) -> int:
    """How many files more the disk has room for, with a large number where it has no limit."""
    try:
        disk = _disk_of(path)
    except OSError:
        return sys.maxsize
    return disk.f_favail if disk.f_files else sys.maxsize


def _no_room(path: Path, need: int, inodes: int) -> str:
    """What a full disk lacks: bytes, or entries for further files."""
    if not inodes:
        return "disk full: no room for another file (no inodes left)"
    try:
        disk = _disk_of(path)
    except OSError:
        return "disk full"
    have = disk.f_bavail * disk.f_frsize
    if not need:
        return f"disk full: have {size(have)}"
    more = "" if need > have else "more than "  # a quota, or what file systems take for themselves
    return f"disk full: need {more}{size(need)}, have {size(have)}"


@contextmanager
def _hidden(target: Path, need: int = 0) -> Iterator[Path]:
    """A hidden name beside the target for work in progress, gone again when the work fails."""
    hidden = target.parent / f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        make_folder(target.parent)
        _sweep(target.parent)
        _discard(hidden)
        yield hidden
    except BaseException as error:
        inodes = _inodes_left(target)  # before ours are given back
        _discard(hidden)
        refusal = _refusal(error)
        if refusal is None:
            raise
        # rename says ENOTEMPTY when somebody else saved this target while we wrote
        late = refusal.errno == errno.ENOTEMPTY
        raise (
            _in_the_way(target) if late else disk_error(target, refusal, need, inodes)
        ) from error


def _in_the_way(target: Path) -> ExpertlyError:
    return ExpertlyError("E205", str(target), "exists already", fix="name a new folder")


def _refusal(error: BaseException) -> OSError | None:
    """The operating system's part in an error; safetensors, in Rust, has it in its text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found and not isinstance(error, OSError):
        error = OSError(int(found[1]), os.strerror(int(found[1])))
    # out of memory is another error, and no smaller save helps
    return error if isinstance(error, OSError) and error.errno != errno.ENOMEM else None


def _sweep(parent: Path) -> None:
    """Remove what dead processes of this host left; another host's may be alive and is not ours."""
    ours = re.compile(rf"\..+\.{re.escape(socket.gethostname())}\.(\d{{1,9}})\.tmp")
    for name in os.listdir(parent):
        found = ours.fullmatch(name)
        if found and not _alive(int(found[1])):
            _discard(parent / name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and somebody else's
        return True
    return True


def _discard(path: Path) -> None:
    """Delete a hidden file, link or folder as far as possible."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def _seal(folder: Path) -> None:
    """Make every file durable and write the manifest that lists them."""
    paths = sorted(path for path in folder.rglob("*") if path != folder / MANIFEST)
    files = [path for path in paths if path.is_file()]
    mode = folder.stat().st_mode & 0o666  # what the umask left; safetensors makes files 0600
    for file in files:
        file.chmod(mode)
        _sync(file)
    listed = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }
    write_json(folder / MANIFEST, {"files": listed})
    _sync(folder / MANIFEST)
    for inner in (path for path in paths if path.is_dir()):
        _sync(inner)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _listed(folder: Path) -> dict[str, dict]:
    """The manifest's files; E301 when it is damaged or names a file outside its folder."""
    files = read_json(folder / MANIFEST).get("files")
    if isinstance(files, dict) and all(_sound(name, entry) for name, entry in files.items()):
        return files
    why = "is not a list of this folder's files"
    raise ExpertlyError("E301", str(folder / MANIFEST), why, fix="copy the folder again")


def _sound(name: str, entry: object) -> bool:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts
    return inside and isinstance(entry, dict) and {"size", "sha256"} <= entry.keys()


def _check(file: Path, entry: dict, hashes: bool) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size != entry["size"]:
        why = "is missing" if size is None else f"{size} of {entry['size']} bytes"
        raise ExpertlyError("E301", str(file), why, fix="copy the folder again")
    if hashes and sha256(file) != entry["sha256"]:
        raise ExpertlyError("E302", str(file), "sha256 mismatch", fix="copy the folder again")
