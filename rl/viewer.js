"use strict";
// The page of `unmask view`. Text of a model or a task enters the document through textContent alone.

const PAGE = 100;
const COLOURS = ["step", "confidence", "advantage"];
const at = (id) => document.getElementById(id);
const read = partReader(8);
const shown = { index: null, groups: [], list: [], group: null, cards: [], step: 0, steps: 0, timer: null, page: 0, wanted: 0, opened: 0 };

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function amount(value, digits = 3) {
  return value === null || value === undefined ? "-" : String(Number(value.toPrecision(digits)));
}

// ---- filters ------------------------------------------------------------------------------------------------------

function bound(id, otherwise) {
  return at(id).value === "" ? otherwise : Number(at(id).value);
}

function wantedOutcomes() {
  return new Set([...at("outcomes").querySelectorAll("input:checked")].map((box) => Number(box.value)));
}

// The rollouts whose prompt or completion holds `words`, or null without words; every part is read once.
async function found(words) {
  if (words === "") return null;
  const index = shown.index, rows = new Set();
  for (let number = 0; number < index.starts.length; number++) {
    const part = await read(number);
    const prompts = Object.entries(part.prompts).filter(([, text]) => text.toLowerCase().includes(words)).map(([id]) => Number(id));
    const holding = new Set(prompts);
    part.rows.forEach((row, offset) => {
      const place = index.starts[number] + offset;
      if (holding.has(index.prompt[place]) || row.completion.toLowerCase().includes(words)) rows.add(place);
    });
  }
  return rows;
}

async function filter() {
  const turn = ++shown.wanted;
  const index = shown.index, outcomes = wantedOutcomes();
  const holding = await found(at("search").value.toLowerCase());
  if (turn !== shown.wanted) return; // another filter was set while this one was searching
  const least = bound("least", -Infinity), most = bound("most", Infinity), bounded = at("least").value + at("most").value !== "";
  const from = bound("from", -Infinity), to = bound("to", Infinity);
  shown.matches = (row) =>
    outcomes.has(index.outcome[row]) &&
    (index.reward[row] === null ? !bounded : index.reward[row] >= least && index.reward[row] <= most) &&
    index.step[row] >= from && index.step[row] <= to && (holding === null || holding.has(row));
  shown.list = shown.groups.filter((group) => group.rows.some(shown.matches));
  const rows = shown.list.reduce((sum, group) => sum + group.rows.filter(shown.matches).length, 0);
  at("count").textContent = `${rows} rollouts in ${shown.list.length} groups`;
  shown.page = 0;
  if (shown.list.includes(shown.group)) shown.page = Math.floor(shown.list.indexOf(shown.group) / PAGE);
  listGroups();
  if (shown.list.length && !shown.list.includes(shown.group)) await open(shown.list[0]);
  else if (shown.group) for (const card of shown.cards) card.element.classList.toggle("out", !shown.matches(card.number));
}

function name(group) {
  const index = shown.index, row = group.rows[0];
  const run = index.runs.length > 1 ? `${index.runs[index.run[row]]}, ` : "";
  return `${run}step ${index.step[row]}, group ${index.group[row]}`;
}

function listGroups() {
  const pages = Math.max(1, Math.ceil(shown.list.length / PAGE));
  at("page").textContent = `page ${shown.page + 1} of ${pages}`;
  at("earlier").disabled = shown.page === 0;
  at("later").disabled = shown.page + 1 >= pages;
  at("list").replaceChildren(...shown.list.slice(shown.page * PAGE, (shown.page + 1) * PAGE).map((group) => {
    const button = make("button", "", name(group));
    button.type = "button";
    button.setAttribute("aria-current", String(group === shown.group));
    const dots = button.appendChild(make("span", "dots"));
    for (const row of group.rows) dots.append(make("i", shown.index.outcomes[shown.index.outcome[row]] + (shown.matches(row) ? "" : " out")));
    button.addEventListener("click", () => open(group));
    const item = make("li");
    item.append(button);
    return item;
  }));
}

// ---- a group ------------------------------------------------------------------------------------------------------

function others(group) {
  const index = shown.index, prompt = index.prompt[group.rows[0]];
  return shown.groups.filter((other) => other !== group && index.prompt[other.rows[0]] === prompt);
}

async function open(group, beside) {
  const index = shown.index, turn = ++shown.opened;
  const part = await read(partOf(index.starts, group.rows[0]));
  if (turn !== shown.opened) return; // another group was asked for while this one was read
  shown.group = group;
  at("where").textContent = name(group);
  at("prompt").textContent = part.prompts[index.prompt[group.rows[0]]];
  const choices = others(group);
  // Of several runs the other one is shown at once: that is what it was given for.
  if (beside === undefined) beside = choices.find((other) => index.run[other.rows[0]] !== index.run[group.rows[0]]) || null;
  at("beside").replaceChildren(make("option", "", choices.length ? "nothing" : "no other group has this prompt"), ...choices.map((other) => {
    const option = make("option", "", name(other));
    option.value = other.number;
    option.selected = other === beside;
    return option;
  }));
  at("beside").options[0].value = "";
  at("beside").disabled = choices.length === 0;
  const sections = [];
  shown.cards = [];
  for (const each of beside ? [group, beside] : [group]) {
    const section = make("section");
    if (beside) section.append(make("h2", "", name(each)));
    const cards = section.appendChild(make("div", "cards"));
    const rows = await rowsOf(each);
    if (turn !== shown.opened) return;
    rows.forEach((row, offset) => {
      const card = cardOf(each.rows[offset], row);
      shown.cards.push(card);
      cards.append(card.element);
    });
    sections.push(section);
  }
  const largest = Math.max(0, ...shown.cards.map((card) => Math.abs(index.advantage[card.number] || 0)));
  for (const card of shown.cards) card.most = largest;
  at("groups").replaceChildren(...sections);
  shown.steps = Math.max(...shown.cards.map((card) => card.row.nfe));
  at("step").max = shown.steps;
  draw(shown.timer === null ? shown.steps : 0);
  for (const button of at("list").querySelectorAll("button")) button.setAttribute("aria-current", String(button.firstChild.textContent === name(group)));
}

async function rowsOf(group) {
  const starts = shown.index.starts, number = partOf(starts, group.rows[0]);
  const part = await read(number);
  return group.rows.map((row) => ({ ...part.rows[row - starts[number]], nfe: shown.index.nfe[row] }));
}

function cardOf(number, row) {
  const index = shown.index, outcome = index.outcomes[index.outcome[number]];
  const element = make("article", shown.matches(number) ? "card" : "card out");
  const head = element.appendChild(make("h3"));
  head.append(make("span", `badge ${outcome}`, outcome), make("span", "", `reward ${amount(index.reward[number])}`));
  head.append(make("span", "", `advantage ${amount(index.advantage[number])}`), make("span", "soft", `${row.nfe} calls`));
  const details = Object.entries(row.rewards).map(([label, value]) => `${label} ${amount(value)}`);
  details.push(...Object.entries(row.extra).map(([label, value]) => `${label}: ${value}`));
  if (details.length > 1) head.append(make("span", "soft", details.join(" · ")));
  const canvas = element.appendChild(make("div", "canvas mono"));
  const spans = row.tokens.map(() => canvas.appendChild(make("span")));
  spans.forEach((span, position) => { span.dataset.position = position; });
  if (row.tail) canvas.append(make("span", "mask", ` ·×${row.tail}`));
  const card = { element, row, number, spans, cells: [], painted: spans.map(() => ""), most: 0 };
  canvas.addEventListener("pointerover", (event) => tell(card, event.target));
  canvas.addEventListener("click", (event) => tell(card, event.target));
  return card;
}

// Spaces of a token are seen as they lie in the text, line ends with a sign; a mask is one dot.
function draw(step) {
  shown.step = Math.max(0, Math.min(step, shown.steps));
  at("step").value = shown.step;
  at("at").textContent = `${shown.step} / ${shown.steps}`;
  const colour = at("colour").value, index = shown.index;
  for (const card of shown.cards) {
    const now = Math.min(shown.step, card.row.nfe);
    card.cells = canvasAt(card.row, now);
    card.cells.forEach((cell, position) => {
      const special = cell.token >= 0 && index.special.includes(cell.token);
      const fresh = cell.born !== null && cell.born === now - 1 && cell.state !== "taken" ? " fresh" : "";
      const state = cell.state === "masked" ? "mask" : cell.state;
      const tint = shade(cell, colour, card.row.nfe, index.advantage[card.number], card.most);
      const classes = `${state}${special ? " special" : ""}${fresh} ${tint}`;
      const key = `${cell.token} ${classes}`;
      if (card.painted[position] === key) return;
      card.painted[position] = key;
      card.spans[position].className = classes;
      card.spans[position].textContent = cell.token < 0 ? "·" : index.pieces[cell.token].replaceAll("\n", "⏎\n");
    });
  }
}

function tell(card, span) {
  const cell = card.cells[span.dataset.position];
  if (!cell) return;
  const words = { masked: "masked", given: "given, not decided by the model", edited: "written by a rule", doomed: "taken back later", taken: "taken back by the last step", sampled: "sampled", absent: "" };
  const piece = cell.token < 0 ? "" : `${JSON.stringify(shown.index.pieces[cell.token])} · `;
  const born = cell.born === null || cell.born < 0 ? "" : ` · decided at step ${cell.born}`;
  const sure = cell.logprob === null ? "" : ` · probability ${amount(Math.exp(cell.logprob))}`;
  at("told").textContent = `${piece}position ${span.dataset.position} · ${words[cell.state]}${born}${sure}`;
}

function legend() {
  const colour = at("colour").value, letter = colour === "advantage" ? "d" : "q";
  const ends = { step: ["first", "last"], confidence: ["p 0", "p 1"], advantage: ["-", "+"] }[colour];
  const steps = [...Array(9).keys()].map((number) => make("i", `${letter}${number}`));
  at("legend").replaceChildren(make("span", "", ends[0]), ...steps, make("span", "", ends[1]));
}

// ---- playing and keys -----------------------------------------------------------------------------------------------

function pause() {
  clearInterval(shown.timer);
  shown.timer = null;
  at("play").textContent = "play";
}

function play() {
  if (shown.step >= shown.steps) draw(0);
  at("play").textContent = "pause";
  shown.timer = setInterval(() => {
    draw(shown.step + 1);
    if (shown.step >= shown.steps) pause();
  }, 1000 / Number(at("speed").value));
}

function toggle() {
  if (shown.timer === null) play();
  else pause();
}

function scrub(step) {
  pause();
  draw(step);
}

async function move(by) {
  const place = shown.list.indexOf(shown.group) + by;
  if (place < 0 || place >= shown.list.length) return;
  await open(shown.list[place]);
  if (Math.floor(place / PAGE) !== shown.page) turn(Math.floor(place / PAGE) - shown.page);
}

function turn(by) {
  shown.page += by;
  listGroups();
}

function recolour() {
  legend();
  draw(shown.step);
}

function nextColour() {
  at("colour").value = COLOURS[(COLOURS.indexOf(at("colour").value) + 1) % COLOURS.length];
  recolour();
}

function nextBeside() {
  const select = at("beside");
  select.selectedIndex = (select.selectedIndex + 1) % select.length;
  return chooseBeside();
}

function chooseBeside() {
  const value = at("beside").value;
  return open(shown.group, value === "" ? null : shown.groups[Number(value)]);
}

const KEYS = {
  " ": toggle, ArrowLeft: () => scrub(shown.step - 1), ArrowRight: () => scrub(shown.step + 1), Home: () => scrub(0),
  End: () => scrub(shown.steps), j: () => move(1), k: () => move(-1), c: nextColour, b: nextBeside,
  "/": () => { at("filters").open = true; at("search").focus(); },
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=range]):not([type=checkbox]), select");
  if (event.key === "Escape") event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});

function listen() {
  at("play").addEventListener("click", toggle);
  at("previous").addEventListener("click", () => move(-1));
  at("next").addEventListener("click", () => move(1));
  at("step").addEventListener("input", () => scrub(Number(at("step").value)));
  at("speed").addEventListener("change", () => { if (shown.timer !== null) { pause(); play(); } });
  at("colour").addEventListener("change", recolour);
  at("beside").addEventListener("change", chooseBeside);
  at("earlier").addEventListener("click", () => turn(-1));
  at("later").addEventListener("click", () => turn(1));
  for (const id of ["search", "least", "most", "from", "to", "outcomes"]) at(id).addEventListener("input", filter);
  at("reset").addEventListener("click", () => {
    for (const id of ["search", "least", "most", "from", "to"]) at(id).value = "";
    for (const box of at("outcomes").querySelectorAll("input")) box.checked = true;
    filter();
  });
}

async function start() {
  const index = shown.index = await unpack("index");
  shown.groups = groupsOf(index);
  at("title").textContent = index.title;
  at("note").textContent = index.note;
  at("outcomes").replaceChildren(...index.outcomes.map((outcome, number) => {
    const label = make("label"), box = make("input");
    box.type = "checkbox";
    box.checked = true;
    box.value = number;
    const count = index.outcome.filter((code) => code === number).length;
    label.append(box, make("span", outcome, `${outcome} ${count}`));
    return label;
  }));
  at("filters").open = matchMedia("(min-width: 44.01rem)").matches;
  listen();
  legend();
  await filter();
  document.body.dataset.ready = "yes";
  performance.mark("ready");
}

start();
