// SPDX-License-Identifier: Apache-2.0
// The last quarter of an hour, asked for every few seconds while it is looked at.
import { call } from "./api.js";
import { bars, lines } from "./charts.js";
import { card, el, percent, table } from "./dom.js";

const EVERY_MS = 5_000;
const MINUTE = 6; // slots

let timer = 0;

export function start(place, report) {
  stop();
  const again = async () => {
    try {
      draw(place, await call("v1/monitor"));
      report(null);
    } catch (error) {
      report(error);
    }
    if (timer !== null) timer = setTimeout(again, EVERY_MS);
  };
  timer = 0;
  again();
}

export function stop() {
  clearTimeout(timer);
  timer = null;
}

function draw(place, seen) {
  const focused = document.activeElement.closest("#monitor details")?.id;
  const open = new Set([...place.querySelectorAll("details[open]")].map((details) => details.id));
  place.replaceChildren(
    el("h2", {}, "The last quarter of an hour"),
    el("div", { class: "cards" },
      Object.entries(seen.models).flatMap(([name, model]) => ofModel(name, model, seen)),
      card("Queue", el("p", {}, el("span", { class: "big" }, String(seen.queue.depth)), ` of ${seen.queue.capacity} places taken`),
        table("Not judged since the start", ["Why", "Images or requests"], Object.entries(seen.rejected_since_start))),
      card("Where the time goes", table("Milliseconds: mean, median, 95th percentile", ["Stage", "n", "Mean", "Median", "95 %"],
        Object.entries(seen.stages).map(([stage, one]) => [stage, one.count, one.mean_ms.toFixed(1), one.p50_ms.toFixed(1), one.p95_ms.toFixed(1)]))),
      Object.keys(seen.drift).length ? card("Drift", table("State of the drift tests", ["Test", "Value"],
        Object.entries(seen.drift).map(([name, value]) => [name, value.toPrecision(4)]))) : null),
    seen.grafana_url ? el("p", {}, el("a", { href: seen.grafana_url }, "Open Grafana")) : "");
  for (const id of open) place.querySelector(`#${CSS.escape(id)}`)?.setAttribute("open", "");
  if (focused) place.querySelector(`#${CSS.escape(focused)} summary`)?.focus();
}

function ofModel(name, model, { slots }) {
  const deferred = sum(model.deferred), images = deferred + sum(model.accepted);
  const rate = images ? deferred / images : 0;
  const limits = model.limits.at(-1);
  const inside = limits && rate >= limits[0] && rate <= limits[1];
  const state = !images ? "No image was judged."
    : inside ? `As expected of familiar images: between ${percent(limits[0])} and ${percent(limits[1])}.`
      : rate > limits[1] ? `More than familiar images explain (${percent(limits[1])} at most): look at what is sent.`
        : `Less than familiar images would give (${percent(limits[0])} at least).`;
  const of = (index) => model.accepted[index] + model.deferred[index];
  const rates = slots.map((_, index) => (of(index) ? model.deferred[index] / of(index) : null));
  const limit = (side) => slots.map((_, index) => model.limits[index]?.[side] ?? null);
  return [
    el("section", { class: "card wide" }, el("h3", {}, `Deferral rate of ${name}`),
      el("p", { role: "status" }, el("span", { class: "big" }, images ? percent(rate) : "–"), ` of ${images.toLocaleString("en")} images deferred. ${state}`),
      lines(`Deferral rate of ${name} over time, now ${percent(rate)}`, slots, [
        { name: "deferred", values: rates, colour: "series", dots: true },
        { name: "upper control limit", values: limit(1), colour: "bad", dash: true, stepped: true },
        { name: "lower control limit", values: limit(0), colour: "mark", dash: true, stepped: true }], { time: true, legend: true }),
      numbers(name, model, slots)),
    card("p-values", bars(`Histogram of the p-values of ${images} images; familiar images give the same number in each bar`,
      model.p_values.map((_, index) => index / model.p_values.length).concat(1), model.p_values,
      { level: images / model.p_values.length, x: "p-value",
        marks: [{ at: model.p_cutoff, name: "cut-off", colour: "bad", dash: true }] }),
    el("p", { class: "note" }, "The dashed line across: what familiar images give.")),
    card("By predicted class", Object.keys(model.classes).length ? table("Decisions by predicted class", ["Class", "Accepted", "Deferred", "Rate"],
      Object.entries(model.classes).sort(([a], [b]) => (a < b ? -1 : 1)).map(([label, one]) => [label, one.accept, one.defer, percent(one.defer / (one.accept + one.defer), 0)]))
      : el("p", { class: "soft" }, "Nothing yet.")),
  ];
}

function numbers(name, model, slots) {
  const rows = [];
  for (let start = 0; start < slots.length; start += MINUTE) {
    const accepted = sum(model.accepted.slice(start, start + MINUTE)), deferred = sum(model.deferred.slice(start, start + MINUTE));
    if (accepted + deferred) rows.push([new Date(1000 * slots[start]).toLocaleTimeString(), accepted + deferred, percent(deferred / (accepted + deferred))]);
  }
  return el("details", { id: `numbers-${name}` }, el("summary", {}, "As a table"), table("Deferral rate by minute", ["From", "Images", "Deferred"], rows.reverse()));
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
