// The run store in a notebook: filter and click, look at runs, compare arms, start and stop a study.
// The kernel reads and computes (explorer.py); here is drawn what it has found.

/** Let the browser save rows as a CSV file. */
function download(name, rows) {
  const cell = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
  const text = rows.map((row) => row.map((value) => cell(value ?? "")).join(",")).join("\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${text}\n`], { type: "text/csv" }));
  link.download = `${name}.csv`;
  link.click();
  URL.revokeObjectURL(link.href);
}

function render({ model, el }) {
  const root = element(el, "div", { class: "repeatlab" });
  const get = (name) => model.get(name);
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const part = (title) => {
    element(root, "h4", {}, title);
    return [element(root, "div", { class: "bar" }), element(root, "div")];
  };
  const head = element(root, "div", { class: "bar" });
  const filters = element(root, "div", { class: "bar" });
  const list = element(root, "div", { class: "scroll" });
  const [runsBar, runsDrawing] = part("Runs");
  const [armsBar, armsDrawing] = part("Arms compared");
  const pairsDrawing = element(root, "div");
  const wanted = { task: "", method: "", seed: "", status: "" };
  let sorted = null;

  /** Return the filtered runs as objects. */
  function rows() {
    const { values, ...columns } = get("table");
    const all = (columns.id ?? []).map((_, i) => ({
      ...Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column[i]])),
      value: values[get("metric")]?.[i],
    }));
    const fits = (row) => Object.entries(wanted).every(([name, value]) => !value || String(row[name]) === value);
    return all.filter(fits);
  }
  function drawHead() {
    head.replaceChildren();
    const studies = Object.entries(get("studies")).map(([name, count]) => [name, `${name} (${count})`]);
    choice(head, "study", studies, get("study"), (name) => set("study", name));
    const button = (text, what, disabled) =>
      element(head, "button", { onclick: () => model.send({ do: what }), disabled }, text);
    button("Refresh", "refresh");
    if (get("params")) {
      button("Start or go on", "start", get("running"));
      button("Stop", "stop", !get("running"));
    }
    element(head, "span", { class: "said", "aria-live": "polite" }, get("said"));
  }
  function drawFilters() {
    filters.replaceChildren();
    for (const name of Object.keys(wanted)) {
      const found = [...new Set((get("table")[name] ?? []).map(String))];
      if (!found.includes(wanted[name])) wanted[name] = "";
      choice(filters, name, [["", "all"], ...found], wanted[name], (value) => {
        wanted[name] = value;
        drawList();
      });
    }
    choice(filters, "metric", get("metrics"), get("metric"), (value) => set("metric", value));
    const save = () => {
      const found = rows();
      const names = Object.keys(found[0] ?? {}).filter((name) => name !== "value");
      const lines = found.map((row) => [get("study"), ...names.map((name) => row[name]), row.value]);
      download(`${get("study")}-runs`, [["study", ...names, `validation.${get("metric")}`], ...lines]);
    };
    element(filters, "button", { onclick: save }, "CSV");
  }
  function drawList() {
    list.replaceChildren();
    const found = rows();
    const keys = [...new Set(found.map(({ task, method }) => JSON.stringify([task, method])))];
    const arms = keys.map((key) => {
      const [task, method] = JSON.parse(key);
      const runs = found.filter((row) => row.task === task && row.method === method);
      const [N, value] = ["N", "value"].map((name) => mean(runs.map((run) => run[name])));
      return { task, method, N, value, runs };
    });
    if (sorted) arms.sort((a, b) => (a[sorted] > b[sorted]) - (a[sorted] < b[sorted]));
    const table = element(list, "table", { class: "runs" });
    const top = element(table, "tr");
    element(top, "th", {}, "compare");
    const sort = (key) => ({ title: "sort", onclick: () => { sorted = key; drawList(); } });
    const heads = { task: "task", method: "method", N: "mean N", value: get("metric") };
    for (const [key, text] of Object.entries(heads)) element(top, "th", sort(key), text);
    element(top, "th", {}, "seeds: click to look at a run");
    for (const arm of arms) drawArm(table, arm);
    if (!arms.length) element(list, "div", {}, "no run is like that");
  }
  function drawArm(table, { task, method, N, value, runs }) {
    const line = element(table, "tr");
    const compared = get("task") === task && get("arms").includes(method);
    const toggle = () => {
      const others = get("task") === task ? get("arms").filter((arm) => arm !== method) : [];
      model.set("task", task);
      set("arms", compared ? others : [...others, method]);
    };
    const box = { type: "checkbox", onchange: toggle, "aria-label": `compare ${method} on ${task}` };
    element(element(line, "td"), "input", box).checked = compared;
    for (const text of [task, method, shown(N), shown(value)]) element(line, "td", {}, text);
    const chips = element(line, "td");
    for (const { id, seed, status, value: own } of runs) {
      const on = get("clicked").includes(id);
      const others = get("clicked").filter((one) => one !== id);
      const click = () => set("clicked", on ? others : [...others, id]);
      const chip = { class: status, title: `${status} ${shown(own)}`, "aria-pressed": on, onclick: click };
      element(chips, "button", { ...chip, disabled: status === "missing" }, seed);
    }
  }
  function drawRuns() {
    const curves = get("curves");
    const kinds = [["loss", "loss"], ["N", "N"], ["metric", get("metric")], ["rate", "learning rate"]];
    runsBar.replaceChildren();
    if (!curves.length) return runsDrawing.replaceChildren("Click on a seed above.");
    const save = () => {
      const lines = curves.flatMap(({ name, id, data }) => kinds.flatMap(
        ([key, text]) => data[key].x.map((x, i) => [id, name, text, x, data[key].y[i]])));
      download(`${get("study")}-curves`, [["run", "name", "of", "update", "value"], ...lines]);
    };
    element(runsBar, "button", { onclick: save }, "CSV");
    element(runsBar, "button", { onclick: () => set("clicked", []) }, "Clear");
    charts(runsDrawing, {
      xlabel: "update",
      panels: kinds.map(([key, label]) => ({ key, label, height: 100, log: key === "loss", step: key === "N" })),
      series: curves.map((run, i) => ({ ...run, colour: COLOURS[(i + 1) % COLOURS.length] })),
    });
  }
  function drawArms() {
    const { means, seeds, pairs, axes, axis, differences } = get("comparison");
    armsBar.replaceChildren();
    pairsDrawing.replaceChildren();
    if (!means?.length) return armsDrawing.replaceChildren("Choose arms of one task above.");
    const [base] = get("arms");
    const colour = (method) => COLOURS[get("arms").indexOf(method) % COLOURS.length];
    choice(armsBar, "over", Object.entries(axes), axis, (value) => set("axis", value));
    const first = (method) => set("arms", [method, ...get("arms").filter((one) => one !== method)]);
    choice(armsBar, "compared with", get("arms"), base, first);
    const columns = ["task", "method", "against", "seed", "status", "x", "value", "other", "difference"];
    const save = () => {
      const lines = pairs.map((pair) => columns.map((name) => pair[name]));
      download(`${get("study")}-pairs`, [columns.with(5, axis), ...lines]);
    };
    element(armsBar, "button", { onclick: save }, "CSV");
    const curve = (method, data) => ({ colour: colour(method), data: { y: data } });
    const thin = seeds.map(({ method, ...data }) => ({ of: method, ...curve(method, data) }));
    const lines = means.map(({ method, ...data }) => ({ name: method, ...curve(method, data) }));
    charts(armsDrawing, {
      xlabel: axes[axis],
      panels: [{ key: "y", label: `validation ${get("metric")}`, height: 220 }],
      series: [...thin, ...lines],
    });
    if (!differences.length) return;
    const said = ({ seed, status, difference, value, other, x }) =>
      `seed ${seed}: ${status === "paired" ? shown(difference) : status} ` +
      `(${shown(value)} against ${shown(other)} at ${shown(x)})`;
    dots(pairsDrawing, {
      xlabel: `${get("metric")} by which it is better than ${base}, seed by seed (bar: 95 % t-interval)`,
      rows: differences.map((row) => ({
        ...row, name: row.method, colour: colour(row.method),
        dots: pairs.filter((pair) => pair.method === row.method && pair.side !== null)
          .map((pair) => ({ text: said(pair), value: pair.difference ?? pair.side * Infinity })),
      })),
    });
  }
  const follow = (names, draw) => names.split(" ").forEach((name) => model.on(`change:${name}`, draw));
  follow("studies study running said", drawHead);
  follow("table metrics metric", drawFilters);
  follow("table metric clicked arms task", drawList);
  follow("curves", drawRuns);
  follow("comparison", drawArms);
  drawHead();
  drawFilters();
  drawList();
  return followWidth(root, () => { drawRuns(); drawArms(); });
}

export default { render };
