// Unpadding: how much of a batch is padding, and what sorting and packing make of it.
"use strict";

Object.assign(MB.math, {
  // Rows of one batch after the other, each as long as the longest of its batch.
  padded: (lengths, batch) =>
    lengths.map((length, i) => {
      const start = i - (i % batch);
      return { parts: [length], places: Math.max(...lengths.slice(start, start + batch)) };
    }),
  // The longest first, each into the first bin that has room for it.
  firstFit(lengths, capacity) {
    const bins = [];
    const order = lengths.map((_, i) => i).sort((a, b) => lengths[b] - lengths[a]);
    for (const i of order) {
      let bin = bins.find((b) => b.room >= lengths[i]);
      if (!bin) bins.push((bin = { room: capacity, chosen: [] }));
      bin.room -= lengths[i];
      bin.chosen.push(i);
    }
    return bins.map((bin) => bin.chosen);
  },
  readLengths: (words) =>
    (words.match(/\d+/g) ?? []).map(Number).filter((n) => n > 0 && n <= 1e6).slice(0, 256),
});

MB.add("padding", (box, data) => {
  const { make, draw, text, whole, percent } = MB;
  const { padded, firstFit, readLengths } = MB.math;
  const names = Object.keys(data.samples);

  const lengths = () => readLengths(area.value);

  function packed() {
    const all = lengths();
    const room = Math.max(capacity.value, ...all);
    return firstFit(all, room).map((chosen) => ({ parts: chosen.map((i) => all[i]), places: room }));
  }

  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const real = (rows) => sum(rows.flatMap((row) => row.parts));
  const places = (rows) => sum(rows.map((row) => row.places));

  // One way to run the texts: a bar for each row, real tokens in colour, padding hatched.
  function way(name, title, gap, rows) {
    return MB.chart({
      title,
      paint(width) {
        const found = rows();
        const longest = Math.max(1, capacity.value, ...lengths());
        const high = found.length > 40 ? 4 : found.length > 20 ? 7 : 10;
        const hatch = draw(
          "pattern", { id: name, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
          draw("line", { x1: 0, y1: 0, x2: 0, y2: 5, stroke: "var(--mb-2)", "stroke-width": 2.4 }),
        );
        const parts = [draw("defs", {}, hatch)];
        found.forEach((row, i) => {
          const y = i * high + gap * Math.floor(i / batch.value);
          const wide = (tokens) => (width * tokens) / longest;
          let x = 0;
          row.parts.forEach((tokens, j) => {
            const colour = j % 2 ? "var(--mb-3)" : "var(--mb-1)";
            parts.push(draw("rect", { x: wide(x), y, width: Math.max(0.5, wide(tokens) - 0.7), height: high - 1.5, fill: colour }));
            x += tokens;
          });
          const rest = wide(row.places - x);
          if (rest > 0) {
            parts.push(draw("rect", { x: wide(x), y, width: rest, height: high - 1.5, fill: `url(#${name})` }));
          }
        });
        const gaps = gap * Math.floor(Math.max(0, found.length - 1) / batch.value);
        const bottom = Math.max(1, found.length) * high + gaps;
        const words = summary(found);
        parts.push(text(0, bottom + 14, words));
        return { height: bottom + 20, told: words, parts };
      },
    });
  }

  function summary(rows) {
    if (!rows.length) return "No lengths yet.";
    const [all, own] = [places(rows), real(rows)];
    return `${whole(all)} places, ${whole(all - own)} of them padding: ${percent((all - own) / all)}`;
  }

  const ways = [
    way("mb-given", "In the order given, padded to the longest of each batch", 5, () =>
      padded(lengths(), batch.value)),
    way("mb-sorted", "Sorted by length first, then padded", 5, () =>
      padded(lengths().sort((a, b) => a - b), batch.value)),
    way("mb-packed", "Packed into streams of at most this capacity, nothing padded", 0, () =>
      packed().map((row) => ({ ...row, places: sum(row.parts) }))),
  ];

  const told = make("p", { class: "mb-told", "aria-live": "polite" });

  function redraw() {
    const all = lengths();
    if (!all.length) {
      told.textContent = "Type or paste lengths: whole numbers, apart by anything else.";
    } else {
      const rows = padded(all, batch.value);
      const streams = packed();
      const own = sum(all);
      told.textContent =
        `${all.length} texts, ${whole(own)} tokens, the longest ${whole(Math.max(...all))}. ` +
        `In batches of ${batch.value}, ${percent(1 - own / places(rows))} of all places are padding: ` +
        `the model works ${(places(rows) / own).toFixed(2)} times as much as it has to. ` +
        `Packed, the texts need ${streams.length} ${streams.length === 1 ? "stream" : "streams"}, ` +
        `${percent(own / places(streams))} full.`;
    }
    for (const picture of ways) picture.redraw();
  }

  const area = make("textarea", { id: "mb-lengths", rows: 4, spellcheck: "false", input: () => redraw() });
  const show = (name) => {
    area.value = data.samples[name].join(" ");
  };
  const samples = MB.choice({
    label: "Lengths of", options: names.map((name) => [name, name]), value: names[0],
    change: (name) => {
      show(name);
      redraw();
    },
  });
  const batch = MB.slider({
    label: "Texts in a batch", min: 1, max: 64, value: data.batch, change: () => redraw(),
  });
  const capacity = MB.slider({
    label: "Capacity of a stream", min: 64, max: 8192, step: 64, value: data.capacity,
    show: (tokens) => `${whole(tokens)} tokens`, change: () => redraw(),
  });
  show(names[0]);
  box.append(
    make(
      "div", { class: "mb-controls" }, samples,
      make("div", { class: "mb-area" }, make("label", { for: "mb-lengths" }, "Lengths in tokens: change them, or paste your own"), area),
      batch.element, capacity.element,
    ),
    told, ...ways.map((picture) => picture.element),
  );
  redraw();
});
