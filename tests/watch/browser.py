"""Reports made up for the page, and a browser to see them in: headless Chromium."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",  # containers run as root and forbid user namespaces
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
    "--dump-dom",
)
# scripts to put before one's own: every number of a table, as
# [table, name, layer, value, what is shown]
CELLS = """
const cells = [...document.querySelectorAll("td[data-name]")].map(td =>
  [td.closest("table").id, td.dataset.name, td.dataset.layer ?? "", td.dataset.value,
    td.textContent]);
"""
# the keyboard, the slider, and what an element says
KEYS = """
const press = (id, ...keys) => keys.forEach(key =>
  document.getElementById(id).dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true})));
const text = id => document.getElementById(id)?.textContent;
const step = to => { const s = document.getElementById("step"); s.value = to;
  s.dispatchEvent(new Event("input", {bubbles: true})); };
"""
# the lowest contrast (WCAG 2) of any text with what lies behind it
CONTRAST = """
const parse = c => (c.match(/[0-9.]+/g) ?? []).map(Number);
const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = ([r, g, b]) =>
  .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
const behind = e => { for (; e; e = e.parentElement) {
  const c = parse(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c; } };
let contrast = 99;
for (const e of document.body.querySelectorAll("*")) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  if (!own || !e.checkVisibility()) continue;
  const style = getComputedStyle(e);
  const ink = parse(e.namespaceURI.includes("svg") ? style.fill : style.color);
  const [a, b] = [light(ink), light(behind(e))];
  contrast = Math.min(contrast, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
}
"""


def made(*, layers=3, experts=4, steps=3, domains=("code", "docs"), **other):
    """A report whose every number differs from its neighbours."""

    def load(shift):
        return [
            [round(0.131 + ((7 * e + 5 * layer + shift) % 11) / 6, 3) for e in range(experts)]
            for layer in range(layers)
        ]

    def figures(base):
        return [[round(base + t / 50 + n / 90, 4) for n in range(layers)] for t in range(steps)]

    rows = [load(t) for t in range(steps)]
    return {
        "title": "run seven",
        "kind": "run",
        "family": "qwen3_moe",
        "layers": layers,
        "experts": experts,
        "top_k": 2,
        "tokens": 123456,
        "names": [f"layer {n + 1}" for n in range(layers)],
        "steps": [10 * (t + 1) for t in range(steps)],
        "load": rows,
        "series": {
            "entropy_norm": figures(0.7),
            "max_load_ratio": [[max(row) for row in at] for at in rows],
            "router_confidence": figures(0.2),
            "dropped_frac": figures(0.01),
            "cosine_to_each_other": [None, *figures(0.97)[1:]],  # before the first evaluation
            "cosine_to_dense": [None, *figures(0.9)[1:]],
        },
        "norms": [[round(0.9 + (n + e) / 40, 3) for e in range(experts)] for n in range(layers)],
        "domains": {
            "names": list(domains),
            "load": [load(3 + d) for d in range(len(domains))],
            "specialisation": [0.1 + n / layers / 2 for n in range(layers)],
        },
        "drift": {
            "reference": "base",
            "overlap": [0.9 - n / layers / 3 for n in range(layers)],
            "divergence": [0.01 + n / layers / 7 for n in range(layers)],
            "domains": {
                name: {
                    "overlap": [0.9] * layers,
                    "divergence": [0.02] * layers,
                    "confidence": [0.31, 0.35],
                    "loss": [2.5, 2.25 + d],
                }
                for d, name in enumerate(domains)
            },
        },
        "alarms": [],
        "worst": list(reversed(range(layers))),
        "summary": {
            "load_cv": 0.4321,
            "dead_frac": 0.0,
            "entropy_norm": 0.87654,
            "effective_experts": 3.21,
            "max_load_ratio": 1.797,
            "min_load_ratio": 0.131,
            "dropped_frac": 0.0123,
            "z_loss": None,
            "worst_layer": 2,
        },
        **other,
    }


def alarm(layer, experts, step, cleared=None):
    what = f"layer {layer} collapsed at {step}"
    return {
        "kind": "collapse",
        "layer": layer,
        "experts": experts,
        "step": step,
        "figure": 0.61,
        "limit": 0.5,
        "what": what,
        "advice": "Raise the balance loss.",
        "cleared": cleared,
    }


class Seen(NamedTuple):
    """What came back from the browser."""

    found: Any  # what the script returned
    dom: str
    console: list[str]


def look(page: str, folder: Path, script: str = "return null", *, dark: bool = False) -> Seen:
    """Render a page; `script` is the body of a function that runs in it, and returns JSON.

    Without Chromium the test is skipped on a laptop and fails in CI.
    """
    write = f"seen.textContent = JSON.stringify((() => {{{script}}})());"
    probe = (
        "<script>addEventListener('load', () => {const seen = document.createElement('pre');"
        f"seen.id = 'seen'; {write} document.body.append(seen);}});</script>"
    )
    file = folder / "page.html"
    # before the last end tag: data may hold the same text
    head, end, rest = page.rpartition("</body>")
    file.write_text(f"{head}{probe}{end}{rest}", encoding="utf-8")
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [_chromium(), *FLAGS, theme, "--window-size=1200,1600"]
    command += [f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    dom = done.stdout.decode()
    console = re.findall(r".*CONSOLE.*", done.stderr.decode(errors="replace"))
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, f"the script did not run: {console}"
    return Seen(json.loads(html.unescape(found[1])), dom, console)


def _chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    missing = "Chromium is missing: apt-get install chromium"
    return pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
