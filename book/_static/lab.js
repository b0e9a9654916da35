// The page "Try it": choose, draw or bring a picture, paint over it, and see what the network says at once.
import {drawBird, sheet} from "./lab_bird.js";
import {view} from "./lab_input.js";
import {partOf} from "./lab_look.js";
import {get, loadNetwork, softmax} from "./lab_network.js";

const BASE = new URL(".", import.meta.url), GREY = "#808080";
const LARGEST = 640, KEPT = 4096;  // px, longer side of a photograph: as it is shown, and as a second look cuts from it
const FORM = `
<fieldset class="lab-line"><legend>Picture</legend>
  <label><input type="radio" name="lab-mode" value="species" checked> a species of the guide</label>
  <label><input type="radio" name="lab-mode" value="draw"> a bird that you draw</label>
  <label><input type="radio" name="lab-mode" value="photo"> your own photograph</label>
</fieldset>
<div class="lab-grid" data-for="species draw">
  <label>Group <select data-id="group"></select></label>
  <label>Species <select data-id="member"></select></label>
</div>
<div class="lab-grid" data-for="draw" data-id="attributes"></div>
<div data-for="photo">
  <label>Photograph <input type="file" accept="image/*" data-id="file"></label>
  <p>It stays in this page: nothing is sent anywhere. You can also drop it on the picture. A large one is first made
  smaller, to ${LARGEST} pixels; a second look cuts its part from the photograph itself.</p>
  <p><strong>This network knows the drawn species of the guide and nothing else.</strong> On a photograph its answer
  means nothing; you only see how mask and answer move. <a href="05_training_on_cub.html">Chapter 5</a> trains on
  photographs, and the <a href="api.html">package</a> takes any of timm's backbones.</p>
</div>
<div class="lab-main">
  <div class="lab-picture">
    <canvas tabindex="0" role="img" aria-describedby="lab-help" data-id="picture"></canvas>
    <p id="lab-help" class="lab-small">Drag on the picture. With the keyboard: go to the picture and press an arrow key.
    The patch moves, with Shift by single pixels; Ctrl+Z takes a step back.</p>
  </div>
  <div class="lab-answer">
    <h3>What the network says</h3>
    <p data-id="change"></p>
    <table><caption>The five likeliest species</caption>
      <thead><tr><th scope="col">species</th><th scope="col">probability</th><th scope="col">untouched</th></tr></thead>
      <tbody></tbody></table>
    <p class="lab-small" data-id="numbers"></p>
    <div class="lab-line"><label><input type="checkbox" data-id="twice" aria-describedby="lab-twice"> second
      look</label></div>
    <p id="lab-twice" class="lab-small">Cuts out the part where the mask is high, and asks the network again.</p>
  </div>
  <div class="lab-picture" data-second hidden>
    <canvas class="lab-part" role="img" data-id="closer"></canvas>
    <p class="lab-small" data-id="cut"></p>
  </div>
  <div class="lab-answer" data-second hidden>
    <h3>What both looks say</h3>
    <p data-id="both"></p>
    <table><caption>The five likeliest species by both</caption>
      <thead><tr><th scope="col">species</th><th scope="col">first</th><th scope="col">second</th>
        <th scope="col">both</th></tr></thead>
      <tbody data-id="looks"></tbody></table>
  </div>
  <div class="lab-tools">
    <fieldset class="lab-line"><legend>Tool</legend>
      <label><input type="radio" name="lab-tool" value="patch" checked> grey patch</label>
      <label><input type="radio" name="lab-tool" value="brush"> brush</label>
      <button type="button" data-id="undo">Undo</button>
      <button type="button" data-id="clear">Clear</button>
    </fieldset>
    <label class="lab-slider">Size <output data-id="px"></output>
      <input type="range" min="6" max="160" step="2" data-id="size"></label>
    <fieldset class="lab-colours"><legend>Colour of the brush: <span data-id="colour"></span></legend></fieldset>
    <div class="lab-line"><label><input type="checkbox" checked data-id="show"> show the mask</label></div>
    <label class="lab-slider">Opacity of the mask <input type="range" min="0" max="1" step="0.05" value="0.4"
      data-id="opacity"></label>
  </div>
  <div class="lab-card">
    <section data-for="species" aria-label="Species card">
      <h3 data-id="name"></h3>
      <dl></dl>
      <p>Its group:</p>
      <div class="lab-group"></div>
      <form data-id="guess">
        <label>Which part tells it from the other three? <select data-id="part" required></select></label>
        <button>Check</button>
      </form>
      <p role="status" data-id="verdict"></p>
      <div class="lab-line" data-id="reveal"><label><input type="checkbox" data-id="mark"> mark its place</label></div>
      <p class="lab-small" data-id="there"></p>
    </section>
    <p data-for="draw" data-id="drawn"></p>
  </div>
</div>
<p role="status" class="lab-hidden" data-id="live"></p>`;

const percent = share => `${Math.round(100 * share)} %`;
const options = (list, texts) => list.replaceChildren(...texts.map((text, i) => new Option(text, i)));

async function start(root) {
  const status = root.querySelector(".lab-status");
  const say = text => { status.textContent = text; status.hidden = !text; };
  try {
    say("Loading the network and ONNX Runtime ...");
    const data = await (await get(new URL("lab/lab.json", BASE))).json();
    const predict = await loadNetwork(BASE, data.model);
    const form = document.createElement("div");
    form.innerHTML = FORM;
    root.append(form);
    await run(root, form, data, predict, say);
  } catch (error) {
    say(error.message);
  }
}

async function run(root, form, data, predict, say) {
  const id = name => form.querySelector(`[data-id="${name}"]`);
  const chosen = name => form.querySelector(`[name="lab-${name}"]:checked`).value;
  const canvas = form.querySelector("canvas"), pen = canvas.getContext("2d");
  const groups = [...new Set(data.species.map(s => s.group))], guessed = new Set(), size = {patch: 60, brush: 16};
  const files = new Map();  // name -> promise of a decoded picture
  let species = data.species[1], before = null, touched = {strokes: [], patch: null}, history = [];
  let base = null, whole = null;  // the picture as it is shown, and in its full resolution
  let title = "", colour = ["middle grey", GREY], wanted = false, running = false, timer = 0, turn = 0;

  // -- the picture, what is painted on it, and what is shown over it ---------------------------------------------

  function picture(name) {
    if (!files.has(name)) {
      const image = new Image();
      image.src = new URL(`lab/${name}`, BASE);
      files.set(name, image.decode().then(() => image, () => {
        files.delete(name);
        throw new Error(`lab/${name}: this picture cannot be loaded; build the book again with make book`);
      }));
    }
    return files.get(name);
  }

  function painted(picture = base, [x, y, width, height] = [0, 0, picture.width, picture.height]) {
    const pad = sheet(width, height);
    pad.drawImage(picture, -x, -y);
    pad.translate(-x, -y);
    pad.scale(picture.width / base.width, picture.height / base.height);
    pad.lineCap = pad.lineJoin = "round";
    for (const {colour, size, points} of touched.strokes) {
      pad.strokeStyle = colour;
      pad.lineWidth = size;
      pad.beginPath();
      points.forEach(([x, y], i) => i ? pad.lineTo(x, y) : pad.moveTo(x, y));
      if (points.length === 1) pad.lineTo(...points[0]);
      pad.stroke();
    }
    if (touched.patch) {
      const {x, y, side} = touched.patch;
      pad.fillStyle = GREY;
      pad.fillRect(Math.round(x - side / 2), Math.round(y - side / 2), side, side);
    }
    return pad;
  }

  function show(result, second) {
    const {width, height} = base, seen = view(width, height, data.model), [x, y, w, h] = seen.box;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
    pen.drawImage(painted().canvas, 0, 0);
    if (result && id("show").checked) {
      const {side, values} = result.mask, [low, high] = before.range, cells = sheet(side);
      const colours = cells.createImageData(side, side);
      values.forEach((value, i) => {
        const at = Math.min(Math.max(Math.floor(256 * (value - low) / (high - low)), 0), 255);
        colours.data.set([...data.viridis[at], 255], 4 * i);
      });
      cells.putImageData(colours, 0, 0);
      pen.globalAlpha = Number(id("opacity").value);
      pen.drawImage(cells.canvas, x, y, w, h);
      pen.globalAlpha = 1;
    }
    dim(pen, width, height, seen.box);
    if (revealed() && id("mark").checked) line(() => pen.arc(...species.place, width / 22, 0, 2 * Math.PI));
    for (const part of form.querySelectorAll("[data-second]")) part.hidden = !second;
    if (second) showPart(second);
  }

  function showPart({box, part}) {
    const [x, y, w, h] = box, zoom = base.width / whole.width;
    line(() => pen.rect(x * zoom, y * zoom, w * zoom, h * zoom));
    const canvas = id("closer"), enlarged = canvas.getContext("2d"), scale = data.kit.size / Math.max(w, h);
    Object.assign(canvas, {width: Math.max(Math.round(w * scale), 1), height: Math.max(Math.round(h * scale), 1)});
    enlarged.imageSmoothingQuality = "high";
    enlarged.drawImage(part, 0, 0, canvas.width, canvas.height);
    enlarged.scale(canvas.width / w, canvas.height / h);
    dim(enlarged, w, h, view(w, h, data.model).box);
    const text = `The part in the box: ${w} by ${h} pixels of ${whole.width} by ${whole.height}, from ${x} across ` +
      `and ${y} down.`;
    id("cut").textContent = text;
    canvas.setAttribute("aria-label", text);
  }

  function dim(pen, width, height, [x, y, w, h]) {  // what the network does not see
    pen.fillStyle = "rgb(0 0 0 / 55%)";
    pen.beginPath();
    pen.rect(0, 0, width, height);
    pen.rect(x, y, w, h);
    pen.fill("evenodd");
  }

  function line(draw) {  // seen on light and on dark
    for (const [width, stroke] of [[5, "black"], [2.5, "white"]]) {
      pen.beginPath();
      draw();
      Object.assign(pen, {lineWidth: width, strokeStyle: stroke}).stroke();
    }
  }

  // -- predictions: at most one under way; what changes meanwhile is taken together into the next -----------------

  function refresh() {
    root.dataset.state = "busy";
    wanted = true;
    if (!running) {
      running = true;
      requestAnimationFrame(step);
    }
  }

  async function step() {
    wanted = false;
    try {
      const of = base, bare = !touched.patch && !touched.strokes.length;
      if (before?.of !== of) {
        const result = await predict(base.getContext("2d").getImageData(0, 0, base.width, base.height));
        before = {of, result, range: [Math.min(...result.mask.values), Math.max(...result.mask.values)]};
      }
      const result = bare ? before.result
        : await predict(painted().getImageData(0, 0, base.width, base.height));
      const second = id("twice").checked && of === base ? await lookCloser(result) : null;
      if (of === base) {
        Object.assign(root, {result, second});
        show(result, second);
        describe(result, second);
      }
    } catch (error) {
      say(error.message);
    }
    if (wanted) return requestAnimationFrame(step);
    running = false;
    root.dataset.state = "idle";
  }

  async function lookCloser(first) {
    const box = partOf(first.mask, whole.width, whole.height, data.model, data.look), pad = painted(whole, box);
    const found = await predict(pad.getImageData(0, 0, box[2], box[3])), weight = data.look.weight;
    const logits = first.logits.map((value, i) => (1 - weight) * value + weight * found.logits[i]);
    return {box, part: pad.canvas, found, logits, probabilities: softmax(logits)};
  }

  function describe(result, second) {
    const p = result.probabilities, was = before.result.probabilities, names = data.species.map(s => s.name);
    const order = p.map((_, i) => i).sort((a, b) => p[b] - p[a]), old = was.indexOf(Math.max(...was));
    const label = i => `${names[i]} ${p[i].toFixed(2)}`, bare = result === before.result;
    const right = names[order[0]] === species.name ? " This is right." : ` This is wrong: it is a ${species.name}.`;
    const verdict = chosen("mode") === "species" ? right : "";
    const left = order[0] === old ? "" : ` (${label(old)})`;
    const text = bare ? `${label(order[0])}.${verdict}`
      : `Was ${names[old]} ${was[old].toFixed(2)}, now ${label(order[0])}${left}.`;
    id("change").textContent = text;
    const twice = second ? describeBoth(result, second) : "";
    form.querySelector("tbody").replaceChildren(...order.slice(0, 5).map(i => {
      const row = document.createElement("tr");
      row.innerHTML = '<th scope="row"></th><td><span class="lab-bar"></span> ' +
        `${p[i].toFixed(3)}</td><td>${was[i].toFixed(3)}</td>`;
      row.firstChild.textContent = names[i];
      row.querySelector(".lab-bar").style.width = `${2.5 * p[i]}em`;
      return row;
    }));
    const m = result.mask.values, mean = m.reduce((a, b) => a + b) / m.length, [low, high] = before.range;
    id("numbers").textContent = `Mask M: mean ${mean.toFixed(3)}, from ${Math.min(...m).toFixed(3)} to ` +
      `${Math.max(...m).toFixed(3)}. Its colours run from ${low.toFixed(2)} (dark) to ${high.toFixed(2)} (bright), ` +
      `as on the untouched picture. Computed in ${result.milliseconds.toFixed(0)} ms.`;
    id("there").textContent = revealed() ? there(result.mask) : "";
    const {patch, strokes} = touched;
    const at = patch && `${Math.round(patch.x)} across and ${Math.round(patch.y)} down`;
    canvas.setAttribute("aria-label", [title, `${base.width} by ${base.height} pixels`,
      strokes.length && `${strokes.length} brush ${strokes.length > 1 ? "strokes" : "stroke"} on it`,
      patch && `a grey patch of ${patch.side} pixels, its centre ${at}`].filter(Boolean).join(", "));
    clearTimeout(timer);  // a screen reader hears where a movement ends, not every step
    timer = setTimeout(() => { id("live").textContent = `${text} ${twice}`; }, 500);
  }

  function describeBoth(first, {found, probabilities: p}) {
    const names = data.species.map(s => s.name), order = p.map((_, i) => i).sort((a, b) => p[b] - p[a]);
    const label = p => `${names[p.indexOf(Math.max(...p))]} ${Math.max(...p).toFixed(2)}`;
    const text = `The second look says ${label(found.probabilities)}, both together ${label(p)}.`;
    id("both").textContent = text;
    id("looks").replaceChildren(...order.slice(0, 5).map(i => {
      const row = document.createElement("tr");
      row.innerHTML = '<th scope="row"></th>' + [first.probabilities, found.probabilities].map(
        q => `<td>${q[i].toFixed(3)}</td>`).join("") + `<td><span class="lab-bar"></span> ${p[i].toFixed(3)}</td>`;
      row.firstChild.textContent = names[i];
      row.querySelector(".lab-bar").style.width = `${2.5 * p[i]}em`;
      return row;
    }));
    return text;
  }

  function there({side, values}) {
    const [x, y, w, h] = view(base.width, base.height, data.model).box;
    const column = Math.floor((species.place[0] - x) / w * side), row = Math.floor((species.place[1] - y) / h * side);
    if (Math.min(column, row) < 0 || Math.max(column, row) >= side)
      return "The place lies outside of what the network sees.";
    const value = values[row * side + column], lower = values.filter(v => v < value).length / values.length;
    return `M in its cell is ${value.toFixed(3)}; ${percent(lower)} of the cells are lower.`;
  }

  // -- which picture ---------------------------------------------------------------------------------------------

  async function turnTo(make) {
    const mine = ++turn;
    root.dataset.state = "busy";
    try {
      const [canvas, name, original = canvas] = await make();
      if (mine !== turn) return;
      base = canvas, whole = original, title = name, touched = {strokes: [], patch: null}, history = [];
      say("");
      refresh();
    } catch (error) {
      say(error.message);
      if (mine === turn) root.dataset.state = "idle";
    }
  }

  function choose() {
    const mode = chosen("mode");
    for (const part of form.querySelectorAll("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(mode);
    if (mode === "species") turnTo(async () => {
      const image = await picture(species.picture), pad = sheet(image.naturalWidth, image.naturalHeight);
      pad.drawImage(image, 0, 0);
      return [pad.canvas, `Drawing of a ${species.name}`];
    });
    if (mode === "draw") turnTo(draw);
    if (mode === "photo") id("file").files[0] ? openPhotograph(id("file").files[0]) : refresh();
  }

  async function draw() {
    const value = name => form.querySelector(`[data-attribute="${name}"]`).value;
    const attributes = Object.fromEntries(Object.keys(data.attributes).map(a => [a, data.attributes[a][value(a)]]));
    const pose = Number(value("pose")), {shading, scenes} = data.kit.poses[pose];
    const away = data.species.map(s => Object.keys(attributes).filter(a => attributes[a] !== s.attributes[a]));
    const least = Math.min(...away.map(a => a.length)), near = away.findIndex(a => a.length === least);
    id("drawn").textContent = least ? `No species of the guide looks like this. A ${data.species[near].name} is the ` +
      `nearest; it differs in ${away[near].join(", ")}.` : `These are the marks of a ${data.species[near].name}.`;
    return [drawBird(data.kit, pose, attributes, await picture(shading), await picture(scenes[value("scene")])),
      `Your drawing: ${Object.entries(attributes).map(([a, v]) => `${a} ${v}`).join(", ")}`];
  }

  function openPhotograph(file) {
    turnTo(async () => {
      const bitmap = await createImageBitmap(file, {imageOrientation: "from-image"}).catch(() => {
        throw new Error(`${file.name}: found no picture that this browser can read, expected JPEG, PNG, WebP or the ` +
          "like; choose another file");
      });
      const small = onWhite(bitmap, LARGEST), large = onWhite(bitmap, KEPT);
      bitmap.close();
      return [small, `Your photograph ${file.name}`, large];
    });
  }

  function onWhite(bitmap, longest) {
    const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
    const pad = sheet(Math.max(Math.round(bitmap.width * scale), 1), Math.max(Math.round(bitmap.height * scale), 1));
    pad.fillStyle = "white";  // below a transparent picture, as loupe_core.open_image has it
    pad.fillRect(0, 0, pad.canvas.width, pad.canvas.height);
    pad.imageSmoothingQuality = "high";
    pad.drawImage(bitmap, 0, 0, pad.canvas.width, pad.canvas.height);
    return pad.canvas;
  }

  // -- the species card ------------------------------------------------------------------------------------------

  const revealed = () => chosen("mode") === "species" && guessed.has(species.group);

  function turnToSpecies(next) {
    species = next;
    const members = data.species.filter(s => s.group === species.group);
    id("group").value = groups.indexOf(species.group);
    options(id("member"), members.map(s => s.name));
    id("member").value = members.indexOf(species);
    id("name").textContent = species.name;
    form.querySelector("dl").replaceChildren(...Object.entries(species.attributes).map(([name, value]) => {
      const row = document.createElement("div");
      row.innerHTML = `<dt>${name}</dt><dd>${value}</dd>`;
      return row;
    }));
    form.querySelector(".lab-group").replaceChildren(...members.map(member => {
      const button = document.createElement("button");
      Object.assign(button, {type: "button", onclick: () => turnToSpecies(member)});
      button.setAttribute("aria-pressed", member === species);
      const image = Object.assign(new Image(), {src: new URL(`lab/${member.picture}`, BASE), alt: "", loading: "lazy"});
      button.append(image, member.name);
      return button;
    }));
    for (const [name, value] of Object.entries(species.attributes))
      form.querySelector(`[data-attribute="${name}"]`).value = data.attributes[name].indexOf(value);
    id("mark").checked = false;
    id("part").value = "";
    tell("");
    choose();
  }

  function tell(opening) {
    const members = data.species.filter(s => s.group === species.group), part = species.differs_in;
    id("reveal").hidden = !revealed();
    id("verdict").textContent = revealed() ? `${opening}The ${part} tells these four apart: ` +
      `${members.map(s => s.attributes[part]).join(", ")}; their other marks are the same.` : "";
  }

  id("guess").addEventListener("submit", event => {
    event.preventDefault();
    guessed.add(species.group);
    tell(id("part").selectedOptions[0].text === species.differs_in ? "Right. " : "Not this one. ");
    refresh();
  });

  // -- tools -----------------------------------------------------------------------------------------------------

  const change = next => {
    touched = {...touched, ...next};
    refresh();
  };
  const remember = () => history.push(touched);
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * base.width / box.width, (event.clientY - box.top) * base.height / box.height];
  };
  const patchAt = (x, y) => change({patch: {
    x: Math.min(Math.max(x, 0), base.width), y: Math.min(Math.max(y, 0), base.height), side: size.patch}});
  function undo() {
    if (history.length) change(history.pop());
  }

  canvas.addEventListener("pointerdown", event => {
    if (event.button || !base) return;
    canvas.setPointerCapture(event.pointerId);
    remember();
    if (chosen("tool") === "patch") return patchAt(...place(event));
    change({strokes: [...touched.strokes, {colour: colour[1], size: size.brush, points: [place(event)]}]});
  });
  canvas.addEventListener("pointermove", event => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    if (chosen("tool") === "patch") return patchAt(...place(event));
    const last = touched.strokes.at(-1);
    change({strokes: [...touched.strokes.slice(0, -1), {...last, points: [...last.points, place(event)]}]});
  });
  canvas.addEventListener("keydown", event => {
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      return undo();
    }
    const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!way || !base) return;
    event.preventDefault();
    if (!event.repeat) remember();
    form.querySelector("[value=patch]").checked = true;
    const far = event.shiftKey ? 1 : 8, {x, y} = touched.patch ?? {x: base.width / 2, y: base.height / 2};
    patchAt(x + far * way[0], y + far * way[1]);
    tools();
  });
  canvas.addEventListener("dragover", event => event.preventDefault());
  canvas.addEventListener("drop", event => {
    event.preventDefault();
    if (!event.dataTransfer.files.length) return;
    form.querySelector("[value=photo]").checked = true;
    id("file").files = event.dataTransfer.files;
    choose();
  });

  function tools() {
    id("size").value = size[chosen("tool")];
    id("px").textContent = `${size[chosen("tool")]} px`;
    id("colour").textContent = colour[0];
  }
  id("undo").onclick = undo;
  id("clear").onclick = () => { remember(); change({strokes: [], patch: null}); };
  id("size").oninput = () => {
    size[chosen("tool")] = Number(id("size").value);
    tools();
    if (chosen("tool") === "patch" && touched.patch) patchAt(touched.patch.x, touched.patch.y);
  };
  for (const name of ["show", "opacity", "mark", "twice"]) id(name).oninput = refresh;
  form.querySelectorAll("[name=lab-tool]").forEach(radio => radio.addEventListener("change", tools));
  form.querySelectorAll("[name=lab-mode]").forEach(radio => radio.addEventListener("change", choose));
  const paints = Object.entries({"middle grey": GREY, ...data.palette});
  form.querySelector(".lab-colours").append(...paints.map(([name, value]) => {
    const label = Object.assign(document.createElement("label"), {title: name});
    label.innerHTML = `<input type="radio" name="lab-colour" aria-label="${name}"><span></span>`;
    label.lastChild.style.background = value;
    label.firstChild.checked = name === colour[0];
    label.firstChild.onchange = () => {
      colour = [name, value];
      form.querySelector("[value=brush]").checked = true;
      tools();
    };
    return label;
  }));

  const {poses} = data.kit;
  const lists = {...data.attributes, pose: poses.map(p => p.name), scene: poses[0].scenes.map((_, i) => i + 1)};
  id("attributes").append(...Object.entries(lists).map(([name, values]) => {
    const label = document.createElement("label"), list = document.createElement("select");
    list.dataset.attribute = name;
    list.onchange = choose;
    options(list, values);
    label.append(`${name === "scene" ? "background" : name} `, list);
    return label;
  }));
  options(id("group"), groups);
  options(id("part"), Object.keys(data.attributes));
  id("part").prepend(new Option("choose a part", ""));
  id("group").onchange = () => turnToSpecies(data.species.find(s => s.group === groups[id("group").value]));
  id("member").onchange = () =>
    turnToSpecies(data.species.filter(s => s.group === species.group)[id("member").value]);
  id("file").onchange = choose;

  const right = document.createElement("p");
  right.className = "lab-small";
  const n = data.species.length, counted = share => Math.round(share * n);
  right.textContent = `Untouched, the network names ${counted(data.right)} of these ${n} pictures rightly; with a second ` +
    `look at each, ${counted(data.right_twice)}. It was trained on other pictures of the same species, with one look. ` +
    `Its file has ${(data.model.bytes / 1e6).toFixed(1)} MB.`;
  form.append(right);
  tools();
  turnToSpecies(species);
}

start(document.querySelector("#lab"));
