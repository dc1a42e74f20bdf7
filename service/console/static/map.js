// The map of embeddings: one or two scatter charts with a linked selection, a lasso, thumbnails and nearest neighbours.
(function () {
  "use strict";
  const page = document.getElementById("embedding-map");
  if (!page) return;
  const byId = (id) => document.getElementById(`map-${id}`);
  const GROUPS = 24, BINS = 6, LISTED = 60, NEIGHBOURS = 12, CLICK_PX = 10, DRAG_PX = 5;
  const REST = "other", UNKNOWN = "not on the left map", UNLABELLED = "unlabelled";
  let maps = [];
  let selection = new Set();  // locations, which are the same in both maps
  let focus = null;  // location of the sample whose neighbours are shown
  let near = [];  // per map: record numbers of those neighbours

  // Data

  class EmbeddingMap {
    constructor(figure, data) {
      Object.assign(this, { figure, data, url: figure.dataset.url });
      this.rows = new Map(data.locations.map((location, row) => [location, row]));
      this.rowsByRecord = new Map(data.records.map((record, row) => [record, row]));
      this.chart = echarts.init(figure.querySelector(".chart"), null, { renderer: "canvas" });
      this.describe();
    }

    get count() { return this.data.records.length; }

    describe() {
      const { layout, samples, unreadable, explained_variance: variance } = this.data;
      const shown = this.count === samples ? `${window.amdNumber(samples)} samples` : `${window.amdNumber(this.count)} of ${window.amdNumber(samples)} samples`;
      const share = variance ? `, ${Math.round(100 * (variance[0] + variance[1]))} % of the variance` : "";
      const missing = unreadable ? `; ${window.amdNumber(unreadable)} ${unreadable === 1 ? "sample" : "samples"} could not be read` : "";
      this.figure.querySelector("header span").textContent = `${this.data.encoder.slice(0, 60)}: ${shown}, ${layout.toUpperCase()}${share}${missing}`;
    }

    // Positions on the canvas, from two reference points, since zooming is linear.
    pixels() {
      const [left, top] = this.chart.convertToPixel("grid", [0, 0]), [right, bottom] = this.chart.convertToPixel("grid", [1, 1]);
      return { x: (row) => left + (right - left) * this.data.x[row], y: (row) => top + (bottom - top) * this.data.y[row] };
    }

    nearest(x, y) {
      const at = this.pixels();
      let best = null, distance = CLICK_PX * CLICK_PX;
      for (let row = 0; row < this.count; row += 1) {
        const found = (at.x(row) - x) ** 2 + (at.y(row) - y) ** 2;
        if (found < distance) [best, distance] = [row, found];
      }
      return best;
    }

    inside(polygon) {
      const at = this.pixels(), found = [];
      for (let row = 0; row < this.count; row += 1) if (contains(polygon, at.x(row), at.y(row))) found.push(row);
      return found;
    }

    thumbnail(row) {
      if (!this.data.thumbnails) return null;
      const image = document.createElement("img");
      image.src = `${this.url}/thumbnails/${this.data.records[row]}`;
      image.alt = "";
      image.loading = "lazy";
      image.addEventListener("error", () => image.remove());
      return image;
    }
  }

  function contains(polygon, x, y) {
    let inside = false;
    for (let index = 0, previous = polygon.length - 1; index < polygon.length; previous = index, index += 1) {
      const [ax, ay] = polygon[index], [bx, by] = polygon[previous];
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
    }
    return inside;
  }

  // Groups: rows of the left map by what the colours show

  function groupsOf(kind) {
    const { data } = maps[0], rows = Array.from({ length: maps[0].count }, (_, row) => row);
    if (kind === "score") return binned(data.score);
    const name = kind === "label" ? (row) => (data.labels[row] === null ? UNLABELLED : `label ${data.labels[row]}`) : (row) => `cluster ${data.cluster[row]}`;
    const counts = new Map();
    for (const row of rows) counts.set(name(row), (counts.get(name(row)) || 0) + 1);
    const kept = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a)).slice(0, GROUPS);
    kept.sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
    const names = counts.size > kept.length ? [...kept, REST] : kept, known = new Set(kept);
    return { names, of: rows.map((row) => (known.has(name(row)) ? name(row) : REST)) };
  }

  function binned(scores) {
    let low = Infinity, high = -Infinity;
    for (const score of scores) [low, high] = [Math.min(low, score), Math.max(high, score)];
    const width = (high - low) / BINS || 1, bin = (score) => Math.min(BINS - 1, Math.floor((score - low) / width));
    const names = Array.from({ length: BINS }, (_, index) => `${(low + index * width).toFixed(2)} to ${(low + (index + 1) * width).toFixed(2)}`);
    return { names, of: scores.map((score) => names[bin(score)]) };
  }

  function colourOf(name, index, kind) {
    const dark = document.documentElement.dataset.theme === "dark", { series, muted } = amdColours();
    if ([REST, UNKNOWN, UNLABELLED].includes(name)) return muted;
    if (kind === "score") return (dark ? ["#3b3f78", "#3f6fb0", "#3fa3b0", "#59c08a", "#b3d46a", "#f5e663"] : ["#f0b429", "#d98b2b", "#b85c4a", "#8f3f6d", "#5f3380", "#2a2a72"])[index];
    return index < 7 ? series[index] : `hsl(${Math.round(index * 137.5) % 360} 55% ${dark ? 50 : 62}%)`;  // another lightness than that of the series
  }

  // Drawing

  function draw() {
    if (!maps.length) return;
    const kind = byId("colour").value, groups = groupsOf(kind), colours = amdColours();
    const names = maps.length > 1 ? [...groups.names, UNKNOWN] : groups.names;
    const palette = new Map(names.map((name, index) => [name, colourOf(name, index, kind)]));
    const [left] = maps;
    const members = maps.map((map) => {
      const rows = new Map(names.map((name) => [name, []]));
      for (let row = 0; row < map.count; row += 1) {
        const own = map === left ? row : left.rows.get(map.data.locations[row]);
        rows.get(own === undefined ? UNKNOWN : groups.of[own]).push(row);
      }
      return rows;
    });
    maps.forEach((map, index) => drawMap(map, members[index], palette, near[index] || [], colours));
    drawGroups(members, palette);
  }

  function drawMap(map, members, palette, neighbours, colours) {
    const { x, y, locations } = map.data, size = map.count > 5000 ? 3 : map.count > 1000 ? 5 : 7;
    const points = (rows) => rows.map((row) => [x[row], y[row]]);
    const plain = { type: "scatter", large: true, largeThreshold: 0, silent: true, animation: false };
    const series = [...members].filter(([, rows]) => rows.length).map(([name, rows]) => ({  // a large series must not be empty
      ...plain, name, data: points(rows), symbolSize: size, itemStyle: { color: palette.get(name), opacity: selection.size ? 0.15 : 0.75 },
    }));
    for (const [name, rows] of selection.size ? members : []) {
      const chosen = rows.filter((row) => selection.has(locations[row]));
      if (chosen.length) series.push({ ...plain, name: `selected ${name}`, z: 3, data: points(chosen), symbolSize: size + 2, itemStyle: { color: palette.get(name), opacity: 1 } });
    }
    const ring = (rows, symbolSize, color) => ({
      type: "scatter", silent: true, animation: false, z: 4, data: points(rows), symbolSize, itemStyle: { color: "transparent", borderColor: color, borderWidth: 2 },
    });
    series.push(ring(neighbours.map((record) => map.rowsByRecord.get(record)).filter((row) => row !== undefined), size + 6, colours.text));
    if (map.rows.has(focus)) series.push(ring([map.rows.get(focus)], size + 12, colours.bad));
    const axis = { type: "value", scale: true, axisLabel: { show: false }, axisTick: { show: false }, axisLine: { lineStyle: { color: colours.line } }, splitLine: { lineStyle: { color: colours.line } } };
    const zoom = { type: "inside", filterMode: "none", moveOnMouseMove: "shift", zoomOnMouseWheel: true };
    const first = !map.chart.getOption();
    map.chart.setOption({
      animation: false, grid: { left: 12, right: 12, top: 12, bottom: 12 }, xAxis: axis, yAxis: axis, series,
      ...(first ? { dataZoom: [{ ...zoom, xAxisIndex: 0 }, { ...zoom, yAxisIndex: 0 }] } : {}),
    }, { replaceMerge: ["series"] });
  }

  function drawGroups(members, palette) {
    byId("groups").replaceChildren(...[...palette].filter(([name]) => members.some((rows) => rows.get(name).length)).map(([name, colour]) => {
      const button = element("button", "map-group"), swatch = element("i", "map-swatch");
      button.type = "button";
      swatch.style.background = colour;
      button.append(swatch, `${name} `, element("b", "", String(members[0].get(name).length)));
      button.addEventListener("click", () => select(maps.flatMap((map, index) => members[index].get(name).map((row) => map.data.locations[row]))));
      return button;
    }));
  }

  function element(tag, name, text) {
    const created = document.createElement(tag);
    created.className = name;
    if (text !== undefined) created.textContent = text;
    return created;
  }

  // Selection

  function select(locations) {
    selection = new Set(locations);
    const count = selection.size;
    byId("selection-panel").hidden = !count;
    byId("selection-title").textContent = `${window.amdNumber(count)} selected${count > LISTED ? `, the first ${LISTED} shown` : ""}`;
    byId("selection").replaceChildren(...[...selection].slice(0, LISTED).map((location) => {
      const map = maps.find((one) => one.rows.has(location)), row = map.rows.get(location);
      return item(map, row, shortName(location));
    }));
    draw();
  }

  const shortName = (location) => location.split("/").slice(-2).join("/");

  // A sample in a list, as a button that shows its neighbours.
  function item(map, row, text) {
    const entry = document.createElement("li"), button = element("button", "map-item");
    const image = map.thumbnail(row);
    button.type = "button";
    button.title = map.data.locations[row];
    if (image) button.append(image);
    button.append(element("span", "", text));
    button.addEventListener("click", () => show(map.data.locations[row]));
    entry.append(button);
    return entry;
  }

  function download() {
    const anchor = document.createElement("a");
    anchor.href = URL.createObjectURL(new Blob([[...selection].join("\n"), "\n"], { type: "text/plain" }));
    anchor.download = "selected-samples.txt";
    anchor.click();
    setTimeout(() => URL.revokeObjectURL(anchor.href), 10000);
  }

  // One sample

  function facts(map, row) {
    const { records, labels, cluster, score } = map.data, list = element("dl", "facts");
    const rows = [["Record", records[row]], ["Label", labels[row] ?? "–"], ["Cluster", cluster[row]], ["Similarity to center", score[row].toFixed(3)]];
    for (const [name, value] of rows) list.append(element("dt", "", name), element("dd", "", String(value)));
    return list;
  }

  async function show(location) {
    focus = location;
    near = [];
    const map = maps.find((one) => one.rows.has(location)), row = map.rows.get(location), image = map.thumbnail(row);
    if (image) image.className = "map-large";
    byId("sample").replaceChildren(...(image ? [image] : []), element("p", "mono wrap", location), facts(map, row));
    byId("neighbours").replaceChildren(element("p", "muted", "Loading…"));
    byId("neighbours-panel").hidden = false;
    draw();
    const lists = await Promise.all(maps.map((one) => neighboursOf(one, location)));
    if (focus !== location) return;  // another sample was clicked meanwhile
    near = lists.map((list) => list.records);
    byId("neighbours").replaceChildren(...lists.map((list) => list.element));
    draw();
  }

  async function neighboursOf(map, location) {
    const section = element("div", "stack");
    if (maps.length > 1) section.append(element("h3", "", map.data.encoder.slice(0, 60)));
    const row = map.rows.get(location);
    if (row === undefined) {
      section.append(element("p", "muted", "This data set does not contain the sample."));
      return { records: [], element: section };
    }
    const response = await request(`${map.url}/neighbours.json?record=${map.data.records[row]}&k=${NEIGHBOURS}`);
    if (response === null) return { records: [], element: section };
    const found = await response.json(), list = element("ul", "map-samples");
    for (const { record, score, location: name } of found) {
      const own = map.rowsByRecord.get(record), text = `${score.toFixed(3)} ${shortName(name)}`;
      list.append(own === undefined ? element("li", "", text) : item(map, own, text));
    }
    section.append(list);
    return { records: found.map((one) => one.record), element: section };
  }

  function showTip(map, row, event) {
    const tip = byId("tip");
    if (row === null) {
      tip.hidden = true;
      return;
    }
    if (tip.dataset.sample !== `${map.url} ${row}`) {
      const image = map.thumbnail(row), { locations, labels, cluster } = map.data;
      tip.dataset.sample = `${map.url} ${row}`;
      tip.replaceChildren(...(image ? [image] : []), element("span", "", shortName(locations[row])), element("span", "muted", `label ${labels[row] ?? "–"}, cluster ${cluster[row]}`));
    }
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  }

  // The lasso: a drag selects what it encloses, a click shows the nearest sample.

  function listen(map) {
    const canvas = map.chart.getZr();
    let path = null, line = null;

    function stop(event) {
      if (!path) return;
      const ended = path, moved = line !== null;
      if (line) canvas.remove(line);
      path = line = null;
      if (moved) select(map.inside(ended).map((row) => map.data.locations[row]));
      else if (event) {
        const row = map.nearest(event.offsetX, event.offsetY);
        if (row !== null) show(map.data.locations[row]).catch(fail);
      }
    }

    canvas.on("mousedown", (event) => {
      if (!event.event.shiftKey && !event.event.button) path = [[event.offsetX, event.offsetY]];
    });
    canvas.on("mousemove", (event) => {
      if (!path) {
        showTip(map, map.nearest(event.offsetX, event.offsetY), event.event);
        return;
      }
      const [x, y] = path[0];
      if (!line && Math.hypot(event.offsetX - x, event.offsetY - y) < DRAG_PX) return;
      path.push([event.offsetX, event.offsetY]);
      const colours = amdColours();
      if (!line) {
        line = new echarts.graphic.Polygon({ silent: true, z: 100, style: { stroke: colours.accent, lineWidth: 1.5, fill: colours.accent, fillOpacity: 0.08 } });
        canvas.add(line);
        byId("tip").hidden = true;
      }
      line.setShape({ points: path.slice() });
    });
    canvas.on("mouseup", stop);
    canvas.on("globalout", () => {
      byId("tip").hidden = true;
      stop(null);
    });
  }

  // Requests

  // Returns the response, or null after showing the problem or signing in.
  async function request(url) {
    const response = await fetch(url, { headers: { "HX-Request": "true" } });
    if (response.ok && response.status !== 204) return response;
    if (response.headers.get("HX-Redirect")) location.href = response.headers.get("HX-Redirect");
    else byId("problem").innerHTML = await response.text();  // rendered and escaped by the service
    return null;
  }

  function fail() {
    byId("status").textContent = "The service does not respond; reload the page to try again.";
  }

  async function load() {
    const loaded = await Promise.all([...page.querySelectorAll("figure[data-url]")].map(async (figure) => {
      const response = await request(`${figure.dataset.url}.json`);
      return response && new EmbeddingMap(figure, await response.json());
    }));
    byId("status").textContent = "";
    maps = loaded.filter(Boolean);
    if (maps.length > 1 && ![...maps[1].rows.keys()].some((location) => maps[0].rows.has(location))) {
      byId("status").textContent = "The two data sets have no sample in common, so a selection shows in one map only.";
    }
    if (maps.length && maps[0].data.labels.every((label) => label === null)) byId("colour").value = "cluster";
    maps.forEach(listen);
    draw();
  }

  byId("colour").addEventListener("change", draw);
  byId("clear").addEventListener("click", () => select([]));
  byId("download").addEventListener("click", download);
  byId("reset").addEventListener("click", () => maps.forEach((map) => map.chart.dispatchAction({ type: "dataZoom", batch: [0, 1].map((dataZoomIndex) => ({ dataZoomIndex, start: 0, end: 100 })) })));
  document.addEventListener("theme", draw);
  new ResizeObserver(() => maps.forEach((map) => map.chart.resize())).observe(byId("charts"));
  load().catch(fail);
})();
