// SPDX-License-Identifier: Apache-2.0
// The last quarter of an hour, asked for every few seconds while it is looked at.
import { call } from "./api.js";
import { bars, lines } from "./charts.js";
import { card, el, percent, table } from "./dom.js";

const EVERY_MS = 5_000;
const MINUTE = 6; // slots
const MOST = 12; // classes in the table

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
    el("div", { class: "heading" }, el("h2", {}, "The last quarter of an hour"),
      seen.grafana_url ? el("a", { href: seen.grafana_url, class: "button" }, "Open Grafana") : null),
    el("div", { class: "cards" },
      Object.entries(seen.models).flatMap(([name, model]) => ofModel(name, model, seen)),
      ...drift(seen.drift), queue(seen), stages(seen.stages)));
  for (const id of open) place.querySelector(`#${CSS.escape(id)}`)?.setAttribute("open", "");
  if (focused) place.querySelector(`#${CSS.escape(focused)} summary`)?.focus();
}

const nothing = () => el("p", { class: "soft" }, "Nothing yet.");

function ofModel(name, model, { slots, slot_seconds: seconds }) {
  const deferred = sum(model.deferred), images = deferred + sum(model.accepted);
  const title = `Deferral rate of ${name}`;
  if (!images) {
    return [el("section", { class: "card wide" }, el("h3", {}, title),
      el("p", { role: "status" }, el("span", { class: "big" }, "–"), " of 0 images deferred. No image was judged."),
      el("p", { class: "soft" }, "This page fills by itself: send an image to v1/verdict, or try one."))];
  }
  return [
    el("section", { class: "card wide" }, el("h3", {}, title),
      el("p", { role: "status" }, el("span", { class: "big" }, percent(deferred / images)), ` of ${images.toLocaleString("en")} images deferred. ${judgement(deferred / images, model.limits.at(-1))}`),
      rates(name, model, slots, seconds), numbers(name, model, slots)),
    card("p-values", bars(`Histogram of the p-values of ${images} images; familiar images give the same number in each bar`,
      model.p_values.map((_, index) => index / model.p_values.length).concat(1), model.p_values,
      { level: images / model.p_values.length, x: "p-value", y: "images",
        marks: [{ at: model.p_cutoff, name: "cut-off", colour: "bad" }] }),
    el("p", { class: "note" }, "The dashed line across: what familiar images give. Bars left of the cut-off are deferred.")),
    classes(model.classes),
  ];
}

function judgement(rate, limits) {
  const [low, high] = limits.map((limit) => percent(limit));
  if (rate > limits[1]) return `More than familiar images explain (${high} at most): look at what is sent.`;
  if (rate < limits[0]) return `Less than familiar images would give (${low} at least): look whether the score still works.`;
  return `As expected of familiar images: between ${low} and ${high}.`;
}

function rates(name, model, slots, seconds) {
  const of = (index) => model.accepted[index] + model.deferred[index];
  const ends = [...slots, slots.at(-1) + seconds]; // a limit holds to the end of its slot
  const limit = (side) => slots.map((_, index) => model.limits[index]?.[side] ?? null).concat(model.limits[slots.length - 1]?.[side] ?? null);
  return lines(`Deferral rate of ${name} over time`, ends, [
    { name: "deferred", values: slots.map((_, index) => (of(index) ? model.deferred[index] / of(index) : null)).concat(null), colour: "series", dots: true },
    { name: "upper control limit", values: limit(1), colour: "bad", dash: true, stepped: true },
    { name: "lower control limit", values: limit(0), colour: "mark", dash: true, stepped: true }], { time: true, y: "deferred of ten seconds" });
}

function numbers(name, model, slots) {
  const rows = [];
  for (let start = 0; start < slots.length; start += MINUTE) {
    const accepted = sum(model.accepted.slice(start, start + MINUTE)), deferred = sum(model.deferred.slice(start, start + MINUTE));
    if (accepted + deferred) rows.push([new Date(1000 * slots[start]).toLocaleTimeString(), accepted + deferred, percent(deferred / (accepted + deferred))]);
  }
  return el("details", { id: `numbers-${name}` }, el("summary", {}, "As a table"), table("Deferral rate by minute", ["From", "Images", "Deferred"], rows.reverse()));
}

function classes(seen) {
  const rows = Object.entries(seen).map(([label, { accept, defer }]) => ({ label, accept, defer, images: accept + defer })).sort((a, b) => b.images - a.images);
  return card("By predicted class", table(rows.length > MOST ? `Decisions; the ${MOST} most frequent of ${rows.length} classes` : "Decisions by predicted class",
    ["Class", "Accepted", "Deferred", "Rate"], rows.slice(0, MOST).map(({ label, accept, defer, images }) => [label, accept, defer, percent(defer / images, 0)])));
}

const TESTS = { // what each test asks; docs/drift.md has more
  window_1000: "share deferred of 1,000", window_10000: "share deferred of 10,000", cusum: "deferrals adding up",
  exchangeability: "scores unlike the calibration", deferral_rate: "more deferred than calibrated",
};

/** A card for each model whose stream is tested, from the gauges "NAME MODEL VERSION LABEL ...". */
function drift(gauges) {
  const models = new Map();
  for (const [key, value] of Object.entries(gauges)) {
    const [gauge, model, version, ...labels] = key.split(" ");
    const name = `${model}, version ${version}`;
    models.set(name, { ...models.get(name), [[gauge, ...labels].join(" ")]: value });
  }
  return [...models].map(([name, seen]) => {
    const tests = Object.keys(seen).filter((key) => key.startsWith("drift_alarm ")).map((key) => key.split(" ")[1]);
    const alarms = tests.filter((test) => seen[`drift_alarm ${test}`]);
    const state = (test) => el("span", { class: `tag ${alarms.includes(test) ? "defer" : "accept"}` }, alarms.includes(test) ? "alarm" : "quiet");
    return card(`Drift of ${name}`,
      el("p", {}, alarms.length ? `In alarm: ${alarms.join(", ")}. The stream is not what the model was calibrated on.` : "No test is in alarm."),
      table("Tests of the stream", ["Test", "Now", "State"], tests.map((test) => [
        el("div", {}, test, el("div", { class: "note" }, TESTS[test] ?? "")), statistic(seen, test), state(test)])));
  });
}

function statistic(seen, test) {
  const size = test.split("_")[1];
  if (test === "cusum") return `${seen.drift_cusum} of ${seen.drift_cusum_limit}`;
  if (test.startsWith("window_")) {
    const now = seen[`window_deferral_ratio ${size}`];
    if (now === undefined) return "–"; // several calibration groups
    const [low, high] = ["lower", "upper"].map((bound) => seen[`control_limit_ratio ${size} ${bound}`]);
    return now < low && !seen[`drift_alarm ${test}`] ? "not full yet" : `${percent(now)} in ${percent(low)} to ${percent(high)}`;
  }
  return el("span", {}, "evidence 10", el("sup", {}, seen[`drift_evidence_log10 ${test}`].toFixed(1)));
}

function queue({ queue: { depth, capacity }, rejected_since_start: rejected }) {
  const rows = Object.entries(rejected).filter(([, count]) => count).map(([why, count]) => [why.replaceAll("_", " "), count]);
  return card("Queue", el("p", {}, el("span", { class: "big" }, String(depth)), ` of ${capacity} places taken`),
    rows.length ? table("Not judged since the start", ["Why", "Images or requests"], rows) : el("p", { class: "soft" }, "Nothing was turned away since the start."));
}

function stages(seen) {
  const rows = Object.entries(seen).filter(([, one]) => one.count)
    .map(([stage, one]) => [stage, one.count, one.mean_ms.toFixed(1), one.p50_ms.toFixed(1), one.p95_ms.toFixed(1)]);
  return card("Where the time goes", rows.length ? table("Milliseconds by stage", ["Stage", "n", "Mean", "Median", "95 %"], rows) : nothing());
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
