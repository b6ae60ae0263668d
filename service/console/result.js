// SPDX-License-Identifier: Apache-2.0
// All that there is to say of one image.
import { plain, token } from "./api.js";
import { bars } from "./charts.js";
import { card, el, number, percent, table } from "./dom.js";
import { calibrationOf, thresholdNow } from "./model.js";
import { BORDERLINE, HIDDEN, decision, rarity } from "./words.js";

/** The verdict of an image and what stands behind it; `forget` drops everything that was tried, `again` has it judged anew. */
export function show(place, item, forget, again) {
  const away = el("p", { class: "note" }, "Kept in this browser for a day, so that a reload loses nothing. ",
    el("button", { class: "link", onclick: forget }, "Forget it now"));
  if (!item.verdict) {
    place.replaceChildren(el("h3", {}, item.name), item.problem
      ? el("p", { class: "problem" }, plain(item.problem)) : el("p", {}, "Not judged yet: it waits for another try."), away);
    return;
  }
  const { verdict } = item;
  const { word, text } = decision(verdict);
  place.replaceChildren(
    el("div", { class: `verdict ${verdict.decision}` },
      el("span", { class: "sign", "aria-hidden": "true" }, verdict.decision === "accept" ? "✓" : "!"),
      el("div", {}, el("p", { class: "name" }, item.name), el("p", { class: "word" }, word), el("p", {}, text),
        verdict.ood?.borderline ? el("p", {}, BORDERLINE) : null, verdict.ood ? outdated(verdict, again) : null)),
    el("div", { class: "cards" }, picture(item), ...(verdict.ood ? [evidence(verdict), opinions(verdict)] : [el("p", { class: "card" }, HIDDEN)]), timings(verdict), curl(item)),
    away);
}

/** Says, once it is known, that another threshold is in force than the one this verdict was given under. */
function outdated({ model, ood }, again) {
  const place = el("div", { role: "status" });
  thresholdNow(model.name, ood.group, ood.threshold).then((now) => {
    if (now === undefined || now === ood.threshold) return;
    place.append(el("p", {}, `This was judged under an earlier threshold, ${number(ood.threshold)}; it is ${number(now)} now. `,
      el("button", { class: "link", onclick: again }, "Judge again")));
  }).catch(() => {}); // it cannot be known
  return place;
}

function picture(item) {
  const { explanation, verdict: { ood } } = item;
  if (!explanation) {
    return card(item.name, el("div", { class: "stack" }, el("img", { src: item.thumbnail, alt: item.name })),
      ood ? el("p", { class: "note", role: "status" }, `Looking for ${partOf(ood)} …`) : null);
  }
  const heat = el("img", { src: `data:image/png;base64,${explanation.heat_png}`, alt: "Heat map over the image" });
  const toggle = el("input", { type: "checkbox", id: "heat", checked: true, onchange: () => { heat.hidden = !toggle.checked; } });
  const lowers = explanation.score_without < ood.score;
  return card(`${item.name}, as the network sees it`,
    el("div", { class: "stack" }, el("img", { src: `data:image/png;base64,${explanation.input_png}`, alt: item.name, class: "seen" }), heat),
    el("p", {}, el("label", { for: "heat" }, toggle, ` Show ${partOf(ood)}`)),
    lowers ? key() : null,
    el("p", { class: "note" }, lowers
      ? `With one part hidden the score falls from ${number(ood.score)} to ${number(explanation.score_without)} at best; the threshold is ${number(ood.threshold)}.`
      : "Hiding no part makes this image look more familiar."),
    ...prototypes(explanation));
}

const partOf = (ood) => (ood.score > ood.threshold ? "which part makes it most unusual" : "which part its score depends on most");

const key = () => el("p", { class: "note key" }, el("span", { class: "heat", "aria-hidden": "true" }),
  "Yellow: hiding this part lowers the score most. Clear: hiding it lowers nothing.");

function evidence({ ood, model }) {
  const place = card("How unusual is it?", el("p", {}, rarity(ood)));
  calibrationOf(model.name).then((groups) => {
    const group = groups.find((one) => one.group === ood.group);
    if (!group) return;
    const side = ood.score > ood.threshold ? "above" : "below";
    place.append(
      bars(`Histogram of ${group.n} calibration scores; this image's score ${number(ood.score)} lies ${side} the threshold ${number(ood.threshold)}`,
        group.edges, group.counts, { x: `score ${ood.score_name}; larger = more unusual`, y: "calibration images", clamped: true, beyond: ood.score, marks: [
          { at: ood.threshold, name: "threshold", colour: "mark", dash: true }, { at: ood.score, name: "this image", colour: "bad" }] }),
      el("p", { class: "note" }, `${whereOf(ood, group.edges)} Score ${number(ood.score)}, threshold ${number(ood.threshold)}.`));
  }).catch(() => {}); // the sentence above says the same
  return place;
}

function whereOf({ score, p_value: p }, edges) {
  const share = `the share of calibration images that lie at least as far out, is ${p.toPrecision(3)}`;
  if (score > edges.at(-1)) {
    return `This image lies beyond the last edge, ${number(edges.at(-1))}. The last bar holds every calibration image from ${number(edges.at(-2))} on, those beyond the edge too; its p-value, ${share}.`;
  }
  if (score < edges[0]) return `This image lies before the first edge, ${number(edges[0])}; its p-value, ${share}.`;
  return `The share of the bars from this image on is its p-value, ${p.toPrecision(3)}. The end bars hold what lies beyond, too.`;
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
  const byDistance = [...nearest, { ...ood, label: "(synthetic OOD)" }].sort((a, b) => a.distance - b.distance);
  return [el("h3", {}, "Which classes is it near?"), table(`The ${nearest.length} nearest class prototypes and the synthetic one, by distance of the features`, ["Prototype", "Distance"],
    byDistance.map(({ label, distance }) => [label, distance.toPrecision(4)])),
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
