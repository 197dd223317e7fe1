// ---- colours: a log scale, clipped at a quarter and four times the even share
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
function palette() {
  const [low, even, high] = ["--low", "--even", "--high"].map(name => rgb(css(name)));
  return load => {
    const t = Math.max(-1, Math.min(1, Math.log2(Math.max(load, 1e-9)) / 2)), end = t < 0 ? low : high;
    return even.map((v, i) => Math.round(v + (end[i] - v) * Math.abs(t)));
  };
}
function inkOn(color) {  // black or white, whichever contrasts more
  const linear = color.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 ? "#000" : "#fff";
}
function legend() {
  const color = palette(), steps = { "¼x or less": 0.25, "½x": 0.5, "1x, even": 1, "2x": 2, "4x or more": 4 };
  $("legend").replaceChildren(...Object.entries(steps).map(([words, load]) =>
    el("span", {}, el("i", { style: `background:rgb(${color(load)})` }), " " + words)));
  $("legend").append(el("span", {}, "✕ " + none));
  if (R.norms) $("legend").append(el("span", {}, "○ output norm below 0.01 (silent)"));
}

// ---- a heat map: rows of experts on a canvas, one focused cell, one line that reads it out
function heat(box, readout, { label, rows, load, mark, say }) {
  const names = el("ol", { "aria-hidden": "true" }), canvas = el("canvas"), frame = el("i"), top = 18;
  let r = 0, e = 0, wide = 0, high = 0;
  told(box, { tabindex: "0", role: "application", "aria-roledescription": "heat map",
    "aria-label": label + "; arrow keys move from cell to cell", "aria-describedby": readout.id });
  box.replaceChildren(names, el("div", { "aria-hidden": "true" }, canvas, frame));

  function draw() {
    const many = rows.length, scale = devicePixelRatio || 1, g = canvas.getContext("2d");
    high = many <= 12 ? 28 : many <= 32 ? 18 : 13;
    const size = { style: `height:${high}px;line-height:${high}px` };
    names.replaceChildren(...rows.map(name => el("li", { ...size, title: name }, name)));
    const room = (box.clientWidth - names.offsetWidth - 4) / R.experts;
    wide = Math.max(R.experts > 64 ? 3 : 12, Math.min(56, room));
    const width = Math.ceil(wide * R.experts) + 2, height = top + many * high + 2;
    Object.assign(canvas, { width: width * scale, height: height * scale });
    Object.assign(canvas.style, { width: width + "px", height: height + "px" });
    g.scale(scale, scale);
    Object.assign(g, { font: "11px system-ui, sans-serif", textAlign: "center", textBaseline: "middle" });
    g.fillStyle = css("--soft");
    const every = [1, 2, 4, 8, 16, 32, 64].find(n => n * wide >= 24) ?? 128;
    for (let i = 0; i < R.experts; i += every) g.fillText(i, Math.max(6, (i + 0.5) * wide), 8);
    const color = palette(), gap = wide > 7 ? 1 : 0;
    const each = act => rows.forEach((_, i) => { for (let j = 0; j < R.experts; j++) act(i, j, color(load(i, j))); });
    each((i, j, c) => {
      g.fillStyle = `rgb(${c})`;
      g.fillRect(j * wide, top + i * high, wide - gap, high - 1);
    });
    each((i, j, c) => sign(g, i, j, inkOn(c)));  // over all cells: in narrow ones a mark is wider
    go(r, e);
  }
  function sign(g, i, j, ink) {
    const kind = mark(i, j), numbered = wide >= 32 && high >= 18, half = Math.max(2.5, Math.min(wide, high) * 0.28);
    if (!kind && !numbered) return;
    const x = (j + 0.5) * wide, y = top + (i + 0.5) * high, value = load(i, j);
    g.fillStyle = ink;
    if (!kind) return g.fillText(fix(value, value < 9.95 ? 1 : 0), x, y);
    g.beginPath();
    if (kind === "silent") g.arc(x, y, half, 0, 7);
    else for (const side of [-half, half]) { g.moveTo(x - half, y - side); g.lineTo(x + half, y + side); }
    // where it is wider than its cell, a halo keeps it apart from the neighbours
    const lines = wide < 8 ? [[4, css("--card")], [1.6, css("--ink")]] : [[1.4, ink]];
    for (const [lineWidth, strokeStyle] of lines) { Object.assign(g, { lineWidth, strokeStyle }); g.stroke(); }
  }
  function go(to, expert) {
    r = Math.max(0, Math.min(rows.length - 1, to));
    e = Math.max(0, Math.min(R.experts - 1, expert));
    Object.assign(frame.style, { left: e * wide - 1 + "px", top: top + r * high - 1 + "px",
      width: wide + 2 + "px", height: high + 1 + "px", scrollMargin: `0 8px 0 ${names.offsetWidth}px` });
    readout.textContent = say(r, e);
  }
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
    Home: [0, -R.experts], End: [0, R.experts] };
  onKeys(box, steps, by => {
    go(r + by[0], e + by[1]);
    frame.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  canvas.addEventListener("pointermove", event => {
    const to = Math.floor((event.offsetY - top) / high), expert = Math.floor(event.offsetX / wide);
    if (to >= 0 && to < rows.length && expert >= 0 && expert < R.experts) go(to, expert);
  });
  draw();
  onWidth(box, draw);
  return { go, draw };
}
const map = heat($("heat"), $("heat-readout"), {
  label: "Load of every expert",
  rows: R.worst.map(l => R.names[l]),
  load: (r, e) => R.load[now][R.worst[r]][e],
  mark: (r, e) => dead(now, R.worst[r], e) ? "dead" : silent(now, R.worst[r], e) ? "silent" : "",
  say(r, e) {
    const l = R.worst[r], parts = [`load ${times(R.load[now][l][e])} its share`];
    if (dead(now, l, e)) parts.push(none);
    if (norm(now, l, e) != null) parts.push(`output norm ${fix(norm(now, l, e), 2)}`);
    if (silent(now, l, e)) parts.push("silent");
    return `${R.names[l]}, expert ${e}: ${parts.join(", ")}`;
  },
});
function slider() {
  if (!last) return $("time").remove();
  const show = () => {
    now = +$("step").value;
    $("when").textContent = `${count(R.steps[now])} of ${count(R.steps[last])}`;
    $("step").setAttribute("aria-valuetext", `step ${R.steps[now]}`);
    map.draw();
  };
  $("step").max = $("step").value = last;
  $("step").addEventListener("input", show);
  show();
}

// ---- curves over the steps
function curve(id, name, show, low, top) {
  const box = $(id), readout = $(id + "-readout"), rows = R.series[name], left = 38, bottom = 168;
  told(box, { tabindex: "0", role: "application", "aria-roledescription": "chart",
    "aria-labelledby": "h-" + id, "aria-describedby": readout.id });
  const span = R.steps[last] - R.steps[0] || 1, digits = top - low > 2 ? 0 : 2;
  const x = i => left + (box.clientWidth - left - 8) * (R.steps[i] - R.steps[0]) / span;
  const y = v => 8 + (bottom - 8) * (top - v) / (top - low);
  let t = last;
  const upright = () => ({ x1: x(t), x2: x(t), y1: 8, y2: bottom });
  const line = el("svg:line", { class: "now" });
  function draw() {
    const svg = el("svg:svg", { "aria-hidden": "true" });
    for (let v = low; v < top + 1e-9; v += (top - low) / 4) svg.append(
      el("svg:line", { x1: left, x2: box.clientWidth, y1: y(v), y2: y(v) }),
      el("svg:text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, fix(v, digits)));
    for (const [i, anchor] of [[0, "start"], [last, "end"]])
      svg.append(el("svg:text", { x: x(i), y: 186, "text-anchor": anchor }, `step ${count(R.steps[i])}`));
    for (const l of [...R.worst].reverse()) {
      const known = rows.map((_, i) => i).filter(i => at(name, l, i) != null);
      if (!known.length) continue;
      const points = known.map(i => `${x(i).toFixed(1)},${y(at(name, l, i)).toFixed(1)}`);
      svg.append(el("svg:path", { d: "M" + points.join("L"), class: "w" + bold.indexOf(l) }));
    }
    svg.append(told(line, upright()));
    box.replaceChildren(svg);
  }
  function go(to) {
    t = Math.max(0, Math.min(last, to));
    told(line, upright());
    const parts = bold.map(l => `${R.names[l]} ${show(at(name, l, t))}`);
    readout.textContent = `step ${R.steps[t]}: ${parts.join(", ")}`;
  }
  onKeys(box, { ArrowLeft: -1, ArrowRight: 1, Home: -last, End: last }, by => go(t + by));
  box.addEventListener("pointermove", event => {
    const away = i => Math.abs(x(i) - event.clientX + box.getBoundingClientRect().left);
    go(R.steps.reduce((best, _, i) => away(i) < away(best) ? i : best, 0));
  });
  draw();
  go(last);
  onWidth(box, draw);
}
function curves() {
  if (!last) return $("curves").remove();
  bold.forEach((l, i) => $("bold").append(el("span", {}, el("svg:svg", { "aria-hidden": "true" },
    el("svg:path", { d: "M0 5H30", class: "w" + i })), R.names[l])));
  const most = R.series.max_load_ratio.flat().reduce((a, b) => Math.max(a, b), 2);
  const least = R.series.entropy_norm.flat().reduce((a, b) => Math.min(a, b), 0.9);
  curve("max", "max_load_ratio", times, 0, 4 * Math.ceil(most / 4));
  curve("entropy", "entropy_norm", v => fix(v, 3), Math.floor(least * 5) / 5, 1);
  for (const [id, name] of [["alike", "cosine_to_each_other"], ["dense", "cosine_to_dense"]]) {
    const known = (R.series[name] ?? []).flat().filter(v => v != null);
    if (!known.length) { $(id).parentElement.remove(); continue; }
    const away = 1 - known.reduce((a, b) => Math.min(a, b), 1);  // experts part slowly
    curve(id, name, v => fix(v, 4), 1 - ([0.04, 0.2, 0.4, 1].find(span => span >= away) ?? 2), 1);
  }
}
