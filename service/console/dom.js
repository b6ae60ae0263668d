// SPDX-License-Identifier: Apache-2.0
// Elements without markup in strings, so that no name of a file or class is ever read as HTML.

export const $ = (selector, within = document) => within.querySelector(selector);

export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export const card = (title, ...children) => el("section", { class: "card" }, el("h3", {}, title), ...children);

export function table(caption, head, rows) {
  const numeric = head.map((_, column) => rows.length > 0 && rows.every((row) => /^[-−]?[\d.,–]+(\s%)?$/.test(row[column])));
  const cell = (tag) => (value, column) => el(tag, { class: numeric[column] ? "number" : null, scope: tag === "th" ? "col" : null }, value instanceof Node ? value : String(value));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, head.map(cell("th")))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell("td")))))));
}

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;

/** Only what is certain is 100 %. */
export const confidence = (share) => percent(share < 1 ? Math.min(share, 0.999) : share);

export const number = (value) => Math.abs(value) >= 1000 || value === 0 ? value.toFixed(0) : value.toPrecision(3);
