// SPDX-License-Identifier: Apache-2.0
// Photographs: a phone opens its own camera, a computer shows what its camera sees.
import { $, el } from "./dom.js";

const REFUSED = {
  NotAllowedError: "The browser may not use the camera. Allow it beside the address of this page, or choose a file.",
  NotFoundError: "No camera was found. Connect one, or choose a file.",
};

export function start(take, report) {
  const dialog = $("#shutter"), video = $("video", dialog), [shoot, cancel] = dialog.querySelectorAll("button");
  const ownCamera = matchMedia("(pointer: coarse)").matches || !navigator.mediaDevices; // none over plain HTTP

  $("#photo").addEventListener("click", async () => {
    if (ownCamera) return $("#camera").click();
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
      dialog.showModal();
      await video.play();
    } catch (error) {
      dialog.close();
      report(new Error(REFUSED[error.name] ?? "The camera cannot be used. Another program may hold it; close that, or choose a file."));
    }
  });
  shoot.addEventListener("click", async () => {
    const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => take([new File([blob], "photo.jpg", { type: blob.type })]), "image/jpeg", 0.95);
    dialog.close();
  });
  cancel.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  });
}
