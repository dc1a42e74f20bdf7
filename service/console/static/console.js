// Behaviour that all pages share: theme, CSRF header, copy buttons, confirmation, refreshing lists, search in tables.
(function () {
  "use strict";
  const root = document.documentElement;
  const csrf = () => document.querySelector("meta[name=csrf]")?.content || "";

  document.addEventListener("htmx:configRequest", (event) => {
    event.detail.headers["X-CSRF-Token"] = csrf();
  });

  document.addEventListener("click", async (event) => {
    const target = event.target.closest("[data-copy],[data-theme-toggle],[data-dismiss]");
    if (!target) return;
    if ("themeToggle" in target.dataset) {
      root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
      localStorage.setItem("amd-theme", root.dataset.theme);
      document.dispatchEvent(new CustomEvent("theme"));
    } else if ("dismiss" in target.dataset) {
      target.closest(".notice").remove();
    } else {
      const source = document.getElementById(target.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
        announce(target, "Copied");
      } catch {
        const range = document.createRange();
        range.selectNodeContents(source);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        announce(target, "Selected");
      }
    }
  });

  // A shown problem disappears with the user's next request, or when the request that failed succeeds.
  let failed = null;
  document.addEventListener("htmx:beforeRequest", (event) => {
    if (!isBackground(event.detail.requestConfig)) dismissProblem();
  });
  document.addEventListener("htmx:afterRequest", (event) => {
    const { xhr, pathInfo } = event.detail;
    if (xhr.status >= 400) failed = pathInfo.requestPath;
    else if (xhr.status >= 200 && failed === pathInfo.requestPath) dismissProblem();
  });

  function dismissProblem() {
    failed = null;
    document.getElementById("toasts").replaceChildren();
  }

  function announce(button, text) {
    const before = button.dataset.label || button.textContent;
    button.dataset.label = before;
    button.textContent = text;
    setTimeout(() => { button.textContent = before; }, 1500);
  }

  // Lists refresh while the page is visible.
  setInterval(() => {
    if (document.visibilityState !== "visible") return;
    for (const element of document.querySelectorAll("[data-refresh]")) htmx.trigger(element, "refresh");
  }, 4000);

  // A part of the page that refreshes by itself waits while the user has a menu open, types, or selects text in it.
  const postponed = new Set();
  const isBackground = (request) => !request.triggeringEvent || /^(refresh$|sse:)/.test(request.triggeringEvent.type);
  const IN_USE = ":is(details[open], dialog[open], :popover-open, input:focus, textarea:focus, select:focus)"; // :is ignores what a browser does not know
  function inUse(element) {
    const selection = getSelection();
    if (!selection.isCollapsed && element.contains(selection.anchorNode)) return true;
    return Boolean(element.querySelector(IN_USE));
  }
  function postpone(event) {
    const { elt, target, requestConfig } = event.detail;
    if (!isBackground(requestConfig) || !inUse(target)) return;
    event.preventDefault();
    postponed.add(elt);
  }
  function refreshPostponed() {
    for (const element of postponed) {
      if (element.isConnected && inUse(element)) continue;
      postponed.delete(element);
      if (element.isConnected) htmx.trigger(element, "refresh");
    }
  }
  document.addEventListener("htmx:beforeRequest", postpone);
  document.addEventListener("htmx:beforeSwap", postpone);
  for (const type of ["toggle", "close", "focusout", "selectionchange"]) {
    document.addEventListener(type, () => setTimeout(refreshPostponed), true);
  }

  // Durations that have not ended count up between the updates from the service. They start with the service's
  // number of seconds, because the clock of the browser may differ.
  const firstSeen = new WeakMap();
  setInterval(() => {
    for (const element of document.querySelectorAll("[data-elapsed]")) {
      if (!firstSeen.has(element)) firstSeen.set(element, performance.now());
      element.textContent = duration(Number(element.dataset.elapsed) + (performance.now() - firstSeen.get(element)) / 1000);
    }
  }, 1000);

  function duration(seconds) {
    const total = Math.round(seconds);
    for (const [size, name, part, partName] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
      const rest = Math.floor((total % size) / part);
      if (total >= size) return `${Math.floor(total / size)} ${name}${rest ? ` ${rest} ${partName}` : ""}`;
    }
    return `${total} s`;
  }

  // An open menu closes with Escape, with a click elsewhere, and when its form has been accepted.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.querySelectorAll("details.menu[open]").forEach((menu) => { menu.open = false; });
    if (event.key === "/" && !event.target.closest("input,textarea,select") && !event.metaKey && !event.ctrlKey) {
      const search = document.querySelector("input[type=search]");
      if (search) { event.preventDefault(); search.focus(); }
    }
  });
  document.addEventListener("click", (event) => {
    document.querySelectorAll("details.menu[open]").forEach((menu) => { if (!menu.contains(event.target)) menu.open = false; });
    const opener = event.target.closest("[data-opens]");
    if (!opener) return;
    const menu = document.getElementById(opener.dataset.opens);
    menu.open = true;
    menu.querySelector("input, select, textarea").focus();
  });
  document.addEventListener("htmx:afterRequest", (event) => {
    const status = event.detail.xhr.status;
    if (!event.target.matches("details.menu > form") || status < 200 || status >= 300) return;
    event.target.reset();
    event.target.parentElement.open = false;
  });

  // A search field that hides the rows that do not contain its text.
  document.addEventListener("input", (event) => {
    const field = event.target.closest("[data-filter]");
    if (!field) return;
    const wanted = field.value.trim().toLowerCase();
    const rows = [...document.querySelectorAll(field.dataset.filter)];
    const section = rows[0]?.closest("details");
    if (section) openWhileSearching(section, Boolean(wanted));
    let shown = 0;
    for (const row of rows) {
      row.hidden = wanted ? !row.dataset.text.toLowerCase().includes(wanted) : "unused" in row.dataset;
      shown += row.hidden ? 0 : 1;
    }
    const count = document.getElementById(field.dataset.count || "");
    if (count) count.textContent = wanted ? `${shown} shown` : "";
  });
  function openWhileSearching(section, searching) {
    if (searching && !section.open) {
      section.open = true;
      section.dataset.openedBySearch = "";
    } else if (!searching && "openedBySearch" in section.dataset) {
      section.open = false;
      delete section.dataset.openedBySearch;
    }
  }
  document.addEventListener("change", (event) => {
    event.target.closest("[data-autosubmit]")?.form.requestSubmit();
    if (event.target.dataset.clears) document.getElementById(event.target.dataset.clears).replaceChildren();
    const field = event.target.closest("[data-only-changed]");
    if (field) document.getElementById(field.dataset.onlyChanged).classList.toggle("only-changed", field.checked);
  });

  // What scrolls sideways can be reached with the keyboard. Its sides fade where more follows.
  function markScrolling() {
    for (const element of document.querySelectorAll(".table, .tabs, .nav")) {
      if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
      else element.removeAttribute("tabindex");
      markMore(element);
    }
  }
  function markMore(element) {
    element.classList.toggle("more-left", element.scrollLeft > 1);
    element.classList.toggle("more-right", element.scrollLeft + element.clientWidth < element.scrollWidth - 1);
  }
  window.addEventListener("resize", markScrolling);
  document.addEventListener("htmx:afterSettle", markScrolling);
  document.addEventListener("scroll", (event) => { if (event.target.matches?.(".table, .tabs, .nav")) markMore(event.target); }, true);
  markScrolling();
  document.querySelector(".nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });

  // Colours of the theme, for charts, which draw on canvases.
  window.amdColours = () => {
    const style = getComputedStyle(root);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    return {
      text: read("text"), muted: read("muted"), line: read("line"), surface: read("surface"), sunken: read("sunken"),
      good: read("good"), bad: read("bad"), wait: read("wait"), accent: read("accent"),
      series: [1, 2, 3, 4, 5, 6, 7, 8].map((index) => read(`c${index}`)),
    };
  };
  // Format a number like `service.web.formats.number`, with the same thousands separator in every language.
  window.amdNumber = (value) => value.toLocaleString("en", { maximumFractionDigits: 20 }).replaceAll(",", "\u202f");
  window.amdCsrf = csrf;
})();
