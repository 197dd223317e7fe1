"""Bad data lines (A19): a run names file and line and exits 3, or leaves them out and counts."""

import json
import tracemalloc

import pytest
from trials import LINE

from expertly.config import load
from expertly.data.cache import Encoder, token_sets
from expertly.data.config import DataConfig, Source
from expertly.data.sources import training_sample

GOOD = [json.dumps({"text": f"the cat sees dog {n}"}) + "\n" for n in range(40)]
BAD = {
    "broken JSON": (b'{"text": "the cat\n', 41, "is not JSON"),
    "lone surrogate": (b'{"text": "cat \\ud800"}\n', 41, "holds a lone surrogate at character 4"),
    "not UTF-8": (b'{"text": "\xff\xfe"}\n', 41, "is not JSON"),
    "100 MB line": (b"x" * 100_000_000 + b"\n", 41, "is longer than 64 MiB"),
    "no text": (b'{"texts": "cat"}\n', 41, "has no column 'text'"),
    "a number": (b'{"text": 3}\n', 41, "holds int, not a string"),
    "deep": (b"[" * 100_000 + b"\n", 41, "is not JSON"),
}


@pytest.fixture
def asked(tmp_path):
    """asked(content) -> a config to train on the rows, whose run folder must not come to be."""

    def make(content: bytes):
        (tmp_path / "rows.jsonl").write_bytes(content)
        config = tmp_path / "run.yaml"
        model = {"family": "mixtral", "hidden_size": 32, "num_attention_heads": 4}
        model |= {"num_key_value_heads": 4}
        data = {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "vocab_size": 300}
        data |= {"sequence_length": 16, "cache_dir": str(tmp_path / "cache")}
        said = {"output_dir": str(tmp_path / "run"), "model": model, "data": data}
        config.write_text(json.dumps(said))
        return config

    return make


def refused(cli, config, said, where):
    ended, out, err = cli("train", config)
    last = err.splitlines(keepends=True)[-1]
    assert LINE.fullmatch(last), err
    assert (LINE.fullmatch(last)[1], ended, out) == ("E304", 3, "")
    assert f"error[E304] {where}: {said}" in last
    assert not (config.parent / "run").exists()
    assert not list((config.parent / "cache").glob("*")), "half a cache was kept"


@pytest.mark.parametrize(("line", "number", "said"), BAD.values(), ids=BAD)
def test_a19_a_bad_line_is_named_by_file_and_line(line, number, said, asked, cli, tmp_path):
    config = asked("".join(GOOD).encode() + line + GOOD[0].encode())
    refused(cli, config, said, f"{tmp_path / 'rows.jsonl'}:{number}")


def test_a19_so_is_an_empty_file(asked, cli, tmp_path):
    refused(cli, asked(b""), "is empty", f"{tmp_path / 'rows.jsonl'}:1")


def test_a19_bad_lines_are_skipped_and_counted_where_that_is_asked(tmp_path):
    lines = [line for line, *_ in BAD.values()]
    (tmp_path / "rows.jsonl").write_bytes(b"".join([*lines, "".join(GOOD).encode(), *lines[:2]]))
    sources = [Source(path=str(tmp_path / "rows.jsonl"))]
    encoder = Encoder(lambda texts: [list(text.encode()) for text in texts], 256, 257, "bytes")
    (made,) = token_sets(sources, encoder, skip_bad=True, cache_dir=str(tmp_path / "cache"))
    assert made.counts["bad"] == len(BAD) + 2
    assert made.counts["documents"] + made.counts["held_out_documents"] == len(GOOD)
    sample = training_sample(sources, 10**6, 0.0, skip_bad=True)
    assert sample == [json.loads(line)["text"] for line in GOOD]


def test_a19_a_long_line_is_never_held_whole(tmp_path, monkeypatch):
    """Its rest is read in parts, and thrown away."""
    monkeypatch.setattr("expertly.data.documents._LONGEST_LINE", 2**20)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"x" * 50_000_000 + b"\n" + "".join(GOOD).encode())
    tracemalloc.start()
    sample = training_sample([Source(path=str(file))], 10**6, 0.0, skip_bad=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sample) == len(GOOD)
    assert peak < 5_000_000


def test_skipping_is_a_leaf_of_the_config_and_off_unless_asked(tmp_path):
    (tmp_path / "c.yaml").write_text("sources: [{path: stdlib}]\n")
    assert load(DataConfig, tmp_path / "c.yaml").skip_bad is False
    assert load(DataConfig, tmp_path / "c.yaml", ["skip_bad=true"]).skip_bad is True
