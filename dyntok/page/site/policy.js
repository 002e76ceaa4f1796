// Which patches are kept. The same rules as `KeepPolicy` and `dyntok/layout.py`, for one image.

const CELL_RANK = [3, 1, 0, 2]; // of the four patches of a 2 x 2 cell, in raster order

/** Returns the positions that are kept, in raster order. count: null for the tokenizer's own choice. */
export function keptPatches(scores, grid, places, count = null) {
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
  let wanted = count ?? scores.reduce((sum, score) => sum + (score > 0), 0);
  wanted = Math.min(Math.max(wanted, 1), scores.length);
  const best = order.slice(0, wanted);
  if (places === "lattice") return latticePositions(wanted, grid);
  return places === "map" ? fromCells(best, grid) : best.sort((a, b) => a - b);
}

/** Returns all positions in the order in which the lattice keeps them: an ordered dither, highest threshold first. */
export function latticeOrder([rows, columns]) {
  const positions = [...Array(rows * columns).keys()];
  const height = (p) => bayer(Math.floor(p / columns) % 8, (p % columns) % 8, 8);
  const heights = positions.map(height);
  return positions.sort((a, b) => heights[b] - heights[a] || a - b);
}

export function latticePositions(count, grid) {
  return latticeOrder(grid).slice(0, count).sort((a, b) => a - b);
}

/** Returns places for codes without positions, as `guessed_positions` in `dyntok/model/decoder.py`. */
export function guessedPositions(count, grid, dithered) {
  if (dithered) return latticePositions(count, grid);
  const patches = grid[0] * grid[1];
  return Array.from({ length: count }, (_, i) => Math.floor(((2 * i + 1) * patches) / (2 * count)));
}

/** Returns the map values of kept patches: one number of 0 to 624 for each block of 4 x 4 patches. */
export function mapValues(kept, grid) {
  const values = new Array(Math.ceil(grid[0] / 4) * Math.ceil(grid[1] / 4)).fill(0);
  for (const position of kept) {
    const [row, column] = [Math.floor(position / grid[1]), position % grid[1]];
    const block = (row >> 2) * Math.ceil(grid[1] / 4) + (column >> 2);
    values[block] += 5 ** (((row >> 1) & 1) * 2 + ((column >> 1) & 1));
  }
  return values;
}

/** Returns the positions that map values stand for: the inverse of `mapValues`. */
export function fromMap(values, grid) {
  const blocks = Math.ceil(grid[1] / 4);
  const left = (row, column) => {
    const cell = ((row >> 1) & 1) * 2 + ((column >> 1) & 1);
    return Math.floor(values[(row >> 2) * blocks + (column >> 2)] / 5 ** cell) % 5;
  };
  return keptByRank(grid, left);
}

/** Returns the bytes that tell where the codes lie. */
export function placeBytes(places, grid) {
  if (places === "lattice") return 0;
  const bits = places === "map" ? Math.ceil(grid[0] / 4) * Math.ceil(grid[1] / 4) * 10 : grid[0] * grid[1];
  return Math.ceil(bits / 8);
}

function bayer(row, column, side) {
  if (side === 1) return 0;
  const half = side / 2;
  const quarter = [0, 2, 3, 1][(row >= half) * 2 + (column >= half)];
  return 4 * bayer(row % half, column % half, half) + quarter;
}

/** Keeps in every cell of 2 x 2 as many patches as before, the first ones of the fixed order. */
function fromCells(best, grid) {
  const cell = (row, column) => (row >> 1) * grid[1] + (column >> 1);
  const counts = new Map();
  for (const position of best) {
    const number = cell(Math.floor(position / grid[1]), position % grid[1]);
    counts.set(number, (counts.get(number) ?? 0) + 1);
  }
  return keptByRank(grid, (row, column) => counts.get(cell(row, column)) ?? 0);
}

function keptByRank([rows, columns], count) {
  const kept = [];
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++)
      if (rankInCell(row, column, rows, columns) < count(row, column)) kept.push(row * columns + column);
  return kept;
}

/** Returns how many patches of the same cell come first. Cells at the border may be cut. */
function rankInCell(row, column, rows, columns) {
  const own = CELL_RANK[(row & 1) * 2 + (column & 1)];
  let rank = 0;
  for (let slot = 0; slot < 4; slot++) {
    const inside = (row & ~1) + (slot >> 1) < rows && (column & ~1) + (slot & 1) < columns;
    rank += inside && CELL_RANK[slot] < own;
  }
  return rank;
}
