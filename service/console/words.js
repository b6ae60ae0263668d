// SPDX-License-Identifier: Apache-2.0
// A verdict in words for people who have never heard of conformal p-values.
import { confidence, percent } from "./dom.js";

export function decision(verdict) {
  const says = `The model says “${verdict.prediction.label}” with ${confidence(verdict.prediction.confidence)} confidence`;
  if (verdict.decision === "accept") {
    return { word: "Accepted", text: `${says}, and the image looks like those it was calibrated on: its answer may be used.` };
  }
  if (verdict.reason === "low_confidence") {
    return { word: "Deferred: the model is unsure", text: `${says}: too little. The image looks familiar, but a human or a fallback should decide.` };
  }
  return { word: "Deferred: unlike what the model knows", text: `${says}, but do not rely on it: the image does not look like those the model was calibrated on. A human or a fallback should decide.` };
}

export function rarity(ood) {
  const share = ood.p_value < 0.01 ? `${Math.max(1, Math.round(1000 * ood.p_value))} in 1,000` : `${Math.round(100 * ood.p_value)} in 100`;
  const cut = `Images are deferred below ${ood.p_cutoff.toPrecision(2)}, so that at least ${percent(ood.target_id_acceptance)} of familiar images pass.`;
  return `About ${share} calibration images look as unusual as this one, or more so (p = ${ood.p_value.toPrecision(2)}). ${cut}`;
}

export const BORDERLINE = "This one lies so near a limit that rounding could turn the decision; either is right.";

export const HIDDEN = "This server shows scores, and what explains them, to the admin alone.";
