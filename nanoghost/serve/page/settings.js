// Who answers, and how: the model's list beside the message box, and a sheet for the rest. Each conversation has its own.

import { byId, el } from "./dom.js";
import { DEFAULTS } from "./store.js";

const LAST = "nanoghost-settings";

export class Settings {
  // `server`: {models, people, tools}; `change(fields)`: new settings of the conversation that is shown.
  constructor(server, change) {
    this.server = server;
    this.model = byId("model");
    this.form = byId("settings-form");
    const changed = (fields) => {
      change(fields);
      this.remember(fields);
    };
    this.model.addEventListener("change", () => changed({ model: this.model.value }));
    byId("settings").addEventListener("click", () => byId("settings-sheet").showModal());
    this.form.addEventListener("input", () => changed(this.read()));
  }

  // A new conversation begins as the last one was set, but is told nothing.
  defaults() {
    const last = JSON.parse(localStorage.getItem(LAST) ?? "{}");
    const names = this.server.models.map((model) => model.id);
    const model = names.includes(last.model) ? last.model : names[0] ?? "";
    const person = this.server.people.some(({ name }) => name === last.person) ? last.person : "";
    return { ...DEFAULTS, ...last, model, person, system: "" };
  }

  remember(fields) {
    localStorage.setItem(LAST, JSON.stringify({ ...this.defaults(), ...fields, system: "" }));
  }

  read() {
    const { elements } = this.form;
    const tools = [...this.form.querySelectorAll("[name=tools]:checked")].map((box) => box.value);
    const longest = parseInt(elements.max_tokens.value, 10);
    return {
      person: elements.person.value,
      system: elements.system.value,
      temperature: Number(elements.temperature.value),
      top_p: Number(elements.top_p.value),
      max_tokens: longest >= 1 ? longest : DEFAULTS.max_tokens,
      tools,
    };
  }

  knowsTools(name) {
    const model = (id) => this.server.models.find((one) => one.id === id);
    return Boolean(model(name)?.tools ?? model(name.split("@")[0])?.tools);
  }

  // The lists of what there is, once the server has said.
  fill() {
    const { models, people, tools } = this.server;
    this.model.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id.replace("@", " + "))));
    const person = this.form.elements.person;
    person.replaceChildren(el("option", { value: "" }, "Nobody in particular"),
      ...people.map(({ name, base }) => el("option", { value: name }, base ? `${name} (has slept, on ${base})` : name)));
    byId("tools").replaceChildren(...tools.map(({ name, description }) =>
      el("label", { class: "check" }, el("input", { type: "checkbox", name: "tools", value: name }),
        el("span", {}, name, el("small", {}, description)))));
    byId("person-field").hidden = !people.length;
  }

  show(settings) {
    const { elements } = this.form;
    if (settings.model && ![...this.model.options].some(({ value }) => value === settings.model)) {
      // The model of an old conversation may be gone; its name is shown, and the server will say so.
      this.model.append(el("option", { value: settings.model }, settings.model));
    }
    this.model.value = settings.model;
    for (const name of ["person", "system", "temperature", "top_p", "max_tokens"]) {
      if (document.activeElement !== elements[name]) elements[name].value = settings[name];
    }
    for (const box of this.form.querySelectorAll("[name=tools]")) box.checked = settings.tools.includes(box.value);
    byId("temperature-value").textContent = settings.temperature.toFixed(2);
    byId("top-p-value").textContent = settings.top_p.toFixed(2);
    const knows = this.knowsTools(settings.model);
    byId("tools").disabled = !knows;
    byId("tools-note").textContent = !this.server.tools.length ? "This server has no tools."
      : knows ? "Run by the server while it answers." : `${settings.model || "This model"} has not learned to use tools.`;
    const told = [settings.person && `as ${settings.person}`, settings.system && "system prompt", knows && settings.tools.join(", ")];
    byId("settings-said").textContent = told.filter(Boolean).join(" · ");
  }

  // What stands on an empty page about the model.
  about(name) {
    const model = this.server.models.find(({ id }) => id === name);
    if (!model) return "";
    const millions = (model.parameters / 1e6).toLocaleString("en", { maximumFractionDigits: 1 });
    const size = model.parameters && `${millions} million parameters`;
    const context = model.context && `a context of ${model.context.toLocaleString("en")} tokens`;
    return [size, context].filter(Boolean).join(", ");
  }
}
