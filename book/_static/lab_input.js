// From a picture's pixels to the model's input, as Pillow, torchvision and timm make it (loupe_core.geometry's
// EvalTransform): the same bytes, because a browser's own scaling is another one in every browser.

const BITS = 22;  // Pillow's weights are whole numbers of 2^-22

function cubic(x) {  // Keys' kernel with a = -0.5
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

// For each of `to` output pixels: the first of `from` input pixels that it reads, and their weights.
function taps(from, to) {
  const scale = from / to, stretch = Math.max(scale, 1), reach = 2 * stretch;  // antialiasing: wider where it shrinks
  return Array.from({length: to}, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0), end = Math.min(Math.trunc(centre + reach + 0.5), from);
    const weights = Array.from({length: end - first}, (_, k) => cubic((first + k - centre + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return {first, weights: Int32Array.from(weights, w => Math.trunc(w / sum * 2 ** BITS + (w < 0 ? -0.5 : 0.5)))};
  });
}

// Bytes of `lines` lines of pixels along which one pixel is `step` bytes from the next -> `to` pixels a line, RGB.
function along(bytes, lines, lineStep, step, outLineStep, outStep, from, to) {
  const out = new Uint8ClampedArray(lines * to * 3);
  taps(from, to).forEach(({first, weights}, i) => {
    for (let line = 0; line < lines; line++) {
      let at = line * lineStep + first * step, r = 1 << BITS - 1, g = r, b = r;
      for (let k = 0; k < weights.length; k++, at += step) {
        r += weights[k] * bytes[at], g += weights[k] * bytes[at + 1], b += weights[k] * bytes[at + 2];
      }
      const to = line * outLineStep + i * outStep;
      out[to] = r >> BITS, out[to + 1] = g >> BITS, out[to + 2] = b >> BITS;  // and cut to 0 ... 255
    }
  });
  return out;
}

// RGBA bytes -> RGB bytes of another size: across, then down, rounded to bytes in between (Pillow's BICUBIC).
export function resample(rgba, width, height, newWidth, newHeight) {
  const wide = along(rgba, height, width * 4, 4, newWidth * 3, 3, width, newWidth);
  return along(wide, newWidth, 3, newWidth * 3, 3, newWidth * 3, height, newHeight);
}

export const roundHalfEven = x => x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);

// Where the model looks in a picture: the size that it is scaled to, and the corner of the square cut from its middle.
export function view(width, height, {resize, crop}) {
  const short = Math.min(width, height);
  const newWidth = Math.trunc(resize * width / short), newHeight = Math.trunc(resize * height / short);
  const left = roundHalfEven((newWidth - crop) / 2), top = roundHalfEven((newHeight - crop) / 2);
  const box = [left * width / newWidth, top * height / newHeight, crop * width / newWidth, crop * height / newHeight];
  return {newWidth, newHeight, left, top, box};  // box: x, y, width, height in the picture's own pixels
}

// ImageData -> bytes, (crop, crop, 3) RGB, and values, (3, crop, crop) float32, normalised.
export function modelInput({data, width, height}, settings) {
  const {crop, mean, std} = settings, {newWidth, newHeight, left, top} = view(width, height, settings);
  const small = resample(data, width, height, newWidth, newHeight);
  const bytes = new Uint8Array(crop * crop * 3), values = new Float32Array(3 * crop * crop);
  for (let y = 0; y < crop; y++) {
    const begin = ((top + y) * newWidth + left) * 3;
    bytes.set(small.subarray(begin, begin + crop * 3), y * crop * 3);
  }
  for (let i = 0; i < crop * crop; i++)
    for (let c = 0; c < 3; c++)
      values[c * crop * crop + i] = Math.fround(Math.fround(bytes[3 * i + c] / 255) - mean[c]) / std[c];
  return {bytes, values};
}
