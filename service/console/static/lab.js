// The mask lab: requests the layers for the settings, draws one frame of all of them, and keeps the settings in the URL.
(function () {
  "use strict";
  const page = document.getElementById("lab");
  if (!page) return;
  const byId = (id) => document.getElementById(`lab-${id}`);
  const SETTINGS = ["student_ratio", "teacher_ratio", "strategy", "decoder", "decoder_ratio", "seed", "step", "batch_size", "position"];
  const NAMES = {
    input: "Input", student: "Student's view", teacher: "Teacher's view", roles: "Roles of tokens", masked: "Tokens to rebuild",
    rebuilt: "Rebuilt", error: "Error per token", alignment: "Alignment loss per token",
  };
  const NO_TEACHER = "This config has no teacher.";
  const WIDTH = 224, COMPARED_WIDTH = 320, WAIT_MS = 250, SLOW_MS = 4000;
  const form = byId("form"), source = byId("source"), file = byId("file");
  const controls = Object.fromEntries(SETTINGS.map((name) => [name, form.elements[name]]));
  const alignment = byId("alignment");
  const checkpoint = byId("checkpoint"), steps = checkpoint ? checkpoint.dataset.steps.split(",") : [];
  let changed = {};  // settings that differ from those of the source
  let view = null, sheets = {}, request = null;
  let timer = 0;  // of the next request; 0 if none is scheduled
  let isDrawn = false;  // whether the layers show the settings of the controls

  // State in the URL

  function restore() {
    const query = new URLSearchParams(location.search);
    for (const name of SETTINGS) if (query.has(name)) changed[name] = query.get(name);
    for (const kind of ["job", "preset", "encoder"]) {
      if (query.has(kind) && [...source.options].some((one) => one.value === `${kind}:${query.get(kind)}`)) source.value = `${kind}:${query.get(kind)}`;
    }
    if (byId("record") && query.has("record")) byId("record").value = query.get("record");
    if (steps.includes(query.get("checkpoint"))) checkpoint.value = steps.indexOf(query.get("checkpoint"));
    if (alignment) alignment.checked = query.get("alignment") === "true";
    byId("wipe").value = query.get("wipe") ?? 50;
    byId("frame").max = byId("frame").value = query.get("frame") ?? 0;
    return { before: query.get("before"), after: query.get("after") };
  }
  let wanted = restore();

  function requestQuery() {
    const query = new URLSearchParams(changed);
    const [kind, name] = split(source.value);
    query.set(kind, name);
    if (kind === "job" && steps.length) query.set("checkpoint", steps[checkpoint.value]);
    if (kind === "job" && alignment?.checked) query.set("alignment", "true");
    if (page.dataset.job && !file.files.length) {
      query.set("job", page.dataset.job);
      query.set("record", byId("record").value || 0);
    }
    return query;
  }

  function remember() {
    const query = requestQuery();
    if (page.dataset.job) query.set("job", page.dataset.job);
    if (byId("record")) query.set("record", byId("record").value || 0);
    for (const name of ["frame", "wipe", "before", "after"]) query.set(name, byId(name).value);
    const step = new URLSearchParams(location.search).get("picture_step");  // set by pictures.js
    if (step) query.set("picture_step", step);
    history.replaceState(null, "", `${location.pathname}?${query}`);
    link();
  }

  const split = (value) => [value.slice(0, value.indexOf(":")), value.slice(value.indexOf(":") + 1)];

  // Requests

  function schedule() {
    clearTimeout(timer);
    timer = setTimeout(load, WAIT_MS);
    isDrawn = false;
    showSliders();
  }

  async function load() {
    clearTimeout(timer);
    timer = 0;
    isDrawn = false;
    const sent = Object.fromEntries(SETTINGS.map((name) => [name, controls[name].value]));
    request?.abort();
    request = new AbortController();
    const own = request;
    const status = byId("status");
    status.textContent = "Drawing…";
    const slow = setTimeout(() => { status.textContent = "The lab is starting, which takes up to a minute…"; }, SLOW_MS);
    const headers = { "X-CSRF-Token": amdCsrf(), "HX-Request": "true" };
    const body = file.files[0];
    if (body) headers["Content-Type"] = body.type || "application/octet-stream";
    try {
      const response = await fetch(`${page.dataset.url}?${requestQuery()}`, { method: "POST", headers, body, signal: own.signal });
      if (response.ok && response.status !== 204) {
        await show(await response.json(), sent);
        byId("problem").replaceChildren();
      } else if (response.headers.get("HX-Redirect")) {
        location.href = response.headers.get("HX-Redirect");
      } else {
        byId("problem").innerHTML = await response.text();  // rendered and escaped by the service
      }
      status.textContent = "";
    } catch (error) {
      if (error.name === "AbortError") return;
      status.textContent = "The service does not respond; change a setting to try again.";
    } finally {
      clearTimeout(slow);
    }
  }

  // Shows a response. `sent`: values of the controls at the request; those that the user has changed since are kept.
  async function show(found, sent) {
    const images = await Promise.all(Object.values(found.layers).map(decode));
    view = found;
    isDrawn = !timer;
    sheets = Object.fromEntries(Object.keys(found.layers).map((name, index) => [name, images[index]]));
    const frame = byId("frame");
    frame.max = found.clip.frames - 1;
    if (Number(frame.value) > found.clip.frames - 1) frame.value = 0;
    byId("frame-field").hidden = found.clip.frames === 1;
    fillControls(sent);
    fillLayers();
    fillFacts();
    byId("download").disabled = false;
    for (const part of page.querySelectorAll(".lab-drawn")) part.hidden = false;
    draw();
    remember();
  }

  async function decode(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    return image;
  }

  // Controls

  function fillControls(sent) {
    for (const name of SETTINGS) {
      const control = controls[name], isTyped = control === document.activeElement && control.type !== "range";
      if (control.value === sent[name] && !isTyped) control.value = view.mask[name];
    }
    byId("position").max = view.mask.clips_per_step - 1;
    byId("decoder-ratio-field").hidden = view.mask.decoder !== "running_cell";
    const hasTeacher = "teacher" in view.layers, note = byId("teacher-note");
    byId("teacher").disabled = !hasTeacher;
    byId("legend").hidden = !hasTeacher;
    if (!hasTeacher) note.textContent = NO_TEACHER;
    else if (note.textContent === NO_TEACHER) note.textContent = "";
    showSliders();
  }

  function showCheckpoint() {
    if (!checkpoint) return;
    byId("checkpoint-field").hidden = !source.value.startsWith("job:");
    if (alignment) byId("alignment-field").hidden = !source.value.startsWith("job:");
    byId("checkpoint-value").textContent = steps[checkpoint.value];
  }

  function showSliders() {
    showCheckpoint();
    for (const role of ["student", "teacher"]) {
      const chosen = ratio(controls[`${role}_ratio`].value), drawn = view ? ratio(view.mask[`${role}_ratio`]) : chosen;
      byId(`${role}-value`).textContent = isDrawn || drawn === chosen ? drawn : `${chosen}, drawn: ${drawn}`;
    }
  }

  const ratio = (value) => Number(value).toFixed(Number.isInteger(Number((100 * value).toFixed(6))) ? 2 : 3);

  function select(list, names, value) {
    list.replaceChildren(...names.map((name) => new Option(NAMES[name], name)));
    list.value = names.includes(value) ? value : names[0];
  }

  function fillLayers() {
    const names = Object.keys(view.layers);
    const before = byId("before"), after = byId("after");
    const first = ["rebuilt", "roles", "masked"].find((name) => names.includes(name));
    select(before, names, wanted.before || before.value || "student");
    select(after, names, wanted.after || after.value || first);
    if (before.value === after.value && !wanted.after) after.value = first;
    wanted = {};
    const place = byId("layers");
    if ([...place.children].map((one) => one.dataset.layer).join() === names.join()) return;
    place.replaceChildren(...names.map((name) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption"), canvas = document.createElement("canvas");
      figure.dataset.layer = name;
      canvas.className = "lab-canvas";
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", NAMES[name]);
      caption.textContent = NAMES[name];
      figure.append(canvas, caption);
      return figure;
    }));
  }

  function facts(list, rows) {
    list.replaceChildren(...rows.flatMap(([name, value]) => {
      const term = document.createElement("dt"), text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      return [term, text];
    }));
  }

  function large(value) {
    const units = ["", "k", "M", "G", "T"];
    let index = 0;
    while (value >= 1000 && index < units.length - 1) { value /= 1000; index += 1; }
    return `${value.toPrecision(3)} ${units[index]}FLOPs`;
  }

  function fillFacts() {
    const sets = view.token_sets, tokens = view.clip.grid.reduce((product, count) => product * count, 1);
    const percent = (count) => Math.round((100 * count) / tokens);
    const share = (count, shown = percent(count)) => `${count} (${shown} %)`;
    const hidden = (count) => share(count, 100 - percent(tokens - count));  // so that the percentages add up to 100
    const seen = sets.student_visible.length, more = sets.teacher_only.length;
    const rows = [["Grid", `${view.clip.grid.join(" × ")} = ${tokens}`], ["Student sees", share(seen)]];
    if ("teacher" in view.layers) {
      rows.push(["Teacher sees", share(seen + more)], ["Teacher only", share(more, percent(seen + more) - percent(seen))]);
    }
    rows.push(["Student masked", hidden(sets.student_masked.length)], ["Rebuilt", hidden(sets.reconstructed.length)]);
    if (view.loss !== null) rows.push(["Error", view.loss.toPrecision(3)], ["Worst token", Math.max(...view.errors).toPrecision(3)]);
    if (view.alignment) {
      rows.push(["Direct loss", view.alignment.direct.toPrecision(3)]);
      if (view.alignment.generation !== null) rows.push(["Generation loss", view.alignment.generation.toPrecision(3)]);
    }
    facts(byId("counts"), rows);
    const { flops, relative } = view.cost;
    const teacher = "teacher" in view.layers ? `, teacher ${view.cost.baseline_teacher_ratio}` : "";
    byId("relative").textContent = `${relative.toFixed(2)} × the compute at student ${view.cost.baseline_student_ratio}${teacher}`;
    facts(byId("flops"), Object.entries(flops).filter(([, value]) => value).map(([name, value]) => [name === "total" ? "Total" : name[0].toUpperCase() + name.slice(1), large(value)]));
  }

  // Drawing

  function frameOf(name) {
    const { height, width } = view.clip, number = Number(byId("frame").value);
    return [sheets[name], (number % view.columns) * width, Math.floor(number / view.columns) * height, width, height];
  }

  function paint(context, name, x, y, scale, from = 0, to = 1) {
    const [sheet, left, top, width, height] = frameOf(name);
    const start = Math.round(from * width), stop = Math.round(to * width);
    context.imageSmoothingEnabled = false;
    if (stop > start) context.drawImage(sheet, left + start, top, stop - start, height, x + start * scale, y, (stop - start) * scale, height * scale);
  }

  function resized(canvas, minimum) {
    const scale = Math.max(1, Math.round(minimum / view.clip.width));
    canvas.width = view.clip.width * scale;
    canvas.height = view.clip.height * scale;
    return scale;
  }

  function draw() {
    if (!view) return;
    for (const figure of byId("layers").children) {
      const canvas = figure.firstElementChild, scale = resized(canvas, WIDTH);
      paint(canvas.getContext("2d"), figure.dataset.layer, 0, 0, scale);
    }
    const canvas = byId("wipe-canvas"), scale = resized(canvas, COMPARED_WIDTH), context = canvas.getContext("2d"), share = byId("wipe").value / 100;
    paint(context, byId("before").value, 0, 0, scale, 0, share);
    paint(context, byId("after").value, 0, 0, scale, share, 1);
    context.fillStyle = amdColours().accent;
    if (share > 0 && share < 1) context.fillRect(Math.round(Math.round(share * view.clip.width) * scale) - 1, 0, 2, canvas.height);
    byId("frame-value").textContent = `${Number(byId("frame").value) + 1} / ${view.clip.frames}`;
  }

  function download() {
    const names = Object.keys(view.layers), scale = Math.max(1, Math.round(WIDTH / view.clip.width)), gap = 16, label = 20;
    const width = view.clip.width * scale, height = view.clip.height * scale, colours = amdColours();
    const canvas = document.createElement("canvas");
    canvas.width = gap + names.length * (width + gap);
    canvas.height = 3 * gap + label + height;
    const context = canvas.getContext("2d");
    context.fillStyle = colours.surface;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.font = "13px system-ui, sans-serif";
    names.forEach((name, index) => {
      const left = gap + index * (width + gap);
      context.fillStyle = colours.text;
      context.fillText(NAMES[name], left, gap + 10);
      paint(context, name, left, gap + label, scale);
    });
    const { strategy, student_ratio: student, teacher_ratio: teacher, seed, step } = view.mask;
    context.fillStyle = colours.muted;
    context.fillText(`${strategy}, student ${student}, teacher ${teacher}, seed ${seed}, step ${step}`, gap, canvas.height - gap + 6);
    canvas.toBlob((blob) => {
      const anchor = document.createElement("a");
      anchor.href = URL.createObjectURL(blob);
      anchor.download = `masks-${strategy}-${student}-${teacher}.png`;
      anchor.click();
      setTimeout(() => URL.revokeObjectURL(anchor.href), 10000);
    }, "image/png");
  }

  // Links to the form for new jobs

  function link() {
    const train = byId("train");
    if (!train || !view) return;
    const [kind, name] = split(source.value), mask = view.mask;
    const job = kind === "job" ? name : kind === "encoder" ? source.selectedOptions[0].dataset.job : "";
    const fields = { "mask.student_ratio": mask.student_ratio, "mask.teacher_ratio": mask.teacher_ratio, "mask.strategy": mask.strategy, "mask.decoder": mask.decoder };
    if (mask.decoder === "running_cell") fields["mask.decoder_ratio"] = mask.decoder_ratio;
    const given = (prefix) => Object.entries(fields).map(([key, value]) => [`o.${prefix}${key}`, value]);
    const preset = kind === "preset" ? name : kind === "job" ? page.dataset.jobPreset : "";
    train.href = job
      ? `${page.dataset.jobs}/${encodeURIComponent(job)}/clone?${new URLSearchParams(given(""))}`
      : `${page.dataset.new}?${new URLSearchParams([["kind", "train"], ["preset", preset || page.dataset.default], ...given("")])}`;
    const around = (value, gap, limit) => [...new Set([value - gap, value, value + gap].map((one) => Math.min(limit, Math.max(0, Number(one.toFixed(3))))))];
    const dimensions = {
      "masking.student_ratio": around(mask.student_ratio, 0.1, 0.95).filter((one) => one > 0),
      "masking.teacher_ratio": around(mask.teacher_ratio, 0.15, mask.student_ratio),
    };
    const sweep = byId("sweep");
    sweep.hidden = !preset;
    sweep.href = `${page.dataset.new}?${new URLSearchParams([["kind", "search"], ["preset", preset], ["o.space.dimensions", JSON.stringify(dimensions)]])}`;
  }

  // Events

  function clearNotes(...roles) {
    for (const role of roles) byId(`${role}-note`).textContent = "";
  }

  function change(name, value) {
    changed[name] = value;
    if (name === "student_ratio" || name === "teacher_ratio") {
      const student = Number(controls.student_ratio.value), teacher = Number(controls.teacher_ratio.value);
      clearNotes(name === "student_ratio" ? "student" : "teacher");
      const cells = view ? view.clip.grid.slice(controls.strategy.value === "tube" ? 1 : 0).reduce((product, count) => product * count, 1) : 0;
      // The teacher sees at least what the student sees; ratios that hide equally many cells must be equal.
      if (teacher > student || Math.floor(teacher * cells) === Math.floor(student * cells)) {
        const [from, to] = name === "student_ratio" ? ["student", "teacher"] : ["teacher", "student"];
        const rule = teacher > student ? "the teacher must not hide more than the student" : `ratios that hide the same number of the ${cells} cells must be equal`;
        if (teacher !== student) byId(`${to}-note`).textContent = `Set to the ${from}'s ratio: ${rule}.`;
        controls[`${to}_ratio`].value = changed[`${to}_ratio`] = value;
      }
    }
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    const control = event.target;
    if (control === source) {
      changed = {};
      clearNotes("student", "teacher");
    } else if (control === checkpoint) showCheckpoint();
    else if (!control.checkValidity()) {
      control.reportValidity();
      return;
    } else if (SETTINGS.includes(control.name)) {
      if (control.value === "") delete changed[control.name];
      else change(control.name, control.value);
    }
    schedule();
  });
  page.addEventListener("input", (event) => {
    if (["frame", "wipe", "before", "after"].includes(event.target.name)) {
      draw();
      if (view) remember();
    }
  });
  page.addEventListener("dragover", (event) => event.preventDefault());
  page.addEventListener("drop", (event) => {
    event.preventDefault();
    if (!event.dataTransfer.files.length) return;
    file.files = event.dataTransfer.files;
    schedule();
  });
  document.addEventListener("theme", draw);
  byId("job")?.addEventListener("change", (event) => {
    location.search = new URLSearchParams(event.target.value ? { job: event.target.value } : { preset: page.dataset.default });
  });
  byId("reset").addEventListener("click", () => {
    changed = {};
    clearNotes("student", "teacher");
    load();
  });
  byId("download").addEventListener("click", download);
  byId("copy").addEventListener("click", async (event) => {
    const button = event.target;
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copy it from the address bar";
    }
    setTimeout(() => { button.textContent = "Copy link"; }, 1500);
  });
  showCheckpoint();
  load();
})();
