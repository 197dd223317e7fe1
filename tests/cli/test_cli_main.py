"""The door: help at once, one line for every error, the exit codes, JSON for machines."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from expertly import __version__
from expertly.cli.app import app
from expertly.cli.options import number, print_json, table

VERBS = (
    "demo",
    "plan",
    "train",
    "upcycle",
    "finetune",
    "merge",
    "watch",
    "compare",
    "generate",
    "inspect",
    "doctor",
)
LINE = re.compile(r"expertly: error\[(E\d{3})\] [^\n]+: [^\n]+\. FIX: [^\n]+\n")


def raising(monkeypatch, error):
    """Make `expertly doctor` raise."""

    def examine():
        raise error

    monkeypatch.setattr("expertly.bench.doctor.examine", examine)


# --- Help --------------------------------------------------------------------------------------


def test_every_verb_is_tested_here():
    assert {command.callback.__name__ for command in app.registered_commands} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_an_example(verb, cli):
    code, out, err = cli(verb, "--help")
    assert (code, err) == (0, "")
    assert f"expertly {verb}" in out.split("Example:")[1]


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_every_verb(arguments, cli):
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert all(verb in out for verb in VERBS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['expertly', '--help']\n"
        "from expertly.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_installed_command_and_the_module_are_the_same():
    for command in ([sys.executable, "-m", "expertly"], [Path(sys.executable).parent / "expertly"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "status", "said"),
    [
        pytest.param(["nope"], "E208", 2, "nope", id="unknown verb"),
        pytest.param(["--nope"], "E208", 2, "--nope", id="unknown flag"),
        pytest.param(["train"], "E208", 2, "expertly train --help", id="no config"),
        pytest.param(["train", "/no.yaml"], "E203", 2, "/no.yaml", id="no such config"),
        pytest.param(["inspect"], "E208", 2, "expertly inspect --help", id="no folder"),
        pytest.param(["inspect", "/no"], "E305", 3, "no such folder", id="no such folder"),
        pytest.param(["inspect", "/no", "--x"], "E208", 2, "--x", id="unknown flag of a verb"),
        pytest.param(["generate", "/no"], "E305", 3, "no such folder", id="generate"),
        pytest.param(["generate", "x", "--top-p", "2"], "E208", 2, "--top-p", id="out of range"),
        pytest.param(["generate", "x", "--seed", "a"], "E208", 2, "--seed", id="not a number"),
        pytest.param(["compare", "/a"], "E208", 2, "run_b", id="one run"),
        pytest.param(["compare", "/a", "/b"], "E301", 3, "/a", id="no such run"),
        pytest.param(["demo", "hidden=3"], "E201", 2, "hidden", id="unknown key"),
        pytest.param(["doctor", "extra"], "E208", 2, "extra", id="one word too many"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(arguments, code, status, said, cli, tmp_path):
    if arguments[0] == "demo":
        arguments = ["demo", "--folder", tmp_path, *arguments[1:]]
    ended, out, err = cli(*arguments)
    assert ended == status
    assert out == ""
    last = err.splitlines(keepends=True)[-1]
    assert LINE.fullmatch(last), err
    assert LINE.fullmatch(last)[1] == code
    assert said in last
    if arguments[0] != "demo":  # which says first what it sets out to train
        assert last == err


def test_a_bug_is_one_line_with_a_report(cli, monkeypatch):
    raising(monkeypatch, RuntimeError("two\nlines"))
    code, out, err = cli("doctor")
    assert (code, out) == (6, "")
    assert LINE.fullmatch(err)[1] == "E999"
    assert "RuntimeError: two lines" in err
    report = Path(re.search(r"file (\S+)", err)[1])
    assert "Traceback" in report.read_text()
    assert "raise error" in report.read_text()
    report.unlink()


def test_a_bug_is_one_line_even_when_no_report_can_be_written(cli, monkeypatch):
    raising(monkeypatch, ValueError(""))
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(OSError("full")))
    code, _, err = cli("doctor")
    assert code == 6
    assert LINE.fullmatch(err)
    assert "--debug" in err


@pytest.mark.parametrize("place", [0, 1])
def test_debug_shows_the_traceback_before_the_line(place, cli):
    arguments = ["inspect", "/no"]
    arguments.insert(place, "--debug")
    code, _, err = cli(*arguments)
    assert code == 3
    assert err.startswith("Traceback")
    assert LINE.fullmatch(err.splitlines(keepends=True)[-1])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_ctrl_c_is_130(error, cli, monkeypatch):
    raising(monkeypatch, error)
    assert cli("doctor") == (130, "", "expertly: stopped\n")


def test_a_reader_that_leaves_is_no_error(tiny_folder):
    command = [sys.executable, "-m", "expertly", "inspect", tiny_folder("mixtral")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


# --- Results -----------------------------------------------------------------------------------


def test_inspect_prints_a_page_or_json(tiny_folder, cli):
    folder = tiny_folder("qwen3_moe")
    code, out, err = cli("inspect", folder, "--verify")
    assert (code, err) == (0, "")
    assert "8 in each of 2 layers, top 2" in out
    assert "sha256 checked" in out
    said = json.loads(cli("inspect", folder, "--json")[1])
    assert (said["family"], said["experts"], said["verified"]) == ("qwen3_moe", 8, True)
    assert said["total"] == sum(said["parameters"].values())


def test_inspect_finds_a_flipped_bit(tiny_folder, cli, tmp_path):
    folder = shutil.copytree(tiny_folder("mixtral"), tmp_path / "copy")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert cli("inspect", folder)[0] == 0
    code, _, err = cli("inspect", folder, "--verify")
    assert code == 3
    assert LINE.fullmatch(err)[1] == "E302"


def test_doctor_prints_a_page_or_json(cli, monkeypatch):
    monkeypatch.setattr("expertly.bench.doctor._SIZE", 64)
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    assert "GFLOP/s" in out
    said = json.loads(cli("doctor", "--json")[1])
    assert said["speeds"].keys() >= {"float32", "bfloat16"}


def test_json_has_no_word_for_nan(capsys):
    print_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": Path("x")})
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {"a": [None, 1.5, [None]], "b": "x"}


def test_tables_are_aligned():
    assert table([["part", "n"], ["experts", "12"]]) == "part      n\n-------  --\nexperts  12"
    assert [number(n) for n in (4096, 12_345_678, 1.78e9)] == ["4,096", "12.3 M", "1.78 B"]
