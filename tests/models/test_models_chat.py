"""Chat templates: what the assistant says is learnt, to the end of its turn, and nothing else."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from expertly.data.dialogues import Completion, Dialogue
from expertly.errors import ExpertlyError
from expertly.models.chat import chat_prompt, encode_said, require_template, turn_ends
from expertly.models.tokenizer import train_tokenizer

ASKS = "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
PLAIN = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
) + ASKS
TAGGED = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
) + ASKS
# an empty thought before the last answer alone
THINKS = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
) + ASKS
# the last answer ends the text, one that others follow only the turn
ENDS = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|endoftext|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
) + ASKS
# an answer begins in another way than it is asked for
UNASKED = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}<think>"
TWICE = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"

TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sees\n\nthe dog"},
    {"role": "user", "content": "and the tree"},
    {"role": "assistant", "content": "is réd 漢"},
]
FIRST, LAST = "sees\n\nthe dog<|end|>", "is réd 漢<|end|>"


@pytest.fixture(scope="module")
def trained():
    tokenizer = train_tokenizer(["the cat and the dog see the red tree\n\n"] * 20, 300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|end|>"]})
    return tokenizer


@pytest.fixture
def chatty(trained):
    """chatty(template) -> a tokenizer with it."""

    def make(template):
        tokenizer = copy.copy(trained)
        tokenizer.chat_template = template
        return tokenizer

    return make


def spoken(tokenizer, said):
    """The whole text, and the runs of it that are learnt."""
    ids, learnt = encode_said(tokenizer, said)
    assert len(ids) == len(learnt)
    runs, last = [], False
    for token, learns in zip(ids, learnt, strict=True):
        if learns:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = learns
    return tokenizer.decode(ids), [tokenizer.decode(run) for run in runs]


EXPECTED = {
    "plain": (PLAIN, [FIRST, LAST]),
    "tagged": (TAGGED, [FIRST, LAST]),
    "thinks": (THINKS, [FIRST, "<think>\n\n</think>\n\n" + LAST]),
    "ends": (ENDS, ["sees\n\nthe dog", "is réd 漢<|endoftext|>"]),
    "several": ({"default": PLAIN, "tool_use": TAGGED}, [FIRST, LAST]),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_the_assistant_says_is_learnt_to_its_end(kind, chatty):
    template, runs = EXPECTED[kind]
    tokenizer = chatty(template)
    text, learnt = spoken(tokenizer, Dialogue(TALK))
    assert learnt == runs
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert encode_said(tokenizer, Dialogue(TALK)).ids == tokenizer.apply_chat_template(
        TALK, return_dict=False
    )


@pytest.mark.parametrize("kind", EXPECTED)
def test_turns_of_the_prompt_are_not_learnt(kind, chatty):
    template, runs = EXPECTED[kind]
    assert spoken(chatty(template), Dialogue(TALK, first=2))[1] == runs[1:]
    assert spoken(chatty(template), Dialogue(TALK[:1]))[1] == []


@pytest.mark.parametrize("kind", ["plain", "thinks", "ends"])
def test_an_answer_is_learnt_behind_what_it_is_asked_with(kind, chatty):
    tokenizer = chatty(EXPECTED[kind][0])
    ids, learnt = encode_said(tokenizer, Dialogue(TALK))
    for place in (1, 3):
        asked = chat_prompt(tokenizer, TALK[:place])
        assert ids[: len(asked)] == asked
        assert learnt[len(asked)] and not learnt[len(asked) - 1]


def test_blanks_around_an_answer_are_the_templates_to_keep(chatty):
    said = [TALK[0], {"role": "assistant", "content": " \n sees "}]
    assert spoken(chatty(PLAIN), Dialogue(said))[1] == ["sees<|end|>"]
    assert spoken(chatty(ENDS), Dialogue(said))[1] == [" \n sees <|endoftext|>"]


REFUSED = {
    "asked for in another way": (UNASKED, TALK, "turn 2 in another way than it writes it"),
    "written twice": (TWICE, TALK, "does not write turn 2 once"),
    "raised": (REFUSES, [{"role": "system", "content": ""}, *TALK], r"refuses it \(no system\)"),
    "the assistant first": (PLAIN, TALK[1:], "the assistant speaks first"),
    "unknown things": ("{{ messages[0].nothing.more }}", TALK, "refuses it"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_dialogue_that_the_template_does_not_take_is_refused(fault, chatty):
    template, messages, why = REFUSED[fault]
    with pytest.raises(ValueError, match=why):
        encode_said(chatty(template), Dialogue(messages))


def test_completions_and_texts_end_with_the_end_of_text(trained):
    assert spoken(trained, Completion("the cat", " sees\n\nit")) == (
        "the cat sees\n\nit<|endoftext|>",
        [" sees\n\nit<|endoftext|>"],
    )
    assert spoken(trained, "the\n\ncat ")[1] == ["the\n\ncat <|endoftext|>"]
    assert spoken(trained, "")[1] == ["<|endoftext|>"]


def test_a_text_that_spells_out_a_special_token_is_only_text(trained):
    ids = encode_said(trained, "the<|end|><|endoftext|>").ids
    assert ids.count(trained.eos_token_id) == 1 and ids[-1] == trained.eos_token_id
    assert trained.convert_tokens_to_ids("<|end|>") not in ids


def test_a_tokenizers_own_first_token_is_not_learnt_and_its_end_comes_once(trained):
    tokenizer = copy.deepcopy(trained)
    special = [("<|turn|>", 300), ("<|endoftext|>", 0)]
    special[0] = ("<|turn|>", tokenizer.convert_tokens_to_ids("<|turn|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|turn|> $A <|endoftext|>", special_tokens=special
    )
    text, runs = spoken(tokenizer, Completion("the cat", " sees"))
    assert (text, runs) == ("<|turn|>the cat sees<|endoftext|>", [" sees<|endoftext|>"])


def test_answers_end_with_the_turn_or_the_text(chatty):
    end = chatty(PLAIN).convert_tokens_to_ids("<|end|>")
    assert turn_ends(chatty(PLAIN)) == turn_ends(chatty(TAGGED)) == {0, end}
    assert turn_ends(chatty(ENDS)) == turn_ends(chatty(TWICE)) == {0}


def test_no_template_is_one_line_with_a_way_out(trained):
    line = r"error\[E307\] the tokenizer: it has no chat template\. FIX: .*data\.chat_template=FILE"
    for ask in (
        lambda: require_template(trained),
        lambda: encode_said(trained, Dialogue(TALK)),
        lambda: chat_prompt(trained, TALK[:1]),
    ):
        with pytest.raises(ExpertlyError, match=line):
            ask()


def test_turns_that_cannot_be_asked_with_are_one_line(chatty):
    with pytest.raises(
        ExpertlyError, match=r"error\[E202\] conversation: .*\. FIX: leave --system"
    ):
        chat_prompt(chatty(REFUSES), [{"role": "system", "content": "be brief"}])


def test_a_slow_tokenizer_is_refused(trained, monkeypatch):
    monkeypatch.setattr(type(trained), "is_fast", False)
    with pytest.raises(ExpertlyError, match=r"error\[E307\].*FIX: save it with a tokenizer\.json"):
        encode_said(trained, "the cat")
