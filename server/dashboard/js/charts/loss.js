// Training loss, raw and smoothed, with the validation loss as hollow points.
import { html, useMemo } from '../../vendor/htm-preact-3.1.1.module.js';
import { Value } from '../components/basics.js';
import { loss } from '../format.js';
import { smooth, valueAt } from '../series.js';
import { alpha } from '../theme.js';
import { attemptMarks, axis, stepAxis, whileFew } from './draw.js';
import { cursorIndex, Plot } from './plot.js';

const HEIGHT = 292;

/** The loss at `index` as text; a row without a loss is one whose loss was not finite. */
export function lossText(columns, smoothed, index) {
  const has = columns.loss[index] !== null || columns.time[index] === null;
  return has ? loss(valueAt(smoothed, index)) : 'not finite';
}

export function LossChart({ view, columns, starts, smoothing, log }) {
  const at = cursorIndex.use() ?? columns.step.length - 1;
  const smoothed = useMemo(() => smooth(columns.loss, smoothing), [columns, smoothing]);
  const data = useMemo(
    () => [columns.step, columns.loss_min, columns.loss_max, columns.loss, smoothed, columns.valid],
    [columns, smoothed],
  );
  const hasValid = useMemo(() => columns.valid.some(value => value !== null), [columns]);

  const build = colours => {
    const edge = { stroke: 'transparent', width: 0, spanGaps: true, points: { show: false } };
    return {
      scales: { y: log ? { distr: 3 } : {} },
      axes: [stepAxis(colours), axis(colours, 44, { space: 34 })],
      // A thinned history shows the range of each bucket, so that a spike survives.
      bands: [{ series: [2, 1], fill: alpha(colours.series[0], 0.18) }],
      series: [
        {},
        edge,
        edge,
        { stroke: alpha(colours.series[0], 0.3), width: 1, spanGaps: true, points: { show: false } },
        { stroke: colours.series[0], width: 1.8, spanGaps: true, points: whileFew },
        {
          stroke: colours.series[1],
          width: 1.4,
          dash: [5, 3],
          spanGaps: true,
          points: { show: true, size: 6, fill: colours.surface, width: 1.4 },
        },
      ],
      hooks: { draw: [u => attemptMarks(u, starts.current, colours, { named: false })] },
    };
  };
  const train = lossText(columns, smoothed, at);
  const valid = loss(valueAt(columns.valid, at));
  const summary = `Training loss ${train}${hasValid ? `, validation loss ${valid}` : ''}.`;
  return html`
    <section class="card chart c4">
      <header>
        <h2>Loss</h2>
        <div class="legend">
          <span><i class="sw line s1"></i>train<${Value} text=${train} /></span>
          ${hasValid && html`<span><i class="sw line dash s2"></i>valid<${Value} text=${valid} /></span>`}
        </div>
      </header>
      <${Plot} data=${data} height=${HEIGHT} build=${build} dep=${String(log)} steps=${view.steps} summary=${summary} />
    </section>`;
}
