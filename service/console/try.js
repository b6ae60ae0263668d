// SPDX-License-Identifier: Apache-2.0
// Images in, verdicts out: one gets a page of its own, several a table. Results outlive a reload.
import { call, explain, judge, judgeAll } from "./api.js";
import * as camera from "./camera.js";
import { $, el } from "./dom.js";
import { show } from "./result.js";
import * as several from "./several.js";
import * as store from "./store.js";

const KINDS = ["image/jpeg", "image/png", "image/webp"];
const PART = { images: 16, bytes: 12 * 2 ** 20 }; // of one request
const THUMBNAIL = 256;

let report; // shows an error, and a way to try again
let items = []; // {file, name, type, thumbnail, verdict | problem, explanation?}
let chosen = 0;

export async function start(onProblem) {
  report = onProblem;
  for (const input of [$("#files"), $("#camera")]) {
    input.addEventListener("change", () => { take([...input.files]); input.value = ""; });
  }
  camera.start(take, report);
  const drop = $("#drop");
  addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); take([...event.dataTransfer.files]); });
  addEventListener("paste", (event) => { if (event.clipboardData.files.length) take([...event.clipboardData.files]); });
  [items, chosen] = [await store.kept().catch(() => []), store.load("chosen", 0)];
  draw();
  samples().catch(() => {}); // they are no more than an offer
  explained(items[chosen]); // where the reload came before the heat map
}

/** What the default model can tell apart; asked again when a token was given. */
export async function introduce() {
  const { models } = await call("v1/models");
  const [{ name, classes }] = models;
  const shown = classes.length > 12 ? `${classes.slice(0, 12).join(", ")} and ${classes.length - 12} more` : classes.join(", ");
  $("#knows").textContent = `The model ${name} knows ${shown}. Anything else it should not be asked about.`;
  $("#knows").hidden = false;
}

async function samples() {
  const found = await (await fetch("console/samples/samples.json")).json();
  const button = ({ file, text }) => el("li", {}, el("button", { onclick: async () => {
    try {
      const body = await (await fetch(`console/samples/${file}`)).blob();
      take([new File([body], file, { type: body.type })]);
    } catch {
      report(new Error("The sample cannot be loaded: the server cannot be reached. Check your network, then try again."));
    }
  } }, el("img", { src: `console/samples/${file}`, alt: "", width: 72, height: 72 }), text));
  $("#samples ul").append(...found.map(button));
  $("#samples").hidden = false;
}

async function take(files) {
  const images = files.filter((file) => KINDS.includes(file.type));
  const others = files.length - images.length;
  report(others || !images.length ? new Error(
    files.length ? `${others} of ${files.length} files left out: only JPEG, PNG and WebP can be judged. Save them as one of these.`
      : "That was no file. Save the image first, then drop or choose it.") : null);
  if (images.length) await judged(images, []);
}

/** Judge images one request after another. Those left when one fails can be tried again, behind those that are done. */
async function judged(images, done) {
  const status = $("#progress");
  let left = images;
  try {
    for (const part of parts(images)) {
      status.textContent = images.length === 1 ? `Judging ${images[0].name} …` : `Judged ${done.length} of ${done.length + left.length} …`;
      const answers = part.length > 1 ? await judgeAll(part) : [await judge(part[0]).catch((error) => {
        if (!error.ofImage || images.length + done.length === 1) throw error;
        return { problem: error.problem }; // one bad image among several is a row of the table
      })];
      for (const [index, answer] of answers.entries()) done.push(await described(part[index], answer));
      left = left.slice(part.length);
    }
  } catch (error) {
    report(error, () => judged(left, done));
  }
  status.textContent = "";
  if (!done.length) return;
  [items, chosen] = [done, 0];
  await store.forget().catch(() => {});
  for (const [place, item] of items.entries()) store.keep(place, item).catch(() => {});
  draw();
  await explained(items[0]);
  if (!left.length) $("#result").focus({ preventScroll: items.length > 1 });
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

async function described(file, { problem, ...verdict }) {
  const base = { file, name: file.name || "pasted.png", type: file.type, thumbnail: await thumbnail(file) };
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

async function explained(item) {
  if (!item?.verdict?.ood || item.explanation) return;
  try {
    item.explanation = (await explain(item.file)).explanation;
  } catch (error) {
    report(error, () => explained(item));
    return;
  }
  if (items.includes(item)) store.keep(items.indexOf(item), item).catch(() => {});
  draw();
}

async function forget() {
  items = [];
  await store.forget().catch(() => {});
  draw();
  $("#files").focus();
}

function choose(index) {
  chosen = index;
  draw();
  explained(items[index]);
}

function draw() {
  store.save("chosen", chosen);
  several.draw($("#several"), items, chosen, choose);
  const item = items[chosen];
  $("#result").hidden = !item;
  if (item) show($("#result"), item, forget);
}
