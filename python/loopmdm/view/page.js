"use strict";
// A state is a number of events applied: 0 is the canvas before the first step.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const lastState = data.events.length;
const size = data.board ? data.board[0] * data.board[1] : 0;
const mostLoops = data.events.flatMap((event) => event.loops).reduce((a, b) => Math.max(a, b), 1);
const numSteps = lastState ? data.events[lastState - 1].step + 1 : 1;
const deepest = Object.values(data.predictions).reduce((most, one) => Math.max(most, one.tokens.length), 0);
let sample = 0, state = lastState, loops = 0, chosen = 0, timer = null;

// ---- the run at a state

function cellsAt(sequence, until) {
  const end = until === lastState ? data.lengths[sequence] : Infinity;
  const cells = data.canvas[sequence].map((token, i) => ({ token, given: token !== data.mask, log: [], cut: i >= end }));
  data.events.slice(0, until).forEach((event, index) => {
    event.sequences.forEach((owner, i) => {
      if (owner !== sequence) return;
      const cell = cells[event.positions[i]];
      cell.token = event.tokens[i];
      cell.log.push({ step: event.step, token: event.tokens[i], prob: event.probs[i], loops: event.loops[i] });
      cell.fresh = index === until - 1;
    });
  });
  return cells;
}

// The predictions of one sequence: position to [{token, prob}] by loop, or null where none were recorded.
function guessesAt(sequence, until) {
  const found = data.predictions[until];
  if (!found) return null;
  let before = 0;
  for (let other = 0; other < sequence; other++) {
    before += cellsAt(other, until).filter((cell) => cell.token === data.mask).length;
  }
  const guesses = new Map();
  cellsAt(sequence, until).forEach((cell, position) => {
    if (cell.token !== data.mask) return;
    const row = before + guesses.size;
    guesses.set(position, found.tokens.map((tokens, k) => ({ token: tokens[row], prob: found.probs[k][row] })));
  });
  return guesses;
}

// ---- text of tokens

const bytesOf = (token) => (Array.isArray(data.symbols[token]) ? new Uint8Array(data.symbols[token]) : null);

function visible(text) {
  return text.replace(/[\x00-\x08\x0b-\x1f\x7f]/g, (c) => (c === "\x7f" ? "␡" : String.fromCharCode(0x2400 + c.charCodeAt(0))))
    .replace(/[\x80-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g, (c) => `⟨${c.charCodeAt(0).toString(16)}⟩`);
}

// One text per token. A character of several tokens stands at the last of them.
function texts(tokens) {
  const shown = [];
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const flush = () => {
    const rest = decoder.decode();
    if (shown.length) shown[shown.length - 1] += rest;
  };
  for (const token of tokens) {
    const bytes = bytesOf(token);
    if (bytes) {
      shown.push(decoder.decode(bytes, { stream: true }));
      continue;
    }
    flush();
    shown.push(token === data.mask ? "·" : data.symbols[token]);
  }
  flush();
  return shown;
}

function describe(token) {
  if (token === data.mask) return "mask";
  const text = texts([token])[0];
  const names = { " ": "space", "\n": "newline", "\t": "tab", "": "(empty)" };
  if (text in names) return names[text];
  if (bytesOf(token) && text.includes("\ufffd")) {
    return `bytes ${[...bytesOf(token)].map((b) => b.toString(16).padStart(2, "0")).join(" ")}`;
  }
  return visible(text).replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣");
}

// ---- colour

const mix = (a, b, f) => a.map((v, i) => Math.round(v + (b[i] - v) * f));
// Orange to blue for sureness, dark blue to yellow for amounts: both keep their order for colour-blind eyes.
const RAMPS = {
  confidence: [[213, 94, 0], [230, 159, 0], [160, 190, 200], [86, 180, 233], [0, 114, 178]],
  step: [[0, 34, 120], [90, 95, 120], [150, 145, 110], [255, 220, 60]],
  loops: [[0, 34, 120], [90, 95, 120], [150, 145, 110], [255, 220, 60]],
};

function rampColor(mode, share) {
  const stops = RAMPS[mode];
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  return `rgb(${mix(stops[low], stops[low + 1], place - low).join(" ")} / var(--tint))`;
}

function share(mode, entry) {
  if (mode === "confidence") return entry.prob;
  if (mode === "step") return numSteps > 1 ? entry.step / (numSteps - 1) : 1;
  return mostLoops > 1 ? (entry.loops - 1) / (mostLoops - 1) : 1;
}

function drawLegend() {
  const mode = at("color").value;
  at("legend").style.display = mode === "none" ? "none" : "";
  if (mode === "none") return;
  const stops = Array.from({ length: 11 }, (_, i) => rampColor(mode, i / 10));
  at("ramp").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const ends = { confidence: ["0", "1"], step: ["1", numSteps], loops: ["1", mostLoops] }[mode];
  [at("low").textContent, at("high").textContent] = ends;
}

// ---- boards

function clashes(tokens) {
  const [rows, cols] = data.board;
  const units = new Map();
  tokens.forEach((token, i) => {
    if (token === data.mask) return;
    const r = Math.floor(i / size), c = i % size;
    const box = Math.floor(r / rows) * rows + Math.floor(c / cols);
    for (const unit of [`r${r}`, `c${c}`, `b${box}`]) {
      const key = `${unit} ${token}`;
      units.set(key, [...(units.get(key) || []), i]);
    }
  });
  return new Set([...units.values()].filter((cells) => cells.length > 1).flat());
}

// What is to be said of a board: how much is open, else whether every row, column and box has each digit once.
function verdict(tokens, given) {
  const open = tokens.filter((token) => token === data.mask).length, wrong = clashes(tokens);
  const cells = (count) => `${count} ${count === 1 ? "cell" : "cells"}`;
  const clash = wrong.size ? `${cells(wrong.size)} clash: a digit twice in a row, column or box` : "";
  if (open) return `${cells(open)} open${clash ? `; ${clash}` : ""}`;
  return clash ? `wrong: ${clash}` : given.some((one) => one) ? "solved" : "a valid board";
}

// ---- text

// Where a token stands in the text: line and column of its first character, from 1.
function placeIn(pieces, position) {
  const before = pieces.slice(0, position).join(data.separator) + (position ? data.separator : "");
  const lines = before.split("\n");
  return `line ${lines.length}, column ${[...lines[lines.length - 1]].length + 1}`;
}

// ---- drawing

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function fill(node, text) {
  if (data.board) {
    node.textContent = text;
    return;
  }
  const shown = visible(text);
  node.replaceChildren();
  for (const part of shown.split(/(\n|\t)/)) {
    if (part === "\n" || part === "\t") {
      node.append(element("span", part === "\n" ? "↵" : "⇥", "sign"));
    }
    node.append(part);
  }
}

function drawMarks() {
  const marks = [
    ["given", "a", "given"], ["masked", "·", "masked"], ["fresh", "a", "framed: changed by the step shown"],
    ["chosen", "a", "framed in pink: the one in the panel"], ["unsure", "a", "underlined: probability below 0.5"],
  ];
  if (deepest) marks.push(["guess", "a", "dashed: a prediction, not yet written"]);
  if (data.board) marks.push(["clash", "a", "struck through: twice in its row, column or box"]);
  else marks.push(["part", " ", "grey: a part of the character that follows"]);
  at("marks").replaceChildren(...marks.map(([name, sign, text]) => {
    const mark = element("span");
    mark.append(element("span", data.board && sign === "a" ? "5" : sign, `token ${name}`), text);
    return mark;
  }));
}

function build() {
  const tokens = data.canvas[sample].map((_, position) => {
    const node = element("span", "", "token");
    node.dataset.position = position;
    return node;
  });
  at("tokens").className = data.board ? "board" : "";
  at("tokens").style.setProperty("--size", size);
  at("tokens").replaceChildren();
  tokens.forEach((node, i) => {
    if (i && data.separator) at("tokens").append(data.separator);
    at("tokens").append(node);
  });
}

function draw() {
  const cells = cellsAt(sample, state), guesses = guessesAt(sample, state);
  const mode = at("color").value;
  const shown = cells.map((cell, i) => {
    const guess = loops && guesses && guesses.get(i);
    return guess ? { ...guess[Math.min(loops, guess.length) - 1], guess: true } : { token: cell.token };
  });
  const text = texts(shown.map((one) => one.token));
  const wrong = data.board ? clashes(shown.map((one) => one.token)) : new Set();
  [...at("tokens").querySelectorAll(".token")].forEach((node, i) => {
    const cell = cells[i], held = shown[i], masked = held.token === data.mask;
    const last = cell.log[cell.log.length - 1];
    const prob = held.guess ? held.prob : !masked && last ? last.prob : null;
    const classes = {
      given: cell.given, masked, guess: held.guess, fresh: cell.fresh, unsure: prob !== null && prob < 0.5,
      part: text[i] === "", cut: cell.cut, chosen: i === chosen, clash: wrong.has(i),
    };
    if (data.board) {
      const [rows, cols] = data.board, r = Math.floor(i / size), c = i % size;
      classes["box-right"] = (c + 1) % cols === 0;
      classes["box-bottom"] = (r + 1) % rows === 0;
      classes["last-column"] = c === size - 1;
      classes["last-row"] = r === size - 1;
    }
    node.className = ["token", ...Object.keys(classes).filter((name) => classes[name])].join(" ");
    node.tabIndex = i === chosen ? 0 : -1;
    fill(node, text[i]);
    let color = "";
    if (held.guess && mode === "confidence") color = rampColor(mode, held.prob);
    else if (!held.guess && !masked && last && mode !== "none") color = rampColor(mode, share(mode, last));
    node.style.background = color;
    node.setAttribute("aria-label", `position ${i}: ${describe(held.token)}${prob === null ? "" : `, ${prob}`}`);
  });
  at("verdict").textContent = data.board ? verdict(shown.map((one) => one.token), cells.map((cell) => cell.given)) : "";
  const left = cells.filter((cell) => cell.token === data.mask && !cell.cut).length;
  at("step").value = state;
  const event = state ? data.events[state - 1] : null;
  at("step-text").textContent = `${event ? `after step ${event.step + 1}` : "before step 1"} of ${numSteps}, ${left} masked`;
  at("loops").value = loops;
  at("loops").disabled = !guesses;
  at("loops-text").textContent = !guesses
    ? left ? "none here: ticks mark the steps that have them" : "nothing left to predict"
    : loops ? `of the next step, after ${loops} ${loops === 1 ? "loop" : "loops"}` : "off";
  details(cells, guesses);
}

const short = (text) => (text.length > 24 ? `${text.slice(0, 23)}…` : text);

function row(list, name, value) {
  list.append(element("dt", name), element("dd", value));
}

function details(cells, guesses) {
  const panel = at("details"), cell = cells[chosen];
  const list = element("dl"), last = cell.log[cell.log.length - 1];
  const masked = cell.token === data.mask;
  row(list, "position", data.board ? `row ${Math.floor(chosen / size) + 1}, column ${(chosen % size) + 1}` : `${chosen} of 0 to ${cells.length - 1}`);
  if (!data.board) row(list, "in the text", placeIn(texts(cells.map((one) => one.token)), chosen));
  row(list, "token id", cell.token);
  if (cell.given) row(list, "state", "given");
  else if (cell.cut) row(list, "state", "behind the end of the sequence");
  else if (masked) row(list, "state", last ? `masked again at step ${last.step + 1}` : "masked");
  else {
    row(list, "probability", last.prob.toFixed(3));
    row(list, "revealed", `step ${last.step + 1}`);
    row(list, "loops spent", last.loops);
  }
  panel.replaceChildren(element("h2", describe(cell.token)), list);
  if (cell.log.length > 1) {
    panel.append(element("h3", "History"));
    cell.log.forEach((one) => {
      const what = one.token === data.mask ? "masked again" : `${short(describe(one.token))}, ${one.prob.toFixed(3)}`;
      panel.append(element("p", `step ${one.step + 1}: ${what}`));
    });
  }
  const guess = guesses && guesses.get(chosen);
  if (!guess) return;
  panel.append(element("h3", "Prediction after each loop"));
  const table = element("table"), head = element("tr");
  ["loops", "token", "probability", ""].forEach((name) => head.append(element("th", name)));
  table.append(head);
  guess.forEach((one, k) => {
    const line = element("tr", undefined, k + 1 === loops ? "now" : "");
    const bar = element("span", "", "bar"), cellOfBar = element("td");
    bar.style.width = `${(3 * one.prob).toFixed(2)}rem`;
    cellOfBar.append(bar);
    line.append(element("td", k + 1), element("td", short(describe(one.token))), element("td", one.prob.toFixed(3)), cellOfBar);
    table.append(line);
  });
  panel.append(table);
}

// ---- controls

function setState(value) {
  state = Math.min(Math.max(value, 0), lastState);
  draw();
}

function setLoops(value) {
  loops = Math.min(Math.max(value, 0), deepest);
  draw();
}

function pause() {
  clearInterval(timer);
  timer = null;
  at("play").textContent = "▶ play";
}

function toggle() {
  if (timer !== null) return pause();
  if (state === lastState) setState(0);
  at("play").textContent = "❚❚ pause";
  timer = setInterval(() => {
    if (state >= lastState) return pause();
    setState(state + 1);
  }, Math.min(Math.max(12000 / (lastState || 1), 40), 600));
}

function choose(position, focus) {
  chosen = Math.min(Math.max(position, 0), data.canvas[sample].length - 1);
  draw();
  if (focus) at("tokens").querySelectorAll(".token")[chosen].focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target, onToken = target.classList && target.classList.contains("token");
  if (target.tagName === "SELECT" || (target.tagName === "INPUT" && event.key.startsWith("Arrow"))) return;
  if (target.tagName === "BUTTON" && event.key === " ") return;
  const moves = onToken
    ? { ArrowLeft: () => choose(chosen - 1, true), ArrowRight: () => choose(chosen + 1, true),
        ArrowUp: () => choose(data.board ? chosen - size : chosen - 1, true),
        ArrowDown: () => choose(data.board ? chosen + size : chosen + 1, true), Escape: () => target.blur() }
    : { ArrowLeft: () => setState(state - 1), ArrowRight: () => setState(state + 1),
        ArrowUp: () => setLoops(loops + 1), ArrowDown: () => setLoops(loops - 1) };
  const common = { " ": toggle, Home: () => setState(0), End: () => setState(lastState) };
  const act = moves[event.key] || common[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});
at("play").addEventListener("click", toggle);
at("step").addEventListener("input", (event) => { pause(); setState(Number(event.target.value)); });
at("loops").addEventListener("input", (event) => setLoops(Number(event.target.value)));
at("color").addEventListener("change", () => { drawLegend(); draw(); });
at("sample").addEventListener("change", (event) => {
  sample = Number(event.target.value);
  build();
  choose(chosen);
});
for (const kind of ["mouseover", "click", "focusin"]) {
  at("tokens").addEventListener(kind, (event) => {
    const node = event.target.closest(".token");
    if (node && Number(node.dataset.position) !== chosen) choose(Number(node.dataset.position), kind === "click");
  });
}

at("step").max = lastState;
at("loops").max = deepest;
// Ticks at the steps that have predictions.
Object.keys(data.predictions).forEach((value) => at("ticks").append(new Option("", value)));
at("loops-control").style.display = deepest ? "" : "none";
data.titles.forEach((title, i) => at("sample").append(new Option(title, i)));
data.facts.forEach(([name, value]) => {
  const fact = element("div");
  fact.append(element("dt", name), element("dd", value));
  at("facts").append(fact);
});
drawLegend();
drawMarks();
build();
choose(Math.max(0, data.canvas[0].indexOf(data.mask)));
