"use strict";
const points = [...document.querySelectorAll(".point")].sort((a, b) => parseFloat(a.style.left) - parseFloat(b.style.left));
document.getElementById("plot").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") document.activeElement.blur();
  if (!step) return;
  event.preventDefault();
  const next = points[(points.indexOf(document.activeElement) + step + points.length) % points.length];
  next.focus({ focusVisible: true });
});
