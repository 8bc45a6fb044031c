// Announcements for screen readers: whole sentences instead of tokens, without the punctuation of Markdown.

import { byId, el } from "./dom.js";

const SENTENCE_END = /[.!?…。！？]["'”’)\]*_]*\s|\n/;
const MAX_MESSAGES = 8;  // that stay in the element
const MAX_LENGTH = 400;  // characters that are announced even if no sentence ends

export class Announcer {
  constructor() {
    this.rest = "";
    this.inCode = false;
  }

  feed(text) {
    this.rest += text;
    for (;;) {
      const end = SENTENCE_END.exec(this.rest);
      if (!end && this.rest.length <= MAX_LENGTH) return;
      const length = end ? end.index + end[0].length : MAX_LENGTH;
      this.announceSentence(this.rest.slice(0, length));
      this.rest = this.rest.slice(length);
    }
  }

  finish() {
    this.announceSentence(this.rest);
    this.rest = "";
  }

  announceSentence(sentence) {
    if (/^\s*(```|~~~)/.test(sentence)) {
      this.inCode = !this.inCode;
      if (this.inCode) announce("Code.");
      return;
    }
    const plain = sentence.replace(/!?\[([^\]\n]*)\]\([^)\s]*\)/g, "$1").replace(/[*_`#>|~]+/g, "").trim();
    if (plain && !this.inCode) announce(plain);  // code is not announced
  }
}

export function announce(text) {
  const live = byId("live");
  live.append(el("p", {}, text));
  while (live.children.length > MAX_MESSAGES) live.firstChild.remove();
}
