"""Bad files in a model folder (A1 to A6, A16, A18): one line, its exit code, nothing changed."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys

import pytest
from trials import LINE

from expertly.errors import ExpertlyError
from expertly.folders import MANIFEST, save_folder
from expertly.models.loading import open_model

WEIGHTS = "model.safetensors"
GATE = "model.layers.1.block_sparse_moe.gate.weight"


def edit_header(folder, edit):
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    text = edit(header)
    text = json.dumps(header).encode() if text is None else text
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


# --- A1 to A6: files and headers ---------------------------------------------------------------


def test_a1_a_truncated_shard_says_how_much_is_there(damaged, refused):
    for manifest in (True, False):
        folder = damaged(manifest=manifest)
        whole = (folder / WEIGHTS).read_bytes()
        size = len(whole) // 2
        (folder / WEIGHTS).write_bytes(whole[:size])
        refused(folder, "E301", f"{WEIGHTS}: {size} of {len(whole)} bytes. FIX: copy the f")
        draw = random.Random(0)
        for size in sorted(draw.randrange(len(whole)) for _ in range(100)):
            (folder / WEIGHTS).write_bytes(whole[:size])
            with pytest.raises(ExpertlyError, match="E301"):
                open_model(folder)
        shutil.rmtree(folder)


def flip(folder, at=-1):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[at] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def test_a2_one_bit_is_found_by_its_hash(damaged, refused):
    folder = damaged()
    flip(folder)
    refused(folder, "E302", f"{WEIGHTS}: sha256 mismatch. FIX: copy", ["inspect --verify"])
    with pytest.raises(ExpertlyError, match="E302"):
        open_model(folder, verify=True)
    open_model(folder)  # sizes alone agree, as docs/data.md and SECURITY.md say


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63, 2**64 - 1, 101 * 2**20])
def test_a3_a_header_length_that_lies(length, manifest, damaged, refused):
    folder = damaged(manifest=manifest)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
    refused(folder, "E301", WEIGHTS, ["inspect", "generate"])


def test_a3_to_a5_cost_no_memory(damaged):
    """A 200 MB header, all of it there: the file is not read."""
    folder = damaged(manifest=False)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 200 * 2**20))
        file.truncate(201 * 2**20)
    code = (
        "import resource, sys; from expertly.__main__ import main\n"
        "import expertly.cli.inspect, expertly.models.inspect\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: main()\n"
        "except SystemExit as end:\n"
        "    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "    assert grown < 50_000, grown\n"
        "    raise\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", folder], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert LINE.fullmatch(done.stderr), done.stderr
    assert "a header of 209715200 bytes in a file of" in done.stderr


def move(header):
    header[GATE]["data_offsets"] = [at + 8 for at in header[GATE]["data_offsets"]]


HEADERS = {
    "twice": (lambda header: b'{"a": {}, "a": {}}', "a name is there twice"),
    "overlap or hole": (move, "side by side"),
    "negative": (lambda header: header[GATE].update(shape=[-8, -32]), "impossible shape"),
    "huge": (lambda header: header[GATE].update(shape=[2**63, 2**63]), "not its shape's size"),
    "unknown dtype": (lambda header: header[GATE].update(dtype="PICKLE"), "unknown dtype PICKLE"),
    "no JSON": (lambda header: b"{", "a damaged header"),
    "deep": (lambda header: b"[" * 100_000, "a damaged header"),
}


@pytest.mark.parametrize(("edit", "said"), HEADERS.values(), ids=HEADERS)
def test_a4_headers_that_contradict_themselves(edit, said, damaged, refused):
    folder = damaged(manifest=False)
    edit_header(folder, edit)
    refused(folder, "E301", said, ["inspect", "generate"])


@pytest.fixture
def shards(tiny_model, tiny_tokenizer, tmp_path):
    """Two generations of one model, in shards and with manifests."""
    for name, seed in (("old", 0), ("new", 1)):
        model = tiny_model("mixtral", seed=seed)

        def write(to, model=model):
            model.save_pretrained(to, max_shard_size="90KB")
            tiny_tokenizer.save_pretrained(to)

        save_folder(tmp_path / name, write)
    return tmp_path / "old", tmp_path / "new"


@pytest.mark.parametrize("manifest", [True, False])
def test_a6_a_missing_shard_is_named(manifest, shards, refused):
    folder = shards[0]
    if not manifest:
        (folder / MANIFEST).unlink()
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    refused(folder, "E301", f"{gone.name}: is missing. FIX: copy", ["inspect", "generate"])


def test_a6_a_missing_index_is_named_by_the_manifest(shards, refused):
    (shards[0] / "model.safetensors.index.json").unlink()
    refused(shards[0], "E301", "model.safetensors.index.json: is missing", ["inspect", "generate"])


def test_a18_shards_of_two_generations(shards, refused):
    old, new = shards
    name = sorted(new.glob("*.safetensors"))[0].name
    shutil.copy(old / name, new / name)
    refused(new, "E302", f"{name}: sha256 mismatch", ["inspect --verify"])
    with pytest.raises(ExpertlyError, match="E302"):
        open_model(new, verify=True)


def test_hashes_without_a_manifest_go_on_and_say_so(damaged, caplog):
    open_model(damaged(manifest=False), verify=True)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "no manifest, contents unverified"
    ]


# --- A16: places -------------------------------------------------------------------------------

READ = (
    *(WEIGHTS, "model.safetensors.index.json", MANIFEST, "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "adapter_config.json"),
)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a/b", 3])
def test_a16_an_index_stays_in_its_folder(name, shards, refused):
    folder = shards[0]
    (folder / MANIFEST).unlink()
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder.parent / "outside.safetensors")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][GATE] = name
    file.write_text(json.dumps(index))
    said = "is not a list of this folder's shards. FIX: copy the file again"
    refused(folder, "E301", said, ["inspect", "generate"])


def test_a16_a_manifest_stays_in_its_folder(damaged, refused):
    folder = damaged()
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../../outside"] = {"size": 1, "sha256": "x"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    refused(folder, "E301", "is not a list of this folder's files")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", READ)
def test_a16_a_pipe_in_a_files_place_is_not_waited_for(name, kind, damaged, refused):
    folder = damaged(manifest=False)
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    said = f"{name}: is a {'folder' if kind == 'folder' else 'pipe or device'}, not a file. FIX"
    refused(folder, "E301", said)


def test_a16_links_are_followed_as_the_hubs_cache_is_made_of_them(damaged, cli, tmp_path):
    folder = damaged()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert cli("inspect", folder, "--verify")[0] == 0
    assert cli("generate", folder, "--max-new-tokens", "1")[0] == 0


# --- The command itself ------------------------------------------------------------------------


def test_the_command_says_the_same_in_a_process_of_its_own(damaged):
    folder = damaged()
    flip(folder)
    command = [sys.executable, "-m", "expertly", "inspect", folder, "--verify"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert LINE.fullmatch(done.stderr)
    assert "error[E302]" in done.stderr
