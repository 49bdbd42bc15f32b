const place = `srt-labels-${DATA.page}`;
const SIDES = { 1: "left", 2: "right", 0: "neither" };

// One entry a judged pair, in order: "left", "right" or "neither".
const answers = load(place).filter(Boolean);

function show() {
  const done = answers.length;
  const total = DATA.rows.length;
  const over = done >= total;
  find("pair").hidden = over;
  for (const key of [0, 1, 2]) find(`choose-${key}`).hidden = over;
  find("undo").disabled = !done;
  find("save").disabled = !done;
  find("bar").style.width = `${total ? (100 * done) / total : 100}%`;
  find("progress").textContent = `${done} of ${total} judged`;
  find("headline").textContent = over ? "All judged. Save your answers." : "Which answer is better?";
  if (over) return;
  const pair = DATA.rows[done];
  find("prompt").textContent = pair.prompt;
  find("left").textContent = pair.left.text;
  find("right").textContent = pair.right.text;
  scrollTo(0, 0);
}

function choose(side) {
  if (answers.length >= DATA.rows.length) return;
  answers.push(side);
  show();
  keep(place, answers);
}

function undo() {
  if (!answers.length) return;
  answers.pop();
  show();
  // Blanks take back what an older copy may still hold.
  keep(place, [...answers, ...Array(DATA.rows.length - answers.length).fill("")]);
}

function label(side, n) {
  const pair = DATA.rows[n];
  return { pair: pair.pair, better: side === "neither" ? null : pair[side].key };
}

for (const [key, side] of Object.entries(SIDES)) {
  find(`choose-${key}`).addEventListener("click", () => choose(side));
}
find("undo").addEventListener("click", undo);
find("save").addEventListener("click", () => save(answers.map(label)));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key in SIDES) choose(SIDES[event.key]);
  else if (event.key === "u") undo();
});
show();
