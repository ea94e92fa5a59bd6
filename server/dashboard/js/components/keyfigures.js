// The five key figures of a job: label, value, one line of context.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { clock, duration, gb, int, loss, MISSING, percent, short } from '../format.js';
import { Progress } from './basics.js';
import { MemoryBar } from './memory.js';

const Figure = ({ name, value, note }) =>
  html`<div class="kpi"><span class="k">${name}</span><span class="v">${value}</span><span class="n">${note}</span></div>`;

/** The newest evaluation in words: its loss, or the share of right choices. */
function evaluationNote(evaluations) {
  const last = evaluations[evaluations.length - 1];
  if (!last) return 'not evaluated yet';
  const at = last.step ? `at step ${int(last.step)}` : 'before training';
  if (last.valid_loss != null) return html`valid <b>${loss(last.valid_loss)}</b> ${at}`;
  return html`right choices <b>${percent(last.choice_accuracy)}</b> ${at}`;
}

function TimeFigure({ view, now }) {
  if (view.over) return html`<${Figure} name="Took" value=${duration(view.took)} note="ended at ${clock(view.finishedAt)} UTC" />`;
  const known = view.status === 'running' && view.eta != null && !view.cancelRequested;
  return html`<${Figure} name="Done in" value=${known ? `about ${duration(view.eta)}` : MISSING} note=${known ? `at ${clock(now + view.eta)} UTC` : ''} />`;
}

function memoryNote(view) {
  const plan = view.planned ? `of ${gb(view.plannedPeak)} planned` : 'plan not known';
  return `${plan} · ${view.limit ? `limit ${gb(view.limit)}` : 'limit not known'}`;
}

export function KeyFigures({ view, lossText, evaluations, now }) {
  const steps = view.steps ? `${int(view.step)} of ${int(view.steps)} steps` : '';
  return html`<div class="card kpis">
    <${Figure} name="Progress" value=${html`${Math.floor(100 * view.share)} % <small>${steps}</small>`}
      note=${html`<span class="kpibar"><${Progress} view=${view} /></span>`} />
    <${TimeFigure} view=${view} now=${now} />
    <${Figure} name="Loss" value=${html`${lossText} <small>train</small>`} note=${evaluationNote(evaluations)} />
    <${Figure} name="Tokens/s" value=${int(view.tokensPerSecond)}
      note=${view.trainedTokens === null ? 'at the last step' : `${short(view.trainedTokens)} trained tokens`} />
    <${Figure} name="Peak memory" value=${html`${gb(view.peak)} GB <small>${memoryNote(view)}</small>`}
      note=${html`<span class="kpibar"><${MemoryBar} measured=${view.measured} planned=${view.planned} limit=${view.limit} height=${9} /></span>`} /></div>`;
}
