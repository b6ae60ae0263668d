// SPDX-License-Identifier: Apache-2.0
// All that there is to say of one image.
import { plain, token } from "./api.js";
import { bars } from "./charts.js";
import { card, el, number, percent, table } from "./dom.js";
import { calibrationOf } from "./model.js";
import { BORDERLINE, HIDDEN, decision, rarity } from "./words.js";

/** The verdict of an image and what stands behind it; `forget` drops everything that was tried. */
export function show(place, item, forget) {
  const away = el("p", { class: "note" }, "Kept in this browser for a day, so that a reload loses nothing. ",
    el("button", { class: "link", onclick: forget }, "Forget it now"));
  if (item.problem) {
    place.replaceChildren(el("h3", {}, item.name), el("p", { class: "problem" }, plain(item.problem)), away);
    return;
  }
  const { verdict } = item;
  const { word, text } = decision(verdict);
  place.replaceChildren(
    el("div", { class: `verdict ${verdict.decision}` },
      el("span", { class: "sign", "aria-hidden": "true" }, verdict.decision === "accept" ? "✓" : "!"),
      el("div", {}, el("p", { class: "word" }, word), el("p", {}, text), verdict.ood?.borderline ? el("p", {}, BORDERLINE) : null)),
    el("div", { class: "cards" }, picture(item), ...(verdict.ood ? [evidence(verdict), opinions(verdict)] : [el("p", { class: "card" }, HIDDEN)]), timings(verdict), curl(item)),
    away);
}

function picture(item) {
  const { explanation } = item;
  if (!explanation) {
    return card(item.name, el("div", { class: "stack" }, el("img", { src: item.thumbnail, alt: item.name })),
      item.verdict.ood ? el("p", { class: "note", role: "status" }, "Looking for the part that makes it unusual …") : null);
  }
  const heat = el("img", { src: `data:image/png;base64,${explanation.heat_png}`, alt: "Heat map over the image" });
  const toggle = el("input", { type: "checkbox", id: "heat", checked: true, onchange: () => { heat.hidden = !toggle.checked; } });
  return card(`${item.name}, as the network sees it`,
    el("div", { class: "stack" }, el("img", { src: `data:image/png;base64,${explanation.input_png}`, alt: item.name, class: "seen" }), heat),
    el("p", {}, el("label", { for: "heat" }, toggle, " Show which part makes it unusual")),
    el("p", { class: "note" }, explanation.score_without < item.verdict.ood.score
      ? `Yellow: hiding this part makes the image look most familiar. With one part hidden the score falls from ${number(item.verdict.ood.score)} to ${number(explanation.score_without)} at best; the threshold is ${number(item.verdict.ood.threshold)}.`
      : "Hiding no part makes this image look more familiar."),
    ...prototypes(explanation));
}

function evidence({ ood, model }) {
  const place = card("How unusual is it?", el("p", {}, rarity(ood)));
  calibrationOf(model.name).then((groups) => {
    const group = groups.find((one) => one.group === ood.group);
    if (!group) return;
    const side = ood.score > ood.threshold ? "above" : "below";
    place.append(
      bars(`Histogram of ${group.n} calibration scores; this image's score ${number(ood.score)} lies ${side} the threshold ${number(ood.threshold)}`,
        group.edges, group.counts, { x: `score ${ood.score_name}; larger = more unusual`, y: "calibration images", beyond: ood.score, marks: [
          { at: ood.threshold, name: "threshold", colour: "mark", dash: true }, { at: ood.score, name: "this image", colour: "bad" }] }),
      el("p", { class: "note" }, `The share of the bars from this image on is its p-value, ${ood.p_value.toPrecision(3)}. Score ${number(ood.score)}, threshold ${number(ood.threshold)}.`));
  }).catch(() => {}); // the sentence above says the same
  return place;
}

function opinions({ ood }) {
  const says = (p) => (p <= ood.p_cutoff ? "defer" : "accept");
  const row = (name, p) => [name, el("span", { class: `tag ${says(p)}` }, says(p)), p.toFixed(4)];
  const shadows = Object.entries(ood.shadow);
  const agree = shadows.filter(([, { p_value: p }]) => says(p) === says(ood.p_value)).length;
  const rows = [row(`${ood.score_name} (decides)`, ood.p_value), ...shadows.map(([name, { p_value: p }]) => row(name, p))];
  return card("What do the other scores say?", el("p", {}, shadows.length ? `${agree} of ${shadows.length} agree. They decide nothing.` : "No others are computed."),
    table("Scores side by side", ["Score", "Would", "p-value"], rows));
}

function prototypes({ nearest, ood_prototype: ood }) {
  if (!nearest.length) return [];
  return [el("h3", {}, "Which classes is it near?"), table("Nearest class prototypes, by distance of the features", ["Prototype", "Distance"], [
    ...nearest.map(({ label, distance }) => [label, distance.toPrecision(4)]), ["(synthetic OOD)", ood.distance.toPrecision(4)]]),
  el("p", { class: "note" }, `π of the OOD prototype: ${ood.pi.toPrecision(3)} (its share among all prototypes; near 1 is unlike every class)`)];
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
