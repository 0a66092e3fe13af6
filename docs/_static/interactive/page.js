"use strict";
// The interactive page: two panels over the networks of networks.js and the weights of weights.js.

const PIXELS = 64, SIDE = 8;
const COLORS = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#b6992d", "#b07aa1", "#d37295", "#9c755f", "#79706e"];

// -- small things ---------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

// Uniform and Normal numbers from a seed, so that everybody sees the same at first (mulberry32; Box and Muller).
function randomness(seed) {
  const uniform = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return {
    uniforms: (n) => Float64Array.from({ length: n }, uniform),
    normals: (n) => Float64Array.from({ length: n }, normal),
  };
}

const signed = (value, digits = 2) => value.toFixed(digits).replace("-", "\u2212");
const color = (name) => getComputedStyle(document.body).getPropertyValue(`--color-${name}`).trim();

// Where a chain's x in [-1, 1] lies between the lowest and the highest level; beyond, the picture saturates.
const ink = (x) => x.map((v) => (v + 1) / 2);

// An 8 x 8 picture on a canvas of its own: 0 is paper, 1 is ink.
function bitmap(values) {
  const canvas = make("canvas", { width: SIDE, height: SIDE });
  const image = new ImageData(SIDE, SIDE);
  values.forEach((v, i) => image.data.set([...Array(3).fill(255 * (1 - Math.min(1, Math.max(0, v)))), 255], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function paint(context, values, x, y, size) {
  context.imageSmoothingEnabled = false;
  context.drawImage(bitmap(values), x, y, size, size);
}

// A picture with a caption, which is TeX that MathJax sets when the page is loaded.
class Picture {
  constructor(caption, description) {
    this.canvas = make("canvas", { width: 160, height: 160, role: "img", "aria-label": description });
    this.figure = make("figure", {}, this.canvas, make("figcaption", {}, make("span", { class: "tex2jax_process" }, caption)));
  }

  show(values) {
    paint(this.canvas.getContext("2d"), values, 0, 0, 160);
  }
}

function slider(label, attributes, listen) {
  const input = make("input", { type: "range", oninput: () => listen(Number(input.value)), ...attributes });
  return { input, row: make("label", { class: "slider" }, make("span", {}, label), input) };
}

const button = (label, listen, attributes = {}) => make("button", { type: "button", onclick: listen, ...attributes }, label);

// A canvas as large as its place on the page, redrawn when that or the theme changes.
class Drawing {
  constructor(ratio, attributes, draw) {
    this.canvas = make("canvas", attributes);
    this.canvas.style.aspectRatio = String(ratio);
    this.draw = () => {
      const { clientWidth: width, clientHeight: height } = this.canvas, scale = window.devicePixelRatio || 1;
      if (width === 0) return;
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
      const context = this.canvas.getContext("2d");
      context.scale(scale, scale);
      draw(context, width, height);
    };
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    new MutationObserver(() => this.draw()).observe(document.body, { attributeFilter: ["data-theme"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // Call `listen(x, y)`, fractions of the width and the height, wherever a pointer is pressed or dragged.
  drag(listen) {
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      listen((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      at(event);
    });
    this.canvas.addEventListener("pointermove", (event) => event.buttons && at(event));
  }
}

// -- the latent map ---------------------------------------------------------------------------------------------------

function latentMap(place, exported) {
  const decoder = new Decoder(exported.decoder, exported.levels), top = exported.levels - 1;
  const means = Network.unpack(exported.posterior.mean.values), labels = exported.y;
  const reach = Math.max(3.5, Math.ceil(2 * means.reduce((most, v) => Math.max(most, Math.abs(v)), 0)) / 2);
  const start = labels.indexOf(6), z = [means[2 * start], means[2 * start + 1]];
  let seed = 1, uniforms = randomness(seed).uniforms(PIXELS), tiles = null;

  const mean = new Picture("\\(E[x \\mid z]\\)", "the mean of p of x given z");
  const spread = new Picture("\\(\\mathrm{sd}[x \\mid z]\\)", "the standard deviation of each pixel given z");
  const drawn = new Picture("\\(x \\sim p(x \\mid z)\\)", "a draw of x given z");
  const says = make("p", { class: "says", "aria-live": "polite" });

  const shown = { digits: true, pictures: false };
  const map = new Drawing(1, { class: "map", tabindex: 0, role: "application", "aria-label": "map of z; arrow keys move" }, (context, size) => {
    const to = (v) => ((v + reach) / (2 * reach)) * size, fore = color("foreground-primary");
    context.clearRect(0, 0, size, size);
    context.font = "11px sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    if (shown.pictures) {
      const n = 15;
      tiles = tiles || Array.from({ length: n * n }, (_, k) => {
        const at = [k % n, n - 1 - Math.floor(k / n)].map((i) => ((2 * i + 1) / n - 1) * reach);
        return bitmap(moments(decoder.decode(at), decoder.grid).mean.map((v) => v / top));
      });
      context.imageSmoothingEnabled = false;
      const each = size / n, corner = (i) => (i + 0.1) * each;
      context.fillStyle = "white";
      context.fillRect(0, 0, size, size);
      tiles.forEach((tile, k) => context.drawImage(tile, corner(k % n), corner(Math.floor(k / n)), 0.8 * each, 0.8 * each));
    } else {
      const shade = context.createRadialGradient(to(0), to(0), 0, to(0), to(0), to(3) - to(0));
      for (let r = 0; r <= 10; r++) {
        const strength = Math.round(150 * Math.exp(-((0.3 * r) ** 2) / 2)).toString(16).padStart(2, "0");
        shade.addColorStop(r / 10, `#6c8ebf${strength}`);
      }
      context.fillStyle = shade;
      context.fillRect(0, 0, size, size);
    }
    context.strokeStyle = context.fillStyle = shown.pictures ? "#1f5f99" : color("foreground-muted");
    for (const mass of [0.5, 0.9, 0.99]) {
      const radius = Math.sqrt(-2 * Math.log(1 - mass));
      context.beginPath();
      context.arc(to(0), to(0), to(radius) - to(0), 0, 2 * Math.PI);
      context.stroke();
      if (!shown.pictures) context.fillText(`${100 * mass} %`, to(radius / Math.SQRT2) + 16, to(-radius / Math.SQRT2) - 6);
    }
    context.fillStyle = shown.pictures ? "#1f5f99" : fore;
    context.fillText("z\u2081", size - 10, to(0) + 10);
    context.fillText("z\u2082", to(0) + 10, 9);
    for (let v = -Math.floor(reach); v <= reach; v++) {
      if (v !== 0 && !shown.pictures) context.fillText(signed(v, 0), to(v), size - 8);
      if (v !== 0 && !shown.pictures) context.fillText(signed(v, 0), 10, to(-v));
    }
    if (shown.digits) {
      labels.forEach((label, i) => {
        context.fillStyle = COLORS[label];
        context.fillText(label, to(means[2 * i]), to(-means[2 * i + 1]));
      });
    }
    const [x, y] = [to(z[0]), to(-z[1])];
    context.strokeStyle = shown.pictures ? "#d01c1c" : fore;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(0, y), context.lineTo(x - 9, y), context.moveTo(x + 9, y), context.lineTo(size, y);
    context.moveTo(x, 0), context.lineTo(x, y - 9), context.moveTo(x, y + 9), context.lineTo(x, size);
    context.globalAlpha = 0.35;
    context.stroke();
    context.globalAlpha = 1;
    context.lineWidth = 2.5;
    context.beginPath();
    context.arc(x, y, 9, 0, 2 * Math.PI);
    context.stroke();
  });

  const sliders = [0, 1].map((i) =>
    slider(`z${"\u2081\u2082"[i]}`, { min: -reach, max: reach, step: "any", value: z[i], "aria-label": `z ${i + 1}` }, (v) => move(i === 0 ? v : z[0], i === 1 ? v : z[1])),
  );

  function move(...to) {
    to.forEach((v, i) => {
      z[i] = Math.min(reach, Math.max(-reach, v));
      sliders[i].input.value = z[i];
    });
    show();
  }

  function show() {
    const p = decoder.decode(z), of = moments(p, decoder.grid);
    mean.show(of.mean.map((v) => v / top));
    spread.show(of.variance.map((v) => Math.sqrt(v) / (top / 2)));
    drawn.show(draw(p, uniforms).map((v) => v / top));
    const squared = z[0] ** 2 + z[1] ** 2;
    const outside = 100 * Math.exp(-squared / 2);
    says.textContent =
      `z = (${signed(z[0])}, ${signed(z[1])}), log p(z) = ${signed(-squared / 2 - Math.log(2 * Math.PI))} nats: ` +
      `${outside < 0.1 ? "fewer than 0.1" : outside.toFixed(outside < 10 ? 1 : 0)} % of the prior\u2019s draws lie further out.`;
    map.draw();
  }

  map.drag((x, y) => move((2 * x - 1) * reach, (1 - 2 * y) * reach));
  map.canvas.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 0.5 : 0.1;
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] || [0, 0];
    if (dx || dy) {
      event.preventDefault();
      move(z[0] + dx * step, z[1] + dy * step);
    }
  });

  const toggle = (label, name) => {
    const box = make("input", { type: "checkbox", checked: shown[name], onchange: () => ((shown[name] = box.checked), map.draw()) });
    return make("label", {}, box, ` ${label}`);
  };
  const again = () => ((uniforms = randomness(++seed).uniforms(PIXELS)), show());
  const fromPrior = () => move(...randomness(++seed * 7919).normals(2));
  place.replaceChildren(
    make("div", { class: "panel" },
      make("div", { class: "wide" }, map.canvas),
      make("div", { class: "side" },
        make("div", { class: "pictures" }, mean.figure, spread.figure, drawn.figure),
        says,
        ...sliders.map(({ row }) => row),
        make("div", { class: "buttons" }, button("draw z from the prior", fromPrior), button("draw x again", again)),
        make("div", { class: "buttons" }, toggle("test digits", "digits"), toggle("E[x | z] everywhere", "pictures")),
      ),
    ),
  );
  show();
}

// -- the diffusion ----------------------------------------------------------------------------------------------------

function forwards(place, exported, chain) {
  const x = Network.unpack(exported.x.values), T = chain.steps;
  let which = exported.y.indexOf(3), seed = 1, noise = randomness(seed).normals(PIXELS), t = Math.round(T / 3);

  const clean = new Picture("\\(x_0\\)", "a test digit"), noisy = new Picture("\\(x_t \\sim q(x_t \\mid x_0)\\)", "the digit with noise");
  const guess = new Picture("\\(E[x_0 \\mid x_t]\\)", "the guess of the network");
  const doubt = new Picture("\\(\\mathrm{sd}[x_0 \\mid x_t]\\)", "the standard deviation of the guess");
  const says = make("p", { class: "says", "aria-live": "polite" });
  const curves = new Drawing(4, { class: "curves", role: "img", "aria-label": "signal and noise against time" }, (context, width, height) => {
    const to = (s) => 6 + (s / T) * (width - 12), up = (v) => height - 4 - v * (height - 8);
    context.clearRect(0, 0, width, height);
    context.font = "12px sans-serif";
    for (const [name, label, stroke, left] of [["alpha", "signal \u03b1\u209c", "#4e79a7", 12], ["sigma", "noise \u03c3\u209c", "#e15759", width - 70]]) {
      context.strokeStyle = context.fillStyle = stroke;
      context.lineWidth = 2;
      context.beginPath();
      chain.schedule[name].forEach((v, s) => context.lineTo(to(s), up(v)));
      context.stroke();
      context.fillText(label, left, height / 2);
    }
    context.strokeStyle = color("foreground-primary");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(to(t), 0);
    context.lineTo(to(t), height);
    context.stroke();
  });
  const time = slider("t", { min: 0, max: T, step: 1, value: t, "aria-label": "t, the time of the forward process" }, (v) => ((t = v), show()));

  function show() {
    const levels = x.slice(which * PIXELS, (which + 1) * PIXELS);
    const x0 = Float64Array.from(levels, (v) => (2 * v) / (chain.levels - 1) - 1), xt = chain.noised(x0, t, noise);
    const of = t > 0 ? chain.denoise(xt, t) : { mean: x0, variance: new Float64Array(PIXELS) };
    const error = Math.sqrt(of.mean.reduce((sum, v, i) => sum + (v - x0[i]) ** 2, 0) / PIXELS) * ((chain.levels - 1) / 2);
    clean.show(ink(x0));
    noisy.show(ink(xt));
    guess.show(ink(of.mean));
    doubt.show(of.variance.map(Math.sqrt));
    says.textContent =
      `t = ${t} of ${T}: \u03b1 = ${chain.schedule.alpha[t].toFixed(3)}, \u03c3 = ${chain.schedule.sigma[t].toFixed(3)}. ` +
      (t > 0 ? `The guess is off by ${error.toFixed(1)} of ${chain.levels - 1} gray levels (root mean square).` : "Nothing is destroyed yet.");
    curves.draw();
  }

  const next = (label) => {
    do which = (which + 1) % exported.y.length;
    while (exported.y[which] !== label);
    show();
  };
  const digits = Array.from({ length: 10 }, (_, label) => button(String(label), () => next(label), { "aria-label": `another ${label}` }));
  place.replaceChildren(
    make("div", { class: "pictures four" }, clean.figure, noisy.figure, guess.figure, doubt.figure),
    time.row,
    curves.canvas,
    says,
    make("div", { class: "buttons" }, make("span", {}, "another"), ...digits, button("other noise", () => ((noise = randomness(++seed).normals(PIXELS)), show()))),
  );
  show();
}

function backwards(place, chain) {
  const T = chain.steps, every = T / 10;
  let seed = 5, states = [], t = T, running = 0;

  const state = new Picture("\\(x_t\\)", "the state of the chain"), guess = new Picture("\\(E[x_0 \\mid x_t]\\)", "the guess at this time");
  const says = make("p", { class: "says", "aria-live": "polite" });
  const time = slider("t", { min: 0, max: T, step: 1, value: T, "aria-label": "t, the time of the reverse process" }, (v) => go(v));
  const film = new Drawing(11 / 2.4, { class: "film", role: "img", "aria-label": "the chain at every fifth time" }, (context, width) => {
    const each = width / 11, size = each - 3;
    context.clearRect(0, 0, width, each * 3);
    context.font = "11px sans-serif";
    context.textAlign = "center";
    for (let k = 0; k <= 10; k++) {
      const s = T - k * every, at = states[s];
      context.fillStyle = color(s === t ? "brand-primary" : "foreground-secondary");
      context.fillText(k === 0 ? `t=${s}` : s, (k + 0.5) * each, each * 0.3);
      if (at === undefined) continue;
      paint(context, ink(at.x), k * each + 1.5, each * 0.4, size);
      paint(context, ink(at.mean), k * each + 1.5, each * 1.4, size);
    }
  });

  // One step of the chain: p(x_{t-1} | x_t) is drawn from, and p(x_0 | x_1) at the end.
  function step(random) {
    const s = states.findIndex((at) => at !== undefined), { x, denoised } = states[s];
    let previous;
    if (s > 1) {
      const { mean, scale } = chain.reverse(x, s, denoised), noise = random.normals(PIXELS);
      previous = mean.map((v, i) => v + scale[i] * noise[i]);
    } else {
      previous = draw(denoised.probabilities, random.uniforms(PIXELS)).map((level) => chain.grid[level]);
    }
    states[s - 1] = at(previous, s - 1);
  }

  function at(x, s) {
    const denoised = s > 0 ? chain.denoise(x, s) : { mean: x };
    return { x, denoised, mean: denoised.mean };
  }

  function run() {
    const random = randomness(seed++), mine = ++running;
    states = new Array(T + 1);
    states[T] = at(random.normals(PIXELS), T);
    t = T;
    const frame = () => {
      if (mine !== running) return;
      show();
      if (t === 0) return;
      step(random);
      t -= 1;
      requestAnimationFrame(frame);
    };
    frame();
  }

  function go(to) {
    const first = states.findIndex((state) => state !== undefined);
    t = Math.max(to, first);
    show();
  }

  function show() {
    time.input.value = t;
    state.show(ink(states[t].x));
    guess.show(ink(states[t].mean));
    says.textContent =
      t === T ? `t = ${T}: pure noise, drawn from N(0, I).` : t === 0 ? "t = 0: a digit that nobody wrote." : `t = ${t}: drawn from p(x\u209c | x\u209c\u208a\u2081).`;
    film.draw();
  }

  film.drag((x) => go(T - every * Math.min(10, Math.max(0, Math.floor(11 * x)))));
  place.replaceChildren(
    make("div", { class: "panel" },
      make("div", { class: "pictures" }, state.figure, guess.figure),
      make("div", { class: "side" }, time.row, says, make("div", { class: "buttons" }, button("draw another", run))),
    ),
    film.canvas,
  );
  run();
}

const chain = new Denoiser(EXPORTED.denoiser, EXPORTED.schedule, EXPORTED.levels, SIDE);
latentMap(document.getElementById("latent-map"), EXPORTED);
forwards(document.getElementById("forwards"), EXPORTED, chain);
backwards(document.getElementById("backwards"), chain);
