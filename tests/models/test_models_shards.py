"""Tensors one at a time: what is read and written agrees with safetensors and transformers."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expertly.errors import ExpertlyError
from expertly.models import shards
from expertly.models.shards import Average, Entry, Shards, write_shards

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def saved(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


# --- Reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_read_is_what_safetensors_reads(dtype, tmp_path):
    tensors = {
        "matrix": numbers(7, 5, dtype=dtype),
        "vector": numbers(9, dtype=dtype),
        "stack": numbers(3, 2, 4, dtype=dtype),
        "scalar": torch.tensor(1.5, dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "hollow": torch.empty(3, 0, dtype=dtype),
    }
    read, wanted = Shards(saved(tmp_path, tensors)), load_file(tmp_path / "model.safetensors")
    assert sorted(read.names) == sorted(tensors)
    for name, tensor in wanted.items():
        assert same(read.tensor(name), tensor)
        assert read.entry(name) == Entry(name, dtype, tuple(tensor.shape))
        assert same(torch.cat([*read.blocks(name)]) if tensor.dim() else read.tensor(name), tensor)
    assert same(read.rows("matrix", 2, 5), tensors["matrix"][2:5])
    assert same(read.rows("matrix", 5, 99), tensors["matrix"][5:])
    assert same(read.rows("stack", 1, 2), tensors["stack"][1:2])
    where = torch.tensor([[6, 0, 6], [3, 3, 1]])
    assert same(read.gather("matrix", where), tensors["matrix"][where])


def test_what_was_read_is_the_readers_own(tmp_path):
    folder = saved(tmp_path, {"a": numbers(4, 4)})
    read = Shards(folder).tensor("a")
    before = read.clone()
    (folder / "model.safetensors").write_bytes(
        b"\0" * (folder / "model.safetensors").stat().st_size
    )
    assert torch.equal(read, before), "nothing stays mapped"
    read.zero_()  # and it may be written to


@pytest.mark.parametrize("largest", [1, 5, 12, 35, 36])
def test_blocks_are_a_tensor_in_order(largest, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK", largest)
    tensors = {"matrix": numbers(7, 5), "vector": numbers(9), "stack": numbers(3, 2, 2)}
    read = Shards(saved(tmp_path, tensors))
    for name, tensor in tensors.items():
        parts = [*read.blocks(name)]
        assert same(torch.cat(parts), tensor)
        row = tensor[0].numel()
        assert all(part.numel() <= max(largest, row) for part in parts), "no more than was said"
        assert (len(parts) == 1) == (tensor.numel() <= largest)


def test_the_files_of_an_index_are_one_model(tmp_path):
    saved(tmp_path, {"a": numbers(2)}, "model-00001-of-00002.safetensors")
    saved(tmp_path, {"b": numbers(3)}, "model-00002-of-00002.safetensors")
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    read = Shards(tmp_path)
    assert read.names == ["a", "b"]
    assert same(read.tensor("b"), numbers(3))


def test_a_tensor_that_is_in_two_files_is_refused(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        saved(tmp_path, {"a": numbers(2)}, name)
    with pytest.raises(ExpertlyError, match=r"E301.* a is in 2 of its files"):
        Shards(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_quantised_numbers_are_refused_by_name(dtype, tmp_path):
    saved(tmp_path, {"a": numbers(2), "packed": torch.zeros(2, 2).to(dtype)})
    with pytest.raises(ExpertlyError, match=r"packed is .*, not a plain float") as caught:
        Shards(tmp_path)
    assert caught.value.code == "E306"


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_file_that_changes_after_it_was_opened(harm, tmp_path):
    read = Shards(saved(tmp_path, {"a": numbers(4), "b": numbers(4)}))
    file = tmp_path / "model.safetensors"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-8])
        assert same(read.tensor("a"), numbers(4)), "what is there is read"
    else:
        file.unlink()
    with pytest.raises(ExpertlyError, match=r"E301\] .*model.safetensors: b cannot be read"):
        read.tensor("b")


def test_an_average_is_the_mean_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK", 6)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensors = [numbers(5, 3, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    folders = [saved(tmp_path / str(i), {"a": each}) for i, each in enumerate(tensors)]
    read = Average([Shards(folder) for folder in folders])
    mean = torch.stack([each.double() for each in tensors]).mean(dim=0).float()
    where = torch.tensor([4, 1, 1])
    for found, wanted in (
        (read.tensor("a"), mean),
        (read.rows("a", 3, 9), mean[3:]),
        (read.gather("a", where), mean[where]),
        (torch.cat([*read.blocks("a")]), mean),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


# --- Writing -----------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
entries = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6)


def written(folder, tensors, cuts=1):
    folder.mkdir(exist_ok=True)
    made = [Entry(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()]
    write_shards(folder, made, (iter(each.reshape(-1).chunk(cuts)) for each in tensors.values()))
    return folder


@settings(max_examples=50)
@given(said=entries, cuts=st.integers(1, 3), largest=st.integers(1, 200))
def test_what_is_written_is_what_safetensors_and_we_read(said, cuts, largest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {
        f"t{i}": numbers(*shape, dtype=dtype, seed=i) for i, (shape, dtype) in enumerate(said)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_LARGEST", largest)
        written(folder, tensors, cuts)
    read, found = Shards(folder), {}
    for file in folder.glob("*.safetensors"):
        assert struct.unpack("<Q", file.read_bytes()[:8])[0] % 8 == 0, "data begins on whole words"
        found |= load_file(file)
        held = [tensors[name] for name in load_file(file)]
        assert (
            sum(each.nbytes for each in held) <= largest
            or len([each for each in held if each.nbytes]) == 1
        )
    assert read.names == [*tensors], "in order"
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(found[name], tensor) and same(read.tensor(name), tensor)


def test_several_files_have_an_index_that_transformers_reads(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    total = sum(each.nbytes for each in tensors.values())
    monkeypatch.setattr(shards, "_LARGEST", total // 3)
    written(tmp_path / "ours", tensors)
    model.config.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": total}
    files = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for (name, one), other in zip(model.named_parameters(), opened.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_one_file_has_no_index_and_says_that_it_is_torchs(tmp_path):
    written(tmp_path, {"a": numbers(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (numbers(2, 3, dtype=torch.float16), "torch.float16 in a tensor of torch.float32"),
        (numbers(2, 2), "16 of 24 bytes"),
        (numbers(2, 4), "32 of 24 bytes"),
    ],
    ids=["dtype", "short", "long"],
)
def test_numbers_that_the_header_does_not_say(value, said, tmp_path):
    with pytest.raises(ValueError, match=f"^a: {said}$"):
        write_shards(tmp_path, [Entry("a", torch.float32, (2, 3))], [[value]])


def test_a_part_need_not_be_contiguous(tmp_path):
    tensor = numbers(3, 4)
    write_shards(tmp_path, [Entry("a", torch.float32, (4, 3))], [[tensor.T]])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor.T)


@settings(max_examples=30)
@given(shapes, st.sampled_from(DTYPES))
def test_bytes_of_an_entry(shape, dtype):
    assert Entry("a", dtype, shape).nbytes == torch.empty(shape, dtype=dtype).nbytes


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ([torch.bfloat16, torch.bfloat16], torch.bfloat16),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
    ],
)
def test_an_average_has_the_least_dtype_that_holds_all(dtypes, wanted, tmp_path):
    models = [
        Shards(saved(tmp_path / str(i), {"x": numbers(2, 3, dtype=dtype)}))
        for i, dtype in enumerate(dtypes)
    ]
    assert Average(models).entry("x") == Entry("x", wanted, (2, 3))
    assert [model.folder.name for model in models] == ["0", "1"]
