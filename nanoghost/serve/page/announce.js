// Announcements for screen readers: whole sentences instead of tokens, without the punctuation of Markdown.

import { byId, el } from "./dom.js";

const SENTENCE_END = /[.!?…。！？]["'”’)\]*_]*\s|\n/;
const MAX_LENGTH = 400;  // characters that are announced even if no sentence ends

export class Announcer {
  constructor() {
    this.rest = "";
    this.inCode = false;
  }

  feed(text) {
    this.rest += text;
    for (let end; (end = SENTENCE_END.exec(this.rest)) || this.rest.length > MAX_LENGTH; ) {
      const at = end ? end.index + end[0].length : MAX_LENGTH;
      this.say(this.rest.slice(0, at));
      this.rest = this.rest.slice(at);
    }
  }

  finish() {
    this.say(this.rest);
    this.rest = "";
  }

  say(sentence) {
    if (/^\s*(```|~~~)/.test(sentence)) {
      this.inCode = !this.inCode;
      return this.inCode && announce("Code.");
    }
    const plain = sentence.replace(/!?\[([^\]\n]*)\]\([^)\s]*\)/g, "$1").replace(/[*_`#>|~]+/g, "").trim();
    if (plain && !this.inCode) announce(plain);  // code is not announced
  }
}

export function announce(text) {
  const live = byId("live");
  live.append(el("p", {}, text));
  while (live.children.length > 8) live.firstChild.remove();
}
