// Codes as text, in four forms, and back.

import { fromMap, latticePositions, mapValues } from "./policy.js";

const token = (letter, number, largest) => `<|${letter}:${String(number).padStart(String(largest).length, "0")}|>`;

/** Codes in raster order, as plain integers. */
export function asCodes({ codes }) {
  return codes.join(" ");
}

/** The tokens of `VisualVocab` in the tokenizer's layout: a map or positions first where the layout has them. */
export function asText({ codes, kept, grid, known }, facts) {
  const spelled = codes.map((code) => token("v", code, facts.codes - 1));
  let parts = facts.anyGrid ? [token("r", grid[0], 128), token("c", grid[1], 128)] : [];
  if (facts.places === "map" && known)
    parts = [...parts, ...mapValues(kept, grid).map((v) => token("m", v, 624)), ...spelled];
  else if (facts.places === "free" && known) {
    const largest = facts.anyGrid ? 128 * 128 - 1 : grid[0] * grid[1] - 1;
    parts = [...parts, ...spelled.flatMap((code, i) => [token("p", kept[i], largest), code])];
  } else parts = [...parts, ...spelled];
  return `<|image|>${parts.join("")}<|/image|>`;
}

/** What `dyntok.Encoding.from_dict` and `dyntok decode` read. */
export function asJson({ codes, kept, grid, known }, facts) {
  const positions = known ? [kept] : null;
  return JSON.stringify({ codes: [codes], positions, grids: [grid], fingerprint: facts.fingerprint });
}

/** A line that decodes in Python. */
export function asPython({ codes, kept, grid, known }, facts) {
  const positions = known ? `, positions=[[${kept.join(", ")}]]` : "";
  const load = `dyntok.load(${JSON.stringify(facts.name)})`;
  return `${load}.decode([[${codes.join(", ")}]]${positions}, grid=(${grid.join(", ")}))[0]`;
}

/** Reads any of these forms: {codes, kept or null, grid}. Throws an Error with a sentence for people. */
export function parse(text, facts) {
  const found = { codes: null, kept: null, grid: facts.grid };
  if (text.trim().startsWith("{")) readJson(text, found, facts);
  else if (text.includes("<|")) readTokens(text, found, facts);
  else readNumbers(text, found);
  check(found, facts);
  return found;
}

function readJson(text, found, facts) {
  let values;
  try {
    values = JSON.parse(text);
  } catch {
    throw new Error("This begins like JSON but is not complete.");
  }
  if (values.fingerprint && values.fingerprint !== facts.fingerprint)
    throw new Error(`These codes are of the tokenizer ${values.fingerprint}. This page has ${facts.fingerprint}.`);
  found.codes = values.codes?.[0];
  found.kept = values.positions?.[0] ?? null;
  found.grid = values.grids?.[0] ?? facts.grid;
}

function readTokens(text, found, facts) {
  const numbers = { v: [], p: [], m: [], r: [], c: [] };
  for (const [, letter, number] of text.matchAll(/<\|([vpmrc]):(\d+)\|>/g)) numbers[letter].push(Number(number));
  found.codes = numbers.v;
  if (numbers.r.length && numbers.c.length) found.grid = [numbers.r[0], numbers.c[0]];
  if (numbers.p.length) found.kept = numbers.p;
  else if (numbers.m.length) found.kept = fromMap(numbers.m, found.grid);
  else if (facts.places === "lattice" && numbers.v.length) found.kept = latticePositions(numbers.v.length, found.grid);
}

function readNumbers(text, found) {
  const list = (part) => (part?.match(/\d+/g) ?? []).map(Number);
  const lists = text.match(/\[[\d\s,]+\]/g);
  found.codes = list(lists ? lists[0] : text);
  if (lists && /positions\s*=/.test(text)) found.kept = list(lists[1]);
  const grid = text.match(/grid\s*=\s*\((\d+),\s*(\d+)\)/);
  if (grid) found.grid = [Number(grid[1]), Number(grid[2])];
}

function check({ codes, kept, grid }, facts) {
  const whole = (values) => Array.isArray(values) && values.every((v) => Number.isInteger(v) && v >= 0);
  if (!whole(codes) || !codes.length) throw new Error("No codes are in this text. Paste integers, tokens or JSON.");
  if (!whole(grid) || grid.length !== 2 || !grid[0] || !grid[1] || grid[0] * grid[1] > 4096)
    throw new Error("The grid must be two numbers with a product of at most 4,096.");
  if (!facts.anyGrid && grid.join() !== facts.grid.join())
    throw new Error(`The grid is ${grid.join(" x ")}. This tokenizer has ${facts.grid.join(" x ")}.`);
  const patches = grid[0] * grid[1];
  const wrong = codes.find((code) => code >= facts.codes);
  if (wrong !== undefined) throw new Error(`${wrong} is no code. Codes are 0 to ${facts.codes - 1}.`);
  if (codes.length > patches) throw new Error(`${codes.length} codes are too many for ${patches} patches.`);
  if (kept === null) return;
  const ordered = whole(kept) && kept.every((p, i) => p < patches && (i === 0 || p > kept[i - 1]));
  if (!ordered || kept.length !== codes.length)
    throw new Error(`Positions must be one for each code, in raster order, from 0 to ${patches - 1}.`);
}
