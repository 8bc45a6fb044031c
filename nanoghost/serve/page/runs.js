// The view of models: the list, the report of each, and the curves of one in training.

import { getJson, getText } from "./api.js";
import { byStage, chart, charts, STAGES } from "./curves.js";
import { byId, el, icon } from "./dom.js";

const stageName = (stage) => STAGES[stage] ?? stage ?? "";
const POLL_INTERVAL = 2000;  // milliseconds between requests for the events of a run in training

export class Runs {
  constructor() {
    this.view = byId("runs");
    this.timer = null;
    this.viewCount = 0;  // so that a response for an earlier view is dropped
  }

  leave() {
    clearTimeout(this.timer);
    this.viewCount += 1;
  }

  async open(name) {
    this.leave();
    const viewId = this.viewCount;
    this.view.replaceChildren(el("p", { class: "muted" }, "…"));
    try {
      const { data } = await getJson("/runs");
      if (viewId !== this.viewCount) return;
      if (!name) return this.list(data);
      const run = data.find((entry) => entry.name === name);
      if (!run) throw new Error(`The model ${name} does not exist.`);
      await this.showRun(run, viewId);
    } catch (error) {
      if (viewId === this.viewCount) this.view.replaceChildren(this.problem(error, () => this.open(name)));
    }
  }

  problem(error, retry) {
    const button = el("button", { type: "button", class: "text-button", on: { click: retry } }, "Try again");
    return el("p", { class: "problem" }, error.message, " ", button);
  }

  list(runs) {
    const rows = runs.map(({ name, stage, finished, report }) => {
      let state = stageName(stage);
      if (!finished) state += ", in training";
      else if (report) state += ", report";
      return el("li", {}, el("a", { href: `#/runs/${encodeURIComponent(name)}` }, el("span", { class: "title" }, name),
        el("span", { class: finished ? "muted" : "in-training" }, state), icon("right")));
    });
    this.view.replaceChildren(el("h2", { class: "view-title" }, "Models"),
      el("p", { class: "muted" }, runs.length ? "How each model was trained, and its evaluation." : "No models yet."),
      el("ul", { class: "runs" }, rows));
  }

  async showRun(run, viewId) {
    this.state = el("p", { class: "muted", role: "status" });
    this.curves = el("div");
    // A report has its own title.
    const title = el("h2", { class: run.finished && run.report ? "visually-hidden" : "view-title" }, run.name);
    const back = el("a", { class: "back", href: "#/runs" }, icon("left"), "Models");
    this.view.replaceChildren(back, title, this.state, this.curves);
    this.events = [];
    if (run.finished && run.report) {
      await this.report(run, viewId);
      return;
    }
    await this.follow(run, 0, viewId);
  }

  // Requests new events until the run is finished.
  async follow(run, from, viewId) {
    let next = from;
    let finished = run.finished;
    try {
      const { data, next: position } = await getJson(`/runs/${encodeURIComponent(run.name)}/events?after=${from}`);
      if (viewId !== this.viewCount) return;
      next = position;
      this.events.push(...data);
      // A response has a limited number of events: there may be more.
      if (data.length) return await this.follow(run, next, viewId);
      this.draw(run);
      if (!finished) finished = (await getJson("/runs")).data.find(({ name }) => name === run.name)?.finished ?? true;
    } catch (error) {
      this.state.textContent = `${error.message} Trying again …`;
    }
    if (viewId !== this.viewCount) return;
    if (!finished) this.timer = setTimeout(() => this.follow(run, next, viewId), POLL_INTERVAL);
    else if (!run.finished) this.open(run.name);  // it may have a report now
  }

  draw(run) {
    const stages = byStage(this.events)
      .map(([stage, events]) => ({ stage, stageCharts: charts(events) }))
      .filter(({ stageCharts }) => stageCharts.length);
    const last = this.events.at(-1);
    if (!run.finished) this.state.textContent = last ? progress(last) : "Not started yet.";
    else this.state.textContent = stages.length ? "" : "No training curves for this model.";
    // The latest stage comes first.
    this.curves.replaceChildren(...stages.reverse().map(({ stage, stageCharts }) =>
      el("section", {}, el("h3", {}, stageName(stage)), el("div", { class: "charts" }, stageCharts.map(chart)))));
  }

  // The report is an HTML page. It goes into a frame without scripts. A frame with an address could not send the API key, so
  // the content is inserted here; its style becomes a style sheet object, because the frame inherits this page's
  // Content-Security-Policy, which forbids inline styles.
  async report(run, viewId) {
    const text = await getText(`/runs/${encodeURIComponent(run.name)}/report`);
    if (viewId !== this.viewCount) return;
    const title = `Report of ${run.name}`;
    const frame = el("iframe", { sandbox: "allow-same-origin", title, class: "report", srcdoc: "<!doctype html>" });
    this.curves.replaceChildren(frame);
    await new Promise((loaded) => (frame.onload = loaded));
    const { contentDocument: inside, contentWindow: frameWindow } = frame;
    const sheet = new frameWindow.CSSStyleSheet();
    const styles = [];
    const markup = text
      .replace(/<style[^>]*>(.*?)<\/style>/gs, (_, rules) => {
        styles.push(rules);
        return "";
      })
      .replace(/(<[^<>]*\s)style=/g, "$1data-style=");
    const parsed = new DOMParser().parseFromString(markup, "text/html");
    for (const node of parsed.querySelectorAll("script, meta[http-equiv], link, base")) node.remove();
    sheet.replaceSync(styles.join(""));
    inside.replaceChild(inside.adoptNode(parsed.documentElement), inside.documentElement);
    inside.adoptedStyleSheets = [sheet];
    for (const node of inside.querySelectorAll("[data-style]")) node.style.cssText = node.dataset.style;
  }
}

function progress({ stage, step, steps, seconds_left: secondsLeft }) {
  let text = `${stageName(stage)}, step ${Math.floor(step) + 1}`;
  if (steps) text += ` of ${steps}`;
  if (secondsLeft > 90) text += `, about ${Math.round(secondsLeft / 60)} minutes left`;
  else if (secondsLeft > 0) text += `, ${Math.round(secondsLeft)} s left`;
  return text;
}
