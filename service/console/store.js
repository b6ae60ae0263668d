// SPDX-License-Identifier: Apache-2.0
// What outlives a reload. Small choices stay in this tab's session; images with their verdicts in the browser's database
// under the tab's own number, until they are replaced, forgotten, or a day old.

const DAY_MS = 86_400_000;
const key = (name) => `oodgate.${name}`;

export function load(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(key(name))) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export const save = (name, value) => sessionStorage.setItem(key(name), JSON.stringify(value));

const tab = load("tab", Array.from(crypto.getRandomValues(new Uint32Array(2))).join("-"));
save("tab", tab);
const own = IDBKeyRange.bound([tab], [tab, []]);

const settled = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

function opened() {
  const asked = indexedDB.open("oodgate", 1);
  asked.onupgradeneeded = () => asked.result.createObjectStore("images").createIndex("kept", "kept");
  return settled(asked);
}

const database = opened();
database.catch(() => {}); // a browser that keeps nothing: the page works on, a reload starts anew

const images = async () => (await database).transaction("images", "readwrite").objectStore("images");

/** The images of this tab, in order; those that anyone left behind a day ago are deleted. */
export async function kept() {
  const store = await images();
  const old = await settled(store.index("kept").getAllKeys(IDBKeyRange.upperBound(Date.now() - DAY_MS)));
  for (const one of old) store.delete(one);
  return settled(store.getAll(own));
}

/** Keep one image with its verdict in its place. */
export const keep = async (place, item) => settled((await images()).put({ ...item, kept: Date.now() }, [tab, place]));

export const forget = async () => settled((await images()).delete(own));
