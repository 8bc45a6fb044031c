// DOM elements without HTML strings: the text of a model never becomes markup.

const SVG = "http://www.w3.org/2000/svg";

// el("a", {class: "x", href: "...", on: {click: f}}, "text", child): null children are left out.
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, { on = {}, ...attributes }, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

// SVG paths in a 24 x 24 box.
const ICONS = {
  menu: "M4 7h16M4 12h16M4 17h10",
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7.5 7.5h9v9h-9z",
  copy: "M9 9h10v11H9zM5 15V4h10",
  done: "M5 12l5 5 9-10",
  edit: "M4 20l1-4L16 5l3 3L8 19zM13 8l3 3",
  regenerate: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  bin: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13",
  more: [5, 11.3, 17.6].map((x) => `M${x} 12a.7.7 0 1 0 1.4 0a.7.7 0 1 0-1.4 0`).join(""),
  dials: "M4 8h9M17 8h3M15 6v4M4 16h3M11 16h9M9 14v4",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  help: "M9 9a3 3 0 1 1 4 3c-1 .5-1 1-1 2M12 18h.01",
  close: "M6 6l12 12M18 6L6 18",
  chart: "M4 4v16h16M7 15l4-5 3 3 5-7",
};

export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

// A button with an icon only; the label is for screen readers and for the tooltip.
export function iconButton(name, label, click, attributes = {}) {
  const common = { type: "button", class: "icon-button", "aria-label": label, title: label, on: { click } };
  return el("button", { ...common, ...attributes }, icon(name));
}

export const byId = (id) => document.getElementById(id);

// A notification at the bottom of the page for 8 seconds, with a button if there is an action.
export function toast(text, actionLabel, onAction) {
  const box = byId("toast");
  clearTimeout(toast.timer);
  const close = () => box.replaceChildren();
  const click = () => {
    close();
    onAction();
  };
  const button = actionLabel && el("button", { type: "button", on: { click } }, actionLabel);
  box.replaceChildren(el("div", { class: "toast" }, el("span", {}, text), button));
  toast.timer = setTimeout(close, 8000);
}

export async function copyText(text, button) {
  if (!navigator.clipboard) return toast("Copying requires HTTPS or a localhost address.");
  await navigator.clipboard.writeText(text);
  const content = [...button.childNodes];
  button.replaceChildren(button.matches(".icon-button") ? icon("done") : "Copied");
  setTimeout(() => button.replaceChildren(...content), 1500);
}

export function download(name, text, type) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
