// A mapping's N over recorded losses, redrawn at every move of a slider, without a kernel.
// Every number is computed as in repeatlab/repetition/mappings.py, in the same order of operations.

/** Sum as numpy does, pairwise by blocks, so that means have the same last bit. */
function sum(values, start = 0, n = values.length) {
  if (n > 128) {
    const half = Math.floor(n / 16) * 8;
    return sum(values, start, half) + sum(values, start + half, n - half);
  }
  let rest = start;
  let total = 0;
  if (n >= 8) {
    const r = Array.from(values.slice(start, start + 8));
    for (rest = start + 8; rest + 8 <= start + n; rest += 8) {
      for (let lane = 0; lane < 8; lane += 1) r[lane] += values[rest + lane];
    }
    total = r[0] + r[1] + (r[2] + r[3]) + (r[4] + r[5] + (r[6] + r[7]));
  }
  for (; rest < start + n; rest += 1) total += values[rest];
  return total;
}

/** What a mapping may know of the losses before the one that it decides on. */
class LossStats {
  constructor(window) {
    this.ring = new Float64Array(window);
    this.count = 0;
    this.progress = 0;
  }

  get full() {
    return this.count >= this.ring.length;
  }

  get mean() {
    return sum(this.ring) / this.ring.length;
  }

  get std() {
    const mean = this.mean;
    return Math.sqrt(sum(this.ring.map((loss) => (loss - mean) * (loss - mean))) / this.ring.length);
  }

  quantile(q) {
    const losses = this.ring.slice().sort();
    const place = q * (losses.length - 1);
    const below = Math.floor(place);
    const [low, high] = [losses[below], losses[Math.min(below + 1, losses.length - 1)]];
    return low + (high - low) * (place - below);
  }

  observe(loss) {
    if (this.ring.length) this.ring[this.count % this.ring.length] = loss;
    this.count += 1;
  }
}

const falling = (share) => (loss, stats, { high, low }) =>
  Math.floor(low + (high - low) * share(stats.progress) + 0.5);

/** Name -> its fields with their defaults, t apart, and N of a loss that is a float32. */
const MAPPINGS = {
  constant: { fields: { repeats: 1 }, count: (loss, stats, { repeats }) => repeats },
  threshold: {
    fields: { t: null, repeats: 2 },
    count: (loss, stats, { t, repeats }) => (loss > Math.fround(t) ? repeats : 1),
  },
  linear: {
    fields: { t: null, max_repeats: 5 },
    count: (loss, stats, { t, max_repeats }) =>
      Math.floor(Math.max(1, Math.min(max_repeats, (loss / t) * (1 + 2 ** -22)))),
  },
  cosine: {
    fields: { high: 5, low: 1 },
    count: falling((progress) => (1 + Math.cos(Math.PI * progress)) / 2),
  },
  ramp: { fields: { high: 5, low: 1 }, count: falling((progress) => 1 - progress) },
  control_limit: {
    fields: { k: 3, repeats: 5, window: 100 },
    count: (loss, stats, { k, repeats }) =>
      stats.full && loss > stats.mean + k * stats.std ? repeats : 1,
  },
  quantile: {
    fields: { levels: 0.8, window: 100 },
    count: (loss, stats, { levels }) =>
      stats.full ? 1 + [levels].flat().filter((level) => loss > stats.quantile(level)).length : 1,
  },
  zscore: {
    fields: { step: 1, max_repeats: 5, window: 100 },
    count: (loss, stats, { step, max_repeats }) => {
      const std = stats.std;
      if (!stats.full || std === 0) return 1;
      const steps = Math.min(max_repeats - 1, (loss - stats.mean) / std / step);
      return 1 + Math.floor(Math.max(0, steps));
    },
  },
};

/** Return N of fresh batches with these losses, up to the one on which the budget is spent. */
function countsOnTrace(name, fields, losses, maxUpdates) {
  if (fields.low > fields.high) {
    throw new RangeError(`low must not exceed high, but ${fields.low} > ${fields.high}`);
  }
  const stats = new LossStats(fields.window ?? 0);
  const counts = [];
  let left = maxUpdates;
  for (const loss of losses) {
    if (!left) break;
    stats.progress = (maxUpdates - left) / maxUpdates;
    counts.push(Math.min(MAPPINGS[name].count(loss, stats, fields), left));
    left -= counts.at(-1);
    stats.observe(loss);
  }
  return counts;
}

// Field -> least, most and step of its slider; that of t is logarithmic, about the losses.
const COUNT = [1, 10, 1];
const RANGES = {
  repeats: COUNT, max_repeats: COUNT, low: COUNT, high: COUNT,
  window: [2, 500, 1], k: [0.1, 6, 0.1], step: [0.1, 4, 0.1], levels: [0.05, 0.99, 0.01],
};

function inWords(counts, batches, maxUpdates) {
  const made = counts.reduce((total, count) => total + count, 0);
  const more = counts.filter((count) => count > 1).length / counts.length;
  const end = made === maxUpdates ? "the budget is spent" : "the trace ends";
  return (
    `mean N ${(made / counts.length).toFixed(3)}, N > 1 on ${(100 * more).toFixed(1)}% of fresh ` +
    `batches; after ${counts.length} of ${batches} ${end}: ${made} of ${maxUpdates} updates`
  );
}

function render({ model, el }) {
  const { buffer, byteOffset, byteLength } = model.get("losses");
  const losses = new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength));
  const maxUpdates = model.get("max_updates");
  const root = element(el, "div", { class: "repeatlab" });
  const forms = element(root, "div", { class: "bar" });
  const drawing = element(root, "div");
  const recorded = binned(losses);
  const t = model.get("t");
  const sides = COLOURS.slice(1, 3).map((colour) => ({ colour, counts: [] }));

  /** Return the mapping of a side and its fields, those not asked for at their defaults. */
  function chosen(place) {
    const { name, ...given } = model.get("chosen")[place];
    const fields = { ...MAPPINGS[name].fields, ...given };
    return { name, fields: "t" in fields ? { ...fields, t: fields.t ?? t } : fields };
  }
  function choose(place, name, fields) {
    model.set("chosen", model.get("chosen").with(place, { name, ...fields }));
    model.save_changes();
  }
  function slider(place, name, field) {
    const [min, max, step] = RANGES[field] ?? [Math.log10(t / 100), Math.log10(t * 100), 0.005];
    const [there, back] = field === "t" ? [Math.log10, (v) => 10 ** v] : [Number, Number];
    const { fields } = chosen(place);
    const label = element(sides[place].box, "label");
    element(label, "span", {}, field);
    const oninput = () => {
      const value = back(Number(input.value));
      output.textContent = shown(value);
      choose(place, name, { ...chosen(place).fields, [field]: value });
      count(place);
      draw();
    };
    const ranged = { type: "range", min, max, step, "aria-label": field, oninput };
    const input = element(label, "input", { ...ranged, value: there(fields[field]) });
    const output = element(label, "output", {}, shown(fields[field]));
  }
  function ask(place) {
    const side = sides[place];
    const { name, fields } = chosen(place);
    side.box.replaceChildren();
    choice(side.box, "mapping", Object.keys(MAPPINGS), name, (next) => {
      choose(place, next, {});
      ask(place);
      draw();
    });
    for (const field of Object.keys(fields)) slider(place, name, field);
    side.said = element(side.box, "div", { class: "said", "aria-live": "polite" });
    count(place);
  }
  function count(place) {
    const side = sides[place];
    const { name, fields } = chosen(place);
    try {
      side.counts = countsOnTrace(name, fields, losses, maxUpdates);
      side.said.textContent = inWords(side.counts, losses.length, maxUpdates);
    } catch (error) {
      side.said.textContent = error.message; // two sliders that contradict each other
    }
  }
  function draw() {
    const asked = sides.map((_, place) => chosen(place));
    const N = sides.map(({ counts, colour }, place) => {
      return { name: asked[place].name, colour, data: { N: binned(counts) } };
    });
    const lines = asked.map(({ fields }, place) => ({ value: fields.t, colour: sides[place].colour }));
    charts(drawing, {
      xlabel: "fresh batch",
      panels: [
        { key: "loss", label: "first loss", height: 150, log: true, lines: lines.filter(({ value }) => value) },
        { key: "N", label: "N", height: 120, step: true, zero: true },
      ],
      series: [{ name: "recorded", colour: COLOURS[0], data: { loss: recorded } }, ...N],
    });
  }
  sides.forEach((side, place) => {
    side.box = element(forms, "div", { class: "side", style: `border-color: ${side.colour}` });
    ask(place);
  });
  return followWidth(root, draw);
}

export default { render, MAPPINGS, countsOnTrace };
