"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const short = (name) => name.split(", ")[0];
const percent = (share) => `${(100 * share).toFixed(0)}\u00a0%`;

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// Charts: what is pointed at or focused is read out below; arrow keys move along.

for (const chart of document.querySelectorAll(".chart")) {
  const marks = [...chart.querySelectorAll(".mark")];
  const readOut = ({ target }) => {
    const mark = target.closest(".mark");
    if (mark) chart.querySelector(".readout").textContent = mark.getAttribute("aria-label");
  };
  chart.addEventListener("pointerover", readOut);
  chart.addEventListener("focusin", readOut);
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const from = marks.indexOf(document.activeElement);
    const to = marks[from + step];
    if (!step || !to) return;
    event.preventDefault();
    marks[from].tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
}

// The table of classes: sorted by its headings, searched by words.

const table = byId("class-table");
const rows = [...table.tBodies[0].rows];
const collator = new Intl.Collator("en", { numeric: true });

function sortBy(heading) {
  const numeric = "number" in heading.dataset;
  const { ariaSort } = heading;
  const down = ariaSort === "none" ? numeric : ariaSort === "ascending";
  for (const other of table.tHead.querySelectorAll("[aria-sort]")) other.ariaSort = "none";
  heading.ariaSort = down ? "descending" : "ascending";
  const value = (row) => row.cells[heading.cellIndex].dataset.value;
  const order = numeric ? (a, b) => value(a) - value(b) : (a, b) => collator.compare(value(a), value(b));
  rows.sort((a, b) => (down ? order(b, a) : order(a, b)));
  table.tBodies[0].append(...rows);
}

table.tHead.addEventListener("click", ({ target }) => {
  if (target.closest("button")) sortBy(target.closest("th"));
});

byId("search").addEventListener("input", ({ target }) => {
  const wanted = target.value.trim().toLowerCase();
  for (const row of rows) row.hidden = !row.dataset.words.toLowerCase().includes(wanted);
  byId("n-classes").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} classes`;
});

// The images: cut from one sheet, filtered by class and by answers.

const PER_PAGE = 48;

function answersAs(wanted, [, truth, baseline, improvement]) {
  const right = { baseline: baseline === truth, improvement: improvement === truth };
  if (wanted === "gained") return right.improvement && !right.baseline;
  if (wanted === "lost") return right.baseline && !right.improvement;
  if (wanted === "both wrong") return !right.baseline && !right.improvement;
  const [arm, kind] = wanted.split(" ");
  return !wanted || right[arm] === (kind === "right");
}

function answer(arm, said, truth, confidence) {
  const right = said === truth;
  const text = `${right ? "✓" : "✗"} ${short(data.names[said])} ${percent(confidence)}`;
  const line = make("p", `${arm} ${right ? "right" : "wrong"}`, text);
  line.title = `${arm}: ${data.names[said]}`;
  line.prepend(make("span", "hidden", `${arm} ${right ? "right" : "wrong"}: `));
  return line;
}

function card([position, truth, baseline, improvement, sureBaseline, sureImprovement]) {
  const lines = Math.ceil(data.images.length / data.columns);
  const item = make("li", "", "");
  const picture = make("div", "thumbnail", "");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", `an image of ${data.names[truth]}`);
  const across = (100 * (position % data.columns)) / (data.columns - 1);
  const down = (100 * Math.floor(position / data.columns)) / Math.max(lines - 1, 1);
  picture.style.backgroundSize = `${100 * data.columns}% ${100 * lines}%`;
  picture.style.backgroundPosition = `${across}% ${down}%`;
  const name = make("p", "truth", short(data.names[truth]));
  name.title = data.names[truth];
  item.append(
    picture,
    name,
    answer("baseline", baseline, truth, sureBaseline),
    answer("improvement", improvement, truth, sureImprovement),
  );
  return item;
}

if (data.images.length) {
  const ofClass = byId("of-class");
  const ofAnswer = byId("of-answer");
  let shown = PER_PAGE;

  const show = () => {
    const found = data.images.filter(
      (image) => (!ofClass.value || image[1] === +ofClass.value) && answersAs(ofAnswer.value, image),
    );
    byId("cards").replaceChildren(...found.slice(0, shown).map(card));
    byId("n-images").textContent = `${found.length} of ${data.images.length} images`;
    byId("more").hidden = found.length <= shown;
  };
  const restart = () => {
    shown = PER_PAGE;
    show();
  };
  ofClass.addEventListener("change", restart);
  ofAnswer.addEventListener("change", restart);
  byId("more").addEventListener("click", () => {
    const next = shown;
    shown += PER_PAGE;
    show();
    byId("cards").children[next].tabIndex = -1;
    byId("cards").children[next].focus({ preventScroll: true });
  });
  table.addEventListener("click", ({ target }) => {
    const link = target.closest("[data-class]");
    if (!link) return;
    ofClass.value = link.dataset.class;
    ofAnswer.value = "";
    restart();
  });
  show();
}

// The confusion matrix: rows are truths, columns answers, both in the same order.

const K = data.names.length;
const AROUND = 5; // classes that the loupe shows on either side
const canvas = byId("matrix");
const loupe = byId("loupe");
const place = new Map(data.order.map((label, at) => [label, at]));
const counts = data.arms.map(({ cells }) => {
  const matrix = new Uint16Array(K * K);
  for (let i = 0; i < cells.length; i += 3) {
    matrix[place.get(cells[i]) * K + place.get(cells[i + 1])] = cells[i + 2];
  }
  return matrix;
});
const totals = counts.map((matrix) =>
  Uint32Array.from({ length: K }, (_, row) => matrix.subarray(row * K, (row + 1) * K).reduce((a, b) => a + b, 0)),
);
const at = { arm: +document.querySelector("[name=arm]:checked").value, row: 0, column: 0 };
const size = Math.max(4, Math.floor(800 / K)); // pixels a class
canvas.width = canvas.height = K * size;

const colours = () => {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`);
  return { right: of("blue"), wrong: of("orange"), frame: of("grey"), ink: of("ink"), page: of("page") };
};

const countAt = (row, column) => counts[at.arm][row * K + column];
const strength = (row, column) => 0.18 + 0.82 * (countAt(row, column) / totals[at.arm][row]) ** 0.6;

function fillCell(pen, palette, row, column, [x, y, side]) {
  if (!countAt(row, column)) return;
  pen.globalAlpha = strength(row, column);
  pen.fillStyle = row === column ? palette.right : palette.wrong;
  pen.fillRect(x, y, side, side);
  pen.globalAlpha = 1;
}

function drawMatrix(palette) {
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  for (let row = 0; row < K; row++) {
    for (let column = 0; column < K; column++) {
      fillCell(pen, palette, row, column, [column * size, row * size, size]);
    }
  }
  pen.strokeStyle = palette.frame;
  let start = 0;
  for (const [, length] of data.blocks) {
    pen.strokeRect(start * size, start * size, length * size, length * size);
    start += length;
  }
  pen.strokeStyle = palette.ink;
  pen.globalAlpha = 0.35;
  pen.strokeRect(-1, at.row * size, canvas.width + 2, size);
  pen.strokeRect(at.column * size, -1, size, canvas.height + 2);
  pen.globalAlpha = 1;
  pen.lineWidth = 2;
  pen.strokeRect(at.column * size - 2, at.row * size - 2, size + 4, size + 4);
  pen.lineWidth = 1;
}

function drawLoupe(palette) {
  const pen = loupe.getContext("2d");
  const side = loupe.width / (2 * AROUND + 1);
  pen.clearRect(0, 0, loupe.width, loupe.height);
  pen.font = "12px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (let down = -AROUND; down <= AROUND; down++) {
    for (let across = -AROUND; across <= AROUND; across++) {
      const [row, column] = [at.row + down, at.column + across];
      if (row < 0 || column < 0 || row >= K || column >= K) continue;
      const [x, y] = [(across + AROUND) * side, (down + AROUND) * side];
      if (!countAt(row, column)) continue;
      fillCell(pen, palette, row, column, [x, y, side - 1]);
      pen.fillStyle = strength(row, column) > 0.6 ? palette.page : palette.ink;
      pen.fillText(countAt(row, column), x + side / 2, y + side / 2);
    }
  }
  pen.strokeStyle = palette.ink;
  pen.lineWidth = 2;
  pen.strokeRect(AROUND * side, AROUND * side, side - 1, side - 1);
}

function readCell() {
  const [truth, said] = [data.names[data.order[at.row]], data.names[data.order[at.column]]];
  const lines = [
    ["truth", short(truth), truth],
    ["answer", short(said), said],
    ["images", `${countAt(at.row, at.column)} of ${totals[at.arm][at.row]}`, ""],
  ];
  byId("matrix-says").replaceChildren(
    ...lines.map(([label, text, title]) => {
      const line = make("p", "", text);
      line.title = title;
      line.prepend(make("span", "", `${label} `));
      return line;
    }),
  );
}

function moveTo(row, column) {
  at.row = Math.min(Math.max(row, 0), K - 1);
  at.column = Math.min(Math.max(column, 0), K - 1);
  const palette = colours();
  drawMatrix(palette);
  drawLoupe(palette);
  readCell();
}

function mostFrequentWrong(row) {
  let best = row;
  for (let column = 0; column < K; column++) {
    if (column !== row && countAt(row, column) > (best === row ? 0 : countAt(row, best))) best = column;
  }
  return best;
}

canvas.addEventListener("keydown", (event) => {
  const step = event.shiftKey ? 10 : 1;
  const moves = {
    ArrowUp: () => moveTo(at.row - step, at.column),
    ArrowDown: () => moveTo(at.row + step, at.column),
    ArrowLeft: () => moveTo(at.row, at.column - step),
    ArrowRight: () => moveTo(at.row, at.column + step),
    Home: () => moveTo(at.row, at.row),
    Enter: () => moveTo(at.row, mostFrequentWrong(at.row)),
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
});

for (const kind of ["pointermove", "pointerdown"]) {
  canvas.addEventListener(kind, ({ offsetX, offsetY }) => {
    const cell = canvas.clientWidth / K;
    moveTo(Math.floor(offsetY / cell), Math.floor(offsetX / cell));
  });
}

loupe.addEventListener("click", ({ offsetX, offsetY }) => {
  const cell = loupe.clientWidth / (2 * AROUND + 1);
  moveTo(at.row + Math.floor(offsetY / cell) - AROUND, at.column + Math.floor(offsetX / cell) - AROUND);
});

document.querySelector("fieldset").addEventListener("change", ({ target }) => {
  at.arm = +target.value;
  moveTo(at.row, at.column);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => moveTo(at.row, at.column));

const worst = [...counts[at.arm].keys()]
  .filter((cell) => Math.floor(cell / K) !== cell % K)
  .reduce((a, b) => (counts[at.arm][b] > counts[at.arm][a] ? b : a), 1);
moveTo(Math.floor(worst / K), worst % K);
