// The page: what happens when. Drawing is in `view.js`, computing in `model.js`.

import { sameSize } from "./compare.js";
import { Model } from "./model.js";
import { readPhoto, toCanvas } from "./photo.js";
import { guessedPositions, keptPatches, placeBytes } from "./policy.js";
import { asCodes, asJson, asPython, asText, parse } from "./text.js";
import { $, drawLength, drawPictures, drawStrip, highlight, placeOf, showFile, showMessage } from "./view.js";

const EXAMPLES = {
  astronaut: "An astronaut in an orange suit",
  cat: "The face of a cat",
  coffee: "A cup of coffee on a wooden table",
  rocket: "A rocket at its launch by night",
  camera: "A man with a camera on a tripod, in black and white",
  hubble: "Galaxies in the Hubble deep field",
};
const COPIES = { codes: asCodes, text: asText, json: asJson, python: asPython };

const state = { photo: null, file: null, codes: [], original: [], kept: [], grid: [1, 1], known: true, selected: null };
let facts;
let model;
let maxPatches;
let work = Promise.resolve();
let comparing;
let asked = false; // whether the visitor has opened something

/** Runs tasks one after another; onnxruntime takes one at a time. Errors become the message. */
function queue(task) {
  work = work.then(async () => {
    document.body.classList.add("busy");
    try {
      await task();
    } catch (error) {
      showMessage(error.message);
    }
    document.body.classList.remove("busy");
  });
  return work;
}

export function openFile(file) {
  return open(() => file);
}

function open(find) {
  asked = true;
  return queue(async () => {
    const file = await find();
    const photo = await readPhoto(file, facts, maxPatches);
    Object.assign(photo, await model.score(photo));
    showMessage(null);
    const learned = keptPatches(photo.scores, photo.grid, facts.places).length;
    Object.assign(state, { photo, file, grid: photo.grid, known: true, learned });
    await encode(null);
  });
}

async function encode(count) {
  const { photo, grid } = state;
  const kept = keptPatches(photo.scores, grid, facts.places, count);
  const codes = await model.codes(photo.features, kept, grid);
  Object.assign(state, { kept, codes, original: [...codes] });
  await paint();
}

async function paint() {
  state.result = await model.picture(state.codes, state.kept, state.grid, state.known);
  drawPictures(state, facts.patch);
  drawStrip(state);
  drawLength(state);
  select(null);
  showTimes();
  clearTimeout(comparing);
  comparing = setTimeout(compare, 200);
}

function showTimes() {
  const names = { score: "choice", codes: "codes", picture: "picture" };
  const times = Object.entries(model.milliseconds).map(([name, time]) => `${names[name]} ${time.toFixed(0)} ms`);
  $("status").textContent = [model.backend, ...times].join(" · ");
}

async function compare() {
  const bits = state.codes.length * (32 - Math.clz32(facts.codes - 1));
  const bytes = Math.ceil(bits / 8);
  const places = state.known ? placeBytes(facts.places, state.grid) : 0;
  const plus = places ? ` and ${places} bytes of places` : "";
  $("bytes").textContent = `${state.codes.length} codes of ${bits / state.codes.length} bits: ${bytes} bytes${plus}.`;
  $("codes-note").textContent = `${bytes + places} bytes`;
  const size = state.grid.map((side) => side * facts.patch);
  const source = toCanvas(state.photo?.rgb ?? state.result, size);
  for (const name of ["webp", "jpeg"]) showFile(name, await sameSize(source, `image/${name}`, bytes + places));
}

/** Takes the newest wish of the slider when the earlier ones are done. */
let wish = null;
export function setLength(count) {
  const waiting = wish !== null;
  wish = count;
  $("count").value = count;
  if (waiting) return work;
  return queue(async () => {
    const newest = wish;
    wish = null;
    if (state.photo) await encode(newest);
  });
}

export function exchange(index, code) {
  const { codes } = state;
  return queue(async () => {
    if (state.codes !== codes) return; // others came while this one waited
    if (!(Number.isInteger(code) && code >= 0 && code < facts.codes))
      throw new Error(`${code} is no code. Codes are 0 to ${facts.codes - 1}.`);
    showMessage(null);
    state.codes[index] = code;
    await paint();
    select(index);
  });
}

export function paste(text) {
  asked = true;
  return queue(async () => {
    const { codes, kept, grid } = parse(text, facts);
    showMessage(null);
    const known = kept !== null;
    const places = kept ?? guessedPositions(codes.length, grid, facts.dithered);
    const others = { photo: null, file: null, original: [...codes] };
    Object.assign(state, { codes, kept: places, grid, known, ...others });
    mark(null);
    await paint();
  });
}

function select(index) {
  state.selected = index;
  $("editor").hidden = index === null;
  highlight(state, index);
  if (index === null) return;
  $("editor-place").textContent = `Code at ${placeOf(state.kept[index], state.grid)}`;
  $("code").max = facts.codes - 1;
  $("code").value = state.codes[index];
}

function mark(chosen) {
  for (const button of $("examples").children) button.setAttribute("aria-pressed", button === chosen);
}

function openExample(name, button) {
  mark(button);
  return open(async () => {
    const blob = await (await fetch(`photos/${name}.jpg`)).blob();
    return new File([blob], `${name}.jpg`, { type: blob.type });
  });
}

function makeExamples() {
  for (const [name, text] of Object.entries(EXAMPLES)) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = text;
    button.append(Object.assign(new Image(), { src: `photos/${name}.jpg`, alt: text }));
    button.addEventListener("click", () => openExample(name, button));
    $("examples").append(button);
  }
}

function listenToFiles() {
  const chosen = (file) => {
    if (!file) return;
    mark(null);
    openFile(file);
  };
  $("file").addEventListener("change", ({ target }) => {
    chosen(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => ($("drop").hidden = event.relatedTarget === null));
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").hidden = true;
    chosen(event.dataTransfer.files[0]);
  });
}

function listenToStrip() {
  const strip = $("strip");
  const indexOf = (target) => [...strip.children].indexOf(target.closest("button"));
  const leave = () => highlight(state, state.selected);
  for (const kind of ["pointerover", "focusin"])
    strip.addEventListener(kind, ({ target }) => indexOf(target) >= 0 && highlight(state, indexOf(target)));
  for (const kind of ["pointerleave", "focusout"]) strip.addEventListener(kind, leave);
  strip.addEventListener("click", ({ target }) => indexOf(target) >= 0 && select(indexOf(target)));
  strip.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: perLine(strip), ArrowUp: -perLine(strip) };
    const next = strip.children[indexOf(event.target) + (steps[event.key] ?? NaN)];
    if (!next) return;
    event.preventDefault();
    for (const button of strip.children) button.tabIndex = button === next ? 0 : -1;
    next.focus();
  });
  for (const id of ["photo", "patches", "result"]) listenToPicture($(id), leave);
}

function perLine(strip) {
  const top = strip.children[0].offsetTop;
  return [...strip.children].filter((button) => button.offsetTop === top).length;
}

function listenToPicture(canvas, leave) {
  const codeAt = (event) => {
    const area = canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - area.top) / area.height) * state.grid[0]);
    const column = Math.floor(((event.clientX - area.left) / area.width) * state.grid[1]);
    const index = state.kept.indexOf(row * state.grid[1] + column);
    return index < 0 ? null : index;
  };
  canvas.addEventListener("pointermove", (event) => highlight(state, codeAt(event) ?? state.selected));
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("click", (event) => select(codeAt(event)));
}

function listenToForms() {
  $("length").addEventListener("input", ({ target }) => setLength(Number(target.value)));
  $("learned").addEventListener("click", () => setLength(state.learned));
  $("editor").addEventListener("submit", (event) => {
    event.preventDefault();
    exchange(state.selected, $("code").valueAsNumber);
  });
  $("random").addEventListener("click", () => exchange(state.selected, Math.floor(Math.random() * facts.codes)));
  $("restore").addEventListener("click", () => exchange(state.selected, state.original[state.selected]));
  $("paste").addEventListener("submit", (event) => {
    event.preventDefault();
    paste($("pasted").value);
  });
  for (const button of document.querySelectorAll("[data-copy]"))
    button.addEventListener("click", () => copy(button.dataset.copy));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawPictures(state, facts.patch));
}

async function copy(kind) {
  const text = COPIES[kind](state, facts);
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = `${text.length.toLocaleString("en")} characters copied`;
  } catch {
    $("pasted").value = text; // without permission for the clipboard
    $("pasted").select();
    $("copied").textContent = "Your browser did not allow it; the text is in the field below";
  }
}

function makeMaxPatches() {
  maxPatches = facts.maxPatches;
  if (!facts.anyGrid || facts.size) return;
  const numbers = [64, 128, 256, 512, 1024].filter((n) => n <= 4 * facts.maxPatches);
  const choices = [...new Set([...numbers, facts.maxPatches])].sort((a, b) => a - b);
  $("max-patches").append(...choices.map((n) => new Option(n, n, false, n === facts.maxPatches)));
  $("patches-control").hidden = false;
  $("max-patches").addEventListener("change", ({ target }) => {
    maxPatches = Number(target.value);
    if (state.file) openFile(state.file);
  });
}

async function start() {
  facts = await (await fetch("page.json")).json();
  $("about").textContent = `Tokenizer ${facts.name}, ${facts.codes.toLocaleString("en")} codes, ${facts.fingerprint}.`;
  makeExamples();
  makeMaxPatches();
  listenToFiles();
  listenToStrip();
  listenToForms();
  work = Model.load(facts).then((loaded) => (model = loaded)); // what is opened meanwhile waits for it
  await work;
  if (!asked) openExample("astronaut", $("examples").firstChild);
  await work;
  document.documentElement.dataset.ready = Math.round(performance.now()); // milliseconds since the page was opened
}

globalThis.dyntok = { state, openFile, setLength, exchange, paste };
start().catch((error) => {
  $("status").textContent = "";
  showMessage(`The tokenizer could not be loaded: ${error.message}`);
});
