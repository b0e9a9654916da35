// The second look: the box that loupe_core.look.boxes finds on a mask, in the same arithmetic, for a square input.
import {roundHalfEven, view} from "./lab_input.js";

// mask: {values, side}. width, height: of the picture. settings, rule: lab.json's model and look.
// Returns [x, y, width, height] of the part to show, whole pixels of the picture.
export function partOf(mask, width, height, settings, rule) {
  const [x, y, w, h] = boxOf(mask, width, height, settings, rule);
  const side = Math.max((1 + 2 * rule.margin) * Math.max(h, w), rule.smallest * Math.min(width, height));
  const [left, across] = within(x + w / 2, side, width), [top, down] = within(y + h / 2, side, height);
  return [left, top, across, down];
}

// First pixel and length of a stretch of a side that is `whole` pixels long.
function within(centre, side, whole) {
  const length = Math.max(Math.min(roundHalfEven(side), whole), 1);
  return [Math.min(Math.max(roundHalfEven(centre - length / 2), 0), whole - length), length];
}

// The box of the connected piece with most of the mask among its highest cells; all that was seen where it is flat.
function boxOf({values, side}, width, height, settings, rule) {
  const {newWidth, newHeight, left, top} = view(width, height, settings), {crop} = settings;
  const across = i => (i * (crop / side) + left) / (newWidth / width);
  const down = i => (i * (crop / side) + top) / (newHeight / height);
  const low = Math.min(...values), cells = Array.from(values, value => value - low);
  if (Math.max(...cells) <= rule.flat * Math.max(...Array.from(values, Math.abs), 1e-30)) {
    const [x, y] = [Math.max(across(0), 0), Math.max(down(0), 0)];
    return [x, y, Math.min(across(side), width) - x, Math.min(down(side), height) - y];
  }
  const count = Math.max(roundHalfEven(rule.share * cells.length), 1);
  const level = [...cells].sort((a, b) => b - a)[count - 1];
  const pieces = connected(cells.map(value => value >= level && value > 0), side);
  const sums = [];
  pieces.forEach((piece, i) => { if (piece !== null) sums[piece] = (sums[piece] ?? 0) + cells[i]; });
  const best = sums.indexOf(Math.max(...sums)), rows = [], columns = [];
  pieces.forEach((piece, i) => {
    if (piece === best) rows.push(Math.floor(i / side)), columns.push(i % side);
  });
  const [x, y] = [across(Math.min(...columns)), down(Math.min(...rows))];
  return [x, y, across(Math.max(...columns) + 1) - x, down(Math.max(...rows) + 1) - y];
}

// For each cell the number of its piece, counted in the order of reading; null where it is in none.
function connected(inside, side) {
  const pieces = inside.map(() => null);
  let n = 0;
  inside.forEach((_, first) => {
    if (!inside[first] || pieces[first] !== null) return;
    const open = [first];
    while (open.length) {
      const i = open.pop(), column = i % side;
      if (!inside[i] || pieces[i] !== null) continue;
      pieces[i] = n;
      open.push(...[i - side, i + side, ...column ? [i - 1] : [], ...column < side - 1 ? [i + 1] : []].filter(
        k => k >= 0 && k < inside.length));
    }
    n++;
  });
  return pieces;
}
