"""expertly watch: a run from its records, a model from some text; a page and JSON that agree."""

import json
import re
from functools import partial

import pytest

from expertly.models.loading import open_model, save_model
from expertly.watch.records import METRICS, ROUTER, append_json


@pytest.fixture
def watch(cli, monkeypatch, tmp_path):
    """watch(target, ...) -> (exit code, stdout, stderr), in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    return partial(cli, "watch")


@pytest.fixture
def run_folder(tmp_path):
    """A run of two reports, with an alarm that is open."""
    run = tmp_path / "moe"
    run.mkdir()
    health = {"dead_frac": 0.25, "entropy_norm": 0.5, "effective_experts": 2.0}
    health |= {"max_load_ratio": 2.0, "dropped_frac": 0.0}
    alarm = {"kind": "dead", "layer": 1, "experts": [3], "step": 20, "figure": 0.0, "limit": 0.02}
    alarm |= {"what": "layer 1, expert 3: hardly any token", "advice": "raise router_aux"}
    for step in (10, 20):
        where = {"step": step, "tokens": 100 * step, "seconds": 1.0}
        append_json(run / METRICS, {**where, "moe": health})
        append_json(run / ROUTER, {**where, "load": [[0.25] * 4, [0.5, 0.3, 0.2, 0.0]]})
    append_json(run / METRICS, {"step": 20, "alarm": alarm})
    return run


def of_page(file) -> dict:
    return json.loads(re.search(r'id="report">(.*?)</script>', file.read_text())[1])


def test_a_run_is_told_from_its_records(watch, run_folder, tmp_path):
    code, out, err = watch(run_folder)
    assert (code, err) == (0, "")
    assert "layer 1  █▅▄▁\nlayer 0  ▅▅▅▅\n" in out, "the worst first"
    assert "alarm: layer 1, expert 3: hardly any token\n       raise router_aux\n" in out
    assert out.endswith("page          watch-moe.html\n")
    page = of_page(tmp_path / "here" / "watch-moe.html")
    assert page["load"][-1][1] == [2.0, 1.2, 0.8, 0.0]
    assert page["steps"] == [10, 20]


def test_json_is_what_the_page_shows(watch, run_folder, tmp_path):
    code, out, _ = watch(run_folder, "--json", "--output", tmp_path / "sub" / "page.html")
    assert code == 0
    assert json.loads(out) == of_page(tmp_path / "sub" / "page.html")


def test_any_model_reads_some_text(watch, tiny_folder, tmp_path):
    text = tmp_path / "text.md"
    text.write_text("the cat and the dog see the red tree " * 40)
    folder = tiny_folder("mixtral")
    file = tmp_path / "page.html"
    given = ("--data", text, "--reference", folder, "--json", "--output", file)
    code, out, err = watch(folder, *given)
    assert code == 0
    report = json.loads(out)
    assert report["kind"] == "model"
    assert report["domains"]["names"] == ["text"]
    assert report["drift"]["overlap"] == [1.0, 1.0]
    assert "text: " in err
    assert of_page(file) == report


def test_json_alone_writes_no_page(watch, run_folder, tmp_path):
    code, out, _ = watch(run_folder, "--json")
    assert (code, json.loads(out)["kind"]) == (0, "run")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_disk_that_refuses_the_page_still_shows_the_table(watch, run_folder, tmp_path):
    (tmp_path / "full").write_text("a file, where a folder is needed")
    code, out, err = watch(run_folder, "--output", tmp_path / "full" / "page.html")
    assert code == 4 and "layer 1  █▅▄▁" in out and "page  " not in out
    assert err.startswith("expertly: error[E401]") and err.count("\n") == 1


@pytest.fixture
def altered(tiny_folder, tiny_model, tiny_tokenizer, tmp_path):
    """altered(config, **sizes) -> a saved Mixtral of other sizes, its config.json changed."""

    def make(config=None, **sizes):
        folder = tmp_path / "altered"
        save_model(tiny_model("mixtral", **sizes), folder, tokenizer=tiny_tokenizer)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
        return folder

    return make


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.md"
    file.write_text("the cat and the dog see the red tree " * 40)
    return file


def test_no_longest_sequence_is_no_crash(watch, altered, text):
    code, out, err = watch(altered({"max_position_embeddings": None}), "--data", text)
    # this transformers refuses it when it opens the tokenizer
    assert code == 0 or (code, out, err.count("\n")) == (3, "", 1)


def test_tokens_that_a_model_does_not_know_are_said_before_the_look(
    watch, altered, tiny_folder, text
):
    small = altered(vocab_size=80)
    for arguments in ((small,), (tiny_folder("mixtral"), "--reference", small)):
        code, out, err = watch(*arguments, "--data", text)
        assert (code, out) == (3, "")
        assert re.match(r"expertly: error\[E305\].*altered.*vocabulary of 80 tokens", err)
        assert err.count("\n") == 1, "nothing was looked at before"


def test_a_run_without_a_checkpoint_says_what_to_leave_out(watch, run_folder, text):
    for given, fix in (
        (("--data", text), "leave --data out"),
        (("--data", text, "--reference", "x"), "leave --data and --reference out"),
    ):
        code, _, err = watch(run_folder, *given)
        assert code == 3 and f"has no checkpoint yet. FIX: {fix}\n" in err


def test_damaged_records_are_an_error_in_a_line(watch, run_folder):
    append_json(run_folder / ROUTER, {"step": 30, "load": [[0.5, 0.5]]})
    code, out, err = watch(run_folder)
    assert (code, out) == (3, "")
    assert "error[E301]" in err and "step 30" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "more", "code"),
    [
        pytest.param("nothing", (), "E305", id="no such folder"),
        pytest.param("moe", ("--data", "nothing.txt"), "E305", id="a run without a checkpoint"),
    ],
)
def test_what_cannot_be_watched_is_said_in_a_line(watch, run_folder, target, more, code):
    status, out, err = watch(run_folder.parent / target, *more)
    assert (status, out) == (3, "")
    assert err.startswith(f"expertly: error[{code}]")
    assert err.count("\n") == 1


def test_packed_folders_are_read_on_the_cpu_where_there_is_a_gpu(
    watch, tiny_model, tiny_tokenizer, text, tmp_path, monkeypatch
):
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    save_model(tiny_model("mixtral", moe_intermediate_size=32), dense, tokenizer=tiny_tokenizer)
    save_model(open_model(dense, bits=8), packed, tokenizer=tiny_tokenizer)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    code, out, err = watch(packed, "--data", text, "--reference", packed, "--tokens", 256)
    assert code == 0 and "router" in out, err
