// Settings of a conversation: the list of models next to the message box, and a dialog for the rest.

import { byId, el } from "./dom.js";
import { DEFAULTS } from "./store.js";

const STORAGE_KEY = "nanoghost-settings";

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
    this.form.addEventListener("input", ({ target }) => changed(this.read(target.name === "tools")));
  }

  // A new conversation starts with the last settings, but without a system message.
  defaults() {
    const last = JSON.parse(localStorage.getItem(STORAGE_KEY) ?? "{}");
    const names = this.server.models.map((model) => model.id);
    const model = names.includes(last.model) ? last.model : names[0] ?? "";
    const person = this.server.people.some(({ name }) => name === last.person) ? last.person : "";
    return { ...DEFAULTS, ...last, model, person, system: "" };
  }

  remember(fields) {
    localStorage.setItem(STORAGE_KEY, JSON.stringify({ ...this.defaults(), ...fields, system: "" }));
  }

  // With the tools only once the user has chosen some: until then they follow the model.
  read(withTools) {
    const { elements } = this.form;
    const tools = [...this.form.querySelectorAll("[name=tools]:checked")].map((box) => box.value);
    const maxTokens = parseInt(elements.max_tokens.value, 10);
    return {
      person: elements.person.value,
      system: elements.system.value,
      temperature: Number(elements.temperature.value),
      top_p: Number(elements.top_p.value),
      max_tokens: maxTokens >= 1 ? maxTokens : DEFAULTS.max_tokens,
      ...(withTools && { tools }),
    };
  }

  // The tools that are offered to the model, null if it cannot call any. Unless the user has chosen some, these are the
  // server's for a model that learned here to call them, and none for another.
  tools({ model: name, tools }) {
    const find = (id) => this.server.models.find((model) => model.id === id);
    const model = find(name) ?? find(name.split("@")[0]);  // an adapter may be deleted: BASE@ADAPTER
    if (!model?.tools) return null;
    return tools ?? (model.learned_tools ? this.server.tools.map((tool) => tool.name) : []);
  }

  // Fills the lists with what the server has.
  fill() {
    const { models, people, tools } = this.server;
    this.model.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id.replace("@", " + "))));
    const person = this.form.elements.person;
    person.replaceChildren(el("option", { value: "" }, "None"),
      ...people.map(({ name, base }) => el("option", { value: name }, base ? `${name} (adapter for ${base})` : name)));
    byId("tools").replaceChildren(...tools.map(({ name, description }) =>
      el("label", { class: "check" }, el("input", { type: "checkbox", name: "tools", value: name }),
        el("span", {}, name, el("small", {}, description)))));
    byId("person-field").hidden = !people.length;
  }

  show(settings) {
    const { elements } = this.form;
    if (settings.model && ![...this.model.options].some(({ value }) => value === settings.model)) {
      // The model of an old conversation may be deleted. Its name is shown, and the server reports the error.
      this.model.append(el("option", { value: settings.model }, settings.model));
    }
    this.model.value = settings.model;
    for (const name of ["person", "system", "temperature", "top_p", "max_tokens"]) {
      if (document.activeElement !== elements[name]) elements[name].value = settings[name];
    }
    const tools = this.tools(settings);
    for (const box of this.form.querySelectorAll("[name=tools]")) box.checked = Boolean(tools?.includes(box.value));
    byId("temperature-value").textContent = settings.temperature.toFixed(2);
    byId("top-p-value").textContent = settings.top_p.toFixed(2);
    byId("tools").disabled = !tools;
    byId("tools-status").textContent = this.toolsStatus(settings.model, Boolean(tools));
    const summary = [settings.person && `as ${settings.person}`, settings.system && "system message", tools?.join(", ")];
    byId("settings-summary").textContent = summary.filter(Boolean).join(" · ");
  }

  toolsStatus(model, supported) {
    if (!this.server.tools.length) return "This server has no tools.";
    if (supported) return "The server runs these tools during a reply.";
    return `${model || "This model"} was not trained to use tools.`;
  }

  // Description of the model for the empty page.
  describe(name) {
    const model = this.server.models.find(({ id }) => id === name);
    if (!model) return "";
    const millions = (model.parameters / 1e6).toLocaleString("en", { maximumFractionDigits: 1 });
    const size = model.parameters && `${millions} million parameters`;
    const context = model.context && `a context of ${model.context.toLocaleString("en")} tokens`;
    return [size, context].filter(Boolean).join(", ");
  }
}
