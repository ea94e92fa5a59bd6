// Plan against measured, by category: the text form of the memory chart, too.
import { html } from '../../vendor/htm-preact-3.1.1.module.js';
import { CATEGORIES } from '../categories.js';
import { gb, MISSING } from '../format.js';
import { planRatio } from '../jobview.js';
import { MemoryBar } from './memory.js';

// Below half of the last digit shown (0.01 GB) a share of the plan says nothing.
const NEGLIGIBLE_BYTES = 5e6;

function offBy(planned, measured) {
  if (planned == null || measured == null || planned < NEGLIGIBLE_BYTES) return MISSING;
  const share = (100 * (measured - planned)) / planned;
  const text = Math.abs(share).toFixed(1);
  return text === '0.0' ? 'exact' : `${share < 0 ? '−' : '+'}${text} %`;
}

function CategoryBar({ category, measured, planned, scale }) {
  const width = bytes => `${(100 * bytes) / scale}%`;
  const { key } = category;
  return html`
    <span class="mem thin" aria-hidden="true">
      ${measured && html`
        <span class="seg-row" style=${{ width: width(measured[key]) }}><i class="cat-${key} all"></i></span>`}
      ${planned && html`<span class="tick" style=${{ left: width(planned[key]) }}></span>`}
    </span>`;
}

const Cells = ({ planned, measured, children }) => html`
  <td class="num">${gb(planned)}</td>
  <td class="num">${gb(measured)}</td>
  <td class="num muted">${offBy(planned, measured)}</td>
  <td class="w-bar">${children}</td>`;

export function PlanTable({ view }) {
  const { measured, planned, limit } = view;
  const ratio = planRatio(view);
  const scale = Math.max(1, ...CATEGORIES.flatMap(({ key }) => [measured?.[key] ?? 0, planned?.[key] ?? 0]));
  const shared = { measured, planned, scale };
  return html`
    <section class="card c4">
      <header class="low">
        <h2 class="grow">Plan against measured</h2>
        <span class="xs faint">${planned ? 'GB, at each peak' : 'GB at the peak · plan not known'}</span>
      </header>
      <table class="pm">
        <thead>
          <tr>
            <th>Category</th><th class="num">Plan</th><th class="num">Measured</th><th class="num">Off by</th>
            <th><span class="sr">Bar</span></th>
          </tr>
        </thead>
        <tbody>
          ${CATEGORIES.map(category => html`
            <tr>
              <td class="nowrap"><span class="row"><i class="sw cat-${category.key}"></i>${category.name}</span></td>
              <${Cells} planned=${planned?.[category.key]} measured=${measured?.[category.key]}>
                <${CategoryBar} category=${category} ...${shared} />
              <//>
            </tr>`)}
          <tr class="tot">
            <td class="nowrap"><span class="row"><i class="sw"></i>Peak</span></td>
            <${Cells} planned=${view.plannedPeak} measured=${view.peak}>
              <${MemoryBar} measured=${measured} planned=${planned} limit=${limit} height=${7} />
            <//>
          </tr>
        </tbody>
        ${ratio && html`
          <tfoot>
            <tr>
              <td class="nowrap muted" colspan="3">planned / measured${view.over ? '' : ', so far'}</td>
              <td class="num strong">${ratio}</td>
              <td></td>
            </tr>
          </tfoot>`}
      </table>
    </section>`;
}
