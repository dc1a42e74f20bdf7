// Tables that are sorted by a heading: missing values are last. The order is kept when the service replaces the table.
(function () {
  "use strict";
  const OPPOSITE = { ascending: "descending", descending: "ascending" };
  const orders = new Map(); // by table ID: the column that the table is sorted by, and the direction

  function arrange(table) {
    const order = orders.get(table.id);
    if (!order) return;
    [...table.tHead.rows[0].cells].forEach((cell, index) => {
      if (index === order.column) cell.setAttribute("aria-sort", order.direction);
      else cell.removeAttribute("aria-sort");
    });
    const rows = [...table.tBodies[0].rows];
    const sign = order.direction === "descending" ? -1 : 1;
    const numeric = rows.some((row) => "value" in row.cells[order.column].dataset);
    const value = (row) => {
      const cell = row.cells[order.column];
      return numeric ? ("value" in cell.dataset ? Number(cell.dataset.value) : null) : cell.textContent.trim();
    };
    const compare = (a, b) => (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    rows.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * compare(a, b);
    });
    table.tBodies[0].append(...rows);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".sortable .sort");
    if (!button) return;
    const heading = button.closest("th"), table = button.closest("table");
    const direction = OPPOSITE[heading.getAttribute("aria-sort")] || button.dataset.first || "ascending";
    orders.set(table.id, { column: heading.cellIndex, direction });
    arrange(table);
  });
  document.body.addEventListener("htmx:afterSettle", () => document.querySelectorAll("table.sortable").forEach(arrange));
})();
