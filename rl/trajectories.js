"use strict";
// What a page knows of trajectories, without a document: reading the packed data, and the canvas at any step.

// The JSON value that rl/pages.py packed into the element `id`.
async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// Parts of the rollouts, inflated when asked for; a few stay, so that memory does not grow with what was looked at.
function partReader(kept) {
  const parts = new Map();
  return async function read(number) {
    const found = parts.get(number) || unpack(`part-${number}`);
    parts.delete(number);
    parts.set(number, found);
    if (parts.size > kept) parts.delete(parts.keys().next().value);
    return found;
  };
}

const GIVEN = 2, EDITED = 3;

// The cells of a rollout's canvas as the denoiser saw it at step `step` (at `nfe`: the final canvas), one a position:
// {token (-1: masked), born, logprob, state}. A state is masked, sampled, given, edited, doomed (stands, is taken back
// later), taken (masked since this step; `token` is what stood there) or absent.
function canvasAt(row, step) {
  const cells = row.tokens.map((token, position) => {
    const born = row.born[position], source = row.source[position];
    if (source === GIVEN) return { token, born: -1, logprob: null, state: "given" };
    if (born < 0 || born >= step) return { token: -1, born: null, logprob: null, state: "masked" };
    const edited = source === EDITED;
    return { token, born, logprob: edited ? null : row.logprob[position], state: edited ? "edited" : "sampled" };
  });
  for (const [position, token, born, died, logprob] of row.retracted || []) {
    if (born < step && step <= died) cells[position] = { token, born, logprob, state: "doomed" };
    else if (step === died + 1 && cells[position].state === "masked") cells[position] = { token, born, logprob, state: "taken" };
  }
  if (row.lengths) {
    const length = row.lengths[Math.min(step, row.lengths.length - 1)];
    let existing = 0;
    cells.forEach((cell, position) => {
      if (row.appeared[position] > step || ++existing > length) cell.state = "absent";
    });
  }
  return cells;
}

// The colour class of a cell: by the step that decided it, its probability, or its rollout's advantage.
function shade(cell, colour, steps, advantage, most) {
  if (!["sampled", "edited", "doomed"].includes(cell.state)) return "";
  if (colour === "step") return `q${Math.min(8, Math.floor((9 * Math.max(cell.born, 0)) / Math.max(steps, 1)))}`;
  if (colour === "confidence") return cell.logprob === null ? "" : `q${Math.min(8, Math.floor(9 * Math.exp(cell.logprob)))}`;
  if (advantage === null || most === 0) return "d4";
  return `d${Math.round(4 + 4 * Math.max(-1, Math.min(1, advantage / most)))}`;
}

// The groups of an index, in its order: consecutive rollouts of one run, step and group.
function groupsOf(index) {
  const groups = [];
  for (let row = 0; row < index.step.length; row++) {
    const last = groups[groups.length - 1];
    if (last && ["run", "step", "group"].every((name) => index[name][row] === index[name][last.rows[0]])) last.rows.push(row);
    else groups.push({ number: groups.length, rows: [row] });
  }
  return groups;
}

// The part that holds a rollout: `starts` are the first rollouts of the parts, ascending.
function partOf(starts, row) {
  let low = 0, high = starts.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}
