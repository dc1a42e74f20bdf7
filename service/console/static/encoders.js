// The list of encoders: the number of selected encoders decides whether they can be compared.
(function () {
  "use strict";
  const button = document.getElementById("compare");
  if (!button) return;
  const boxes = [...document.querySelectorAll("input[name=encoder]")];
  const most = Number(button.dataset.most);

  function update() {
    const selected = boxes.filter((box) => box.checked).length;
    button.disabled = selected < 2;
    button.textContent = selected ? `Compare (${selected})` : "Compare";
    for (const box of boxes) box.disabled = !box.checked && selected >= most;
    document.getElementById("compare-hint").textContent = selected >= most ? `At most ${most} encoders can be compared.` : "";
  }

  document.addEventListener("change", update);
  window.addEventListener("pageshow", update); // the browser restores the selection
  update();
})();
