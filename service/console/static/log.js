// A window on a log of any length: only the visible lines are in the page. New output arrives by an event stream,
// earlier output is fetched when one scrolls up, and the whole log is searched on the server.
import { AnsiUp } from "./vendor/ansi_up.js";

const view = document.getElementById("log");
const lines = document.getElementById("log-lines");
const status = document.getElementById("log-status");
const follow = document.getElementById("log-follow");
const HEIGHT = 18;
const MAX_LINES = 200000; // in memory; earlier ones are fetched again
const FAR = 1e15; // beyond the end of any log
const MAX_LENGTH = 10000; // characters shown of a line

const ansi = new AnsiUp();
ansi.use_classes = true;
ansi.url_allowlist = {};

const query = new URLSearchParams();
if (view.dataset.rank !== "") query.set("rank", view.dataset.rank);
else query.set("attempt", view.dataset.attempt);

// ansi_up writes some attributes as inline styles, which the content security policy forbids. A "<" comes from it alone,
// since it escapes the text.
const STYLES = { "font-weight:bold": "ansi-bold", "opacity:0.7": "ansi-faint", "font-style:italic": "ansi-italic", "text-decoration:underline": "ansi-underline" };
const html = (text) => ansi.ansi_to_html(`${text.replaceAll("\r", "")}\u001b[0m`).replace(
  /<span style="([^"]*)"(?: class="([^"]*)")?>/g,
  (_, style, classes) => `<span class="${[classes || "", ...style.split(";").map((one) => STYLES[one.trim()] || "")].join(" ")}">`,
);

let texts = [];
let start = 0; // offset of the first line in memory
let end = 0; // offset after the last one
let rest = ""; // of a line whose end has not arrived
let marked = null; // text of the selected match
let stream = null;
let fetching = false;

function split(text) {
  const found = text.split("\n");
  const last = found.pop();
  return [found.map((line) => line.slice(0, MAX_LENGTH)), last];
}

function append(text) {
  const [whole, last] = split(rest + text);
  rest = last.slice(0, MAX_LENGTH);
  texts = texts.length ? texts.concat(whole) : whole;
  if (texts.length > MAX_LINES) texts = texts.slice(-MAX_LINES); // `start` is then too early, which is harmless
  sizeOf(texts.length + (rest ? 1 : 0));
  if (follow.checked) view.scrollTop = view.scrollHeight;
  render();
}

let drawing = 0;
function render() {
  if (!drawing) drawing = requestAnimationFrame(() => { drawing = 0; draw(); });
}

function draw() {
  const shown = rest ? texts.concat([rest]) : texts;
  lines.classList.toggle("none", shown.length === 0);
  sizeOf(shown.length);
  const first = Math.max(0, Math.floor(view.scrollTop / HEIGHT) - 20);
  const last = Math.min(shown.length, first + Math.ceil(view.clientHeight / HEIGHT) + 40);
  const rows = [];
  for (let index = first; index < last; index++) {
    const row = document.createElement("div");
    row.className = "line";
    row.style.top = `${index * HEIGHT}px`;
    row.innerHTML = html(shown[index]);
    if (marked && row.textContent.includes(marked)) row.classList.add("current");
    rows.push(row);
  }
  lines.replaceChildren(...rows);
  const size = `${window.amdNumber(shown.length)} lines`;
  status.textContent = shown.length ? (start > 0 ? `${size} loaded; scroll up for earlier ones` : size) : "The log is empty so far.";
}

function sizeOf(count) {
  lines.style.height = `${count * HEIGHT}px`;
}

async function range(parameters) {
  const url = new URLSearchParams(query);
  for (const [name, value] of Object.entries(parameters)) url.set(name, value);
  const response = await fetch(`${view.dataset.url}/range?${url}`, { headers: { "HX-Request": "true" } });
  if (!response.ok || response.status === 204) throw new Error(`the service answered ${response.status}`);
  return response.json();
}

async function earlier() {
  if (fetching || start <= 0) return;
  fetching = true;
  try {
    const found = await range({ before: start });
    const [whole] = split(found.text);
    start = found.start >= start ? 0 : found.start;
    texts = whole.concat(texts);
    view.scrollTop += whole.length * HEIGHT;
    draw();
  } finally {
    fetching = false;
  }
}

function connect() {
  const url = new URLSearchParams(query);
  url.set("offset", end);
  stream = new EventSource(`${view.dataset.url}/follow?${url}`);
  stream.addEventListener("log", (event) => {
    end = Number(event.lastEventId);
    append(JSON.parse(event.data).text);
  });
  stream.addEventListener("end", () => { stream.close(); render(); });
}

async function open() {
  const found = await range({ before: FAR });
  start = found.start;
  end = found.end;
  append(found.text);
  connect();
}

async function search(text) {
  const box = document.getElementById("matches");
  const list = document.getElementById("matches-list");
  const title = document.getElementById("matches-title");
  if (!text) { box.hidden = true; return; }
  box.hidden = false;
  title.textContent = "Searching…";
  const url = new URLSearchParams(query);
  url.set("q", text);
  const response = await fetch(`${view.dataset.url}/search?${url}`, { headers: { "HX-Request": "true" } });
  if (!response.ok) { title.textContent = "The log cannot be searched now."; return; }
  const found = await response.json();
  const count = window.amdNumber(found.items.length);
  title.textContent = found.complete ? `${count} of ${window.amdNumber(found.lines)} lines` : `The first ${count} matching lines`;
  list.replaceChildren(...found.items.map((match) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${window.amdNumber(match.line)}  ${match.text}`;
    button.addEventListener("click", () => show(match));
    return button;
  }));
}

// Show a match in its context. The log then starts there; "Follow the end" brings the newest output back.
async function show(match) {
  follow.checked = false;
  if (stream) stream.close();
  const [before, after] = [await range({ before: match.offset }), await range({ after: match.offset })];
  const [head] = split(before.text);
  const [tail, last] = split(after.text);
  texts = head.concat(tail);
  rest = last;
  start = match.offset ? before.start : 0;
  end = after.end;
  marked = match.text.slice(0, 200);
  sizeOf(texts.length);
  view.scrollTop = Math.max(0, head.length * HEIGHT - view.clientHeight / 3);
  draw();
  view.focus();
}

view.addEventListener("scroll", () => {
  if (view.scrollTop < HEIGHT * 30) earlier().catch(() => {});
  const atEnd = view.scrollTop + view.clientHeight >= view.scrollHeight - HEIGHT * 2;
  if (!atEnd && follow.checked && view.scrollHeight > view.clientHeight) follow.checked = false;
  render();
});
follow.addEventListener("change", () => {
  if (!follow.checked) return;
  marked = null;
  texts = [];
  rest = "";
  if (stream) stream.close();
  open().catch(() => {});
});
document.getElementById("log-search").addEventListener("submit", (event) => {
  event.preventDefault();
  search(document.getElementById("log-q").value.trim()).catch(() => {});
});
document.getElementById("matches-close").addEventListener("click", () => search(""));
new ResizeObserver(render).observe(view);
open().catch((error) => { status.textContent = `The log cannot be read: ${error.message}. Reload the page to try again.`; });
