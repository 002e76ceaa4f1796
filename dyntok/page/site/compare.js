// What JPEG and WebP, made by this browser, show at a given number of bytes.

const SIDES = [1, 0.75, 0.5, 0.35, 0.25]; // of the picture, from the largest that fits

/** Returns {blob, side, fits}: the largest file of at most `bytes`; otherwise the smallest that is possible. */
export async function sameSize(canvas, type, bytes) {
  let smallest = null;
  for (const side of SIDES) {
    const small = scaled(canvas, side);
    const lowest = await encode(small, type, 0);
    if (!lowest) return null; // the browser does not write this format
    if (!smallest || lowest.size < smallest.size) smallest = lowest;
    if (lowest.size > bytes) continue;
    return { blob: await bestBelow(small, type, bytes, lowest), side, fits: true };
  }
  return { blob: smallest, side: SIDES.at(-1), fits: false };
}

async function bestBelow(canvas, type, bytes, lowest) {
  let [low, high, best] = [0, 1, lowest];
  for (let step = 0; step < 6; step++) {
    const middle = (low + high) / 2;
    const blob = await encode(canvas, type, middle);
    if (blob.size <= bytes) [low, best] = [middle, blob];
    else high = middle;
  }
  return best;
}

function scaled(canvas, side) {
  const [width, height] = [canvas.width, canvas.height].map((length) => Math.max(1, Math.round(length * side)));
  const small = Object.assign(document.createElement("canvas"), { width, height });
  const context = small.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(canvas, 0, 0, width, height);
  return small;
}

async function encode(canvas, type, quality) {
  const blob = await new Promise((done) => canvas.toBlob(done, type, quality));
  if (blob?.type !== type) return null;
  const bytes = new Uint8Array(await blob.arrayBuffer());
  return new Blob([type === "image/webp" ? bareWebp(bytes) : bareJpeg(bytes)], { type });
}

/** Returns the file without its color profile, which would be most of it. */
function bareWebp(bytes) {
  const view = new DataView(bytes.buffer);
  for (let at = 12; at + 8 <= bytes.length; ) {
    const length = 8 + ((view.getUint32(at + 4, true) + 1) & ~1);
    if (String.fromCharCode(...bytes.subarray(at, at + 4)) === "VP8 ") {
      const bare = new Uint8Array(12 + length);
      bare.set(bytes.subarray(0, 12));
      bare.set(bytes.subarray(at, at + length), 12);
      new DataView(bare.buffer).setUint32(4, 4 + length, true);
      return bare;
    }
    at += length;
  }
  return bytes;
}

/** Returns the file without its application segments, the color profile among them. */
function bareJpeg(bytes) {
  const parts = [bytes.subarray(0, 2)];
  let at = 2;
  while (bytes[at] === 0xff && bytes[at + 1] !== 0xda) {
    const length = 2 + (bytes[at + 2] << 8) + bytes[at + 3];
    if ((bytes[at + 1] & 0xf0) !== 0xe0) parts.push(bytes.subarray(at, at + length));
    at += length;
  }
  return new Blob([...parts, bytes.subarray(at)]);
}
