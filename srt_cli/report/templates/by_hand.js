"use strict";
const find = (id) => document.getElementById(id);

// What was done on this page before, kept by the browser and by the tab itself: Chromium now and then opens
// a file with a store that is empty and keeps nothing. Another page's rows are kept apart.
function load(place) {
  let kept = [];
  try {
    kept = JSON.parse(localStorage.getItem(place)) ?? [];
  } catch {
    // Such a browser keeps nothing; keep() says so.
  }
  const here = history.state?.[place] ?? [];
  const rows = DATA.rows.slice(0, Math.max(kept.length, here.length));
  const work = rows.map((_, n) => here[n] ?? kept[n] ?? null);
  if (work.length) keep(place, work);
  return work;
}

function keep(place, work) {
  try {
    history.replaceState({ [place]: work }, "");
    localStorage.setItem(place, JSON.stringify(work));
  } catch {
    find("progress").textContent += " This browser keeps nothing: save before you close the page.";
  }
}

function save(rows) {
  const lines = rows.map((row) => JSON.stringify(row) + "\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines], { type: "application/jsonl" }));
  link.download = DATA.file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

find("file").textContent = DATA.file;
