// A trial under the pointer, or chosen with a click, stands out in every chart and in the table; the page reads as well without.
"use strict";
(() => {
  const main = document.querySelector("main"), parts = [...document.querySelectorAll("[data-trial]")];
  const told = new Map();
  for (const part of parts) {
    const title = part.querySelector(":scope > title");
    if (title) {
      told.set(part.dataset.trial, title.textContent);
      title.remove();
    }
  }
  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;
  let chosen = null;
  const light = (id) => {
    main.classList.toggle("picking", id !== null);
    for (const part of parts) part.classList.toggle("lit", part.dataset.trial === id);
  };
  const under = (event) => event.target.closest?.("[data-trial]")?.dataset.trial ?? null;
  const show = (event, id) => {
    tip.textContent = told.get(id) ?? "";
    tip.hidden = tip.textContent === "";
    const { width, height } = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, document.documentElement.clientWidth - width - 8);
    const y = event.clientY + 18 + height > window.innerHeight ? event.clientY - height - 12 : event.clientY + 18;
    tip.style.translate = `${Math.max(8, x)}px ${Math.max(8, y)}px`;
  };
  main.addEventListener("pointermove", (event) => {
    const id = under(event);
    light(id ?? chosen);
    if (id !== null && !event.target.closest("table")) show(event, id);
    else tip.hidden = true;
  });
  main.addEventListener("pointerleave", () => {
    tip.hidden = true;
    light(chosen);
  });
  main.addEventListener("click", (event) => {
    const id = under(event);
    chosen = id === chosen ? null : id;
    light(chosen);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") light((chosen = null));
  });
})();
