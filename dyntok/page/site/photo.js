// A file to normalized pixels: decoded by the browser, on white, resized as Pillow does.

import { fit } from "./fitting.js";
import { resize } from "./resize.js";

const MAX_PIXELS = 2 ** 26; // as in Python

/** Returns {rgb, pixels, size: [height, width], grid}. Throws an Error with a sentence for people. */
export async function readPhoto(blob, facts, maxPatches) {
  const colorSpaceConversion = facts.color === "srgb" ? "default" : "none";
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion, premultiplyAlpha: "none" });
  } catch {
    throw new Error(`${blob.name ?? "This file"} can't be read as a picture. Choose a JPEG, PNG or WebP file.`);
  }
  const { width, height } = bitmap;
  try {
    if (width * height > MAX_PIXELS)
      throw new Error(`The picture has ${width} x ${height} pixels. At most ${MAX_PIXELS.toLocaleString("en")} fit.`);
    const place = fit(width, height, facts, maxPatches);
    return { ...normalized(fitted(rgbaOf(bitmap), width, height, place), place.size, facts), size: place.size };
  } finally {
    bitmap.close();
  }
}

/** Returns RGB pixels as a canvas. */
export function toCanvas(rgb, [height, width]) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = rgb[3 * i + c];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function rgbaOf(bitmap) {
  const canvas = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("The picture is too large for this browser.");
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

function fitted(rgba, width, height, { size, box, inner }) {
  const [w, h] = [inner[2] - inner[0], inner[3] - inner[1]];
  const part = resize(rgba, width, height, box, w, h);
  if (w === size[1] && h === size[0]) return part;
  const whole = new Uint8Array(size[0] * size[1] * 3).fill(255);
  for (let y = 0; y < h; y++)
    whole.set(part.subarray(y * w * 3, (y + 1) * w * 3), ((y + inner[1]) * size[1] + inner[0]) * 3);
  return whole;
}

/** (value / 255 - mean) / std in float32, channels first. */
function normalized(rgb, [height, width], { mean, std, patch }) {
  const area = height * width;
  const pixels = new Float32Array(3 * area);
  for (let c = 0; c < 3; c++) {
    const [m, s] = [Math.fround(mean[c]), Math.fround(std[c])];
    for (let i = 0; i < area; i++)
      pixels[c * area + i] = Math.fround(Math.fround(Math.fround(rgb[3 * i + c] / 255) - m) / s);
  }
  return { rgb, pixels, grid: [height / patch, width / patch] };
}
