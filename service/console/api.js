// SPDX-License-Identifier: Apache-2.0
// Requests to the server that served this page, and their failures in plain words.

const KEY = "oodgate.token";
const TIMEOUT_MS = 60_000;

/** The bearer token of this tab; `works` once a request has succeeded with it. A change is told as the event "token". */
export const token = {
  works: false,
  get: () => sessionStorage.getItem(KEY) ?? "",
  set(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
    tell(false);
  },
};

function tell(works) {
  token.works = works;
  dispatchEvent(new Event("token"));
}

export class Failure extends Error {
  constructor(message, status = 0, problem = {}) {
    super(message);
    this.status = status;
    this.problem = problem;
    this.ofImage = [413, 415, 422].includes(status); // another try changes nothing
  }
}

export async function call(path, options = {}) {
  const headers = new Headers(options.headers), sent = token.get();
  if (sent) headers.set("Authorization", `Bearer ${sent}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal: AbortSignal.timeout(TIMEOUT_MS) });
  } catch (error) {
    throw new Failure(error.name === "TimeoutError"
      ? "The server did not answer within a minute. It may be overloaded; try again, or ask its operator."
      : "The server cannot be reached. Check your network and that oodgate still runs, then try again.");
  }
  if (sent && sent === token.get() && (response.ok || response.status === 401)) tell(response.ok);
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Failure(inWords(response.status, body), response.status, body);
  return body;
}

/** What the server says of an image, without the number it had in the request. */
export const plain = ({ detail = "" }) => detail.replace(/^image \d+: /, "");

export function inWords(status, problem) {
  const detail = plain(problem);
  const sentences = {
    401: token.get()
      ? "The server refuses the token that is set. Type your token again under “Token” above, or press “Forget it” there: a server that needs none refuses any."
      : "This server wants to know who asks. Type your token under “Token” above, then try again.",
    403: problem.code === "admin_disabled"
      ? "Nothing can be changed here: the server was started without an admin token."
      : "Only the admin may do this. Type the admin's token under “Token” above.",
    413: `That is too much for this server: ${detail || "Send a smaller image, or fewer at once."}`,
    415: "This kind of file is not supported. Save it as JPEG, PNG or WebP and try again.",
    422: `This file cannot be used: ${detail}. Open it in an image viewer and save it again as JPEG or PNG.`,
    429: `The server is busy. Wait ${problem.retry_after_s ?? "a few"} s, then try again.`,
    503: "The server is not ready: it is starting, stopping or restarting. Try again in a few seconds.",
    504: "The server is overloaded and gave up on this request. Try again with fewer images.",
  };
  return sentences[status] ?? (detail || `The server answered with an error (${status}). Its log has more under ${problem.request_id ?? "this time"}.`);
}

export const judge = (image) => call("v1/verdict", { method: "POST", body: image, headers: { "Content-Type": image.type } });

export const explain = (image) => call("v1/explain", { method: "POST", body: image, headers: { "Content-Type": image.type } });

export async function judgeAll(images) {
  const form = new FormData();
  for (const image of images) form.append("file", image, image.name);
  return (await call("v1/verdict", { method: "POST", body: form })).verdicts;
}
