"""expertly generate: text as it comes, its speed, packed weights, one line for every error."""

import json
import re

import pytest

from expertly.models.loading import open_model, save_model

LINE = re.compile(r"expertly: error\[(E\d{3})\] .+: .+\. FIX: .+\n")
SPEED = re.compile(r"prompt \d+ tokens, \d+\.\d tokens/s; new (\d+)( tokens, \d+\.\d tokens/s)?\n")
SETTINGS = ["--prompt", "the cat", "--max-new-tokens", 5, "--seed", 3]


def test_text_goes_to_stdout_and_its_speed_to_stderr(tiny_folder, cli):
    code, out, err = cli("generate", tiny_folder("mixtral"), *SETTINGS)
    assert code == 0
    assert out.startswith("the cat")
    assert SPEED.fullmatch(err)[1] == "5"


def test_json_says_the_same(tiny_folder, cli):
    code, out, err = cli("generate", tiny_folder("mixtral"), *SETTINGS, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    streamed = cli("generate", tiny_folder("mixtral"), *SETTINGS)[1]
    assert said["prompt"] + said["text"] == streamed[:-1]
    assert (said["prompt_tokens"] > 0, said["new_tokens"]) == (True, 5)
    assert said["prefill_tokens_per_second"] > 0
    assert said["decode_tokens_per_second"] > 0


def test_one_token_has_no_decode_speed(tiny_folder, cli):
    settings = ["--max-new-tokens", 1, "--top-p", 0]
    code, _, err = cli("generate", tiny_folder("mixtral"), *settings)
    assert (code, SPEED.fullmatch(err)[1]) == (0, "1")
    said = json.loads(cli("generate", tiny_folder("mixtral"), *settings, "--json")[1])
    assert said["decode_tokens_per_second"] is None


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_are_packed_on_the_way(bits, tiny_model, tiny_tokenizer, cli, tmp_path):
    model = tiny_model("mixtral", moe_intermediate_size=32)
    save_model(model, tmp_path, tokenizer=tiny_tokenizer)
    code, out, err = cli("generate", tmp_path, *SETTINGS, "--bits", bits)
    assert code == 0, err
    assert out.startswith("the cat")
    assert SPEED.fullmatch(err.splitlines(keepends=True)[-1])


def test_bits_that_do_not_exist_are_one_line(tiny_folder, cli):
    code, out, err = cli("generate", tiny_folder("mixtral"), "--bits", 5)
    assert (code, out) == (2, "")
    assert LINE.fullmatch(err)[1] == "E202"
    code, out, err = cli("generate", tiny_folder("mixtral"), "--bits", "four")
    assert (code, out) == (2, "")
    assert LINE.fullmatch(err)[1] == "E208"


def test_without_a_tokenizer_it_is_one_line(tiny_model, cli, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    code, out, err = cli("generate", tmp_path)
    assert (code, out) == (3, "")
    assert LINE.fullmatch(err.splitlines(keepends=True)[-1])[1] == "E307"


def test_ctrl_c_keeps_what_was_written(tiny_folder, cli, monkeypatch):
    def stopped(decode, ids):
        yield " sat"
        raise KeyboardInterrupt

    monkeypatch.setattr("expertly.engine.text.pieces", stopped)
    code, out, err = cli("generate", tiny_folder("mixtral"), *SETTINGS)
    assert (code, out, err) == (130, "the cat sat\n", "expertly: stopped\n")


def test_groups_are_chosen_and_must_be_the_folders(tiny_model, tiny_tokenizer, cli, tmp_path):
    model = tiny_model("mixtral", hidden_size=64, moe_intermediate_size=64)
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    save_model(model, dense, tokenizer=tiny_tokenizer)
    assert cli("generate", dense, *SETTINGS, "--bits", 4, "--group-size", 64)[0] == 0
    save_model(open_model(dense, bits=4, group_size=64), packed, tokenizer=tiny_tokenizer)
    assert cli("generate", packed, *SETTINGS, "--group-size", 64)[0] == 0
    code, _, err = cli("generate", packed, *SETTINGS, "--group-size", 32)
    assert code == 2 and "groups of 64" in err
    assert "E202" in cli("generate", dense, *SETTINGS, "--group-size", 64)[2]


def test_a_packed_folder_stays_on_the_cpu_where_there_is_a_gpu(
    tiny_model, tiny_tokenizer, cli, tmp_path, monkeypatch
):
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    save_model(tiny_model("mixtral", moe_intermediate_size=32), dense, tokenizer=tiny_tokenizer)
    save_model(open_model(dense, bits=8), packed, tokenizer=tiny_tokenizer)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for folder, options in ((packed, []), (dense, ["--bits", 8])):
        code, out, err = cli("generate", folder, *SETTINGS, *options)
        assert code == 0 and out.startswith("the cat"), err
