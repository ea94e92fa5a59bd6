// Memory of each step, stacked by category, with the planned peak and the device's limit.
import { html, useMemo, useRef } from '../../vendor/htm-preact-3.1.1.module.js';
import { Value } from '../components/basics.js';
import { CATEGORIES, STACK_ORDER } from '../categories.js';
import { gb, int } from '../format.js';
import { valueAt } from '../series.js';
import { font, hatch, inkOn, mix } from '../theme.js';
import { attemptMarks, axis, label, levelLine, stepAxis } from './draw.js';
import { cursorIndex, Plot } from './plot.js';

const HEIGHT = 292;
const HEADROOM = 1.17; // the y axis ends at 117 % of its highest line
const TAGS_HEADROOM = 1.3; // with two tags above the stack, which may stand below each other
// A line further above the run than this would squeeze the stack to a sliver: it becomes a tag with an arrow.
const FAR = 2.5;
const LABEL_PX = 16; // lines nearer to each other than this have their labels side by side
const NARROW_PX = 420;
const NAME_PX = 17; // bands less tall go without their name

/** Running sums of the categories, drawn from the top layer down. */
function stack(columns) {
  const sums = columns.step.map(() => 0);
  const layers = STACK_ORDER.map(n =>
    columns[CATEGORIES[n].field].map((value, i) => (value === null ? null : (sums[i] += Math.max(0, value) / 1e9))),
  );
  return [columns.step, ...layers.reverse()];
}

/** The categories' names inside their bands; `lines` are the heights of lines that may cross them. */
function bandNames(u, columns, lines, colours) {
  const c = u.ctx;
  const ratio = devicePixelRatio;
  const { left, width } = u.bbox;
  const x = step => Math.min(left + width, Math.max(left, u.valToPos(step, 'x', true)));
  const start = x(columns.step[columns.peak_bytes.findIndex(value => value !== null)]);
  const end = x(columns.step[columns.step.length - 1]);
  const at = columns.step.findIndex(step => u.valToPos(step, 'x', true) >= start + 0.02 * width);
  if (width < NARROW_PX * ratio || at < 0) return;
  c.save();
  c.font = `500 ${11 * ratio}px ${font()}`;
  c.textBaseline = 'middle';
  c.textAlign = 'left';
  let base = 0;
  for (const n of STACK_ORDER) {
    const { field, name, key } = CATEGORIES[n];
    const height = Math.max(0, valueAt(columns[field], at) ?? 0) / 1e9;
    const low = u.valToPos(base, 'y', true);
    const high = u.valToPos(base + height, 'y', true);
    const middle = (low + high) / 2;
    base += height;
    const nameWidth = c.measureText(name).width;
    if (low - high <= NAME_PX * ratio || end - start < nameWidth + 20 * ratio) continue;
    if (key === 'other' || lines.some(y => Math.abs(y - middle) < 8 * ratio)) {
      // a quiet ground, over the hatch or the line
      c.fillStyle = colours.soft[n];
      c.fillRect(start + 5 * ratio, middle - 8 * ratio, nameWidth + 10 * ratio, 16 * ratio);
    }
    c.fillStyle = inkOn(colours.soft[n]);
    c.fillText(name, start + 10 * ratio, middle);
  }
  c.restore();
}

function stepsToGo(u, last, steps, colours) {
  const c = u.ctx;
  const ratio = devicePixelRatio;
  const right = u.bbox.left + u.bbox.width;
  const x = u.valToPos(last, 'x', true);
  if (!steps || last >= steps || right - x < 110 * ratio) return;
  c.save();
  c.font = `500 ${11 * ratio}px ${font()}`;
  c.textAlign = 'center';
  c.fillStyle = colours.faint;
  c.fillText(`${int(steps - last)} steps to go`, (x + right) / 2, u.bbox.top + u.bbox.height - 14 * ratio);
  c.restore();
}

/** The limit and the planned peak, each with its label at the right end of its line. Returns the lines' heights. */
function levels(u, { limit, planned }, colours) {
  const ratio = devicePixelRatio;
  const narrow = u.bbox.width < NARROW_PX * ratio;
  const right = u.bbox.left + u.bbox.width - 4 * ratio;
  const at = value => u.valToPos(value, 'y', true);
  if (limit) levelLine(u, limit, { colours, dash: [], width: 2 });
  if (planned) levelLine(u, planned, { colours, dash: [6, 4], width: 1.5 });
  let x = right;
  if (limit) {
    const text = `${narrow ? '' : 'device '}limit ${gb(limit * 1e9)} GB`;
    const start = label(u, { x: right, y: at(limit), text, colours, strong: true });
    if (planned && Math.abs(at(limit) - at(planned)) < LABEL_PX * ratio) x = start - 8 * ratio;
  }
  if (planned) {
    const bottom = u.bbox.top + u.bbox.height - (LABEL_PX / 2) * ratio;
    const text = `${narrow ? 'plan' : 'planned peak'} ${gb(planned * 1e9)} GB`;
    label(u, { x, y: Math.min(at(planned), bottom), text, colours });
  }
  return [limit, planned].filter(Boolean).map(at);
}

function draw(u, { columns, view, starts, ...lines }, colours) {
  bandNames(u, columns, levels(u, lines, colours), colours);
  if (!view.over) stepsToGo(u, columns.step[columns.step.length - 1], view.steps, colours);
  attemptMarks(u, starts, colours, { named: false });
}

/** A line that is too far above to be drawn, as a tag: `↑ planned peak 5.00 GB 4.6× this peak`. */
const Far = ({ name, bytes, highest }) => html`
  <span class="ghost">
    ↑ ${name} <b>${gb(bytes)} GB</b>${' '}
    <span class="hide-s">${(bytes / highest).toFixed(bytes < 10 * highest ? 1 : 0)}× this peak</span>
  </span>`;

export function MemoryChart({ view, columns, starts }) {
  const at = cursorIndex.use() ?? columns.step.length - 1;
  const data = useMemo(() => stack(columns), [columns]);
  const highest = useMemo(
    () => Math.max(...columns.peak_bytes.map(v => v ?? 0), ...data[1].map(v => (v ?? 0) * 1e9)),
    [data],
  );
  const { plannedPeak, limit: device } = view;
  const isPlanFar = plannedPeak > FAR * highest;
  const isLimitFar = device > FAR * Math.max(highest, isPlanFar ? 0 : plannedPeak);
  const planned = plannedPeak && !isPlanFar ? plannedPeak / 1e9 : null;
  const limit = device && !isLimitFar ? device / 1e9 : null;
  const latest = useRef();
  latest.current = {
    columns,
    view,
    starts: starts.current,
    limit,
    planned,
    top: (isPlanFar && isLimitFar ? TAGS_HEADROOM : HEADROOM) * Math.max(highest / 1e9, limit ?? 0, planned ?? 0, 1e-3),
  };

  const build = colours => ({
    scales: { y: { range: () => [0, latest.current.top] } },
    axes: [stepAxis(colours), axis(colours, 44, { space: 34 })],
    series: [
      {},
      ...[...STACK_ORDER].reverse().map(n => ({
        label: CATEGORIES[n].name,
        fill:
          CATEGORIES[n].key === 'other'
            ? hatch(mix(colours.categories[n], colours.surface, 0.8), colours.soft[n])
            : colours.soft[n],
        stroke: colours.categories[n],
        width: 1.5,
        spanGaps: true,
        points: { show: false },
      })),
    ],
    cursor: { points: { show: false } },
    hooks: { draw: [u => draw(u, latest.current, colours)] },
  });
  const value = name => gb(valueAt(columns[name], at));
  const planText = plannedPeak ? `planned ${gb(plannedPeak)} GB` : 'plan not known';
  const limitText = device ? `device limit ${gb(device)} GB` : 'limit not known';
  const summary = `Memory by category over steps. Peak ${gb(highest)} GB, ${planText}, ${limitText}.`;
  return html`
    <section class="card chart c8">
      <header>
        <h2>Memory <${Value} text=${value('peak_bytes')} width=${4} /> GB</h2>
        <div class="legend grow">
          ${CATEGORIES.map(({ key, name, field }) => html`
            <span><i class="sw cat-${key}"></i>${name}<${Value} text=${value(field)} width=${4} /></span>`)}
        </div>
      </header>
      <div class="plotbox">
        <${Plot} data=${data} height=${HEIGHT} build=${build} steps=${view.steps} summary=${summary} />
        <div class="ghosts">
          ${isLimitFar && html`<${Far} name="device limit" bytes=${device} highest=${highest} />`}
          ${isPlanFar && html`<${Far} name="planned peak" bytes=${plannedPeak} highest=${highest} />`}
        </div>
      </div>
    </section>`;
}
