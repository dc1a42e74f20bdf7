// Pictures of a run: one slider selects the step for all layers, and the URL keeps it. Images are decoded before they replace
// those of another step.
(function () {
  "use strict";
  const place = document.getElementById("pictures");
  if (!place) return;
  const slider = document.getElementById("pictures-step"), value = document.getElementById("pictures-value"), status = document.getElementById("pictures-status");
  const steps = place.dataset.steps.split(","), figures = [...place.querySelectorAll("figure")];
  let wanted = "";

  async function load(figure, step) {
    const image = new Image();
    image.alt = `${figure.dataset.title}, step ${step}`;
    image.src = `${place.dataset.url}/${step}/${figure.dataset.name}`;
    await image.decode();
    return image;
  }

  async function show() {
    const step = wanted = steps[slider.value];
    value.textContent = window.amdNumber(Number(step));
    try {
      const images = await Promise.all(figures.map((figure) => load(figure, step)));
      if (step !== wanted) return;  // the slider has moved on
      figures.forEach((figure, index) => {
        figure.querySelector("img")?.remove();
        figure.prepend(images[index]);
      });
      status.textContent = "";
    } catch {
      if (step === wanted) status.textContent = `The pictures of step ${step} cannot be loaded; reload the page.`;
    }
  }

  function remember() {
    const url = new URL(location.href);
    url.searchParams.set("picture_step", steps[slider.value]);
    history.replaceState(null, "", url);
  }

  const step = new URLSearchParams(location.search).get("picture_step");
  if (steps.includes(step)) slider.value = steps.indexOf(step);
  slider.addEventListener("input", show);
  slider.addEventListener("change", remember);
  show();
})();
