// SPDX-License-Identifier: Apache-2.0
// The model's card, what was measured of it, and what another target would mean.
import { call } from "./api.js";
import { bars, lines } from "./charts.js";
import { card, el, number, percent, table } from "./dom.js";
import * as store from "./store.js";

const HUES = 8; // --hue-1 … of the style sheet
const reports = new Map();

/** Calibration histograms by group; asked for once. */
export async function calibrationOf(name) {
  return (await reportOf(name)).calibration;
}

/** The threshold of a group, asked for anew where the one known is not the one expected. */
export async function thresholdNow(name, group, expected) {
  const known = async () => (await calibrationOf(name)).find((one) => one.group === group)?.threshold;
  if (await known() !== expected) reports.delete(name);
  return known();
}

async function reportOf(name) {
  if (!reports.has(name)) {
    const asked = call(`v1/models/${encodeURIComponent(name)}/report`);
    reports.set(name, asked);
    asked.catch(() => reports.delete(name));
  }
  return reports.get(name);
}

export async function draw(place, report) {
  try {
    const { models } = await call("v1/models");
    if (!place.childElementCount) place.append(el("p", { role: "status" }, "Loading …"));
    const parts = [];
    for (const model of models) parts.push(...sheet(model, await reportOf(model.name), report, () => draw(place, report)));
    place.replaceChildren(...parts);
    report(null);
  } catch (error) {
    report(error);
  }
}

function sheet(model, measured, report, again) {
  const { promise } = model.calibration;
  return [
    el("h2", {}, `${model.name}, version ${model.version}`),
    el("div", { class: "cards" },
      el("section", { class: "card wide" }, el("h3", {}, "What is promised"),
        el("p", { class: "lead" }, `${promise[0].toUpperCase()}${promise.slice(1)}`)),
      explorer(model, measured, report, again),
      ...evaluation(measured),
      ...[shifted(measured.evaluation.shifted)].filter(Boolean),
      calibrated(model),
      input(model),
      ...measured.calibration.map((group) => card(measured.calibration.length > 1 ? `Calibration scores, group ${group.group}` : "Calibration scores",
        bars(`Histogram of ${group.n} calibration scores, threshold ${number(group.threshold)}`, group.edges, group.counts,
          { x: `score ${measured.score}; larger = more unusual`, y: "images", clamped: true, beyond: group.threshold, marks: [{ at: group.threshold, name: "threshold", colour: "mark", dash: true }] })))),
  ];
}

function calibrated({ calibration, score, shadow_scores: shadows, digest }) {
  return card("Calibrated on", el("dl", {}, pairs({
    Images: `${calibration.n.toLocaleString("en")} ${calibration.unit}`, From: calibration.source || "unnamed",
    On: new Date(1000 * calibration.timestamp).toLocaleString(), Score: `${score}; beside it ${shadows.join(", ") || "none"}`,
    Model: el("code", {}, digest), Scores: el("code", {}, calibration.scores_digest), Splits: el("code", {}, calibration.splits_digest),
  })), el("p", { class: "note" }, "Digests of all that decides, of the calibration scores, and of the images in each split."));
}

function input({ classes, preprocessing: { crop, resize, interpolation, mean, std }, forward }) {
  return card("Classes and input", el("dl", {}, pairs({
    Classes: `${classes.length}: ${classes.slice(0, 40).join(", ")}${classes.length > 40 ? " …" : ""}`,
    Input: `${crop[1]} × ${crop[0]} pixels, cut from the centre after the shorter side became ${resize} (${interpolation})`,
    Colours: `red, green and blue from 0 to 1, less ${mean.join(", ")}, divided by ${std.join(", ")}`,
    "Runs on": `${forward.device}, ${forward.precision}, ${forward.mode}`,
  })));
}

const pairs = (entries) => Object.entries(entries).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);

function explorer(model, { policy, targets }, report, again) {
  const place = el("section", { class: "card wide" }, el("h3", {}, "What would another target mean?"));
  if (!targets.length) {
    place.append(el("p", {}, "The calibration is too small to promise other targets."));
    return place;
  }
  const now = targets.find((one) => one.target_id_acceptance === policy.target_id_acceptance);
  const kept = store.load(`target.${model.name}`, policy.target_id_acceptance);
  const nearest = (wanted) => targets.reduce((best, one, index) =>
    Math.abs(one.target_id_acceptance - wanted) < Math.abs(targets[best].target_id_acceptance - wanted) ? index : best, 0);
  const slider = el("input", { type: "range", id: `target-${model.name}`, min: 0, max: targets.length - 1, step: 1, value: nearest(kept) });
  const shown = el("div", { "aria-live": "polite" }), plot = el("div");
  const apply = el("button", { class: "main", onclick: () => applied(model, targets[slider.value], policy, report, again) }, "Apply as policy");
  const update = () => {
    const one = targets[slider.value];
    store.save(`target.${model.name}`, one.target_id_acceptance);
    slider.setAttribute("aria-valuetext", percent(one.target_id_acceptance));
    apply.disabled = one === now;
    shown.replaceChildren(el("p", {}, el("span", { class: "big" }, percent(one.target_id_acceptance)), ` of familiar images accepted at least: ${meaning(one, now)}`),
      consequences(one, now));
    plot.replaceChildren(...curves(targets, one, now));
  };
  slider.addEventListener("input", update);
  place.append(el("label", { for: slider.id }, "Target: share of familiar images to accept"), slider,
    el("div", { class: "split" }, el("div", {}, shown, el("p", {}, apply),
      el("p", { class: "note" }, "Applying needs the admin token. It takes effect at once for every caller, without a new fit.")), plot));
  update();
  return place;
}

const meaning = (one, now) => `about ${(1000 * one.id_deferral).toFixed(0)} of 1,000 familiar images are deferred, threshold ${number(one.threshold)}`
  + (one === now ? `, the policy now in force (${one.guarantee.kind}).` : ", promised for every target at once.");

function consequences(one, now) {
  const sets = Object.keys(one.caught);
  if (!sets.length) return el("p", { class: "soft" }, "No OOD set was evaluated; run oodgate evaluate.");
  const rows = sets.map((name) => [name, percent(one.caught[name]), percent(now.caught[name])]);
  return table("Expected share deferred", ["Set", "At this target", "Now"],
    [...rows, ["familiar images", percent(one.id_deferral), percent(now.id_deferral)]]);
}

function curves(targets, one, now) {
  const sets = Object.keys(one.caught);
  const alike = targets.filter((other) => other.guarantee.kind === "simultaneous"); // the policy in force may promise otherwise
  if (!sets.length || !alike.length) return [];
  const chart = lines("Share deferred over the target, one line for each set; the table has the numbers", alike.map((other) => 100 * other.target_id_acceptance),
    [...sets.map((name, index) => ({ name, values: alike.map((other) => other.caught[name]), colour: `hue-${1 + index % HUES}` })),
      { name: "familiar images", values: alike.map((other) => other.id_deferral), colour: "ink", dash: true }],
    { x: "target, % of familiar images accepted", y: "deferred", top: 1, height: 300,
      marks: [{ at: 100 * now.target_id_acceptance, name: "now", colour: "mark", dash: true },
        ...(one === now ? [] : [{ at: 100 * one.target_id_acceptance, name: "this target", colour: "bad" }])] });
  return alike.includes(now) ? [chart]
    : [chart, el("p", { class: "note" }, `The curves promise every target at once. The policy in force promises its own alone (${now.guarantee.kind}) and so defers a little more.`)];
}

async function applied(model, one, policy, report, again) {
  const body = { ...policy, target_id_acceptance: one.target_id_acceptance, guarantee: one.guarantee };
  try {
    await call(`v1/models/${encodeURIComponent(model.name)}/policy`, { method: "PUT", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
    reports.delete(model.name);
    await again();
  } catch (error) {
    report(error);
  }
}

function evaluation({ evaluation: { id, decisions, ood, p_values: spread }, score }) {
  const place = el("section", { class: "card wide" }, el("h3", {}, "What was measured"));
  if (id) {
    const [low, high] = id.acceptance_interval;
    place.append(el("p", {}, `On ${id.n.toLocaleString("en")} test images it had never seen: accepted ${percent(id.acceptance)} (95 % interval ${percent(low)} to ${percent(high)})`
      + (id.accuracy == null ? "." : `, right on ${percent(id.accuracy)} of all and ${percent(id.accuracy_of_accepted)} of the accepted.`)));
  }
  const rows = Object.entries(ood).map(([name, row]) => [name, decisions[name]?.group ?? "", decisions[name]?.n.toLocaleString("en") ?? "",
    decisions[name] ? percent(decisions[name].deferral) : "", percent(row.auroc), row.auroc_interval.map((end) => (100 * end).toFixed(1)).join("–"), percent(row.ood_miss_rate_at_id95)]);
  place.append(rows.length
    ? table(`Sets that the model does not know, score ${score}, under the policy of the evaluation`, ["Set", "Kind", "Images", "Deferred", "AUROC", "95 % interval", "Missed at 95 % ID"], rows)
    : el("p", { class: "soft" }, "No evaluation is stored; run oodgate evaluate."));
  return spread ? [place, spreads(spread)] : [place];
}

const PARTS = 20; // of the line of p-values

/** Where the p-values of every set lie, side by side and on one scale. */
function spreads({ edges, id, ood }) {
  const total = (counts) => counts.reduce((sum, count) => sum + count, 0);
  const even = Array.from({ length: PARTS + 1 }, (_, index) => index / PARTS);
  const inParts = (counts) => {
    const found = new Array(PARTS).fill(0);
    for (const [index, count] of counts.entries()) found[Math.floor(PARTS * (edges[index] + edges[index + 1]) / 2)] += count / total(counts);
    return found;
  };
  const sets = Object.entries({ "familiar test images": id, ...ood }).map(([name, counts]) => [name, inParts(counts)]);
  const top = Math.max(...sets.flatMap(([, shares]) => shares));
  return el("section", { class: "card wide" }, el("h3", {}, "Where their p-values lie"),
    el("p", { class: "note" }, "Share of each set by p-value, on one scale. Familiar images lie evenly along the dashed line; a set that the gate tells apart piles up at the left, where images are deferred."),
    el("div", { class: "small" }, sets.map(([name, shares]) => el("figure", {}, el("figcaption", {}, name),
      bars(`p-values of ${name}: ${percent(shares[0])} below ${1 / PARTS}`, even, shares, { level: 1 / PARTS, top, share: true, x: "p-value", height: 170 })))));
}

function shifted(sets) {
  if (!Object.keys(sets).length) return null;
  return card("The same classes under other imaging", table("Accepted, and right among the accepted", ["Imaging", "Accepted", "Right"],
    Object.entries(sets).map(([name, one]) => [name, percent(one.acceptance), one.accuracy_of_accepted == null ? "" : percent(one.accuracy_of_accepted)])));
}
