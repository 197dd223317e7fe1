"""Bad input of every kind: one line, the right exit code, and nothing written anywhere."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertly.errors import ExpertlyError
from expertly.upcycle.room import require_room

LINE = re.compile(r"expertly: error\[(E\d{3})\] [^\n]+: [^\n]+\. FIX: [^\n]+\n")
WEIGHTS = "model.safetensors"


def configured(folder, **changes):
    """Other values in config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def weighed(folder, change):
    """Other tensors in the weights."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def without(*names):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(names)}


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def no_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def quantised(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    weighed(folder, lambda tensors: {**tensors, name: torch.zeros(48, 32).to(torch.int8)})


def misshapen(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    weighed(folder, lambda tensors: {**tensors, name: torch.zeros(47, 32)})


def spare(folder):
    weighed(folder, lambda tensors: {**tensors, "model.layers.0.extra": torch.zeros(3)})


def with_nan(folder):
    name = "model.layers.1.mlp.gate_proj.weight"
    weighed(folder, lambda tensors: {**tensors, name: tensors[name] * float("nan")})


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


FOLDERS = [
    pytest.param(no_tokenizer, "E307", "no tokenizer in it", id="no tokenizer"),
    pytest.param(
        lambda f: configured(f, model_type="gemma2"), "E306", "not a dense make", id="gemma2"
    ),
    pytest.param(
        lambda f: configured(f, model_type="lama"), "E305", "model type `lama`", id="unknown"
    ),
    pytest.param(
        lambda f: configured(f, mlp_bias=True), "E306", "its experts have no biases", id="biases"
    ),
    pytest.param(
        lambda f: configured(f, intermediate_size=64), "E301", "another shape", id="other size"
    ),
    pytest.param(
        lambda f: configured(f, num_hidden_layers=3), "E301", "layers.2.", id="a layer too few"
    ),
    pytest.param(lambda f: (f / "config.json").unlink(), "E305", "config.json", id="no config"),
    pytest.param(pickled, "E310", "pickled weights can run code", id="pickled"),
    pytest.param(lambda f: (f / WEIGHTS).unlink(), "E305", "no *.safetensors", id="no weights"),
    pytest.param(quantised, "E306", "is I8, not a plain float", id="quantised"),
    pytest.param(
        lambda f: weighed(f, without("1.mlp.up_proj.weight")), "E301", "is missing", id="missing"
    ),
    pytest.param(
        lambda f: weighed(f, without("lm_head.weight")), "E301", "lm_head.weight is", id="no head"
    ),
    pytest.param(misshapen, "E301", "1.mlp.up_proj.weight has another shape", id="misshapen"),
    pytest.param(spare, "E301", "model.layers.0.extra has no place", id="one too many"),
    pytest.param(cut, "E301", "bytes", id="cut"),
    pytest.param(with_nan, "E301", "gate_proj.weight holds NaN", id="nan"),
]
FLAGS = [
    ("--slices 2 --top-k 3", "E202", "top_k: 3, expected a multiple of 2"),
    ("--slices 2 --top-k 1", "E202", "top_k: 1, expected a multiple of 2"),
    ("--slices 5", "E202", "slices: 5 do not divide a feed-forward of 48"),
    ("--slices 3 --experts 8", "E202", "num_experts: 8, expected a multiple of 3 slices"),
    ("--experts 4 --top-k 5", "E202", "top_k: 5, but there are 4 experts. FIX: choose at most 4"),
    ("--every 3", "E202", "every: 3, but there are 2 layers"),
    ("--router zero --slices 2", "E202", "router: zero ties all experts"),
    ("--target olmoe", "E202", "target olmoe: qk-norm: none, it has width"),
    ("--target mixtrall", "E202", "'mixtrall' is none of ours. FIX: write mixtral"),
    ("--target mixtral --shared", "E202", "target mixtral: it has no shared expert"),
    ("--drop 1.5", "E202", "drop: must be from 0 to 1"),
    ("--drop-apart", "E202", "drop_apart: says how units are dropped"),
    ("--noise nan", "E202", "noise: got NaN, expected a finite number"),
    ("--data /no/such.txt", "E303", "/no/such.txt"),
    ("--experts 1", "E208", "--experts"),
    ("--tokens 5", "E208", "--tokens"),
    ("--router best", "E208", "--router"),
    ("--drop half", "E208", "--drop"),
    ("--shards 2", "E208", "--shards"),
]
EXITS = {"E2": 2, "E3": 3, "E4": 4}


@pytest.fixture
def refused(cli, tmp_path, text):
    """refused(model, code, said, *flags): one line, the code's exit, and nothing written."""

    def check(model, code, said, *flags, out="moe"):
        before = sorted(tmp_path.rglob("*"))
        given = () if "--data" in flags else ("--data", text)
        ended, stdout, stderr = cli("upcycle", model, tmp_path / out, *given, *flags)
        *told, last = stderr.splitlines(keepends=True)
        assert LINE.fullmatch(last), stderr
        assert (LINE.fullmatch(last)[1], ended, stdout) == (code, EXITS[code[:2]], ""), stderr
        assert said in last
        assert not any("error" in line or "Warning" in line for line in told), stderr
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize(("spoil", "code", "said"), FOLDERS)
def test_a_bad_folder(spoil, code, said, dense_folder, refused, tmp_path):
    folder = shutil.copytree(dense_folder("llama"), tmp_path / "dense")
    (folder / "MANIFEST.json").unlink()
    spoil(folder)
    refused(folder, code, said)


@pytest.mark.parametrize(("flags", "code", "said"), FLAGS, ids=[flags for flags, *_ in FLAGS])
def test_bad_flags(flags, code, said, dense_folder, refused):
    refused(dense_folder("llama"), code, said, *flags.split())


def test_an_moe_given_as_dense(tiny_folder, upcycled, refused):
    refused(tiny_folder("mixtral"), "E306", "model_type 'mixtral': an MoE already")
    refused(upcycled("llama").folder, "E306", "an MoE already, expected a dense model")


def test_what_is_no_model_folder(dense_folder, refused, tmp_path):
    refused(tmp_path / "no", "E305", "no such folder")
    refused("nobody/nothing", "E305", "FIX: hf download nobody/nothing")
    refused(dense_folder("llama") / WEIGHTS, "E305", "expected a model's folder, or a recipe")
    refused(dense_folder("llama") / "config.json", "E305", "FIX: name the folder that it is in")


def test_names_that_no_file_can_have(dense_folder, refused):
    refused("x" * 5000, "E305", "file name too long. FIX: correct it")
    refused(dense_folder("llama"), "E401", "file name too long", out="x" * 300)


def test_an_output_without_room_is_refused_before_any_work(dense_folder, refused, monkeypatch):
    monkeypatch.setattr("expertly.upcycle.run.text_rows", lambda *_, **__: pytest.fail("too late"))
    for have in (0, 9000):
        disk = SimpleNamespace(free=have)
        monkeypatch.setattr("expertly.upcycle.room.shutil.disk_usage", lambda _, d=disk: d)
        refused(dense_folder("llama"), "E401", "disk full: need ", out="a/b/moe")


def test_an_output_where_one_may_not_write(dense_folder, refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused(dense_folder("llama"), "E401", "not a directory", out="file/moe")
    monkeypatch.setattr("expertly.upcycle.room.os.access", lambda *_: False)
    with pytest.raises(ExpertlyError, match=r"E401.*permission denied. FIX: name an output folder"):
        require_room(tmp_path / "moe", 1)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling"])
def test_an_output_that_is_there(kind, dense_folder, refused, tmp_path):
    target = tmp_path / "moe"
    if kind == "dangling":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir() if kind == "folder" else target.write_text("mine")
    refused(dense_folder("llama"), "E205", "exists already")


def test_a_damaged_byte_is_seen_by_the_manifest(dense_folder, refused, tmp_path):
    folder = shutil.copytree(dense_folder("llama"), tmp_path / "dense")
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "E302", "sha256 mismatch")


def test_no_text_and_a_tokenizer_of_another_model(dense_folder, refused, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    refused(dense_folder("llama"), "E303", "no readable text", "--data", tmp_path / "empty.txt")
    refused(dense_folder("llama", vocab_size=40), "E202", "tokenizer: it makes token")


# --- What is set up ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, (8, 2, 8, 48)),
        ({"slices": 4}, (32, 8, 8, 12)),
        ({"slices": 4, "num_experts": 4}, (4, 4, 1, 12)),
        ({"num_experts": 1}, (1, 1, 1, 48)),
        ({"num_experts": 6, "top_k": 6}, (6, 6, 6, 48)),
        ({"slices": 48, "num_experts": 96, "top_k": 48}, (96, 48, 2, 1)),
    ],
)
def test_sizes(config, wanted, prepared):
    job = prepared("llama", **config)
    assert (job.num_experts, job.top_k, job.copies, job.width) == wanted
    assert (job.shape.num_local_experts, job.shape.num_experts_per_tok) == wanted[:2]
    assert job.shape.intermediate_size == job.width


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (5, [4])])
def test_experts_in_every_nth_layer(every, layers, prepared):
    job = prepared("llama", keys={"num_hidden_layers": 5}, every=every)
    assert job.moe_layers == layers


def test_what_is_exact(prepared):
    assert prepared("llama").exact and prepared("llama", slices=2).exact
    assert not prepared("llama", drop=0.5).exact
    assert not prepared("llama", noise=0.1).exact


def test_rope_and_a_window_that_llama_ignores_are_taken_over_as_they_work(
    dense_folder, prepared, tmp_path
):
    rope = {"rope_type": "linear", "rope_theta": 777.0, "factor": 2.0}
    folder = shutil.copytree(dense_folder("llama"), tmp_path / "dense")
    (folder / "MANIFEST.json").unlink()
    configured(folder, rope_parameters=rope, sliding_window=16, rms_norm_eps=0.01)
    shape = prepared(folder).shape
    assert shape.rope_parameters == rope
    assert (shape.sliding_window, shape.rms_norm_eps) == (None, 0.01)


def test_a_link_to_a_folder_and_one_with_a_tied_head_left_in(dense_folder, prepared, tmp_path):
    folder = shutil.copytree(dense_folder("llama", tie_word_embeddings=True), tmp_path / "dense")
    (folder / "MANIFEST.json").unlink()
    weighed(
        folder,
        lambda t: {
            **t,
            "lm_head.weight": t["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    (tmp_path / "link").symlink_to(folder)
    job = prepared(tmp_path / "link")
    assert not {"lm_head.weight"} & {*job.dense.names}
    assert job.dense.head == "model.embed_tokens.weight"
    assert not [name for name in job.dense.names if "inv_freq" in name]


def test_specialists_of_another_size_are_refused_by_name(dense_folder, prepared):
    from expertly.upcycle.dense import open_like

    base = prepared("llama").dense
    assert open_like(dense_folder("llama"), base).names == base.names
    with pytest.raises(ExpertlyError, match=r"E305.*intermediate_size is 64, the base.s 48"):
        open_like(dense_folder("llama", intermediate_size=64), base)
    with pytest.raises(ExpertlyError, match=r"E305.*model_type is mistral, the base.s llama"):
        open_like(dense_folder("mistral"), base)
