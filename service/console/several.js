// SPDX-License-Identifier: Apache-2.0
// Several images as a table that sorts by any column.
import { plain } from "./api.js";
import { $, confidence, el } from "./dom.js";
import * as store from "./store.js";

const COLUMNS = [
  ["name", "Image", (item) => item.name],
  ["decision", "Decision", (item) => item.verdict?.decision ?? (item.problem ? "problem" : "waits")],
  ["label", "Prediction", (item) => item.verdict?.prediction.label ?? ""],
  ["confidence", "Confidence", (item) => item.verdict?.prediction.confidence ?? -1],
  ["p", "p-value", (item) => item.verdict?.ood?.p_value ?? -1],
];
const NUMBERS = ["confidence", "p"];

/** The table in its place, hidden for fewer than two images; `choose` is told the number of the row that was picked. */
export function draw(place, items, chosen, choose) {
  place.hidden = items.length < 2;
  if (place.hidden) return;
  const order = store.load("order", { by: "p", up: true });
  const sortBy = (key) => {
    store.save("order", { by: key, up: order.by === key ? !order.up : true });
    draw(place, items, chosen, choose);
  };
  const focused = document.activeElement?.dataset?.key;
  const deferred = items.filter((item) => item.verdict?.decision === "defer").length;
  const waiting = items.filter((item) => !item.verdict && !item.problem).length;
  place.replaceChildren(el("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": "Verdicts" },
    el("table", { class: "verdicts" },
      el("caption", {}, el("strong", {}, `${items.length} images, ${deferred} deferred${waiting ? `, ${waiting} waiting` : ""}`), " · pick one to see why"),
      el("thead", {}, el("tr", {}, el("td"), COLUMNS.map((column) => head(column, order, sortBy)))),
      el("tbody", {}, sorted(items, order).map(({ item, index }) => row(item, index, chosen, choose))))));
  if (focused) $(`[data-key="${CSS.escape(focused)}"]`, place)?.focus();
}

function sorted(items, { by, up }) {
  const value = COLUMNS.find(([key]) => key === by)[2];
  const compare = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (up ? 1 : -1);
  return items.map((item, index) => ({ item, index })).sort((a, b) => compare(a.item, b.item));
}

const classes = (key) => [key === "confidence" && "extra", NUMBERS.includes(key) && "number"].filter(Boolean).join(" ") || null;

function head([key, title], { by, up }, sortBy) {
  const sort = by === key ? (up ? "ascending" : "descending") : "none";
  return el("th", { scope: "col", class: classes(key), "aria-sort": sort },
    el("button", { "data-key": key, onclick: () => sortBy(key) }, title, el("span", { "aria-hidden": "true" }, { none: " ↕", ascending: " ▲", descending: " ▼" }[sort])));
}

function row(item, index, chosen, choose) {
  const { verdict } = item;
  return el("tr", { class: index === chosen ? "chosen" : null },
    el("td", {}, item.thumbnail ? el("img", { src: item.thumbnail, alt: "", width: 40, height: 40 }) : ""),
    el("td", {}, el("button", { class: "link", "data-key": `row-${index}`, "aria-current": index === chosen ? "true" : null, onclick: () => choose(index) }, item.name)),
    ...(verdict
      ? [el("td", {}, el("span", { class: `tag ${verdict.decision}` }, verdict.decision)), el("td", {}, verdict.prediction.label),
        el("td", { class: classes("confidence") }, confidence(verdict.prediction.confidence)), el("td", { class: "number" }, verdict.ood?.p_value.toFixed(4) ?? "–")]
      : [el("td", { colspan: 4 }, item.problem ? plain(item.problem) : "waits for another try")]));
}
