"""Folders: complete under their final name or absent, and nothing forgotten beside them."""

import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertly.errors import ExpertlyError
from expertly.folders import (
    MANIFEST,
    disk_error,
    read_json,
    remove_folder,
    save_file,
    save_folder,
    verify,
    write_json,
)

HOST = socket.gethostname()


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(range(64)))
    (folder / "expertly").mkdir()
    (folder / "expertly" / "state.json").write_text("{}")
    (folder / "empty").touch()


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_folder(tmp_path / "checkpoint-1", fill)


def refused(code: str, call, *arguments, **options) -> str:
    with pytest.raises(ExpertlyError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code
    assert caught.value.exit_code == int(code[1])
    return str(caught.value)


def hidden(name: str, pid: int, host: str = HOST) -> str:
    return f".{name}.{host}.{pid}.tmp"


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# --- save


def test_a_saved_folder_verifies_and_stands_alone(tmp_path, saved):
    assert verify(saved)
    assert verify(saved, hashes=False)
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    listed = read_json(saved / MANIFEST)["files"]
    assert sorted(listed) == ["empty", "expertly/state.json", "weights"]
    assert listed["weights"]["size"] == 64


def test_parents_are_made(tmp_path):
    assert verify(save_folder(tmp_path / "a" / "b" / "c", fill))


def test_nothing_is_overwritten(tmp_path, saved):
    text = refused("E205", save_folder, saved, pytest.fail)
    assert text == f"error[E205] {saved}: exists already. FIX: name a new folder"
    (tmp_path / "link").symlink_to("nowhere")
    refused("E205", save_folder, tmp_path / "link", pytest.fail)


def test_another_save_that_was_faster_wins(tmp_path):
    def slow(folder: Path) -> None:
        fill(folder)
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out")

    refused("E205", save_folder, tmp_path / "out", slow)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_writer_that_raises_leaves_nothing_behind(tmp_path, error):
    def write(folder: Path) -> None:
        fill(folder)
        raise error

    with pytest.raises(error):
        save_folder(tmp_path / "out", write)
    assert os.listdir(tmp_path) == []


@given(
    files=st.lists(st.sampled_from(["a", "b", "c/d", "c/e/f"]), unique=True),
    code=st.sampled_from([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES]),
)
@settings(max_examples=20, deadline=None)
def test_a_disk_that_refuses_leaves_nothing_behind(files, code, tmp_path_factory):
    parent = tmp_path_factory.mktemp("disk")

    def write(folder: Path) -> None:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        raise OSError(code, os.strerror(code))

    text = refused("E401", save_folder, parent / "out", write)
    why = "disk full: have " if code in (errno.ENOSPC, errno.EDQUOT) else os.strerror(code).lower()
    assert text.startswith(f"error[E401] {parent / 'out'}: {why}")
    assert ". FIX: " in text
    assert ("may write to" in text) == (code in (errno.EROFS, errno.EACCES))
    assert os.listdir(parent) == []


def test_a_full_disk_under_safetensors(tmp_path):
    code = f"""
import resource, numpy
from pathlib import Path
from safetensors.numpy import save_file
from expertly.folders import save_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
target = Path({str(tmp_path / "out")!r})
save_folder(target, lambda folder: save_file({{"a": numpy.zeros(999)}}, folder / "a"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "error[E401]" in done.stderr.splitlines()[-1]
    assert "file too large. FIX: raise the limit on file sizes" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_disk_error_without_a_number():
    assert str(disk_error(Path("a"), OSError("odd"))).startswith("error[E401] a: odd. FIX: free")


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    refused("E401", save_folder, tmp_path / "file" / "out", fill)


def test_modes_follow_the_umask(tmp_path):
    def private(folder: Path) -> None:
        fill(folder)
        (folder / "weights").chmod(0o600)  # as safetensors does

    before = os.umask(0o027)
    try:
        saved = save_folder(tmp_path / "out", private)
    finally:
        os.umask(before)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o750
    for file in ("weights", "empty", "expertly/state.json", MANIFEST):
        assert stat.S_IMODE((saved / file).stat().st_mode) == 0o640


def test_a_copied_manifest_is_written_anew(tmp_path, saved):
    def copy(folder: Path) -> None:
        (folder / "weights").write_bytes(b"other")
        (folder / MANIFEST).write_bytes((saved / MANIFEST).read_bytes())

    assert verify(save_folder(tmp_path / "copy", copy))
    assert list(read_json(tmp_path / "copy" / MANIFEST)["files"]) == ["weights"]


def test_everything_is_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    steps = []
    sync, rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def renamed(source: Path, target: Path) -> None:
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    save_folder(tmp_path / "new" / "out", fill)
    base = str(tmp_path / "new" / hidden("out", os.getpid()))
    assert steps[0] == str(tmp_path)  # so that "new" itself lasts
    middle = steps[1 : steps.index("rename")]
    inside = ["empty", "expertly/state.json", "weights", MANIFEST, "expertly"]
    assert middle == [*(f"{base}/{name}" for name in inside), base]
    assert steps[-2:] == ["rename", str(tmp_path / "new")]


def test_save_file_replaces_in_one_rename(tmp_path):
    save_file(tmp_path / "new" / "a.yaml", "old")
    assert save_file(tmp_path / "new" / "a.yaml", "newer").read_text() == "newer"
    assert os.listdir(tmp_path / "new") == ["a.yaml"]


def test_save_file_keeps_the_old_text_when_the_disk_refuses(tmp_path, monkeypatch):
    save_file(tmp_path / "a", "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    refused("E401", save_file, tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


# --- killed


@pytest.mark.parametrize("stage", ["write", "manifest", "sync", "rename"])
def test_kill_in_the_middle_and_save_again(tmp_path, stage):
    target = tmp_path / "checkpoint-7"
    code = f"""
import os, sys, time
from pathlib import Path
from expertly import folders

def stop(*_):
    print("here", flush=True)
    time.sleep(60)

def fill(folder):
    (folder / "a").write_text("a")
    if {stage!r} == "write":
        stop()

if {stage!r} == "manifest":
    folders.write_json = stop
elif {stage!r} == "sync":
    os.fsync = stop
elif {stage!r} == "rename":
    os.rename = stop
folders.save_folder(Path({str(target)!r}), fill)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "here\n"
    left = hidden("checkpoint-7", child.pid)
    assert os.listdir(tmp_path) == [left]
    save_folder(tmp_path / "checkpoint-8", fill)  # its owner is alive: not ours to clean
    assert sorted(os.listdir(tmp_path)) == [left, "checkpoint-8"]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not target.exists()
    assert verify(save_folder(target, fill))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-7", "checkpoint-8"]


def test_kill_at_random_times_never_shows_half_a_folder(tmp_path):
    code = f"""
from pathlib import Path
from expertly.folders import remove_folder, save_folder
def fill(folder):
    for index in range(20):
        (folder / str(index)).write_bytes(bytes(10_000))
print("here", flush=True)
for number in range(10**9):
    save_folder(Path({str(tmp_path)!r}) / f"checkpoint-{{number}}", fill)
    if number >= 2:
        remove_folder(Path({str(tmp_path)!r}) / f"checkpoint-{{number - 2}}")
"""
    for round_ in range(5):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.02 + 0.031 * round_)
        child.kill()
        child.wait()
        child.stdout.close()
        for folder in tmp_path.glob("checkpoint-*"):
            assert verify(folder)
            remove_folder(folder)
    save_folder(tmp_path / "last", fill)
    assert os.listdir(tmp_path) == ["last"]


def test_only_what_the_dead_left_is_swept(tmp_path):
    dead = dead_pid()
    gone = [hidden("checkpoint-3", dead), hidden("config.yaml", dead)]
    (tmp_path / gone[0] / "deep").mkdir(parents=True)
    (tmp_path / gone[1]).touch()
    kept = [
        hidden("checkpoint-3", os.getppid()),
        hidden("checkpoint-3", 1),
        hidden("checkpoint-3", dead, "another-host"),
        f".checkpoint-3.{dead}.tmp",
        f"checkpoint-3.{HOST}.{dead}.tmp",
        hidden("checkpoint-3", dead) + "x",
        hidden("checkpoint-3", 10**12),
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    save_folder(tmp_path / "out", fill)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "out"])


def test_a_leftover_of_our_own_number_is_in_nobodys_way(tmp_path):
    (tmp_path / hidden("out", os.getpid())).mkdir()
    (tmp_path / hidden("out", os.getpid()) / "stale").touch()
    saved = save_folder(tmp_path / "out", fill)
    assert not (saved / "stale").exists()


# --- remove


def test_remove(tmp_path, saved):
    remove_folder(saved)
    remove_folder(saved)  # gone already
    remove_folder(tmp_path / "never" / "there")
    assert os.listdir(tmp_path) == []


def test_of_a_link_only_the_link_goes(tmp_path, saved):
    (tmp_path / "link").symlink_to(saved)
    remove_folder(tmp_path / "link")
    assert verify(saved)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_a_folder_is_renamed_before_it_is_deleted(tmp_path, saved, monkeypatch):
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EIO, "io")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    refused("E401", remove_folder, saved)
    assert os.listdir(tmp_path) == [hidden("checkpoint-1", os.getpid())]


# --- verify


def test_a_folder_without_a_manifest_is_unverified(tmp_path):
    assert verify(tmp_path) is False


@given(position=st.integers(0, 63), bit=st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_any_flipped_bit_is_found(position, bit, tmp_path_factory):
    saved = save_folder(tmp_path_factory.mktemp("flip") / "out", fill)
    data = bytearray((saved / "weights").read_bytes())
    data[position] ^= 1 << bit
    (saved / "weights").write_bytes(data)
    text = refused("E302", verify, saved)
    assert text.startswith(
        f"error[E302] {saved / 'weights'}: sha256 mismatch. FIX: copy the folder"
    )


@given(size=st.integers(0, 63))
@settings(max_examples=20, deadline=None)
def test_any_truncation_is_found_even_without_hashes(size, tmp_path_factory):
    saved = save_folder(tmp_path_factory.mktemp("cut") / "out", fill)
    os.truncate(saved / "weights", size)
    for hashes in (True, False):
        assert f"weights: {size} of 64 bytes. FIX" in refused("E301", verify, saved, hashes=hashes)


@given(position=st.integers(0), flip=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_damaged_manifest_never_crashes(position, flip, tmp_path_factory):
    saved = save_folder(tmp_path_factory.mktemp("manifest") / "out", fill)
    data = bytearray((saved / MANIFEST).read_bytes())
    data[position % len(data)] ^= flip
    (saved / MANIFEST).write_bytes(data)
    try:
        assert verify(saved)  # a space for a tab does no harm
    except ExpertlyError as error:
        assert error.code in ("E301", "E302")


@pytest.mark.parametrize("name", ["weights", "empty"])
@pytest.mark.parametrize("hashes", [True, False])
def test_a_missing_file(saved, name, hashes):
    (saved / name).unlink()
    text = refused("E301", verify, saved, hashes=hashes)
    assert f"{name}: is missing. FIX: copy the folder again" in text


def test_a_pipe_in_place_of_a_file_does_not_hang(saved):
    (saved / "empty").unlink()
    os.mkfifo(saved / "empty")
    assert "empty: is missing" in refused("E301", verify, saved)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_leaves_its_folder(saved, name):
    write_json(saved / MANIFEST, {"files": {name: {"size": 0, "sha256": ""}}})
    assert "is not a list of this folder's files" in refused("E301", verify, saved)


@pytest.mark.parametrize(
    "value", [{}, {"files": []}, {"files": {"weights": 3}}, {"files": {"weights": {"size": 64}}}]
)
def test_a_manifest_of_another_shape(saved, value):
    write_json(saved / MANIFEST, value)
    assert "is not a list of this folder's files" in refused("E301", verify, saved)


def test_a_file_that_cannot_be_read(saved):
    name = "x" * 300
    write_json(saved / MANIFEST, {"files": {name: {"size": 0, "sha256": ""}}})
    assert "cannot be read (file name too long)" in refused("E301", verify, saved)


def test_a_link_into_a_download_cache_verifies(tmp_path, saved):
    os.rename(saved / "weights", tmp_path / "blob")
    (saved / "weights").symlink_to(tmp_path / "blob")
    assert verify(saved)


# --- JSON


@pytest.mark.parametrize("text", ["", "{", "\xff", '{"a": ' * 100_000, "1" * 5000])
def test_json_that_cannot_be_read(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    found = refused("E301", read_json, tmp_path / "a.json")
    assert found.startswith(f"error[E301] {tmp_path / 'a.json'}: cannot be read (")
    assert "\n" not in found


def test_json_that_is_missing_or_no_object(tmp_path):
    assert "cannot be read" in refused("E301", read_json, tmp_path / "no.json")
    (tmp_path / "a.json").write_text("[]")
    assert "is not a JSON object" in refused("E301", read_json, tmp_path / "a.json")


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, "é"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, "é"]}
    assert read_json(tmp_path / "a.json") == {"a": [1, "é"]}
