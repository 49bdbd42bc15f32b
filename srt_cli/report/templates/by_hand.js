"use strict";
const find = (id) => document.getElementById(id);

// What was done on this page before, in this browser; another page's rows are kept apart.
function load(place) {
  try {
    const kept = JSON.parse(localStorage.getItem(place) ?? "[]");
    return Array.isArray(kept) ? kept.slice(0, DATA.rows.length) : [];
  } catch {
    return [];
  }
}

function keep(place, work) {
  try {
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
