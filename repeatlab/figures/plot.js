// Drawing tools that the widgets share: plain SVG, no library, nothing from a network.
// A widget's front end is one ES module: this text with the widget's own behind it.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#555555", "#E25303", "#0072B2", "#009E73", "#BE3880", "#BD8700", "#29A3E0", "#7F2900"];
const [LEFT, RIGHT, GAP, FOOT] = [58, 10, 10, 34]; // pixels beside, between and below panels

/** Append an element; inside an <svg> it is one of SVG. */
function element(parent, tag, attributes = {}, text = "") {
  const drawn = tag === "svg" || parent.namespaceURI === SVG;
  const made = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  // Else JupyterLab takes keys such as the arrows of a slider for its own.
  if (["input", "select", "button"].includes(tag)) made.setAttribute("data-lm-suppress-shortcuts", "true");
  if (text !== "") made.textContent = text;
  parent.append(made);
  return made;
}

/** Append a label with a select; `options` are texts, or pairs of value and text. */
function choice(parent, name, options, value, chosen) {
  const onchange = (event) => chosen(event.target.value);
  const label = element(parent, "label", {}, `${name} `);
  const select = element(label, "select", { "aria-label": name, onchange });
  for (const option of options) {
    const [key, text] = [option, option].flat().slice(0, 2);
    element(select, "option", { value: key, selected: String(key) === String(value) }, text);
  }
}

/** Return a number for people: four digits, and nothing for what is none. */
function shown(value) {
  if (value == null || Number.isInteger(value)) return String(value ?? "");
  return String(Number(value.toPrecision(4)));
}

function mean(values) {
  const found = values.filter((value) => value != null);
  return found.length ? found.reduce((total, value) => total + value, 0) / found.length : null;
}

/** Return at most 600 means of consecutive values, and where each begins. */
function binned(values) {
  const size = Math.max(1, Math.ceil(values.length / 600));
  const x = Array.from({ length: Math.ceil(values.length / size) }, (_, bin) => bin * size);
  return { x, y: x.map((start) => mean(Array.from(values.slice(start, start + size)))) };
}

/** Return round numbers from `low` to `high`, about `count` of them. */
function ticks({ low, high, log }, count = 5) {
  const exponents = (unit) => [Math.floor(Math.log10(unit)), Math.floor(Math.log10(high))];
  if (log) {
    const [from, to] = exponents(low);
    const powers = Array.from({ length: to - from + 1 }, (_, i) => 10 ** (from + i));
    const all = powers.flatMap((power) => (to - from > 3 ? [power] : [power, 2 * power, 5 * power]));
    return all.filter((tick) => tick >= low && tick <= high);
  }
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

/** Return where values lie between the pixels `from` and `to`, on a log scale where that helps. */
function scale(values, from, to, { log = false, pad = 0.05 } = {}) {
  const finite = values.filter(Number.isFinite);
  let [a, b] = finite.length
    ? finite.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity])
    : [0, 1];
  const inLog = log && a > 0 && b / a > 10;
  const [put, back] = inLog ? [Math.log10, (value) => 10 ** value] : [Number, Number];
  [a, b] = [put(a), put(b)];
  const room = pad * (b - a) || Math.abs(a) / 2 || 0.5;
  [a, b] = [a - room, b + room];
  return {
    low: back(a), high: back(b), log: inLog,
    at: (value) => from + ((put(value) - a) / (b - a)) * (to - from),
    value: (pixel) => back(a + ((pixel - from) / (to - from)) * (b - a)),
  };
}

function path(xs, ys, x, y, step = false) {
  let [line, pen] = ["", "M"];
  xs.forEach((value, i) => {
    const gone = ys[i] == null;
    const [left, top] = gone ? [] : [x.at(value).toFixed(1), y.at(ys[i]).toFixed(1)];
    if (!gone) line += step && pen === "L" ? `H${left}V${top}` : `${pen}${left} ${top}`;
    pen = gone ? "M" : "L";
  });
  return line;
}

/** Begin a drawing as wide as its host, over the x axis `x(width)`. */
function canvas(host, height, x, label, count) {
  const width = Math.max(200, host.clientWidth);
  const svg = element(host, "svg", { viewBox: `0 0 ${width} ${height}` });
  const centred = { "text-anchor": "middle" };
  for (const tick of ticks(x(width), count ?? width / 110)) {
    element(svg, "text", { x: x(width).at(tick), y: height - 20, ...centred }, shown(tick));
  }
  element(svg, "text", { x: width / 2, y: height - 4, ...centred }, label);
  const rule = (x1, y1, x2, y2, more) =>
    element(svg, "line", { x1, y1, x2, y2, stroke: "currentColor", ...more });
  return { svg, width, x: x(width), rule };
}

/**
 * Draw panels one below another over one x; under the pointer a table names every value.
 *
 * panels: {key, label, height, log, step, zero, lines: [{value, colour}]}
 * series: {name, colour, data: {key: {x, y, low, high}}, of}; one that is `of` another, which has
 * that name, is drawn thin, and its value stands in the other's row.
 */
function charts(host, { panels, series, xlabel }) {
  host.replaceChildren();
  const table = element(element(host, "div", { style: "overflow-x: auto" }), "table");
  const height = panels.reduce((total, panel) => total + panel.height + GAP, FOOT);
  const everyX = series.flatMap((one) => Object.values(one.data).flatMap((data) => data.x));
  const over = (width) => scale(everyX, LEFT, width - RIGHT, { pad: 0.01 });
  const { svg, width, x, rule } = canvas(host, height, over, xlabel);
  let top = GAP / 2;
  for (const { key, label, log, step, zero, lines = [], ...panel } of panels) {
    const bottom = top + panel.height;
    const found = series.filter((one) => one.data[key]).map((one) => ({ ...one, ...one.data[key] }));
    const values = [...found.flatMap((one) => one.y), ...lines.map((line) => line.value), ...(zero ? [0] : [])];
    const y = scale(values, bottom, top, { log });
    const level = (value, more) => rule(LEFT, y.at(value), width - RIGHT, y.at(value), more);
    // N is a whole number, though a mean of several need not be.
    for (const tick of ticks(y).filter((one) => !step || Number.isInteger(one))) {
      level(tick, { "stroke-opacity": 0.12 });
      element(svg, "text", { x: LEFT - 5, y: y.at(tick) + 4, "text-anchor": "end" }, shown(tick));
    }
    for (const { value, colour } of lines) level(value, { stroke: colour, "stroke-dasharray": "5 3" });
    const middle = (top + bottom) / 2;
    element(svg, "text", { "text-anchor": "middle", transform: `translate(11 ${middle}) rotate(-90)` }, label);
    const within = (value) => Math.min(y.high, Math.max(y.low, value)); // a band may be far wider
    for (const one of found) {
      if (one.low?.every(Number.isFinite)) {
        const edge = [...one.low, ...one.high.toReversed()].map(within);
        const band = path([...one.x, ...one.x.toReversed()], edge, x, y);
        element(svg, "path", { d: band, fill: one.colour, "fill-opacity": 0.13 });
      }
      const pen = one.of ? { "stroke-width": 0.8, "stroke-opacity": 0.5 } : { "stroke-width": 1.6 };
      element(svg, "path", { d: path(one.x, one.y, x, y, step), fill: "none", stroke: one.colour, ...pen });
    }
    top = bottom + GAP;
  }
  const hair = rule(LEFT, 0, LEFT, height - FOOT, { visibility: "hidden" });

  /** Write the table of what holds at x; without one, at the end. */
  function read(at = Infinity) {
    const write = ({ data }, key) => {
      if (!data[key]?.x.length) return "";
      const { x: xs, y, low, high } = data[key];
      const past = at - xs.at(-1) > xs.at(-1) - (xs.at(-2) ?? 0); // a run that ended before
      if (past && at !== Infinity) return "";
      const place = Math.max(0, xs.findLastIndex((value) => value <= at));
      const band = low?.[place] == null ? "" : ` [${shown(low[place])}, ${shown(high[place])}]`;
      return shown(y[place]) + band;
    };
    const where = at === Infinity ? "at the end" : `${xlabel} ${shown(x.high > 20 ? Math.round(at) : at)}`;
    table.replaceChildren();
    const head = element(table, "tr");
    element(head, "th", { class: "number" }, where);
    for (const { label } of panels) element(head, "th", { class: "number" }, label);
    for (const one of series.filter(({ of }) => !of)) {
      const row = element(table, "tr");
      element(element(row, "td"), "span", { class: "swatch", style: `background: ${one.colour}` }).after(one.name);
      for (const { key } of panels) element(row, "td", { class: "number" }, write(one, key));
      const seeds = series.filter(({ of }) => of === one.name).map((seed) => write(seed, panels[0].key));
      if (seeds.length) element(row, "td", { class: "pale" }, `seeds ${seeds.join(", ")}`);
    }
  }
  svg.addEventListener("pointermove", ({ clientX }) => {
    const box = svg.getBoundingClientRect();
    const at = x.value(((clientX - box.left) / box.width) * width);
    const here = Math.min(x.high, Math.max(x.low, at));
    for (const end of ["x1", "x2"]) hair.setAttribute(end, x.at(here));
    hair.setAttribute("visibility", "visible");
    read(here);
  });
  svg.addEventListener("pointerleave", () => {
    hair.setAttribute("visibility", "hidden");
    read();
  });
  read();
}

/**
 * Draw a row of dots for each arm, one a seed, with mean and interval; the pointer names a dot.
 *
 * rows: {name, colour, dots: [{text, value}], mean, low, high}; an infinite value lies at the edge.
 */
function dots(host, { rows, xlabel }) {
  host.replaceChildren();
  const said = element(host, "div", { class: "pale" }, "Point at a dot.");
  const values = rows.flatMap((row) => [row.low, row.high, ...row.dots.map((dot) => dot.value)]);
  const left = Math.min(150, host.clientWidth / 4);
  const over = (width) => scale([0, ...values], left, width - 2 * RIGHT);
  const { svg, x, rule } = canvas(host, rows.length * 26 + FOOT, over, xlabel, 4);
  rule(x.at(0), 0, x.at(0), rows.length * 26);
  rows.forEach(({ name, colour: stroke, mean: middle, low, high, dots: found }, place) => {
    const y = (place + 0.5) * 26;
    element(svg, "text", { x: left - 8, y: y + 4, "text-anchor": "end" }, name);
    const bar = { stroke, "stroke-width": 5, "stroke-opacity": 0.3 };
    if (low != null) rule(x.at(low), y, x.at(high), y, bar);
    if (middle != null) rule(x.at(middle), y - 8, x.at(middle), y + 8, { stroke, "stroke-width": 2.5 });
    for (const { text, value } of found) {
      const cx = x.at(Math.min(x.high, Math.max(x.low, value)));
      const onpointerenter = () => said.replaceChildren(`${name}, ${text}`);
      element(svg, "circle", { cx, cy: y, r: 4, fill: stroke, "fill-opacity": 0.7, onpointerenter });
    }
  });
}

/** Call `draw` now and whenever the width of `el` has changed; return what ends that. */
function followWidth(el, draw) {
  let width = -1;
  const observer = new ResizeObserver(() => {
    if (Math.abs(el.clientWidth - width) < 2) return;
    width = el.clientWidth;
    draw();
  });
  observer.observe(el);
  return () => observer.disconnect();
}
