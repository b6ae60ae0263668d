// SPDX-License-Identifier: Apache-2.0
// Tabs, the token, and one place for problems.
import { call, token } from "./api.js";
import { redraw } from "./charts.js";
import { $, el } from "./dom.js";
import * as model from "./model.js";
import * as monitor from "./monitor.js";
import * as tryIt from "./try.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const panel = (tab) => document.getElementById(tab.getAttribute("aria-controls"));

/** Show an error, with a button where another try may help; null when the cause is gone. */
function report(error, retry = null) {
  const place = $("#problem"), news = error && place.firstChild?.textContent !== error.message;
  const again = error && !error.ofImage ? retry : null;
  if (error && !news && Boolean(again) === Boolean($("button", place))) return; // it may have the focus
  place.hidden = !error;
  place.replaceChildren(...(error ? [el("span", {}, error.message)] : []),
    ...(again ? [el("button", { onclick: () => { report(null); again(); } }, "Try again")] : []));
  if (news && (error.status === 401 || error.problem?.code === "admin_only")) {
    $("#access").open = true;
    $("#token").focus();
  }
}

/** What waits can be tried again, whatever went wrong meanwhile. */
const retry = () => (tryIt.waits() ? tryIt.resume : null);

function select(name) {
  const chosen = tabs.find((tab) => tab.getAttribute("aria-controls") === name) ?? tabs[0];
  report(null);
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", String(tab === chosen));
    tab.tabIndex = tab === chosen ? 0 : -1;
    panel(tab).hidden = tab !== chosen;
  }
  tryIt.resume();
  monitor.stop();
  if (panel(chosen).id === "monitor") monitor.start($("#monitor"), report);
  if (panel(chosen).id === "model") model.draw($("#model"), report);
  redraw();
}

const go = (tab) => { location.hash = tab.getAttribute("aria-controls"); };
for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => go(tab));
  tab.addEventListener("keydown", ({ key }) => {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1 }[key];
    if (to === undefined) return;
    const next = tabs.at(to % tabs.length);
    go(next);
    next.focus();
  });
}
addEventListener("hashchange", () => select(location.hash.slice(1)));

function showToken() {
  $("#access summary").textContent = token.works ? "Token ✓" : "Token";
  $("#token").placeholder = token.get() ? "one is set" : "none is set";
}

async function useToken(value) {
  token.set(value);
  $("#token").value = "";
  try {
    await call("v1/models");
    $("#access").open = false;
    select(location.hash.slice(1));
    tryIt.introduce().catch(() => {});
  } catch (error) {
    report(error, retry());
  }
}
addEventListener("token", showToken);
$("#token-form").addEventListener("submit", (event) => { event.preventDefault(); useToken($("#token").value.trim()); });
$("#token-forget").addEventListener("click", () => useToken(""));
addEventListener("keydown", ({ key }) => { if (key === "Escape") $("#access").open = false; });
addEventListener("offline", () => report(new Error("Your network is down. What is on the page stays; try again once it is back."), retry()));
addEventListener("online", () => { report(null); tryIt.resume(); });
addEventListener("focus", () => retry()?.()); // back from starting the server, or from looking up a token

showToken();
await tryIt.start(report);
tryIt.introduce().catch(() => {}); // asked again with a token
select(location.hash.slice(1));
