const place = `srt-critiques-${DATA.page}`;
const FIELDS = ["weaknesses", "suggestions", "refinement"];

// One entry a row, in order: what was written of it, null, or "" where it was taken back.
const kept = load(place);
const written = Array.from(DATA.rows, (_, n) => kept[n] ?? null);
let at = Math.max(0, written.findIndex((each) => !isWhole(each)));

// Suggestions may stand in the first field, and another critic may write the improved response.
function isWhole(each) {
  return Boolean(each?.weaknesses?.trim() && each.score);
}

function isBegun(each) {
  return Boolean(each && (each.score || FIELDS.some((name) => each[name]?.trim())));
}

const chosen = () => document.querySelector("[name=score]:checked");

function count() {
  const done = written.filter(isWhole).length;
  const begun = written.filter((each) => isBegun(each) && !isWhole(each)).length;
  const total = DATA.rows.length;
  find("bar").style.width = `${total ? (100 * done) / total : 100}%`;
  find("progress").textContent =
    `response ${at + 1} of ${total} · ${done} criticised` +
    (begun ? ` · ${begun} begun: weaknesses and a score make a critique` : "");
  find("save").disabled = !done;
  find("back").disabled = at === 0;
  find("next").disabled = at === total - 1;
  find("headline").textContent =
    done === total ? "All criticised. Save your critiques." : "What is weak, and what would be better?";
}

function show() {
  const row = DATA.rows[at];
  find("prompt").textContent = row.prompt;
  find("response").textContent = row.row.response;
  for (const name of FIELDS) find(name).value = written[at]?.[name] ?? "";
  for (const radio of document.querySelectorAll("[name=score]")) {
    radio.checked = Number(radio.value) === written[at]?.score;
  }
  count();
  scrollTo(0, 0);
}

function take() {
  const entry = Object.fromEntries(FIELDS.map((name) => [name, find(name).value]));
  entry.score = chosen() ? Number(chosen().value) : null;
  written[at] = isBegun(entry) ? entry : "";
  count();
  keep(place, written);
}

function go(step) {
  const to = at + step;
  if (to < 0 || to >= DATA.rows.length) return;
  at = to;
  show();
  find("weaknesses").focus();
}

function score(value) {
  document.querySelector(`[name=score][value="${value}"]`).checked = true;
  take();
}

function critiques() {
  const by = find("by").value.trim();
  return written.flatMap((each, n) => {
    if (!isWhole(each)) return [];
    const { refinement, ...said } = each;
    const improved = refinement.trim() ? { refinement } : {};
    return [{ ...DATA.rows[n].row, ...said, ...improved, ...(by ? { critic: by } : {}) }];
  });
}

for (const name of FIELDS) find(name).addEventListener("input", take);
for (const radio of document.querySelectorAll("[name=score]")) radio.addEventListener("change", take);
find("copy").addEventListener("click", () => {
  if (find("refinement").value.trim()) return;
  find("refinement").value = DATA.rows[at].row.response;
  take();
  find("refinement").focus();
});
find("back").addEventListener("click", () => go(-1));
find("next").addEventListener("click", () => go(1));
find("save").addEventListener("click", () => save(critiques()));
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
    event.preventDefault();
    go(event.shiftKey ? -1 : 1);
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.matches?.("textarea, input[type=text]")) return;
  if (/^[0-9]$/.test(event.key)) score(event.key === "0" ? 10 : event.key);
});
show();
