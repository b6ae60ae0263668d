// SPDX-License-Identifier: Apache-2.0
// uPlot in our colours: bars with a mark, and lines. Each has a name for screen readers; the numbers stand in tables.
import uPlot from "./vendor/uplot-1.6.32/uPlot.esm.js";
import { el, number } from "./dom.js";

const drawn = new Map(); // element -> how to draw it again, when the width or the colours change

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const FONT = "12px system-ui, sans-serif";

const axis = (label, size) => ({
  label: label || null, stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false },
  font: FONT, labelFont: FONT, labelSize: 18, labelGap: 0, gap: 6, size,
});
const across = (label) => axis(label, 26);
const upwards = (label, size = 44) => axis(label, size);

function chart(label, height, marks, options, data, right = 24) {
  const element = el("div", { class: "chart", role: "img", "aria-label": label });
  element.style.minHeight = `${height}px`; // so that nothing jumps while it is drawn
  const draw = () => {
    if (!element.clientWidth) return;
    element.replaceChildren();
    new uPlot({ width: element.clientWidth, height, padding: [marks.length ? 36 : 8, right, 0, 0], cursor: { show: false }, legend: { show: false }, ...options() }, data, element);
  };
  forgetOld();
  drawn.set(element, draw);
  requestAnimationFrame(draw);
  return element;
}

/** Charts that have left the page; those made in this turn are not on it yet. */
function forgetOld() {
  for (const element of drawn.keys()) {
    if (!element.isConnected && element.childElementCount) drawn.delete(element);
  }
}

export function redraw() {
  for (const [element, draw] of drawn) {
    if (element.isConnected) draw();
    else drawn.delete(element);
  }
}

let pending = 0;
addEventListener("resize", () => { cancelAnimationFrame(pending); pending = requestAnimationFrame(redraw); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

/** Lines upright at values of x, their names above in two rows, where they are in no one's way. */
const verticals = (marks) => ({
  hooks: {
    draw: [(plot) => {
      const { ctx, bbox } = plot, ratio = devicePixelRatio;
      for (const { at, name, colour: hue, dash } of marks) {
        const x = Math.min(Math.max(plot.valToPos(at, "x", true), bbox.left), bbox.left + bbox.width);
        Object.assign(ctx, { strokeStyle: colour(hue), fillStyle: colour(hue), lineWidth: 2 * ratio, font: `600 ${12 * ratio}px system-ui, sans-serif` });
        ctx.setLineDash(dash ? [6 * ratio, 4 * ratio] : []);
        ctx.beginPath();
        ctx.moveTo(x, bbox.top - (dash ? 2 : 18) * ratio);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        ctx.setLineDash([]);
        const room = ctx.measureText(name).width;
        const others = marks.some((other) => other.at < at), fits = x + room < bbox.left + bbox.width + 24 * ratio;
        const left = dash ? !others || !fits : !fits;
        ctx.textAlign = left ? "right" : "left";
        ctx.fillText(name, x + (left ? 3 : -3) * ratio, bbox.top - (dash ? 5 : 21) * ratio);
      }
    }],
  },
});

/**
 * Counts between edges as bars, with marks {at, name, colour, dash}. Where `level` is given, a line across; where
 * `beyond` is, bars from there on in another colour. `clamped`: the end bars hold all that lies beyond the edges too.
 */
export function bars(label, edges, counts, { marks = [], level = null, beyond = Infinity, clamped = false, x = "", y = "", top = null, share = false, height = 230 } = {}) {
  const middles = counts.map((_, index) => (edges[index] + edges[index + 1]) / 2);
  const far = (index) => edges[index + 1] > beyond || (clamped && beyond < Infinity && index === counts.length - 1);
  const data = [middles, counts.map((count, index) => (far(index) ? null : count)), counts.map((count, index) => (far(index) ? count : null)),
    ...(level == null ? [] : [counts.map(() => level)])];
  const room = (edges.at(-1) - edges[0]) / 8; // for marks that lie outside; those still farther away stand at its end
  const within = (at) => Math.min(Math.max(at, edges[0] - room), edges.at(-1) + room);
  const shown = marks.map((mark) => ({ ...mark, at: within(mark.at), name: named(mark, within(mark.at)) }));
  const low = Math.min(edges[0], ...shown.map((mark) => mark.at)), high = Math.max(edges.at(-1), ...shown.map((mark) => mark.at));
  const paths = uPlot.paths.bars({ size: [0.92] });
  const filled = (hue) => ({ fill: colour(hue), stroke: colour(hue), width: 0, paths, points: { show: false } });
  return chart(label, height, shown, () => ({
    scales: { x: { time: false, range: [low, high] }, y: { range: (_, __, most) => [0, 1.08 * (top ?? Math.max(1, most))] } },
    axes: [clamped ? { ...across(x), ...ends(edges), size: 40 } : across(x), share ? shares(y) : upwards(y)],
    series: [{}, filled("series"), filled("bad"), ...(level == null ? [] : [{ stroke: colour("mark"), width: 2, dash: [6, 4], points: { show: false } }])],
    plugins: [verticals(shown)],
  }), data, clamped ? 40 : 24);
}

const named = ({ at, name }, shown) => (at > shown ? `${name} →` : at < shown ? `← ${name}` : name);

/** Ticks from edge to edge; the first and the last say that their bars hold more. */
function ends(edges) {
  const ticks = (parts) => Array.from({ length: parts + 1 }, (_, index) => edges[0] + index * (edges.at(-1) - edges[0]) / parts);
  const text = (tick, index, all) => (index === 0 || index === all.length - 1 ? `${number(tick)}\nand beyond` : number(tick));
  return { splits: (plot) => ticks(plot.width < 320 ? 2 : 4), values: (_, found) => found.map(text) };
}

const shares = (label) => ({ ...upwards(label, 50), values: (_, ticks) => ticks.map((tick) => `${+(100 * tick).toFixed(1)} %`) });

/** Lines over x: series [{name, values, colour, dash, dots, stepped}]; y as a share. */
export function lines(label, xs, series, { x = "", y = "", time = false, top = null, marks = [], height = 280 } = {}) {
  return chart(label, height, marks, () => ({
    legend: { show: true, live: false },
    scales: { x: { time }, y: { range: (_, __, high) => [0, top ?? Math.max(0.01, 1.08 * (high ?? 0))] } },
    axes: [{ ...across(x), ...(time ? { values: clock } : {}) }, shares(y)],
    series: [{}, ...series.map((one) => ({
      label: one.name, stroke: colour(one.colour), width: one.dots ? 1.5 : 2, dash: one.dash ? [5, 4] : [],
      points: { show: Boolean(one.dots), size: 7, fill: colour(one.colour) }, paths: one.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined, spanGaps: Boolean(one.dots),
    }))],
    plugins: [verticals(marks)],
  }), [xs, ...series.map((one) => one.values)]);
}

const clock = (_, ticks) => ticks.map((tick) => new Date(1000 * tick).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));
