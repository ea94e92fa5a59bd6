// Axes and what is drawn on the canvas beside the series: labels, level lines, marks of attempts.
import { int } from '../format.js';
import { font } from '../theme.js';

// Distances of ticks below this (learning rates of AdaLomo) are written with an exponent.
const SMALLEST_PLAIN = 1e-4;

/** Axis with a set size: uPlot's default clips long labels. Decimals follow the distance of the ticks. */
export function axis(colours, size, { values, ...extra } = {}) {
  const decimals = distance => Math.max(1, (String(distance).split('.')[1] ?? '').length);
  const plain = (tick, distance) =>
    tick && distance < SMALLEST_PLAIN ? tick.toExponential(1) : tick.toFixed(decimals(distance));
  return {
    stroke: colours.faint,
    font: `11px ${font()}`,
    size,
    gap: 4,
    grid: { stroke: colours.line, width: 1 },
    ticks: { show: false },
    values: (u, ticks, axisIndex, space, distance) =>
      ticks.map(tick => (tick == null ? '' : values ? values(tick) : plain(tick, distance))),
    ...extra,
  };
}

/** Steps are whole numbers, and so are their ticks. */
export const stepAxis = colours =>
  axis(colours, 26, { values: step => (Number.isInteger(step) ? int(step) : ''), grid: { show: false }, space: 70 });

/** Points are drawn while there are too few for a line. */
export const whileFew = { show: u => u.data[0].length < 3, size: 5 };

/** A label on its own ground, whose left end is returned. `x`, `y` in canvas pixels; `left`: x is its left end. */
export function label(u, { x, y, text, colours, strong = false, left = false }) {
  const c = u.ctx;
  const ratio = devicePixelRatio;
  const margin = 5 * ratio;
  c.save();
  c.font = `${strong ? 600 : 500} ${11 * ratio}px ${font()}`;
  c.textBaseline = 'middle';
  c.textAlign = left ? 'left' : 'right';
  const width = c.measureText(text).width;
  const start = left ? x - margin : x - width - margin;
  c.fillStyle = colours.surface;
  c.fillRect(start, y - 8 * ratio, width + 2 * margin, 16 * ratio);
  c.fillStyle = colours.text;
  c.fillText(text, x, y);
  c.restore();
  return start;
}

/**
 * A line over the whole width at `value` of the y scale, on a lighter one that parts it from areas that it crosses;
 * returns its height in canvas pixels.
 */
export function levelLine(u, value, { colours, dash, width }) {
  const c = u.ctx;
  const ratio = devicePixelRatio;
  const y = u.valToPos(value, 'y', true);
  const stroke = (colour, thick, pattern) => {
    c.strokeStyle = colour;
    c.lineWidth = thick * ratio;
    c.setLineDash(pattern.map(length => length * ratio));
    c.beginPath();
    c.moveTo(u.bbox.left, y);
    c.lineTo(u.bbox.left + u.bbox.width, y);
    c.stroke();
  };
  c.save();
  stroke(colours.surface, width + 2, []);
  stroke(colours.text, width, dash);
  c.restore();
  return y;
}

/** Attempts, and only attempts, are vertical dotted lines. `starts()` is asked at each drawing. */
export function attemptMarks(u, starts, colours, { named }) {
  const c = u.ctx;
  const ratio = devicePixelRatio;
  const { left, top, width, height } = u.bbox;
  for (const { step, attempt } of starts) {
    const x = u.valToPos(step, 'x', true);
    if (x <= left || x >= left + width) continue;
    c.save();
    c.strokeStyle = colours.warn;
    c.lineWidth = 1.5 * ratio;
    c.setLineDash([2 * ratio, 3 * ratio]);
    c.beginPath();
    c.moveTo(x, top);
    c.lineTo(x, top + height);
    c.stroke();
    c.restore();
    if (named)
      label(u, { x: x + 6 * ratio, y: top + height - 14 * ratio, text: `attempt ${attempt}`, colours, left: true });
  }
}
