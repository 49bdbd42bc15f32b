"use strict";
const search = document.getElementById("search");
const changed = document.getElementById("changed");
const count = document.getElementById("count");
const cards = [...document.querySelectorAll("article")];
const texts = cards.map((card) => card.textContent.toLowerCase());
const differs = cards.map((card) => card.hasAttribute("data-differs"));
const total = count.textContent;
function filter() {
  const wanted = search.value.trim().toLowerCase();
  let shown = 0;
  cards.forEach((card, n) => {
    const keep = texts[n].includes(wanted) && (!changed.checked || differs[n]);
    card.hidden = !keep;
    shown += keep;
  });
  count.textContent = wanted || changed.checked ? `${shown} shown` : total;
}
search.addEventListener("input", filter);
changed.addEventListener("change", filter);
