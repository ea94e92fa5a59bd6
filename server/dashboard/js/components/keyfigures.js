// The five key figures of a job: label, value, one line of context.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { clock, duration, gb, int, loss, MISSING, percent, short, visible } from '../format.js';
import { planRatio, progressText } from '../jobview.js';
import { Progress } from './basics.js';
import { MemoryBar } from './memory.js';

const Figure = ({ name, aside, value, unit, note, title }) => html`
  <div class="kpi">
    <span class="k row between">${name}${aside && html`<span>${aside}</span>`}</span>
    <span class="v">${value}${unit && html` <small>${unit}</small>`}</span>
    <span class="n" title=${title}>${note}</span>
  </div>`;

/** The newest evaluation in words: its loss, or the share of right choices. */
function evaluationNote(evaluations) {
  const last = evaluations[evaluations.length - 1];
  if (!last) return 'not evaluated yet';
  const at = last.step ? `at step ${int(last.step)}` : 'before training';
  if (last.valid_loss != null) return html`valid <b>${loss(last.valid_loss)}</b> ${at}`;
  return html`right choices <b>${percent(last.choice_accuracy)}</b> ${at}`;
}

function TimeFigure({ view, now }) {
  if (view.over) {
    return html`<${Figure} name="Took" value=${duration(view.took)} note="ended at ${clock(view.finishedAt)} UTC" />`;
  }
  if (view.status === 'queued') {
    const why = visible(progressText(view)[0]);
    return html`<${Figure} name="Done in" value=${MISSING} note=${why} title=${why} />`;
  }
  const known = view.status === 'running' && view.eta != null && !view.cancelRequested;
  if (!known) return html`<${Figure} name="Done in" value=${MISSING} />`;
  return html`<${Figure} name="Done in" value="about ${duration(view.eta)}" note="at ${clock(now + view.eta)} UTC" />`;
}

function MemoryFigure({ view }) {
  const { measured, planned, limit } = view;
  const ratio = view.status === 'succeeded' && planRatio(view);
  const aside = ratio && html`planned / measured <b>${ratio}</b>`;
  const plan = view.plannedPeak ? `of ${gb(view.plannedPeak)} planned` : 'plan not known';
  const most = limit ? `limit ${gb(limit)}` : 'limit not known';
  const bar = html`
    <span class="kpibar"><${MemoryBar} measured=${measured} planned=${planned} limit=${limit} height=${9} /></span>`;
  const value = `${gb(view.peak)} GB`;
  return html`<${Figure} name="Peak memory" aside=${aside} value=${value} unit="${plan} · ${most}" note=${bar} />`;
}

export function KeyFigures({ view, lossText, evaluations, now }) {
  const steps = view.steps && `${int(view.step)} of ${int(view.steps)} steps`;
  const bar = html`<span class="kpibar"><${Progress} view=${view} /></span>`;
  const tokens = view.trainedTokens === null ? 'at the last step' : `${short(view.trainedTokens)} trained tokens`;
  return html`
    <div class="card kpis">
      <${Figure} name="Progress" value="${Math.floor(100 * view.share)} %" unit=${steps} note=${bar} />
      <${TimeFigure} view=${view} now=${now} />
      <${Figure} name="Loss" value=${lossText} unit="train" note=${evaluationNote(evaluations)} />
      <${Figure} name="Tokens/s" value=${int(view.tokensPerSecond)} note=${tokens} />
      <${MemoryFigure} view=${view} />
    </div>`;
}
