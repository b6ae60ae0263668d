// SPDX-License-Identifier: Apache-2.0
// What outlives a reload: kept in this browser tab, gone when it is closed.

const key = (name) => `oodgate.${name}`;

export function load(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(key(name))) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function save(name, value) {
  try {
    sessionStorage.setItem(key(name), JSON.stringify(value));
  } catch { // more than a tab may keep: the page works on, a reload starts anew
    sessionStorage.removeItem(key(name));
  }
}
