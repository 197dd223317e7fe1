"""Where routers begin, above all by a recipe's prompts, and what becomes of its specialists."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from expertly.errors import ExpertlyError
from expertly.models.inspect import inspect_folder
from expertly.models.walk import walk
from expertly.receipts import read
from expertly.upcycle.router import router_rows
from expertly.upcycle.rows import fitted_rows
from expertly.upcycle.text import prompt_rows

PROMPTS = (("the cat and the dog", "red tree"), ("another bird sings about rivers",))
WEIGHTS = "model.safetensors"


def changed(folder, change, **keys):
    """Other weights, and other values in config.json."""
    (folder / "MANIFEST.json").unlink(missing_ok=True)
    tensors = {name: change(name, each) for name, each in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


@pytest.fixture
def recipe(dense_folder, tmp_path):
    """recipe(family, **keys) -> a file that merges two specialists of one base beside it."""

    def make(family="llama", **keys):
        for number, name in enumerate(("base", "one", "two")):
            shutil.copytree(dense_folder(family), tmp_path / name)
            changed(tmp_path / name, lambda name, x, n=number: x + 0.01 * n * ("mlp" in name))
        experts = [
            {"source_model": name, "positive_prompts": [*prompts]}
            for name, prompts in zip(("one", "two"), PROMPTS, strict=True)
        ]
        said = {"base_model": "base", "experts": experts, **keys}
        file = tmp_path / "merge.yaml"
        file.write_text(yaml.safe_dump(said))
        return file

    return make


def test_a_merge_says_how_its_routers_begin(recipe, upcycle):
    """Each specialist's feed-forward is an expert, and its prompts' states made its row."""
    made = upcycle(recipe())
    receipt = read(made.folder)
    assert (receipt.changed["method"], receipt.changed["router"]) == ("specialists", "hidden")
    assert [each["path"][-3:] for each in receipt.changed["specialists"]] == ["one", "two"]
    new = load_file(made.folder / WEIGHTS)
    for expert, name in enumerate(("one", "two")):
        old = load_file(made.folder.parent / name / WEIGHTS)
        for layer in range(2):
            stem = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            wanted = old[f"model.layers.{layer}.mlp.down_proj.weight"]
            assert torch.equal(new[f"{stem}.w2.weight"], wanted)


def test_prompts_give_rows_as_if_each_were_read_alone(recipe, prepared):
    job = prepared(recipe())
    said = []
    rows = router_rows(job, said.append)
    texts = [prompt_rows(job, prompts) for prompts in PROMPTS]
    tokens = [sum(map(len, each)) for each in texts]
    assert said[0] == f"router: {sum(tokens)} of {sum(tokens)} tokens of 3 prompts in each layer"
    wanted = torch.eye(2).repeat_interleave(torch.tensor(tokens), dim=0)
    alone = [
        [passed.states for passed in walk(job.dense.shape, job.backbone, [text])]
        for each in texts
        for text in each
    ]
    for layer in range(2):
        states = torch.cat([each[layer] for each in alone])
        torch.testing.assert_close(rows[layer], fitted_rows(states, wanted))


def test_prompts_together_are_about_twice_the_tokens(recipe, prepared):
    file = recipe()
    said, told = yaml.safe_load(file.read_text()), []
    for expert in said["experts"]:
        expert["positive_prompts"] = ["the cat sees the dog " * 40] * 3
    file.write_text(yaml.safe_dump(said))
    router_rows(prepared(file, tokens=200), told.append)
    assert told[0] == "router: 396 of 768 tokens of 6 prompts in each layer"


@pytest.mark.parametrize("router", ["clusters", "zero"])
def test_a_router_beside_prompts_is_refused(recipe, prepared, router):
    with pytest.raises(ExpertlyError, match=r"E202\] router: .*prompts say how .*leave it out"):
        prepared(recipe(), router=router)


@pytest.mark.parametrize("router", ["random", "clusters", "zero"])
def test_without_prompts_the_flag_says_it(recipe, prepared, router):
    assert prepared(recipe(gate_mode="random"), router=router).router == router


def test_an_architecture_that_does_not_fit_is_left_out_of_the_recipe(recipe, prepared):
    said = r"E202\] target qwen3_moe: .*FIX: leave architecture out of the recipe$"
    with pytest.raises(ExpertlyError, match=said):
        prepared(recipe(architecture="qwen3"))
    with pytest.raises(ExpertlyError, match=r"E202\] target olmoe: .*FIX: leave the target out$"):
        prepared("llama", target="olmoe")


# --- Dtypes ------------------------------------------------------------------------------------


def half(folder):
    changed(folder, lambda name, x: x.bfloat16(), dtype="bfloat16")


def test_specialists_in_float32_of_a_half_base_are_not_rounded(recipe, upcycle, tmp_path):
    file = recipe()
    half(tmp_path / "base")
    half(tmp_path / "two")
    made = upcycle(file)
    new, old = load_file(made.folder / WEIGHTS), load_file(tmp_path / "one" / WEIGHTS)
    for name, tensor in new.items():
        assert (tensor.dtype == torch.float32) == ("block_sparse_moe" in name), name
    wanted = old["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(new["model.layers.1.block_sparse_moe.experts.0.w3.weight"], wanted)
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("keys", [{"dtype": "bfloat16"}, {}], ids=["said", "all of them"])
def test_half_precision_where_it_is_said_or_all_have_it(recipe, upcycle, tmp_path, keys):
    file = recipe(backbone="average", **keys)
    for name in ("base", "one", "two") if not keys else ("base",):
        half(tmp_path / name)
    made = upcycle(file, slices=3, num_experts=6, top_k=3)
    assert set(inspect_folder(made.folder).dtypes) == {"BF16"}, "3 slices: it is not exact anyway"


def test_an_average_of_float32_on_a_half_base_is_not_rounded(recipe, upcycle, tmp_path):
    file = recipe(backbone="average")
    half(tmp_path / "base")
    assert set(inspect_folder(upcycle(file).folder).dtypes) == {"F32"}


# --- Damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["base", "average"])
@pytest.mark.parametrize("what", ["mlp.gate_proj", "self_attn.q_proj"])
def test_a_specialist_with_nan_is_named(recipe, upcycle, tmp_path, what, backbone):
    file, name = recipe(gate_mode="random", backbone=backbone), f"model.layers.1.{what}.weight"
    changed(tmp_path / "two", lambda key, x: x * float("nan") if key == name else x)
    if backbone == "base" and "attn" in what:
        upcycle(file)  # which is not read
        return
    with pytest.raises(ExpertlyError) as error:
        upcycle(file)
    said = f"error[E301] {tmp_path / 'two'}: {name} holds NaN or infinity. FIX: copy the model"
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("keys", [{"gate_mode": "random"}, {}], ids=["clusters", "prompts"])
def test_a_base_with_nan_that_routers_are_fitted_to(recipe, upcycle, tmp_path, keys):
    file = recipe(**keys)
    changed(tmp_path / "base", lambda key, x: x * float("nan") if "embed" in key else x)
    with pytest.raises(ExpertlyError, match=r"E301.*base: .*holds NaN"):
        upcycle(file, router="clusters" if keys else "random")
