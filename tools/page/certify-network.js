"use strict";
/* A network of convolutions, dense layers and MaxMin in double precision, and its certificate.

   Weights are the float32 numbers of a committed run. Values are Float64Arrays, an image channel by
   channel, (C, H, W). K and the rounding of margins come with the network; `tools/browser.py` takes
   them from the proofs of cll. */

const U = 2 ** -53; // unit roundoff of a double

/* What each kind of layer computes, and the transpose of its slope at x, for gradients. */
const KINDS = {
  linear: {
    forward(layer, x) {
      const y = layer.bias.slice();
      product(layer, x, y, false);
      return y;
    },
    backward(layer, x, gradient) {
      const back = new Float64Array(x.length);
      product(layer, back, gradient, true);
      return back;
    },
  },
  convolution: {
    forward(layer, x) {
      const [channels, height, width] = layer.outputs;
      const y = new Float64Array(channels * height * width);
      layer.bias.forEach((bias, c) => y.fill(bias, c * height * width, (c + 1) * height * width));
      convolve(layer, x, y, false);
      return y;
    },
    backward(layer, x, gradient) {
      const back = new Float64Array(x.length);
      convolve(layer, back, gradient, true);
      return back;
    },
  },
  /* Channels i and i + C/2 are a pair: all maxima first, then all minima. */
  maxmin: {
    forward(layer, x) {
      const half = x.length / 2, y = new Float64Array(x.length);
      for (let i = 0; i < half; i++) {
        y[i] = Math.max(x[i], x[i + half]);
        y[i + half] = Math.min(x[i], x[i + half]);
      }
      return y;
    },
    backward(layer, x, gradient) {
      const half = x.length / 2, back = new Float64Array(x.length);
      for (let i = 0; i < half; i++) {
        const [high, low] = x[i] >= x[i + half] ? [i, i + half] : [i + half, i];
        back[high] = gradient[i];
        back[low] = gradient[i + half];
      }
      return back;
    },
  },
};

/* y += W x, or with `transposed` x += W^T y. W: a row of x.length numbers for each output. */
function product({ weight }, x, y, transposed) {
  for (let o = 0, w = 0; o < y.length; o++) {
    if (transposed) for (let i = 0; i < x.length; i++) x[i] += weight[w++] * y[o];
    else {
      let sum = y[o];
      for (let i = 0; i < x.length; i++) sum += weight[w++] * x[i];
      y[o] = sum;
    }
  }
}

/* The same for a convolution: a number of the kernel at (row, column) links output (i, j) with input
   (stride i + row - padding, stride j + column - padding), where there is one. */
function convolve({ weight, inputs, outputs, kernel, stride, padding }, x, y, transposed) {
  const [inChannels, height, width] = inputs, [outChannels, rows, columns] = outputs;
  const first = (tap) => Math.max(0, Math.ceil((padding - tap) / stride));
  const last = (tap, size, most) => Math.min(most, Math.floor((size - 1 + padding - tap) / stride) + 1);
  let w = 0;
  for (let o = 0; o < outChannels; o++)
    for (let c = 0; c < inChannels; c++)
      for (let row = 0; row < kernel; row++)
        for (let column = 0; column < kernel; column++) {
          const factor = weight[w++], from = first(column), to = last(column, width, columns);
          for (let i = first(row); i < last(row, height, rows); i++) {
            const below = (c * height + stride * i + row - padding) * width + column - padding;
            const above = (o * rows + i) * columns;
            if (transposed)
              for (let j = from; j < to; j++) x[below + stride * j] += factor * y[above + j];
            else for (let j = from; j < to; j++) y[above + j] += factor * x[below + stride * j];
          }
        }
}

/* The bytes behind base64. */
const decoded = (text) => Uint8Array.fromBase64 // of browsers since 2025
  ? Uint8Array.fromBase64(text)
  : Uint8Array.from(atob(text), (byte) => byte.charCodeAt(0));

/* The bytes of weights that were deflated: first bytes of all numbers, then second ones, and so on. */
async function inflated(text) {
  const packed = new Blob([decoded(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(packed).arrayBuffer()), n = planes.length / 4;
  const bytes = new Uint8Array(planes.length);
  for (let i = 0; i < n; i++)
    for (let k = 0; k < 4; k++) bytes[4 * i + k] = planes[k * n + i];
  return bytes;
}

/* A network from what the builder wrote. bytes: its weights, one layer after the other. */
function openNetwork(data, bytes = decoded(data.weights)) {
  const numbers = new Float64Array(new Float32Array(bytes.buffer)); // little-endian, as browsers are
  let used = 0;
  const next = (count) => numbers.subarray(used, (used += count));
  const layers = data.layers.map((layer) =>
    layer.weights ? { ...layer, weight: next(layer.weights), bias: next(layer.biases) } : layer);
  return { ...data, weights: undefined, layers };
}

/* [input of each layer, ..., logits] of an input in the range for which `rounding` holds. */
function activations(network, x) {
  const [low, high] = network.range;
  if (x.length !== network.inputs || !x.every((value) => value >= low && value <= high))
    throw new RangeError(`an input is ${network.inputs} numbers from ${low} to ${high}`);
  const values = [x];
  for (const layer of network.layers) values.push(KINDS[layer.kind].forward(layer, values.at(-1)));
  return values;
}

/* The class y and the radius within which it provably cannot change,
     min over j of (f_y - f_j - rounding_yj) / K_yj,   rounded down, at least 0,
   and the class j of this minimum with its margin f_y - f_j and K_yj. */
function certify(network, x) {
  const logits = activations(network, x).at(-1);
  if (!logits.every(Number.isFinite)) throw new RangeError("the logits leave double precision");
  const y = logits.indexOf(Math.max(...logits));
  let radius = Infinity, rival = -1;
  for (let j = 0; j < logits.length; j++) {
    if (j === y) continue;
    // a difference, a difference, a quotient: each is off by at most U of its size
    const margin = (logits[y] - logits[j]) * (1 - 2 * U) - network.rounding[y][j];
    const here = (margin * (1 - 16 * U)) / network.K[y][j];
    if (here < radius) [radius, rival] = [here, j];
  }
  const margin = logits[y] - logits[rival];
  return { logits, y, rival, radius: Math.max(0, radius), margin, K: network.K[y][rival] };
}

/* Slope of f_y - f_j at x, in x. */
function marginGradient(network, x, y, j) {
  const values = activations(network, x);
  let gradient = new Float64Array(values.at(-1).length);
  gradient[y] = 1;
  gradient[j] = -1;
  for (let l = network.layers.length - 1; l >= 0; l--)
    gradient = KINDS[network.layers[l].kind].backward(network.layers[l], values[l], gradient);
  return gradient;
}

/* A radius as text, rounded down. */
function roundedDown(radius, digits = 4) {
  const unit = 10 ** digits;
  return (Math.floor(radius * (1 - 4 * U) * unit) / unit).toFixed(digits);
}
