// What the explorers share: elements, controls, charts that redraw at every width, and starting.
// Classic scripts on one global, since a page from a disk may load no modules and fetch nothing.
"use strict";

const MB = (() => {
  const explorers = {};
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // ---- elements ----

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  const make = (tag, attributes = {}, ...children) =>
    fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  const text = (x, y, words, attributes = {}) => draw("text", { x, y, ...attributes }, words);
  const line = (x1, y1, x2, y2, attributes = {}) => draw("line", { x1, y1, x2, y2, ...attributes });

  // ---- numbers ----

  const whole = (x) => Math.round(x).toLocaleString("en");
  const short = (x) => x.toLocaleString("en", { maximumSignificantDigits: 3 });
  const percent = (x) =>
    x.toLocaleString("en", { style: "percent", maximumFractionDigits: x < 0.1 ? 1 : 0 });

  // ---- controls: the browser's own, so that the keyboard works ----

  let ids = 0;

  function slider({ label, min = 0, max, value, step = 1, show = whole, change }) {
    const id = `mb-control-${ids++}`;
    const told = make("output", { for: id }, show(value));
    const input = make("input", { id, type: "range", min, max, step, value });
    const set = () => {
      const number = Number(input.value);
      told.textContent = show(number);
      input.setAttribute("aria-valuetext", show(number));
    };
    input.addEventListener("input", () => {
      set();
      change(Number(input.value));
    });
    set();
    const element = make("div", { class: "mb-slider" }, make("label", { for: id }, label), told, input);
    return {
      element,
      get value() {
        return Number(input.value);
      },
      set value(number) {
        input.value = number;
        set();
      },
      limit(most) {
        input.max = most;
        set();
      },
    };
  }

  // `options`: pairs of a key and its words.
  function choice({ label, options, value, change, narrow = false }) {
    const name = `mb-control-${ids++}`;
    const buttons = options.map(([key, words]) => {
      const input = make("input", { type: "radio", name, value: key, change: () => change(key) });
      input.checked = key === value;
      return make("label", {}, input, make("span", {}, words));
    });
    const kind = narrow ? "mb-choice mb-narrow" : "mb-choice";
    return make("fieldset", { class: kind }, make("legend", {}, label), ...buttons);
  }

  // A button that moves things on by itself; none where the reader wants no motion. What it
  // changes is read aloud only once it rests.
  function player({ label, step, every, told }) {
    let timer = null;
    const button = make("button", { type: "button", class: "mb-button" });
    const show = () => {
      button.textContent = timer ? "Pause" : label;
      told.setAttribute("aria-live", timer ? "off" : "polite");
    };
    function stop() {
      clearInterval(timer);
      timer = null;
      show();
    }
    function toggle() {
      if (timer) return stop();
      timer = setInterval(() => step() || stop(), every);
      show();
    }
    button.addEventListener("click", toggle);
    const obey = () => {
      if (still.matches && timer) stop();
      button.hidden = still.matches;
    };
    still.addEventListener("change", obey);
    obey();
    show();
    return { element: button, stop };
  }

  // ---- charts ----

  // Redraws at the width it has, in pixels: words keep their size on a phone.
  function chart({ title, paint }) {
    const picture = draw("svg", { role: "img" });
    const element = make("figure", { class: "mb-chart" }, make("figcaption", {}, title), picture);
    let width = 0;
    function redraw() {
      if (!width) return;
      const { height, told, parts } = paint(width);
      picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
      picture.setAttribute("height", height);
      picture.setAttribute("aria-label", told);
      picture.replaceChildren(...parts);
    }
    new ResizeObserver(() => {
      const now = Math.floor(picture.clientWidth);
      if (now !== width) {
        width = now;
        redraw();
      }
    }).observe(picture);
    return { element, redraw };
  }

  const path = (points) =>
    points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

  // ---- starting ----

  const data = (name) => JSON.parse(document.getElementById(`mb-data-${name}`).textContent);

  function add(name, start) {
    explorers[name] = start;
  }

  document.addEventListener("DOMContentLoaded", () => {
    for (const box of document.querySelectorAll("[data-explorer]")) {
      box.replaceChildren();
      try {
        explorers[box.dataset.explorer](box, data(box.dataset.explorer));
      } catch (error) {
        reportError(error); // and the others start
      }
    }
  });

  return {
    add, chart, choice, data, draw, line, make, math: {}, path, percent, player, short, slider, text,
    whole,
  };
})();
