// How a picture is brought to a grid of patches. The same arithmetic as `dyntok/fitting.py`.

const LONGEST_STRIP = 8;
const MAX_SIDE = 128;
const ODDNESS = 2;

/** Returns {size: [height, width], box, inner}: which part of the original covers which part of the result. */
export function fit(width, height, facts, maxPatches) {
  let [rows, columns] = targetSize(facts, maxPatches);
  if (facts.resize === "keep") [rows, columns] = kept(width, height, facts, maxPatches);
  let box = [0, 0, width, height];
  let inner = [0, 0, columns, rows];
  if (facts.resize === "crop") box = centered(width, height, columns / rows);
  if (facts.resize === "pad") {
    const scale = Math.min(columns / width, rows / height);
    const [w, h] = [width, height].map((side) => Math.max(1, pythonRound(side * scale)));
    const [left, top] = [Math.floor((columns - w) / 2), Math.floor((rows - h) / 2)];
    inner = [left, top, left + w, top + h];
  }
  return { size: [rows, columns], box, inner };
}

function targetSize(facts, maxPatches) {
  if (facts.size) return facts.size;
  if (!facts.anyGrid) return facts.grid.map((side) => side * facts.patch);
  const side = Math.floor(Math.sqrt(maxPatches)) * facts.patch;
  return [side, side];
}

function kept(width, height, facts, maxPatches) {
  const ratio = Math.max(width, height) / Math.min(width, height);
  if (ratio > LONGEST_STRIP) throw new Error(`The picture is ${ratio.toFixed(1)} to 1. At most 8 to 1 is possible.`);
  let grid;
  if (facts.size) {
    const scale = Math.min(facts.size[0] / height, facts.size[1] / width) / facts.patch;
    grid = [height, width].map((side) => Math.max(1, pythonRound(side * scale)));
  } else grid = chooseGrid(width, height, maxPatches);
  return grid.map((side) => side * facts.patch);
}

/** Returns the grid of at most `maxPatches` that suits the aspect ratio best. */
export function chooseGrid(width, height, maxPatches) {
  const aspect = width / height;
  let best = null;
  for (let rows = 1; rows <= Math.min(MAX_SIDE, maxPatches); rows++)
    for (const ideal of new Set([Math.floor(rows * aspect), Math.ceil(rows * aspect)])) {
      const columns = Math.min(Math.max(ideal, 1), MAX_SIDE, Math.floor(maxPatches / rows));
      const cost = ODDNESS * Math.abs(Math.log(columns / rows / aspect)) + 1 - (rows * columns) / maxPatches;
      const earlier = best && cost === best.cost && (rows < best.rows || (rows === best.rows && columns < best.columns));
      if (!best || cost < best.cost || earlier) best = { cost, rows, columns };
    }
  return [best.rows, best.columns];
}

function centered(width, height, aspect) {
  const w = Math.min(width, Math.max(1, pythonRound(height * aspect)));
  const h = Math.min(height, Math.max(1, pythonRound(width / aspect)));
  const [left, top] = [Math.floor((width - w) / 2), Math.floor((height - h) / 2)];
  return [left, top, left + w, top + h];
}

/** Rounds halves to even numbers, as Python does. */
function pythonRound(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 ? below + 1 : below;
}
