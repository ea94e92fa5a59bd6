// Plan against measured, by category: the text form of the memory chart, too.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { CATEGORIES } from '../categories.js';
import { gb, MISSING } from '../format.js';
import { MemoryBar } from './memory.js';

// Below half of the last digit shown (0.01 GB) a share of the plan says nothing.
const NEGLIGIBLE_BYTES = 5e6;

function offBy(planned, measured) {
  if (planned == null || measured == null || planned < NEGLIGIBLE_BYTES) return MISSING;
  const share = (100 * (measured - planned)) / planned, text = Math.abs(share).toFixed(1);
  return text === '0.0' ? 'exact' : `${share < 0 ? '−' : '+'}${text} %`;
}

function CategoryBar({ cls, planned, measured, scale }) {
  return html`<span class="mem thin" aria-hidden="true">
    ${measured != null && html`<span class="seg-row" style=${{ width: `${(100 * measured) / scale}%` }}><i class="cat-${cls} all"></i></span>`}
    ${planned != null && html`<span class="tick" style=${{ left: `${(100 * planned) / scale}%` }}></span>`}</span>`;
}

export function PlanTable({ view }) {
  const { measured, planned } = view;
  const scale = Math.max(1, ...CATEGORIES.flatMap(c => [measured?.[c.key] ?? 0, planned?.[c.key] ?? 0]));
  const row = ({ name, cls, plan, meas, bar }) => html`<tr class=${cls ? '' : 'tot'}>
    <td class="nowrap"><span class="row"><i class="sw ${cls ? `cat-${cls}` : ''}"></i>${name}</span></td>
    <td class="num">${gb(plan)}</td><td class="num">${gb(meas)}</td><td class="num muted">${offBy(plan, meas)}</td><td class="w-bar">${bar}</td></tr>`;
  return html`<section class="card c4"><header class="low"><h2 class="grow">Plan against measured</h2>
      <span class="xs faint">${planned ? 'GB, at each peak' : 'GB at the peak · plan not known'}</span></header>
    <table class="pm"><thead><tr><th>Category</th><th class="num">Plan</th><th class="num">Measured</th><th class="num">Off by</th><th><span class="sr">Bar</span></th></tr></thead>
    <tbody>${CATEGORIES.map(c => row({
      name: c.name, cls: c.key, plan: planned?.[c.key], meas: measured?.[c.key],
      bar: html`<${CategoryBar} cls=${c.key} planned=${planned?.[c.key]} measured=${measured?.[c.key]} scale=${scale} />`,
    }))}
    ${row({
      name: 'Peak', plan: view.plannedPeak, meas: view.peak,
      bar: html`<${MemoryBar} measured=${measured} planned=${planned} limit=${view.limit} height=${7} />`,
    })}</tbody></table></section>`;
}
