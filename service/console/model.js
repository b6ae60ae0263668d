// SPDX-License-Identifier: Apache-2.0
// The model's card, what was measured of it, and what another target would mean.
import { call } from "./api.js";
import { bars, lines } from "./charts.js";
import { card, el, number, percent, table } from "./dom.js";
import * as store from "./store.js";

const HUES = ["#2a6fb0", "#c2571a", "#2f8f4e", "#a8468f", "#8a7a12", "#5b5fc7", "#0e8f94", "#b33a4e"];
const reports = new Map();

/** Calibration histograms by group; asked for once. */
export async function calibrationOf(name) {
  return (await reportOf(name)).calibration;
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
  const [low, high] = model.calibration.expected_acceptance_interval;
  const { crop, resize, interpolation } = model.preprocessing;
  const sentence = model.calibration.promise;
  return [
    el("h2", {}, `${model.name}, version ${model.version}`),
    el("div", { class: "cards" },
      el("section", { class: "card wide" }, el("h3", {}, "What is promised"),
        el("p", {}, `${sentence[0].toUpperCase()}${sentence.slice(1)}`),
        el("p", {}, `95 % of such calibrations accept between ${percent(low, 2)} and ${percent(high, 2)}.`)),
      explorer(model, measured, report, again),
      evaluation(measured),
      ...[shifted(measured.evaluation.shifted)].filter(Boolean),
      card("Calibrated on", el("dl", {}, pairs({
        Images: `${model.calibration.n.toLocaleString("en")} ${model.calibration.unit}`, From: model.calibration.source || "unnamed",
        On: new Date(1000 * model.calibration.timestamp).toLocaleString(), Score: `${model.score}; beside it ${model.shadow_scores.join(", ") || "none"}`,
        Digest: el("code", {}, model.digest),
      }))),
      card("Classes and input", el("dl", {}, pairs({
        Classes: `${model.classes.length}: ${model.classes.slice(0, 40).join(", ")}${model.classes.length > 40 ? " …" : ""}`,
        Input: `${crop[1]} × ${crop[0]} pixels, cut from the centre after the shorter side became ${resize} (${interpolation})`,
        "Runs on": `${model.forward.device}, ${model.forward.precision}, ${model.forward.mode}`,
      }))),
      ...measured.calibration.map((group) => card(measured.calibration.length > 1 ? `Calibration scores, group ${group.group}` : "Calibration scores",
        bars(`Histogram of ${group.n} calibration scores, threshold ${number(group.threshold)}`, group.edges, group.counts,
          { x: `${measured.score}; larger = more unusual`, marks: [{ at: group.threshold, name: "threshold", colour: "mark", dash: true }] })))),
  ];
}

const pairs = (entries) => Object.entries(entries).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);

function explorer(model, { policy, targets }, report, again) {
  const place = el("section", { class: "card wide" }, el("h3", {}, "What would another target mean?"));
  if (!targets.length) {
    place.append(el("p", {}, "The calibration is too small to promise other targets."));
    return place;
  }
  const kept = store.load(`target.${model.name}`, policy.target_id_acceptance);
  const nearest = (wanted) => targets.reduce((best, one, index) =>
    Math.abs(one.target_id_acceptance - wanted) < Math.abs(targets[best].target_id_acceptance - wanted) ? index : best, 0);
  const slider = el("input", { type: "range", id: `target-${model.name}`, min: 0, max: targets.length - 1, step: 1, value: nearest(kept) });
  const shown = el("div", { "aria-live": "polite" });
  const apply = el("button", { class: "main", onclick: () => applied(model, targets[slider.value], policy, report, again) }, "Apply as policy");
  const update = () => {
    const one = targets[slider.value];
    store.save(`target.${model.name}`, one.target_id_acceptance);
    slider.setAttribute("aria-valuetext", percent(one.target_id_acceptance));
    apply.disabled = one.target_id_acceptance === policy.target_id_acceptance;
    shown.replaceChildren(
      el("p", {}, el("span", { class: "big" }, percent(one.target_id_acceptance)),
        ` of familiar images accepted at least: about ${(1000 * one.id_deferral).toFixed(0)} of 1,000 familiar images are deferred, threshold ${number(one.threshold)}`
        + (one.guarantee.kind === "simultaneous" ? ", promised for every target at once." : `, the policy now in force (${one.guarantee.kind}).`)),
      Object.keys(one.caught).length ? table("Expected deferrals of sets that the model does not know", ["Set", "Deferred"],
        Object.entries(one.caught).map(([name, share]) => [name, percent(share)])) : el("p", { class: "soft" }, "No OOD set was evaluated; run oodgate evaluate."));
  };
  slider.addEventListener("input", update);
  const sets = Object.keys(targets[0].caught);
  place.append(el("label", { for: slider.id }, "Target: share of familiar images to accept"), slider, shown, el("p", {}, apply),
    el("p", { class: "note" }, "Applying needs the admin token. It takes effect at once for every caller, without a new fit."));
  if (sets.length) {
    const alike = targets.filter((one) => one.guarantee.kind === "simultaneous"); // the policy in force may promise otherwise
    const xs = alike.map((one) => 100 * one.target_id_acceptance);
    place.append(lines("Share deferred over the target, one line for each set; the table above has the numbers", xs,
      [...sets.map((name, index) => ({ name, values: alike.map((one) => one.caught[name]), hue: HUES[index % HUES.length] })),
        { name: "familiar images", values: alike.map((one) => one.id_deferral), colour: "ink", dash: true }],
      { x: "target, % of familiar images accepted", top: 1, legend: true, height: 260,
        marks: [{ at: 100 * policy.target_id_acceptance, name: "now", colour: "mark", dash: true }] }));
  }
  update();
  return place;
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

function evaluation({ evaluation: { id, decisions, ood }, score }) {
  const place = el("section", { class: "card wide" }, el("h3", {}, "What was measured"));
  if (id) {
    const [low, high] = id.acceptance_interval;
    place.append(el("p", {}, `On ${id.n.toLocaleString("en")} test images it had never seen: accepted ${percent(id.acceptance)} (95 % interval ${percent(low)} to ${percent(high)})`
      + (id.accuracy == null ? "." : `, right on ${percent(id.accuracy)} of all and ${percent(id.accuracy_of_accepted)} of the accepted.`)));
  }
  const rows = Object.entries(ood).map(([name, row]) => [name, decisions[name]?.group ?? "", String(decisions[name]?.n ?? ""),
    percent(decisions[name]?.deferral ?? NaN), percent(row.auroc), row.auroc_interval.map((end) => (100 * end).toFixed(1)).join("–"), percent(row.ood_miss_rate_at_id95)]);
  place.append(rows.length
    ? table(`Sets that the model does not know, score ${score}, under the policy of the evaluation`, ["Set", "Kind", "Images", "Deferred", "AUROC", "95 % interval", "Missed at 95 % ID"], rows)
    : el("p", { class: "soft" }, "No evaluation is stored; run oodgate evaluate."));
  return place;
}

function shifted(sets) {
  if (!Object.keys(sets).length) return null;
  return card("The same classes under other imaging", table("Accepted, and right among the accepted", ["Imaging", "Accepted", "Right"],
    Object.entries(sets).map(([name, one]) => [name, percent(one.acceptance), one.accuracy_of_accepted == null ? "" : percent(one.accuracy_of_accepted)])));
}
