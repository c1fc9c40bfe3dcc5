"use strict";

/* Text to token ids: byte-level BPE from a tokenizer.json, as chapter 2 builds it. */

const Tokenizer = (() => {
  // GPT-2's letters for bytes: a byte that is a visible character stands for itself.
  const LETTERS = [];
  for (let byte = 0, spare = 256; byte < 256; byte++) {
    const visible = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    LETTERS.push(String.fromCharCode(visible ? byte : spare++));
  }
  const BYTES = new Map(LETTERS.map((letter, byte) => [letter, byte]));

  // GPT-2's pre-tokens. White space is Unicode's: JavaScript's \s has U+FEFF too, and no U+0085.
  const SPACE = "\\p{White_Space}";
  const WORDS = new RegExp(
    `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+` +
      `|${SPACE}+(?!\\P{White_Space})|${SPACE}+`,
    "gu",
  );

  class Tokenizer {
    /** Takes a parsed tokenizer.json. */
    constructor({ model, added_tokens, post_processor }) {
      this.ids = new Map(Object.entries(model.vocab));
      for (const { content, id } of added_tokens) this.ids.set(content, id);
      this.tokens = [];
      for (const [token, id] of this.ids) this.tokens[id] = token;
      // A merge is a pair, or in older files the two with a space between.
      this.ranks = new Map(model.merges.map((pair, rank) => [[pair].flat().join(" "), rank]));
      this.added = added_tokens;
      this.template = post_processor.single;
      this.specials = specialTokens(added_tokens);
    }

    /** The ids of a text, in their frame of [CLS] and [SEP]. */
    encode(text) {
      return this.cut(text).map((token) => token.id);
    }

    /** The tokens of a text: their ids, and the letters of the pre-token that each is cut from. */
    cut(text) {
      return this.template.flatMap(({ SpecialToken: frame }) =>
        frame ? { id: this.ids.get(frame.id) } : this.cutBare(text),
      );
    }

    cutBare(text) {
      // Special tokens are searched in the text as it came; every second part is one.
      return text.split(this.specials).flatMap((part, i) => {
        if (i % 2) return { id: this.added.find(({ content }) => part.includes(content)).id };
        return (part.normalize("NFC").match(WORDS) ?? []).flatMap((word) => {
          const letters = Array.from(new TextEncoder().encode(word), (byte) => LETTERS[byte]);
          return this.merge(letters).map((token) => ({ id: this.ids.get(token), letters }));
        });
      });
    }

    /** Join the pair of neighbours that was learnt first, again and again; `watch` sees each step. */
    merge(letters, watch) {
      const parts = [...letters];
      const rank = (i) =>
        i + 1 < parts.length
          ? (this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity)
          : Infinity;
      const ranks = parts.map((_, i) => rank(i));
      for (;;) {
        const first = ranks.reduce((least, r) => Math.min(least, r), Infinity);
        if (first === Infinity) return parts;
        const at = ranks.indexOf(first);
        parts.splice(at, 2, parts[at] + parts[at + 1]);
        ranks.splice(at, 1);
        ranks[at] = rank(at);
        if (at > 0) ranks[at - 1] = rank(at - 1);
        watch?.(parts);
      }
    }

    /** The bytes that letters stand for. */
    static bytes(letters) {
      return Uint8Array.from(letters, (letter) => BYTES.get(letter));
    }
  }

  /** Finds any of them, the longest first, with the white space that they swallow. */
  function specialTokens(added) {
    const byLength = [...added].sort((a, b) => b.content.length - a.content.length);
    const patterns = byLength.map(({ content, lstrip, rstrip }) => {
      const name = content.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
      return `${lstrip ? `${SPACE}*` : ""}${name}${rstrip ? `${SPACE}*` : ""}`;
    });
    return new RegExp(`(${patterns.join("|")})`, "u");
  }

  return Tokenizer;
})();
