// Rotary position embeddings: how far each pair of dimensions turns.
"use strict";

Object.assign(MB.math, {
  // Tokens until a pair is back where it was.
  wavelength: (frequency) => (2 * Math.PI) / frequency,
  // The part of a turn that a pair has made beyond its full turns, from 0 to 1.
  turned: (frequency, position) => ((frequency * position) / (2 * Math.PI)) % 1,
  // Score of two equal vectors this far apart, as a share of their score at no distance.
  agreement: (frequencies, distance) =>
    frequencies.reduce((sum, f) => sum + Math.cos(f * distance), 0) / frequencies.length,
});

MB.add("rope", (box, data) => {
  const { make, draw, line, text, whole, short } = MB;
  const { wavelength, turned, agreement } = MB.math;
  const colours = ["var(--mb-2)", "var(--mb-1)"]; // of global and of local layers
  const inks = ["var(--mb-ink-2)", "var(--mb-ink-1)"];
  const pairs = data.bases[0].frequencies.length;
  let chosen = 0;
  const base = () => data.bases[chosen];

  // ---- the clocks ----

  const clocks = MB.chart({
    title: "One clock per pair: where each hand stands at this position",
    paint(width) {
      const columns = width < 560 ? 8 : 16;
      const size = width / columns;
      const parts = base().frequencies.map((frequency, i) => {
        const x = size * ((i % columns) + 0.5);
        const y = (size + 6) * (Math.floor(i / columns) + 0.5);
        const angle = 2 * Math.PI * turned(frequency, position.value);
        const radius = size * 0.4;
        const own = i === pair.value;
        return draw(
          "g",
          { class: "mb-clock", click: () => choosePair(i) },
          draw("circle", {
            cx: x, cy: y, r: radius, fill: own ? "var(--mb-lit)" : "var(--mb-faint)",
            stroke: own ? colours[chosen] : "var(--mb-rule)", "stroke-width": own ? 2.5 : 1,
          }),
          line(x, y, x + radius * Math.cos(angle), y - radius * Math.sin(angle), {
            stroke: colours[chosen], "stroke-width": 2.5, "stroke-linecap": "round",
          }),
          draw("circle", { cx: x, cy: y, r: 2, fill: colours[chosen] }),
        );
      });
      return {
        height: (size + 6) * Math.ceil(pairs / columns),
        told: `${pairs} clocks at position ${whole(position.value)}, from the fastest pair to the slowest.`,
        parts,
      };
    },
  });

  // ---- the wavelengths ----

  const waves = MB.chart({
    title: "Tokens per turn, pair by pair (the axis is logarithmic)",
    paint(width) {
      const [left, right, top, height] = [58, 12, 12, 250];
      const bottom = height - 34;
      const most = Math.log10(wavelength(data.bases[0].frequencies.at(-1))) + 0.1;
      const x = (i) => left + ((width - left - right) * (i + 0.5)) / pairs;
      const y = (tokens) => bottom - ((bottom - top) * (Math.log10(tokens) - 0.6)) / (most - 0.6);
      const parts = [];
      for (let power = 1; power <= most; power++) {
        parts.push(
          line(left, y(10 ** power), width - right, y(10 ** power), { class: "mb-grid" }),
          text(left - 8, y(10 ** power) + 4, whole(10 ** power), { "text-anchor": "end" }),
        );
      }
      const marks = { [`context, ${whole(data.context)}`]: data.context, [`window, ${data.window}`]: data.window };
      for (const [words, tokens] of Object.entries(marks)) {
        parts.push(
          line(left, y(tokens), width - right, y(tokens), { class: "mb-mark" }),
          text(left + 4, y(tokens) - 5, words, { class: "mb-strong" }),
        );
      }
      data.bases.forEach(({ frequencies }, b) => {
        frequencies.forEach((frequency, i) => {
          const own = b === chosen && i === pair.value;
          const size = own ? 6 : 3.6;
          const [cx, cy] = [x(i), y(wavelength(frequency))];
          // Told apart by shape as well: circles are global layers, squares are local ones.
          const shape = b
            ? draw("rect", { x: cx - size, y: cy - size, width: 2 * size, height: 2 * size })
            : draw("circle", { cx, cy, r: size });
          shape.setAttribute("fill", b === chosen ? colours[b] : "none");
          shape.setAttribute("stroke", colours[b]);
          parts.push(shape);
        });
      });
      data.bases.forEach(({ name, frequencies }, b) => {
        const i = pairs - 6;
        const above = b ? 24 : -12;
        parts.push(
          text(x(i), y(wavelength(frequencies[i])) + above, name, {
            "text-anchor": b ? "start" : "end", style: `fill: ${inks[b]}`, class: "mb-name",
          }),
        );
      });
      for (const i of [0, 7, 15, 23, pairs - 1]) {
        parts.push(text(x(i), bottom + 16, i, { "text-anchor": "middle" }));
      }
      parts.push(text((left + width - right) / 2, height - 2, "pair of dimensions", { "text-anchor": "middle" }));
      const ends = [0, pairs - 1].map((i) => short(wavelength(base().frequencies[i])));
      return {
        height,
        told: `Tokens per turn in ${base().name}: ${ends[0]} for the first pair, rising to ${ends[1]} for the last.`,
        parts,
      };
    },
  });

  // ---- what a query and a key make of it ----

  const scores = MB.chart({
    title: "Score of two equal vectors by their distance, as a share of the score at distance 0",
    paint(width) {
      const [left, right, top, height] = [58, 12, 12, 210];
      const bottom = height - 34;
      const far = Math.max(data.window, position.value);
      const x = (distance) => left + ((width - left - right) * distance) / far;
      const y = (score) => bottom - ((bottom - top) * (score + 0.25)) / 1.25;
      const parts = [0, 0.5, 1].flatMap((score) => [
        line(left, y(score), width - right, y(score), { class: "mb-grid" }),
        text(left - 8, y(score) + 4, score, { "text-anchor": "end" }),
      ]);
      const steps = Math.min(far, 400);
      data.bases.forEach(({ frequencies }, b) => {
        const points = [];
        for (let i = 0; i <= steps; i++) {
          const distance = Math.round((far * i) / steps);
          points.push([x(distance), y(agreement(frequencies, distance))]);
        }
        parts.push(
          draw("path", {
            d: MB.path(points), fill: "none", stroke: colours[b],
            "stroke-width": b === chosen ? 2.5 : 1.2, "stroke-dasharray": b ? "6 3" : "none",
          }),
        );
      });
      const [px, py] = [x(position.value), y(agreement(base().frequencies, position.value))];
      parts.push(
        draw("circle", { cx: px, cy: py, r: 5.5, fill: colours[chosen], stroke: "var(--mb-card)", "stroke-width": 2 }),
        text(left, bottom + 16, 0, { "text-anchor": "middle" }),
        text(width - right, bottom + 16, whole(far), { "text-anchor": "end" }),
        text((left + width - right) / 2, height - 2, "distance in tokens", { "text-anchor": "middle" }),
      );
      return {
        height,
        told: `The score falls with distance; at ${whole(position.value)} tokens it is ${agreement(base().frequencies, position.value).toFixed(2)} of its start.`,
        parts,
      };
    },
  });

  // ---- controls ----

  const told = make("p", { class: "mb-told", "aria-live": "polite" });

  function redraw() {
    const frequency = base().frequencies[pair.value];
    const turns = (frequency * position.value) / (2 * Math.PI);
    told.textContent =
      `Pair ${pair.value} of the ${base().name} turns once in ${short(wavelength(frequency))} tokens. ` +
      `At position ${whole(position.value)} it has made ${short(turns)} turns ` +
      `and its hand stands at ${Math.round(360 * turned(frequency, position.value))}°. ` +
      `Two equal vectors this far apart score ${agreement(base().frequencies, position.value).toFixed(2)} ` +
      `of what they score side by side.`;
    for (const picture of [clocks, waves, scores]) picture.redraw();
  }

  function choosePair(i) {
    pair.value = i;
    redraw();
  }

  const position = MB.slider({
    label: "Position", max: data.context - 1, value: 100, change: () => redraw(),
  });
  const pair = MB.slider({ label: "Pair", max: pairs - 1, value: 8, change: () => redraw() });
  const names = data.bases.map(({ name, theta }) => `${name}, θ = ${whole(theta)}`);
  const bases = MB.choice({
    label: "Base", options: Object.entries(names), value: "0",
    change: (key) => {
      chosen = Number(key);
      redraw();
    },
  });
  const play = MB.player({
    label: "Walk along the text", every: 60, told,
    step() {
      position.value = (position.value + 1) % data.context;
      redraw();
      return true;
    },
  });
  box.append(
    make("div", { class: "mb-controls" }, bases, position.element, pair.element, play.element),
    told, clocks.element, waves.element, scores.element,
  );
  redraw();
});
