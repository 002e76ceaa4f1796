// Pillow's antialiased bicubic filter in 8 bits, number for number, so that the same pixels give the same codes.

const PRECISION = 22; // bits of a weight

/** Returns RGB of the box of an RGBA picture at the new size. rgba: Uint8Array of width * height * 4. */
export function resize(rgba, width, height, box, newWidth, newHeight) {
  const across = weights(width, box[0], box[2], newWidth);
  const down = weights(height, box[1], box[3], newHeight);
  if (columnsFirst(width, height, newWidth, newHeight)) {
    const tall = vertical(rgba, width, 4, down);
    return horizontal(tall, width, newHeight, 3, 0, across);
  }
  const first = down.starts[0];
  const last = down.starts[newHeight - 1] + down.counts[newHeight - 1];
  const rows = horizontal(rgba, width, last - first, 4, first, across);
  const shifted = { ...down, starts: down.starts.map((start) => start - first) };
  return vertical(rows, newWidth, 3, shifted);
}

/** As in Pillow 13, and for slivers as in `dyntok/image.py`. The order matters, since the first pass rounds to 8 bits. */
function columnsFirst(width, height, newWidth, newHeight) {
  const shrunk = height - newHeight;
  return height > 64 * width || (shrunk > 0 && shrunk > 2 * (width - newWidth));
}

function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((x - 5) * x + 8) * x * -0.5 + 2 : 0;
}

/** Returns for every new pixel the first old one, their number and their weights. */
function weights(size, from, to, newSize) {
  const scale = (to - from) / newSize;
  const stretch = Math.max(scale, 1);
  const starts = new Int32Array(newSize);
  const counts = new Int32Array(newSize);
  const values = [];
  for (let i = 0; i < newSize; i++) {
    const center = from + (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - 2 * stretch + 0.5));
    const stop = Math.min(size, Math.trunc(center + 2 * stretch + 0.5));
    const inverse = 1 / stretch;
    const row = Array.from({ length: stop - start }, (_, k) => bicubic((k + start - center + 0.5) * inverse));
    const sum = row.reduce((a, b) => a + b, 0);
    starts[i] = start;
    counts[i] = stop - start;
    values.push(Int32Array.from(row, (w) => Math.trunc((w / sum) * 2 ** PRECISION + (w < 0 ? -0.5 : 0.5))));
  }
  return { starts, counts, values };
}

function horizontal(pixels, width, rows, channels, firstRow, { starts, counts, values }) {
  const newWidth = starts.length;
  const out = new Uint8Array(newWidth * rows * 3);
  for (let y = 0; y < rows; y++)
    for (let x = 0; x < newWidth; x++) {
      const start = ((y + firstRow) * width + starts[x]) * channels;
      accumulate(out, (y * newWidth + x) * 3, pixels, start, channels, counts[x], values[x]);
    }
  return out;
}

function vertical(pixels, width, channels, { starts, counts, values }) {
  const out = new Uint8Array(width * starts.length * 3);
  for (let y = 0; y < starts.length; y++)
    for (let x = 0; x < width; x++) {
      const start = (starts[y] * width + x) * channels;
      accumulate(out, (y * width + x) * 3, pixels, start, width * channels, counts[y], values[y]);
    }
  return out;
}

function accumulate(out, place, pixels, start, step, count, row) {
  let r = 1 << (PRECISION - 1);
  let g = r;
  let b = r;
  for (let k = 0; k < count; k++) {
    const at = start + k * step;
    r += pixels[at] * row[k];
    g += pixels[at + 1] * row[k];
    b += pixels[at + 2] * row[k];
  }
  out[place] = clip(r >> PRECISION);
  out[place + 1] = clip(g >> PRECISION);
  out[place + 2] = clip(b >> PRECISION);
}

function clip(value) {
  return value < 0 ? 0 : value > 255 ? 255 : value;
}
