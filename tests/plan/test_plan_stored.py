"""What a quantization_config says, as far as it is read; what is not is noted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertly.plan.counted import shape_of_counts
from expertly.plan.known import known, shape_of
from expertly.plan.precision import QUANTISABLE, precision
from expertly.plan.reading import read_shape
from expertly.plan.shape import PARTS
from expertly.plan.stored import stored_as

PLAIN = {"dtype": "float16"}


def compressed(**weights):
    group = {"targets": ["Linear"], "weights": weights}
    other = {"targets": ["Embedding"], "weights": {"num_bits": 8, "type": "int"}}
    groups = {"config_groups": {"group_0": group, "group_1": other}}
    return {"quant_method": "compressed-tensors", **groups, "ignore": ["lm_head", "re:.*gate$"]}


READ = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "fbgemm_fp8"}, "fp8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 64}, "int3g64"),
    ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8"),
    ({"quant_method": "awq", "bits": 4, "group_size": 32}, "int4g32"),
    ({"quant_method": "exl2", "bits": 4.65}, "int4.65"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4g64"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
    (compressed(num_bits=4, type="int", group_size=128, strategy="group"), "int4"),
    (compressed(num_bits=4, type="int", group_size=32, strategy="group"), "int4g32"),
    (compressed(num_bits=8, type="int", group_size=None, strategy="channel"), "int8"),
    (compressed(num_bits=8, type="float", strategy="tensor"), "fp8"),
    (compressed(num_bits=4, type="float", group_size=32), "mxfp4"),
]


@pytest.mark.parametrize(("said", "name"), READ)
def test_quantizers_reach_attention_and_feed_forwards_alone(said, name):
    found = stored_as({**PLAIN, "quantization_config": said})
    assert found.notes == ()
    assert {part: found.formats[part] for part in QUANTISABLE} == dict.fromkeys(QUANTISABLE, name)
    assert {found.formats[part] for part in set(PARTS) - set(QUANTISABLE)} == {"fp16"}


def test_mxfp4_as_gpt_oss_has_it_is_of_the_experts_alone():
    formats = stored_as({"quantization_config": {"quant_method": "mxfp4"}}).formats
    assert formats == {part: "mxfp4" if part == "experts" else "bf16" for part in PARTS}


UNREAD = [
    ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "'aqlm'"),
    ({"quant_method": "gptq", "bits": "4"}, "'gptq'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 99_999}, "'gptq'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, "'gptq'"),
    ({"quant_method": "gptq", "bits": 10**400}, "'gptq'"),
    ({"bits": float("nan")}, "without a method"),
    ({"bits": True}, "without a method"),
    ({"quant_method": "x" * 500}, "'" + "x" * 40 + "'"),
    (compressed(num_bits=4, type="float", group_size=16), "'compressed-tensors'"),
    ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "'compressed-tensors'"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": 3}}, "'compressed-tensors'"),
    ("fp8", "'fp8'"),
]


@pytest.mark.parametrize(("said", "name"), UNREAD)
def test_what_is_not_read_is_counted_as_the_base_and_noted(said, name):
    found = stored_as({**PLAIN, "quantization_config": said})
    assert set(found.formats.values()) == {"fp16"}
    assert found.notes == (f"quantization {name} is not read: counted as fp16",)


@pytest.mark.parametrize("none", [None, {}, []])
def test_no_quantization_is_nothing_to_note(none):
    assert stored_as({"quantization_config": none}).notes == ()


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("float32", "fp32"),
        ("torch.float16", "fp16"),
        ("auto", "bf16"),
        (16, "bf16"),
        (None, "bf16"),
    ],
)
def test_the_type_of_what_is_not_quantized(said, name):
    assert stored_as({"torch_dtype": said}).formats["head"] == name


def test_a_shape_carries_the_note_and_an_int4_checkpoint_its_bits():
    config = known()["mixtral-8x7b"]
    odd = read_shape({**config, "quantization_config": {"quant_method": "aqlm"}}, "odd")
    assert any("'aqlm' is not read: counted as bf16" in note for note in odd.notes)
    said = compressed(num_bits=4, type="int", group_size=32)
    four = read_shape({**config, "quantization_config": said}, "four")
    assert not any("not read" in note for note in four.notes)
    assert precision(four)["experts"] == precision(four, None, "4g32")["experts"]
    assert shape_of("mixtral-8x7b").notes == ()


def test_a_counted_shape_carries_the_note_too():
    config = {**known()["llama-2-70b"], "quantization_config": {"quant_method": "aqlm"}}
    shape = shape_of_counts(config, "odd", [{"attention": 8}] * 80, {"embeddings": 8})
    assert any("'aqlm' is not read" in note for note in shape.notes)


JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.sampled_from(["quant_method", "bits", "group_size", "config_groups", "load_in_4bit"])


@given(st.dictionaries(KEYS, JUNK | st.lists(JUNK) | st.dictionaries(st.text(max_size=3), JUNK)))
def test_any_quantization_is_read_or_noted(said):
    found = stored_as({"quantization_config": said})
    read = {*found.formats.values()} != {"bf16"} or said.get("bits") == 16
    assert bool(said) == (read or len(found.notes) == 1)
    assert not (read and found.notes)
