"use strict";
// Data goes into the page as text nodes and attributes only: a hostile name stays a name.
const R = JSON.parse(document.getElementById("report").textContent);
const $ = id => document.getElementById(id), last = R.steps.length - 1, run = R.kind === "run";
const bold = R.worst.slice(0, 3);
let now = last;  // the step on show, as an index

// ---- words for numbers
const fix = (v, digits) => v == null ? "–" : v.toFixed(digits);
const times = v => v == null ? "–" : v.toFixed(2) + "x";
const percent = v => v == null ? "–" : v > 0 && v < 0.0005 ? "<0.1%" : (100 * v).toFixed(1) + "%";
const short = (v, digits) => typeof v === "number" ? +v.toFixed(digits) : v ?? "–";
const count = n => n.toLocaleString("en-US");
const some = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

// ---- what the report says of a layer and of an expert
const at = (name, layer, t = last) => R.series[name]?.[t]?.[layer] ?? null;
const none = run ? "no token in this step" : "no token";
const dead = (t, l, e) => R.load[t][l][e] === 0;
const norm = (t, l, e) => t === last ? R.norms?.[l][e] ?? null : null;
const silent = (t, l, e) => norm(t, l, e) != null && norm(t, l, e) < 0.01;

// ---- elements
function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  return told(node, attributes, ...children);
}
function told(node, attributes, ...children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const row = (table, head, ...cells) =>
  $(table).tBodies[0].append(el("tr", {}, el("th", { scope: "row" }, head), ...cells));
const cell = (name, value, text, more = {}) =>
  el("td", { class: "n", "data-name": name, "data-value": String(value), ...more }, text);
function onWidth(box, draw) {  // only the width counts: drawing changes the height
  let width = box.clientWidth;
  new ResizeObserver(() => {
    if (box.clientWidth === width) return;
    width = box.clientWidth;
    requestAnimationFrame(draw);
  }).observe(box);
}
function onKeys(box, steps, act) {
  box.addEventListener("keydown", event => {
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    act(steps[event.key]);
  });
}

// ---- verdict, alarms, summary
function header() {
  const open = R.alarms.filter(a => a.cleared == null).length;
  const parts = open ? [some(open, "alarm") + " open"] : [];
  if (!run) {  // in one step of a run chance may leave an expert out; a whole audit tells
    const pairs = R.load[last].flatMap((experts, l) => experts.map((_, e) => [l, e]));
    const gone = pairs.filter(pair => dead(last, ...pair)).length;
    const mute = pairs.filter(pair => !dead(last, ...pair) && silent(last, ...pair)).length;
    if (gone) parts.push(some(gone, "expert") + " got no token");
    if (mute) parts.push(some(mute, "expert") + " silent");
  }
  const well = run ? "✓ No alarm is open" : "✓ All experts alive";
  $("verdict").textContent = parts.length ? "▲ " + parts.join("; ") : well;
  $("verdict").classList.toggle("bad", parts.length > 0);
  const facts = [R.family, `${some(R.layers, "MoE layer")} of ${some(R.experts, "expert")}`];
  if (R.top_k) facts.push(`top_k ${R.top_k}`);
  const tokens = some(R.tokens, "token");
  facts.push(run ? `step ${R.steps[last]}, ${tokens} so far` : `counted over ${tokens}`);
  $("facts").textContent = facts.join(" · ");
}

function alarms() {
  if (!R.alarms.length) return $("alarms").remove();
  const rank = a => R.worst.indexOf(a.layer);
  for (const a of [...R.alarms].sort((a, b) => rank(a) - rank(b) || b.step - a.step)) {
    const open = a.cleared == null, facts = [];
    if (rank(a) >= 0) facts.push(R.names[a.layer]);
    facts.push(`measured ${short(a.figure, 4)}, limit ${short(a.limit, 4)}`);
    if (run) facts.push(`since step ${a.step}`);
    if (!open) facts.push(`ended at step ${a.cleared}`);
    const box = el("div", { class: open ? "alarm" : "alarm over", "data-kind": a.kind },
      el("p", {}, el("strong", {}, (open ? "▲ " : "") + a.what)), el("p", {}, a.advice),
      el("p", { class: "soft" }, facts.join(" · ")));
    if (open && rank(a) >= 0) {
      const show = el("button", { type: "button" }, "show in the map");
      show.onclick = () => {
        map.go(rank(a), a.experts?.[0] ?? 0);
        $("heat").focus();
        $("heat").scrollIntoView({ block: "center" });
      };
      box.append(show);
    }
    $(open ? "open" : "ended").append(box);
  }
  const over = $("ended").children.length - 1;
  $("ended").hidden = !over;
  $("ended").firstElementChild.textContent = some(over, "alarm") + " that ended";
  if (!$("open").children.length) $("open").append(el("p", { class: "fine" }, "✓ No alarm is open."));
}

// null: no honest limit, in one step or for this shape; alarms judge more closely
const unsaid = () => null, roomy = R.experts > 4 * R.top_k;  // else 4x is all tokens, or more
const READINGS = [
  ["dead_frac", "experts without a token", percent, "near 0%", unsaid],
  ["entropy_norm", "load entropy", v => fix(v, 3), "above 0.8", v => v > 0.8],
  ["effective_experts", "effective experts", v => fix(v, 1), "most of them", v => v >= R.experts / 2],
  ["max_load_ratio", "hottest expert", v => times(v) + " its share", "below 4x", v => roomy ? v < 4 : null],
  ["min_load_ratio", "coldest expert", v => times(v) + " its share", "above 0", unsaid],
  ["dropped_frac", "dropped tokens", percent, "near 0%", v => v < 0.25],
  ["cosine_to_each_other", "experts alike (cosine)", v => fix(v, 4), "below 1", unsaid],
  ["cosine_to_dense", "like the dense model", v => fix(v, 4), "below 1", unsaid],
];
function summary() {
  for (const [name, words, show, healthy, good] of READINGS) {
    const value = R.summary[name];
    if (value == null) continue;
    const fine = good(value), state = el("td", {});
    if (fine != null) told(state, { class: fine ? "fine" : "look" }, fine ? "✓ fine" : "▲ look");
    row("summary", words, cell(name, value, show(value)), el("td", { class: "soft" }, healthy), state);
  }
  for (const [name, value] of Object.entries(R.summary)) row("all", name, cell(name, value, short(value, 4)));
}
