// Before and after: the evaluation before the first step against the newest one. Hollow is before, filled is after.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { int, loss, MISSING, percent } from '../format.js';

// Half of a 95 % interval of a normal distribution, in standard deviations.
const Z95 = 1.96;

const METRICS = [
  { field: 'choice_accuracy', name: 'Right choices', text: percent, share: true },
  { field: 'valid_mean_token_accuracy', name: 'Right tokens', text: percent, share: true },
  { field: 'valid_loss', name: 'Validation loss', text: loss, share: false },
];

/**
 * Half the 95 % interval of the difference of two shares of `n` rows (normal approximation, rows taken as independent).
 * For rows only: the tokens of a row depend on each other, so a share of tokens gets none.
 */
const halfInterval = (before, after, n) => Z95 * Math.sqrt((before * (1 - before) + after * (1 - after)) / n);

function compare(metric, evaluations) {
  const known = evaluations.filter(e => e[metric.field] != null);
  if (!known.length) return null;
  const first = known[0];
  const last = known[known.length - 1];
  const before = first[metric.field];
  const after = last[metric.field];
  const band = metric.field === 'choice_accuracy' ? halfInterval(before, after, last.num_rows) : null;
  const change = after - before;
  const lowerIsBetter = !metric.share;
  return {
    first,
    last,
    before,
    after,
    band,
    change,
    noise: band !== null && Math.abs(change) <= band,
    good: change < 0 === lowerIsBetter,
  };
}

function Dumbbell({ before, after, band }) {
  const at = share => `${100 * Math.min(1, Math.max(0, share))}%`;
  return html`
    <div class="dumb">
      <svg aria-hidden="true">
        <line class="axis" x1="0" x2="100%" y1="10" y2="10" />
        ${band !== null && html`<line class="band" x1=${at(after - band)} x2=${at(after + band)} y1="10" y2="10" />`}
        <line class="link" x1=${at(before)} x2=${at(after)} y1="10" y2="10" />
        <circle class="before" cx=${at(before)} cy="10" r="4.5" />
        <circle class="after" cx=${at(after)} cy="10" r="5" />
      </svg>
    </div>`;
}

/** The change as text and its colour's class: none where it may be noise, or where nothing has changed yet. */
function sayChange(metric, { first, last, change, noise, good }) {
  if (first === last) return ['one evaluation so far', 'muted'];
  const size = metric.share ? `${(100 * Math.abs(change)).toFixed(1)} points` : Math.abs(change).toFixed(3);
  return [`${change > 0 ? '+' : '−'}${size}${noise ? ' (noise)' : ''}`, noise ? 'muted' : good ? 'ok' : 'bad'];
}

function Row({ metric, result }) {
  const { first, last, before, after, band } = result;
  const [change, cls] = sayChange(metric, result);
  const known = first !== last;
  return html`
    <tr>
      <td class="strong">${metric.name}${!metric.share && html`<span class="faint xs">, lower is better</span>`}</td>
      <td class="num muted">${int(last.num_rows)}</td>
      <td class="num">${metric.text(before)}</td>
      <td class="num strong">${known ? metric.text(after) : MISSING}</td>
      <td class="num ${cls}">
        ${change}${known && band !== null && html`<span class="faint xs"> ±${(100 * band).toFixed(1)}</span>`}
      </td>
      <td class="w-dumb">${metric.share && html`<${Dumbbell} before=${before} after=${after} band=${band} />`}</td>
    </tr>`;
}

const NO_FILE = 'This job has no validation file, so there is nothing to compare.';
const NOT_YET = 'Not evaluated yet. The first evaluation comes before the first step.';

export function Evaluation({ state }) {
  const results = METRICS.map(metric => [metric, compare(metric, state.evaluations)]).filter(([, result]) => result);
  if (!results.length) return html`<p class="none muted">${state.job.wire.validation_file ? NOT_YET : NO_FILE}</p>`;
  const { last } = results[0][1];
  const hasShares = results.some(([metric]) => metric.share);
  return html`
    <div class="scroll" tabindex="0" role="region" aria-label="Evaluation">
      <table>
        <thead>
          <tr>
            <th>Metric</th><th class="num">Rows</th><th class="num">Before</th><th class="num">After</th>
            <th class="num">Change</th><th>${hasShares ? '0 – 100' : html`<span class="sr">Picture</span>`}</th>
          </tr>
        </thead>
        <tbody>${results.map(([metric, result]) => html`<${Row} metric=${metric} result=${result} />`)}</tbody>
      </table>
    </div>
    ${hasShares && html`
      <p class="xs faint foot">
        Hollow: the first evaluation. Filled: step ${int(last.step)}. Band: 95 % interval of the change in right choices;
        a change inside it is called noise.
      </p>`}
    ${state.evaluations.length > 2 && html`
      <${History} metrics=${results.map(([metric]) => metric)} evaluations=${state.evaluations} />`}`;
}

const History = ({ metrics, evaluations }) => html`
  <div class="scroll" tabindex="0" role="region" aria-label="Every evaluation">
    <table class="history">
      <thead>
        <tr><th>Step</th><th class="num">Rows</th>${metrics.map(m => html`<th class="num">${m.name}</th>`)}</tr>
      </thead>
      <tbody>
        ${evaluations.map(e => html`
          <tr key=${e.step}>
            <td>${int(e.step)}</td>
            <td class="num muted">${int(e.num_rows)}</td>
            ${metrics.map(m => html`<td class="num">${m.text(e[m.field])}</td>`)}
          </tr>`)}
      </tbody>
    </table>
  </div>`;
