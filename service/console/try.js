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
let items = []; // {file, name, type}; once judged with {thumbnail, verdict | problem, explanation?}
let chosen = 0;
let judging = null, explaining = null; // the items, and the item, that the server is asked about now

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
  samples().catch(() => {}); // they are no more than an offer
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
  if (images.length) await begin(images);
}

/** These take the place of all before them, and are kept until they are judged. */
async function begin(files) {
  items = files.map((file) => ({ file, name: file.name || "pasted.png", type: file.type }));
  chosen = 0;
  await keepAll();
  await resume();
}

async function keepAll() {
  await store.forget().catch(() => {});
  for (const [place, item] of items.entries()) store.keep(place, item).catch(() => {});
}

const waiting = () => items.filter((item) => !item.verdict && !item.problem);

export const waits = () => waiting().length > 0;

/** Go on with what a missing network, token or server held up: judge what waits, explain what is shown. */
export async function resume() {
  const judged = await judgeWaiting();
  draw();
  if (judged) lookAtResult();
  await explainShown();
}

/** Whether all that waited was judged, one request after another. What is left when one fails goes on waiting. */
async function judgeWaiting() {
  if (judging === items || !waits()) return false;
  const mine = judging = items, status = $("#progress");
  try {
    for (const part of parts(waiting())) {
      status.textContent = mine.length === 1 ? `Judging ${mine[0].name} …` : `Judged ${mine.length - waiting().length} of ${mine.length} …`;
      const answers = await answersTo(part);
      for (const [index, { problem, ...verdict }] of answers.entries()) {
        Object.assign(part[index], { thumbnail: await thumbnail(part[index].file) }, problem ? { problem } : { verdict });
        if (items === mine) store.keep(mine.indexOf(part[index]), part[index]).catch(() => {});
      }
      if (items !== mine) return false; // others took their place
    }
    return true;
  } catch (error) {
    if (items === mine) failed(error);
    return false;
  } finally {
    if (judging === mine) {
      judging = null;
      status.textContent = "";
    }
  }
}

/** One answer for each image; where there are others, a bad one has its problem for an answer. */
async function answersTo(part) {
  if (part.length > 1) {
    try {
      return await judgeAll(part.map(({ file }) => file));
    } catch (error) {
      if (error.status !== 413) throw error; // too much at once may pass one by one
    }
  }
  const alone = items.length === 1, answers = [];
  for (const { file } of part) {
    answers.push(await judge(file).catch((error) => {
      if (!error.ofImage || alone) throw error;
      return { problem: error.problem };
    }));
  }
  return answers;
}

function failed(error) {
  if (error.ofImage && items.length === 1) {
    error.message = `${items[0].name}: ${error.message}`;
    items = [];
    store.forget().catch(() => {});
  }
  report(error, resume);
}

/** For those who wait for it; who is elsewhere on the page stays there. */
function lookAtResult() {
  const at = document.activeElement;
  if (at === document.body || $("#try").contains(at)) $("#result").focus({ preventScroll: items.length > 1 });
}

function* parts(waiting) {
  let part = [], bytes = 0;
  for (const item of waiting) {
    if (part.length && (part.length === PART.images || bytes + item.file.size > PART.bytes)) {
      yield part;
      [part, bytes] = [[], 0];
    }
    part.push(item);
    bytes += item.file.size;
  }
  yield part;
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

async function explainShown() {
  const item = items[chosen];
  if (!item?.verdict?.ood || item.explanation || explaining === item) return;
  explaining = item;
  try {
    item.explanation = (await explain(item.file)).explanation;
  } catch (error) {
    if (items[chosen] === item) report(error, resume);
    return;
  } finally {
    if (explaining === item) explaining = null;
  }
  if (items.includes(item)) store.keep(items.indexOf(item), item).catch(() => {});
  draw();
}

async function forget() {
  items = [];
  report(null);
  await store.forget().catch(() => {});
  draw();
  $("#files").focus();
}

function choose(index) {
  chosen = index;
  draw();
  explainShown();
}

function draw() {
  store.save("chosen", chosen);
  several.draw($("#several"), items, chosen, choose);
  const item = items[chosen];
  $("#result").hidden = !item;
  if (item) show($("#result"), item, forget, () => begin(items.map(({ file }) => file)));
}
