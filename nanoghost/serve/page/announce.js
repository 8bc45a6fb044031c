// What is said to those who listen: whole sentences, not tokens, and no punctuation of Markdown.

import { byId, el } from "./dom.js";

const END = /[.!?…。！？]["'”’)\]*_]*\s|\n/;
const LONGEST = 400;  // characters without an end of a sentence

export class Announcer {
  constructor() {
    this.rest = "";
    this.code = false;
  }

  feed(text) {
    this.rest += text;
    for (let end; (end = END.exec(this.rest)) || this.rest.length > LONGEST; ) {
      const at = end ? end.index + end[0].length : LONGEST;
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
      this.code = !this.code;
      return this.code && announce("Code.");
    }
    const plain = sentence.replace(/!?\[([^\]\n]*)\]\([^)\s]*\)/g, "$1").replace(/[*_`#>|~]+/g, "").trim();
    if (plain && !this.code) announce(plain);  // code is read where it stands
  }
}

export function announce(text) {
  const live = byId("live");
  live.append(el("p", {}, text));
  while (live.children.length > 8) live.firstChild.remove();
}
