"""The face of `expertly plan`: its pages, its JSON, its charts, and one line for every nonsense."""

import json
import re
import subprocess
import sys

import pytest

LINE = re.compile(r"expertly: error\[(E\d{3})\] [^\n]+: [^\n]+\. FIX: [^\n]+\n")
MODEL = "mixtral-8x7b"
# the keys of the JSON that are promised to stay
WORDS = """
    model family layers moe_layers experts top_k max_context notes parameters precision
    weights_bytes weights_bytes_touched kv_cache_elements_per_token kv_cache_bytes_per_token
    kv_cache_against memory machine models decode offload all_to_all training cost scaling_law
    verdict
"""
KEYS = set(WORDS.split())
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "pad_token_id": None,
}


@pytest.fixture
def plan(cli):
    """plan(*words) -> the page of a plan that is answered."""

    def call(*words):
        code, out, err = cli("plan", *words)
        assert (code, err) == (0, "")
        return out

    return call


@pytest.fixture
def asked(plan):
    """asked(*words) -> the JSON of a plan that is answered."""
    return lambda *words: json.loads(plan(*words, "--json"), parse_constant=pytest.fail)


@pytest.fixture
def refused(cli):
    """refused(*words) -> code and line of a plan that is refused, with its exit code checked."""

    def call(*words):
        status, out, err = cli("plan", *words)
        assert out == ""
        assert LINE.fullmatch(err), err
        code = LINE.fullmatch(err)[1]
        assert status == int(code[1])
        return code, err

    return call


# --- What is answered ----------------------------------------------------------------------------


def test_a_plan_needs_no_heavy_import():
    code = (
        "import sys; sys.argv = ['expertly', 'plan', 'deepseek-v3', '--vs', 'llama-2-70b']\n"
        "from expertly.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_page_says_sizes_comparison_and_verdict(plan):
    page = plan(MODEL, "--vs", "llama-2-70b")
    for words in ("46.7 B", "12.9 B", "93.4 GB", "llama-2-70b", "69 B", "138 GB", "verdict: "):
        assert words in page


def test_the_json_has_the_keys_that_are_promised(asked):
    said = asked(MODEL)
    assert set(said) == KEYS
    assert said["parameters"]["total"] == 46_702_792_704
    assert said["parameters"]["active"] == 12_879_925_248
    assert said["weights_bytes"] == 2 * 46_702_792_704
    assert said["kv_cache_bytes_per_token"] == 131_072
    assert (said["experts"], said["top_k"]) == (8, 2)


def test_a_dense_model_alone_has_the_same_keys(asked, plan):
    said = asked("llama-3.2-1b")
    assert set(said) == KEYS
    assert said["decode"] is None
    assert said["scaling_law"] is None
    assert "llama-3.2-1b: llama, 16 layers" in plan("llama-3.2-1b")


def test_the_training_cost_of_deepseek_v3(asked):
    words = ("--train-tokens", "14.8T", "--gpu", "h800", "--gpu-hours", "2.788M", "--price", 2)
    cost = asked("deepseek-v3", *words)["cost"]
    assert cost["usd"] == pytest.approx(5.576e6)
    assert cost["gpu_hours"] == pytest.approx(2.788e6)
    assert cost["tokens"] == 14.8e12


def test_bits_of_parts_are_counted(asked):
    said = asked(MODEL, "--bits", "3,attention=4")
    parts = said["parameters"]["by_part"]
    of_expert = 8 * parts["experts"]["bytes"] / parts["experts"]["total"]
    assert of_expert == pytest.approx(3 + 19 / 128)
    assert 8 * parts["attention"]["bytes"] / parts["attention"]["total"] > 4
    assert 2 * parts["head"]["total"] == parts["head"]["bytes"]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_training_is_spread_as_asked(method, asked):
    training = asked(MODEL, "--method", method, "--fsdp", 8, "--ep", 8)["training"]
    assert training["method"] == method
    assert training["layout"] == {"fsdp": 8, "ep": 8, "tp": 1}
    assert 0 < training["per_gpu"]["weights"] < training["per_gpu"]["total"]


def test_offload_is_as_fast_as_its_hits(asked, plan):
    words = (MODEL, "--gpu", "4090", "--offload", "pcie4", "--hit-rate")
    few, many = (asked(*words, rate)["offload"] for rate in (0.6, 0.9))
    assert few["hit_rate"] == 0.6
    assert few["slow"] < few["fast"] < many["fast"]
    assert "over pcie4" in plan(*words, 0.6)


def test_fit_lists_what_fits(plan, asked):
    assert "olmoe-1b-7b" in plan("--fit", "24GB")
    fits = asked("--fit", "24GB")["fits"]
    assert fits
    assert all(each["resident"] <= 24e9 for each in fits)
    assert {"name", "precision", "tokens_per_second"} <= set(fits[0])


def test_your_own_machine_is_laid_over_the_table(asked, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("devices:\n  '4090': {memory: 48.0e+9}\n")
    said = asked(MODEL, "--gpu", "4090", "--hardware", file)
    assert said["machine"]["memory_bytes"] == 48e9


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("model", [MODEL, "llama-3.2-1b"])
def test_a_plot_is_a_picture(suffix, model, plan, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan{suffix}"
    plan(model, "--plot", file)
    drawn = file.read_bytes()
    assert len(drawn) > 5_000
    if suffix == ".svg" and model == MODEL:
        assert model.encode() in drawn
    else:
        assert drawn.startswith((b"\x89PNG", b"<?xml"))


def test_a_family_without_formulas_is_counted_on_the_meta_device(plan, asked, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", **SMALL}))
    assert "phi3 has no formulas here: counted on the meta device" in plan(tmp_path)
    inner = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert asked(tmp_path)["parameters"]["total"] == 2 * (100 * 64 + inner) + 64


# --- What is refused -----------------------------------------------------------------------------

NUMBERS = ("0", "-1", "nan", "inf", "1e400", "1e30", "x", "")
NONSENSE = {
    "--batch": NUMBERS,
    "--context": NUMBERS,
    "--gpus": NUMBERS,
    "--fsdp": NUMBERS,
    "--ep": (*NUMBERS, "3", "16"),
    "--tp": NUMBERS,
    "--kv-bits": (*NUMBERS, "0.5", "64"),
    "--imbalance": (*NUMBERS, "0.9"),
    "--utilisation": (*NUMBERS, "1.01", "1e-320"),
    "--hit-rate": ("-0.1", "1.1", "nan", "inf", "x", ""),
    "--price": ("-1", "nan", "inf", "x", ""),
    "--train-tokens": (*NUMBERS, "15X", "-3T"),
    "--tuning-tokens": NUMBERS,
    "--gpu-hours": (*NUMBERS, "1"),  # in an hour nothing is trained
    "--memory": (*NUMBERS, "24XB", "-24GB"),
    "--fit": (*NUMBERS, "24XB"),
    "--dtype": ("", "int99", "x" * 3000),
    "--bits": ("", "0", "17", "nan", "4g0", "4g99999", "4,foo=3", "attention", "=", "4,,"),
    "--gpu": ("", "h10", "x" * 3000),
    "--link": ("", "nvlink5000"),
    "--offload": ("", "floppy"),
    "--method": ("", "LORA", "dora"),
    "--plot": ("", "plan.txt", "plan", "."),
}
CASES = [(flag, value) for flag, values in NONSENSE.items() for value in values]


@pytest.mark.parametrize(("flag", "value"), CASES, ids=lambda word: word[:12] or "empty")
def test_nonsense_is_one_line(flag, value, refused):
    model = () if flag == "--fit" else (MODEL,)
    code, line = refused(*model, f"{flag}={value}")
    assert code == "E208"
    assert len(line) < 500


@pytest.mark.parametrize("name", ["", "x" * 5000, "/no/such/folder", "a\0b"])
def test_a_model_that_is_none_is_one_line(name, refused):
    code, line = refused(name)
    assert code == "E305"
    assert len(line) < 1200


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        pytest.param((), "E208", "name a model", id="no model"),
        pytest.param(("mixtral-8x7",), "E305", "write mixtral-8x7b", id="nearly a name"),
        pytest.param((MODEL, "--vs", "llama-2-7"), "E305", "write llama-2-7b", id="nearly a rival"),
        pytest.param((MODEL, "--gpu", "h10"), "E208", "h100", id="nearly a GPU"),
        pytest.param((MODEL, "--context", 32769), "E208", "32768", id="longer than made for"),
        pytest.param((MODEL, "--fsdp", 8, "--ep", 3), "E208", "--ep", id="ranks do not divide"),
        pytest.param(
            (MODEL, "--gpu-hours", "1M", "--utilisation", 0.4), "E208", "leave out", id="said twice"
        ),
        pytest.param((MODEL, "--hardware", "/no.yaml"), "E203", "/no.yaml", id="no such table"),
        pytest.param((MODEL, "--plot", "/no/a.png"), "E211", "/no/a.png", id="no such folder"),
        pytest.param(
            (MODEL, "--plot", "/dev/null/a.svg"), "E211", "/dev/null", id="not in a folder"
        ),
    ],
)
def test_what_cannot_be_is_one_line_with_a_way_out(words, code, said, refused):
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    found, line = refused(*words)
    assert found == code
    assert said in line


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ("[1, 2]", "E203"),
        ("devices: 3", "E202"),
        ("device: {}", "E201"),
        ("devices: {h100: {memory: -1}}", "E202"),
        ("devices: {h100: {memory: lots}}", "E202"),
        ("devices: {mine: {memory: 1.0e+9}}", "E202"),
        ("devices: {h100: {link: rope}}", "E202"),
        ("devices: {", "E203"),
    ],
)
def test_a_table_of_machines_that_is_none_is_one_line(table, code, refused, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(table)
    assert refused(MODEL, "--hardware", file)[0] == code


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "model_type is missing"),
        ({"model_type": "llama", **SMALL, "hidden_size": -64}, "hidden_size is -64"),
        ({"model_type": "llama", **SMALL, "vocab_size": None}, "vocab_size is None"),
        (
            {**SMALL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 9},
            "num_experts_per_tok is 9, but there are 8 experts",
        ),
        ({"model_type": "x", **SMALL}, "does not recognize this architecture"),
        ({"model_type": "phi3"}, "hidden_size is missing"),
    ],
)
def test_a_config_that_is_none_is_one_line(config, said, refused, tmp_path):
    assert refused(tmp_path)[0] == "E305"  # a folder without one
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, line = refused(tmp_path)
    assert code == "E305"
    assert said in line
    assert str(tmp_path) in line or "config.json" in line
