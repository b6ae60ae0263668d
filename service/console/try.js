// SPDX-License-Identifier: Apache-2.0
// Images in, verdicts out: one gets a page of its own, several a table. Results outlive a reload.
import { explain, judge, judgeAll } from "./api.js";
import { $, el, percent } from "./dom.js";
import { show } from "./result.js";
import * as store from "./store.js";

const KINDS = ["image/jpeg", "image/png", "image/webp"];
const PART = { images: 16, bytes: 12 * 2 ** 20 }; // of one request
const THUMBNAIL = 256;

let report; // shows an error
let items = []; // {name, type, size, thumbnail, verdict | problem, explanation?}; `file` until the page is reloaded
let chosen = 0;
let order = { by: "p", up: true };

export async function start(onProblem) {
  report = onProblem;
  for (const input of [$("#files"), $("#camera")]) {
    input.addEventListener("change", () => { take([...input.files]); input.value = ""; });
  }
  const drop = $("#drop");
  addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); take([...event.dataTransfer.files]); });
  addEventListener("paste", (event) => { if (event.clipboardData.files.length) take([...event.clipboardData.files]); });
  ({ items, chosen, order } = store.load("try", { items, chosen, order }));
  draw();
  await samples().catch(() => {}); // they are no more than an offer
}

async function samples() {
  const found = await (await fetch("console/samples/samples.json")).json();
  const button = ({ file, text }) => el("li", {}, el("button", { onclick: async () => {
    const body = await (await fetch(`console/samples/${file}`)).blob();
    take([new File([body], file, { type: body.type })]);
  } }, el("img", { src: `console/samples/${file}`, alt: "", width: 64, height: 64 }), text));
  $("#samples ul").append(...found.map(button));
  $("#samples").hidden = false;
}

async function take(files) {
  report(null);
  const images = files.filter((file) => KINDS.includes(file.type));
  if (images.length < files.length) {
    report(new Error(`${files.length - images.length} of ${files.length} files are no JPEG, PNG or WebP and were left out.`));
  }
  if (!images.length) return;
  const status = $("#progress");
  status.textContent = `Judging ${images.length === 1 ? images[0].name : `${images.length} images`} …`;
  try {
    const judged = [];
    for (const part of parts(images)) {
      const verdicts = part.length === 1 ? [await judge(part[0])] : await judgeAll(part);
      for (const [index, answer] of verdicts.entries()) judged.push(await described(part[index], answer));
      if (images.length > 1) status.textContent = `Judged ${judged.length} of ${images.length} …`;
    }
    [items, chosen] = [judged, 0];
    status.textContent = "";
    draw();
    await explained(items[0]);
    $("#result").focus({ preventScroll: images.length > 1 });
  } catch (error) {
    status.textContent = "";
    report(error);
  }
}

function* parts(images) {
  let part = [], bytes = 0;
  for (const image of images) {
    if (part.length && (part.length === PART.images || bytes + image.size > PART.bytes)) {
      yield part;
      [part, bytes] = [[], 0];
    }
    part.push(image);
    bytes += image.size;
  }
  yield part;
}

async function described(file, answer) {
  const { problem, ...verdict } = answer;
  const base = { file, name: file.name || "pasted.png", type: file.type, size: file.size, thumbnail: await thumbnail(file) };
  return problem ? { ...base, problem } : { ...base, verdict };
}

async function thumbnail(file) {
  try {
    const image = await createImageBitmap(file);
    const scale = Math.min(1, THUMBNAIL / Math.max(image.width, image.height));
    const canvas = el("canvas", { width: Math.max(1, Math.round(image.width * scale)), height: Math.max(1, Math.round(image.height * scale)) });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL(scale < 1 ? "image/jpeg" : "image/png");
  } catch {
    return "";
  }
}

/** Ask for the explanation of an image that is here; one reloaded without it keeps its verdict. */
async function explained(item) {
  if (item?.verdict?.ood && !item.explanation && item.file) {
    try {
      item.explanation = (await explain(item.file)).explanation;
    } catch (error) {
      report(error);
      return;
    }
    draw();
  }
}

function draw() {
  const kept = items.map(({ file, ...item }) => item);
  store.save("try", { items: kept, chosen, order });
  drawTable();
  const item = items[chosen];
  $("#result").hidden = !item;
  if (item) show($("#result"), item);
}

const COLUMNS = [
  ["name", "Image", (item) => item.name],
  ["decision", "Decision", (item) => item.verdict?.decision ?? "problem"],
  ["label", "Prediction", (item) => item.verdict?.prediction.label ?? ""],
  ["confidence", "Confidence", (item) => item.verdict?.prediction.confidence ?? -1],
  ["p", "p-value", (item) => item.verdict?.ood?.p_value ?? -1],
];

function drawTable() {
  const place = $("#several");
  place.hidden = items.length < 2;
  if (items.length < 2) return;
  const value = COLUMNS.find(([key]) => key === order.by)[2];
  const compare = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (order.up ? 1 : -1);
  const rows = items.map((item, index) => ({ item, index })).sort((a, b) => compare(a.item, b.item));
  const deferred = items.filter((item) => item.verdict?.decision === "defer").length;
  const focused = document.activeElement?.dataset?.key;
  place.replaceChildren(el("div", { class: "card scroll", tabindex: "0", role: "region", "aria-label": "Verdicts" },
    el("table", {},
      el("caption", {}, `${items.length} images, ${deferred} deferred`),
      el("thead", {}, el("tr", {}, el("td"), COLUMNS.map(([key, title]) => el("th",
        { scope: "col", "aria-sort": order.by === key ? (order.up ? "ascending" : "descending") : "none" },
        el("button", { "data-key": key, onclick: () => { order = { by: key, up: order.by === key ? !order.up : true }; draw(); } },
          `${title} ${order.by === key ? (order.up ? "▲" : "▼") : ""}`))))),
      el("tbody", {}, rows.map(({ item, index }) => row(item, index))))));
  if (focused) $(`[data-key="${CSS.escape(focused)}"]`, place)?.focus();
}

function row(item, index) {
  const { verdict } = item;
  const open = () => { chosen = index; draw(); explained(items[index]); };
  return el("tr", { class: index === chosen ? "chosen" : null },
    el("td", {}, item.thumbnail ? el("img", { src: item.thumbnail, alt: "", width: 40, height: 40 }) : ""),
    el("td", {}, el("button", { "data-key": `row-${index}`, "aria-current": index === chosen ? "true" : null, onclick: open }, item.name)),
    ...(verdict
      ? [el("td", { class: verdict.decision }, verdict.decision), el("td", {}, verdict.prediction.label),
        el("td", { class: "number" }, percent(verdict.prediction.confidence)), el("td", { class: "number" }, verdict.ood?.p_value.toFixed(4) ?? "–")]
      : [el("td", { colspan: 4 }, item.problem.detail)]));
}
