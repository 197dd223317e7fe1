"""A folder has one process at a time, and a dead one's lock is nobody's."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from expertly.errors import ExpertlyError
from expertly.lock import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from expertly.lock import locked
with locked(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has tmp_path / "run"; it holds something there, so the folder stays."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "held").touch()
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "mine\n"
        yield folder, process
        process.kill()


def refused(folder: Path) -> ExpertlyError:
    with pytest.raises(ExpertlyError) as caught, locked(folder):
        pytest.fail("it is not ours")
    return caught.value


def test_e210_in_use_and_by_whom(holder):
    folder, process = holder
    error = refused(folder)
    assert (error.code, error.exit_code) == ("E210", 2)
    assert f"{folder}: in use by pid {process.pid} on {socket.gethostname()}. FIX: wait" in str(
        error
    )
    assert sorted(os.listdir(folder)) == [LOCK, "held"], "a refused one removes nothing"


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_when_its_holder_ends_it_is_free_at_once(end, holder):
    folder, process = holder
    if end == "kill":
        process.send_signal(signal.SIGKILL)
    else:
        process.stdin.close()
    assert process.wait() == (-signal.SIGKILL if end == "kill" else 0)
    with locked(folder):
        assert (folder / LOCK).read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"
        assert refused(folder).code == "E210", "not even the same process twice"
    with locked(folder):
        pass


def test_a_holder_that_could_not_write_its_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with locked(tmp_path):
        assert "in use by another process" in str(refused(tmp_path))


def test_a_folder_that_nothing_came_of_is_gone_again(tmp_path):
    with pytest.raises(ValueError, match="no"), locked(tmp_path / "a/run"):
        raise ValueError("no")
    assert os.listdir(tmp_path / "a") == []
    with locked(tmp_path / "a/run"):
        (tmp_path / "a/run/kept").touch()
    assert sorted(os.listdir(tmp_path / "a/run")) == [LOCK, "kept"]


def test_a_folder_that_was_deleted_meanwhile(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="what happened"), locked(folder):
        (folder / LOCK).unlink()
        folder.rmdir()
        raise ValueError("what happened")


def test_many_at_once_and_one_gets_in(tmp_path):
    """Also while holders delete the empty folder under those who wait at its door."""
    folder, inside, most, errors = tmp_path / "run", [], [], []

    def enter():
        for _ in range(100):
            try:
                with locked(folder):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except ExpertlyError as error:
                errors.append(error.code if error.code == "E210" else str(error))

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert set(errors) <= {"E210"}
    assert len(most) + len(errors) == 300, "no other error ended a thread"


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.EROFS, "E211", r"cannot be written \(read-only file system\). FIX: name a folder"),
        (errno.EACCES, "E211", r"cannot be written \(permission denied\). FIX: name a folder"),
        (errno.ENOSPC, "E401", "disk full"),
    ],
)
def test_a_folder_that_cannot_be_written(number, code, said, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ExpertlyError, match=f"{code}.*{said}"), locked(tmp_path):
        pass


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file", "file/run"):
        with pytest.raises(ExpertlyError, match="E211"), locked(tmp_path / path):
            pass


def test_a_file_system_without_locks_is_no_reason_to_refuse(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path):
        pass
