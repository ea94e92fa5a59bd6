// Gradient norm before clipping, and the learning rate, on two scales.
import { html, useMemo } from '../../vendor/htm-preact-3.1.1.module.js';
import { Value } from '../components/basics.js';
import { fixed, rate } from '../format.js';
import { valueAt } from '../series.js';
import { attemptMarks, axis, stepAxis, whileFew } from './draw.js';
import { cursorIndex, Plot } from './plot.js';

const HEIGHT = 206;

export function GradientChart({ view, columns, starts }) {
  const at = cursorIndex.use() ?? columns.step.length - 1;
  const data = useMemo(() => [columns.step, columns.grad_norm, columns.learning_rate], [columns]);
  const build = colours => ({
    scales: {
      y: { range: (u, low, high) => [0, (high || 1) * 1.08] },
      lr: { range: (u, low, high) => [0, (high || 1) * 1.1] },
    },
    axes: [
      stepAxis(colours),
      axis(colours, 44, { scale: 'y', space: 30 }),
      axis(colours, 52, { scale: 'lr', side: 1, grid: { show: false }, space: 30 }),
    ],
    series: [
      {},
      { scale: 'y', stroke: colours.series[1], width: 1.1, spanGaps: true, points: whileFew },
      { scale: 'lr', stroke: colours.series[0], width: 1.8, dash: [6, 3], spanGaps: true, points: whileFew },
    ],
    padding: [8, 0, 0, 0],
    hooks: { draw: [u => attemptMarks(u, starts.current, colours, { named: false })] },
  });
  const norm = fixed(valueAt(columns.grad_norm, at), 2);
  const learningRate = rate(valueAt(columns.learning_rate, at));
  const summary = `Gradient norm ${norm}, learning rate ${learningRate}.`;
  return html`
    <section class="card chart c4">
      <header>
        <h2 class="sr">Gradient norm and learning rate</h2>
        <div class="legend named">
          <span><i class="sw line s2"></i><em>Gradient norm</em><${Value} text=${norm} width=${4} /></span>
          <span><i class="sw line dash s1"></i><em>Learning rate</em><${Value} text=${learningRate} width=${7} /></span>
        </div>
      </header>
      <${Plot} data=${data} height=${HEIGHT} build=${build} steps=${view.steps} summary=${summary} />
    </section>`;
}
