"""Setting a run up: what is refused before anything big is read, and what is built."""

import shutil
import sys

import pytest
import torch

from expertly import receipts
from expertly.data import sources as sources_of_data
from expertly.data.sources import expand
from expertly.errors import ExpertlyError
from expertly.models.loading import open_model, save_model
from expertly.train import loop, text
from expertly.train.guard import Guard
from expertly.train.setup import pick_device, prepare
from expertly.train.update import train_step
from expertly.watch.recorder import Recorder
from expertly.watch.stats import watch_set


def quiet(line: str) -> None:
    pass


def test_the_tokenizer_is_trained_once(configure, tmp_path, monkeypatch):
    said: list[str] = []
    config = configure(tmp_path / "run", f"data.cache_dir={tmp_path / 'cache'}", "vocab_size=280")
    first = prepare(config, None, said.append)
    assert [line for line in said if line.startswith("tokenizer: training")]
    assert any(line.startswith("data: words: ") for line in said)
    monkeypatch.setattr(text, "train_tokenizer", lambda *args: pytest.fail("trained again"))
    second = prepare(config, None, quiet)
    assert len(second.tokenizer) == len(first.tokenizer) == 280
    assert torch.equal(next(first.batches).input_ids, next(second.batches).input_ids)


def test_what_was_left_out_of_the_data_is_told(configure, tmp_path, texts):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        shutil.copy(texts / "words.txt", folder / name)
    for name in ("d.bin", "e.bin"):
        (folder / name).write_bytes(b"\xff\xfe\x00")
    sources = f"[{{path: {folder}}}, {{path: {texts / 'words_held_out.txt'}, eval: true}}]"
    said: list[str] = []
    job = prepare(configure(tmp_path / "run", f"data.sources={sources}"), None, said.append)
    lines = [line for line in said if line.startswith("data: texts: ")]
    assert [line.partition(" held out")[2] for line in lines] == [
        " (2 files not UTF-8, left out; 2 copies)"
    ]
    assert [line for line in said if line.startswith("data: ")][-1].endswith(" held out")
    assert job.sets[0].counts["undecodable"] == 2


def test_bare_sources_are_expanded_once(configure, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(text, "expand", lambda sources: asked.append(sources) or expand(sources))
    monkeypatch.setattr(sources_of_data, "builtin_files", lambda name: asked.append(name) or [])
    with pytest.raises(ExpertlyError, match=r"E303\] data\.sources: no source is left"):
        prepare(configure(tmp_path, "data.sources=[{path: stdlib}]"), None, quiet)
    assert len(asked) == 1 + 3


def test_two_runs_that_train_one_tokenizer_at_once(configure, tmp_path, monkeypatch):
    config = configure(tmp_path / "run", f"data.cache_dir={tmp_path / 'cache'}", "vocab_size=270")
    real = text.train_tokenizer

    def slower(texts, size):
        monkeypatch.setattr(text, "train_tokenizer", real)
        prepare(config, None, quiet)  # the other run
        return real(texts, size)

    monkeypatch.setattr(text, "train_tokenizer", slower)
    assert len(prepare(config, None, quiet).tokenizer) == 270


def test_the_same_seed_builds_the_same_model(configure, tmp_path):
    first, second, other = (
        prepare(configure(tmp_path, f"seed={seed}"), None, quiet) for seed in (1, 1, 2)
    )
    ours, same, not_ours = (job.model.state_dict() for job in (first, second, other))
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert not torch.equal(ours["lm_head.weight"], not_ours["lm_head.weight"])
    assert torch.equal(next(first.batches).input_ids, next(second.batches).input_ids)


def test_the_twin_is_dense_and_sees_the_same_rows(configure, tmp_path):
    config = configure(tmp_path / "moe", "router.bias_update_rate=0")
    moe = prepare(config, None, quiet)
    twin = prepare(configure(tmp_path / "twin", "model.twin=true"), None, quiet)
    assert twin.attachment is None
    assert twin.model.config.model_type == "qwen3"
    assert twin.model.config.intermediate_size == 2 * 32
    assert twin.model.config.vocab_size == moe.model.config.vocab_size
    for _ in range(5):
        assert torch.equal(next(moe.batches).input_ids, next(twin.batches).input_ids)


def test_extra_keys_win(configure, tmp_path):
    extra = "model.extra={head_dim: 8, max_position_embeddings: 77, vocab_size: 320}"
    shape = prepare(configure(tmp_path, extra), None, quiet).model.config
    assert (shape.max_position_embeddings, shape.vocab_size) == (77, 320)


def test_a_tokenizer_with_more_tokens_than_the_model(configure, tmp_path):
    with pytest.raises(ExpertlyError, match=r"E202.*300 tokens, the model only 200"):
        prepare(configure(tmp_path, "model.extra={vocab_size: 200}"), None, quiet)


def refuse_data(*args, **how):
    pytest.fail("data was read first")


@pytest.mark.parametrize(
    ("overrides", "code", "why"),
    [
        (["model.num_experts_per_tok=5"], "E202", "5.* there are 4 experts"),
        (["router.top_k=5"], "E204", "top_k 5 with 4 experts"),
        (["router.top_k=0"], "E204", "top_k 0 with 4 experts"),
        (["router.router=softmax"], "E204", "no such router"),
        (["router.router=expert_choice"], "E204", "would cheat"),
        (["router.router=topk_softmax"], "E204", "allow_non_stock"),
        (["router.jitter=1"], "E204", "jitter"),
        (["bias_update_rate=0.1"], "E204", "has no bias to update"),
        (["model.family=qwen"], "E306", "unknown"),
        (["model.extra={hidden_dim: 3}"], "E202", "no such size"),
        (["model={path: nowhere}"], "E305", "no such folder"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_before_data_is_read(
    configure, tmp_path, monkeypatch, overrides, code, why
):
    monkeypatch.setattr(text, "token_sets", refuse_data)
    monkeypatch.setattr(text, "train_tokenizer", refuse_data)
    with pytest.raises(ExpertlyError, match=why) as caught:
        loop.run(configure(tmp_path / "run", *overrides))
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "the folder stays free"


def test_cuda_on_a_machine_without_it(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(text, "token_sets", refuse_data)
    with pytest.raises(ExpertlyError, match=r"E202\] device: no CUDA device here"):
        loop.run(configure(tmp_path / "run", "device=cuda"))
    assert pick_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [pick_device(asked) for asked in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_missing_tensorboard_is_found_before_data_is_read(configure, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(text, "token_sets", refuse_data)
    with pytest.raises(ExpertlyError, match="E207"):
        loop.run(configure(tmp_path / "run", "report_to=[tensorboard]"))
    assert not (tmp_path / "run").exists()


def test_going_on_from_a_folder_with_a_policy_that_stock_loaders_do_not_know(configure, tmp_path):
    """biased_sigmoid_topk on Qwen3-MoE: the rule, its options and its biases come along."""
    own = ["router.router=biased_sigmoid_topk", "router.options={scale: 1.5}"]
    more = ["bias_update_rate=0.01", "allow_non_stock=true", "max_steps=3"]
    first = loop.run(configure(tmp_path / "first", *own, *more))
    path = f"model={{path: {first.checkpoint}}}"
    job = prepare(configure(tmp_path / "next", path, "allow_non_stock=true"), None, quiet)
    assert job.attachment.rule == "biased_sigmoid_topk"
    assert job.attachment.policy.options == {"scale": 1.5}
    biases = job.attachment.biases()
    assert biases.shape == (2, 4)
    assert 0.005 < biases.abs().max() < 0.035
    with pytest.raises(ExpertlyError, match=r"E204.*allow_non_stock"):
        prepare(configure(tmp_path / "next", path), None, quiet)
    second = loop.run(configure(tmp_path / "next", path, *more))
    assert second.loss < first.loss
    assert "model" in receipts.read(second.run).inputs, "what it went on from, by its hash"


def test_activation_checkpointing_keeps_the_routers_gradients(configure, tmp_path):
    """House rule 9: reentrant checkpointing would lose those of the captured logits."""
    norms = []
    for asked in ("false", "true"):
        config = configure(tmp_path, f"gradient_checkpointing={asked}", "router_aux_loss_coef=10")
        job = prepare(config, None, quiet)
        recorder, guard = Recorder(job.attachment.rule), Guard(config.optim)
        norms.append(train_step(config, job, recorder, guard, 0).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_every_step_carries_the_routers_health(configure, tmp_path):
    config = configure(tmp_path, "logging_steps=100")
    job = prepare(config, None, quiet)
    steps = [
        train_step(config, job, Recorder(job.attachment.rule), Guard(config.optim), at)
        for at in range(2)
    ]
    for step in steps:
        assert step.health == watch_set(step.counts, job.attachment.biases())
    assert steps[0].health != steps[1].health
    twin = configure(tmp_path, "model.twin=true")
    assert train_step(twin, prepare(twin, None, quiet), None, Guard(twin.optim), 0).health is None


def test_bf16_and_dropout_run(configure, tmp_path):
    more = ["gradient_checkpointing=true", "bf16=true", "expert_dropout=0.2", "max_steps=2"]
    result = loop.run(configure(tmp_path / "run", *more))
    assert result.steps == 2
    assert result.router["dead_frac"] == 0


def test_a_packed_folder_is_not_trained(configure, tmp_path, tiny_model, tiny_tokenizer):
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    save_model(tiny_model("mixtral", moe_intermediate_size=32), dense, tokenizer=tiny_tokenizer)
    save_model(open_model(dense, bits=8), packed, tokenizer=tiny_tokenizer)
    with pytest.raises(ExpertlyError, match=r"E202.*packed.*open the original") as error:
        prepare(configure(tmp_path / "run", f"model={{path: {packed}}}"), None, quiet)
    assert str(packed) in str(error.value)
