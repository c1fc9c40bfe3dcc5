"use strict";

/* The live model of a page: every `.live-model` gets its life here. What is in the page decides what
   it shows: without a place for guesses, only the tokenizer is loaded. */

(() => {
  const HERE = new URL(".", document.currentScript.src);
  const LONGEST = 512; // tokens
  const PATIENCE = 250; // milliseconds without a key before the model runs
  const SHADES = 8; // of lines
  const FAINTEST = 0.02; // weights of the chosen token below draw no line,
  const FAINTEST_OTHER = 0.1; // and of other tokens
  const CELLS = 48; // in a row of a head's picture
  const LINE = 22; // pixels from one token of a column to the next
  const GUESSES = 5;
  const MOST_STEPS = 40; // of a merge story

  /* ---- the checkpoint, in scripts that the build wrote ---- */

  const script = (name) =>
    new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = new URL(`mini/${name}?v=${liveMini.version}`, HERE);
      element.onload = resolve;
      element.onerror = () => reject(new Error(`${name} is not there`));
      document.head.append(element);
    });

  async function loadTokenizer() {
    await script("tokenizer.js");
    return new Tokenizer(liveMini.tokenizer);
  }

  async function loadModel(progress) {
    const bytes = new Uint8Array(liveMini.bytes);
    let done = 0;
    const loadPart = async (i) => {
      await script(`weights-${i}.js`);
      const letters = atob(liveMini.weights[i]);
      for (let j = 0; j < letters.length; j++) bytes[i * liveMini.part + j] = letters.charCodeAt(j);
      delete liveMini.weights[i];
      progress(++done / liveMini.parts);
    };
    await Promise.all(Array.from({ length: liveMini.parts }, (_, i) => loadPart(i)));
    return new ModernBert(liveMini.config, bytes);
  }

  // Two views on one page share what they load.
  const shared = {};
  const once = (name, load) =>
    (shared[name] ??= load().catch((error) => {
      delete shared[name];
      throw error;
    }));

  /* ---- small helpers ---- */

  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  const draw = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  const percent = (share) => `${(100 * share).toFixed(1)}%`;

  const hexadecimal = (number) => number.toString(16).toUpperCase().padStart(2, "0");

  /** Bytes as one can see them: · for a space, hexadecimal for a part of a character. */
  function visible(bytes) {
    try {
      const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
      return text
        .replaceAll(" ", "·")
        .replaceAll("\n", "⏎")
        .replace(/[\p{C}\p{Z}]/gu, (sign) => `U+${hexadecimal(sign.codePointAt(0))}`)
        .replace(/^\p{M}/u, "◌$&");
    } catch {
      return Array.from(bytes, hexadecimal).join(" ");
    }
  }

  const shortened = (name) => (name.length > 14 ? `${name.slice(0, 13)}…` : name);

  const radio = (name, value, label) => {
    const button = make("input", { type: "radio", name, value });
    if (label) button.setAttribute("aria-label", label);
    return button;
  };

  /** Scroll a box, and never the page, to where one of its elements stands. */
  function reveal(box, top) {
    const hidden = top < box.scrollTop || top > box.scrollTop + box.clientHeight - LINE;
    if (hidden) box.scrollTop = top - box.clientHeight / 2;
  }

  /** A square of attention weights, the stronger the bluer; the strongest of those in one cell. */
  function paint(canvas, weights, length) {
    const size = Math.min(length, CELLS);
    const strongest = new Float32Array(size * size);
    weights.forEach((weight, at) => {
      const [i, j] = [Math.floor(at / length), at % length];
      const cell = Math.floor((i * size) / length) * size + Math.floor((j * size) / length);
      strongest[cell] = Math.max(strongest[cell], weight);
    });
    const picture = new ImageData(size, size);
    strongest.forEach((weight, cell) => {
      picture.data.set([30, 130, 200, 255 * Math.sqrt(weight)], 4 * cell);
    });
    Object.assign(canvas, { width: size, height: size });
    canvas.getContext("2d").putImageData(picture, 0, 0);
  }

  /** Two columns of tokens; a line leads from each token on the left to those that it looks at. */
  function lines(names, weights, chosen) {
    const length = names.length;
    const [left, right, width] = [132, 208, 340];
    const y = (i) => LINE * (i + 0.5);
    const path = (i, j) => `M${left} ${y(i)}L${right} ${y(j)}`;
    const text = (x, i, anchor, words) =>
      draw("text", { x, y: y(i), "text-anchor": anchor, "data-token": i }, words);
    const shades = Array(SHADES).fill("");
    const picture = draw("svg", { viewBox: `0 0 ${width} ${LINE * length}`, "aria-hidden": true });
    const marked = draw("g", { class: "live-chosen" });
    weights.forEach((weight, at) => {
      const [i, j] = [Math.floor(at / length), at % length];
      if (weight < (i === chosen ? FAINTEST : FAINTEST_OTHER)) return;
      if (i !== chosen) shades[Math.min(SHADES - 1, Math.floor(weight * SHADES))] += path(i, j);
      else {
        marked.append(draw("path", { d: path(i, j), "stroke-opacity": Math.sqrt(weight) }));
        marked.append(text(width, j, "end", percent(weight)));
      }
    });
    shades.forEach((d, i) =>
      picture.append(draw("path", { d, "stroke-opacity": i / SHADES / 2 + 0.1 })),
    );
    picture.append(
      draw("rect", { y: y(chosen) - LINE / 2, width: left - 4, height: LINE }),
      marked,
    );
    names.forEach((name, i) => {
      picture.append(text(left - 8, i, "end", name), text(right + 8, i, "start", name));
    });
    return picture;
  }

  let views = 0;

  class View {
    constructor(root) {
      this.root = root;
      this.group = `live-${++views}`; // of its radio buttons
      this.text = root.querySelector("textarea");
      this.head = [0, 0]; // layer and head
      const on = (name, event, act) => this.part(name)?.addEventListener(event, act);
      this.text.addEventListener("input", () => this.read());
      on("load", "click", () => this.load());
      on("mask", "click", () => this.insertMask());
      on("examples", "change", ({ target }) => this.take(target.value));
      on("tokens", "change", ({ target }) => this.choose(Number(target.value)));
      on("heads", "change", ({ target }) => this.look(...target.value.split("-").map(Number)));
      on("lines", "click", ({ target }) => {
        if (target.dataset.token) this.choose(Number(target.dataset.token));
      });
      if (this.part("guesses")) this.part("load").append(` (${liveMini.megabytes} MB)`);
    }

    /** The element of the page with this role. */
    part(name) {
      return this.root.querySelector(`.live-${name}`);
    }

    say(words) {
      this.part("status").textContent = words;
    }

    async load() {
      const [button, bar] = [this.part("load"), this.part("progress")];
      const byKeyboard = button.matches(":focus-visible");
      button.disabled = true;
      try {
        this.tokenizer = await once("tokenizer", loadTokenizer);
        this.read();
        if (bar) {
          bar.hidden = false;
          this.model = await once("model", () => loadModel((share) => (bar.value = share)));
          this.makeHeads();
          await this.read();
        }
        button.hidden = true;
        if (byKeyboard) this.text.focus();
      } catch (error) {
        this.say(`That did not load: ${error.message}. Try again.`);
      } finally {
        button.disabled = false;
        if (bar) bar.hidden = true;
      }
    }

    take(text) {
      if (!text) return;
      this.text.value = text;
      this.read();
    }

    insertMask() {
      const { text } = this;
      text.setRangeText("[MASK]", text.selectionStart, text.selectionEnd, "end");
      text.focus();
      this.read();
    }

    /** Cut the text and show its tokens; run the model on them once the keys have been still. */
    async read() {
      if (!this.tokenizer) return;
      this.running?.abort();
      this.running = new AbortController();
      this.tokens = this.tokenizer.cut(this.text.value);
      const mask = this.tokenizer.ids.get("[MASK]");
      this.masks = this.tokens.flatMap(({ id }, i) => (id === mask ? i : []));
      this.result = null; // it was of another text
      this.showTokens();
      if (this.model) await this.predict(this.running.signal);
    }

    async predict(signal) {
      this.root.classList.add("live-waiting");
      await new Promise((resume) => setTimeout(resume, PATIENCE));
      if (signal.aborted) return;
      if (this.tokens.length > LONGEST) {
        return this.say(`These are ${this.tokens.length} tokens. This page takes ${LONGEST}.`);
      }
      const start = performance.now();
      const ids = this.tokens.map(({ id }) => id);
      try {
        this.result = await this.model.run(ids, this.masks, signal);
      } catch (error) {
        if (signal.aborted) return; // another run has taken over
        throw error;
      }
      const seconds = ((performance.now() - start) / 1000).toFixed(2);
      const took = `${ids.length} tokens read in ${seconds} s`;
      this.say(this.masks.length ? took : `${took}. Insert a [MASK] to have it guessed.`);
      this.root.classList.remove("live-waiting");
      this.showGuesses();
      this.showHeads();
      this.look(...this.head);
    }

    /** A token as one can see it. */
    seen(id) {
      const special = this.tokenizer.added.find((token) => token.id === id);
      return special ? special.content : visible(Tokenizer.bytes(this.tokenizer.tokens[id]));
    }

    showTokens() {
      const labels = this.tokens.map(({ id, letters }, i) => {
        const piece = make("span", { className: letters ? "" : "live-special" }, this.seen(id));
        piece.append(make("small", {}, String(id)));
        return make("label", {}, radio(`${this.group}-token`, i), piece);
      });
      const [, box] = this.part("tokens").children;
      box.replaceChildren(...labels);
      box.parentElement.hidden = false;
      this.choose(this.masks[0] ?? 0);
    }

    /** Make a token the one whose merges and lines are shown. */
    choose(i) {
      this.token = i;
      const label = this.part("tokens").querySelectorAll("label")[i];
      label.control.checked = true;
      reveal(label.parentElement, label.offsetTop);
      this.showMerges();
      if (this.result) this.showLines();
    }

    /** How the pre-token of the chosen token was put together, merge by merge. */
    showMerges() {
      const { id, letters } = this.tokens[this.token];
      const steps = letters ? [letters] : [];
      let story = `“${this.seen(id)}” is a special token: nothing is merged`;
      if (letters) {
        const last = this.tokenizer.merge(letters, (parts) => {
          if (steps.length < MOST_STEPS) steps.push([...parts]);
        });
        const all = visible(Tokenizer.bytes(letters.join("")));
        const merges = letters.length - last.length;
        const where = last.length > 1 ? `, a part of “${all}”` : "";
        story = `“${this.seen(id)}”${where}: ${letters.length} bytes, ${merges} merges`;
      }
      const rows = steps.map((parts) => {
        const pieces = parts.map((part) => make("span", {}, visible(Tokenizer.bytes(part))));
        return make("li", {}, ...pieces);
      });
      const box = this.part("merges");
      box.hidden = false;
      box.querySelector("summary").textContent = story;
      box.querySelector("ol").replaceChildren(...rows);
    }

    showGuesses() {
      const lists = this.masks.map((_, n) => {
        const best = ModernBert.top(this.result.logits[n], GUESSES);
        const rows = best.map(({ id, probability }) => {
          const bar = make("i");
          bar.style.setProperty("--share", probability);
          return make("li", {}, make("b", {}, this.seen(id)), bar, percent(probability));
        });
        const title = this.masks.length > 1 ? `[MASK] ${n + 1}` : "[MASK]";
        return make("div", {}, make("p", {}, title), make("ol", {}, ...rows));
      });
      this.part("guesses").replaceChildren(...lists);
    }

    /** A button for each head, with room for a picture of its weights. */
    makeHeads() {
      const box = this.part("heads").querySelector("div");
      const rows = liveMini.config.layer_types.map((_, layer) => {
        const buttons = Array.from({ length: liveMini.config.num_attention_heads }, (_, head) => {
          const label = this.headName(layer, head);
          const button = radio(`${this.group}-head`, `${layer}-${head}`, label);
          return make("label", { title: label }, button, make("canvas"));
        });
        return make("p", {}, make("span", {}, this.layerName(layer)), make("span", {}, ...buttons));
      });
      box.replaceChildren(...rows);
      box.querySelector("input").checked = true;
    }

    layerName(layer) {
      const kind = liveMini.config.layer_types[layer] === "full_attention" ? "global" : "local";
      return `Layer ${layer}, ${kind}`;
    }

    headName(layer, head) {
      return `${this.layerName(layer)}, head ${head}`;
    }

    showHeads() {
      const canvases = this.part("heads").querySelectorAll("canvas");
      const weights = this.result.attentions.flat();
      canvases.forEach((canvas, i) => paint(canvas, weights[i], this.tokens.length));
      this.part("attention").hidden = false;
    }

    /** Make a head the one whose weights are shown as lines. */
    look(layer, head) {
      this.head = [layer, head];
      if (this.result) this.showLines();
    }

    showLines() {
      const weights = this.result.attentions[this.head[0]][this.head[1]]; // (L, L)
      const names = this.tokens.map(({ id }) => shortened(this.seen(id)));
      const row = weights.subarray(this.token * names.length, (this.token + 1) * names.length);
      const ranked = Array.from(row.keys()).sort((a, b) => row[b] - row[a]);
      const told = ranked.slice(0, 3).map((i) => `“${names[i]}” ${percent(row[i])}`);
      const [caption, box] = this.part("lines").children;
      const looks = `“${names[this.token]}” looks at ${told.join(", ")}`;
      caption.textContent = `${this.headName(...this.head)}: ${looks}`;
      box.replaceChildren(lines(names, weights, this.token));
      reveal(box, (box.scrollHeight * this.token) / names.length);
    }
  }

  for (const root of document.querySelectorAll(".live-model")) new View(root);
})();
