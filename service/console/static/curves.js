// Live curves of a job: one chart per group of metrics, refreshed by the job's event stream. Another job can be overlaid,
// and the baseline, a job that the browser stores per project, is drawn on the pages of all jobs. Dragging across a chart
// or the fields above the charts select the steps that all charts show.
(function () {
  "use strict";
  const place = document.getElementById("curves");
  if (!place) return;
  const note = document.getElementById("curves-note");
  const smoothing = document.getElementById("smoothing");
  const logScale = document.getElementById("log-scale");
  const overlayField = document.getElementById("overlay");
  const overlayNote = document.getElementById("overlay-note");
  const zoomFrom = document.getElementById("zoom-from"), zoomTo = document.getElementById("zoom-to");
  const resetZoom = document.getElementById("reset-zoom");
  const MAX_POINTS = 1600; // of a metric in memory
  const GROUPED = ["loss"]; // prefixes whose metrics share a chart
  const ORDER = ["loss", "eval", "optim", "speed", "time", "data", "rank"];
  const PERCENT = ["speed/mfu"]; // metrics that are fractions
  const NAMES = {
    "optim/lr": "Learning rate", "optim/grad_norm": "Gradient norm", "speed/samples_per_s": "Samples per second",
    "time/step_s": "Seconds per step", "time/data_s": "Seconds of data wait per step", "speed/mfu": "Model FLOPs utilisation",
    "data/bad_samples": "Bad samples", "eval/knn_top1": "Nearest-neighbour top-1", loss: "Loss",
  };
  const series = new Map(); // name → {steps, values} of this job
  const compared = { baseline: null, overlay: null }; // {id, name, series} each
  const baselineKey = `amd-baseline-${place.dataset.project}`;
  const charts = new Map(); // group → {plot, element}
  let lastStep = -1;
  let zoom = null; // {min, max}: the steps that all charts show, with a max of null for the last step; null for all steps

  function merge(target, found) {
    for (const one of found.series) {
      const known = target.get(one.name);
      if (!known) target.set(one.name, { steps: one.steps.slice(), values: one.values.slice() });
      else if (one.steps.length) {
        // Keep what is older than the new points: a resumed run repeats steps.
        let kept = known.steps.findIndex((step) => step >= one.steps[0]);
        if (kept < 0) kept = known.steps.length;
        known.steps = known.steps.slice(0, kept).concat(one.steps);
        known.values = known.values.slice(0, kept).concat(one.values);
        if (known.steps.length > MAX_POINTS) thin(known);
      }
    }
  }

  // Bound the memory of a page that stays open for days: every second of the older points goes.
  function thin(one) {
    const half = one.steps.length >> 1;
    const keep = (_, index) => index >= half || index % 2 === 0;
    one.steps = one.steps.filter(keep);
    one.values = one.values.filter(keep);
  }

  async function load() {
    const response = await fetch(`${place.dataset.url}?since_step=${lastStep + 1}`, { headers: { "HX-Request": "true" } });
    if (!response.ok || response.status === 204) throw new Error(`the service answered ${response.status}`);
    const found = await response.json();
    merge(series, found);
    if (found.last_step !== null) lastStep = found.last_step;
    draw();
  }

  function groupOf(name) {
    const prefix = name.split("/")[0];
    return GROUPED.includes(prefix) ? prefix : name;
  }

  function smooth(values, weight) {
    if (!weight) return values;
    let mean = 0, total = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return null;
      mean = mean * weight + value * (1 - weight);
      total = total * weight + (1 - weight);
      return mean / total;
    });
  }

  function rowsOf(group) {
    const rows = [];
    for (const [name, one] of series) if (groupOf(name) === group) rows.push({ label: name, ...one });
    rows.sort((a, b) => a.label.localeCompare(b.label));
    for (const [role, found] of Object.entries(compared)) {
      for (const row of found ? rows.slice() : []) {
        const other = found.series.get(row.label);
        const name = role === "baseline" ? "the baseline" : found.name;
        if (other && !row.job) rows.push({ label: `${row.label} of ${name}`, job: found.id, ...other });
      }
    }
    return rows;
  }

  function draw() {
    const groups = [...new Set([...series.keys()].map(groupOf))];
    const rank = (group) => { const found = ORDER.indexOf(group.split("/")[0]); return found < 0 ? ORDER.length : found; };
    groups.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
    note.hidden = groups.length > 0;
    if (!groups.length) note.textContent = "No metrics yet. They appear here while the job runs.";
    for (const group of groups) drawGroup(group);
  }

  function drawGroup(group) {
    const rows = rowsOf(group);
    const weight = Number(smoothing.value);
    const tables = rows.map((row) => [row.steps, smooth(row.values, weight)]);
    if (weight) rows.forEach((row) => { if (!row.job && rows.length === 1) tables.push([row.steps, row.values]); });
    const data = uPlot.join(tables);
    const isZero = data.slice(1).every((values) => values.every((value) => !value));
    const key = JSON.stringify([isZero, rows.map((row) => row.label), tables.length, logScale.checked, document.documentElement.dataset.theme]);
    let chart = charts.get(group);
    if (chart && chart.key === key) {
      chart.plot.setData(data, !zoom);
    } else {
      if (chart) { chart.plot.destroy(); } else { chart = create(group); }
      chart.key = key;
      chart.plot = new uPlot(options(chart, rows, tables.length, isZero), data, chart.target);
      charts.set(group, chart);
    }
    if (zoom) showZoom(chart.plot);
    showLast(chart, rows, data);
  }

  function showZoom(plot) {
    plot.setScale("x", { min: zoom.min, max: Math.max(zoom.max ?? lastStep, zoom.min + 1) });
  }

  function selectSteps(plot) {
    const [from, to] = [plot.select.left, plot.select.left + plot.select.width].map((x) => plot.posToVal(x, "x"));
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    const min = Math.max(0, Math.floor(from));
    setZoom({ min, max: Math.max(min + 1, Math.ceil(to)) });
  }

  function setZoom(range) {
    zoom = range;
    for (const { plot } of charts.values()) {
      if (zoom) showZoom(plot);
      else plot.setData(plot.data); // shows all steps
    }
    zoomFrom.value = zoom?.min ?? "";
    zoomTo.value = zoom?.max ?? "";
    zoomTo.setCustomValidity("");
    resetZoom.hidden = !zoom;
  }

  function readZoom() {
    const min = Number(zoomFrom.value), max = zoomTo.value ? Number(zoomTo.value) : null;
    zoomTo.setCustomValidity(max === null || max > min ? "" : "Enter a step after the first one.");
    if (zoomFrom.reportValidity() && zoomTo.reportValidity()) setZoom(min > 0 || max !== null ? { min, max } : null);
  }

  function create(group) {
    const panel = document.createElement("figure");
    panel.className = "panel";
    const header = document.createElement("header");
    const title = document.createElement("h3");
    title.textContent = NAMES[group] || group;
    const last = document.createElement("span");
    last.className = "small muted";
    header.append(title, last);
    const body = document.createElement("div");
    body.className = "body tight";
    const target = document.createElement("div");
    target.className = "chart";
    target.setAttribute("role", "img");
    target.setAttribute("aria-label", `${NAMES[group] || group} over steps`);
    const legend = document.createElement("figcaption");
    legend.className = "legend";
    body.append(target, legend);
    panel.append(header, body);
    place.append(panel);
    return { target, last, legend, panel, format: PERCENT.includes(group) ? percent : format };
  }

  function showLast(chart, rows, data) {
    const values = rows.map((_, index) => chart.format(valueAt(data[index + 1], lastIndex(data[index + 1]))));
    chart.last.textContent = caption(rows.length === 1 ? values[0] : "");
    showLegend(chart, rows, values);
    const total = rows.map((row, index) => `${row.label} ${values[index]}`).join(", ");
    chart.target.setAttribute("aria-label", `Over steps, last: ${total}`.slice(0, 300));
  }

  const caption = (text) => (Number(smoothing.value) ? `${text} smoothed`.trim() : text);

  function showLegend(chart, rows, values) {
    chart.legend.replaceChildren(...(rows.length < 2 ? [] : rows.map((row, index) => {
      const item = document.createElement("span");
      const mark = document.createElement("i");
      mark.className = `c${(index % 8) + 1}`;
      mark.classList.toggle("dashed", Boolean(row.job));
      if (row.job) item.title = row.job;
      item.append(mark, `${row.label.slice(0, 80)} ${values[index]}`);
      return item;
    })));
  }

  // Return the index of the last value, at most `from`; -1 if there is none.
  function lastIndex(values, from = values.length - 1) {
    while (from >= 0 && (values[from] ?? null) === null) from--;
    return from;
  }

  // Return the value at an index, or the one before if metrics have different steps; null outside of the curve.
  const valueAt = (values, index) => (index <= lastIndex(values) ? values[lastIndex(values, index)] ?? null : null);

  const percent = (value) => (value === null ? "–" : `${Number((100 * value).toPrecision(3))} %`);
  const format = (value) => (value === null ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : window.amdNumber(Number(value.toPrecision(4))));

  function options(chart, rows, count, isZero) {
    const target = chart.target;
    const tickText = chart.format === percent ? percent : short;
    const colours = window.amdColours();
    const font = "11px system-ui, sans-serif";
    const axis = { stroke: colours.muted, font, grid: { stroke: colours.line, width: 1 }, ticks: { show: false } };
    const lines = rows.map((row, index) => ({
      label: row.label, stroke: colours.series[index % 8], width: 1.5, spanGaps: true,
      dash: row.job ? [4, 3] : undefined, points: { show: row.steps.length < 2 },
    }));
    while (lines.length < count) lines.push({ label: "not smoothed", stroke: `${colours.series[0]}55`, width: 1, spanGaps: true, points: { show: false } });
    return {
      width: Math.max(200, target.clientWidth), height: target.clientHeight || 190,
      legend: { show: false }, padding: [10, 14, 0, 0],
      cursor: {
        sync: { key: "steps", filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        points: { size: 6 }, drag: { setScale: false }, bind: { dblclick: () => () => setZoom(null) },
      },
      scales: { x: { time: false }, y: isZero ? { range: [0, 1] } : { distr: logScale.checked ? 3 : 1 } },
      axes: [{ ...axis, size: 24, values: (_, ticks) => ticks.map(short) }, { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : tickText(tick))) }],
      series: [{ label: "step" }, ...lines],
      hooks: { setCursor: [(plot) => showCursor(plot, rows, chart)], setSelect: [selectSteps] },
    };
  }

  const short = (value) => (Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(0) : window.amdNumber(Number(value.toPrecision(4))));

  function showCursor(plot, rows, chart) {
    const index = plot.cursor.idx;
    if (index === null || index === undefined) { showLast(chart, rows, plot.data); return; }
    const step = plot.data[0][index];
    const values = rows.map((_, row) => chart.format(valueAt(plot.data[row + 1], index)));
    const at = `step ${window.amdNumber(step)}`;
    chart.last.textContent = caption(rows.length === 1 ? `${at}: ${values[0]}` : at);
    showLegend(chart, rows, values);
  }

  // Return the series of another job, or null if they cannot be read.
  async function fetchSeries(job) {
    const response = await fetch(`${place.dataset.jobs}${encodeURIComponent(job)}/metrics.json`, { headers: { "HX-Request": "true" } });
    if (!response.ok || response.status === 204) return null;
    const found = new Map();
    merge(found, await response.json());
    return found;
  }

  // Return the jobs that a text means, {id, name} each: those with this name or ID, or else all that the job list finds.
  async function findJobs(text) {
    const response = await fetch(`${place.dataset.list}?${new URLSearchParams({ q: text })}`, { headers: { "HX-Request": "true" } });
    if (!response.ok) return [];
    const list = new DOMParser().parseFromString(await response.text(), "text/html");
    const links = [...list.querySelectorAll("#jobs a.job-name")];
    const jobs = links.map((link) => ({ id: decodeURIComponent(link.getAttribute("href").split("/").pop()), name: link.textContent.trim() }));
    const others = jobs.filter((job) => job.id !== place.dataset.job);
    const exact = others.filter((job) => job.id === text || job.name.toLowerCase() === text.toLowerCase());
    return exact.length ? exact : others;
  }

  async function overlay() {
    const text = overlayField.value.trim();
    const jobs = text ? await findJobs(text) : [];
    const found = jobs.length === 1 ? await fetchSeries(jobs[0].id) : null;
    compared.overlay = found && { ...jobs[0], series: found };
    overlayNote.textContent = text && !found ? overlayProblem(text, jobs) : "";
    if (overlayNote.textContent) overlayField.setAttribute("aria-invalid", "true");
    else overlayField.removeAttribute("aria-invalid");
    draw();
  }

  function overlayProblem(text, jobs) {
    if (!jobs.length) return `No job matches “${text}”.`;
    if (jobs.length > 1) return `Several jobs match “${text}”. Enter a whole name or an ID.`;
    return `The metrics of ${jobs[0].name} cannot be read.`;
  }

  async function showBaseline() {
    const id = localStorage.getItem(baselineKey);
    const isThis = id === place.dataset.job;
    document.getElementById("baseline").hidden = !id;
    document.getElementById("pin").hidden = isThis;
    const text = document.getElementById("baseline-text");
    text.title = id || "";
    text.textContent = isThis ? "This job is the baseline of its project." : `Baseline: ${id}`;
    const job = id && !isThis ? (await findJobs(id))[0] || { id, name: id } : null;
    const found = job && (await fetchSeries(id));
    if (job) text.textContent = found ? `Baseline: ${job.name}` : `The baseline ${job.name} cannot be read.`;
    compared.baseline = found && { ...job, series: found };
    draw();
  }

  function setBaseline(job) {
    if (job) localStorage.setItem(baselineKey, job);
    else localStorage.removeItem(baselineKey);
    showBaseline().catch(() => {});
  }

  let pending = null;
  function later() {
    if (pending) return;
    pending = setTimeout(() => {
      pending = null;
      load().catch(() => {}); // the next event tries again
    }, 1000);
  }

  document.body.addEventListener("htmx:sseMessage", later);
  smoothing.addEventListener("input", draw);
  logScale.addEventListener("change", draw);
  overlayField.addEventListener("change", overlay);
  document.getElementById("pin").addEventListener("click", () => setBaseline(place.dataset.job));
  for (const field of [zoomFrom, zoomTo]) field.addEventListener("change", readZoom);
  resetZoom.addEventListener("click", () => {
    setZoom(null);
    zoomFrom.focus({ preventScroll: true }); // the button, which had the focus, is hidden
  });
  document.getElementById("unpin").addEventListener("click", () => setBaseline(null));
  window.addEventListener("storage", (event) => { if (event.key === baselineKey) showBaseline().catch(() => {}); });
  document.addEventListener("theme", draw);
  let width = 0;
  new ResizeObserver(() => {
    if (place.clientWidth === width) return;
    width = place.clientWidth;
    for (const chart of charts.values()) chart.plot.setSize({ width: Math.max(200, chart.target.clientWidth), height: chart.target.clientHeight });
  }).observe(place);
  showBaseline().catch(() => {});
  load().catch((error) => { note.textContent = `The metrics cannot be read: ${error.message}. Reload the page to try again.`; });
})();
