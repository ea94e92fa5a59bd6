// The table of jobs; on narrow screens its rows become cards (css/responsive.css).
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { age, fullTime, gb, loss, short, visible } from '../format.js';
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
  { key: 'memory', title: 'Peak memory / planned', cls: 'w-mem', hint: 'Stack: measured, by category. Dashed tick: planned peak. Solid line: device limit.' },
  { key: 'device', title: 'Device', cls: 'w-host' },
  { key: 'age', title: 'Age', cls: 'w-age num' },
];

function HeadCell({ column, sort }) {
  const active = sortColumn(sort) === column.key, descending = isDescending(sort);
  const pick = () => {
    const next = clicked(sort, column.key);
    setQuery({ sort: next === NEWEST_FIRST ? '' : next });
  };
  return html`<th class=${column.cls} title=${column.hint} aria-sort=${active ? (descending ? 'descending' : 'ascending') : undefined}>
    <button onClick=${pick}>${column.title}<span aria-hidden="true">${active ? (descending ? ' ↓' : ' ↑') : ''}</span></button></th>`;
}

function MemoryCell({ view }) {
  const { measured, planned, limit } = view;
  const figures = measured
    ? html`<span><span class="strong">${gb(view.peak)}</span><span class="muted"> ${planned ? `of ${gb(view.plannedPeak)} GB` : 'GB, plan not known'}</span></span>`
    : html`<span class="muted">${planned ? `planned ${gb(view.plannedPeak)} GB` : 'not known'}</span>`;
  return html`<td class="w-mem"><${MemoryBar} measured=${measured} planned=${planned} limit=${limit} />
    <span class="row between xs under">${figures}${limit && html`<span class="faint">limit ${gb(limit)}</span>`}</span></td>`;
}

function LossCell({ view }) {
  return html`<td class="w-loss"><span class="row"><${Spark} curve=${view.curve} steps=${view.steps} />
    ${view.lossNotFinite ? html`<span class="bad small nowrap">not finite</span>` : html`<span class=${view.loss == null ? 'faint' : ''}>${loss(view.loss)}</span>`}</span></td>`;
}

function ProgressCell({ view }) {
  const [done, left] = progressText(view), text = visible(done);
  return html`<td class="w-prog"><${Progress} view=${view} /><span class="row between xs under">
    <span class="ell ${view.status === 'failed' ? 'bad' : 'muted'}" title=${text}>${text}</span><span class="nowrap strong">${left}</span></span></td>`;
}

function Row({ view, isCurrent, now }) {
  const second = view.tuned ? `→ ${view.tuned}` : [view.optimizer, view.precision, view.parameters && `${short(view.parameters)} parameters`].filter(Boolean).join(' · ');
  return html`<tr class=${isCurrent ? 'cur' : ''}><td class="w-status"><${Pill} view=${view} /></td>
    <td class="w-name"><a class="name cell ell" href="#/job/${view.id}" title=${view.name}>${visible(view.name)}</a><span class="cell xs faint mono ell hide-s" title=${view.id}>${view.id}</span></td>
    <td class="w-model"><span class="cell ell" title=${view.base}>${view.base}</span><span class="cell xs faint ell hide-s" title=${second}>${second}</span></td>
    <${ProgressCell} view=${view} /><${LossCell} view=${view} /><${MemoryCell} view=${view} />
    <td class="w-host small"><span class="cell ell">${view.host ?? '–'}</span><span class="cell xs faint ell" title=${view.device}>${deviceName(view)}</span></td>
    <td class="w-age num small"><time title=${fullTime(view.createdAt)}>${age(now - view.createdAt)}</time></td></tr>`;
}

export const JobsTable = ({ rows, current, sort, now }) => html`<table class="jobs">
  <colgroup>${COLUMNS.map(column => html`<col class=${column.cls} />`)}</colgroup>
  <thead><tr>${COLUMNS.map(column => html`<${HeadCell} column=${column} sort=${sort} />`)}</tr></thead>
  <tbody>${rows.map((view, index) => html`<${Row} key=${view.id} view=${view} isCurrent=${index === current} now=${now} />`)}</tbody></table>`;

// Rows of the final height with bars of differing lengths.
const SKELETON_ROWS = 8, SKELETON_PERCENT = [60, 80, 70, 90, 40, 85, 50, 45];

export const Skeleton = () => html`<table class="jobs skel" aria-busy="true" aria-label="Loading jobs"><tbody>${Array.from({ length: SKELETON_ROWS }, (_, row) =>
  html`<tr>${SKELETON_PERCENT.map((width, column) => html`<td><span style=${{ width: `${width - ((row * 7 + column * 13) % 25)}%` }}></span></td>`)}</tr>`)}</tbody></table>`;
