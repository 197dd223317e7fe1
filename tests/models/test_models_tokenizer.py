"""The tokenizer: trained, used, saved, opened and refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from expertly.errors import ExpertlyError
from expertly.folders import save_folder
from expertly.models.tokenizer import (
    END_OF_TEXT,
    decode,
    encode_batch,
    encode_prompt,
    open_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

TEXTS = ["the cat sees the dog", "def main():\n    return 0\n", "ä ö ü 猫 🐈"] * 5
TRAINED = train_tokenizer(TEXTS, 280)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back(text):
    ids = encode_batch(TRAINED, [text])[0]
    assert decode(TRAINED, ids) == text
    assert all(0 <= each < len(TRAINED) for each in ids)
    assert TRAINED.eos_token_id not in ids


def test_the_end_of_text_is_the_only_special_token():
    assert TRAINED.eos_token == END_OF_TEXT
    assert TRAINED.eos_token_id == TRAINED.bos_token_id == 0
    assert TRAINED.all_special_ids == [0]
    assert len(TRAINED) == 280
    assert decode(TRAINED, [0, *encode_batch(TRAINED, ["a cat"])[0], 0]) == "a cat"


def test_a_document_that_spells_out_a_special_token_holds_text(tmp_path):
    """A prompt may name one; a page about tokenizers must not end in its middle."""
    save_tokenizer(TRAINED, tmp_path)
    for tokenizer in (TRAINED, open_tokenizer(tmp_path)):
        text = f"a{END_OF_TEXT}b"
        fingerprint = tokenizer_fingerprint(tokenizer)
        ids = encode_batch(tokenizer, [text, END_OF_TEXT])
        assert all(tokenizer.eos_token_id not in each for each in ids)
        assert len(ids[1]) > 1
        assert [decode(tokenizer, each) for each in ids] == [text, END_OF_TEXT]
        assert encode_prompt(tokenizer, text)[1] == tokenizer.eos_token_id
        assert tokenizer_fingerprint(tokenizer) == fingerprint


def test_training_is_deterministic():
    fingerprint = tokenizer_fingerprint(TRAINED)
    assert tokenizer_fingerprint(train_tokenizer(iter(TEXTS), 280)) == fingerprint
    assert tokenizer_fingerprint(train_tokenizer(TEXTS, 279)) != fingerprint
    assert tokenizer_fingerprint(train_tokenizer(TEXTS[:1] * 15, 280)) != fingerprint


def test_it_is_the_same_after_a_save(tmp_path):
    saved = save_folder(tmp_path / "tokenizer", lambda folder: save_tokenizer(TRAINED, folder))
    opened = open_tokenizer(saved)
    assert tokenizer_fingerprint(opened) == tokenizer_fingerprint(TRAINED)
    assert opened.eos_token_id == TRAINED.eos_token_id
    text = "  spaces , and 🐈!\n\n"
    assert encode_batch(opened, [text]) == encode_batch(TRAINED, [text])
    assert decode(opened, encode_batch(opened, [text])[0]) == text


def test_a_prompt_begins_as_documents_do():
    assert encode_prompt(TRAINED, "the cat") == encode_batch(TRAINED, ["the cat"])[0]
    assert encode_prompt(TRAINED, "") == [TRAINED.eos_token_id]


def test_a_prompt_gets_the_special_tokens_that_the_tokenizer_adds(tmp_path):
    save_tokenizer(TRAINED, tmp_path)
    opened = open_tokenizer(tmp_path)
    opened.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    assert encode_prompt(opened, "the cat") == [0, *encode_batch(opened, ["the cat"])[0]]
    assert encode_prompt(opened, "") == [0]


def test_a_folder_without_one_is_refused(tmp_path):
    for folder, why in ((tmp_path, "no tokenizer in it"), (tmp_path / "no", "no such folder")):
        with pytest.raises(ExpertlyError, match=why) as error:
            open_tokenizer(folder)
        assert error.value.code == "E307"


def test_one_without_an_end_of_text_is_refused(tmp_path):
    save_tokenizer(TRAINED, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("eos_token", "bos_token", "pad_token"):
        config.pop(name, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ExpertlyError, match="no end-of-text token") as error:
        open_tokenizer(tmp_path)
    assert error.value.code == "E307"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "Evil"}}', b"\xff\xfe"])
def test_a_damaged_one_is_one_line(content, tmp_path):
    save_tokenizer(TRAINED, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ExpertlyError) as error:
        open_tokenizer(tmp_path)
    assert error.value.code == "E307"
    assert "\n" not in str(error.value)


def test_code_in_the_folder_never_runs(tmp_path):
    save_tokenizer(TRAINED, tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: ...\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        open_tokenizer(tmp_path)
    except ExpertlyError as error:
        assert error.code == "E307"
    assert not (tmp_path / "canary").exists()


def test_an_adapter_without_one_has_its_bases(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_folder(base, lambda folder: save_tokenizer(TRAINED, folder))
    adapter.mkdir()
    said = json.dumps({"base_model_name_or_path": str(base)})
    (adapter / "adapter_config.json").write_text(said, encoding="utf-8")
    assert tokenizer_fingerprint(open_tokenizer(adapter)) == tokenizer_fingerprint(TRAINED)
    save_tokenizer(train_tokenizer(TEXTS, 270), adapter)
    assert len(open_tokenizer(adapter)) == 270
