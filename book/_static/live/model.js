"use strict";

/* ModernBERT for masked language modelling, one sequence at a time: the package's model once more,
   in JavaScript. A matrix is a Float32Array, row after row; comments give its shape: L tokens,
   C hidden size, I intermediate size, H heads, D head dimension, V vocabulary. */

const ModernBert = (() => {
  const SLICE = 12; // milliseconds of work between two turns of the page
  let sliceStart = 0;

  /** Let the page have its turn, where it is due. */
  async function rest() {
    if (performance.now() - sliceStart < SLICE) return;
    await new Promise((resume) => setTimeout(resume));
    sliceStart = performance.now();
  }

  /** The tensors of a safetensors file, all float32: {name: {data, shape}}. */
  function readSafetensors({ buffer }) {
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
    delete header.__metadata__;
    const tensors = {};
    for (const [name, { shape, data_offsets }] of Object.entries(header)) {
      const [start, end] = data_offsets;
      const data = new Float32Array(buffer, 8 + length + start, (end - start) / 4);
      tensors[name] = { data, shape };
    }
    return tensors;
  }

  /** Some rows of a matrix with rows of this width. */
  function takeRows(x, width, indices) {
    const y = new Float32Array(indices.length * width);
    indices.forEach((row, i) => y.set(x.subarray(row * width, (row + 1) * width), i * width));
    return y;
  }

  /** `count` columns of a matrix with rows of this width. */
  function takeColumns(x, width, first, count) {
    const y = new Float32Array((x.length / width) * count);
    for (let row = 0; row * width < x.length; row++) {
      const start = row * width + first;
      y.set(x.subarray(start, start + count), row * count);
    }
    return y;
  }

  /** Put `count` columns into a matrix with rows of this width, in place. */
  function putColumns(x, width, first, y, count) {
    for (let row = 0; row * width < x.length; row++) {
      x.set(y.subarray(row * count, (row + 1) * count), row * width + first);
    }
  }

  const add = (x, y) => x.map((value, i) => value + y[i]);

  /** The sum of `length` products, from x[i] and y[j] on. */
  function dot(x, i, y, j, length) {
    let sum = 0;
    for (let d = 0; d < length; d++) sum += x[i + d] * y[j + d];
    return sum;
  }

  /** x (L, in) times the transpose of a weight (out, in), a row at a time: (L, out). */
  async function linear(x, { data, shape: [outputs, inputs] }) {
    const y = new Float32Array((x.length / inputs) * outputs);
    for (let i = 0; i < y.length; i++) {
      const row = Math.floor(i / outputs);
      y[i] = dot(x, row * inputs, data, (i % outputs) * inputs, inputs);
      if (i % outputs === 0) await rest();
    }
    return y;
  }

  /** LayerNorm of every row, without bias. */
  function layerNorm(x, { data: weight }, epsilon) {
    const y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += weight.length) {
      const row = x.subarray(start, start + weight.length); // (C,)
      const mean = row.reduce((sum, value) => sum + value, 0) / row.length;
      const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / row.length;
      const scale = 1 / Math.sqrt(variance + epsilon);
      for (let c = 0; c < row.length; c++) y[start + c] = (row[c] - mean) * scale * weight[c];
    }
    return y;
  }

  /** erf(x) = 2/√π · exp(−x²) · Σ 2ⁿ x²ⁿ⁺¹ / (1·3·…·(2n+1)); no two terms differ in sign. */
  function erf(x) {
    if (Math.abs(x) > 6) return Math.sign(x);
    let term = x;
    let sum = x;
    for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
      term *= (2 * x * x) / (2 * n + 1);
      sum += term;
    }
    return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
  }

  const gelu = (x) => (x / 2) * (1 + erf(x / Math.SQRT2));

  /** Scores to weights that sum to 1, in place. */
  function softmax(x) {
    const largest = x.reduce((a, b) => Math.max(a, b));
    let sum = 0;
    for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - largest);
    for (let i = 0; i < x.length; i++) x[i] /= sum;
    return x;
  }

  /** Turn every pair (d, d + D/2) of x (L, D) by its position's angle, in place. */
  function rotate(x, dim, { rope_theta: theta, factor = 1 }) {
    const half = dim / 2;
    for (let d = 0; d < half; d++) {
      // Rounded to float32 where the package rounds: far out, angles feel it.
      const power = Math.fround(theta ** Math.fround(d / half));
      const frequency = Math.fround(Math.fround(1 / power) / factor);
      for (let position = 0; position * dim < x.length; position++) {
        const angle = Math.fround(position * frequency);
        const at = position * dim + d;
        const [a, b] = [x[at], x[at + half]];
        x[at] = a * Math.cos(angle) - b * Math.sin(angle);
        x[at + half] = b * Math.cos(angle) + a * Math.sin(angle);
      }
    }
    return x;
  }

  /** One head: mix the rows of v as softmax(q·k/√D) says; q, k and v are (L, D). */
  async function attend(q, k, v, dim, reach) {
    const length = q.length / dim;
    const mixed = new Float32Array(q.length); // (L, D)
    const weights = new Float32Array(length * length); // (L, L); out of reach they stay 0
    for (let i = 0; i < length; i++) {
      const first = Math.max(0, i - reach);
      const row = weights.subarray(
        i * length + first,
        i * length + Math.min(length, i + reach + 1),
      );
      row.forEach((_, j) => {
        row[j] = dot(q, i * dim, k, (first + j) * dim, dim) / Math.sqrt(dim);
      });
      softmax(row).forEach((weight, j) => {
        for (let d = 0; d < dim; d++) mixed[i * dim + d] += weight * v[(first + j) * dim + d];
      });
      await rest();
    }
    return { mixed, weights };
  }

  class ModernBert {
    /** Takes a parsed config.json, and the bytes of a model.safetensors. */
    constructor(config, bytes) {
      this.config = config;
      this.tensors = readSafetensors(bytes);
    }

    /**
     * Encode one sequence, and predict the tokens at some of its places.
     *
     * Resolves to {logits, attentions}: logits[n] is (V,) for the n-th place;
     * attentions[layer][head] is (L, L), a row for each token that looks.
     * Rejects where the signal aborts.
     */
    async run(ids, places, signal) {
      const embeddings = this.tensors["model.embeddings.tok_embeddings.weight"]; // (V, C)
      let x = takeRows(embeddings.data, this.config.hidden_size, ids); // (L, C)
      x = this.norm(x, "model.embeddings.norm");
      const attentions = [];
      for (const [i, kind] of this.config.layer_types.entries()) {
        signal?.throwIfAborted();
        const name = `model.layers.${i}`;
        // Layer 0 has no attn_norm: the embeddings are normed already.
        const normed = i ? this.norm(x, `${name}.attn_norm`) : x;
        const { mixed, weights } = await this.attention(normed, `${name}.attn`, kind);
        x = add(x, mixed);
        x = add(x, await this.geglu(this.norm(x, `${name}.mlp_norm`), `${name}.mlp`));
        attentions.push(weights);
      }
      x = this.norm(x, "model.final_norm");
      return { logits: await this.head(takeRows(x, this.config.hidden_size, places)), attentions };
    }

    norm(x, name) {
      return layerNorm(x, this.tensors[`${name}.weight`], this.config.norm_eps);
    }

    linear(x, name) {
      return linear(x, this.tensors[`${name}.weight`]);
    }

    async attention(x, name, kind) {
      const { hidden_size: width, num_attention_heads: heads, local_attention } = this.config;
      const dim = width / heads;
      const reach = kind === "full_attention" ? Infinity : Math.floor(local_attention / 2);
      const qkv = await this.linear(x, `${name}.Wqkv`); // (L, 3·H·D)
      const mixed = new Float32Array(x.length); // (L, H·D)
      const weights = [];
      for (let head = 0; head < heads; head++) {
        const part = (p) => takeColumns(qkv, 3 * width, p * width + head * dim, dim); // (L, D)
        const q = rotate(part(0), dim, this.config.rope_parameters[kind]);
        const k = rotate(part(1), dim, this.config.rope_parameters[kind]);
        const result = await attend(q, k, part(2), dim, reach);
        putColumns(mixed, width, head * dim, result.mixed, dim);
        weights.push(result.weights);
      }
      return { mixed: await this.linear(mixed, `${name}.Wo`), weights };
    }

    /** The feed-forward block: gelu(input) · gate, between two projections. */
    async geglu(x, name) {
      const inner = this.config.intermediate_size;
      const both = await this.linear(x, `${name}.Wi`); // (L, 2·I)
      const input = takeColumns(both, 2 * inner, 0, inner); // (L, I)
      const gate = takeColumns(both, 2 * inner, inner, inner); // (L, I)
      return this.linear(
        input.map((value, i) => gelu(value) * gate[i]),
        `${name}.Wo`,
      );
    }

    /** The logits at some places x (places, C): a list of (V,). */
    async head(x) {
      const dense = await this.linear(x, "head.dense"); // (places, C)
      const normed = this.norm(dense.map(gelu), "head.norm"); // (places, C)
      // The decoder is the embedding table again; its bias is its own.
      const logits = await this.linear(normed, "model.embeddings.tok_embeddings"); // (places, V)
      const bias = this.tensors["decoder.bias"].data; // (V,)
      const starts = Array.from({ length: logits.length / bias.length }, (_, n) => n * bias.length);
      return starts.map((start) => add(logits.subarray(start, start + bias.length), bias));
    }

    /** The k most probable ids, best first: [{id, probability}]. */
    static top(logits, k) {
      const probabilities = softmax(logits.slice()); // (V,)
      const best = [];
      probabilities.forEach((probability, id) => {
        if (best.length === k && probability <= best.at(-1).probability) return;
        best.push({ id, probability });
        best.sort((a, b) => b.probability - a.probability);
        best.length = Math.min(best.length, k);
      });
      return best;
    }
  }

  return ModernBert;
})();
