// SPDX-License-Identifier: Apache-2.0
// All that there is to say of one image.
import { token } from "./api.js";
import { bars } from "./charts.js";
import { card, el, number, percent, table } from "./dom.js";
import { calibrationOf } from "./model.js";
import { BORDERLINE, HIDDEN, decision, rarity } from "./words.js";

export function show(place, item) {
  if (item.problem) {
    place.replaceChildren(el("h3", {}, item.name), el("p", { class: "problem" }, item.problem.detail));
    return;
  }
  const { verdict } = item;
  const { word, text } = decision(verdict);
  place.replaceChildren(
    el("div", { class: `verdict ${verdict.decision}` }, el("p", { class: "word" }, word), el("p", {}, text),
      verdict.ood?.borderline ? el("p", {}, BORDERLINE) : null),
    el("div", { class: "cards" }, [picture(item), ...(verdict.ood ? [evidence(verdict), opinions(verdict)] : [el("p", {}, HIDDEN)]), prototypes(item), timings(verdict), curl(item)].filter(Boolean)));
}

function picture(item) {
  const { explanation } = item;
  if (!explanation) {
    return card(item.name, el("div", { class: "stack" }, el("img", { src: item.thumbnail, alt: item.name })));
  }
  const heat = el("img", { src: `data:image/png;base64,${explanation.heat_png}`, alt: "Heat map over the image" });
  const toggle = el("input", { type: "checkbox", id: "heat", checked: true, onchange: () => { heat.hidden = !toggle.checked; } });
  return card(`${item.name}, as the network sees it`,
    el("div", { class: "stack" }, el("img", { src: `data:image/png;base64,${explanation.input_png}`, alt: item.name }), heat),
    el("p", {}, el("label", { for: "heat" }, toggle, " Show which part makes it unusual")),
    el("p", { class: "note" }, `Yellow: hiding this part makes the image look most familiar. With one part hidden the score falls from ${number(item.verdict.ood.score)} to ${number(explanation.score_without)} at best; the threshold is ${number(item.verdict.ood.threshold)}.`));
}

function evidence({ ood, model }) {
  const place = card("How unusual is it?", el("p", {}, rarity(ood)));
  calibrationOf(model.name).then((groups) => {
    const group = groups.find((one) => one.group === ood.group);
    if (!group) return;
    const side = ood.score > ood.threshold ? "above" : "below";
    place.append(
      bars(`Histogram of ${group.n} calibration scores; this image's score ${number(ood.score)} lies ${side} the threshold ${number(ood.threshold)}`,
        group.edges, group.counts, { x: `${ood.score_name}; larger = more unusual`, marks: [
          { at: ood.threshold, name: "threshold", colour: "mark", dash: true }, { at: ood.score, name: "this image", colour: "bad" }] }),
      el("p", { class: "note" }, `Bars: the calibration images. ${ood.score_name} ${number(ood.score)}, threshold ${number(ood.threshold)}, p = ${ood.p_value.toPrecision(3)}`));
  }).catch(() => {}); // the sentence above says the same
  return place;
}

function opinions({ ood }) {
  const says = (p) => (p <= ood.p_cutoff ? "defer" : "accept");
  const rows = [[`${ood.score_name} (decides)`, says(ood.p_value), ood.p_value.toFixed(4)],
    ...Object.entries(ood.shadow).map(([name, { p_value: p }]) => [name, says(p), p.toFixed(4)])];
  const agree = rows.filter(([, said]) => said === rows[0][1]).length - 1;
  return card("What do the other scores say?", el("p", {}, rows.length > 1 ? `${agree} of ${rows.length - 1} agree. They decide nothing.` : "No others are computed."),
    table("Scores side by side", ["Score", "Would", "p-value"], rows));
}

function prototypes({ explanation }) {
  if (!explanation?.nearest.length) return null;
  const { nearest, ood_prototype: ood } = explanation;
  return card("Which classes is it near?", table("Nearest class prototypes", ["Prototype", "Distance"], [
    ...nearest.map(({ label, distance }) => [label, distance.toPrecision(4)]), ["(synthetic OOD)", ood.distance.toPrecision(4)]]),
  el("p", { class: "note" }, `π of the OOD prototype: ${ood.pi.toPrecision(3)}`));
}

function timings({ timing_ms: timing }) {
  return card("Where did the time go?", table("Milliseconds by stage", ["Stage", "ms"], Object.entries(timing).map(([stage, ms]) => [stage, ms.toFixed(1)])));
}

const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function curl({ name, type }) {
  const url = new URL("v1/verdict", document.baseURI).href;
  const header = token.get() ? " -H 'Authorization: Bearer YOUR_TOKEN'" : "";
  const command = `curl --data-binary ${quoted(`@${name}`)} -H 'Content-Type: ${type}'${header} ${url}`;
  const copy = el("button", { onclick: async () => { await navigator.clipboard.writeText(command); copy.textContent = "Copied"; } }, "Copy");
  return card("The same from a shell", el("pre", { tabindex: "0" }, el("code", {}, command)), navigator.clipboard ? copy : null);
}
