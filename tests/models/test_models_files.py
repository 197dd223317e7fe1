"""A model folder's files: whatever they hold becomes a value or an ExpertlyError, quickly."""

import json
import shutil
import struct
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from expertly.errors import ExpertlyError
from expertly.folders import MANIFEST
from expertly.models.files import (
    check_layers,
    check_manifest,
    read_header,
    read_headers,
    weight_files,
)

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "model.safetensors"


def write(place, header, data=24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    place.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * data)
    return place


def refused(place):
    with pytest.raises(ExpertlyError) as error:
        read_header(place)
    assert error.value.code == "E301"
    assert len(str(error.value)) < 600
    return str(error.value)


def test_a_sound_header_is_read(place):
    tensors = {
        "a": torch.zeros(2, 3),
        "b.c": torch.zeros(5, dtype=torch.bfloat16),
        "s": torch.ones(()),
    }
    save_file(tensors, place, metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in read_header(place)}
    assert found.keys() == tensors.keys()
    assert (found["a"].dtype, found["a"].shape, found["a"].size) == ("F32", (2, 3), 24)
    assert [found[name].parameters for name in ("a", "b.c", "s")] == [6, 5, 1]
    assert (found["b.c"].dtype, found["b.c"].size) == ("BF16", 10)


def test_an_empty_file_of_tensors_is_sound(place):
    assert read_header(write(place, {"__metadata__": {"format": "pt"}}, data=0)) == []


@pytest.mark.parametrize(
    ("header", "said"),
    [
        pytest.param({"a": {**ENTRY, "data_offsets": [-24, 0]}}, "impossible", id="negative"),
        pytest.param({"a": {**ENTRY, "data_offsets": [24, 0]}}, "bytes", id="backwards"),
        pytest.param({"a": {**ENTRY, "data_offsets": [0, 48]}}, "bytes", id="beyond the end"),
        pytest.param({"a": {**ENTRY, "data_offsets": [0]}}, "damaged", id="one offset"),
        pytest.param({"a": {**ENTRY, "data_offsets": [0.0, 24.0]}}, "impossible", id="floats"),
        pytest.param({"a": {**ENTRY, "data_offsets": "ab"}}, "impossible", id="text"),
        pytest.param({"a": {**ENTRY, "shape": [-2, -3]}}, "impossible", id="negative shape"),
        pytest.param({"a": {**ENTRY, "shape": [2**63, 2**63]}}, "size", id="huge shape"),
        pytest.param({"a": {**ENTRY, "shape": [True, 6]}}, "impossible", id="bool shape"),
        pytest.param({"a": {**ENTRY, "shape": [1] * 65}}, "impossible", id="65 axes"),
        pytest.param({"a": {**ENTRY, "shape": None}}, "damaged", id="no shape"),
        pytest.param({"a": {**ENTRY, "shape": {"2": 3}}}, "impossible", id="shape is a mapping"),
        pytest.param({"a": {**ENTRY, "dtype": "PICKLE"}}, "unknown dtype", id="dtype"),
        pytest.param({"a": {**ENTRY, "dtype": ["F32"]}}, "damaged", id="dtype is a list"),
        pytest.param({"a": {"shape": [2]}}, "damaged", id="keys missing"),
        pytest.param({"a": None}, "damaged", id="null"),
        pytest.param({"a": ENTRY, "b": ENTRY}, "side by side", id="overlap"),
        pytest.param([1], "damaged", id="a list"),
        pytest.param(b"{", "damaged", id="not JSON"),
        pytest.param(b"\xff\xfe", "damaged", id="not text"),
        pytest.param(b"[" * 100_000, "damaged", id="deep"),
        pytest.param(b'{"a": {}, "a": {}}', "twice", id="twice"),
        pytest.param(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}", "", id="a very long number"),
    ],
)
def test_a_header_that_lies_is_one_line(header, said, place):
    assert said in refused(write(place, header))


def test_holes_and_tails_are_refused(place):
    later = {**ENTRY, "data_offsets": [8, 32]}
    assert "hole" in refused(write(place, {"a": later}, data=32))
    far = {**ENTRY, "data_offsets": [28, 52]}
    assert "side by side" in refused(write(place, {"a": ENTRY, "b": far}, data=52))
    assert "of" in refused(write(place, {"a": ENTRY}, data=25))


def test_a_truncated_file_says_how_much_is_there(place):
    save_file({"a": torch.zeros(100)}, place)
    whole = place.read_bytes()
    for size in range(0, len(whole), 7):
        place.write_bytes(whole[:size])
        told = refused(place)
    assert f"of {len(whole)} bytes" in told


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 101 * 2**20, 0, 1])
def test_a_length_that_lies_costs_nothing(length, place):
    place.write_bytes(struct.pack("<Q", length) + b"{}" * 20)
    started = time.monotonic()
    refused(place)
    assert time.monotonic() - started < 0.5


def test_a_missing_file_is_one_line(tmp_path):
    refused(tmp_path / "nothing.safetensors")
    refused(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": JSON | st.sampled_from(["F32", "BF16", "I8"]),
        "shape": JSON | st.lists(st.integers(-3, 2**70), max_size=4),
        "data_offsets": JSON | st.lists(st.integers(-3, 2**70), min_size=2, max_size=2),
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.text(max_size=4), st.just(ENTRY) | FIELDS | JSON, max_size=3) | JSON)
@example({"__metadata__": 3})
def test_no_header_raises_anything_else(place, header):
    try:
        read_header(write(place, header))
    except ExpertlyError as error:
        assert error.code == "E301"


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=80), st.integers(0, 200))
def test_no_bytes_raise_anything_else(place, noise, at):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, place)
    content = bytearray(place.read_bytes())
    content[at : at + len(noise)] = noise
    place.write_bytes(content)
    try:
        read_header(place)
    except ExpertlyError as error:
        assert error.code == "E301"


# --- Weight files ------------------------------------------------------------------------------


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_those_of_the_index(tmp_path):
    for name in ("b.safetensors", "a.safetensors", "consolidated.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    index(tmp_path, {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"})
    assert [f.name for f in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert [f.name for f in weight_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize(
    "weight_map",
    [
        {"x": "../evil.safetensors"},
        {"x": "/etc/passwd"},
        {"x": 3},
        {"x": "missing.safetensors"},
        {"x": ""},
        [],
        None,
    ],
)
def test_an_index_that_lies_is_refused(weight_map, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path.parent / "evil.safetensors")
    index(tmp_path, weight_map)
    with pytest.raises(ExpertlyError) as error:
        weight_files(tmp_path)
    assert error.value.code == "E301"


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.pt",
        "consolidated.00.pth",
        "last.ckpt",
        ".metadata",
        "model.pkl",
    ],
)
def test_pickles_alone_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ExpertlyError, match="sandbox") as error:
        weight_files(tmp_path)
    assert error.value.code == "E310"


def test_nothing_at_all_is_no_model(tmp_path):
    with pytest.raises(ExpertlyError) as error:
        weight_files(tmp_path)
    assert error.value.code == "E305"


def test_an_adapter_is_no_whole_model(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "../evil"}')
    with pytest.raises(ExpertlyError, match="FIX: merge the adapter") as error:
        weight_files(tmp_path)
    assert error.value.code == "E305"


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1), name: torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ExpertlyError, match="x is in 2 of its files") as error:
        read_headers(tmp_path)
    assert error.value.code == "E301"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_manifest_that_leaves_a_file_out_vouches_for_nothing(name, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("mixtral"), tmp_path / "copy")
    assert check_manifest(folder, hashes=True)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][name]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ExpertlyError, match="is not in the folder's MANIFEST") as error:
        check_manifest(folder, hashes=False)
    assert (error.value.code, error.value.what) == ("E301", str(folder / name))
    (folder / MANIFEST).unlink()
    assert not check_manifest(folder, hashes=True)


def test_packed_weights_may_be_many(place):
    save_file({"q": torch.zeros(2, 4, dtype=torch.int32), "s": torch.zeros(2)}, place)
    assert {tensor.name: tensor.weights for tensor in read_header(place)} == {"q": 128, "s": 2}


# --- What config.json promises -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "changes", "said"),
    [
        ("layers.1.block_sparse_moe.gate", {}, "the router model.layers.1.block_sparse_moe.gate"),
        ("layers.1.block_sparse_moe.experts.3.w1", {}, "experts.3.w1.weight is missing"),
        ("layers.1", {}, "config.json says 2 layers, the weights hold 1"),
        ("nothing", {"num_hidden_layers": 9_999}, "says 9999 layers, the weights hold 2"),
        ("nothing", {"num_local_experts": 7}, "config.json says 7 experts"),
    ],
)
def test_what_is_promised_must_be_there(lost, changes, said, tiny_folder):
    folder = tiny_folder("mixtral")
    tensors = [tensor for tensor in read_headers(folder) if lost not in tensor.name]
    config = json.loads((folder / "config.json").read_text()) | changes
    with pytest.raises(ExpertlyError) as error:
        check_layers(folder, config, tensors)
    assert error.value.code == "E301"
    assert said in error.value.why


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "switch_transformers", "num_layers": 2}, "encoder.block.0.layer.0.x"),
        ({"model_type": "nemotron_h", "layers_block_type": ["mlp", "mlp"]}, "model.layers.0.x"),
    ],
)
def test_layers_are_counted_under_every_familys_names(config, name, place):
    save_file({name: torch.zeros(1)}, place)
    with pytest.raises(ExpertlyError, match="says 2 layers, the weights hold 1"):
        check_layers(place.parent, config, read_header(place))


def test_a_dense_model_promises_layers_alone(tiny_folder):
    tensors = read_headers(tiny_folder("mixtral"))
    check_layers(tiny_folder("mixtral"), {"model_type": "x", "num_hidden_layers": 2}, tensors)
    check_layers(tiny_folder("mixtral"), {"model_type": "x"}, tensors)
