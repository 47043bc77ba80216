"use strict";
/* Two moons: the boundary and the certified band of the committed networks, and the certified disc
   of a point that the visitor moves. */

const VIEW = { left: -1.5, right: 2.5, bottom: -1.05, top: 1.55 };
const COLUMNS = 129, ROWS = 84; // of the points at which a network is evaluated
const fields = new Map(); // network: its {values, open}
const point = { x: 0.3, y: 0.75 };

/* The network of the chosen margin and slack, opened, and its logits' difference on a grid. */
function chosen() {
  const epsilon = MOONS.epsilons[byId("epsilon").value], p = MOONS.ps[byId("slack").value];
  const data = MOONS.networks.find((n) => n.epsilon === epsilon && n.p === p);
  if (!fields.has(data)) {
    const network = openNetwork(data), values = new Float64Array(COLUMNS * ROWS);
    for (let i = 0; i < values.length; i++) {
      const x = VIEW.left + ((i % COLUMNS) / (COLUMNS - 1)) * (VIEW.right - VIEW.left);
      const y = VIEW.top - (Math.floor(i / COLUMNS) / (ROWS - 1)) * (VIEW.top - VIEW.bottom);
      const [outer, inner] = activations(network, Float64Array.of(x, y)).at(-1);
      values[i] = inner - outer;
    }
    fields.set(data, { network, values });
  }
  return fields.get(data);
}

/* A colour of the style sheet, #rrggbb, and as [red, green, blue]. */
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (name) => [1, 3, 5].map((i) => parseInt(css(name).slice(i, i + 2), 16));

/* The plane: where the margin is below K epsilon lies the band that is not certified at epsilon. */
function paintPlane(context, { network, values }) {
  const { width, height } = context.canvas, image = context.createImageData(width, height);
  const sides = [colour("--outer"), colour("--inner")], band = colour("--band");
  const margin = network.K[0][1] * network.epsilon;
  for (let i = 0; i < width * height; i++) {
    const a = ((i % width) / (width - 1)) * (COLUMNS - 1.001);
    const b = (Math.floor(i / width) / (height - 1)) * (ROWS - 1.001);
    const at = Math.floor(b) * COLUMNS + Math.floor(a), s = a % 1, t = b % 1;
    const above = values[at] * (1 - s) + values[at + 1] * s;
    const below = values[at + COLUMNS] * (1 - s) + values[at + COLUMNS + 1] * s;
    const value = above * (1 - t) + below * t;
    image.data.set(Math.abs(value) < margin ? band : sides[Number(value > 0)], 4 * i);
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

/* The boundary: in each cell of the grid, from side to side where the sign changes. */
function paintBoundary(context, { values }) {
  const across = context.canvas.width / (COLUMNS - 1), down = context.canvas.height / (ROWS - 1);
  Object.assign(context, { strokeStyle: css("--ink"), lineWidth: 2.5, lineCap: "round" });
  context.beginPath();
  for (let row = 0; row < ROWS - 1; row++)
    for (let column = 0; column < COLUMNS - 1; column++) {
      const corners = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([i, j]) =>
        [column + i, row + j, values[(row + j) * COLUMNS + column + i]]);
      const crossings = corners.map((a, k) => [a, corners[(k + 1) % 4]])
        .filter(([a, b]) => a[2] > 0 !== b[2] > 0)
        .map(([a, b]) => [0, 1].map((k) => a[k] + ((b[k] - a[k]) * a[2]) / (a[2] - b[2])));
      crossings.forEach(([i, j], k) =>
        context[k % 2 ? "lineTo" : "moveTo"](i * across, j * down));
    }
  context.stroke();
}

function paintPoints(context, place) {
  const colours = [css("--outer-point"), css("--inner-point")];
  for (const [x, y, target] of MOONS.points) {
    const [a, b] = place(x, y);
    context.fillStyle = colours[target];
    context.beginPath();
    if (target) context.rect(a - 2.4, b - 2.4, 4.8, 4.8);
    else context.arc(a, b, 2.8, 0, 7);
    context.fill();
  }
}

function paintDisc(context, place, scale, radius) {
  const [a, b] = place(point.x, point.y);
  Object.assign(context, { strokeStyle: css("--ink"), fillStyle: css("--ink"), lineWidth: 2.5 });
  context.beginPath();
  context.arc(a, b, radius * scale, 0, 2 * Math.PI);
  context.stroke();
  context.beginPath();
  context.arc(a, b, 5, 0, 2 * Math.PI);
  context.fill();
}

function showMoons() {
  const field = chosen(), { network } = field, context = byId("plane").getContext("2d");
  const scale = context.canvas.width / (VIEW.right - VIEW.left);
  const place = (x, y) => [(x - VIEW.left) * scale, (VIEW.top - y) * scale];
  const { y, radius, margin, K } = certify(network, Float64Array.of(point.x, point.y));
  paintPlane(context, field);
  paintBoundary(context, field);
  paintPoints(context, place);
  paintDisc(context, place, scale, radius);
  const [epsilon, x, up] = [network.epsilon, point.x, point.y].map((value) => value.toFixed(2));
  for (const [id, text] of Object.entries({ epsilon, slack: String(network.p), x, y: up })) {
    byId(`${id}-text`).textContent = text;
    byId(id).ariaValueText = text;
  }
  const kept = radius > network.epsilon ? "outside the band" : "inside the band";
  const text = `(${x}, ${up}) is ${network.classes[y]}, certified within ${roundedDown(radius)}: ${kept}.`;
  byId("moons-answer").textContent = text;
  byId("plane").ariaLabel = `Two moons with boundary and certified band. The point ${text}`;
  byId("moons-numbers").textContent =
    `Margin ${margin.toFixed(3)}, K ${K.toFixed(3)}. Of ${network.size.toLocaleString("en")} test points ` +
    `${(100 * network.cra).toFixed(2)} % are right and certified at ${epsilon} (committed result).`;
}

function movePoint(event) {
  if (event.type === "pointermove" && !event.buttons) return;
  const canvas = byId("plane"), box = canvas.getBoundingClientRect();
  canvas.setPointerCapture(event.pointerId);
  const inside = (part, low, high) => low + Math.min(1, Math.max(0, part)) * (high - low);
  point.x = inside((event.clientX - box.left) / box.width, VIEW.left, VIEW.right);
  point.y = inside((box.bottom - event.clientY) / box.height, VIEW.bottom, VIEW.top);
  byId("x").value = point.x;
  byId("y").value = point.y;
  showMoons();
}

function startMoons() {
  for (const [id, choices] of [["epsilon", MOONS.epsilons], ["slack", MOONS.ps]]) {
    byId(id).max = choices.length - 1;
    byId(id).value = Math.max(choices.indexOf(0.15), choices.indexOf(0.01));
    byId(id).oninput = showMoons;
  }
  for (const [id, low, high] of [["x", VIEW.left, VIEW.right], ["y", VIEW.bottom, VIEW.top]]) {
    Object.assign(byId(id), { min: low, max: high, step: 0.01, value: point[id] });
    byId(id).oninput = () => {
      point[id] = Number(byId(id).value);
      showMoons();
    };
  }
  byId("plane").onpointerdown = byId("plane").onpointermove = movePoint;
  matchMedia("(prefers-color-scheme: dark)").onchange = showMoons;
  showMoons();
}

startMoons();
