"""expertly generate --chat: turns from a pipe or a terminal, the answers on stdout."""

import copy
import io
import json
import re
import sys

import pytest

from expertly.models.loading import save_model

LINE = re.compile(r"expertly: error\[(E\d{3})\] .+: .+\. FIX: .+\n")
SPEED = re.compile(r"prompt \d+ tokens, \d+\.\d tokens/s; new \d+")
SETTINGS = ["--chat", "--max-new-tokens", 4, "--seed", 3]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def chatty(tiny_model, tiny_tokenizer, tmp_path_factory):
    """chatty(template) -> a model's folder with it."""
    made = {}

    def make(template=TEMPLATE):
        if template not in made:
            tokenizer = copy.copy(tiny_tokenizer)
            tokenizer.chat_template = template
            made[template] = tmp_path_factory.mktemp("chatty")
            save_model(tiny_model("mixtral"), made[template], tokenizer=tokenizer)
        return made[template]

    return make


@pytest.fixture
def asked(monkeypatch, chatty):
    """Every conversation that a template was asked with."""
    from expertly.models import chat

    seen, ask = [], chat.chat_prompt
    monkeypatch.setattr(
        chat, "chat_prompt", lambda t, messages: seen.append([*messages]) or ask(t, messages)
    )
    return seen


def test_a_pipe_gives_an_answer_a_line_and_the_conversation_goes_on(
    chatty, cli, asked, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\n  and the dog \n/exit\nno\n"))
    code, out, err = cli("generate", chatty(), *SETTINGS, "--system", "be brief")
    assert code == 0 and "error" not in err and "> " not in out + err
    assert [[m["role"] for m in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]
    assert [m["content"] for m in asked[1]][::3] == ["be brief", "and the dog"]
    assert out.startswith(asked[1][2]["content"])
    assert out.endswith("\n")


def test_a_terminal_is_asked_until_its_end(chatty, cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("the cat\n"))
    code, out, err = cli("generate", chatty(), *SETTINGS)
    assert code == 0 and "> " not in out
    assert err.count("> ") == 2 and SPEED.search(err)
    assert err.endswith("> \n")


def test_bytes_that_are_no_text_end_nothing(chatty, cli, asked, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a \xff b\n"), "utf-8"))
    assert cli("generate", chatty(), *SETTINGS)[0] == 0
    assert asked[0][0]["content"] == "a \N{REPLACEMENT CHARACTER} b"


def test_a_prompt_is_asked_once(chatty, cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("never read\n"))
    code, out, _ = cli("generate", chatty(), *SETTINGS, "--prompt", "the cat")
    assert code == 0 and not out.startswith("the cat")
    said = json.loads(cli("generate", chatty(), *SETTINGS, "--prompt", "the cat", "--json")[1])
    assert said["text"] == out.strip()
    assert said["messages"] == [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": said["text"]},
    ]
    assert said["new_tokens"] <= 4 and said["prefill_tokens_per_second"] > 0


def test_an_answer_ends_with_the_templates_turn(chatty, cli, monkeypatch):
    from expertly.engine import generate

    seen = []
    stream = generate.stream_ids
    monkeypatch.setattr(
        generate, "stream_ids", lambda *told: seen.append(told[-1]) or stream(*told)
    )
    assert cli("generate", chatty(), *SETTINGS, "--prompt", "the cat")[0] == 0
    assert seen == [{0}]


WRONG = {
    "--json without a prompt": (["--chat", "--json"], "E208"),
    "--system without --chat": (["--system", "be brief"], "E208"),
    "a prompt that is no text": (["--chat", "--prompt", "\udcff"], "E208"),
    "a system turn that the template refuses": (
        ["--chat", "--prompt", "x", "--system", "y"],
        "E202",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_cannot_be_asked_is_one_line(fault, chatty, cli):
    options, error = WRONG[fault]
    code, out, err = cli("generate", chatty(NO_SYSTEM), *options)
    assert (code, out) == (2, "")
    assert LINE.fullmatch(err.splitlines(keepends=True)[-1])[1] == error


def test_without_a_template_it_is_one_line(tiny_folder, cli):
    code, out, err = cli("generate", tiny_folder("mixtral"), *SETTINGS, "--prompt", "x")
    assert (code, out) == (3, "")
    assert LINE.fullmatch(err)[1] == "E307"


def test_ctrl_c_keeps_what_was_written(chatty, cli, monkeypatch):
    def stopped(decode, ids):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr("expertly.engine.text.pieces", stopped)
    code, out, err = cli("generate", chatty(), *SETTINGS, "--prompt", "x")
    assert (code, out) == (130, "half\n")
    assert err.endswith("expertly: stopped\n")
