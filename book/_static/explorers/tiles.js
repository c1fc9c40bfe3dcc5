// FlashAttention: the online softmax, one tile of the scores after the other.
"use strict";

MB.add("tiles", (box, data) => {
  const { make, draw, line, text } = MB;
  const length = data.values.length;
  let [rows, cols, window] = ["4", "2", "none"];
  const run = () => data.runs[`${rows}×${cols}×${window}`];
  const now = () => run().steps[step.value - 1];
  const number = (x, digits = 3) => (x === null ? "−∞" : x.toFixed(digits).replace("-", "−"));
  const hidden = (query, key) => window !== "none" && Math.abs(query - key) > Number(window);

  const square = MB.chart({
    title: "Scores: queries downwards, keys to the right",
    paint(width) {
      const cell = Math.min(46, (width - 40) / length);
      const [left, top] = [34, 24];
      const taken = run().steps.slice(0, step.value);
      const within = (tile, query, key) =>
        query >= tile.top && query < tile.top + Number(rows) && key >= tile.left && key < tile.left + Number(cols);
      const parts = [];
      for (let i = 0; i < length; i++) {
        const middle = cell * (i + 0.5) + 4;
        parts.push(
          text(left - 8, top + middle, i, { "text-anchor": "end" }),
          text(left + middle - 4, top - 8, i, { "text-anchor": "middle" }),
        );
        for (let j = 0; j < length; j++) {
          const seen = taken.some((tile) => within(tile, i, j));
          const out = hidden(i, j);
          const kind = out ? "mb-hidden" : within(now(), i, j) ? "mb-now" : seen ? "mb-seen" : "mb-later";
          parts.push(
            draw("rect", { x: left + j * cell, y: top + i * cell, width: cell - 1, height: cell - 1, class: kind }),
          );
          if (!out) {
            parts.push(
              text(left + (j + 0.5) * cell, top + (i + 0.5) * cell + 4, number(data.scores[i][j], 1), {
                "text-anchor": "middle", class: kind === "mb-later" ? "mb-quiet" : "mb-strong",
              }),
            );
          }
        }
      }
      const [high, wide] = [Math.min(Number(rows), length - now().top), Math.min(Number(cols), length - now().left)];
      parts.push(
        draw("rect", {
          x: left + now().left * cell - 1, y: top + now().top * cell - 1,
          width: wide * cell + 1, height: high * cell + 1, class: "mb-frame",
        }),
      );
      return { height: top + length * cell + 6, told: words(), parts };
    },
  });

  const table = make("table", { class: "mb-running" });

  function fillTable() {
    const tile = now();
    // A soft hyphen, \u00ad, lets a long word break where the table has no room for it.
    const heads = ["query", "maxi\u00admum m", "factor α", "sum ℓ", "accumu\u00adlator a"];
    if (tile.last) heads.push("result a\u00a0÷\u00a0ℓ");
    const head = make("tr", {}, ...heads.map((name) => make("th", { scope: "col" }, name)));
    const body = tile.rows.map(([query, maximum, factor, total, mixed]) => {
      const cells = [number(maximum, 1), number(factor), number(total), number(mixed)];
      const line = make(
        "tr", {}, make("th", { scope: "row" }, String(query)),
        ...cells.map((words, i) => make("td", i === 1 && factor > 0 && factor < 1 ? { class: "mb-changed" } : {}, words)),
      );
      if (tile.last) line.append(make("td", { class: "mb-result" }, number(mixed / total)));
      return line;
    });
    table.replaceChildren(
      make("caption", {}, "What the chip keeps for the queries of this tile"),
      make("thead", {}, head), make("tbody", {}, ...body),
    );
  }

  function words() {
    const tile = now();
    const [bottom, right] = [tile.top + Number(rows), tile.left + Number(cols)].map((x) => Math.min(x, length) - 1);
    const span = (a, b, name) => (a === b ? `${name} ${a}` : `${name === "query" ? "queries" : "keys"} ${a} to ${b}`);
    const changed = tile.rows.filter(([, , factor]) => factor > 0 && factor < 1).length;
    let said = `Step ${step.value} of ${run().steps.length}: ${span(tile.top, bottom, "query")}, ${span(tile.left, right, "key")}. `;
    said += changed
      ? `A new largest score for ${changed} of ${tile.rows.length}: what was summed so far is scaled down by α. `
      : tile.rows.every(([, , factor]) => factor === 0)
        ? "The first tile of these queries: nothing was summed before. "
        : "No larger score came: every factor of a query that goes on is 1. ";
    said += tile.last ? "It was their last tile: the results are written. " : "";
    const left = run().tiles - run().steps.length;
    if (left) said += `${left} of ${run().tiles} tiles lie outside the window and are never loaded. `;
    const onChip = (bottom - tile.top + 1) * (right - tile.left + 1);
    let out = 0;
    for (let i = tile.top; i <= bottom; i++) {
      for (let j = tile.left; j <= right; j++) out += hidden(i, j);
    }
    said += `On the chip now: ${onChip} of the ${length * length} scores`;
    return said + (out ? `, ${out} of them outside the window.` : ".");
  }

  const values = make("p", { class: "mb-values" }, `Values of keys 0 to ${length - 1}: ${data.values.join(", ")}`);
  const told = make("p", { class: "mb-told", "aria-live": "polite" });

  function redraw() {
    step.limit(run().steps.length);
    told.textContent = words();
    square.redraw();
    fillTable();
  }

  const step = MB.slider({ label: "Step", min: 1, max: run().steps.length, value: 1, change: () => redraw() });

  function go(by) {
    const to = step.value + by;
    if (to < 1 || to > run().steps.length) return false;
    step.value = to;
    redraw();
    return true;
  }

  function restart() {
    step.value = 1;
    redraw();
  }

  const button = (name, by) => make("button", { type: "button", class: "mb-button", click: () => go(by) }, name);
  const play = MB.player({ label: "Play", every: 1100, told, step: () => go(1) });
  const sizes = (list) => list.map((n) => [String(n), String(n)]);
  const local = Object.keys(data.runs).map((key) => key.split("×")[2]).find((w) => w !== "none");
  box.append(
    make(
      "div", { class: "mb-controls" },
      MB.choice({ narrow: true, label: "Queries in a tile", options: sizes([2, 4, 8]), value: rows, change: (key) => { rows = key; restart(); } }),
      MB.choice({ narrow: true, label: "Keys in a tile", options: sizes([1, 2, 4, 8]), value: cols, change: (key) => { cols = key; restart(); } }),
      MB.choice({ narrow: true, label: "Layer", options: [["none", "global"], [local, `local, W = ${local}`]], value: window, change: (key) => { window = key; restart(); } }),
      step.element,
      make("div", { class: "mb-buttons" }, button("Back", -1), button("Next", 1), play.element),
    ),
    told,
    make("div", { class: "mb-pair" }, square.element, make("div", { class: "mb-scroll" }, table, values)),
  );
  redraw();
});
