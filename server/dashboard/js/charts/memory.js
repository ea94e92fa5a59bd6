// Memory of each step, stacked by category, under the planned peak and the device's limit.
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
// A limit further above the run than this would squeeze the stack to a sliver: it becomes a tag with an arrow.
const FAR = 2.5;
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

function bandNames(u, columns, colours) {
  const c = u.ctx;
  const ratio = devicePixelRatio;
  const { left, width } = u.bbox;
  const at = columns.step.findIndex(step => u.valToPos(step, 'x', true) >= left + 0.02 * width);
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
    if (low - high <= NAME_PX * ratio) continue;
    if (key === 'other') {
      // a quiet ground over the hatch
      c.fillStyle = colours.soft[n];
      c.fillRect(left + 5 * ratio, middle - 8 * ratio, c.measureText(name).width + 10 * ratio, 16 * ratio);
    }
    c.fillStyle = inkOn(colours.soft[n]);
    c.fillText(name, left + 10 * ratio, middle);
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

function draw(u, { columns, view, starts, limit, planned }, colours) {
  const ratio = devicePixelRatio;
  const right = u.bbox.left + u.bbox.width - 4 * ratio;
  const narrow = u.bbox.width < NARROW_PX * ratio;
  bandNames(u, columns, colours);
  if (!view.over) stepsToGo(u, columns.step[columns.step.length - 1], view.steps, colours);
  attemptMarks(u, starts, colours, { named: false });
  if (limit) {
    const y = levelLine(u, limit, { colours, dash: [], width: 2 });
    label(u, { x: right, y, text: `${narrow ? '' : 'device '}limit ${gb(limit * 1e9)} GB`, colours, strong: true });
  }
  if (planned) {
    const y = levelLine(u, planned, { colours, dash: [6, 4], width: 1.5 });
    label(u, { x: right, y, text: `${narrow ? 'plan' : 'planned peak'} ${gb(planned * 1e9)} GB`, colours });
  }
}

export function MemoryChart({ view, columns, starts }) {
  const at = cursorIndex.use() ?? columns.step.length - 1;
  const data = useMemo(() => stack(columns), [columns]);
  const highest = useMemo(
    () => Math.max(...columns.peak_bytes.map(v => v ?? 0), ...data[1].map(v => (v ?? 0) * 1e9)) / 1e9,
    [data],
  );
  const planned = view.planned ? view.plannedPeak / 1e9 : null;
  const device = view.limit ? view.limit / 1e9 : null;
  const far = device !== null && device > FAR * Math.max(highest, planned ?? 0);
  const limit = far ? null : device;
  const latest = useRef();
  latest.current = {
    columns,
    view,
    starts: starts.current,
    limit,
    planned,
    top: HEADROOM * Math.max(highest, limit ?? 0, planned ?? 0, 1e-3),
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
  const planText = planned ? `planned ${gb(view.plannedPeak)} GB` : 'plan not known';
  const limitText = device ? `device limit ${gb(view.limit)} GB` : 'limit not known';
  const summary = `Memory by category over steps. Peak ${gb(highest * 1e9)} GB, ${planText}, ${limitText}.`;
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
        ${far && html`
          <span class="ghost">
            ↑ device limit <b>${gb(view.limit)} GB</b>
            <span class="hide-s">${(device / highest).toFixed(0)}× this peak</span>
          </span>`}
      </div>
    </section>`;
}
