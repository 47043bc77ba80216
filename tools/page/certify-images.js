"use strict";
/* Draw, pick or open an image; a network answers, with the certificate of its answer. */

const byId = (id) => document.getElementById(id);
const opened = {}; // promises of networks, by name
const CLEAR = 4; // of the digits: one that everybody reads, shown at the start
const PEN = 4.5, SIDE = 32; // of the bitmap whose 4 x 4 blocks are the pixels of a digit
let current = null; // {network, x, answer, direction} of the image that is shown
let turns = 0; // images chosen so far
let strokes = []; // of the drawing: lists of points in [0, 1]^2

/* The network of this name; a large one stands in a file of its own, read on first use. */
const load = (name) => (opened[name] ??= read(name));

async function read(name) {
  if (!NETWORKS[name])
    await new Promise((resolve, reject) => {
      const script = document.createElement("script");
      Object.assign(script, { src: `certify-${name}.js`, onload: resolve, onerror: reject });
      document.head.append(script);
    });
  const data = NETWORKS[name];
  return data.deflated ? openNetwork(data, await inflated(data.deflated)) : openNetwork(data);
}

/* Pixels (C, H, W) in [0, 1] as a picture; one channel is ink on paper. */
function picture([channels, height, width], x) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const image = new ImageData(width, height), pixels = height * width;
  for (let i = 0; i < pixels; i++) {
    for (let c = 0; c < 3; c++)
      image.data[4 * i + c] = 255 * (channels === 1 ? 1 - x[i] : x[c * pixels + i]);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas.toDataURL();
}

function show(id, shape, x, alt) {
  Object.assign(byId(id), { src: picture(shape, x), alt });
}

/* Show the answer for pixels x (C, H, W) in [0, 1]; `what` they are, in words. */
async function answerFor(name, x, what, button = null) {
  const turn = ++turns, start = performance.now();
  for (const pick of document.querySelectorAll(".picks button")) pick.ariaPressed = pick === button;
  byId("answer").textContent = opened[name] ? "" : "The network is being read.";
  let network;
  try {
    network = await load(name);
  } catch {
    byId("answer").textContent = `The network could not be read: certify-${name}.js is missing.`;
  }
  if (!network || turn !== turns) return; // or another image was chosen meanwhile
  const answer = certify(network, x), { y, rival, radius } = answer, word = network.classes;
  const milliseconds = Math.ceil(performance.now() - start);
  byId("answer").textContent = radius > 0
    ? `${word[y]}: no image within distance ${roundedDown(radius)} of this one gets another answer.`
    : `${word[y]}: nothing is certified here, the margin is within the rounding error.`;
  await new Promise((done) => setTimeout(done)); // the answer is seen before the rest is computed
  if (turn !== turns) return;
  const slope = marginGradient(network, x, y, rival), length = Math.hypot(...slope);
  current = { network, x, answer, direction: slope.map((value) => -value / (length || 1)) };
  byId("radius").textContent = roundedDown(radius);
  byId("rival").textContent = word[rival];
  byId("margin").textContent = signed(answer.margin, 4);
  byId("K").textContent = signed(answer.K, 4);
  byId("logits").replaceChildren(...word.map((name, j) => {
    const row = document.createElement("li");
    row.textContent = `${name} ${signed(answer.logits[j], 2)}`;
    if (j === y) row.className = "chosen";
    return row;
  }));
  byId("about").textContent = `Answered and certified here in ${milliseconds} ms. ${network.about}`;
  show("seen", network.shape, x, `What the network sees: ${what}`);
  byId("multiple").value = 1;
  byId("result").hidden = false;
  showChanged();
}

const signed = (value, digits) => value.toFixed(digits).replace("-", "−");

/* x moved in a direction until it is this far away, or as far as pixels in [0, 1] let it be. */
function movedBy(distance, x, direction) {
  distance *= 1 - 1e-12; // for the rounding of lengths
  const at = (t) => x.map((v, i) => Math.min(1, Math.max(0, v + t * direction[i])));
  const length = (there) => Math.hypot(...there.map((v, i) => v - x[i]));
  let [low, high] = [0, distance];
  while (length(at(high)) < distance && high < 1e3) [low, high] = [high, 2 * high];
  for (let step = 0; step < 40; step++) {
    const middle = (low + high) / 2;
    [low, high] = length(at(middle)) < distance ? [middle, high] : [low, middle];
  }
  return at(low);
}

/* The image at the chosen distance, in the direction in which the margin falls fastest at x. Where
   nothing is certified, steps are of 0.1. */
function showChanged() {
  const { network, x, answer, direction } = current, { classes, shape } = network;
  const multiple = Number(byId("multiple").value), distance = multiple * (answer.radius || 0.1);
  const changed = movedBy(distance, x, direction);
  const there = certify(network, changed), change = changed.map((v, i) => v - x[i]);
  const most = change.reduce((a, b) => Math.max(a, Math.abs(b)), 0), factor = 0.5 / (most || 0.5);
  const same = there.y === answer.y, far = roundedDown(Math.hypot(...change) * (1 + 1e-12));
  const promise = distance <= answer.radius ? "as it must be"
    : same ? "though nothing promises it" : "as it may be beyond the radius";
  const moved = answer.radius > 0 ? `${multiple.toFixed(2)} × the certified radius` : far;
  byId("multiple-text").textContent = byId("multiple").ariaValueText = moved;
  const verdict = `${same ? "the same answer" : "another answer"}, ${promise}`;
  byId("changed-text").textContent = `Moved by ${far}: ${classes[there.y]}, ${verdict}.`;
  byId("change-text").textContent = `The change alone, its contrast times ${factor.toFixed(1)}.`;
  show("changed", shape, changed, `The image moved by ${far}, answered ${classes[there.y]}`);
  show("change", shape, change.map((v) => 0.5 + factor * v), "The change of each pixel; grey is no change");
}

/* Buttons with images that come with the page. */
function offer(id, name, shape, words) {
  const buttons = (IMAGES[name] ?? []).map(({ pixels, target }, i) => {
    const x = Float64Array.from(atob(pixels), (byte) => byte.charCodeAt(0) / 255);
    const button = document.createElement("button"), image = document.createElement("img");
    Object.assign(image, { src: picture(shape, x), alt: `test image ${i + 1}: ${words[target]}` });
    button.type = "button";
    button.append(image);
    button.onclick = () => answerFor(name, x, `test image ${i + 1}, labelled ${words[target]}`, button);
    return button;
  });
  byId(id).replaceChildren(...buttons);
}

/* The strokes as scikit-learn's digits were made: scaled to a bitmap of 32 x 32, of which blocks of
   4 x 4 are counted. */
function drawnDigit() {
  const all = strokes.flat(), [xs, ys] = [0, 1].map((k) => all.map((point) => point[k]));
  const box = [xs, ys].map((v) => [Math.min(...v), Math.max(...v)]);
  const size = Math.max(...box.map(([low, high]) => high - low), 0.05), scale = (SIDE - PEN) / size;
  const place = (point) => point.map((v, k) => SIDE / 2 + scale * (v - (box[k][0] + box[k][1]) / 2));
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  paint(canvas.getContext("2d", { willReadFrequently: true }), PEN, place, "black");
  const ink = canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE).data, x = new Float64Array(64);
  for (let i = 0; i < SIDE * SIDE; i++)
    x[8 * Math.floor(i / SIDE / 4) + Math.floor((i % SIDE) / 4)] += ink[4 * i + 3] / 255;
  return x.map((sum) => Math.round(sum) / 16);
}

function paint(context, width, place, colour) {
  Object.assign(context, { lineWidth: width, lineCap: "round", lineJoin: "round", strokeStyle: colour });
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(...place(stroke[0]));
    for (const point of stroke) context.lineTo(...place(point));
    context.stroke();
  }
}

function showDrawing() {
  const canvas = byId("drawing"), context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  paint(context, canvas.width / 12, (point) => point.map((v) => v * canvas.width), "#111");
  if (strokes.length) return;
  Object.assign(context, { font: "1rem system-ui", textAlign: "center", fillStyle: "#59637a" });
  context.fillText("here", canvas.width / 2, canvas.height / 2);
}

function drawWith(event) {
  const canvas = byId("drawing"), box = canvas.getBoundingClientRect();
  const point = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  if (event.type === "pointerdown") {
    canvas.setPointerCapture(event.pointerId);
    strokes.push([point]);
  } else if (canvas.hasPointerCapture(event.pointerId)) strokes.at(-1)?.push(point);
  showDrawing();
  if (event.type === "pointerup" && strokes.length)
    answerFor("digits", drawnDigit(), "your drawing, as 8 by 8 pixels");
}

/* The middle square of a picture from a file, on white, as 32 x 32 pixels (C, H, W). */
async function openFile(file) {
  const bitmap = await createImageBitmap(file), side = Math.min(bitmap.width, bitmap.height);
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  const context = canvas.getContext("2d");
  Object.assign(context, { fillStyle: "white", imageSmoothingQuality: "high" });
  context.fillRect(0, 0, SIDE, SIDE);
  const corner = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
  context.drawImage(bitmap, ...corner, side, side, 0, 0, SIDE, SIDE);
  const { data } = context.getImageData(0, 0, SIDE, SIDE), pixels = SIDE * SIDE;
  return Float64Array.from({ length: 3 * pixels }, (_, i) =>
    data[4 * (i % pixels) + Math.floor(i / pixels)] / 255);
}

function startImages() {
  offer("digits", "digits", [1, 8, 8], NETWORKS.digits.classes);
  offer("photographs", "cifar10", [3, 32, 32], CIFAR10.classes);
  byId("photograph-classes").textContent = CIFAR10.classes.join(", ");
  byId("photograph-size").textContent = CIFAR10.megabytes;
  byId("multiple").oninput = showChanged;
  const canvas = byId("drawing");
  canvas.onpointerdown = canvas.onpointermove = canvas.onpointerup = drawWith;
  byId("clear").onclick = () => {
    strokes = [];
    showDrawing();
  };
  byId("file").onclick = () => load("cifar10").catch(() => {}); // while the visitor looks for a file
  byId("file").onchange = async ({ target }) => {
    if (!target.files.length) return;
    let x;
    try {
      x = await openFile(target.files[0]);
    } catch {
      byId("answer").textContent = "This file is no picture that your browser can read.";
      return;
    }
    answerFor("cifar10", x, "the middle of your picture, as 32 by 32 pixels");
  };
  showDrawing();
  byId("digits").children[CLEAR].click();
  addEventListener("pointerup", () => byId("answer").classList.add("stays"), { once: true });
}

startImages();
