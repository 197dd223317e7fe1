"""How alike experts are: against slow references, and what an upcycled folder's receipt adds."""

import json
import shutil
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from expertly import receipts
from expertly.folders import save_folder, write_json
from expertly.models.adapter_files import base_marks
from expertly.models.attach import attach
from expertly.models.build import build_model, model_config
from expertly.models.layers import moe_layers
from expertly.models.loading import save_model
from expertly.train import loop
from expertly.train.divergence import Divergence, to_dense, to_each_other
from expertly.watch.records import METRICS, ROUTER, read_records

DENSE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


def cosine(a, b):
    return float(torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm()))


def slow(stack, slices):
    groups = [range(first, len(stack), slices) for first in range(slices)]
    pairs = [cosine(stack[a], stack[b]) for group in groups for a, b in combinations(group, 2)]
    return sum(pairs) / len(pairs)


@given(st.integers(1, 3), st.integers(2, 4), st.integers(0, 99))
def test_the_mean_of_all_pairs(slices, copies, seed):
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(slices * copies, 5, 3, generator=generator) + 0.5
    assert to_each_other(stack, slices) == pytest.approx(slow(stack, slices), abs=1e-5)
    assert to_each_other(stack.mT, slices) == pytest.approx(slow(stack, slices), abs=1e-5)
    scaled = stack * torch.rand(len(stack), 1, 1, generator=generator).add(0.5)
    assert to_each_other(scaled, slices) == pytest.approx(slow(stack, slices), abs=1e-5)
    parts = torch.randn(stack.shape, generator=generator)
    mean = sum(map(cosine, stack, parts)) / len(stack)
    assert to_dense(stack, list(parts)) == pytest.approx(mean, abs=1e-5)


def test_equal_experts_and_dead_ones():
    equal = torch.randn(1, 4, 6).expand(8, 4, 6)
    assert to_each_other(equal) == pytest.approx(1, abs=1e-6)
    assert to_each_other(torch.zeros(4, 2, 2)) == 0
    half = torch.cat([equal[:2], torch.zeros(2, 4, 6)])
    assert to_each_other(half) == pytest.approx(1 / 6, abs=1e-6)
    assert to_dense(torch.zeros(1, 2, 2), [torch.ones(2, 2)]) == 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_any_layout(family, tiny_model):
    """Concatenated; transposed and interleaved."""
    model = tiny_model(family)
    found = Divergence(attach(model), "", pytest.fail).measure()
    assert list(found) == ["to_each_other"]
    layers = moe_layers(model)
    assert len(found["to_each_other"]) == len(layers)
    for layer, value in zip(layers, found["to_each_other"], strict=True):
        down = slow(layer.experts.down_proj, 1)
        if family == "gpt_oss":
            up = layer.experts.gate_up_proj
            parts = [up[..., ::2], up[..., 1::2]]
        else:
            parts = layer.experts.gate_up_proj.chunk(2, dim=1)
        expected = (down + sum(slow(part, 1) for part in parts)) / 3
        assert value == pytest.approx(expected, abs=2e-6)


@pytest.fixture
def upcycled(tiny_model, tiny_tokenizer, tmp_path):
    """upcycled(slices) -> a Mixtral folder of 8 experts cut from a Mistral, and the latter's."""

    def make(slices: int, specialists: int = 0):
        dense = [build_model(model_config("mistral", DENSE)) for _ in range(specialists or 1)]
        moe = tiny_model("mixtral", moe_intermediate_size=48 // slices)
        names = [f"dense{number}" for number in range(len(dense))]
        copies = 8 // slices
        with torch.no_grad():
            for number, layer in enumerate(moe_layers(moe)):
                for expert in range(8):
                    copy, part = divmod(expert, slices)
                    mlp = dense[copy if specialists else 0].model.layers[number].mlp
                    gate, up = (
                        getattr(mlp, name).weight.chunk(slices)[part]
                        for name in ("gate_proj", "up_proj")
                    )
                    layer.experts.gate_up_proj[expert] = torch.cat([gate, up])
                    down = mlp.down_proj.weight.chunk(slices, dim=1)[part]
                    layer.experts.down_proj[expert] = down * slices
        for name, model in zip(names, dense, strict=True):
            save_folder(tmp_path / name, lambda to, m=model: save_model(m, to))
        said = [{"path": str(tmp_path / name), **base_marks(tmp_path / name)} for name in names]
        changed = {"copies": copies, "slices": slices, "layers": [0, 1]}
        changed["specialists"] = said if specialists else []
        receipt = receipts.Receipt("upcycle", {"dense": said[0]}, {}, changed, (), {})

        def fill(to):
            save_model(moe, to, tokenizer=tiny_tokenizer)
            receipts.write(receipt, to)

        return save_folder(tmp_path / "moe", fill), moe

    return make


@pytest.mark.parametrize(("slices", "specialists"), [(1, 0), (4, 0), (2, 4)])
def test_an_upcycled_model_knows_its_dense_one(upcycled, slices, specialists):
    folder, moe = upcycled(slices, specialists)
    attachment = attach(moe)
    divergence = Divergence(attachment, str(folder), pytest.fail)
    found = divergence.measure()
    assert found["to_dense"] == [1, 1], "down is scaled, which does not matter"
    if specialists:
        assert all(value < 0.5 for value in found["to_each_other"])
    else:
        assert found["to_each_other"] == [1, 1], "of the same slice"
    with torch.no_grad():
        attachment.layers[1].experts.gate_up_proj[0].normal_()
    first, second = divergence.measure()["to_dense"]
    assert first == 1
    # of 8 experts one has lost two of three matrices, but for chance
    assert second == pytest.approx(1 - 2 / 24, abs=0.02)


def test_all_slices_of_one_copy_have_no_like(upcycled):
    folder, moe = upcycled(8)
    assert list(Divergence(attach(moe), str(folder), pytest.fail).measure()) == ["to_dense"]


def rewritten(folder, **changed):
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["changed"].update(changed)
    write_json(folder / "receipt.json", receipt)


def trained_in_place(folder):
    """The same config.json, other numbers."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_receipt_that_does_not_know_the_weights_is_believed(upcycled):
    folder, moe = upcycled(2)
    receipt = json.loads((folder / "receipt.json").read_text())
    del receipt["inputs"]["dense"]["weights"]
    write_json(folder / "receipt.json", receipt)
    assert Divergence(attach(moe), str(folder), pytest.fail).measure()["to_dense"] == [1, 1]


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda moe: shutil.rmtree(moe.parent / "dense0"), "config.json: cannot be read"),
        (lambda moe: write_json(moe.parent / "dense0" / "config.json", {}), "another than it was"),
        (lambda moe: (moe.parent / "dense0" / "model.safetensors").unlink(), "dense0"),
        (lambda moe: trained_in_place(moe.parent / "dense0"), "its weights are others than they"),
        (lambda moe: rewritten(moe, slices=3), "the receipt says 3 slices"),
        (lambda moe: rewritten(moe, slices=4), "is not what the experts were made of"),
        (lambda moe: rewritten(moe, layers=[0]), "2 layers have experts, not 1"),
        (lambda moe: rewritten(moe, layers=[0, 7]), "layers.7.mlp.gate_proj.weight is not"),
        (lambda moe: rewritten(moe, specialists=[{}]), "the receipt is not as expected"),
    ],
)
def test_what_is_no_longer_there_is_left_out(upcycled, harm, why):
    folder, moe = upcycled(2)
    harm(folder)
    said = []
    found = Divergence(attach(moe), str(folder), said.append).measure()
    assert list(found) == ["to_each_other"]
    assert len(said) == 1 and why in said[0] and "\n" not in said[0]


def test_a_dense_model_that_goes_meanwhile(upcycled):
    folder, moe = upcycled(2)
    said = []
    divergence = Divergence(attach(moe), str(folder), said.append)
    assert len(divergence.measure()) == 2
    (folder.parent / "dense0" / "model.safetensors").unlink()
    for _ in range(2):
        assert list(divergence.measure()) == ["to_each_other"]
    assert len(said) == 1


def test_other_receipts_say_nothing_of_it(upcycled):
    folder, moe = upcycled(1)
    receipt = json.loads((folder / "receipt.json").read_text())
    for text in (json.dumps({**receipt, "job": "train"}), "{"):
        (folder / "receipt.json").write_text(text)
        found = Divergence(attach(moe), str(folder), pytest.fail).measure()
        assert list(found) == ["to_each_other"]


def test_a_run_writes_it_down(upcycled, configure, tmp_path):
    folder, _ = upcycled(2)
    overrides = ["max_steps=6", f"model={{path: {folder}}}", "eval_steps=3"]
    run = loop.run(configure(tmp_path / "run", *overrides))
    told = [record for record in read_records(run.run / METRICS) if "eval" in record]
    assert [record["step"] for record in told] == [0, 3, 6]
    assert receipts.read(run.run).figures["divergence"] == told[-1]["divergence"]
    assert told[0]["divergence"] == {"to_dense": 1, "to_each_other": 1}
    for name in ("to_dense", "to_each_other"):
        values = [record["divergence"][name] for record in told]
        assert values == sorted(values, reverse=True) and values[-1] < 1
        rows = [r["divergence"][name] for r in read_records(run.run / ROUTER) if "divergence" in r]
        assert [len(row) for row in rows] == [2, 2, 2]
        assert sum(rows[-1]) / 2 == pytest.approx(values[-1])
