"""`hf:` sources from local folders; the network is never touched."""

import datasets
import pytest

from expertly.data.config import Source
from expertly.data.hub import split_name
from expertly.data.sources import open_source
from expertly.errors import ExpertlyError


@pytest.fixture(autouse=True)
def no_home_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["one", "", "three"]}).save_to_disk(folder)
    return folder


def read(path, **fields):
    corpus = open_source(Source(path=f"hf:{path}", **fields))
    return list(corpus.read(lambda *_: None))


def test_a_folder_made_by_save_to_disk(saved):
    assert read(saved) == [("saved:train:1", "one"), ("saved:train:3", "three")]


def test_one_split_of_several(tmp_path):
    split = datasets.Dataset.from_dict({"body": ["x"]})
    datasets.DatasetDict({"valid": split}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both", split="valid", column="body") == [("both:valid:1", "x")]
    with pytest.raises(ExpertlyError, match=r"error\[E303\].*FIX: correct name, config or split"):
        read(tmp_path / "both", split="test", column="body")


def test_a_folder_of_json_lines(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read(tmp_path / "data") == [("data:train:1", "a"), ("data:train:2", "b")]
    with pytest.raises(ExpertlyError, match=r"error\[E303\].*Unknown split"):
        read(tmp_path / "data", split="nosplit")


def test_the_stamp_changes_with_the_data(tmp_path, saved):
    source = Source(path=f"hf:{saved}")
    before = open_source(source).stamp
    assert open_source(source).stamp == before
    other = tmp_path / "other"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(other)
    other_stamp = open_source(Source(path=f"hf:{other}")).stamp
    assert other_stamp[1:] != before[1:]


def test_a_missing_dataset_is_refused():
    with pytest.raises(ExpertlyError, match=r"error\[E303\] hf:\./nowhere.*FIX: correct name"):
        read("./nowhere")


def test_a_missing_column_is_refused(saved):
    with pytest.raises(ExpertlyError, match=r"error\[E304\].*no column 'txt'.*write text"):
        read(saved, column="txt")


@pytest.mark.parametrize(
    ("path", "name", "config"),
    [
        ("hf:squad", "squad", None),
        ("hf:Salesforce/wikitext", "Salesforce/wikitext", None),
        ("hf:Salesforce/wikitext/wikitext-2-v1", "Salesforce/wikitext", "wikitext-2-v1"),
    ],
)
def test_only_a_third_part_is_a_config(path, name, config):
    assert split_name(path) == (name, config)
