"use strict";
const find = (id) => document.getElementById(id);
const place = `srt-labels-${DATA.page}`;
const SIDES = { 1: "left", 2: "right", 0: "neither" };

// One entry a judged pair, in order: "left", "right" or "neither".
function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(place) ?? "[]");
    return Array.isArray(kept) ? kept.slice(0, DATA.pairs.length) : [];
  } catch {
    return [];
  }
}

const answers = load();

function keep() {
  try {
    localStorage.setItem(place, JSON.stringify(answers));
  } catch {
    find("progress").textContent += " This browser keeps nothing: save before you close the page.";
  }
}

function show() {
  const done = answers.length;
  const total = DATA.pairs.length;
  const over = done >= total;
  find("pair").hidden = over;
  for (const key of [0, 1, 2]) find(`choose-${key}`).hidden = over;
  find("undo").disabled = !done;
  find("save").disabled = !done;
  find("bar").style.width = `${total ? (100 * done) / total : 100}%`;
  find("progress").textContent = `${done} of ${total} judged`;
  find("headline").textContent = over ? "All judged. Save your answers." : "Which answer is better?";
  if (over) return;
  const pair = DATA.pairs[done];
  find("prompt").textContent = pair.prompt;
  find("left").textContent = pair.left.text;
  find("right").textContent = pair.right.text;
  scrollTo(0, 0);
}

function choose(side) {
  if (answers.length >= DATA.pairs.length) return;
  answers.push(side);
  show();
  keep();
}

function undo() {
  answers.pop();
  show();
  keep();
}

function lines() {
  return answers
    .map((side, n) => {
      const pair = DATA.pairs[n];
      const better = side === "neither" ? null : pair[side].key;
      return JSON.stringify({ pair: pair.pair, better }) + "\n";
    })
    .join("");
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/jsonl" }));
  link.download = DATA.file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

for (const [key, side] of Object.entries(SIDES)) {
  find(`choose-${key}`).addEventListener("click", () => choose(side));
}
find("undo").addEventListener("click", undo);
find("save").addEventListener("click", save);
find("file").textContent = DATA.file;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key in SIDES) choose(SIDES[event.key]);
  else if (event.key === "u") undo();
});
show();
