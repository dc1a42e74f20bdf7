// Sets the theme before the page is drawn: the user's choice, else that of the system.
(function () {
  "use strict";
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  function apply() {
    const chosen = localStorage.getItem("amd-theme");
    document.documentElement.dataset.theme = chosen || (system.matches ? "dark" : "light");
  }
  system.addEventListener("change", apply);
  apply();
})();
