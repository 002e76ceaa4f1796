// Draws the state: pictures, mask, strip, numbers. Decides nothing.

import { toCanvas } from "./photo.js";

export const $ = (id) => document.getElementById(id);

export function drawPictures(state, patch) {
  const size = state.grid.map((side) => side * patch);
  document.body.style.setProperty("--shape", `${size[1]} / ${size[0]}`);
  const result = toCanvas(state.result, size);
  show($("result"), result);
  show($("same-codes"), result);
  const photo = state.photo ? toCanvas(state.photo.rgb, size) : null;
  if (photo) show($("photo"), photo);
  drawPatches(photo ?? result, state, patch);
  $("photo").parentElement.parentElement.hidden = !photo;
  $("photo-note").textContent = `${size[1]} × ${size[0]} pixels`;
  $("patches-note").textContent = `${state.kept.length} of ${state.grid[0] * state.grid[1]}`;
  $("result-note").textContent = state.known ? "" : "places guessed";
  $("patches").setAttribute("aria-label", `The ${state.kept.length} kept patches; the others are pale`);
}

function show(canvas, source) {
  canvas.width = source.width;
  canvas.height = source.height;
  canvas.getContext("2d").drawImage(source, 0, 0);
}

function drawPatches(picture, { kept, grid }, patch) {
  const canvas = $("patches");
  const cell = Math.max(8, Math.ceil(640 / Math.max(...grid))); // pixels of the canvas per patch
  canvas.width = grid[1] * cell;
  canvas.height = grid[0] * cell;
  const context = canvas.getContext("2d");
  const veil = getComputedStyle(document.documentElement).getPropertyValue("--veil");
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.fillStyle = `rgba(${veil}, .86)`;
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (const position of kept) {
    const [row, column] = [Math.floor(position / grid[1]), position % grid[1]];
    const from = [column * patch, row * patch, patch, patch];
    context.drawImage(picture, ...from, column * cell + 1, row * cell + 1, cell - 2, cell - 2);
  }
}

export function drawStrip(state) {
  const strip = $("strip");
  while (strip.children.length > state.codes.length) strip.lastChild.remove();
  while (strip.children.length < state.codes.length) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("role", "option");
    strip.append(button);
  }
  state.codes.forEach((code, i) => {
    const button = strip.children[i];
    const place = placeOf(state.kept[i], state.grid);
    button.textContent = code;
    button.tabIndex = i === 0 ? 0 : -1;
    button.className = code === state.original[i] ? "" : "changed";
    button.setAttribute("aria-label", `Code ${code}, ${place}`);
  });
}

export function placeOf(position, grid) {
  return `row ${Math.floor(position / grid[1]) + 1}, column ${(position % grid[1]) + 1}`;
}

/** Lights up a code and its patch; null for none. */
export function highlight(state, index) {
  $("strip").querySelector(".lit")?.classList.remove("lit");
  const pictures = $("pictures");
  pictures.classList.toggle("lit", index !== null);
  if (index === null) return;
  $("strip").children[index]?.classList.add("lit");
  const [rows, columns] = state.grid;
  const position = state.kept[index];
  const style = {
    "--x": `${((position % columns) / columns) * 100}%`,
    "--y": `${(Math.floor(position / columns) / rows) * 100}%`,
    "--w": `${100 / columns}%`,
    "--h": `${100 / rows}%`,
  };
  for (const [name, value] of Object.entries(style)) pictures.style.setProperty(name, value);
}

export function drawLength(state) {
  const slider = $("length");
  const patches = state.grid[0] * state.grid[1];
  slider.min = Math.min(8, patches);
  slider.max = patches;
  slider.disabled = !state.photo;
  slider.value = state.kept.length;
  $("count").value = state.kept.length;
  $("learned").hidden = $("tick").hidden = !state.photo;
  if (!state.photo) return;
  $("learned").textContent = `the tokenizer's choice: ${state.learned}`;
  const share = Math.max(0, (state.learned - slider.min) / (slider.max - slider.min || 1));
  $("tick").style.left = `calc(${share * 100}% + ${8 - share * 16}px)`; // the thumb is 16 pixels wide
}

export function showMessage(text) {
  $("message").hidden = !text;
  $("message").textContent = text ?? "";
}

export function showFile(name, found) {
  const image = $(name);
  const label = name === "webp" ? "WebP" : "JPEG";
  if (image.src) URL.revokeObjectURL(image.src);
  image.hidden = !found;
  if (!found) {
    $(`${name}-note`).textContent = "not written by this browser";
    return;
  }
  image.src = URL.createObjectURL(found.blob);
  image.alt = `The photograph as ${label} of ${found.blob.size} bytes`;
  const smaller = found.side < 1 ? `, at ${Math.round(found.side * 100)} % of the side` : "";
  $(`${name}-note`).textContent = `${found.blob.size} bytes${smaller}${found.fits ? "" : ", the least possible"}`;
}
