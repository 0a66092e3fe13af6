"use strict";
// The two networks of the interactive page, as the package has them: MLP, p(x | z) of a VAE, and DenoisingUNet,
// E[x_0 | x_t] of a diffusion that predicts levels. A test holds what they give against PyTorch. Images are flat, one
// channel after the other, row by row; sums are in double precision.

class Network {
  // tensors: name -> {shape, values}, values in base64 of little-endian float32.
  constructor(tensors) {
    this.tensors = {};
    for (const [name, { shape, values }] of Object.entries(tensors)) {
      this.tensors[name] = { shape, values: Network.unpack(values) };
    }
  }

  static unpack(text) {
    const characters = atob(text), bytes = new Uint8Array(characters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
    return new Float32Array(bytes.buffer);
  }

  weight(name) {
    return this.tensors[`${name}.weight`];
  }

  bias(name) {
    return this.tensors[`${name}.bias`].values;
  }

  linear(name, x) {
    const { shape: [rows, columns], values } = this.weight(name);
    const out = Float64Array.from(this.bias(name));
    for (let i = 0, k = 0; i < rows; i++) {
      let sum = 0;
      for (let j = 0; j < columns; j++) sum += values[k++] * x[j];
      out[i] += sum;
    }
    return out;
  }

  // A convolution of odd size, its input continued by zeros, so that the size stays.
  conv(name, x, size) {
    const { shape: [outs, ins, width], values } = this.weight(name);
    const bias = this.bias(name), half = (width - 1) / 2, area = size * size;
    const out = new Float64Array(outs * area);
    for (let o = 0, k = 0; o < outs; o++) {
      out.fill(bias[o], o * area, (o + 1) * area);
      for (let i = 0; i < ins; i++) {
        for (let dy = -half; dy <= half; dy++) {
          for (let dx = -half; dx <= half; dx++, k++) {
            const w = values[k];
            for (let y = Math.max(0, -dy); y < Math.min(size, size - dy); y++) {
              const to = o * area + y * size, from = i * area + (y + dy) * size + dx;
              for (let c = Math.max(0, -dx); c < Math.min(size, size - dx); c++) out[to + c] += w * x[from + c];
            }
          }
        }
      }
    }
    return out;
  }

  // Each of 8 groups of channels to mean 0 and variance 1, then a scale and a shift per channel.
  groupNorm(name, x, groups = 8) {
    const scale = this.weight(name).values, shift = this.bias(name), each = x.length / groups;
    const area = x.length / scale.length, out = new Float64Array(x.length);
    for (let start = 0; start < x.length; start += each) {
      let mean = 0, variance = 0;
      for (let i = start; i < start + each; i++) mean += x[i] / each;
      for (let i = start; i < start + each; i++) variance += (x[i] - mean) ** 2 / each;
      for (let i = start; i < start + each; i++) {
        const channel = Math.floor(i / area);
        out[i] = ((x[i] - mean) / Math.sqrt(variance + 1e-5)) * scale[channel] + shift[channel];
      }
    }
    return out;
  }
}

const silu = (x) => x.map((v) => v / (1 + Math.exp(-v)));
const add = (x, y) => x.map((v, i) => v + y[i]);

function concat(x, y) {
  const out = new Float64Array(x.length + y.length);
  out.set(x);
  out.set(y, x.length);
  return out;
}

// Halve the size of an image by means of 2 x 2, or double it by repetition.
function halved(x, size) {
  const half = size / 2, out = new Float64Array(x.length / 4);
  for (let i = 0; i < out.length; i++) {
    const top = 2 * Math.floor(i / half) * size + 2 * (i % half);
    out[i] = (x[top] + x[top + 1] + x[top + size] + x[top + size + 1]) / 4;
  }
  return out;
}

function doubled(x, size) {
  const twice = 2 * size, out = new Float64Array(4 * x.length);
  for (let i = 0; i < out.length; i++) {
    out[i] = x[Math.floor(Math.floor(i / twice) / 2) * size + Math.floor((i % twice) / 2)];
  }
  return out;
}

// Logits of `levels` for each pixel, levels first, to probabilities in place.
function softmax(logits, levels) {
  const pixels = logits.length / levels;
  for (let i = 0; i < pixels; i++) {
    let highest = -Infinity, sum = 0;
    for (let l = 0; l < levels; l++) highest = Math.max(highest, logits[l * pixels + i]);
    for (let l = 0; l < levels; l++) sum += logits[l * pixels + i] = Math.exp(logits[l * pixels + i] - highest);
    for (let l = 0; l < levels; l++) logits[l * pixels + i] /= sum;
  }
  return logits;
}

// Mean and variance of each pixel under probabilities of the values in `grid`.
function moments(probabilities, grid) {
  const pixels = probabilities.length / grid.length;
  const mean = new Float64Array(pixels), variance = new Float64Array(pixels);
  for (let k = 0; k < probabilities.length; k++) mean[k % pixels] += probabilities[k] * grid[Math.floor(k / pixels)];
  for (let k = 0; k < probabilities.length; k++) {
    variance[k % pixels] += probabilities[k] * (grid[Math.floor(k / pixels)] - mean[k % pixels]) ** 2;
  }
  return { mean, variance };
}

// A level for each pixel: the first whose cumulated probability is above the pixel's uniform number.
function draw(probabilities, uniforms) {
  const pixels = uniforms.length, levels = probabilities.length / pixels;
  return Float64Array.from(uniforms, (u, i) => {
    let level = 0;
    for (let sum = probabilities[i]; sum <= u && level < levels - 1; sum += probabilities[level * pixels + i]) level++;
    return level;
  });
}

// p(x | z) of the VAE: the probability of every level of every pixel.
class Decoder extends Network {
  constructor(tensors, levels) {
    super(tensors);
    this.levels = levels;
    this.grid = Array.from({ length: levels }, (_, level) => level);
  }

  decode(z) {
    let h = this.linear("network.first.embed.1", z);
    for (let i = 0; `network.rest.${i}.weight` in this.tensors; i++) h = this.linear(`network.rest.${i}`, silu(h));
    return softmax(h, this.levels);
  }
}

// A diffusion on levels: schedule, denoiser, and one step of the reverse chain.
class Denoiser extends Network {
  constructor(tensors, schedule, levels, size) {
    super(tensors);
    Object.assign(this, { schedule, levels, size, steps: schedule.alpha.length - 1 });
    this.grid = Array.from({ length: levels }, (_, level) => (2 * level) / (levels - 1) - 1);
  }

  embed(time) {
    const angles = this.tensors["time.frequencies"].values;
    const waves = concat(Float64Array.from(angles, (f) => Math.sin(f * time)), Float64Array.from(angles, (f) => Math.cos(f * time)));
    return silu(this.linear("time.layers.2", silu(this.linear("time.layers.0", waves))));
  }

  block(name, x, size, embedded) {
    const h = this.groupNorm(`${name}.norm2`, this.conv(`${name}.conv1`, silu(this.groupNorm(`${name}.norm1`, x)), size));
    const modulation = this.linear(`${name}.modulation`, embedded), channels = modulation.length / 2;
    const area = size * size;
    const modulated = h.map((v, i) => {
      const channel = Math.floor(i / area);
      return v * (1 + modulation[channel]) + modulation[channels + channel];
    });
    const skip = `${name}.skip.weight` in this.tensors ? this.conv(`${name}.skip`, x, size) : x;
    return add(skip, this.conv(`${name}.conv2`, silu(modulated), size));
  }

  unet(x, time) {
    const embedded = this.embed(time), kept = [];
    let size = this.size, h = this.conv("first", x, size);
    for (let i = 0; `down.${i}.conv1.weight` in this.tensors; i++) {
      if (i > 0) {
        h = halved(h, size);
        size /= 2;
      }
      kept.push((h = this.block(`down.${i}`, h, size, embedded)));
    }
    h = this.block("middle", h, size, embedded);
    for (let i = kept.length - 1; i >= 0; i--) {
      h = this.block(`up.${i}`, concat(h, kept[i]), size, embedded);
      if (i > 0) {
        h = doubled(h, size);
        size *= 2;
      }
    }
    return this.conv("last.2", silu(this.groupNorm("last.0", h)), size);
  }

  // x_t = alpha x_0 + sigma noise, x_0 in [-1, 1].
  noised(x0, t, noise) {
    const alpha = this.schedule.alpha[t], sigma = this.schedule.sigma[t];
    return x0.map((v, i) => alpha * v + sigma * noise[i]);
  }

  // p(x_0 | x_t): the network's logits, and by Bayes' rule what the known noise says of each level.
  denoise(xt, t) {
    const alpha = this.schedule.alpha[t], sigma = this.schedule.sigma[t], pixels = xt.length;
    const logits = this.unet(xt, t / this.steps);
    for (let k = 0; k < logits.length; k++) {
      logits[k] -= ((xt[k % pixels] - alpha * this.grid[Math.floor(k / pixels)]) / sigma) ** 2 / 2;
    }
    const probabilities = softmax(logits, this.levels);
    return { probabilities, ...moments(probabilities, this.grid) };
  }

  // p(x_{t-1} | x_t), a Normal, for t > 1.
  reverse(xt, t, denoised) {
    const { from_clean: clean, from_noisy: noisy, spread } = this.schedule;
    return {
      mean: xt.map((v, i) => clean[t] * denoised.mean[i] + noisy[t] * v),
      scale: denoised.variance.map((v) => Math.sqrt(spread[t] ** 2 + clean[t] ** 2 * v)),
    };
  }
}

if (typeof module !== "undefined") module.exports = { Decoder, Denoiser, Network, moments, draw };
