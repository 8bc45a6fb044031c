// The view of models: what there is, how each was made, and curves of one that is still learning.

import { getJson, getText } from "./api.js";
import { byStage, chart, charts, STAGES } from "./curves.js";
import { byId, el, icon } from "./dom.js";

const named = (stage) => STAGES[stage] ?? stage ?? "";
const AGAIN = 2000;  // milliseconds between questions about a run that goes on

export class Runs {
  constructor() {
    this.view = byId("runs");
    this.timer = null;
    this.shown = 0;  // counts views, so that what comes late for an old one is dropped
  }

  leave() {
    clearTimeout(this.timer);
    this.shown += 1;
  }

  async open(name) {
    this.leave();
    const turn = this.shown;
    this.view.replaceChildren(el("p", { class: "soft" }, "…"));
    try {
      const { data } = await getJson("/runs");
      if (turn !== this.shown) return;
      if (!name) return this.list(data);
      const run = data.find((one) => one.name === name);
      if (!run) throw new Error(`There is no model called ${name}.`);
      await this.one(run, turn);
    } catch (error) {
      if (turn === this.shown) this.view.replaceChildren(this.problem(error, () => this.open(name)));
    }
  }

  problem(error, again) {
    const button = el("button", { type: "button", class: "plain", on: { click: again } }, "Try again");
    return el("p", { class: "problem" }, error.message, " ", button);
  }

  list(runs) {
    const rows = runs.map(({ name, stage, finished, report }) => {
      const state = !finished ? ", learning now" : report ? ", report" : "";
      return el("li", {}, el("a", { href: `#/runs/${encodeURIComponent(name)}` }, el("span", { class: "title" }, name),
        el("span", { class: finished ? "soft" : "live" }, named(stage) + state), icon("right")));
    });
    this.view.replaceChildren(el("h2", { class: "view-title" }, "Models"),
      el("p", { class: "soft" }, runs.length ? "How each was made and what it can do." : "No model has been made here yet."),
      el("ul", { class: "runs" }, rows));
  }

  async one(run, turn) {
    this.state = el("p", { class: "soft", role: "status" });
    this.curves = el("div");
    // A report has a title of its own.
    const title = el("h2", { class: run.finished && run.report ? "unseen" : "view-title" }, run.name);
    const back = el("a", { class: "back", href: "#/runs" }, icon("left"), "Models");
    this.view.replaceChildren(back, title, this.state, this.curves);
    this.events = [];
    if (run.finished && run.report) {
      await this.report(run, turn);
      return;
    }
    await this.follow(run, 0, turn);
  }

  // Asks for what is new until the run is finished.
  async follow(run, from, turn) {
    let next = from;
    let finished = run.finished;
    try {
      const { data, next: place } = await getJson(`/runs/${encodeURIComponent(run.name)}/events?after=${from}`);
      if (turn !== this.shown) return;
      next = place;
      this.events.push(...data);
      if (data.length) return await this.follow(run, next, turn);  // there may be more: long logs come in pieces
      this.draw(run);
      if (!finished) finished = (await getJson("/runs")).data.find(({ name }) => name === run.name)?.finished ?? true;
    } catch (error) {
      this.state.textContent = `${error.message} Trying again …`;
    }
    if (turn !== this.shown) return;
    if (!finished) this.timer = setTimeout(() => this.follow(run, next, turn), AGAIN);
    else if (!run.finished) this.open(run.name);  // now it has a report
  }

  draw(run) {
    const stages = byStage(this.events).map(([stage, events]) => [stage, charts(events)]).filter(([, drawn]) => drawn.length);
    const last = this.events.at(-1);
    if (!run.finished) this.state.textContent = last ? progress(last) : "It has not begun yet.";
    else this.state.textContent = stages.length ? "" : "Nothing was learned here: it came as it is.";
    // The stage that goes on stands first.
    this.curves.replaceChildren(...stages.reverse().map(([stage, drawn]) =>
      el("section", {}, el("h3", {}, named(stage)), el("div", { class: "charts" }, drawn.map(chart)))));
  }

  // The report is a page of its own. It is put into a frame without scripts; its style goes in as a sheet, because the frame
  // inherits this page's Content-Security-Policy (an address of its own could not be asked for with a key).
  async report(run, turn) {
    const text = await getText(`/runs/${encodeURIComponent(run.name)}/report`);
    if (turn !== this.shown) return;
    const title = `Report of ${run.name}`;
    const frame = el("iframe", { sandbox: "allow-same-origin", title, class: "report", srcdoc: "<!doctype html>" });
    this.curves.replaceChildren(frame);
    await new Promise((loaded) => (frame.onload = loaded));
    const { contentDocument: inside, contentWindow: world } = frame;
    const sheet = new world.CSSStyleSheet();
    const styles = [];
    const markup = text
      .replace(/<style[^>]*>(.*?)<\/style>/gs, (_, rules) => (styles.push(rules), ""))
      .replace(/(<[^<>]*\s)style=/g, "$1data-style=");
    const parsed = new DOMParser().parseFromString(markup, "text/html");
    for (const made of parsed.querySelectorAll("script, meta[http-equiv], link, base")) made.remove();
    sheet.replaceSync(styles.join(""));
    inside.replaceChild(inside.adoptNode(parsed.documentElement), inside.documentElement);
    inside.adoptedStyleSheets = [sheet];
    for (const node of inside.querySelectorAll("[data-style]")) node.style.cssText = node.dataset.style;
  }
}

function progress({ stage, step, steps, seconds_left: left }) {
  const where = steps ? `step ${Math.floor(step) + 1} of ${steps}` : `step ${Math.floor(step) + 1}`;
  const rest = left > 90 ? `, about ${Math.round(left / 60)} minutes left` : left > 0 ? `, ${Math.round(left)} s left` : "";
  return `${named(stage)}, ${where}${rest}`;
}
