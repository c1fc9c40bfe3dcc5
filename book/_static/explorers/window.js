// Alternating attention: what a token can have seen, layer by layer, and what that costs.
"use strict";

Object.assign(MB.math, {
  // The first and last position that can have reached `position`, below each layer; from the
  // output of layer `from` downwards.
  reach(isGlobal, from, position, halfWindow, length) {
    let [first, last] = [position, position];
    const found = [];
    for (let layer = from; layer >= 0; layer--) {
      first = isGlobal[layer] ? 0 : Math.max(0, first - halfWindow);
      last = isGlobal[layer] ? length - 1 : Math.min(length - 1, last + halfWindow);
      found[layer] = [first, last];
    }
    return found;
  },
  // Pairs of a query and a key that a layer scores.
  neededPairs: (length, halfWindow) =>
    halfWindow === null || halfWindow >= length
      ? length ** 2
      : length * (2 * halfWindow + 1) - halfWindow * (halfWindow + 1),
});

MB.add("window", (box, data) => {
  const { make, draw, line, text, whole, percent } = MB;
  const { reach, neededPairs } = MB.math;
  let every = data.every;

  const isGlobal = () => data.patterns[every].slice(0, layers.value);
  const length = () => 2 ** size.value;
  const half = () => 2 ** width.value;
  const at = () => Math.round(((length() - 1) * place.value) / 100);

  const picture = MB.chart({
    title: "Positions that can have reached the token, layer by layer; in full colour, those that a layer adds",
    paint(wide) {
      const rows = depth.value + 1;
      const high = rows > 14 ? 15 : 20;
      const [left, right, top] = [70, 74, 24];
      const bottom = top + rows * high;
      const x = (position) => left + ((wide - left - right) * position) / length();
      const kinds = isGlobal();
      const found = reach(kinds, depth.value, at(), half(), length());
      const parts = [text(x(at()), 14, "the token", { "text-anchor": "middle", class: "mb-strong" })];
      found.forEach(([first, last], layer) => {
        const y = top + (depth.value - layer) * high;
        const colour = kinds[layer] ? "var(--mb-2)" : "var(--mb-1)";
        const above = found[layer + 1] ?? [at(), at()];
        const block = ([a, b], fill) =>
          draw("rect", {
            x: Math.min(x(a), wide - right - 2), y: y + 1, width: Math.max(2, x(b + 1) - x(a)),
            height: high - 3, fill, rx: 2,
          });
        parts.push(
          draw("rect", { x: left, y: y + 1, width: wide - left - right, height: high - 3, class: "mb-track" }),
          block([first, last], `color-mix(in srgb, ${colour} 38%, var(--mb-card))`),
          ...(above[0] > first ? [block([first, above[0] - 1], colour)] : []),
          ...(above[1] < last ? [block([above[1] + 1, last], colour)] : []),
          text(left - 8, y + high / 2 + 3, `${layer} ${kinds[layer] ? "global" : "local"}`, { "text-anchor": "end" }),
          text(wide - right + 8, y + high / 2 + 3, whole(last - first + 1)),
        );
      });
      parts.push(
        line(x(at()), top - 4, x(at()), bottom, { class: "mb-mark" }),
        text(left, bottom + 16, 0, { "text-anchor": "start" }),
        text(wide - right, bottom + 16, whole(length() - 1), { "text-anchor": "end" }),
        text((left + wide - right) / 2, bottom + 16, "position", { "text-anchor": "middle" }),
        text(left - 8, 14, "layer", { "text-anchor": "end" }),
        text(wide - right + 8, 14, "tokens"),
      );
      return { height: bottom + 22, told: words(found), parts };
    },
  });

  const cost = MB.chart({
    title: "Pairs of a query and a key that all layers score",
    paint(wide) {
      const all = allPairs();
      const own = pairs();
      const bar = (y, share, colour, words) => [
        draw("rect", { x: 0, y, width: wide, height: 22, class: "mb-track" }),
        draw("rect", { x: 0, y, width: Math.max(2, wide * share), height: 22, rx: 3, fill: colour }),
        text(0, y + 38, words),
      ];
      return {
        height: 96,
        told: `${whole(own)} pairs, ${percent(own / all)} of what only global layers would score.`,
        parts: [
          ...bar(0, own / all, "var(--mb-1)", `these layers: ${whole(own)} pairs, ${percent(own / all)}`),
          ...bar(48, 1, "var(--mb-2)", `all layers global: ${whole(all)} pairs`),
        ],
      };
    },
  });

  const allPairs = () => layers.value * neededPairs(length(), null);
  const pairs = () =>
    isGlobal().reduce((sum, global) => sum + neededPairs(length(), global ? null : half()), 0);

  function words(found) {
    const seen = found.map(([first, last]) => last - first + 1);
    const kind = isGlobal()[depth.value] ? "global" : "local";
    const full = seen.findLastIndex((count) => count === length());
    return (
      `The token at position ${whole(at())}, after layer ${depth.value}, which is ${kind}, ` +
      `has looked at ${whole(seen[depth.value])} tokens itself. ` +
      (full < 0
        ? `Through all layers below it, ${whole(seen[0])} of ${whole(length())} tokens can have reached it.`
        : `From layer ${full} downwards it draws on all ${whole(length())} tokens of the text.`) +
      ` Together, the ${layers.value} layers score ${percent(pairs() / allPairs())} of the pairs ` +
      "that global layers alone would."
    );
  }

  const told = make("p", { class: "mb-told", "aria-live": "polite" });

  function redraw() {
    depth.limit(layers.value - 1);
    told.textContent = words(reach(isGlobal(), depth.value, at(), half(), length()));
    picture.redraw();
    cost.redraw();
  }

  const change = () => redraw();
  const names = { 1: "every layer", 2: "every 2nd", 3: "every 3rd", never: "none" };
  const options = Object.keys(data.patterns).map((key) => [key, names[key] ?? `every ${key}th`]);
  const kinds = MB.choice({
    label: "Global layers", options, value: every,
    change: (key) => {
      every = key;
      redraw();
    },
  });
  const layers = MB.slider({
    label: "Layers", min: 1, max: data.patterns.never.length, value: data.layers, change,
  });
  const depth = MB.slider({ label: "Look from the output of layer", max: data.layers - 1, value: data.layers - 2, change });
  const width = MB.slider({
    label: "W, half a window", min: 0, max: 10, value: Math.log2(data.half_window), change,
    show: (power) => `${whole(2 ** power)} tokens`,
  });
  const size = MB.slider({
    label: "Length of the text", min: 6, max: 13, value: Math.log2(data.length), change,
    show: (power) => `${whole(2 ** power)} tokens`,
  });
  const place = MB.slider({
    label: "Place of the token", max: 100, value: 40, change, show: (share) => percent(share / 100),
  });
  box.append(
    make(
      "div", { class: "mb-controls" }, kinds, layers.element, depth.element, width.element,
      size.element, place.element,
    ),
    told, picture.element, cost.element,
  );
  redraw();
});
