// The heatmap explorer: an anywidget module (`export default {render}`), which a published page mounts without a kernel.
// The exported functions compute what loupe_core.heatmap computes, in the same order of operations; a test compares pixels.

// A map {h, w, values} over the model input -> its values at the photograph's pixels, NaN where the model saw nothing.
// Bilinear between the centres of the cells, constant beyond the outer ones (heatmap.mask_to_original).
export function upsample(map, geometry) {
  const [H, W] = geometry.original, [h, w] = geometry.input;
  const along = (n, scale, offset, size, cells, flipped) => Array.from({length: n}, (_, i) => {
    let at = (i + 0.5) * scale - offset;
    if (flipped) at = at * -1 + size;
    const place = Math.min(Math.max(at * (cells / size) - 0.5, 0), cells - 1), cell = Math.floor(place);
    return {seen: at >= 0 && at <= size, first: cell, second: Math.min(cell + 1, cells - 1), share: place - cell};
  });
  const rows = along(H, geometry.scale[0], geometry.offset[0], h, map.h, false);
  const columns = along(W, geometry.scale[1], geometry.offset[1], w, map.w, geometry.flipped);
  const heatmap = new Float64Array(H * W).fill(NaN), line = new Float64Array(map.w);
  rows.forEach((row, y) => {
    if (!row.seen) return;
    for (let j = 0; j < map.w; j++)
      line[j] = (1 - row.share) * map.values[row.first * map.w + j] + row.share * map.values[row.second * map.w + j];
    columns.forEach((c, x) => {
      if (c.seen) heatmap[y * W + x] = line[c.first] * (1 - c.share) + line[c.second] * c.share;
    });
  });
  return heatmap;
}

// The photograph (RGBA bytes) coloured by the heatmap; what was not seen is grey and dimmed (heatmap.overlay).
// lut: 256 x 3 colours from 0 to 1, as matplotlib has them.
export function overlay(rgba, heatmap, alpha, lut, [low, high]) {
  const out = new Uint8ClampedArray(rgba.length), range = Math.max(high - low, 2.2250738585072014e-308);
  for (let i = 0, p = 0; i < heatmap.length; i++, p += 4) {
    out[p + 3] = 255;
    if (Number.isNaN(heatmap[i])) {
      out.fill(Math.floor((299 * rgba[p] + 587 * rgba[p + 1] + 114 * rgba[p + 2]) / 2000), p, p + 3);
      continue;
    }
    const at = 3 * Math.min(Math.max(Math.floor((heatmap[i] - low) / range * 256), 0), 255);
    // a Uint8ClampedArray rounds halves to even, as NumPy does
    for (let c = 0; c < 3; c++) out[p + c] = (1 - alpha) * rgba[p + c] + alpha * (lut[at + c] * 255);
  }
  return out;
}

// [x, y] in the photograph: the centre of the map's highest cell, for ties of the first (heatmap.peak).
export function peak(map, geometry) {
  const highest = Math.max(...map.values);
  const first = map.values.findIndex(value => highest - value <= 1e-9 * Math.abs(highest));
  let x = (first % map.w + 0.5) * geometry.input[1] / map.w;
  const y = (Math.floor(first / map.w) + 0.5) * geometry.input[0] / map.h;
  if (geometry.flipped) x = geometry.input[1] - x;
  return [(x + geometry.offset[1]) / geometry.scale[1], (y + geometry.offset[0]) / geometry.scale[0]];
}

// The value below which p percent of the seen pixels lie, linear between neighbours (heatmap.contour_level).
export function percentile(heatmap, p) {
  const seen = heatmap.filter(value => !Number.isNaN(value)).sort();
  const at = (seen.length - 1) * p / 100, i = Math.floor(at);
  return seen[i] + (seen[Math.min(i + 1, seen.length - 1)] - seen[i]) * (at - i);
}

// The line where the heatmap crosses `level`, as path data of an SVG in the photograph's pixels (marching squares).
export function contour(heatmap, H, W, level) {
  const path = [];
  for (let y = 0; y + 1 < H; y++) for (let x = 0; x + 1 < W; x++) {
    const i = y * W + x, corners = [heatmap[i], heatmap[i + 1], heatmap[i + W + 1], heatmap[i + W]];
    const above = corners.map(value => value > level);
    if (above.every(Boolean) || !above.some(Boolean) || corners.some(Number.isNaN)) continue;
    const at = [[0, 0], [1, 0], [1, 1], [0, 1]], cuts = [];
    for (let k = 0; k < 4; k++) {
      const n = (k + 1) % 4;
      if (above[k] === above[n]) continue;
      const t = (level - corners[k]) / (corners[n] - corners[k]);
      cuts.push([0, 1].map(d => at[k][d] + t * (at[n][d] - at[k][d])));
    }
    // with two opposite corners above, the line goes round the upper right and the lower left one
    for (let k = 0; k + 1 < cuts.length; k += 2)
      path.push("ML".split("").map((pen, e) =>
        pen + [x + 0.5 + cuts[k + e][0], y + 0.5 + cuts[k + e][1]].map(v => v.toFixed(2)).join(" ")).join(""));
  }
  return path.join("");
}

// The map of an answer: bytes, packed by zlib, in base64.
export async function decode({h, w, low, high, bytes}) {
  const packed = new Blob([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))]);
  const unpacked = new Response(packed.stream().pipeThrough(new DecompressionStream("deflate")));
  const steps = new Uint8Array(await unpacked.arrayBuffer());
  return {h, w, values: Float64Array.from(steps, step => low + (high - low) * step / 255)};
}

const STYLE = `
.loupe-explorer {border: 1px solid currentColor; border-radius: 6px; padding: .8em 1em; margin: 1em 0; color: inherit;
  container-type: inline-size; line-height: 1.4}
.loupe-explorer .controls {display: grid; grid-template-columns: repeat(auto-fit, minmax(13em, 1fr)); gap: .6em 1.2em}
.loupe-explorer label {display: block; margin: 0; font-size: .9em}
.loupe-explorer .line {display: flex; gap: .4em; align-items: center}
.loupe-explorer select, .loupe-explorer button, .loupe-explorer input[type=file] {font: inherit; color: inherit;
  background: var(--pst-color-surface, var(--jp-layout-color2, Canvas)); border: 1px solid currentColor;
  border-radius: 4px; min-height: 2.4em; padding: 0 .5em; min-width: 0; max-width: 100%}
.loupe-explorer select {width: 100%; flex: 1}
.loupe-explorer option {color: var(--pst-color-text-base, var(--jp-ui-font-color1, CanvasText));
  background: var(--pst-color-surface, var(--jp-layout-color2, Canvas))}
.loupe-explorer button {min-width: 2.6em; cursor: pointer}
.loupe-explorer input[type=range] {width: 100%; height: 2em; margin: 0; accent-color: #0072B2}
.loupe-explorer input[type=checkbox] {width: 1.2em; height: 1.2em; margin: .6em .5em .6em 0; vertical-align: middle}
.loupe-explorer :focus-visible {outline: 2px solid currentColor; outline-offset: 2px}
.loupe-explorer .body {display: grid; gap: 1em; margin-top: 1em; grid-template-columns: minmax(0, 1fr)}
@container (min-width: 36em) {.loupe-explorer .body.one {grid-template-columns: minmax(0, 3fr) minmax(0, 2fr)}}
.loupe-explorer .pictures {display: grid; gap: .8em; align-content: start;
  grid-template-columns: repeat(auto-fit, minmax(min(13em, 100%), 1fr))}
.loupe-explorer .all .pictures {grid-template-columns: repeat(auto-fill, minmax(9em, 1fr))}
.loupe-explorer figure {margin: 0; padding: 0; width: auto; min-width: 0}
.loupe-explorer figure figcaption {font: inherit; font-size: .85em; color: inherit; text-align: left; padding: 0}
.loupe-explorer .frame {position: relative}
.loupe-explorer canvas {display: block; width: 100%; height: auto; border-radius: 3px}
.loupe-explorer svg {position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden}
.loupe-explorer svg * {vector-effect: non-scaling-stroke; fill: none}
.loupe-explorer p {margin: 0 0 .5em}
.loupe-explorer table {width: 100%; margin: 0 0 .6em; border-collapse: collapse; font-size: .9em; display: table}
.loupe-explorer caption {caption-side: top; text-align: left; color: inherit; padding: 0}
.loupe-explorer th, .loupe-explorer td {border: 0; padding: .15em .4em .15em 0; text-align: left; font-weight: 400;
  background: transparent; color: inherit}
.loupe-explorer td.bar {width: 35%}
.loupe-explorer td.bar div {height: .7em; background: #0072B2; border: 1px solid currentColor}
.loupe-explorer .small {font-size: .85em}`;

const VIEWS = {over: "overlaid", beside: "beside the picture", all: "all heatmaps at once"};

// h("p", {class: "x"}, "text", child): an element with attributes, listeners (functions) and children.
function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// The SVG that lies over a picture: contour, cross at the peak, named dots at the parts.
function marks(picture, line, at, parts) {
  const scale = Math.max(picture.width, picture.height) / 100;
  const twice = (shape, width) => ["black", "white"].map((colour, i) =>
    shape.replace("/>", ` stroke="${colour}" stroke-width="${i ? width : 2 * width}"/>`)).join("");
  let inner = line ? twice(`<path class="contour" d="${line}"/>`, 1.5) : "";
  for (const [name, x, y] of parts)
    inner += `<g><title>${name}</title>${twice(`<circle cx="${x}" cy="${y}" r="${1.3 * scale}"/>`, 1.5)}</g>`;
  if (at) {
    const [x, y] = at, r = 2.2 * scale;
    inner += twice(`<path class="peak" d="M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}"/>`, 2);
  }
  return `<svg viewBox="0 0 ${picture.width} ${picture.height}" aria-hidden="true">${inner}</svg>`;
}

function render({model, el}) {
  const pixels = new Map(), maps = new Map();  // by picture's address; by numbers of picture and source
  const get = key => model.get(key);
  const set = (key, value) => { model.set(key, value); model.save_changes(); };

  async function photograph(index) {
    const picture = get("data").pictures[index];
    if (!pixels.has(picture.src)) {
      const image = new Image();
      image.src = picture.src;
      await image.decode();
      const canvas = new OffscreenCanvas(picture.width, picture.height), pen = canvas.getContext("2d");
      pen.drawImage(image, 0, 0);
      pixels.set(picture.src, pen.getImageData(0, 0, picture.width, picture.height).data);
    }
    return pixels.get(picture.src);
  }
  const key = (index, source) => `${index} ${source}`;
  const upsampled = (index, source) => maps.get(key(index, source));
  async function prepare(index, source) {
    const {pictures, answers} = get("data");
    if (!upsampled(index, source))
      maps.set(key(index, source), upsample(await decode(answers[source][index]), pictures[index].geometry));
  }

  // a drop-down menu of [value, text] pairs that is kept in step with one setting
  const menu = (key, options, parse = String) => {
    const list = h("select", {change: () => set(key, parse(list.value))});
    const fill = () => {
      list.replaceChildren(...options().map(([value, text, off]) => h("option", {value, disabled: off}, text)));
      list.value = get(key);
    };
    return {list, fill};
  };
  const slider = (key, low, high, step, text) => {
    const value = h("span"), range = h("input", {type: "range", min: low, max: high, step,
      input: () => set(key, Number(range.value))});
    const fill = () => { range.value = get(key); value.textContent = get(key); };
    return {label: h("label", {}, text + " ", value, range), fill};
  };
  const tick = (key, text) => {
    const box = h("input", {type: "checkbox", change: () => set(key, box.checked)});
    return {label: h("label", {}, box, text), fill: () => { box.checked = get(key); }};
  };
  const step = by => () => {
    const n = get("data").pictures.length;
    set("picture", (get("picture") + by + n) % n);
  };

  const picture = menu("picture", () => get("data").pictures.map((p, i) => [i, p.name]), Number);
  const source = menu("source", () => get("data").sources.map((s, i) => [i, s.name, !get("data").answers[i][get("picture")]]),
    Number);
  const view = menu("view", () => Object.entries(VIEWS));
  const opacity = slider("opacity", 0, 1, 0.05, "Opacity of the heatmap");
  const level = slider("percentile", 50, 99, 1, "Contour at percentile");
  const line = tick("contour", "contour"), parts = tick("parts", "parts of the bird");
  const message = h("p", {role: "status", class: "small"});
  const chooser = h("input", {type: "file", accept: "image/*", change: async () => {
    const file = chooser.files[0];
    if (!file) return;
    message.textContent = `Reading ${file.name} ...`;
    try {  // the browser turns it upright and makes it small, so that little goes to the kernel
      const bitmap = await createImageBitmap(file, {imageOrientation: "from-image"});
      const scale = Math.min(1, 640 / Math.max(bitmap.width, bitmap.height));
      const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)),
        Math.max(1, Math.round(bitmap.height * scale)));
      const pen = canvas.getContext("2d");
      pen.fillStyle = "white";  // below a transparent picture, as open_image has it
      pen.fillRect(0, 0, canvas.width, canvas.height);
      pen.imageSmoothingQuality = "high";
      pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      const blob = await canvas.convertToBlob({type: "image/png"});
      model.send({photograph: file.name}, undefined, [await blob.arrayBuffer()]);
    } catch {
      message.textContent = `${file.name} cannot be read as a picture; choose a JPEG, PNG or WebP file.`;
    }
  }});
  const own = !get("uploads") ? "" : get("live") ? h("label", {}, "Your own photograph", chooser)
    : h("details", {class: "small"}, h("summary", {}, "Your own photograph"),
      "This page has no Python behind it. Run this notebook, in Jupyter or on Colab, and a button here takes your photograph.");

  const pictures = h("div", {class: "pictures"}), says = h("div", {class: "says", "aria-live": "polite"});
  const body = h("div", {class: "body"}, pictures, says);
  el.replaceChildren(h("style", {}, STYLE), h("div", {class: "loupe-explorer", role: "group", "aria-label": "Heatmap explorer"},
    h("div", {class: "controls"},
      h("div", {}, h("label", {}, "Picture", h("div", {class: "line"}, picture.list)),
        h("div", {class: "line", style: "margin-top: .4em"},
          h("button", {type: "button", "aria-label": "previous picture", click: step(-1)}, "‹"),
          h("button", {type: "button", "aria-label": "next picture", click: step(1)}, "›"))),
      h("label", {}, "Heatmap", h("div", {class: "line"}, source.list)),
      h("label", {}, "View", h("div", {class: "line"}, view.list)),
      opacity.label, level.label, h("div", {}, line.label, parts.label), own), message, body));

  function figure(index, which, rgba, name, plain) {
    const {pictures: all, answers, lut} = get("data"), p = all[index], answer = answers[which][index];
    const canvas = h("canvas", {width: p.width, height: p.height, role: "img"});
    let over = "", words = `${p.name}, the picture alone.`, bytes = rgba;
    if (!plain) {
      const heatmap = upsampled(index, which);
      bytes = overlay(rgba, heatmap, get("opacity"), lut, [answer.low, answer.high]);
      if (get("contour")) over = contour(heatmap, p.height, p.width, percentile(heatmap, get("percentile")));
      words = `${name} over ${p.name}. Its peak is at (${answer.peak.map(Math.round).join(", ")}) of ${p.width} by ` +
        `${p.height} pixels.`;
    }
    canvas.setAttribute("aria-label", words);
    canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(bytes), p.width, p.height), 0, 0);
    const frame = h("div", {class: "frame"}, canvas);
    frame.insertAdjacentHTML("beforeend", marks(p, over, plain ? null : answer.peak, get("parts") ? p.parts : []));
    return h("figure", {}, frame, h("figcaption", {}, name));
  }

  function words(index, which) {
    const {pictures: all, answers, sources, cell} = get("data"), p = all[index], answer = answers[which][index], lines = [];
    if (answer.top.length) {
      const [name, share] = answer.top[0];
      const verdict = !p.truth ? "" : name === p.truth ? " This is right." : ` This is wrong: it is a ${p.truth}.`;
      lines.push(h("p", {class: "named"}, h("strong", {}, "Named: "), `${name}, ${share.toFixed(2)}.${verdict}`));
      lines.push(h("table", {}, h("caption", {}, "The likeliest, with their probabilities"), h("tbody", {}, ...answer.top.map(
        ([label, value]) => h("tr", {}, h("th", {scope: "row"}, label), h("td", {}, value.toFixed(3)),
          h("td", {class: "bar", "aria-hidden": "true"}, h("div", {style: `width: ${100 * value}%`})))))));
    }
    const [x, y] = answer.peak;
    let text = `The peak is at (${Math.round(x)}, ${Math.round(y)}), the value there ${answer.high.toPrecision(3)}.`;
    if (p.parts.length) {
      const far = ([, a, b]) => Math.hypot((a - x) * p.geometry.scale[1], (b - y) * p.geometry.scale[0]);
      const near = p.parts.reduce((a, b) => far(b) < far(a) ? b : a);
      const hit = far(near) <= cell;
      text += hit ? ` It hits a part: the ${near[0]}.` : ` It hits no part; the nearest is the ${near[0]}.`;
      text += ` (A hit lies within ${cell} px of the model's input.)`;
      if (p.telling) text += ` What tells this species from its neighbours is the ${p.telling}.`;
    }
    lines.push(h("p", {class: "peak-says"}, text));
    if (get("contour")) lines.push(h("p", {class: "level"}, `The line encloses the highest ${100 - get("percentile")} % ` +
      `of what the model saw, values above ${percentile(upsampled(index, which), get("percentile")).toPrecision(3)}.`));
    if (sources[which].note) lines.push(h("p", {class: "small"}, sources[which].note));
    return lines;
  }

  let turn = 0;
  async function draw() {
    const mine = ++turn, {pictures: all, sources, answers} = get("data"), index = get("picture");
    [picture, source, view, opacity, level, line, parts].forEach(control => control.fill());
    if (get("message")) message.textContent = get("message");
    if (!answers[get("source")][index]) {  // a recorded net has not seen the reader's own photograph
      return set("source", answers.findIndex(answer => answer[index]));
    }
    const which = get("source"), here = sources.map((_, i) => i).filter(i => answers[i][index]);
    const shown = get("view") === "all" ? here : [which];
    const [rgba] = await Promise.all([photograph(index), ...[which, ...shown].map(i => prepare(index, i))]);
    if (mine !== turn) return;  // another choice was made meanwhile
    body.className = get("view") === "over" ? "body one" : `body ${get("view")}`;
    const figures = shown.map(i => figure(index, i, rgba, sources[i].name, false));
    if (get("view") === "beside") figures.unshift(figure(index, which, rgba, all[index].name, true));
    pictures.replaceChildren(...figures);
    says.replaceChildren(...words(index, which));
    el.dataset.drawn = mine;
  }
  const keys = ["data", "picture", "source", "view", "opacity", "percentile", "contour", "parts", "message"];
  keys.forEach(key => model.on(`change:${key}`, draw));
  draw();
  return () => keys.forEach(key => model.off(`change:${key}`, draw));
}

// For a page without a kernel: the same widget on a model that only remembers.
export function mount(el, state) {
  const listeners = {};
  render({el, model: {
    get: key => state[key],
    set(key, value) {
      const changed = state[key] !== value;
      state[key] = value;
      if (changed) (listeners[`change:${key}`] ?? []).forEach(listener => listener());
    },
    save_changes() {},
    on(event, listener) { (listeners[event] ??= []).push(listener); },
    off() {},
  }});
}

export default {render};
