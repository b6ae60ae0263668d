// SPDX-License-Identifier: Apache-2.0
// uPlot in our colours: bars with a mark, and lines. Each has a name for screen readers; the numbers stand in tables.
import uPlot from "./vendor/uplot-1.6.32/uPlot.esm.js";
import { el } from "./dom.js";

const drawn = new Map(); // element -> how to draw it again, when the width or the colours change

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const axis = (label) => ({
  label, stroke: colour("ink"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line") },
  font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 20, size: label ? 44 : 40,
});

function chart(label, height, options, data) {
  const element = el("div", { class: "chart", role: "img", "aria-label": label });
  element.style.minHeight = `${height}px`; // so that nothing jumps while it is drawn
  const draw = () => {
    if (!element.clientWidth) return;
    element.replaceChildren();
    new uPlot({ width: element.clientWidth, height, cursor: { show: false }, legend: { show: false }, ...options() }, data, element);
  };
  drawn.set(element, draw);
  requestAnimationFrame(draw);
  return element;
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

const verticals = (marks) => ({
  hooks: {
    draw: [(plot) => {
      for (const { at, name, colour: hue, dash } of marks) {
        const x = Math.min(Math.max(plot.valToPos(at, "x", true), plot.bbox.left), plot.bbox.left + plot.bbox.width);
        const right = x > plot.bbox.left + plot.bbox.width / 2;
        Object.assign(plot.ctx, { strokeStyle: colour(hue), fillStyle: colour(hue), lineWidth: 2 * devicePixelRatio,
          font: `${12 * devicePixelRatio}px system-ui, sans-serif`, textAlign: right ? "right" : "left" });
        plot.ctx.setLineDash(dash ? [6, 4] : []);
        plot.ctx.beginPath();
        plot.ctx.moveTo(x, plot.bbox.top);
        plot.ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
        plot.ctx.stroke();
        plot.ctx.setLineDash([]);
        Object.assign(plot.ctx, { strokeStyle: colour("paper"), lineWidth: 4 * devicePixelRatio, lineJoin: "round" });
        const place = [name, x + (right ? -6 : 6) * devicePixelRatio, plot.bbox.top + (dash ? 12 : 28) * devicePixelRatio];
        plot.ctx.strokeText(...place); // so that it can be read over bars
        plot.ctx.fillText(...place);
      }
    }],
  },
});

/** Counts between edges as bars, with marks {at, name, colour, dash} and, where `level` is given, a line across. */
export function bars(label, edges, counts, { marks = [], level = null, x = "", height = 180 } = {}) {
  const middles = counts.map((_, index) => (edges[index] + edges[index + 1]) / 2);
  const data = [middles, counts, ...(level == null ? [] : [counts.map(() => level)])];
  const low = Math.min(edges[0], ...marks.map((mark) => mark.at)), high = Math.max(edges.at(-1), ...marks.map((mark) => mark.at));
  return chart(label, height, () => ({
    scales: { x: { time: false, range: [low, high] }, y: { range: (_, __, top) => [0, Math.max(1, 1.08 * top)] } },
    axes: [axis(x), axis("")],
    series: [{}, { fill: colour("series"), stroke: colour("series"), width: 0, paths: uPlot.paths.bars({ size: [0.92] }), points: { show: false } },
      ...(level == null ? [] : [{ stroke: colour("mark"), width: 2, dash: [6, 4], points: { show: false } }])],
    plugins: [verticals(marks)],
  }), data);
}

/** Lines over x: series [{name, values, colour, dash, dots}]; y as a share. */
export function lines(label, xs, series, { x = "", time = false, top = null, marks = [], height = 220, legend = false } = {}) {
  return chart(label, height, () => ({
    legend: { show: legend, live: false },
    scales: { x: { time }, y: { range: (_, __, high) => [0, top ?? Math.max(0.01, 1.08 * (high ?? 0))] } },
    axes: [axis(x), { ...axis(""), values: (_, ticks) => ticks.map((tick) => `${+(100 * tick).toFixed(1)} %`), size: 52 }],
    series: [{}, ...series.map((one) => ({
      label: one.name, stroke: one.hue ?? colour(one.colour), width: one.dots ? 1.5 : 2, dash: one.dash ? [5, 4] : [],
      points: { show: Boolean(one.dots), size: 6 }, paths: one.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined, spanGaps: Boolean(one.dots),
    }))],
    plugins: [verticals(marks)],
  }), [xs, ...series.map((one) => one.values)]);
}
