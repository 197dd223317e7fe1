"""Bad models in sound files (A7 to A13): refused by name, no code or pickle of theirs ever runs."""

import json
import pickle
import shutil

import pytest
from safetensors.torch import load_file, save_file
from trials import LINE

from expertly.folders import save_folder

WEIGHTS = "model.safetensors"
GATE = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w2.weight"


def change(folder, spoil):
    tensors = load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def evil(folder):
    """Code that leaves a canary when it runs, under every name that loaders look for."""
    code = f"open({str(folder / 'canary')!r}, 'w')\nclass C: ...\nclass M: ...\nclass T: ...\n"
    for name in ("evil.py", "configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(code)


# --- A7 to A10: contents -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "said"), [(GATE, f"the router {GATE} is missing"), (EXPERT, f"{EXPERT} is missing")]
)
def test_a7_a_missing_router_or_expert_is_never_random(lost, said, damaged, refused):
    folder = damaged(manifest=False)
    change(folder, lambda tensors: tensors.pop(lost))
    refused(folder, "E301", said)


def test_a7_nor_are_all_of_a_layers_parts(damaged, refused):
    folder = damaged(manifest=False)

    def lose(tensors):
        for name in [name for name in tensors if "layers.1.block_sparse_moe" in name]:
            del tensors[name]

    change(folder, lose)
    refused(folder, "E301", "tensors are missing: 3, first model.layers.1.mlp", ["generate"])


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a8_a_number_that_is_none_is_found_with_any_manifest(bad, manifest, damaged, refused):
    folder = damaged(manifest=False)
    change(folder, lambda tensors: tensors["lm_head.weight"][3, :2].fill_(float(bad)))
    if manifest:  # saved with them: every hash is right
        whole = folder.with_name("sealed")
        save_folder(whole, lambda to: shutil.copytree(folder, to, dirs_exist_ok=True))
        folder = whole
    said = "2 of 9600 numbers in lm_head.weight are NaN or infinite"
    refused(folder, "E301", said, ["generate", "train"])


CONFIGS = [
    ({"num_hidden_layers": 2**63}, "E305", "expected a whole number from 1 to 10000"),
    ({"num_hidden_layers": 9999}, "E301", "config.json says 9999 layers, the weights hold 2"),
    ({"num_hidden_layers": -2}, "E305", "num_hidden_layers is -2, expected a whole number"),
    ({"hidden_size": "32"}, "E305", "hidden_size is '32', expected a whole number"),
    ({"num_attention_heads": 0}, "E305", "num_attention_heads is 0, expected a whole number"),
    ({"rms_norm_eps": -1}, "E305", "rms_norm_eps is -1, expected a number from 0 to 1"),
    ({"rope_theta": float("nan")}, "E305", "rope_theta is nan, expected a number from 1 to"),
    ({"model_type": ["mixtral"]}, "E305", "model_type is ['mixtral'], expected the name"),
    ({"num_experts_per_tok": 9}, "E305", "num_experts_per_tok is 9, but there are 8 experts"),
]


@pytest.mark.parametrize(("changes", "code", "said"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a9_a10_a_value_out_of_range(changes, code, said, damaged, refused, configure):
    folder = damaged(manifest=False)
    configure(folder, **changes)
    verbs = ("inspect", "generate", "train") if code == "E305" else ("inspect", "generate")
    refused(folder, code, said, verbs)


def test_a9_sizes_that_would_take_all_memory_are_not_asked_for(damaged, refused, configure):
    folder = damaged(manifest=False)
    configure(folder, vocab_size=2**27, intermediate_size=2**20)
    refused(folder, "E301", "parameters, the weights hold 5", ["generate"])


# --- A11 to A13: code --------------------------------------------------------------------------

AUTO = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}
CODE = {
    "auto_map": ({"auto_map": AUTO}, None),
    "auto_map needed": ({"auto_map": AUTO, "model_type": "evil"}, "never run. FIX: name a model"),
    "auto_map elsewhere": ({"auto_map": {"AutoConfig": "org/evil--evil.C"}}, None),
    "attention": ({"_attn_implementation": "evil/kernel"}, "expected a name without code"),
    "attention internal": (
        {"_attn_implementation_internal": "evil/kernel:f"},
        "_attn_implementation_internal is 'evil/kernel:f', expected a name without code",
    ),
    "attention public": ({"attn_implementation": "evil/kernel"}, "expected a name without code"),
    "experts": ({"experts_implementation": "evil/kernel"}, "expected a name without code"),
    "attention in parts": ({"attn_implementation": {"": "evil/kernel"}}, "without code"),
    "other weights": ({"transformers_weights": "../evil.safetensors"}, "expected none"),
    "a function": ({"to_dict": "evil"}, "to_dict is the name of a function"),
    "trust": ({"trust_remote_code": True, "auto_map": AUTO}, None),
    "generation": (
        {"custom_generate": "evil", "custom_pipelines": {"x": {"impl": "evil.C"}}},
        None,
    ),
    "architectures": ({"architectures": ["evil.M"]}, None),
}


@pytest.mark.parametrize(("changes", "said"), CODE.values(), ids=CODE)
def test_a11_code_in_the_folder_never_runs(changes, said, damaged, refused, configure, cli):
    folder = damaged(manifest=False)
    evil(folder)
    configure(folder, **changes)
    if said is None:  # ignored: it opens as what it says it is
        assert cli("inspect", folder)[0] == 0
        assert cli("generate", folder, "--max-new-tokens", "1")[0] == 0
        assert not (folder / "canary").exists()
        return
    verbs = ("generate", "train") if "function" in said or "never" in said else ("inspect",)
    refused(folder, "E305", said, {"generate", "train", *verbs})


TOKENIZERS = {
    "class": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}},
    "map": {"auto_map": {"AutoTokenizer": [None, "evil.T"]}},
    "elsewhere": {"auto_map": {"AutoTokenizer": ["org/evil--evil.T", None]}},
}


@pytest.mark.parametrize("changes", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a11_nor_does_a_tokenizers(changes, damaged, cli):
    folder = damaged(manifest=False)
    evil(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    ended, _, err = cli("generate", folder, "--max-new-tokens", "1")
    assert ended in (0, 3), err
    assert ended == 0 or LINE.fullmatch(err.splitlines(keepends=True)[-1])
    assert not (folder / "canary").exists()


class Evil:
    """A pickle that leaves a canary when it is opened."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


PICKLES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", ".metadata")


@pytest.mark.parametrize("name", PICKLES)
def test_a12_a_pickle_is_refused_unopened(name, damaged, refused):
    folder = damaged(manifest=False)
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Evil(folder / "canary")))
    (folder / "__0_0.distcp").write_bytes(b"")
    said = f"{name}: pickled weights can run code. FIX: convert it to safetensors in a sandbox"
    refused(folder, "E310", said)


def test_a12_a_pickle_beside_the_weights_is_left_alone(damaged, cli):
    folder = damaged(manifest=False)
    for name in (*PICKLES, "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Evil(folder / "canary")))
    assert cli("generate", folder, "--max-new-tokens", "1")[0] == 0
    assert not (folder / "canary").exists()


ESCAPE = "{{ cycler.__init__.__globals__.os.system('touch canary') }}"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "several"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ESCAPE, "line 1 reaches for __globals__. FIX: remove or correct the chat template"),
        ("{% if %}", "is not a Jinja template (TemplateSyntaxError"),
        ("{{ " + "(" * 5000, "is not a Jinja template (RecursionError"),
    ],
    ids=["escape", "syntax", "deep"],
)
def test_a13_a_template_is_judged_and_not_run(place, text, said, damaged, refused):
    folder = damaged(manifest=False)
    if place == "chat_template.jinja":
        (folder / place).write_text(text)
    else:
        file = folder / "tokenizer_config.json"
        several = [{"name": "default", "template": "x"}, {"name": "tools", "template": text}]
        said_there = {"chat_template": several if place == "several" else text}
        file.write_text(json.dumps(json.loads(file.read_text()) | said_there))
    refused(folder, "E311", said, ["generate", "train"])
