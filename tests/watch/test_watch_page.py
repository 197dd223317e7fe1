"""The report's page in a real browser: its numbers are the report's, and names stay text."""

import json
import re
from decimal import ROUND_HALF_UP, Decimal

import pytest
from browser import CELLS, CONTRAST, KEYS, alarm, look, made

from expertly.watch.page import page

HOSTILE = (
    "</script><script>document.title='owned'</script><!--<img src=x onerror=alert(1)>{{report}}"
)


def shown(value, digits=2):
    """A number as JavaScript's toFixed writes it: ties away from zero."""
    return str(Decimal(value).quantize(Decimal(10) ** -digits, ROUND_HALF_UP))


@pytest.fixture(scope="module")
def report():
    report = made(alarms=[alarm(0, [2], 20), alarm(1, [0], 10, cleared=20), alarm(2, [1, 3], 30)])
    report["load"][2][2][1] = 0.0
    report["series"]["max_load_ratio"][2][2] = max(report["load"][2][2])
    report["norms"][0][3] = 0.001
    return report


@pytest.fixture(scope="module")
def seen(report, tmp_path_factory):
    """One rendering of the whole report, used from the keyboard and with the pointer."""
    script = (
        KEYS
        + CELLS
        + """
    const at = {first: text("heat-readout")};
    press("heat", "ArrowRight"); at.dead = text("heat-readout");
    press("heat", "ArrowDown", "ArrowDown", "End"); at.silent = text("heat-readout");
    press("heat", "ArrowDown", "ArrowRight"); at.corner = text("heat-readout");
    step(0); at.earlier = text("heat-readout"); at.when = text("when");
    press("heat", "Home", "ArrowUp"); at.earlier2 = text("heat-readout");
    step(1); at.middle = text("heat-readout");
    press("max", "Home"); at.curve = text("max-readout");
    press("entropy", "ArrowLeft"); at.entropy = text("entropy-readout");
    at.dense = text("dense-readout"); press("alike", "Home"); at.unknown = text("alike-readout");
    const select = document.getElementById("layer"); at.layer = select.value; select.value = "1";
    select.dispatchEvent(new Event("change")); press("domain-heat", "ArrowDown", "ArrowRight");
    at.domain = text("domain-readout");
    step(2);
    const canvas = document.querySelector("#heat canvas"), box = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new PointerEvent("pointermove", {bubbles: true,
      clientX: box.left + box.width * .6, clientY: box.top + box.height - 8}));
    at.pointer = text("heat-readout");
    document.querySelector("#open button").click(); at.button = text("heat-readout");
    at.focus = document.activeElement.id;
    const alarms = [...document.querySelectorAll(".alarm")]
      .map(a => [a.parentElement.id, a.textContent]);
    const requests = performance.getEntriesByType("resource").map(r => r.name);
    const marks = canvas.width * canvas.height;"""
        + CONTRAST
        + """
    return {at, cells, alarms, requests, marks, contrast,
      verdict: text("verdict"), facts: text("facts"),
      paper: getComputedStyle(document.body).backgroundColor};"""
    )
    return look(page(report), tmp_path_factory.mktemp("page"), script)


def test_it_renders_without_a_complaint_or_a_request(seen):
    assert seen.console == []
    assert seen.found["requests"] == []
    assert seen.found["marks"] > 0
    assert seen.found["contrast"] >= 4.5, "WCAG AA"


def test_the_verdict_on_a_run_is_its_open_alarms(seen):
    assert seen.found["verdict"] == "▲ 2 alarms open"
    facts = "qwen3_moe · 3 MoE layers of 4 experts · top_k 2 · step 30, 123,456 tokens so far"
    assert seen.found["facts"] == facts


def test_alarms_come_open_first_and_worst_first_with_their_advice(seen):
    places = [(place, re.search(r"layer \d", text)[0]) for place, text in seen.found["alarms"]]
    assert places == [("open", "layer 2"), ("open", "layer 0"), ("ended", "layer 1")]
    first = seen.found["alarms"][0][1]
    for part in ("Raise the balance loss.", "layer 3", "measured 0.61, limit 0.5", "step 30"):
        assert part in first


def test_the_summary_is_the_reports(seen, report):
    cells = {name: value for table, name, _, value, _ in seen.found["cells"] if table == "all"}
    assert cells == {
        name: "null" if value is None else str(value).removesuffix(".0")
        for name, value in report["summary"].items()
    }
    words = {name: text for table, name, _, _, text in seen.found["cells"] if table == "summary"}
    assert words == {
        "dead_frac": "0.0%",
        "entropy_norm": "0.877",
        "effective_experts": "3.2",
        "max_load_ratio": "1.80x its share",
        "min_load_ratio": "0.13x its share",
        "dropped_frac": "1.2%",
    }


def test_the_tables_of_layers_are_the_reports(seen, report):
    cells = {
        (table, name, int(layer)): (float(value), text)
        for table, name, layer, value, text in seen.found["cells"]
        if layer
    }
    for layer in range(3):
        load = report["load"][-1][layer]
        for name, rows in report["series"].items():
            assert cells["layers", name, layer][0] == rows[-1][layer]
        assert cells["layers", "min_load_ratio", layer][0] == min(load)
        cold = f"{load.index(min(load))}: {shown(min(load))}x"
        assert cells["layers", "min_load_ratio", layer][1] == cold
        hot = report["series"]["max_load_ratio"][-1][layer]
        assert cells["layers", "max_load_ratio", layer][1] == f"{load.index(hot)}: {shown(hot)}x"
        assert cells["specialisation", "specialisation", layer][0] == pytest.approx(
            report["domains"]["specialisation"][layer]
        )
        for name in ("overlap", "divergence"):
            assert cells[name, name, layer][0] == pytest.approx(report["drift"][name][layer])
    assert len(cells) == 3 * (7 + 1 + 2)


def test_the_drift_of_domains_is_told(seen, report):
    texts = [text for table, *_, text in seen.found["cells"] if table == "drift-domains"]
    names = report["drift"]["domains"]
    assert len(texts) == 5 * len(names)
    assert texts[:5] == ["2.500 \u2192 2.250", "-0.250", "90.0%", "0.0200", "0.310 \u2192 0.350"]
    assert texts[6] == "+0.750"


def test_the_heat_map_reads_out_every_step_from_the_keyboard(seen, report):
    load, at = report["load"], seen.found["at"]

    def said(t, layer, expert):
        return (
            f"layer {layer + 1}, expert {expert}: load {shown(load[t][layer][expert])}x its share"
        )

    def norm(layer, expert):
        return f", output norm {shown(report['norms'][layer][expert])}"

    assert at["first"] == said(2, 2, 0) + norm(2, 0)
    assert at["dead"] == said(2, 2, 1) + ", no token in this step" + norm(2, 1)
    assert at["silent"] == said(2, 0, 3) + norm(0, 3) + ", silent"
    assert at["corner"] == at["silent"], "the map ends there"
    assert (at["earlier"], at["when"]) == (said(0, 0, 3), "10 of 30")
    assert at["earlier2"] == said(0, 1, 0)
    assert at["middle"] == said(1, 1, 0)
    assert at["pointer"] == said(2, 0, 2) + norm(0, 2)
    assert (at["button"], at["focus"]) == (at["dead"], "heat")


def test_curves_and_domains_read_out_too(seen, report):
    at, series = seen.found["at"], report["series"]
    hottest = [f"layer {n + 1} {shown(series['max_load_ratio'][0][n])}x" for n in (2, 1, 0)]
    assert at["curve"] == "step 10: " + ", ".join(hottest)
    even = [f"layer {n + 1} {shown(series['entropy_norm'][1][n], 3)}" for n in (2, 1, 0)]
    assert at["entropy"] == "step 20: " + ", ".join(even)
    alike = [f"layer {n + 1} {shown(series['cosine_to_dense'][2][n], 4)}" for n in (2, 1, 0)]
    assert at["dense"] == "step 30: " + ", ".join(alike)
    assert at["unknown"].startswith("step 10: layer 3 –"), "before the first evaluation"
    assert at["layer"] == "2", "the worst layer first"
    load = report["domains"]["load"][1][1][1]
    assert at["domain"] == f"docs, layer 2, expert 1: load {shown(load)}x its share"


def test_dark_is_dark_and_readable(seen, report, tmp_path):
    script = CONTRAST + "return [contrast, getComputedStyle(document.body).backgroundColor];"
    dark = look(page(report), tmp_path, script, dark=True)
    contrast, paper = dark.found
    assert dark.console == []
    assert contrast >= 4.5, "WCAG AA"
    brightness = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in (seen.found["paper"], paper)]
    assert brightness[0] > 600 and brightness[1] < 150


def test_hostile_names_stay_text(tmp_path):
    hostile = made(title=HOSTILE, domains=(HOSTILE, "docs"), names=[HOSTILE] * 3, family=HOSTILE)
    hostile["alarms"] = [{**alarm(0, [1], 10), "what": HOSTILE, "advice": HOSTILE}]
    hostile["drift"]["reference"] = hostile["alarms"][0]["kind"] = HOSTILE
    hostile["summary"][HOSTILE] = 1.5
    script = "return [document.title, document.querySelector('h1').textContent, \
        document.getElementById('domain-readout').textContent, document.images.length, \
        document.scripts.length]"
    seen = look(page(hostile), tmp_path, script)
    title, heading, readout, images, scripts = seen.found
    assert title == heading == HOSTILE
    assert readout.startswith(HOSTILE + ", " + HOSTILE)
    assert (images, scripts) == (0, 3), "the data, the page's own, and this test's"
    assert seen.console == []


def test_a_big_model_stays_small_and_renders(tmp_path):
    big = made(layers=58, experts=256, steps=16)
    text = page(big)
    assert len(text.encode()) < 2_000_000
    script = KEYS + "press('heat', 'ArrowDown', 'End'); return text('heat-readout');"
    seen = look(text, tmp_path, script)
    assert seen.console == []
    assert seen.found.startswith(f"layer 57, expert 255: load {shown(big['load'][-1][56][255])}x")


def test_a_count_of_one_step_leaves_out_what_it_does_not_know(tmp_path):
    alone = made(steps=1, kind="model", norms=None, drift=None, summary={})
    alone["domains"] = None
    for name in ("router_confidence", "cosine_to_each_other", "cosine_to_dense"):
        del alone["series"][name]
    script = "return [...document.querySelectorAll('h2')].map(h => h.textContent).concat( \
        document.getElementById('verdict').textContent, document.querySelectorAll('input').length, \
        document.getElementById('layers').rows[0].cells.length)"
    seen = look(page(alone), tmp_path, script)
    headings = ["Summary", "Load of every expert", "Every layer"]
    assert seen.found == [*headings, "✓ All experts alive", 0, 5]
    assert seen.console == []


def test_a_run_without_an_evaluation_has_no_curve_of_it(tmp_path):
    report = made()
    del report["series"]["cosine_to_dense"]
    report["series"]["cosine_to_each_other"] = [None] * 3
    seen = look(
        page(report), tmp_path, "return [...document.querySelectorAll('h3')].map(h => h.id)"
    )
    assert seen.found == ["h-max", "h-entropy", ""]
    assert seen.console == []


MARKS = """
const words = id => document.getElementById(id).textContent;
const marks = [...document.getElementById("summary").tBodies[0].rows]
  .map(row => [row.cells[1].dataset.name, row.cells[3].textContent]);
return [words("verdict"), words("legend"), Object.fromEntries(marks)];"""


def of_demo(**other):
    """What the healthy demo's last step shows: 2 of 16 experts, one left out by chance."""
    report = made(experts=16, alarms=[alarm(1, [0], 10, cleared=20)], **other)
    report["load"][-1][1][5] = 0.0
    report["norms"][1][5] = None
    report["summary"] |= {
        "dead_frac": 0.02,
        "entropy_norm": 0.96,
        "effective_experts": 14.4,
        "max_load_ratio": 2.23,
        "min_load_ratio": 0.0,
    }
    return report


def test_a_healthy_run_is_called_healthy(tmp_path):
    verdict, legend, marks = look(page(of_demo()), tmp_path, MARKS).found
    assert verdict == "✓ No alarm is open"
    assert "no token in this step" in legend
    assert marks == {
        "dead_frac": "",
        "entropy_norm": "✓ fine",
        "effective_experts": "✓ fine",
        "max_load_ratio": "✓ fine",
        "min_load_ratio": "",
        "dropped_frac": "✓ fine",
    }


def test_an_audit_tells_who_got_no_token_and_what_is_out_of_range(tmp_path):
    report = of_demo(kind="model", steps=1)
    report["alarms"] = []
    report["norms"][0][3] = 0.001
    report["summary"] |= {"entropy_norm": 0.7, "max_load_ratio": 4.5, "dropped_frac": 0.3}
    verdict, legend, marks = look(page(report), tmp_path, MARKS).found
    assert verdict == "▲ 1 expert got no token; 1 expert silent"
    assert "✕ no token" in legend and "in this step" not in legend
    for name in ("entropy_norm", "max_load_ratio", "dropped_frac"):
        assert marks[name] == "▲ look"


def test_a_narrow_window_scrolls_inside_only(report, tmp_path):
    # Chromium's own windows do not get this narrow; a frame does, media queries included
    whole = json.dumps(page(made(experts=128, names=["a layer with a long name"] * 3)))
    script = f"const whole = {whole.replace('<', chr(92) + 'u003c')};"
    script += """
    const frame = document.createElement("iframe"); frame.width = 380; frame.height = 900;
    document.body.append(frame);
    const inner = frame.contentDocument; inner.open(); inner.write(whole); inner.close();
    const root = inner.documentElement, right = root.clientWidth;
    const out = [...inner.querySelectorAll("main *")].filter(e => !e.closest(".scroll, .heat")
      && e.getBoundingClientRect().right > right).map(e => e.outerHTML.slice(0, 80));
    return [right, root.scrollWidth - right, out];"""
    seen = look(page(report), tmp_path, script)
    width, over, out = seen.found
    assert 340 <= width <= 380
    assert (over, out) == (0, [])


def test_the_page_may_fetch_nothing(report, tmp_path):
    text = page(report)
    assert not re.search(r"(src|href|url|@import)\W{0,3}(https?:)?//", text)
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in text
    tried = text.replace("<footer", '<img src="http://127.0.0.1:9/x.png"><footer', 1)
    seen = look(tried, tmp_path)
    assert any("Content Security Policy" in line for line in seen.console), "the console is heard"


def test_data_cannot_end_its_script_and_a_title_is_no_placeholder():
    text = page(made(title="<b>{{report}}\u2028\udcff", domains=("</script><!--", "docs")))
    assert text.count("</script>") == 2
    assert "<!--" not in text
    assert "<title>&lt;b&gt;{{report}}" in text
    text.encode("utf-8")
