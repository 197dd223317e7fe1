"""expertly finetune: from conversations to an adapter and a report, and what it refuses."""

import json
import re

import pytest

SMALL = (
    "data.sequence_length=48",
    "data.eval_tokens=100",
    "schedule.num_train_epochs=0",
    "schedule.max_steps=2",
    "schedule.per_device_train_batch_size=2",
    "optim.learning_rate=1e-2",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with conversations, text of the base's domain and a template."""
    monkeypatch.chdir(tmp_path)
    said = [("user", "the cat and the dog"), ("assistant", "see the red tree")]
    turns = [{"role": role, "content": content} for role, content in said]
    rows = [{"messages": [turns[0], {**turns[1], "content": f"see {i}"}]} for i in range(30)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "silent.jsonl").write_text(json.dumps({"messages": turns[:1]}) + "\n")
    (tmp_path / "base.txt").write_text("the dog and the red tree " * 40)
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tmp_path


def test_it_ends_with_drift_and_what_to_do_next(here, cli, tiny_folder):
    template = ["data.chat_template=chat.jinja", "--base-data", "base.txt"]
    code, out, _ = cli("finetune", str(tiny_folder("mixtral")), "talk.jsonl", *SMALL, *template)
    assert code == 0
    assert "same experts" in out and "base:base" in out
    assert "changed       experts" in out and "routers 0 of 2" in out
    run = here / "runs" / "mixtral-talk"
    assert f"{run.relative_to(here)}/checkpoint-2" in out
    assert "--chat" in out and "merge" in out
    assert (run / "drift.html").is_file()
    assert sorted(path.name for path in (run / "checkpoint-2").iterdir())[:2] == [
        "MANIFEST.json",
        "adapter_config.json",
    ]

    code, out, _ = cli("merge", str(run / "checkpoint-2"), "merged", "--json")
    assert code == 0
    assert json.loads(out)["largest_logit_difference"] < 1e-4
    asked = ("generate", "merged", "--chat", "--prompt", "the cat", "--max-new-tokens", "4")
    code, out, _ = cli(*asked, "--json")
    assert code == 0
    assert [each["role"] for each in json.loads(out)["messages"]] == ["user", "assistant"]

    code, _, err = cli("finetune", str(tiny_folder("olmoe")), "talk.jsonl", *SMALL, *template,
                       "--output", str(run), "--resume")  # fmt: skip
    assert code == 2 and err.count("\n") == 1 and "E206" in err


@pytest.mark.parametrize(
    ("data", "more", "code", "said"),
    [
        ("silent.jsonl", [], 3, "E304.*no assistant turn"),
        ("talk.jsonl", ["lora.targets=[shared_experts]"], 2, "E202.*no shared experts"),
        ("nowhere.jsonl", [], 3, "E303"),
        ("talk.jsonl", ["--method", "full", "--router", "lora"], 2, "E202"),
        ("talk.jsonl", ["--bits", "3"], 2, "E202.*4 or 8"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(data, more, code, said, here, cli, tiny_folder):
    asked = ["finetune", str(tiny_folder("mixtral")), data, *SMALL, "data.chat_template=chat.jinja"]
    before = sorted(here.iterdir())
    ended, out, err = cli(*asked, *more)
    assert (ended, out) == (code, "")
    lines = [line for line in err.splitlines() if line.startswith("expertly: error")]
    assert len(lines) == 1

    assert re.search(said, lines[0])
    left = [path for path in here.rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.parent for path in left} == {here}
    assert set(before) <= set(here.iterdir())
