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

  // Another kind or preset loads the form again; it keeps what the user has typed.
  const kept = /^(o\..+|name|labels|priority|project)$/;
  document.getElementById("choose")?.addEventListener("formdata", (event) => {
    for (const [name, value] of new FormData(form)) if (value && kept.test(name)) event.formData.append(name, value);
  });

  form.addEventListener("change", (event) => { if (event.target.dataset.default !== undefined) showUsed(); });
})();
