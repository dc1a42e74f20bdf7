// The charts of a sweep, drawn on canvases: tooltips are drawn too, since the content security policy forbids inline styles.
(function () {
  "use strict";
  const place = document.getElementById("charts");
  if (!place) return;
  const charts = new Map();
  let data = null;
  let shownTrials = null; // numbers of the selected trials, as text; null: all

  function chart(id) {
    if (!charts.has(id)) charts.set(id, echarts.init(document.getElementById(id), null, { renderer: "canvas" }));
    return charts.get(id);
  }

  function common(colours) {
    const text = { color: colours.muted, fontSize: 11, fontFamily: "system-ui, sans-serif" };
    return {
      animation: false,
      textStyle: text,
      tooltip: { renderMode: "richText", confine: true, backgroundColor: colours.surface, borderColor: colours.line, textStyle: { color: colours.text, fontSize: 12 } },
      axis: (name, more) => ({
        name, nameLocation: "middle", nameGap: 30, nameTextStyle: text, axisLabel: text, scale: true,
        axisLine: { lineStyle: { color: colours.line } }, splitLine: { lineStyle: { color: colours.line } }, axisTick: { show: false }, ...more,
      }),
      grid: { left: 62, right: 24, top: 20, bottom: 48 },
    };
  }

  const number = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))));

  function drawMap(colours) {
    const panel = document.getElementById("map-panel");
    panel.hidden = !data.map;
    if (!data.map) return;
    const { textStyle, tooltip, axis, grid } = common(colours);
    const scores = data.map.cells.filter((cell) => !early(cell)).map((cell) => cell.score);
    const wide = data.map.students.length < 7 && data.map.teachers.length < 7;
    const cellWidth = (chart("map").getWidth() - 150) / data.map.students.length; // px; 150: axis and colour scale
    const hasRoom = cellWidth > 35;
    const dark = document.documentElement.dataset.theme === "dark";
    chart("map").setOption({
      animation: false, textStyle, grid: { ...grid, right: 84 },
      tooltip: { ...tooltip, formatter: (item) => describe(data.map.cells[item.dataIndex]) },
      xAxis: axis("student mask ratio", { type: "category", data: data.map.students, splitArea: { show: false } }),
      yAxis: axis("teacher mask ratio", { type: "category", data: data.map.teachers, nameGap: 40 }),
      visualMap: {
        min: Math.min(...scores), max: Math.max(...scores), calculable: true, orient: "vertical", right: 0, top: "center", precision: 1,
        textStyle, itemHeight: 160, itemWidth: 10, dimension: 2,
        inRange: { color: dark ? ["#1d2433", "#2f5a8f", "#5fb3a8", "#e8d77a"] : ["#e9eef7", "#9cc3e3", "#3f8fb5", "#14506f"] },
      },
      series: [{
        type: "heatmap", data: data.map.cells.map((cell) => ({ value: [cell.x, cell.y, cell.score], ...(early(cell) ? { visualMap: false, itemStyle: { color: colours.sunken }, label: { color: colours.muted } } : {}) })),
        label: { show: true, fontSize: cellWidth > 28 ? 10 : 8, lineHeight: 12, formatter: (item) => `${item.value[2].toFixed(1)}${wide ? spread(data.map.cells[item.dataIndex]) : ""}${hasRoom ? early(data.map.cells[item.dataIndex]) : ""}` },
        itemStyle: { borderColor: colours.surface, borderWidth: 2 },
      }],
    }, true);
    chart("map").off("click");
    chart("map").on("click", (item) => showTrials(data.map.cells[item.dataIndex].trials));
  }

  const early = (cell) => (cell.rung === data.top ? "" : `\nrung ${cell.rung}`);
  const spread = (cell) => (cell.sd === null ? "" : `\n± ${cell.sd.toFixed(1)}`);
  const describe = (cell) => `student ${data.map.students[cell.x]}, teacher ${data.map.teachers[cell.y]}\n${number(cell.score)}${cell.sd === null ? "" : ` ± ${number(cell.sd)}`} at rung ${cell.rung}\ntrials ${cell.trials.join(", ")}`;

  function drawPareto(colours) {
    const { textStyle, tooltip, axis, grid } = common(colours);
    const top = Math.max(0, ...data.trials.map((trial) => trial.rung));
    const points = data.trials.filter((trial) => trial.rung === top && trial.speed && trial.score !== null && trial.state !== "failed");
    const front = points.filter((one) => !points.some((other) => other !== one && other.score >= one.score && other.speed >= one.speed && (other.score > one.score || other.speed > one.speed)));
    front.sort((a, b) => a.speed - b.speed);
    const numbers = new Set(front.map((trial) => trial.number));
    const of = (trial) => ({ value: [trial.speed, trial.score], trial });
    chart("pareto").setOption({
      animation: false, textStyle, grid,
      tooltip: { ...tooltip, formatter: (item) => (item.data.trial ? `trial ${item.data.trial.number}\n${item.data.trial.title.slice(0, 120)}\n${number(item.value[1])}, ${number(item.value[0])} clips/s` : "") },
      xAxis: axis("clips per second"), yAxis: axis(data.metric, { nameGap: 42 }),
      series: [
        { type: "line", data: front.map(of), lineStyle: { color: colours.series[1], width: 1.5 }, symbol: "none", silent: true },
        { type: "scatter", data: points.map(of), symbolSize: 9, label: { show: true, position: "top", fontSize: 10, color: colours.muted, formatter: (item) => (numbers.has(item.data.trial.number) ? `trial ${item.data.trial.number}` : "") }, itemStyle: { color: (item) => (numbers.has(item.data.trial.number) ? colours.series[1] : colours.series[0]) } },
      ],
    }, true);
    chart("pareto").off("click");
    chart("pareto").on("click", (item) => item.data.trial && showTrials([item.data.trial.number]));
  }

  function drawParallel(colours) {
    const { textStyle } = common(colours);
    const scored = data.trials.filter((trial) => trial.score !== null);
    const rung = { name: "rung", title: "rung", value: (trial) => trial.rung }; // scores at different rungs differ
    const isMixed = new Set(scored.map((trial) => trial.rung)).size > 1;
    const axes = [...data.dimensions.map((one) => ({ ...one, value: (trial) => trial.point[one.name] })), ...(isMixed ? [rung] : []), { name: "score", title: "score", value: (trial) => trial.score }];
    const isNumber = (axis) => scored.every((trial) => typeof axis.value(trial) === "number");
    const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value) ?? "–").slice(0, 40);
    const scores = scored.map((trial) => trial.score);
    chart("parallel").setOption({
      animation: false, textStyle,
      parallel: { left: 50, right: 70, top: 34, bottom: 20, axisExpandable: false },
      parallelAxis: axes.map((axis, index) => ({
        dim: index, name: axis.title.slice(0, 24), z: 3, nameTextStyle: textStyle, axisLabel: { ...textStyle, backgroundColor: colours.surface, padding: [1, 3] }, axisLine: { lineStyle: { color: colours.line } },
        ...(isNumber(axis) ? { type: "value", scale: true, ...(axis === rung ? { minInterval: 1 } : {}) } : { type: "category", data: [...new Set(scored.map((trial) => shown(axis.value(trial))))] }),
        areaSelectStyle: { color: colours.accent, opacity: 0.25 },
      })),
      visualMap: { show: false, dimension: axes.length - 1, min: Math.min(...scores), max: Math.max(...scores), inRange: { color: [colours.line, colours.series[0]] } },
      series: [{ type: "parallel", lineStyle: { width: 1.5, opacity: 0.8 }, inactiveOpacity: 0.06, data: scored.map((trial) => axes.map((axis) => (isNumber(axis) ? axis.value(trial) : shown(axis.value(trial))))) }],
    }, true);
    chart("parallel").off("axisareaselected");
    chart("parallel").on("axisareaselected", () => {
      const series = chart("parallel").getModel().getSeries()[0];
      const chosen = series.getRawIndicesByActiveState("active");
      showTrials(chosen.length && chosen.length < scored.length ? chosen.map((index) => scored[index].number) : null);
    });
  }

  function drawRungs(colours) {
    const { textStyle, tooltip, axis, grid } = common(colours);
    const best = data.trials.find((trial) => trial.best);
    const states = new Map(data.trials.map((trial) => [trial.number, trial.state]));
    chart("rungs").setOption({
      animation: false, textStyle, grid,
      tooltip: { ...tooltip, trigger: "item", formatter: (item) => `trial ${item.seriesName}\n${number(item.value[1])} after ${number(100 * item.value[0])} %` },
      xAxis: axis("fraction of training", { min: 0, max: 1 }), yAxis: axis(data.metric, { nameGap: 42 }),
      series: data.curves.filter((curve) => curve.rungs.length).map((curve) => {
        const isBest = best && curve.number === best.number;
        return {
          name: String(curve.number), type: "line", data: curve.rungs, symbolSize: isBest ? 8 : 5, z: isBest ? 5 : 2,
          lineStyle: { width: isBest ? 2.5 : 1.2, opacity: isBest ? 1 : 0.55 },
          color: isBest ? colours.series[1] : states.get(curve.number) === "failed" ? colours.bad : colours.series[0],
        };
      }),
    }, true);
    chart("rungs").off("click");
    chart("rungs").on("click", (item) => showTrials([item.seriesName]));
  }

  function showTrials(numbers) {
    shownTrials = numbers && new Set(numbers.map(String));
    hideUnselected();
    if (shownTrials) document.getElementById("trials-title").scrollIntoView({ block: "center" });
  }

  // Hide the trials that are not selected; also after the service has replaced the table.
  function hideUnselected() {
    const table = document.getElementById("trials");
    if (!table) return;
    for (const row of table.tBodies[0].rows) row.hidden = Boolean(shownTrials) && !shownTrials.has(row.dataset.trial);
    document.getElementById("all-trials").hidden = !shownTrials;
  }

  function draw() {
    if (!data || !data.trials.length) return;
    place.hidden = false;
    const colours = window.amdColours();
    drawMap(colours);
    drawPareto(colours);
    drawParallel(colours);
    drawRungs(colours);
  }

  async function load() {
    const response = await fetch(place.dataset.url, { headers: { "HX-Request": "true" } });
    if (!response.ok || response.status === 204) return;
    data = await response.json();
    draw();
  }

  document.addEventListener("click", (event) => {
    if (event.target.closest("#all-trials")) showTrials(null);
  });
  document.body.addEventListener("htmx:afterSettle", hideUnselected);
  document.addEventListener("theme", draw);
  new ResizeObserver(() => charts.forEach((one) => one.resize())).observe(place);
  let pending = null;
  document.body.addEventListener("htmx:sseMessage", () => {
    if (pending) return;
    pending = setTimeout(() => {
      pending = null;
      load().catch(() => {});
      htmx.trigger("#sweep-summary", "refresh"); // also replaces the table of trials
    }, 5000);
  });
  load().catch(() => {});
})();
