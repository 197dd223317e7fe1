"""expertly watch: a run from its records, a model from some text; a page and JSON that agree."""

import json
import re
import sys

import pytest

from expertly.__main__ import main
from expertly.watch.records import METRICS, ROUTER, append_json


@pytest.fixture
def watch(monkeypatch, capfd, tmp_path):
    """watch(target, ...) -> (exit code, stdout, stderr), in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["expertly", "watch", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return call


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
    code, out, err = watch(folder, "--data", text, "--reference", folder, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["kind"] == "model"
    assert report["domains"]["names"] == ["text"]
    assert report["drift"]["overlap"] == [1.0, 1.0]
    assert "text: " in err
    assert of_page(tmp_path / "here" / "watch-mixtral.html") == report
    assert {file.name for file in folder.iterdir()}.isdisjoint({"watch-mixtral.html"})


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
