// ---- layers, domains, drift
const MORE = [["router_confidence", "confidence", v => fix(v, 3)], ["dropped_frac", "dropped", percent],
  ["cosine_to_each_other", "experts alike", v => fix(v, 4)], ["cosine_to_dense", "like the dense", v => fix(v, 4)]]
  .filter(([name]) => name in R.series);
function layers() {
  $("layers").caption.textContent = run ? `At step ${R.steps[last]}` : "In this count";
  $("layers").tHead.rows[0].append(...MORE.map(([, words]) => el("th", { scope: "col", class: "n" }, words)));
  for (const l of R.worst) {
    const load = R.load[last][l], hot = Math.max(...load), cold = Math.min(...load);
    const even = at("entropy_norm", l), most = at("max_load_ratio", l);
    const own = (name, value, text) => cell(name, value, text, { "data-layer": l });
    row("layers", R.names[l], own("entropy_norm", even, fix(even, 3)),
      own("max_load_ratio", most, `${load.indexOf(hot)}: ${times(most)}`),
      own("min_load_ratio", cold, `${load.indexOf(cold)}: ${times(cold)}`),
      ...MORE.map(([name, , show]) => own(name, at(name, l), show(at(name, l)))));
  }
}
function bars(id, values) {
  for (const l of R.worst) {
    const bar = el("i", { style: `width:${100 * Math.max(0, Math.min(1, values[l] ?? 0))}%` });
    row(id, R.names[l], el("td", { class: "bar", "aria-hidden": "true" }, bar),
      cell(id, values[l], fix(values[l], 3), { "data-layer": l }));
  }
}
function domains() {
  const D = R.domains, select = $("layer");
  if (!D) { $("domains").remove(); return null; }
  for (const l of R.worst) select.append(el("option", { value: l }, R.names[l]));
  const load = (r, e) => D.load[r][+select.value][e];
  const map = heat($("domain-heat"), $("domain-readout"), {
    label: "Load of every expert by domain",
    rows: D.names,
    load,
    mark: (r, e) => load(r, e) === 0 ? "dead" : "",
    say: (r, e) => `${D.names[r]}, ${R.names[+select.value]}, expert ${e}: load ${times(load(r, e))} its share`,
  });
  select.addEventListener("change", map.draw);
  bars("specialisation", D.specialisation);
  return map;
}
function drift() {
  if (!R.drift) return $("drift").remove();
  $("drift-note").textContent = "Per layer, how the same tokens are routed here and by "
    + `${R.drift.reference}: long bars on the left and short ones on the right mean little change.`;
  const mean = values => values.reduce((sum, v) => sum + (v ?? 0), 0) / values.length;
  for (const [name, D] of Object.entries(R.drift.domains)) {
    const both = (key, digits) => cell(key, D[key][1], D[key].map(v => fix(v, digits)).join(" → "), { "data-domain": name });
    const [before, now] = D.loss, change = before == null || now == null ? null : now - before;
    const one = (key, value, text) => cell(key, value, text, { "data-domain": name });
    row("drift-domains", name, both("loss", 3),
      one("change", change, change == null ? "–" : (change > 0 ? "+" : "") + change.toFixed(3)),
      one("overlap", mean(D.overlap), percent(mean(D.overlap))),
      one("divergence", mean(D.divergence), fix(mean(D.divergence), 4)), both("confidence", 3));
  }
  bars("overlap", R.drift.overlap);
  bars("divergence", R.drift.divergence);
}

header(); alarms(); summary(); slider(); legend(); curves(); layers(); drift();
const byDomain = domains();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  legend();
  map.draw();
  byDomain?.draw();
});
