// Tokens per second, with the attempts named.
import { html, useMemo } from '../../vendor/htm-preact-3.1.1.module.js';
import { Value } from '../components/basics.js';
import { int, short } from '../format.js';
import { valueAt } from '../series.js';
import { alpha } from '../theme.js';
import { attemptMarks, axis, stepAxis, whileFew } from './draw.js';
import { cursorIndex, Plot } from './plot.js';

const HEIGHT = 206;

export function SpeedChart({ view, columns, starts }) {
  const at = cursorIndex.use() ?? columns.step.length - 1;
  const data = useMemo(() => [columns.step, columns.tokens_per_s], [columns]);
  const mean = useMemo(() => {
    const known = columns.tokens_per_s.filter(value => value !== null);
    return known.reduce((sum, value) => sum + value, 0) / known.length;
  }, [columns]);
  const build = colours => ({
    scales: { y: { range: (u, low, high) => [0, (high || 1) * 1.15] } },
    axes: [stepAxis(colours), axis(colours, 44, { values: short, space: 30 })],
    series: [
      {},
      { stroke: colours.series[2], width: 1.4, fill: alpha(colours.series[2], 0.1), spanGaps: true, points: whileFew },
    ],
    hooks: { draw: [u => attemptMarks(u, starts.current, colours, { named: true })] },
  });
  const now = int(valueAt(columns.tokens_per_s, at));
  const summary = `${now} tokens per second, mean ${int(mean)}.`;
  return html`
    <section class="card chart c4">
      <header>
        <h2>Tokens/s</h2>
        <div class="legend">
          <span><i class="sw line s3"></i>now<${Value} text=${now} /></span>
          <span>mean<${Value} text=${int(mean)} /></span>
        </div>
      </header>
      <${Plot} data=${data} height=${HEIGHT} build=${build} steps=${view.steps} summary=${summary} />
    </section>`;
}
