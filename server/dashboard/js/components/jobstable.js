// The table of jobs; on narrow screens its rows become cards (css/responsive.css).
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { age, fullTime, gb, loss, MISSING, short, visible } from '../format.js';
import { deviceName, progressText } from '../jobview.js';
import { setQuery } from '../router.js';
import { clicked, isDescending, NEWEST_FIRST, sortColumn } from '../sorting.js';
import { Pill, Progress, Spark } from './basics.js';
import { MemoryBar } from './memory.js';

const COLUMNS = [
  { key: 'status', title: 'Status', cls: 'w-status' },
  { key: 'name', title: 'Job', cls: 'w-name' },
  { key: 'base', title: 'Base → tuned model', cls: 'w-model' },
  { key: 'progress', title: 'Progress', cls: 'w-prog' },
  { key: 'loss', title: 'Training loss', cls: 'w-loss' },
  {
    key: 'memory',
    title: 'Peak memory / planned',
    cls: 'w-mem',
    hint: 'Stack: measured, by category. Dashed tick: planned peak. Solid line: device limit.',
  },
  { key: 'device', title: 'Device', cls: 'w-host' },
  { key: 'age', title: 'Age', cls: 'w-age num' },
];

function HeadCell({ column, sort }) {
  const active = sortColumn(sort) === column.key;
  const [order, arrow] = isDescending(sort) ? ['descending', ' ↓'] : ['ascending', ' ↑'];
  const pick = () => {
    const next = clicked(sort, column.key);
    setQuery({ sort: next === NEWEST_FIRST ? '' : next });
  };
  return html`
    <th class=${column.cls} title=${column.hint} aria-sort=${active ? order : undefined}>
      <button onClick=${pick}>${column.title}<span aria-hidden="true">${active && arrow}</span></button>
    </th>`;
}

function MemoryCell({ view }) {
  const { measured, planned, limit } = view;
  const planText = planned ? `planned ${gb(view.plannedPeak)} GB` : 'not known';
  const besides = planned ? ` of ${gb(view.plannedPeak)} GB` : ' GB, plan not known';
  return html`
    <td class="w-mem">
      <${MemoryBar} measured=${measured} planned=${planned} limit=${limit} />
      <span class="row between xs under">
        ${measured
          ? html`<span><span class="strong">${gb(view.peak)}</span><span class="muted">${besides}</span></span>`
          : html`<span class="muted">${planText}</span>`}
        ${limit && html`<span class="faint">limit ${gb(limit)}</span>`}
      </span>
    </td>`;
}

function LossCell({ view }) {
  const known = [view.loss == null && 'faint', loss(view.loss)];
  const [cls, text] = view.lossNotFinite ? ['bad small nowrap', 'not finite'] : known;
  return html`
    <td class="w-loss">
      <span class="row"><${Spark} curve=${view.curve} steps=${view.steps} /><span class=${cls}>${text}</span></span>
    </td>`;
}

function ProgressCell({ view }) {
  const [done, left] = progressText(view);
  const text = visible(done);
  return html`
    <td class="w-prog">
      <${Progress} view=${view} />
      <span class="row between xs under">
        <span class="ell ${view.status === 'failed' ? 'bad' : 'muted'}" title=${text}>${text}</span>
        <span class="nowrap strong">${left}</span>
      </span>
    </td>`;
}

/** Two lines of a cell; what does not fit is cut, and whole in the title. */
const Lines = ({ first, second, cls = '' }) => html`
  <span class="cell ell" title=${first}>${first}</span>
  <span class="cell xs faint ell ${cls}" title=${second}>${second}</span>`;

/** What the base model becomes or, until then, how it is trained. */
function tunedOrHow(view) {
  if (view.tuned) return `→ ${view.tuned}`;
  const size = view.parameters && `${short(view.parameters)} parameters`;
  return [view.optimizer, view.precision, size].filter(Boolean).join(' · ');
}

function Row({ view, isCurrent, now }) {
  return html`
    <tr class=${isCurrent ? 'cur' : ''}>
      <td class="w-status"><${Pill} view=${view} /></td>
      <td class="w-name">
        <a class="name cell ell" href="#/job/${view.id}" title=${view.name}>${visible(view.name)}</a>
        ${view.name !== view.id && html`<span class="cell xs faint mono ell hide-s" title=${view.id}>${view.id}</span>`}
      </td>
      <td class="w-model"><${Lines} first=${view.base} second=${tunedOrHow(view)} cls="hide-s" /></td>
      <${ProgressCell} view=${view} />
      <${LossCell} view=${view} />
      <${MemoryCell} view=${view} />
      <td class="w-host small"><${Lines} first=${view.host ?? MISSING} second=${deviceName(view)} /></td>
      <td class="w-age num small"><time title=${fullTime(view.createdAt)}>${age(now - view.createdAt)}</time></td>
    </tr>`;
}

export const JobsTable = ({ rows, current, sort, now }) => html`
  <table class="jobs">
    <colgroup>${COLUMNS.map(column => html`<col class=${column.cls} />`)}</colgroup>
    <thead><tr>${COLUMNS.map(column => html`<${HeadCell} column=${column} sort=${sort} />`)}</tr></thead>
    <tbody>
      ${rows.map((view, n) => html`<${Row} key=${view.id} view=${view} isCurrent=${n === current} now=${now} />`)}
    </tbody>
  </table>`;

// Rows of the final height with bars of differing lengths.
const SKELETON_ROWS = 8;
const SKELETON_PERCENT = [60, 80, 70, 90, 40, 85, 50, 45];

const SkeletonCell = (width, row, column) =>
  html`<td><span style=${{ width: `${width - ((row * 7 + column * 13) % 25)}%` }}></span></td>`;

export const Skeleton = () => html`
  <table class="jobs skel" aria-busy="true" aria-label="Loading jobs">
    <tbody>
      ${Array.from({ length: SKELETON_ROWS }, (_, row) => html`
        <tr>${SKELETON_PERCENT.map((width, column) => SkeletonCell(width, row, column))}</tr>`)}
    </tbody>
  </table>`;
