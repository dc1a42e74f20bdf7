// The form for a new job: shows the fields that the job uses, which depend on the values of other fields.
(function () {
  "use strict";
  const form = document.getElementById("new-job"), search = document.getElementById("field-q");
  if (!form) return;

  function valueOf(key) {
    const control = document.getElementById(`f-${key}`);
    return control.value || control.dataset.default;
  }

  function showUsed() {
    for (const field of form.querySelectorAll("[data-only-with]")) {
      const [key, value] = field.dataset.onlyWith.split("=");
      const unused = valueOf(key) !== value && !field.querySelector("input, select").value;
      field.toggleAttribute("data-unused", unused);
      field.hidden = unused;
    }
    if (search.value) search.dispatchEvent(new Event("input", { bubbles: true })); // a search also finds unused fields
  }

  form.addEventListener("change", (event) => { if (event.target.dataset.default !== undefined) showUsed(); });
})();
